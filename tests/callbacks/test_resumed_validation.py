"""No validation is lost between a run and its resumption."""

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
from tests.toy import ToyModule

STEPS = 10
INTERVAL = 2
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


class Method(ToyModule):
    """Its error passes the threshold from the fourth step on."""

    solution = "discrete"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        self.seen.append((self.global_step, self.solution, batch["index"].tolist()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        error = torch.tensor(0.1 if self.global_step >= 4 else 1.0) + batch["index"].float().mean() / 1000
        self.log("val/average_velocity_error", error, batch_size=len(batch["prompt"]))

    def on_validation_epoch_end(self) -> None:
        self.seen.append(("validated", self.global_step))


class End(Callback):
    """SIGTERM after a step, or after a batch of its validation."""

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


def fit(directory: Path, name: str, ckpt_path: Path | None = None, end: End | None = None) -> tuple[list[Any], dict[str, str]]:
    """What a run has seen, and its curve of the error."""
    seed_everything(0)
    module, logger = Method(), CSVLogger(directory, name, version=0)
    # Before the checkpoint, which is saved last among callbacks.
    callbacks = [AtomicCheckpoint(str(directory / name), "{step}", save_top_k=-1, every_n_train_steps=INTERVAL), RandomState()]
    callbacks += [SwitchSolution(threshold=0.5, guard_factor=None), *([end] if end else [])]
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    settings |= {"val_check_interval": INTERVAL, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer = Trainer(max_steps=STEPS, logger=logger, callbacks=callbacks, **settings)
    data = ShapesData(size=24, batch_size=8, prompts_per_category=4)  # epochs of three steps
    if end is None:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    else:
        with pytest.raises(SIGTERMException):
            trainer.fit(module, data)
    header, *rows = [line.split(",") for line in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()]
    error, step = header.index("val/average_velocity_error"), header.index("step")
    return module.seen, {row[step]: row[error] for row in rows if row[error]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], dict[str, str]]:
    directory = tmp_path_factory.mktemp("whole")
    return directory, *fit(directory, "whole")


def test_the_run_validates_and_switches_at_the_threshold(whole: tuple[Path, list[Any], dict[str, str]]) -> None:
    _, seen, _ = whole
    assert [step for step in seen if step[0] == "validated"] == [("validated", step) for step in (2, 4, 6, 8, 10)]
    assert [phase for step, phase, *_ in seen if step != "validated"] == ["discrete"] * 4 + ["differential"] * 6


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_checkpoint_where_validation_is_due_is_saved_after_it(
    step: int, whole: tuple[Path, list[Any], dict[str, str]], tmp_path: Path
) -> None:
    directory, seen, curve = whole
    shutil.copy(directory / "whole" / f"step={step}.ckpt", tmp_path / "from.ckpt")
    again, continued = fit(tmp_path, "again", tmp_path / "from.ckpt")
    assert again == seen[seen.index(("validated", step)) + 1 :]
    assert continued == {at: value for at, value in curve.items() if int(at) >= step}


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("validation_batch", [None, 0, 1])
def test_a_validation_that_was_broken_off_is_done_first(
    step: int, validation_batch: int | None, whole: tuple[Path, list[Any], dict[str, str]], tmp_path: Path
) -> None:
    _, seen, curve = whole
    before, _ = fit(tmp_path, "broken", end=End(step, validation_batch))
    assert ("validated", step) not in before
    again, continued = fit(tmp_path, "again", tmp_path / "broken" / "last.ckpt")
    assert before + again == seen
    assert continued == {at: value for at, value in curve.items() if int(at) >= step - 1}


def test_a_step_without_validation_is_followed_by_the_next(
    whole: tuple[Path, list[Any], dict[str, str]], tmp_path: Path
) -> None:
    _, seen, _ = whole
    before, _ = fit(tmp_path, "broken", end=End(5, None))
    again, _ = fit(tmp_path, "again", tmp_path / "broken" / "last.ckpt")
    assert before + again == seen
