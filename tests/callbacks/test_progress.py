"""Contents and refresh rate of the progress bar."""

import pytest
from lightning.pytorch import Trainer

from lightning_distill.callbacks.progress import DistillProgressBar
from lightning_distill.callbacks.switch import SwitchSolution
from lightning_distill.data import ShapesData
from tests.callbacks.distillation import PixelDistillation


def fit(directory, module, *callbacks):
    trainer = Trainer(
        default_root_dir=directory,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, ShapesData(size=24, batch_size=8, prompts_per_category=1))


def test_bar_shows_loss_phase_speed_and_validation(tmp_path, capsys):
    fit(tmp_path, PixelDistillation(), DistillProgressBar(refresh_rate=1), SwitchSolution(latest_step=2, guard_factor=None))
    lines = [line for line in capsys.readouterr().out.replace("\r", "\n").splitlines() if line.startswith("Epoch 0")]
    steps = {line.split("| ")[1].split()[0]: line for line in lines if "loss=" in line}
    assert "phase=discrete" in steps["1/3"]
    assert "phase=differential" in steps["3/3"]
    assert "it/s" in steps["3/3"]
    assert "samples_per_second=" in steps["3/3"]
    assert steps["3/3"].index("loss=") < steps["3/3"].index("phase=") < steps["3/3"].index("samples_per_second=")
    assert "nfe_1=" in lines[-1]  # from the last validation
    assert "train/" not in lines[-1]


@pytest.mark.parametrize(("terminal", "rate"), [(True, 1), (False, 50)])
def test_refresh_rate_in_terminals_and_logs(monkeypatch, terminal, rate):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert DistillProgressBar().refresh_rate == rate


def test_methods_with_a_single_phase(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PixelDistillation, "phases", ("discrete",))
    fit(tmp_path, PixelDistillation(), DistillProgressBar(refresh_rate=1))
    printed = capsys.readouterr().out
    assert "loss=" in printed
    assert "phase=" not in printed
