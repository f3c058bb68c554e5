"""What trajectory states are to methods besides MeanFlow, in whose tests the student's jumps and the teacher's steps are."""

from typing import Any

import pytest
import torch

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import IMM, SCM, ConsistencyDistillation, SplitMeanFlow
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.methods.trajectory_regression import TrajectoryStates
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter
from tests.methods.test_meanflow import VALIDATION, Captions, trainer

KINDS: dict[str, tuple[type[TrajectoryStates], dict[str, Any]]] = {
    "SCM": (SCM, {"tangent_warmup_steps": 0}),
    "ConsistencyDistillation": (ConsistencyDistillation, {"teacher_step": 0.125}),
    "SplitMeanFlow": (SplitMeanFlow, {}),
    "IMM": (IMM, {"decrement_exponent": 7, "solver": "heun"}),
}


def method(kind: str, **settings: Any) -> TrajectoryStates:
    build, usual = KINDS[kind]
    module = build(GaussianAdapter("exact"), validation=VALIDATION, **(usual | settings))
    module.setup("fit")
    module.configure_model()
    return module


@pytest.mark.parametrize("jumps", [1, 3])
def test_states_of_stochastic_sampling_have_the_paths_distribution(jumps) -> None:
    """Those of an exact student: data, noised to t."""
    module = method("SCM", trajectory_steps=jumps)
    noise, condition = torch.randn(4096, 3, 4, 4), {"caption": torch.zeros(4096)}
    for seed, end in enumerate((0.1, 0.5, 0.9, 1.0)):
        torch.manual_seed(seed)
        t = torch.full((4096,), end)
        x_t = module.roll_out(noise, t, GuidedCondition(condition, condition, torch.ones(4096)))
        assert x_t.mean() == pytest.approx((1 - end) * GAUSSIAN.mean, abs=0.02)
        assert x_t.std() == pytest.approx(((1 - end) ** 2 * GAUSSIAN.std**2 + end**2) ** 0.5, abs=0.02)


@pytest.mark.parametrize("source", ["student", "teacher"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_prompts_alone_will_do(kind, source, tmp_path) -> None:
    module = method(kind, trajectory_fraction=1.0, trajectory_source=source)
    with torch.no_grad():
        module.student.bias.add_(1.0)
    run = trainer(tmp_path, max_steps=96, max_epochs=-1)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.03)
    run.fit(module, datamodule=Captions())
    assert module.student.bias.abs() < 0.2


def test_the_data_bridge_of_imm_has_noised_data_only() -> None:
    with pytest.raises(ConfigurationError, match=r"model.bridge is data.*trajectory_fraction is 0.5"):
        method("IMM", bridge="data", trajectory_fraction=0.5)
