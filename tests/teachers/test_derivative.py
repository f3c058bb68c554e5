"""Time derivative of a FLUX student from dual numbers, compared with finite differences in float64."""

import pytest
import torch

from lightning_distill.flow.derivative import time_derivative
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student_options import StudentOptions
from tests.tiny import PROMPTS, save_tiny_pipeline


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_dual_derivative_equals_finite_differences(guidance_embeds: bool, tmp_path) -> None:
    adapter = DiffusersAdapter(save_tiny_pipeline(tmp_path / "teacher", guidance_embeds=guidance_embeds))
    adapter.check()
    adapter.load()
    student, report = adapter.build_student(adapter.load_teacher(), StudentOptions())
    assert isinstance(report, SmoothTimeReport)
    with torch.no_grad():
        for parameter in student.timestep_embedders[0].interval_embedder.parameters():
            parameter.normal_(std=0.05)  # the output must depend on the interval
    student.double()
    condition = {name: value.double() for name, value in adapter.encode_prompt(PROMPTS).items()}
    shape = (len(PROMPTS), *adapter.latent_shape(32, 32))
    x, v = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    t = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    r = 0.4 * t

    def average_velocity(x, r, t):
        return adapter.average_velocity(student, x, r, t, condition, 3.5)

    u, dudt = time_derivative(average_velocity, x, r, t, v)
    step = 1e-4
    with torch.no_grad():
        ahead = average_velocity(x + step * v, r, t + step)
        behind = average_velocity(x - step * v, r, t - step)
        fixed_x = average_velocity(x, r, t + step) - average_velocity(x, r, t - step)
    difference = (ahead - behind) / (2 * step)
    assert u.dtype == torch.float64
    assert (dudt - difference).norm() / difference.norm() < 1e-4
    # The derivative along t alone must contribute as well.
    assert (fixed_x / (2 * step)).norm() / difference.norm() > 0.01
