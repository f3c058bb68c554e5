"""The derivative of a student along the flow, for methods whose target holds it."""

from typing import Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.derivative import (
    AverageVelocityFn,
    difference_step,
    finite_difference,
    value_and_time_derivative,
)
from lightning_distill.methods.derivative_check import check_derivative, precision
from lightning_distill.methods.networks import GuidedNetworks
from lightning_distill.teachers.student_options import StudentOptions

Derivative = Literal["exact", "finite_difference"]


class StudentDerivative(GuidedNetworks):
    """To be inherited before `TeacherStudentBase`."""

    student_options: StudentOptions
    derivative: Derivative
    """How it is taken: "exact", by dual numbers, or "finite_difference", for a student with an operation that has no
    forward-mode rule, at the cost of two more forward passes."""

    def choose_derivative(self, derivative: Derivative) -> None:
        """Set how the derivative is taken.

        Raises:
            ConfigurationError: If there is no such way.
        """
        if derivative not in ("exact", "finite_difference"):
            raise ConfigurationError(f"model.derivative is {derivative!r}; choose exact or finite_difference")
        self.derivative = derivative

    @property
    def takes_derivatives(self) -> bool:
        """Whether this run may need a derivative."""
        return True

    def value_and_derivative(
        self, fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Value with its graph, and derivative along (tangent, 0, 1) without one, (B, C, h, w) each.

        Args:
            fn: A function of the student, of (x, r, t).
            x: State at t (B, C, h, w).
            r: End (B,).
            t: Start (B,).
            tangent: Velocity of x (B, C, h, w).
        """
        with self.adapter.frozen_routing():
            if self.derivative == "exact":
                return value_and_time_derivative(fn, x, r, t, tangent)
            return fn(x, r, t), self.difference(fn, x, r, t, tangent)

    def difference(self, fn: AverageVelocityFn, x: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> Tensor:
        """The derivative by a central difference with a step that suits the precision."""
        step = difference_step(self.adapter.time_frequency(self.student_options), precision(self))
        return finite_difference(fn, x, r, t, tangent, step)

    def on_fit_start(self) -> None:
        """Look at the derivative, if this run may need it, before the first step relies on it."""
        super().on_fit_start()
        if self.takes_derivatives:
            report = check_derivative(self)
            rank_zero_info(str(report))
            if report.difference is not None:
                for logger in self.loggers:
                    logger.log_metrics({"derivative/difference": report.difference}, step=0)
