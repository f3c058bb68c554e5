"""Figures of the final report in its table, its JSON file and its image grid."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_distill.callbacks.images import gather_prompts, unique_prompts
from lightning_distill.callbacks.report import FinalReport, Summary, read_report, validation_prompts
from lightning_distill.callbacks.switch import SwitchSolution
from lightning_distill.data import ShapesData
from lightning_distill.data.shapes import CATEGORIES, parse_prompt
from lightning_distill.errors import ConfigurationError
from lightning_distill.metrics import PromptAccuracy, prompt_diversity
from tests.callbacks.distillation import PixelDistillation, PixelTraining
from tests.toy import ToyModule

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def fit(directory: Path, module: Any, *callbacks: Callback, data: LightningDataModule | None = None, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | kwargs
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        default_root_dir=directory,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, data or ShapesData(size=8, batch_size=8, prompts_per_category=2), ckpt_path=ckpt_path)
    return trainer


def test_summary_json(tmp_path):
    module = PixelDistillation(strength=1.0)
    fit(tmp_path, module, FinalReport(diversity_prompts=3, diversity_seeds=2))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["teacher", "student", "minutes", "steps", "categories", "diversity"]
    assert summary["teacher"] == {"1": 1.0, "2": 1.0, "4": 1.0}
    assert summary["student"] == {"1": 1.0, "2": 1.0}
    assert set(summary["categories"]["teacher"]) == {"1", "2", "4"}
    assert summary["categories"]["teacher"]["4"] == dict.fromkeys(CATEGORIES, 1.0)
    assert set(summary["categories"]["student"]["1"]) == set(CATEGORIES)
    assert 0 < summary["minutes"] < 1


def test_untrained_student_scores_less_than_its_teacher(tmp_path):
    fit(tmp_path, PixelDistillation(strength=0.0), FinalReport())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["student"] == {"1": 0.0, "2": 0.0}
    assert summary["categories"]["student"]["2"] == dict.fromkeys(CATEGORIES, 0.0)
    assert summary["teacher"]["1"] == 1.0


def test_both_networks_sample_every_prompt_from_the_same_seeds(tmp_path, monkeypatch):
    sampled: dict[tuple[str, int], set[Any]] = {}
    sample = PixelDistillation.sample

    def recorded(self, prompts, nfe, seeds=None, network="student", **kwargs):
        sampled.setdefault((network, nfe), set()).update(zip(prompts, seeds, strict=True))
        return sample(self, prompts, nfe, seeds, network, **kwargs)

    module = PixelDistillation(nfe=(1,))
    trainer = fit(tmp_path, module)
    monkeypatch.setattr(PixelDistillation, "sample", recorded)
    report = FinalReport(noises=3, seed=1000, columns=1, diversity_prompts=0)
    report.on_train_end(trainer, module)
    pairs = [pair for batch in validation_prompts(trainer) for pair in zip(*batch, strict=True)]
    prompts = dict(pairs)
    assert sorted(prompts) == list(range(12))
    expected = {(prompts[i // 3], 1000 + i) for i in range(36)}
    assert sampled[("student", 1)] == sampled[("teacher", 1)] == expected
    assert sampled[("teacher", 4)] == expected


def test_diversity_compares_images_of_one_prompt(tmp_path):
    class SeedBrightness(PixelDistillation):
        """Uniform images whose brightness depends on the seed."""

        def sample(self, prompts, nfe, seeds=None, network="student", **kwargs):
            brightness = torch.tensor([(seed % 4) / (8 if network == "student" else 4) for seed in seeds])
            return brightness[:, None, None, None].expand(-1, 3, 32, 32)

    fit(tmp_path, SeedBrightness(), FinalReport(diversity_prompts=2, diversity_seeds=4))
    diversity = json.loads((tmp_path / "summary.json").read_text())["diversity"]
    images = torch.arange(4.0).div(8)[:, None, None, None].expand(-1, 3, 32, 32)
    expected = float(prompt_diversity(images, ["a circle"] * 4))
    assert diversity["student"] == pytest.approx({"1": expected, "2": expected}, abs=1e-6)
    assert diversity["teacher"] == pytest.approx({"4": 2 * expected}, abs=1e-6)


def test_printed_table(tmp_path, capsys):
    fit(tmp_path, PixelDistillation(strength=0.0), FinalReport(diversity_prompts=2, diversity_seeds=2))
    printed = capsys.readouterr().out
    assert "Prompt accuracy on the validation prompts, %" in printed
    rows = {
        tuple(cells[:2]): cells[2:] for cells in map(str.split, printed.splitlines()) if cells[:1] in (["student"], ["teacher"])
    }
    assert list(rows) == [("student", "1"), ("student", "2"), ("teacher", "1"), ("teacher", "2"), ("teacher", "4")]
    assert rows["teacher", "1"] == ["100.0"] * 7
    assert rows["teacher", "4"] == ["100.0"] * 7 + ["0.000"]
    assert rows["student", "2"][:7] == ["0.0"] * 7
    header = printed[: printed.index("───")].split()
    assert all(
        word in header for name in (*CATEGORIES, "overall", "diversity") for word in name.split("_")
    )  # no name is cut off
    assert f"{tmp_path}/images.png" in printed.replace("\n", "")


def test_image_grid(tmp_path):
    fit(tmp_path, PixelDistillation(strength=0.0), FinalReport(str(tmp_path / "report"), columns=4))
    grid = np.asarray(Image.open(tmp_path / "report" / "images.png"))
    student, teacher = grid[-196:-104, -396:], grid[-96:, -396:]
    assert teacher.std() > student.std()  # the untrained student samples grey images
    assert (tmp_path / "report" / "summary.json").exists()
    assert not (tmp_path / "summary.json").exists()


def test_without_a_metric_there_are_images_and_a_message(tmp_path, capsys):
    fit(tmp_path, PixelDistillation(with_metric=False), FinalReport())
    assert "model.metric is not set" in capsys.readouterr().out
    assert (tmp_path / "images.png").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher"] == summary["student"] == summary["categories"] == {}
    assert set(summary["diversity"]) == {"student", "teacher"}


def test_method_without_teacher(tmp_path, capsys):
    fit(tmp_path, PixelTraining(strength=1.0), FinalReport())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher"] == {}
    assert list(summary["diversity"]) == list(summary["categories"]) == ["student"]
    assert "teacher 1" not in " ".join(capsys.readouterr().out.split())


def test_teacher_is_measured_only_if_set(tmp_path, monkeypatch):
    module = PixelDistillation(strength=1.0)
    sample, measured = module.sample, []

    def spy(prompts, nfe, seeds, network="student"):
        measured.append((network, len(prompts)))
        return sample(prompts, nfe, seeds, network)

    monkeypatch.setattr(module, "sample", spy)
    fit(tmp_path, module, FinalReport(teacher=False, columns=3))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher"] == {}
    assert list(summary["diversity"]) == list(summary["categories"]) == ["student"]
    assert [count for network, count in measured if network == "teacher"] == [3]  # the row of the image grid


def test_without_validation_there_is_a_message(tmp_path, capsys):
    fit(tmp_path, PixelDistillation(), FinalReport(), limit_val_batches=0)
    assert "no validation prompts" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()


def test_several_validation_loaders_with_a_limit(tmp_path):
    class TwoLoaders(ShapesData):
        def val_dataloader(self) -> list[DataLoader[Any]]:
            return [super().val_dataloader()] * 2

    module = PixelDistillation()
    module.validation_step = lambda batch, batch_idx, dataloader_idx=0: None
    module.on_validation_epoch_end = lambda: None
    report = FinalReport(diversity_prompts=0)
    data = TwoLoaders(size=4, batch_size=4, prompts_per_category=2)
    trainer = fit(tmp_path, module, report, data=data, limit_val_batches=2)
    assert [len(prompts) for _, prompts in validation_prompts(trainer)] == [4, 4, 4, 4]


def test_no_report_after_an_exception(tmp_path, capsys):
    class Failing(PixelDistillation):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, Failing(), FinalReport())
    fit(tmp_path, PixelDistillation(), FinalReport(), fast_dev_run=True)
    assert not list(tmp_path.iterdir())
    assert "accuracy" not in capsys.readouterr().out


def test_minutes_add_up_across_resumes(tmp_path, monkeypatch):
    class Clock(Callback):
        """Advances the clock by a minute per step."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            now = time.perf_counter() + 60
            monkeypatch.setattr("lightning_distill.callbacks.report.time.perf_counter", lambda: now)

    module = PixelDistillation()
    data = ShapesData(size=16, batch_size=8, prompts_per_category=1)
    trainer = fit(tmp_path, module, FinalReport(diversity_prompts=0), Clock(), data=data, max_epochs=2)
    assert json.loads((tmp_path / "summary.json").read_text())["minutes"] == pytest.approx(4, abs=0.1)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = FinalReport(diversity_prompts=0)
    settings = {"max_epochs": 3, "ckpt_path": str(tmp_path / "saved.ckpt")}
    fit(tmp_path, PixelDistillation(), resumed, Clock(), data=data, **settings)
    assert json.loads((tmp_path / "summary.json").read_text())["minutes"] == pytest.approx(6, abs=0.1)
    assert resumed.state_dict()["seconds"] == pytest.approx(360, abs=6)


def test_training_modes_are_restored(tmp_path):
    modes = {}

    class RecordModes(Callback):
        def on_train_end(self, trainer, pl_module):
            modes.update({name: part.training for name, part in pl_module.named_modules()})

    module = PixelDistillation()
    fit(tmp_path, module, RecordModes(), FinalReport(diversity_prompts=0))
    assert modes["networks.student"]
    assert {name: part.training for name, part in module.named_modules()} == modes


@pytest.mark.parametrize("settings", [{"noises": 0}, {"columns": 0}, {"diversity_prompts": -1}, {"diversity_seeds": 1}])
def test_invalid_settings(settings):
    with pytest.raises(ConfigurationError, match=f"FinalReport.{next(iter(settings))}"):
        FinalReport(**settings)


def test_module_that_samples_no_images():
    with pytest.raises(ConfigurationError, match="FinalReport needs a method that samples images"):
        FinalReport().setup(None, ToyModule(), "fit")


class Decisions(Callback):
    """Writes the decisions of each process."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        (switch,) = (callback for callback in trainer.callbacks if isinstance(callback, SwitchSolution))
        found = {"phase": pl_module.phase, "step": switch.state.step, "value": switch.state.value}
        Path(trainer.default_root_dir, f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
        pairs = [pair for batch in validation_prompts(trainer) for pair in zip(*batch, strict=True)]
        columns = unique_prompts(gather_prompts(pairs), 6)
        Path(trainer.default_root_dir, f"columns{trainer.global_rank}.json").write_text(json.dumps(columns))


class DifferentErrors(PixelDistillation):
    """The processes log different errors; only the error of rank zero passes the threshold."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val/average_velocity_error", 0.25 + self.global_rank)


@pytest.mark.slow
def test_two_processes_switch_and_report_together(tmp_path):
    data = ShapesData(size=16, batch_size=4, prompts_per_category=2)
    report = FinalReport(columns=6, diversity_prompts=2, diversity_seeds=2)
    callbacks = (SwitchSolution(threshold=0.3), report, Decisions())
    fit(tmp_path, DifferentErrors(strength=1.0), *callbacks, data=data, strategy="ddp_spawn", devices=2, max_epochs=2)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] == {"phase": "differential", "step": 2, "value": 0.25}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher"] == {"1": 1.0, "2": 1.0, "4": 1.0}
    assert set(summary["categories"]["teacher"]["1"]) == set(CATEGORIES)  # prompts of both processes
    grids = [json.loads((tmp_path / f"columns{rank}.json").read_text()) for rank in range(2)]
    assert grids[0] == grids[1]
    assert [parse_prompt(text).category for text in grids[0]] == list(CATEGORIES)  # a single process has every other prompt


class Distance(Metric):
    """A metric without the bounds of a rate, 12 for a matching student."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, images: torch.Tensor, prompts: list[str]) -> None:
        self.count += len(prompts)

    def compute(self) -> torch.Tensor:
        return torch.tensor(12.345678)


@pytest.mark.parametrize(
    ("metric", "title", "value", "percent"),
    [(PromptAccuracy(), "Prompt accuracy on the validation", "100.0", True), (Distance(), "Distance on the", "12.35", False)],
)
def test_only_rates_are_in_percent(tmp_path, capsys, metric, title, value, percent):
    module = PixelDistillation(strength=1.0)
    for nfe in module.metrics:
        module.metrics[nfe] = copy.deepcopy(metric)
    fit(tmp_path, module, FinalReport(diversity_prompts=0))
    output = capsys.readouterr().out
    assert title in output
    assert value in output
    assert ("%" in output) == percent


def test_a_report_is_read_for_its_number_of_steps(tmp_path):
    assert read_report(tmp_path, 2) is None
    (tmp_path / "summary.json").write_text(json.dumps({"student": {"1": 0.5}, "steps": 2}))
    assert read_report(tmp_path, 2) == (Summary(student={"1": 0.5}, steps=2), None)
    (tmp_path / "images.png").touch()
    assert read_report(tmp_path, 2) == (Summary(student={"1": 0.5}, steps=2), tmp_path / "images.png")
    assert read_report(tmp_path, 3) is None
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.warns(UserWarning, match=r"summary\.json is not the summary of a run"):
        assert read_report(tmp_path, 2) is None
