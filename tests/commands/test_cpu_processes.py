import os

import pytest
from lightning.pytorch import Trainer

from lightning_distill.commands.cpu_processes import check_cpu_processes
from lightning_distill.errors import ConfigurationError


def trainer(devices: int) -> Trainer:
    strategy = "ddp" if devices > 1 else "auto"
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize(
    ("threads", "devices", "warned"), [("2", 2, True), ("1", 2, False), ("2", 1, False), ("", 2, False), ("2,1", 2, False)]
)
def test_more_threads_than_cores_warn(monkeypatch, recwarn, threads, devices, warned):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    check_cpu_processes(trainer(devices))
    assert any("2 processes of 2 threads share 2 cores" in str(warning.message) for warning in recwarn) == warned


@pytest.mark.parametrize(("cores", "warned"), [(1, True), (2, False)])
def test_more_processes_than_cores_warn(monkeypatch, recwarn, cores, warned):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    check_cpu_processes(trainer(2))
    assert any("trainer.devices is 2: 2 processes share 1 cores" in str(warning.message) for warning in recwarn) == warned


def test_far_more_processes_than_cores_raise(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=r"^trainer\.devices is 9, .* this machine has 2 cores; set it to at most 2$"):
        check_cpu_processes(trainer(9))
