from pathlib import Path

import pytest

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import MeanFlow, base
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student_options import StudentOptions
from tests.methods.gaussian_adapter import GaussianAdapter, SmallNetwork
from tests.methods.gaussian_runs import VALIDATION, loader, trainer


@pytest.fixture
def _drifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refitted students with a drift of 0.5."""
    report = SmoothTimeReport(fit_error=0.1, derivative_before=100.0, derivative_after=10.0)
    monkeypatch.setattr(GaussianAdapter, "build_student", lambda *args: (SmallNetwork(), report))
    monkeypatch.setattr(base, "relative_change", lambda *args: 0.5)


def fit(path: Path, student: StudentOptions) -> MeanFlow:
    module = MeanFlow(GaussianAdapter("small"), validation=VALIDATION, student=student)
    trainer(path, max_steps=1, limit_val_batches=0).fit(module, loader())
    return module


@pytest.mark.usefixtures("_drifted")
def test_drift_above_max_drift_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"by 0\.500, more than student\.max_drift 0\.1; raise"):
        fit(tmp_path, StudentOptions())
    assert fit(tmp_path, StudentOptions(max_drift=0.6)).trainer.global_step == 1


@pytest.mark.usefixtures("_drifted")
def test_drift_of_a_cloned_interval_embedding_is_no_error(tmp_path: Path) -> None:
    assert fit(tmp_path, StudentOptions(interval_embedding="clone")).trainer.global_step == 1
