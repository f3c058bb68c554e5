"""The mathematics every method shares: pure functions of tensors, without networks and without Lightning."""

from lightning_distill.flow.derivative import (
    AverageVelocityFn,
    difference_step,
    finite_difference,
    time_derivative,
    value_and_time_derivative,
)
from lightning_distill.flow.guidance import classifier_free, improved_mix, inside_interval
from lightning_distill.flow.losses import adaptive_loss, power_loss
from lightning_distill.flow.path import conditional_velocity, expand, interpolate, jump, predict_noise, predict_x0, renoise
from lightning_distill.flow.solvers import (
    SOLVERS,
    Solver,
    VelocityFn,
    euler_step,
    evaluations,
    heun_step,
    integrate,
    midpoint_step,
)
from lightning_distill.flow.times import (
    Interval,
    LogitNormal,
    TimeSampler,
    Uniform,
    move_on_grid,
    sample_interval,
    shift_times,
    step_grid,
    substeps,
)

__all__ = [
    "SOLVERS",
    "AverageVelocityFn",
    "Interval",
    "LogitNormal",
    "Solver",
    "TimeSampler",
    "Uniform",
    "VelocityFn",
    "adaptive_loss",
    "classifier_free",
    "conditional_velocity",
    "difference_step",
    "euler_step",
    "evaluations",
    "expand",
    "finite_difference",
    "heun_step",
    "improved_mix",
    "inside_interval",
    "integrate",
    "interpolate",
    "jump",
    "midpoint_step",
    "move_on_grid",
    "power_loss",
    "predict_noise",
    "predict_x0",
    "renoise",
    "sample_interval",
    "shift_times",
    "step_grid",
    "substeps",
    "time_derivative",
    "value_and_time_derivative",
]
