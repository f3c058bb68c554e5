import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.flow.derivative import time_derivative
from lightning_distill.flow.dual_rules import RULES
from lightning_distill.students.lora_student import build_on_shared_weights, lora_layers, lora_modules
from lightning_distill.students.two_time_flux import TwoTimeFluxTransformer2DModel
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.tiny import PROMPTS, noise


def test_lora_layers_use_the_derivative_rule_of_linear_layers(
    adapter: DiffusersAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule needs one additional product per layer, torch's own forward mode two."""
    teacher, x, t = adapter.load_teacher(), noise(3), torch.tensor([0.9, 0.6, 0.3])
    condition, rule, calls = adapter.encode_prompt(PROMPTS), RULES[F.linear], []
    monkeypatch.setitem(RULES, F.linear, lambda *args, **kwargs: calls.append(1) or rule(*args, **kwargs))
    counts = []
    for lora in (None, LoraOptions(rank=2)):
        student, _ = adapter.build_student(teacher, StudentOptions(lora=lora))
        calls.clear()

        def average_velocity(x: Tensor, r: Tensor, t: Tensor, student: nn.Module = student) -> Tensor:
            return adapter.average_velocity(student, x, r, t, condition)

        time_derivative(average_velocity, x, 0.4 * t, t, torch.randn_like(x))
        counts.append(len(calls))
    assert counts[1] == counts[0] + 2 * len(lora_layers(student))


def test_lora_targets_are_name_suffixes_inside_blocks() -> None:
    network = nn.Module()
    network.blocks = nn.ModuleList(
        [nn.ModuleDict({"to_out": nn.ModuleList([nn.Linear(1, 1), nn.Dropout()]), "proj": nn.Linear(1, 1)})]
    )
    network.proj = nn.Linear(1, 1)
    assert lora_modules(network, ["proj"]) == ["blocks.0.proj"]
    assert lora_modules(network, ["proj", "to_out.0"]) == ["blocks.0.to_out.0", "blocks.0.proj"]
    for missing in ("roj", "to_out", "to_out.1"):
        with pytest.raises(ValueError, match=f"no linear layer of a block of Module ends in '{missing}'"):
            lora_modules(network, ["proj", missing])


def test_base_of_another_shape_raises(adapter: DiffusersAdapter) -> None:
    teacher = adapter.load_teacher()
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    with pytest.raises(ValueError, match=r"the base has no transformer_blocks\.1\..* of shape"):
        build_on_shared_weights(teacher, TwoTimeFluxTransformer2DModel, {**config, "num_layers": 2})
    with pytest.raises(ValueError, match=r"the base has no context_embedder.weight of shape \(64, 17\)"):
        build_on_shared_weights(teacher, TwoTimeFluxTransformer2DModel, {**config, "joint_attention_dim": 17})
