"""No number of a setting is silently NaN or negative: every constructor names the setting."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch

from lightning_distill.callbacks import FinalReport, LogImages, SwitchSolution
from lightning_distill.data import ImageFolder, ImageText, Prompts, ShapesData
from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.losses import AdaptiveLoss, PowerLoss, PseudoHuberLoss
from lightning_distill.flow.moment_matching import LaplaceKernel, RBFKernel
from lightning_distill.flow.times import LogitNormal, Uniform
from lightning_distill.methods import (
    DMD2,
    IMM,
    LADD,
    SCM,
    TDM,
    AuxiliaryTraining,
    ConsistencyDistillation,
    CriticGan,
    FlowMatching,
    Guidance,
    KnowledgeDistillation,
    MeanFlow,
    MuonWithAdamW,
    PiFlow,
    SplitMeanFlow,
    TimestepRescaling,
    TrajectoryAlignment,
    ValidationOptions,
    WarmupCosine,
)
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.embedded import EmbeddedFluxAdapter
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions

NAN = float("nan")


def _parameters() -> list[dict[str, Any]]:
    matrices, rest = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    return [{"params": [matrices], "block_matrices": True}, {"params": [rest], "block_matrices": False}]


REQUIRED: dict[Callable[..., Any], dict[str, Any]] = {
    AuxiliaryTraining: {"lr": 0.1},
    EmbeddedFluxAdapter: {"vae": "nowhere", "words": ["red"]},
    ImageFolder: {"directory": "images"},
    ImageText: {"source": "images"},
    MuonWithAdamW: {"params": _parameters()},
    Prompts: {"file": "prompts.txt"},
    SwitchSolution: {"threshold": 0.1, "latest_step": 5},
    WarmupCosine: {"optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), "total_steps": 8},
}
"""Arguments that a class needs."""
METHODS = (
    ConsistencyDistillation,
    DMD2,
    FlowMatching,
    IMM,
    KnowledgeDistillation,
    LADD,
    MeanFlow,
    PiFlow,
    SCM,
    SplitMeanFlow,
    TDM,
    TimestepRescaling,
)
SETTINGS = (
    AdaptiveLoss,
    CriticGan,
    FinalReport,
    Guidance,
    LaplaceKernel,
    LogImages,
    LogitNormal,
    LoraOptions,
    PowerLoss,
    PseudoHuberLoss,
    RBFKernel,
    ShapesData,
    StudentOptions,
    TrajectoryAlignment,
    Uniform,
    ValidationOptions,
    *REQUIRED,
)
SIGNED = {"mean", "omega", "weight_bias", "seed", "threshold"}
"""Settings that may be negative."""


def _numbers(kinds: tuple[type, ...], *types: str, without: Collection[str] = ()) -> list[Any]:
    """Each class with each of its numbers, by the types of its own constructor; those named in `without` are left out."""
    return [
        pytest.param(kind, parameter.name, id=f"{kind.__name__}.{parameter.name}")
        for kind in kinds
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.name not in without
        and any(each in types for each in str(getattr(parameter.annotation, "__name__", parameter.annotation)).split(" | "))
    ]


def _refused(kind: type, name: str, value: float) -> None:
    arguments = REQUIRED.get(kind, {})
    if kind in METHODS:
        student = StudentOptions(time_embedding="rescaled") if kind is TimestepRescaling else StudentOptions()
        arguments = {"adapter": DiffusersAdapter("shapes-teacher"), "student": student}
    with pytest.raises(ConfigurationError, match=rf"\b{name} (is |{value})"):
        kind(**{**arguments, name: value})


@pytest.mark.parametrize(("kind", "name"), _numbers((*SETTINGS, *METHODS), "float"))
def test_nan_is_refused(kind, name):
    _refused(kind, name, NAN)


@pytest.mark.parametrize(("kind", "name"), _numbers((*SETTINGS, *METHODS), "float", "int", without=SIGNED))
def test_a_negative_number_is_refused(kind, name):
    _refused(kind, name, -1)
