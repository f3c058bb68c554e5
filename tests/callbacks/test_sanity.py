import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.sanity import StopOnNonFinite
from lightning_distill.data import ShapesData
from lightning_distill.errors import NonFiniteError
from tests.toy import ManualToyModule, ToyModule


class BrokenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class BreaksInBackward(ToyModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return BrokenGradient.apply(loss) if self.global_step == 3 else loss


class SkippingStrategy(SingleDeviceStrategy):
    """A strategy that skips steps if gradients are not finite, as DeepSpeed does."""

    steps_taken = 0
    skipped_steps = 5  # before the interruption

    def gradient_norm(self):
        return None


class SkipSteps(Callback):
    """Skips a step at step 3."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.strategy.skipped_steps = 5 + (trainer.global_step >= 3)


def test_run_stops_when_the_strategy_skips_a_step(tmp_path):
    module = ToyModule()
    trainer = Trainer(
        max_steps=8,
        strategy=SkippingStrategy(device="cpu"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SkipSteps(), AtomicCheckpoint(str(tmp_path), every_n_train_steps=1), StopOnNonFinite()],
    )
    with pytest.raises(NonFiniteError, match="the gradient norm became inf"):
        trainer.fit(module, ShapesData(size=32, batch_size=8, prompts_per_category=1))
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 3


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            ToyModule(break_at=3),
            "at step 3; lower the learning rate .*resume with --ckpt_path .*step=3.ckpt",
        ),
        (ManualToyModule(break_at=3), "the loss became nan at step 3"),
        (BreaksInBackward(), "the gradient norm became (nan|inf) at step 3"),
    ],
)
def test_run_stops_with_finite_weights_and_checkpoints(tmp_path, module, message):
    trainer = Trainer(
        max_steps=8,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AtomicCheckpoint(str(tmp_path), every_n_train_steps=1), StopOnNonFinite()],
    )
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit(module, ShapesData(size=32, batch_size=8, prompts_per_category=1))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 3
    for name, parameter in module.state_dict().items():
        assert torch.equal(parameter, saved["state_dict"][name])
        assert parameter.isfinite().all()
