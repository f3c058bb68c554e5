"""What the refit of a student's time embedder changes in the teacher's velocities."""

from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import flow_step
from lightning_distill.methods.networks import Networks
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student_options import StudentOptions


@torch.no_grad()
def relative_change(
    networks: Networks, latent_shape: tuple[int, ...], device: torch.device, steps: int = 8, samples: int = 8
) -> float:
    """Relative difference of the student's velocities from the teacher's, along trajectories of the teacher without a prompt.

    Meaningful before training only; exactly 0 there for a student with the teacher's own time embedder.

    Args:
        networks: Teacher and student.
        latent_shape: Shape (C, h, w) of the latents.
        device: Device of the networks.
        steps: Euler steps of the trajectories.
        samples: Number of trajectories.
    """
    adapter, scale = networks.adapter, networks.guidance.scale
    noise = torch.stack([torch.randn(latent_shape, generator=torch.Generator().manual_seed(i)) for i in range(samples)])
    x, null = noise.to(device), networks.null_condition(samples)
    change = size = 0.0
    for t, r in pairwise(adapter.time_grid(steps, latent_shape).to(device)):
        times, ends = t.expand(samples), r.expand(samples)
        v = adapter.velocity(networks.teacher, x, times, null, scale)
        u = adapter.average_velocity(networks.student, x, times, times, null, scale)
        change += (u - v).square().sum().item()
        size += v.square().sum().item()
        x = flow_step(x, v, ends, times)
    return float((change / size) ** 0.5)


def report_drift(report: SmoothTimeReport, drift: float, options: StudentOptions, loggers: Iterable[Any]) -> None:
    """Log the refit of a new run, and check that it left the teacher's velocities as they were.

    Args:
        report: Errors of the refit.
        drift: Of `relative_change`.
        options: Options of the student.
        loggers: The trainer's loggers.

    Raises:
        ConfigurationError: If the drift exceeds `student.max_drift`.
    """
    rank_zero_info(
        f"Smooth time: largest |de/dt| {report.derivative_before:.1f} before and {report.derivative_after:.1f} after, "
        f"fit error {report.fit_error:.3f}, drift of the velocities {drift:.3f}"
    )
    for logger in loggers:
        logger.log_metrics({f"smooth_time/{k}": v for k, v in {**asdict(report), "drift": drift}.items()}, step=0)
    cloned = options.interval_embedding == "clone"  # changes the velocities at the start by itself
    if drift > options.max_drift and not cloned:
        raise ConfigurationError(
            f"the refitted time embedder changes the teacher's velocities by {drift:.3f}, more than student.max_drift "
            f"{options.max_drift}; raise student.frequency_bound or set student.time_embedding to original"
        )
