"""Resuming skips no validation."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_distill.callbacks import AtomicCheckpoint, RandomState, SwitchSolution
from lightning_distill.data import ShapesData
from tests.callbacks.distillation import PixelDistillation

STEPS = 10
INTERVAL = 2
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


class Method(PixelDistillation):
    """A method whose error passes the threshold from the fourth step on.

    Attributes:
        events: Step, phase and batch indices of each training step, and the step of each validation.
    """

    def __init__(self) -> None:
        super().__init__(with_metric=False)
        self.events: list[Any] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        self.events.append((self.global_step, self.phase, batch["index"].tolist()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        error = torch.tensor(0.1 if self.global_step >= 4 else 1.0) + batch["index"].float().mean() / 1000
        self.log("val/average_velocity_error", error, batch_size=len(batch["prompt"]))

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        return ("val/average_velocity_error",)

    def on_validation_epoch_end(self) -> None:
        self.events.append(("validated", self.global_step))


class Terminate(Callback):
    """Raises the exception of SIGTERM after a step, or after a batch of its validation."""

    def __init__(self, step: int, validation_batch: int | None) -> None:
        self.step, self.validation_batch = step, validation_batch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.validation_batch is None and trainer.global_step == self.step:
            raise SIGTERMException(143)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if trainer.global_step == self.step and batch_idx == self.validation_batch:
            raise SIGTERMException(143)


class Stop(Callback):
    """Stops training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


class StopLate(Method):
    """A method that stops training after a step, in its own hook, which follows those of the callbacks."""

    stop_at = 0

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.trainer.should_stop |= self.global_step == self.stop_at


def fit(
    directory: Path,
    name: str,
    ckpt_path: Path | None = None,
    end: Terminate | None = None,
    interval: int = INTERVAL,
    max_steps: int = STEPS,
    stop: Stop | None = None,
    module: Method | None = None,
) -> tuple[list[Any], dict[str, str]]:
    """Events of a run, and its logged errors by step."""
    seed_everything(0)
    module, logger = module or Method(), CSVLogger(directory, name, version=0)
    # `Terminate` runs before the checkpoint, because Lightning calls checkpoint callbacks last.
    callbacks = [AtomicCheckpoint(str(directory / name), "{step}", save_top_k=-1, every_n_train_steps=interval), RandomState()]
    callbacks += [SwitchSolution(threshold=0.5, guard_factor=None), *([end] if end else []), *([stop] if stop else [])]
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    settings |= {"val_check_interval": INTERVAL, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer = Trainer(max_steps=max_steps, logger=logger, callbacks=callbacks, **settings)
    data = ShapesData(size=24, batch_size=8, prompts_per_category=4)  # epochs of three steps
    if end is None:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    else:
        with pytest.raises(SIGTERMException):
            trainer.fit(module, data)
    header, *rows = [line.split(",") for line in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()]
    error, step = header.index("val/average_velocity_error"), header.index("step")
    return module.events, {row[step]: row[error] for row in rows if row[error]}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], dict[str, str]]:
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, *fit(directory, "uninterrupted")


def test_run_validates_and_switches_at_the_threshold(uninterrupted: tuple[Path, list[Any], dict[str, str]]) -> None:
    _, events, _ = uninterrupted
    assert [event for event in events if event[0] == "validated"] == [("validated", step) for step in (2, 4, 6, 8, 10)]
    assert [phase for step, phase, *_ in events if step != "validated"] == ["discrete"] * 4 + ["differential"] * 6


@pytest.mark.parametrize("step", [2, 4, 6])
def test_checkpoint_is_saved_after_the_validation_of_its_step(
    step: int, uninterrupted: tuple[Path, list[Any], dict[str, str]], tmp_path: Path
) -> None:
    directory, events, errors = uninterrupted
    shutil.copy(directory / "uninterrupted" / f"step={step}.ckpt", tmp_path / "from.ckpt")
    resumed, resumed_errors = fit(tmp_path, "resumed", tmp_path / "from.ckpt")
    assert resumed == events[events.index(("validated", step)) + 1 :]
    assert resumed_errors == {at: value for at, value in errors.items() if int(at) >= step}


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("validation_batch", [None, 0, 1])
def test_interrupted_validation_is_repeated_first(
    step: int, validation_batch: int | None, uninterrupted: tuple[Path, list[Any], dict[str, str]], tmp_path: Path
) -> None:
    _, events, errors = uninterrupted
    before, _ = fit(tmp_path, "interrupted", end=Terminate(step, validation_batch))
    assert ("validated", step) not in before
    resumed, resumed_errors = fit(tmp_path, "resumed", tmp_path / "interrupted" / "last.ckpt")
    assert before + resumed == events
    assert resumed_errors == {at: value for at, value in errors.items() if int(at) >= step - 1}


def test_step_without_validation_is_followed_by_the_next(
    uninterrupted: tuple[Path, list[Any], dict[str, str]], tmp_path: Path
) -> None:
    _, events, _ = uninterrupted
    before, _ = fit(tmp_path, "interrupted", end=Terminate(5, None))
    resumed, _ = fit(tmp_path, "resumed", tmp_path / "interrupted" / "last.ckpt")
    assert before + resumed == events


@pytest.mark.parametrize("cause", ["limit", "callback", "module"])
@pytest.mark.parametrize("step", [3, 4, 5, 6])
def test_run_continues_after_its_last_step(
    cause: str, step: int, uninterrupted: tuple[Path, list[Any], dict[str, str]], tmp_path: Path
) -> None:
    """The last step is within an epoch or at its end, and with a validation or without; Lightning validates at a stop."""
    _, events, errors = uninterrupted
    late = StopLate()
    late.stop_at = step if cause == "module" else 0
    stop = Stop(step) if cause == "callback" else None
    limit = step if cause == "limit" else STEPS
    before, _ = fit(tmp_path, "first", interval=100, max_steps=limit, stop=stop, module=late)
    resumed, resumed_errors = fit(tmp_path, "resumed", tmp_path / "first" / "last.ckpt")
    if cause != "limit" and step % INTERVAL:
        assert before.pop() == ("validated", step)
    assert before + resumed == events
    assert resumed_errors == {at: value for at, value in errors.items() if int(at) >= step}
