import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.non_finite import SavedState, broken_sample, explain, largest_weights
from lightning_distill.callbacks.sanity import StopOnNonFinite
from lightning_distill.data import ShapesData
from lightning_distill.errors import NonFiniteError
from tests.toy import ToyModule

NAN = math.nan


class Method(nn.Module):
    """Student, EMA and critic of one weight each."""

    auxiliary_paths = ("alignment.critic",)

    def __init__(self, student: float = 1.0, ema: float = 1.0, critic: float = 1.0) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({"student": nn.Linear(1, 1, False), "ema": nn.Linear(1, 1, False)})
        self.alignment = nn.ModuleDict({"critic": nn.Linear(1, 1, False)})
        values = (student, ema, critic)
        networks = (self.networks["student"], self.networks["ema"], self.alignment["critic"])
        for network, value in zip(networks, values, strict=True):
            nn.init.constant_(network.weight, value)

    def auxiliary_optimizers(self):
        return {}

    def saved_names(self):
        return set(self.state_dict())


class States(Callback):
    def __init__(self, *saved_states: SavedState) -> None:
        self.saved_states = saved_states


def message(module, network=None, batch=None, states=()) -> str:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    trainer = SimpleNamespace(global_step=9, optimizers=[optimizer], checkpoint_callbacks=[States(*states)])
    return explain(NonFiniteError("it became nan at step 9", network), trainer, module, largest_weights(Method()), batch)


def test_largest_weights_of_each_network():
    assert largest_weights(Method(-2, 3, 4)) == {"student": 2, "EMA": 3, "critic": 4}
    assert math.isnan(largest_weights(Method(student=NAN))["student"])


@pytest.mark.parametrize("network", [None, "critic"])
def test_student_whose_weights_grew_is_the_cause(network):
    text = message(Method(student=1e6, ema=1e5), network)
    assert "the largest weight of the student went from 1 to 1e+06; lower the learning rate, now 0.5" in text
    assert "critic" not in text


def test_critic_whose_weights_grew_is_the_cause():
    assert "weight of the critic went from 1 to nan; lower the learning rate of the critic" in message(Method(critic=NAN))


def test_ema_is_the_cause_if_the_student_is_finite():
    assert "the largest weight of the EMA went from 1 to nan" in message(Method(ema=NAN))


def test_without_growth_the_network_of_the_error_is_named():
    assert "nan at step 9; lower the learning rate of the critic or set trainer.gradient_clip" in message(Method(), "critic")
    assert "nan at step 9; lower the learning rate or set" in message(Method())


def test_sample_that_is_not_finite_is_the_cause():
    batch = {"latents": torch.zeros(3, 2, 2), "prompt": ["a", "b", "a red circle"], "index": torch.arange(3)}
    assert broken_sample(batch) is None
    batch["latents"][2, 0, 0] = NAN
    text = message(Method(), batch=batch)
    assert "the values 'latents' of a data sample, number 3 of its batch, with the prompt 'a red circle', are not" in text
    assert "learning rate" not in text


def test_newest_checkpoint_from_before_the_growth_is_named(tmp_path):
    states = []
    for step, largest in ((6, 1.0), (7, 2.0), (8, 1e5)):
        path = tmp_path / f"{step}.ckpt"
        path.touch()
        states.append(SavedState(str(path), step, largest))
    assert message(Method(student=1e6), states=states).endswith("7.ckpt (step 7)")
    (tmp_path / "7.ckpt").unlink()
    assert message(Method(student=1e6), states=states).endswith("6.ckpt (step 6)")
    assert message(Method(student=1e6)).endswith("start again: there is no checkpoint from before")


class Spoil(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            next(pl_module.parameters()).data.view(-1)[0] = NAN


def test_weights_are_checked_at_the_end_of_training(tmp_path):
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Spoil(), StopOnNonFinite(), AtomicCheckpoint(str(tmp_path), every_n_train_steps=2)],
    )
    with pytest.raises(NonFiniteError, match=r"the network is not finite at step 3 .*resume with .*step=2.ckpt .step 2"):
        trainer.fit(ToyModule(), ShapesData(size=32, batch_size=8, prompts_per_category=1))
