from pathlib import Path

import pytest
import torch

from lightning_distill.errors import ConfigurationError
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.features import evenly_spaced_layers, trunk
from lightning_distill.teachers.student_options import StudentOptions
from tests.teachers.tiny_families import FAMILIES, load_family, save_family
from tests.tiny import PROMPTS, load_adapter, save_tiny_pipeline


def test_layers_are_evenly_spaced_and_include_the_last() -> None:
    assert evenly_spaced_layers(57) == (14, 28, 42, 56)
    assert evenly_spaced_layers(4) == (1, 2, 3)
    assert evenly_spaced_layers(1) == (0,)


QUICK = "flux_guided"


@pytest.mark.parametrize("family", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in FAMILIES])
def test_features_carry_gradients_to_the_latents(family: str, tmp_path: Path) -> None:
    """Features of a frozen teacher, and of a two-time network with gradient checkpointing."""
    adapter = load_adapter(save_family(family, tmp_path / family))
    widths = adapter.feature_widths()
    teacher = adapter.load_teacher()
    student, _ = adapter.build_student(teacher, StudentOptions(gradient_checkpointing=True))
    x = torch.randn(3, *adapter.latent_shape(32, 32), requires_grad=True)
    condition, t = adapter.encode_prompt(PROMPTS), torch.tensor([0.9, 0.6, 0.3])
    for network, r in ((teacher, None), (student, 0 * t)):
        features = adapter.features(network, x, r, t, condition, tuple(widths), 3.5)
        assert [tokens.shape[::2] for tokens in features] == [(3, width) for width in widths.values()]
        (gradient,) = torch.autograd.grad(sum(tokens.square().sum() for tokens in features), x)
        assert gradient.flatten(1).any(1).all()
        assert not any(block._forward_pre_hooks for block in trunk(network))


def test_features_are_the_inputs_of_blocks(tmp_path: Path) -> None:
    """Features have the order of `layers`; those of the second block equal the output of the first."""
    adapter = load_adapter(save_tiny_pipeline(tmp_path / "teacher"))
    teacher = adapter.load_teacher()
    outputs = []
    teacher.transformer_blocks[0].register_forward_hook(lambda block, args, output: outputs.append(output[1]))
    x, t = torch.randn(3, *adapter.latent_shape(32, 32)), torch.tensor([0.9, 0.6, 0.3])
    second, first = adapter.features(teacher, x, None, t, adapter.encode_prompt(PROMPTS), (1, 0))
    assert torch.equal(second, outputs[0])
    assert not torch.equal(first, second)


def test_missing_layers_raise_before_load(tmp_path: Path) -> None:
    adapter = DiffusersAdapter(save_tiny_pipeline(tmp_path / "teacher"))
    adapter.check()
    for layers in ((2,), (-1,), ()):
        with pytest.raises(ConfigurationError, match="this transformer has blocks 0 to 1"):
            adapter.feature_widths(layers)
    assert adapter.feature_widths((0, 1)) == {0: 64, 1: 64}


def test_family_without_features_raises(tmp_path: Path) -> None:
    adapter = load_family(save_family("newer_distilled", tmp_path / "newer"))
    with pytest.raises(ConfigurationError, match="adapter is HunyuanImage3Adapter, which provides no features"):
        adapter.feature_widths()
