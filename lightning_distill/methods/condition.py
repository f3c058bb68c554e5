"""Rows of conditions."""

import torch
from torch import Tensor

from lightning_distill.models.base import Condition


def select(rows: Tensor, condition: Condition) -> Condition:
    """The rows (N,) of a condition."""
    return {name: value[rows] for name, value in condition.items()}


def null_rows(condition: Condition, null: Condition, share: float) -> Condition:
    """`condition` with a random share of its rows replaced by those of `null`, independently."""
    if share == 0:
        return condition
    first = next(iter(condition.values()))
    dropped = torch.rand(len(first), device=first.device) < share
    return {
        name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), null[name], value) for name, value in condition.items()
    }
