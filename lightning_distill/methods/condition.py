"""Conditions: their rows, and where they are from if not from text encoders."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_distill.teachers.model_adapter import Condition


def select(rows: Tensor, condition: Condition) -> Condition:
    """The rows (N,) of a condition."""
    return {name: value[rows] for name, value in condition.items()}


def null_rows(condition: Condition, null: Condition, share: float) -> Condition:
    """`condition` with a random share of its rows replaced by those of `null`, independently."""
    if share == 0:
        return condition
    first = next(iter(condition.values()))
    return replace_rows(condition, null, torch.rand(len(first), device=first.device) < share)


def replace_rows(condition: Condition, null: Condition, dropped: Tensor) -> Condition:
    """`condition` with the rows where `dropped` (B,) is true replaced by those of `null`."""
    return {
        name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), null[name], value) for name, value in condition.items()
    }


@runtime_checkable
class EncodedData(Protocol):
    """A DataModule that brings conditions along, so that no text encoders are loaded."""

    def check_encodings(self, settings: Mapping[str, Any]) -> None:
        """Raise `ConfigurationError` where encoders of other settings (`ModelAdapter.encoding_settings`) made them."""

    def encoded_prompts(self, prompts: Sequence[str]) -> Condition:
        """Conditions (B, ...) of B of its validation prompts, or of the empty one, on the CPU."""

    def check_known_prompts(self, prompts: Sequence[str]) -> None:
        """Raise `ConfigurationError` where there is a prompt that it cannot give the condition of."""


def encoded_data(trainer: Any) -> EncodedData | None:
    """A trainer's DataModule, if it brings conditions along."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, EncodedData) else None
