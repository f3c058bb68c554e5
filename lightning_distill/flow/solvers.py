"""Explicit solvers of the flow `dx/dt = v(x, t)`, with separate times for each sample."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import flow_step
from lightning_distill.flow.times import substeps

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""`velocity(x, t)` maps (B, ...) and (B,) to (B, ...)."""

StepFn = Callable[[VelocityFn, Tensor, Tensor, Tensor], Tensor]


def euler_step(velocity: VelocityFn, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One Euler step: the velocity at the start. Order 1, one evaluation.

    Args:
        velocity: Velocity field of the flow.
        x: State at t, (B, ...).
        t: Start, (B,).
        s: End, (B,).

    Returns:
        State at s, (B, ...).
    """
    return flow_step(x, velocity(x, t), s, t)


def heun_step(velocity: VelocityFn, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One step of Heun's method: the mean of the velocities at the start and at Euler's end. Order 2, two evaluations.

    Arguments and result are those of `euler_step`. The velocity is evaluated at s, which may be 0.
    """
    v = velocity(x, t)
    return flow_step(x, (v + velocity(flow_step(x, v, s, t), s)) / 2, s, t)


def midpoint_step(velocity: VelocityFn, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One step of the midpoint method: the velocity at Euler's half step. Order 2, two evaluations.

    Arguments and result are those of `euler_step`. The velocity is never evaluated at s.
    """
    middle = (t + s) / 2
    return flow_step(x, velocity(euler_step(velocity, x, t, middle), middle), s, t)


@dataclass(frozen=True)
class Solver:
    """A one-step method.

    Args:
        step: `step(velocity, x, t, s)`, from the state at t to the state at s.
        order: Order of convergence: the global error decreases as `steps ** -order`.
        evaluations: Velocity evaluations per step.
    """

    step: StepFn
    order: int
    evaluations: int


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler_step, order=1, evaluations=1),
    "heun": Solver(heun_step, order=2, evaluations=2),
    "midpoint": Solver(midpoint_step, order=2, evaluations=2),
}


def integrate(
    velocity: VelocityFn, x_t: Tensor, t: Tensor, r: Tensor, steps: int, solver: str = "euler", shift: float = 1.0
) -> Tensor:
    """Integrate the flow from t to r in sub-steps that are even on the sampling grid.

    Args:
        velocity: Velocity field of the flow. The caller disables gradients, for example those of a teacher.
        x_t: State at t, (B, ...).
        t: Start, (B,).
        r: End, (B,). Rows with `r = t` are unchanged.
        steps: Number of sub-steps, at least 1.
        solver: Name in `SOLVERS`.
        shift: Shift of the grid (`flow.step_grid`), above 0; 1 makes the sub-steps even in t.

    Returns:
        x_r, (B, ...).

    Raises:
        ConfigurationError: If the solver is unknown, or steps is less than 1.
    """
    step = _get_solver(solver, steps).step
    x = x_t
    for start, end in pairwise(substeps(t, r, steps, shift)):
        x = step(velocity, x, start, end)
    return x


def evaluations(solver: str, steps: int) -> int:
    """Number of velocity evaluations of `integrate`.

    Raises:
        ConfigurationError: If the solver is unknown, or steps is less than 1.
    """
    return _get_solver(solver, steps).evaluations * steps


def _get_solver(solver: str, steps: int) -> Solver:
    if solver not in SOLVERS:
        raise ConfigurationError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise ConfigurationError(f"the number of solver steps is {steps}; set it to at least 1")
    return SOLVERS[solver]
