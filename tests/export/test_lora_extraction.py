"""Extraction of LoRA from weights, against closed forms."""

import pytest
import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.export import lora_extraction
from lightning_distill.export.lora_extraction import extract_lora, linear_layers, truncated_svd


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 20, bias=False))


def extract(student: dict[str, Tensor], teacher: nn.Module, rank: int) -> lora_extraction.ExtractedLora:
    state = teacher.state_dict()
    return extract_lora(student.__getitem__, state.__getitem__, state, linear_layers(teacher), rank)


def test_a_change_of_known_rank_is_recovered() -> None:
    teacher = network()
    student = {name: value.clone() for name, value in teacher.state_dict().items()}
    student["1.weight"] += torch.randn(30, 3) @ torch.randn(3, 20)
    found = extract(student, teacher, 3)
    assert found.layers.keys() == {"1"}
    a, b = found.layers["1"]
    assert a.shape == (3, 20)
    assert b.shape == (30, 3)
    torch.testing.assert_close(teacher.state_dict()["1.weight"] + b @ a, student["1.weight"], atol=1e-5, rtol=0)
    assert found.error < 1e-5
    assert found.unrepresented == 0


def test_error_is_the_tail_of_the_singular_values() -> None:
    teacher = network()
    student = {name: value + torch.randn_like(value) for name, value in teacher.state_dict().items()}
    changes = {name: (student[name] - value).double() for name, value in teacher.state_dict().items()}
    tail = sum(torch.linalg.svdvals(changes[name])[4:].square().sum() for name in ("1.weight", "3.weight"))
    other = sum(change.square().sum() for name, change in changes.items() if name not in ("1.weight", "3.weight"))
    total = sum(change.square().sum() for change in changes.values())
    found = extract({name: value.bfloat16().float() for name, value in student.items()}, teacher, 4)
    assert found.error == pytest.approx(float(((tail + other) / total).sqrt()), rel=1e-2)
    found = extract(student, teacher, 4)
    assert found.error == pytest.approx(float(((tail + other) / total).sqrt()), rel=1e-5)
    assert found.unrepresented == pytest.approx(float((other / total).sqrt()), rel=1e-5)


def test_a_rank_above_the_size_is_exact_and_no_change_has_no_layers() -> None:
    teacher = network()
    state = teacher.state_dict()
    changed = extract({**state, "3.weight": state["3.weight"] + 1}, teacher, 64)
    assert len(changed.layers["3"][0]) == 20
    assert changed.error < 1e-5
    assert extract(state, teacher, 2) == lora_extraction.ExtractedLora({}, 0.0, 0.0)


def test_the_randomised_decomposition_is_as_good_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(200, 120) @ torch.diag(0.9 ** torch.arange(120.0)) @ torch.randn(120, 150)
    exact = truncated_svd(matrix, 8)
    monkeypatch.setattr(lora_extraction, "EXACT_SIZE", 64)
    state = torch.get_rng_state()
    found, again = truncated_svd(matrix, 8), truncated_svd(matrix, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, found, again))
    best, error = ((matrix - b @ a).norm().item() for a, b in (exact, found))
    assert error == pytest.approx(best, rel=1e-3)


def test_weights_without_a_low_rank_change_raise() -> None:
    teacher = network()
    state = teacher.state_dict()
    with pytest.raises(ConfigurationError, match=r"3\.weight of the student has the shape \(40, 30\), and \(20, 30\) in the"):
        extract({**state, "3.weight": torch.ones(40, 30)}, teacher, 2)
    with pytest.raises(NonFiniteError, match=r"3\.weight is NaN or infinite"):
        extract({**state, "3.weight": torch.full((20, 30), torch.nan)}, teacher, 2)
