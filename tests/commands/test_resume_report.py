"""What a resumed run says of its settings and those of the checkpoint."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_distill.commands.main import main
from lightning_distill.commands.resume_report import SETTINGS, RecordSettings, check_resumable, differences
from lightning_distill.commands.training import DistillCLI
from lightning_distill.data import ShapesData
from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.checkpoint_files import read_checkpoint
from tests.toy import ToyModule, read_losses

RUN = {
    "model": {"class_path": "tests.toy.ToyModule", "init_args": {"width": 4, "losses": "losses.jsonl"}},
    "data": {"class_path": "ShapesData", "init_args": {"size": 32, "batch_size": 4, "prompts_per_category": 1}},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "default_root_dir": "run",
        "callbacks": [
            {
                "class_path": "AtomicCheckpoint",
                "init_args": {"dirpath": "${trainer.default_root_dir}", "every_n_train_steps": 1},
            },
            {"class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler", "init_args": {"scheduling": {4: 2}}},
        ],
    },
}
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config and the checkpoint of a run of three steps."""
    directory = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        Path("run.yaml").write_text(yaml.safe_dump(RUN))
        main(["fit", "--config", "run.yaml"])
    return directory


@pytest.fixture
def resume(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run that resumes at step 3 of 5, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    checkpoint = (trained / "run/last.ckpt").resolve()
    return ["fit", "--config", str(trained / "run.yaml"), f"--ckpt_path={checkpoint}", "--trainer.max_steps=5"]


def report(arguments: list[str], *more: str) -> str:
    """The warning of differing settings, or an empty text."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        DistillCLI([*arguments, *more])
    texts = [text for each in found if "has other settings" in (text := str(each.message))]
    assert len(texts) < 2
    return texts[0].partition("; this run uses its own: ")[2] if texts else ""


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("model.lr=0.5", "model.lr 0.5 (checkpoint: 0.01)"),
        ("data.batch_size=2", "data.batch_size 2 (checkpoint: 4)"),
        ("data.seed=7", "data.seed 7 (checkpoint: 0)"),
        ("trainer.precision=bf16-mixed", "trainer.precision bf16-mixed (checkpoint: null)"),
        ("trainer.gradient_clip_val=0.5", "trainer.gradient_clip_val 0.5 (checkpoint: null)"),
        ("trainer.val_check_interval=2", "trainer.val_check_interval 2 (checkpoint: null)"),
        ("seed_everything=5", "seed_everything 5 (checkpoint: 0, whose random numbers continue)"),
        (
            "trainer.callbacks.scheduling={4: 1}",
            "trainer.callbacks.GradientAccumulationScheduler.scheduling.4 1 (checkpoint: 2)",
        ),
    ],
)
def test_each_changed_setting_is_named_with_both_values(resume: list[str], option: str, text: str) -> None:
    assert report(resume, f"--{option}") == text


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--trainer.default_root_dir=other",),
        ("--data.num_workers=1",),
        ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=curves", "--trainer.log_every_n_steps=1"),
    ],
)
def test_settings_that_change_no_step_are_not_reported(resume: list[str], options: tuple[str, ...]) -> None:
    assert not report(resume, *options)


def test_callbacks_are_compared_by_their_classes(resume: list[str]) -> None:
    assert report(resume, "--trainer.callbacks+=RandomState") == (
        "trainer.callbacks.RandomState lightning_distill.callbacks.RandomState (checkpoint: unset)"
    )


def test_settings_override_those_of_the_checkpoint(resume: list[str]) -> None:
    with pytest.warns(UserWarning, match="has other settings"):
        cli = DistillCLI([*resume, "--model.lr=0.5"])
    assert cli.model.lr == 0.5
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_the_configured_patience_of_early_stopping_counts(tmp_path: Path) -> None:
    def stopping(patience: int, steps: int, checkpoint: Path | None) -> Trainer:
        early = EarlyStopping("train/loss", patience=patience, check_on_train_epoch_end=True)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
        trainer = Trainer(max_steps=steps, accelerator="cpu", callbacks=[early, RecordSettings({})], **quiet)
        trainer.fit(ToyModule(), ShapesData(size=8, batch_size=4, prompts_per_category=1), ckpt_path=checkpoint)
        return trainer

    stopping(3, 2, None).save_checkpoint(tmp_path / "last.ckpt")
    assert stopping(50, 3, tmp_path / "last.ckpt").early_stopping_callback.patience == 50


def test_checkpoints_hold_the_settings_as_plain_values(trained: Path) -> None:
    settings = read_checkpoint(trained / "run/last.ckpt")[SETTINGS]
    assert settings["data"]["init_args"]["batch_size"] == 4
    assert "logger" not in settings["trainer"]
    assert yaml.safe_load(yaml.safe_dump(settings)) == settings


def test_a_checkpoint_of_python_has_no_differences(trained: Path, resume: list[str]) -> None:
    checkpoint = read_checkpoint(trained / "run/last.ckpt")
    del checkpoint[SETTINGS]
    torch.save(checkpoint, "python.ckpt")
    assert not report(resume, "--ckpt_path=python.ckpt", "--data.batch_size=2")


def test_another_class_is_reported_without_its_settings() -> None:
    def settings(scheduler: Any) -> dict[str, Any]:
        return {"model": {"class_path": "Method", "init_args": {"lr": 1.0, "lr_scheduler": scheduler}}}

    old = {SETTINGS: settings({"class_path": "Cosine", "init_args": {"total_steps": 3}})}
    assert differences(settings(None), old) == ["model.lr_scheduler null (checkpoint: Cosine)"]
    new = {"class_path": "Exponential", "init_args": {"gamma": 0.5}}
    assert differences(settings(new), old) == ["model.lr_scheduler Exponential (checkpoint: Cosine)"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--trainer.max_steps=3",), "trainer.max_steps is 3, and checkpoint .* has reached 3: nothing is left to train"),
        (("--trainer.max_steps=2",), "trainer.max_steps is 2, and checkpoint .* has reached 3: nothing is left to train"),
        (("--trainer.max_steps=-1", "--trainer.max_epochs=0"), "trainer.max_epochs is 0, and checkpoint .* has reached 0"),
    ],
)
def test_nothing_is_loaded_if_nothing_is_left_to_train(
    resume: list[str], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], text: str
) -> None:
    monkeypatch.setattr("tests.toy.ToyModule.configure_optimizers", None)
    with pytest.warns(UserWarning, match=text):
        main([*resume, *options])
    assert not Path("losses.jsonl").exists()


@pytest.mark.parametrize(
    ("new", "old", "text"),
    [
        (
            {"optimizer": "SGD"},
            {"optimizer": "AdamW"},
            "model.optimizer is SGD, and ckpt_path '.*' has the states of AdamW; set it",
        ),
        ({"rank": 2}, {"rank": 8}, "model.student.lora.rank is 2, and ckpt_path '.*' has weights of rank 8; set it to 8"),
    ],
)
def test_states_that_cannot_fit_are_one_line_before_a_model_loads(
    trained: Path, resume: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], new, old, text
) -> None:
    def with_settings(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        arguments = {
            "optimizer": {"class_path": given.get("optimizer", "Adam")},
            "student": {"lora": {"rank": given.get("rank", 4)}},
        }
        return {**settings, "model": {"class_path": "Method", "init_args": arguments}}

    checkpoint = read_checkpoint(trained / "run/last.ckpt")
    checkpoint[SETTINGS] = with_settings(checkpoint[SETTINGS], old)
    torch.save(checkpoint, "other.ckpt")
    original = DistillCLI.instantiate_classes

    def instantiate(self: DistillCLI) -> None:
        original(self)
        self.config_dump = with_settings(self.config_dump, new)

    monkeypatch.setattr(DistillCLI, "instantiate_classes", instantiate)
    with pytest.raises(SystemExit) as end:
        main([*resume, "--ckpt_path=other.ckpt"])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(text, line)


def test_an_empty_state_of_the_schedule_is_an_error() -> None:
    def content(scheduler: Any, states: list[Any]) -> dict[str, Any]:
        settings = {"model": {"class_path": "Method", "init_args": {"lr_scheduler": scheduler}}}
        return {SETTINGS: settings, "lr_schedulers": states}

    cosine = {"class_path": "Cosine", "init_args": {"total_steps": 3}}
    check_resumable({}, content(None, []), "a.ckpt")
    check_resumable({}, content(cosine, [{"last_epoch": 2}]), "a.ckpt")
    with pytest.raises(ConfigurationError, match=r"a.ckpt' was trained with model.lr_scheduler Cosine, and its"):
        check_resumable({}, content(cosine, []), "a.ckpt")


def test_a_resumed_run_trains_the_remaining_steps(resume: list[str]) -> None:
    main(resume)
    assert [step for step, _, _ in read_losses("losses.jsonl")] == [3, 4]
