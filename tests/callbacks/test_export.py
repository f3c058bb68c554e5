import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill.callbacks.export import ExportPipeline
from lightning_distill.callbacks.report import FinalReport
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.mark import MARK, ExportMark
from lightning_distill.flow.losses import power_loss
from lightning_distill.methods.base import Objective, TeacherStudentBase
from lightning_distill.methods.flow_matching import FlowMatching
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.metrics import PromptAccuracy
from lightning_distill.students.lora_student import load_lora_student, lora_weights
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.model_adapter import Condition
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.tiny import PROMPTS, save_tiny_pipeline


@pytest.fixture
def teacher_directory(tmp_path: Path) -> str:
    return save_tiny_pipeline(tmp_path / "tiny", scheduler={"shift": 2.0})


class Regression(TeacherStudentBase):
    """A minimal method: regression of the teacher's velocity."""

    failing_step: int | None = None

    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        t = torch.rand(len(x0))
        u = self.adapter.average_velocity(self.student, x0, t / 2, t, condition)
        if self.global_step == self.failing_step:
            raise RuntimeError("broken")
        return Objective(power_loss(u, self.adapter.velocity(self.teacher, x0, t, condition), 1.0), t)


class Other(LightningModule):
    """A module without student or teacher."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


def fit(module: LightningModule, tmp_path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    data = [{"image": torch.rand(3, 32, 32) * 2 - 1, "prompt": prompt, "index": i} for i, prompt in enumerate(PROMPTS)]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(
        **{"max_steps": 2, "logger": False, "default_root_dir": tmp_path, "callbacks": [*callbacks], **quiet, **options}
    )
    trainer.fit(module, DataLoader(data, batch_size=3))
    return trainer


OPTIONS = ValidationOptions(nfe=(1, 4), average_velocity=False)


def test_fit_exports_the_validated_student(teacher_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = Regression(DiffusersAdapter(teacher_directory), ema_decay=0.5, validation=OPTIONS)
    fit(module, tmp_path, ExportPipeline(notes="Trained on Shapes.", formats=["any_step"]))
    directory = tmp_path / "student"
    pipeline = DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipeline(PROMPTS, generator=generators, output_type="pt").images
    assert torch.equal(images, module.sample(PROMPTS, 4))
    card = (directory / "README.md").read_text()
    for part in (
        "| Method | Regression |",
        "| Training steps | 2 |",
        "| Training time | 0.",
        "1 or 4 steps",
        "Trained on Shapes.",
    ):
        assert part in card


def test_default_formats_of_a_run(teacher_directory: str, tmp_path: Path) -> None:
    module = Regression(DiffusersAdapter(teacher_directory), ema_decay=0.5, validation=OPTIONS)
    fit(module, tmp_path, ExportPipeline())
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["README.md", "any_step", MARK, "stock_4"]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    settings = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "pt"}
    arguments = ExportMark.read(tmp_path / "student" / "stock_4").arguments
    pipeline = FluxPipeline.from_pretrained(tmp_path / "student" / "stock_4")
    images = pipeline(PROMPTS, generator=generators, **settings, **arguments).images
    torch.testing.assert_close(images, module.sample(PROMPTS, 4), rtol=0, atol=1e-5)


def test_steps_that_16_bits_cannot_separate_raise_before_training(teacher_directory: str, tmp_path: Path) -> None:
    options = ValidationOptions(nfe=(1, 500), average_velocity=False)
    module = Regression(DiffusersAdapter(teacher_directory), validation=options)
    module.failing_step = 0
    with pytest.raises(
        ConfigurationError, match=r"ExportPipeline\.nfe is 500, but steps 1 and 2 have the same time in 16 bits"
    ):
        fit(module, tmp_path, ExportPipeline(formats=["any_step", "stock"]))


def test_steps_of_a_policy_raise(teacher_directory: str, tmp_path: Path) -> None:
    """Its only export is for any number of steps."""
    module = Regression(DiffusersAdapter(teacher_directory), student=StudentOptions(policy_points=2), validation=OPTIONS)
    with pytest.raises(ConfigurationError, match=r"ExportPipeline\.nfe is \[4\], but student\.policy_points is 2"):
        fit(module, tmp_path, ExportPipeline(nfe=[4]))


def test_default_formats_of_a_lora_run(teacher_directory: str, tmp_path: Path) -> None:
    student = StudentOptions(lora=LoraOptions(rank=2, alpha=3.0))
    module = Regression(DiffusersAdapter(teacher_directory), student=student, ema_decay=0.5, validation=OPTIONS)
    fit(module, tmp_path, ExportPipeline())
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["README.md", MARK, "lora_1", "lora_4"]
    for nfe in (1, 4):
        mark = ExportMark.read(tmp_path / "student" / f"lora_{nfe}")
        pipeline = FluxPipeline.from_pretrained(teacher_directory)
        pipeline.load_lora_weights(tmp_path / "student" / f"lora_{nfe}")
        assert mark.scheduler is not None
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**mark.scheduler["config"])
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        settings = {"num_inference_steps": nfe, "height": 32, "width": 32, "output_type": "pt", "generator": generators}
        images = pipeline(PROMPTS, **settings, **mark.arguments).images
        torch.testing.assert_close(images, module.sample(PROMPTS, nfe), rtol=0, atol=1e-5)


def test_fit_exports_the_lora_weights(teacher_directory: str, tmp_path: Path) -> None:
    student = StudentOptions(lora=LoraOptions(rank=2))
    module = Regression(DiffusersAdapter(teacher_directory), student=student, ema_decay=0.5, validation=OPTIONS)
    fit(module, tmp_path, ExportPipeline(lora="unmerged"))
    pipeline = load_lora_student(FluxPipeline.from_pretrained(teacher_directory), tmp_path / "student")
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    assert torch.equal(pipeline(PROMPTS, generator=generators, output_type="pt").images, module.sample(PROMPTS, 4))
    trained = [
        name for name, value in lora_weights(module.networks.sampling_student).items() if "lora_B" in name and value.any()
    ]
    assert trained


@pytest.mark.parametrize("reported", [False, True])
def test_card_has_the_figures_of_the_report_or_of_the_last_validation(
    reported: bool, teacher_directory: str, tmp_path: Path
) -> None:
    options = ValidationOptions(nfe=(1,), teacher_nfe=2, height=32, width=32)
    module = Regression(DiffusersAdapter(teacher_directory), metric=PromptAccuracy(), validation=options)
    data = [{"image": torch.rand(3, 32, 32), "prompt": prompt, "index": i} for i, prompt in enumerate(["a circle"] * 2)]
    report = [FinalReport(diversity_prompts=1, diversity_seeds=2)] if reported else []
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    export = ExportPipeline(formats=["any_step"])
    trainer = Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, callbacks=[export, *report], **quiet)
    trainer.fit(module, DataLoader(data, batch_size=2), DataLoader(data, batch_size=2))
    found = export.model_card(trainer, module)
    figures, card = found.figures, (tmp_path / "student" / "README.md").read_text()
    assert (found.images is not None) == reported == (tmp_path / "student" / "images.png").is_file()
    if reported:
        assert {"student/accuracy/nfe_1", "teacher/accuracy/nfe_2", "student/diversity/nfe_1"} <= set(figures)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert figures["student/diversity/nfe_1"] == summary["diversity"]["student"]["1"]
        assert not any(name.startswith("val/") for name in figures)
    else:
        assert "val/average_velocity_error" in figures
    assert ("| steps | student, accuracy |" if reported else "| average velocity error |") in card


def test_fit_exports_a_trained_teacher_as_stock_pipeline(teacher_directory: str, tmp_path: Path) -> None:
    module = FlowMatching(DiffusersAdapter(teacher_directory), train_text_encoders=True, validation=OPTIONS)
    fit(module, tmp_path, ExportPipeline())
    pipeline = FluxPipeline.from_pretrained(tmp_path / "teacher")
    encoders = module.adapter.text_encoders()
    assert encoders.keys() == {"text_encoder", "text_encoder_2"}
    for name, network in {"transformer": module.networks.sampling_student, **encoders}.items():
        written = getattr(pipeline, name).state_dict()
        assert all(torch.equal(written[key], value) for key, value in network.state_dict().items() if key in written)
    before = FluxPipeline.from_pretrained(teacher_directory)
    changed = (pipeline.text_encoder_2.shared.weight != before.text_encoder_2.shared.weight).any()
    assert changed, "training changed no weights, so the comparison above is vacuous"


def test_directory_setting(teacher_directory: str, tmp_path: Path) -> None:
    module = Regression(DiffusersAdapter(teacher_directory), validation=OPTIONS)
    fit(module, tmp_path, ExportPipeline(str(tmp_path / "elsewhere" / "s"), formats=["stock"], nfe=[1]))
    assert (tmp_path / "elsewhere" / "s" / "model_index.json").is_file()


@pytest.mark.parametrize("case", ["error", "fast_dev_run"])
def test_no_export_unless_training_completes(case: str, teacher_directory: str, tmp_path: Path) -> None:
    module = Regression(DiffusersAdapter(teacher_directory), validation=OPTIONS)
    if case == "error":
        module.failing_step = 1
        with pytest.raises(RuntimeError, match="broken"):
            fit(module, tmp_path, ExportPipeline())
    else:
        fit(module, tmp_path, ExportPipeline(), fast_dev_run=True)
    assert not (tmp_path / "student").exists()


def test_impossible_exports_raise_before_training(teacher_directory: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Other trains neither"):
        fit(Other(), tmp_path, ExportPipeline())
    module = Regression(DiffusersAdapter(teacher_directory), validation=OPTIONS)
    with pytest.raises(ConfigurationError, match="has files that are not an earlier export"):
        fit(module, tmp_path, ExportPipeline(teacher_directory))
    with pytest.raises(ConfigurationError, match=r"ExportPipeline.lora is unmerged, but model.student.lora is null"):
        fit(module, tmp_path, ExportPipeline(lora="unmerged"))
    with pytest.raises(ConfigurationError, match=r"ExportPipeline.lora is 'both'; choose merged or unmerged"):
        ExportPipeline(lora="both")  # type: ignore[arg-type]
    assert module.global_step == 0


def test_training_time_adds_up_across_resumes() -> None:
    first, second = ExportPipeline(), ExportPipeline()
    first.on_train_start(None, None)  # type: ignore[arg-type]
    first.on_train_end(None, None)  # type: ignore[arg-type]
    second.load_state_dict({"seconds": first.state_dict()["seconds"] + 100})
    second.on_train_start(None, None)  # type: ignore[arg-type]
    assert 100 < second.state_dict()["seconds"] < 130
