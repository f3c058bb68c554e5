"""What the refit of a time embedder may change of the teacher at the start of a run."""

from pathlib import Path

import pytest

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import MeanFlow
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student_options import StudentOptions
from tests.methods.gaussian_adapter import GaussianAdapter, SmallNetwork
from tests.methods.test_meanflow import VALIDATION, loader, trainer


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Students that are far from their teacher."""
    report = SmoothTimeReport(fit_error=0.1, derivative_before=100.0, derivative_after=10.0)
    monkeypatch.setattr(GaussianAdapter, "build_student", lambda *told: (SmallNetwork(), report))
    monkeypatch.setattr(MeanFlow, "time_embedder_drift", lambda module: 0.5)


def fit(path: Path, student: StudentOptions) -> MeanFlow:
    module = MeanFlow(GaussianAdapter("small"), validation=VALIDATION, student=student)
    trainer(path, max_steps=1, limit_val_batches=0).fit(module, loader())
    return module


@pytest.mark.usefixtures("moved")
def test_a_refit_that_changes_the_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"by 0\.500, more than student\.max_drift 0\.1; raise"):
        fit(tmp_path, StudentOptions())
    assert fit(tmp_path, StudentOptions(max_drift=0.6)).trainer.global_step == 1


@pytest.mark.usefixtures("moved")
def test_a_cloned_interval_input_is_no_refit(tmp_path: Path) -> None:
    assert fit(tmp_path, StudentOptions(interval_embedding="clone")).trainer.global_step == 1
