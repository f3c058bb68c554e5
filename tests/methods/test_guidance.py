from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import expand
from lightning_distill.methods import Guidance
from lightning_distill.methods.networks import GuidedCondition, Networks
from tests.gaussian import GaussianTeacher
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.gaussian_runs import empty_captions, meanflow, path_states

Points = tuple[Tensor, Tensor]
CAPTIONS, EMPTY = {"caption": torch.full((16,), 0.5)}, empty_captions(16)


@pytest.fixture
def points() -> Points:
    return path_states()


@pytest.fixture
def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of all calls of the teacher."""
    sizes: list[int] = []
    monkeypatch.setattr(GaussianTeacher, "velocity", lambda self, x, t: sizes.append(len(x)) or torch.zeros_like(x))
    return sizes


def test_two_branch_guidance_extrapolates_from_the_null_branch(points: Points) -> None:
    x_t, t = points
    condition = GuidedCondition(CAPTIONS, EMPTY, torch.full((16,), 3.0))
    _, target, _ = meanflow(guidance=Guidance(scale=3.0)).regression(x_t, t, t, condition)
    torch.testing.assert_close(target, GAUSSIAN.velocity(x_t, t) + 1.5)


def test_guidance_applies_only_inside_its_interval(points: Points) -> None:
    x_t, t = points
    module = meanflow(guidance=Guidance(scale=3.0, interval=(0.0, 0.5)))
    _, target, _ = module.regression(x_t, t, t, GuidedCondition(CAPTIONS, EMPTY, torch.full((16,), 3.0)))
    guided = torch.where(expand(t <= 0.5, x_t), 1.5, 0.5)
    torch.testing.assert_close(target, GAUSSIAN.velocity(x_t, t) + guided)


def test_null_branch_has_only_rows_inside_the_interval(points: Points, batch_sizes: list[int]) -> None:
    x_t, t = points
    module = meanflow(guidance=Guidance(scale=3.0, interval=(0.0, 0.5)))
    module.regression(x_t, t, t, GuidedCondition(EMPTY, EMPTY, torch.full((16,), 3.0)))
    assert batch_sizes == [16 + int((t <= 0.5).sum())]


def test_null_branch_has_only_rows_with_a_scale_other_than_1(points: Points, batch_sizes: list[int]) -> None:
    x_t, t = points
    module = meanflow()
    module.adapter.guided_velocity(module.teacher, x_t, t, EMPTY, EMPTY, torch.where(t > 0.5, 3.0, 1.0))
    assert batch_sizes == [16 + int((t > 0.5).sum())]


def test_improved_guidance_mixes_in_the_student(points: Points) -> None:
    x_t, t = points
    module = meanflow(guidance=Guidance(kind="improved", omega=1.0, kappa=0.5), caption_dropout=0.1)
    _, target, _ = module.regression(x_t, t, t, GuidedCondition(CAPTIONS, EMPTY, torch.ones(16)))
    # v_T + 0.5 (u_c - u_null); captions have the same effect on the exact student and on the teacher
    torch.testing.assert_close(target, GAUSSIAN.velocity(x_t, t) + 0.75)
    # The fixed point is u = omega / (1 - kappa) (v_c - v_null) + v_null, the reference in validation.
    reference = module.sampling_velocity(x_t, t, t, CAPTIONS, EMPTY, "teacher")
    torch.testing.assert_close(reference, GAUSSIAN.velocity(x_t, t) + 1.0)


def test_fixed_point_of_improved_guidance_with_an_embedded_scale(points: Points, monkeypatch: pytest.MonkeyPatch) -> None:
    x_t, t = points
    monkeypatch.setattr(GaussianAdapter, "check", lambda self: setattr(self, "embeds_guidance", True))
    monkeypatch.setattr(
        GaussianAdapter,
        "velocity",
        lambda self, network, x_t, t, condition, scale: network(x_t, None, t, scale * condition["caption"]),
    )
    module = meanflow(guidance=Guidance(kind="improved", scale=3.0, omega=1.0, kappa=0.5), caption_dropout=0.1)
    reference = module.sampling_velocity(x_t, t, t, CAPTIONS, EMPTY, "teacher")
    torch.testing.assert_close(reference, GAUSSIAN.velocity(x_t, t) + 2 * 3 * 0.5)


def test_scale_of_improved_guidance_without_an_embedded_scale_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"guidance\.scale is 2.* scale omega / \(1 - kappa\) = 3; set"):
        meanflow(guidance=Guidance(kind="improved", scale=2.0, omega=1.5, kappa=0.5), caption_dropout=0.1)


def test_embedded_guidance_samples_from_its_scales() -> None:
    guidance = Guidance(kind="embedded", scale=4.5, scales=[4.0, 4.5, 5.0])
    condition = Networks(GaussianAdapter(), guidance, empty_captions).guided_condition(empty_captions(200))
    assert set(condition.scale.tolist()) == {4.0, 4.5, 5.0}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"scale": -1.0}, "guidance.scale"),
        ({"scales": [4.0, 5.0]}, "guidance.scales"),
        ({"kind": "embedded", "scales": []}, "guidance.scales"),
        ({"kind": "embedded", "scales": [4.0, 5.0]}, "guidance.scale is 1.0, at which validation samples, and guidance.scales"),
        ({"interval": (0.5, 0.5)}, "guidance.interval"),
        ({"kind": "embedded", "interval": (0.0, 0.5)}, "guidance.interval"),
        ({"kind": "improved", "kappa": 1.0}, "guidance.kappa"),
        ({"kind": "improved", "kappa": -1.0}, "guidance.kappa"),
    ],
)
def test_error_for_invalid_guidance_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        Guidance(**settings)
