"""The metrics that methods declare, and the check of what callbacks monitor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torchmetrics import Metric

import lightning_distill.methods
from lightning_distill.callbacks import SwitchSolution
from lightning_distill.data import ShapesData
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import Autoencoder, FlowMatching, MeanFlow, TeacherStudentBase, ValidationOptions
from lightning_distill.methods.monitors import check_monitors
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, loader, trainer

ERROR = "val/average_velocity_error"


class Brightness(Metric):
    """Mean of all images, and the value of red."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, prompts: list[str]) -> None:
        self.values.append(images.flatten(1).mean(1))

    def compute(self) -> dict[str, Tensor]:
        return dict.fromkeys(("overall", "red"), torch.cat(self.values).mean())


def method(kind: type[TeacherStudentBase] = MeanFlow, **settings: Any) -> Any:
    return kind(GaussianAdapter("small"), **({"validation": VALIDATION} | settings))


@pytest.mark.parametrize("metric", [None, Brightness()])
@pytest.mark.parametrize(
    ("kind", "error"), [(MeanFlow, True), (MeanFlow, False), (FlowMatching, True)], ids=["error", "no_error", "no_teacher"]
)
def test_declared_metrics_are_those_that_validation_logs(
    tmp_path: Path, kind: type[TeacherStudentBase], error: bool, metric: Metric | None
) -> None:
    validation = ValidationOptions(nfe=(1, 2), height=4, width=4, samples=8, average_velocity=error)
    module, run = method(kind, metric=metric, validation=validation), trainer(tmp_path)
    run.validate(module, loader(), verbose=False)
    assert {name for name in run.callback_metrics if not name.endswith("/red")} == set(module.validation_metrics)


def test_declared_metrics_of_the_autoencoder_are_those_that_validation_logs(tmp_path: Path) -> None:
    module, run = Autoencoder(str(tmp_path), (4, 8), norm_num_groups=2, latent_channels=2), trainer(tmp_path)
    run.validate(module, ShapesData(size=8, batch_size=8, prompts_per_category=1), verbose=False)
    assert set(run.callback_metrics) == set(module.validation_metrics)


@pytest.mark.parametrize("name", lightning_distill.methods.__all__)
def test_only_the_base_logs_metrics_of_validation(name: str) -> None:
    kind = getattr(lightning_distill.methods, name)
    if isinstance(kind, type) and issubclass(kind, TeacherStudentBase):
        for hook in ("validation_step", "on_validation_epoch_end", "validation_metrics"):
            assert getattr(kind, hook) is getattr(TeacherStudentBase, hook)


@pytest.mark.parametrize(
    "callback",
    [
        SwitchSolution("val/averge_velocity_error", threshold=0.1),
        EarlyStopping("val/average_velocty_error"),
        ModelCheckpoint(monitor="average_velocity_error"),
    ],
)
def test_a_misspelt_monitor_is_found_before_anything_is_loaded(tmp_path: Path, callback: Callback) -> None:
    module = method()
    checkpoints = {"enable_checkpointing": isinstance(callback, ModelCheckpoint)}
    message = rf"{type(callback).__name__}\.monitor is '{callback.monitor}', .* did you mean {ERROR}\?"  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match=message):
        trainer(tmp_path, callbacks=[callback], **checkpoints).fit(module, loader())
    assert not module.networks.built


class Trainer:
    """The callbacks of a trainer."""

    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = list(callbacks)


@pytest.mark.parametrize("monitor", [ERROR, "val/accuracy/nfe_4/counting", "train/loss", "epoch", "lr-AdamW"])
def test_valid_monitors(monitor: str) -> None:
    check_monitors((ERROR, "val/accuracy/nfe_4"), Trainer(EarlyStopping(monitor)))
    check_monitors((ERROR,), None)
    check_monitors((ERROR,), Trainer(ModelCheckpoint(), Callback()))


class Score(Callback):
    """A callback that could log a metric."""


def test_a_callback_of_another_package_may_log_a_metric() -> None:
    check_monitors((ERROR,), Trainer(EarlyStopping("score"), Score()))
    with pytest.raises(ConfigurationError, match=f"EarlyStopping.monitor is 'score', .*; choose one of {ERROR}$"):
        check_monitors((ERROR,), Trainer(EarlyStopping("score")))


def test_a_switch_at_its_latest_step_needs_no_metric() -> None:
    check_monitors((), Trainer(SwitchSolution(latest_step=3)))
    with pytest.raises(ConfigurationError, match=r"SwitchSolution\.monitor is 'val/average_velocity_error'"):
        check_monitors((), Trainer(SwitchSolution(threshold=0.1)))
    with pytest.raises(ConfigurationError, match="did you mean"):
        check_monitors((ERROR,), Trainer(SwitchSolution("val/averge_velocity_error", latest_step=3)))
