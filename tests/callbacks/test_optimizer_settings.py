"""A resumed run has the optimizer settings and learning rates that it configures, at the step of the checkpoint."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import Dataset

from lightning_distill.callbacks.optimizer_settings import OptimizerSettings
from lightning_distill.data.resumable import ResumableData
from lightning_distill.errors import ConfigurationError
from lightning_distill.optimizers import MuonWithAdamW, WarmupCosine, split_parameters

STEPS, RESUMED = 8, 3
pytestmark = pytest.mark.filterwarnings("ignore:You passed in a .val_dataloader")
Scheduler = Callable[[Optimizer], Any]


class Points(Dataset[Tensor]):
    """Eight points of ones."""

    def __len__(self) -> int:
        return 8

    def __getitems__(self, indices: list[int]) -> Tensor:
        return torch.ones(len(indices), 2)


class PointsData(ResumableData):
    """Batches of two points, four an epoch."""

    def __init__(self) -> None:
        super().__init__(batch_size=2, seed=0, num_workers=0)

    def setup(self, stage: str) -> None:
        self._train = Points()


class Blocks(nn.Module):
    """A matrix of a block, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks[0](x)
        return result


class Scheduled(LightningModule):
    """Records the settings of the first parameter group that each step trains with."""

    def __init__(
        self,
        scheduler: Scheduler | None = None,
        optimizer: Callable[..., Optimizer] = Adam,
        interval: str = "step",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.network = Blocks()
        self.make_scheduler, self.make_optimizer, self.settings = scheduler, optimizer, {"lr": 0.01} | settings
        self.interval = interval
        self.groups: list[dict[str, Any]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).square().mean()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        group = {
            name: float(v) if isinstance(v, Tensor) else v for name, v in optimizer.param_groups[0].items() if name != "params"
        }
        self.groups.append(group)

    def on_train_epoch_end(self) -> None:
        self.log("measured", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(split_parameters(self.network.named_parameters()), **self.settings)
        if self.make_scheduler is None:
            return optimizer
        config = {"scheduler": self.make_scheduler(optimizer), "interval": self.interval, "monitor": "measured"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def fit(
    directory: Path, steps: int, resume: bool, module: Scheduled, callbacks: tuple[type, ...] = (OptimizerSettings,)
) -> list[float]:
    """The learning rates of the steps; the checkpoint in the directory is read and written."""
    checkpoint = directory / "last.ckpt"
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[kind() for kind in callbacks],
    )
    trainer.fit(module, PointsData(), ckpt_path=checkpoint if resume else None)
    trainer.save_checkpoint(checkpoint)
    return [group["lr"] for group in module.groups]


def sequential(optimizer: Optimizer) -> schedulers.LRScheduler:
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=2), schedulers.ExponentialLR(optimizer, 0.9)]
    return schedulers.SequentialLR(optimizer, parts, [2])


SCHEDULERS: dict[str, Scheduler | None] = {
    "none": None,
    "finished cosine": lambda optimizer: WarmupCosine(optimizer, 2),
    "cosine": lambda optimizer: WarmupCosine(optimizer, 8, warmup_steps=1),
    "longer cosine": lambda optimizer: WarmupCosine(optimizer, 12, last_fraction=0.1),
    "exponential": lambda optimizer: schedulers.ExponentialLR(optimizer, 0.8),
    "annealing": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 7),
    "one cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.02, total_steps=20),
    "sequential": sequential,
}
CHANGES = [pair for pair in itertools.permutations(SCHEDULERS, 2) if {"none", "cosine", "annealing"} & set(pair)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The learning rates of uninterrupted runs, by schedule and base rate."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return {
        (name, lr): fit(directory, STEPS, False, Scheduled(scheduler, lr=lr))
        for name, scheduler in SCHEDULERS.items()
        for lr in (0.01, 0.004)
    }


@pytest.mark.parametrize("name", SCHEDULERS)
def test_unchanged_settings_repeat_the_uninterrupted_run_without_a_warning(uninterrupted, tmp_path, name):
    fit(tmp_path, RESUMED, False, Scheduled(SCHEDULERS[name]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training continues with changed")
        rates = fit(tmp_path, STEPS, True, Scheduled(SCHEDULERS[name]))
    assert rates == uninterrupted[name, 0.01][RESUMED:]


@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_a_changed_schedule_is_that_of_a_run_from_the_first_step(uninterrupted, tmp_path, first, second):
    fit(tmp_path, RESUMED, False, Scheduled(SCHEDULERS[first]))
    with pytest.warns(UserWarning, match=r"training continues with changed optimizer settings: .*\blr(_scheduler)? .* -> "):
        rates = fit(tmp_path, STEPS, True, Scheduled(SCHEDULERS[second]))
    assert rates == pytest.approx(uninterrupted[second, 0.01][RESUMED:])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_changed_learning_rate_counts_from_the_first_step(uninterrupted, tmp_path, name):
    fit(tmp_path, RESUMED, False, Scheduled(SCHEDULERS[name]))
    rates = fit(tmp_path, RESUMED + 2, True, Scheduled(SCHEDULERS[name], lr=0.004))
    rates += fit(tmp_path, STEPS, True, Scheduled(SCHEDULERS[name], lr=0.004))  # and again at the second resume
    assert rates == pytest.approx(uninterrupted[name, 0.004][RESUMED:])


def test_a_finished_schedule_is_left_behind(tmp_path):
    fit(tmp_path, 4, False, Scheduled(SCHEDULERS["finished cosine"]))
    module = Scheduled(lr=0.002)
    with pytest.warns(UserWarning, match=r"changed optimizer settings: lr_scheduler WarmupCosine -> none, lr 0\.0 -> 0\.002"):
        assert fit(tmp_path, 6, True, module) == [0.002, 0.002]
    assert "initial_lr" not in module.groups[0]


def test_without_the_callback_the_checkpoint_overrides(tmp_path):
    fit(tmp_path, 2, False, Scheduled())
    assert fit(tmp_path, 3, True, Scheduled(lr=0.002), callbacks=()) == [0.01]


def test_a_checkpoint_without_the_callback_is_continued_with_the_configured_rates(uninterrupted, tmp_path):
    fit(tmp_path, RESUMED, False, Scheduled(SCHEDULERS["cosine"]), callbacks=())
    assert fit(tmp_path, RESUMED + 2, True, Scheduled(lr=0.004)) == [0.004, 0.004]
    assert fit(tmp_path, STEPS, True, Scheduled(SCHEDULERS["cosine"])) == uninterrupted["cosine", 0.01][RESUMED + 2 :]


def test_other_settings_are_applied_and_equal_ones_stay_as_restored(tmp_path):
    def adapts(module: Scheduled) -> None:
        module.on_train_end = lambda: module.optimizers().param_groups[0].update(eps=0.5)

    first = Scheduled(weight_decay=0.1)
    adapts(first)
    fit(tmp_path, 2, False, first)
    second = Scheduled(weight_decay=0.2, betas=(0.5, 0.9))
    with pytest.warns(UserWarning, match=r"betas \(0\.9, 0\.999\) -> \(0\.5, 0\.9\), weight_decay 0\.1 -> 0\.2"):
        fit(tmp_path, 3, True, second)
    (group,) = second.groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.9), 0.2, 0.5)


def test_momentum_of_a_cycle_is_that_of_the_step(tmp_path):
    whole = Scheduled(SCHEDULERS["one cycle"])
    fit(tmp_path, STEPS, False, whole)
    fit(tmp_path, RESUMED, False, Scheduled())
    second = Scheduled(SCHEDULERS["one cycle"])
    fit(tmp_path, STEPS, True, second)
    assert [group["betas"][0] for group in second.groups] == pytest.approx(
        [group["betas"][0] for group in whole.groups[RESUMED:]]
    )


def test_schedules_by_epoch_count_epochs(tmp_path):
    settings = {"scheduler": SCHEDULERS["exponential"], "interval": "epoch"}
    expected = fit(tmp_path, 12, False, Scheduled(**settings))
    fit(tmp_path, 8, False, Scheduled())
    assert fit(tmp_path, 12, True, Scheduled(**settings)) == pytest.approx(expected[8:])


def plateau(optimizer: Optimizer, **settings: Any) -> schedulers.ReduceLROnPlateau:
    return schedulers.ReduceLROnPlateau(optimizer, **({"patience": 0, "factor": 0.5} | settings))


def test_measured_rates_continue_at_the_new_base_rate_and_arguments(tmp_path):
    settings = {"scheduler": plateau, "interval": "epoch"}
    assert fit(tmp_path, 12, False, Scheduled(**settings))[-1] == 0.005
    rates = fit(tmp_path, 24, True, Scheduled(lambda optimizer: plateau(optimizer, factor=0.1), interval="epoch", lr=0.002))
    assert (rates[0], rates[-1]) == pytest.approx((5e-4, 5e-5))
    fit(tmp_path, 3, False, Scheduled(SCHEDULERS["finished cosine"]))
    assert fit(tmp_path, 4, True, Scheduled(**settings)) == [0.01]


def test_the_groups_of_muon_and_adamw_have_their_own_rates(tmp_path):
    schedule = SCHEDULERS["finished cosine"]
    fit(tmp_path, 3, False, Scheduled(schedule, MuonWithAdamW))
    module = Scheduled(None, MuonWithAdamW, lr=0.02, adamw_lr=0.003)
    fit(tmp_path, 5, True, module)
    assert [group["lr"] for group in module.trainer.optimizers[0].param_groups] == [0.02, 0.003]


def test_a_learning_rate_in_a_tensor_stays_a_tensor(tmp_path):
    fit(tmp_path, 2, False, Scheduled(SCHEDULERS["cosine"], lr=torch.tensor(0.01)))
    module = Scheduled(lr=torch.tensor(0.002))
    assert fit(tmp_path, 3, True, module) == pytest.approx([0.002])
    assert isinstance(module.trainer.optimizers[0].param_groups[0]["lr"], Tensor)


@pytest.mark.parametrize("other", [SGD, AdamW])
def test_states_of_another_optimizer_are_an_error(tmp_path, other):
    fit(tmp_path, 2, False, Scheduled())
    with pytest.raises(
        ConfigurationError, match=rf"model\.optimizer is {other.__name__}, and the checkpoint has the states of Adam;"
    ):
        fit(tmp_path, 3, True, Scheduled(optimizer=other))
