"""Students that start from the weights of an exported student."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import FlowMatching, MeanFlow
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.embedded import EmbeddedFluxAdapter
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.tiny import PROMPTS


def export_perturbed_student(adapter: DiffusersAdapter, directory: Path, **options: Any) -> nn.Module:
    """Build a student, perturb all its weights, and export it."""
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter.save_student(student, directory)
    return student


@pytest.mark.parametrize("time_embedding", ["smooth", "original"])
def test_student_has_the_pretrained_weights(adapter: DiffusersAdapter, time_embedding: Any, tmp_path: Path) -> None:
    before = export_perturbed_student(adapter, tmp_path / "student", time_embedding=time_embedding)
    options = StudentOptions(time_embedding=time_embedding, pretrained=str(tmp_path / "student"))
    adapter.check_student(options)
    student, report = adapter.build_student(adapter.load_teacher(), options)
    assert report is None
    assert student.training
    found, expected = dict(student.named_parameters()), dict(before.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad, name


def test_student_is_float32_with_a_bfloat16_teacher(teacher_directory: str, adapter: DiffusersAdapter, tmp_path: Path) -> None:
    export_perturbed_student(adapter, tmp_path / "student")
    half = DiffusersAdapter(teacher_directory, torch_dtype="bfloat16")
    half.check()
    options = StudentOptions(gradient_checkpointing=True, pretrained=str(tmp_path / "student"))
    student, _ = half.build_student(half.load_teacher(), options)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.is_gradient_checkpointing


def test_pretrained_student_with_other_time_settings_raises(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    export_perturbed_student(adapter, tmp_path / "student", frequency_bound=5.0)
    with pytest.raises(ConfigurationError, match=r"student\.pretrained.*time_frequency_bound is 5\.0, but.*6\.2832"):
        adapter.check_student(StudentOptions(pretrained=str(tmp_path / "student")))
    with pytest.raises(ConfigurationError, match=r"time_frequency_bound is 5\.0, but this configuration has None"):
        adapter.check_student(StudentOptions(time_embedding="original", pretrained=str(tmp_path / "student")))


def test_pretrained_student_of_another_size_raises(adapter: DiffusersAdapter) -> None:
    with pytest.raises(ConfigurationError, match=r"'shapes-student', whose \w+ is .*, but this configuration has"):
        adapter.check_student(StudentOptions(pretrained="shapes-student"))


def test_pretrained_model_that_is_no_student_raises(adapter: DiffusersAdapter, teacher_directory: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="whose transformer has one time input, so it is a teacher"):
        adapter.check_student(StudentOptions(pretrained=teacher_directory))
    with pytest.raises(ConfigurationError, match=r"student\.pretrained is .*nowhere.* cannot be read"):
        adapter.check_student(StudentOptions(pretrained=str(tmp_path / "nowhere")))
    export_perturbed_student(adapter, tmp_path / "student")
    shutil.rmtree(tmp_path / "student" / "transformer")
    with pytest.raises(ConfigurationError, match=r"student\.pretrained is .* cannot be read"):
        adapter.check_student(StudentOptions(pretrained=str(tmp_path / "student")))


def test_lora_with_pretrained_raises(adapter: DiffusersAdapter) -> None:
    with pytest.raises(ConfigurationError, match=r"student\.lora and student\.pretrained are both set"):
        adapter.check_student(StudentOptions(lora=LoraOptions(2), pretrained="shapes-student"))


def test_pretrained_raises_where_it_is_not_supported(adapter: DiffusersAdapter) -> None:
    options = StudentOptions(pretrained="shapes-student")
    with pytest.raises(ConfigurationError, match=r"student\.pretrained is set, but students of EmbeddedFluxAdapter"):
        EmbeddedFluxAdapter("nowhere", ["a"]).check_student(options)
    with pytest.raises(ConfigurationError, match=r"student\.pretrained is set, and FlowMatching"):
        FlowMatching(adapter, student=options)


def test_max_drift_does_not_apply_to_pretrained_students(
    teacher_directory: str, adapter: DiffusersAdapter, tmp_path: Path
) -> None:
    """A pretrained student has moved away from its teacher by training; `max_drift` only bounds the refit of a new one."""
    before = export_perturbed_student(adapter, tmp_path / "student")
    options = StudentOptions(pretrained=str(tmp_path / "student"), max_drift=1e-6)
    validation = ValidationOptions(nfe=(1,), average_velocity=False)
    module = MeanFlow(
        DiffusersAdapter(teacher_directory), student=options, ema_decay=0.9, validation=validation,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
    )  # fmt: skip
    samples = [{"image": torch.zeros(3, 32, 32), "prompt": PROMPTS[i], "index": i} for i in range(2)]
    trainer = Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(samples, batch_size=2))
    for network in (module.student, module.networks.sampling_student):
        found = dict(network.named_parameters())
        for name, parameter in before.named_parameters():
            assert torch.equal(found[name], parameter), name
