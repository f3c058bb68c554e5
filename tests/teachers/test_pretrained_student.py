"""Students that start with the weights of a student that was exported before."""

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


def exported(adapter: DiffusersAdapter, directory: Path, **options: Any) -> nn.Module:
    """A student that has moved away from its teacher in every weight."""
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter.save_student(student, directory)
    return student


@pytest.mark.parametrize("time_embedding", ["smooth", "original"])
def test_it_is_that_student(adapter: DiffusersAdapter, time_embedding: Any, tmp_path: Path) -> None:
    before = exported(adapter, tmp_path / "student", time_embedding=time_embedding)
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


def test_it_trains_in_float32_beside_a_teacher_in_less(
    teacher_directory: str, adapter: DiffusersAdapter, tmp_path: Path
) -> None:
    exported(adapter, tmp_path / "student")
    half = DiffusersAdapter(teacher_directory, torch_dtype="bfloat16")
    half.check()
    options = StudentOptions(gradient_checkpointing=True, pretrained=str(tmp_path / "student"))
    student, _ = half.build_student(half.load_teacher(), options)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.is_gradient_checkpointing


def test_one_that_is_built_otherwise_is_refused(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    exported(adapter, tmp_path / "student", frequency_bound=5.0)
    with pytest.raises(ConfigurationError, match=r"student\.pretrained.*time_frequency_bound is 5\.0 where.*6\.2832"):
        adapter.check_student(StudentOptions(pretrained=str(tmp_path / "student")))
    with pytest.raises(ConfigurationError, match=r"time_frequency_bound is 5\.0 where this configuration has None"):
        adapter.check_student(StudentOptions(time_embedding="original", pretrained=str(tmp_path / "student")))


def test_one_of_another_size_is_refused(adapter: DiffusersAdapter) -> None:
    with pytest.raises(ConfigurationError, match=r"'shapes-student', whose \w+ is .* where this configuration has"):
        adapter.check_student(StudentOptions(pretrained="shapes-student"))


def test_what_is_no_student_is_refused(adapter: DiffusersAdapter, teacher_directory: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="whose transformer takes one time, as teachers do"):
        adapter.check_student(StudentOptions(pretrained=teacher_directory))
    with pytest.raises(ConfigurationError, match=r"student\.pretrained is .*nowhere.* cannot be read"):
        adapter.check_student(StudentOptions(pretrained=str(tmp_path / "nowhere")))
    exported(adapter, tmp_path / "student")
    shutil.rmtree(tmp_path / "student" / "transformer")
    with pytest.raises(ConfigurationError, match=r"student\.pretrained is .* cannot be read"):
        adapter.check_student(StudentOptions(pretrained=str(tmp_path / "student")))


def test_low_rank_updates_start_on_their_teacher(adapter: DiffusersAdapter) -> None:
    with pytest.raises(ConfigurationError, match=r"student\.lora and student\.pretrained are both set"):
        adapter.check_student(StudentOptions(lora=LoraOptions(2), pretrained="shapes-student"))


def test_networks_of_other_origin_are_refused(adapter: DiffusersAdapter) -> None:
    options = StudentOptions(pretrained="shapes-student")
    with pytest.raises(ConfigurationError, match=r"student\.pretrained is set, and EmbeddedFluxAdapter"):
        EmbeddedFluxAdapter("nowhere", ["a"]).check_student(options)
    with pytest.raises(ConfigurationError, match=r"student\.pretrained is set, and FlowMatching"):
        FlowMatching(adapter, student=options)


def test_its_drift_from_the_teacher_is_no_error(teacher_directory: str, adapter: DiffusersAdapter, tmp_path: Path) -> None:
    """It is meant to have moved; only the refit of a fresh student is bounded."""
    before = exported(adapter, tmp_path / "student")
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
    for network in (module.student, module.sampling_student):
        found = dict(network.named_parameters())
        for name, parameter in before.named_parameters():
            assert torch.equal(found[name], parameter), name
