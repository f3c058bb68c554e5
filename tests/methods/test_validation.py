from typing import Any

import pytest

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import SCM, ValidationOptions
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import loader, meanflow, trainer


def test_average_velocity_error_is_0_for_the_exact_student_only(tmp_path: Any) -> None:
    module = meanflow()
    run = trainer(tmp_path)
    (exact,) = run.validate(module, loader(), verbose=False)
    module.student.bias.data += 1
    (biased,) = run.validate(module, loader(), verbose=False)
    assert exact["val/average_velocity_error"] < 1e-3
    assert biased["val/average_velocity_error"] > 0.3


def test_intervals_without_r_0_are_an_error_for_stochastic_sampling() -> None:
    options = ValidationOptions(nfe=(1,), height=4, width=4, intervals=[(0.5, 1.0)])
    with pytest.raises(ConfigurationError, match=r"validation\.intervals has no interval with r = 0, and SCM"):
        SCM(GaussianAdapter("small"), validation=options).setup("fit")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"nfe": ()}, "validation.nfe"),
        ({"nfe": (2, 4, 2)}, "validation.nfe is .* once"),
        ({"teacher_nfe": 0}, "validation.teacher_nfe"),
        ({"samples": 0}, "validation.samples"),
        ({"intervals": [(0.5, 0.5)]}, "validation.intervals"),
        ({"intervals": [(0.5, 1.5)]}, "validation.intervals"),
    ],
)
def test_error_for_invalid_validation_options_names_the_setting(settings: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        ValidationOptions(**settings)
