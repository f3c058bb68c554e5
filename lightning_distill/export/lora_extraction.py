"""LoRA of given rank from the difference of two networks' weights, and the error that it makes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.export.lora_layers import LoraLayers

Read = Callable[[str], Tensor]
"""Reads one weight by its name."""

EXACT_SIZE = 1024
"""Largest smaller dimension of a matrix with an exact SVD; the cost grows with its square."""
OVERSAMPLING = 16
"""Number of directions beyond the rank in a randomised SVD."""
POWER_ITERATIONS = 4
"""Number of subspace iterations of a randomised SVD (arXiv 0909.4061, Algorithm 4.4)."""


@dataclass(frozen=True)
class ExtractedLora:
    r"""LoRA that approximates the change of a network, :math:`\Delta = W_\text{student} - W_\text{teacher}` of all weights.

    Attributes:
        layers: Factors by layer; layers without change have none.
        error: :math:`\|\Delta - \Delta_\text{LoRA}\|_F / \|\Delta\|_F` over all weights; 0 without any change.
        unrepresented: Part of it that no rank removes: the same ratio for the changes of weights other than the matrices of
            linear layers, such as biases, norms and convolutions.
    """

    layers: LoraLayers
    error: float
    unrepresented: float


def linear_layers(network: nn.Module) -> list[str]:
    """Names of the linear layers of a network, which may be on the meta device."""
    return [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]


@torch.no_grad()
def extract_lora(student: Read, teacher: Read, names: Iterable[str], linear: Iterable[str], rank: int) -> ExtractedLora:
    r"""Best approximation of a network's change by updates of a rank: the truncated SVD of each layer's change.

    Two weights are in memory at a time. The result is deterministic.

    Args:
        student: Reads a weight of the student, in any precision and on any device.
        teacher: Reads a weight of the teacher, on the same device.
        names: Names of all weights of both.
        linear: Names of the linear layers.
        rank: Largest rank of an update.

    Returns:
        Factors :math:`B = U \sqrt{S}, A = \sqrt{S} V^T` in float32 on the CPU, and their error.

    Raises:
        ConfigurationError: If the two have a weight of different shapes.
        NonFiniteError: If a weight is NaN or infinite.
    """
    matrices = {f"{name}.weight": name for name in linear}
    layers: LoraLayers = {}
    total = missed = other = 0.0
    for name in names:
        trained, original = student(name), teacher(name)
        if trained.shape != original.shape:
            raise ConfigurationError(
                f"format lora is not possible: {name} of the student has the shape {tuple(trained.shape)}, and "
                f"{tuple(original.shape)} in the teacher; export the format any_step"
            )
        change = trained.float() - original.float()
        energy = _energy(change)
        if not math.isfinite(energy):
            raise NonFiniteError(f"nothing was exported, because {name} is NaN or infinite; export an earlier checkpoint")
        total += energy
        if name not in matrices:
            other += energy
        elif energy:
            a, b = truncated_svd(change, rank)
            missed += _energy(change - b @ a)
            layers[matrices[name]] = (a.cpu(), b.cpu())
    if not total:
        return ExtractedLora({}, 0.0, 0.0)
    return ExtractedLora(layers, ((missed + other) / total) ** 0.5, (other / total) ** 0.5)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A (rank, in) and B (out, rank) of the best approximation B A of a matrix (out, in).

    Matrices with more than `EXACT_SIZE` rows and columns take a randomised SVD, whose random numbers are the same in each call.

    Args:
        matrix: Float32.
        rank: Largest rank; a matrix with fewer rows or columns has a smaller one.
    """
    smaller = min(matrix.shape)
    rank = min(rank, smaller)
    if smaller <= max(EXACT_SIZE, rank + OVERSAMPLING):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, rank + OVERSAMPLING, POWER_ITERATIONS)
        vt = v.mT
    root = s[:rank].sqrt()
    return (root[:, None] * vt[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def _energy(change: Tensor) -> float:
    """Squared Frobenius norm."""
    return change.double().square().sum().item()
