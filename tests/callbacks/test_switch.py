"""Steps of the switch, its state in checkpoints, and the rollback to the weights of the switch."""

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.switch import SwitchSolution
from lightning_distill.errors import ConfigurationError
from lightning_distill.optimizers import MuonWithAdamW
from tests.callbacks.distillation import Ones, Scripted

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class Snapshots(Callback):
    """Copies the module's weights before each step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Scripted, batch: Any, batch_idx: int) -> None:
        self.weights[trainer.global_step] = copy.deepcopy(pl_module.state_dict())


def fit(
    directory: Path, module: Scripted, *callbacks: Callback, epochs: int = 5, ckpt_path: str | None = None, **kwargs: Any
) -> Trainer:
    """Train with a validation at steps 2, 4, 6 and so on."""
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False} | kwargs
    settings["enable_checkpointing"] |= any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(
        default_root_dir=directory,
        accelerator="cpu",
        max_epochs=epochs,
        val_check_interval=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, Ones(), ckpt_path=ckpt_path)
    return trainer


def first_differential(module: Scripted) -> int | None:
    """The first step of the differential phase, or None."""
    return module.trained_phases.index("differential") if "differential" in module.trained_phases else None


@pytest.mark.parametrize(
    ("script", "settings", "expected"),
    [
        ({2: 0.5, 4: 0.2, 6: 0.1}, {"threshold": 0.3}, 4),
        ({2: 0.5, 4: 0.6, 6: 0.7, 8: 0.9}, {"threshold": 0.65, "mode": "max"}, 6),
        ({2: 0.5, 4: 0.4}, {"threshold": 0.3}, None),
        ({2: 0.2, 4: 0.2, 6: 0.5, 8: 0.2, 10: 0.2, 12: 0.2}, {"threshold": 0.3, "patience": 3}, 12),
        ({2: 0.2, 4: 0.2, 6: 0.2, 8: 0.2}, {"threshold": 0.3, "earliest_step": 5}, 6),
        ({2: 0.5, 4: 0.5}, {"threshold": 0.3, "latest_step": 7}, 7),
        ({2: 0.5, 4: 0.2}, {"threshold": 0.3, "latest_step": 7}, 4),
        ({2: 0.01}, {"latest_step": 5}, 5),
        ({0: 0.01, 2: 0.5}, {"threshold": 0.3}, None),
    ],
    ids=["min", "max", "never", "patience", "earliest", "latest", "before latest", "latest alone", "sanity check"],
)
def test_step_of_the_switch(tmp_path, script, settings, expected):
    module = Scripted(script)
    fit(tmp_path, module, SwitchSolution(**settings))
    assert first_differential(module) == expected
    assert len(module.trained_phases) == 20
    assert set(module.trained_phases[: expected or 20]) == {"discrete"}
    assert set(module.trained_phases[expected or 20 :]) <= {"differential"}


def test_switch_between_other_phases(tmp_path):
    module = Scripted({}, phase="bootstrapped")
    fit(tmp_path, module, SwitchSolution(latest_step=3, to="discrete", guard_factor=None))
    assert module.trained_phases == ["bootstrapped"] * 3 + ["discrete"] * 17


def test_missing_metric_is_an_error_only_without_latest_step(tmp_path):
    with pytest.raises(ConfigurationError, match="'val/average_velocity_error', which validation does not log"):
        fit(tmp_path, Scripted({}), SwitchSolution(threshold=0.3))
    module = Scripted({})
    with pytest.warns(UserWarning, match="threshold and guard wait for this metric"):
        fit(tmp_path, module, SwitchSolution(threshold=0.3, latest_step=3))
    assert first_differential(module) == 3


def test_messages_and_logged_values(tmp_path, caplog):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Scripted({2: 0.5, 4: 0.25, 6: 0.75}), SwitchSolution(threshold=0.3), logger=logger, epochs=2)
    lines = [message for message in caplog.messages if "SwitchSolution" in message]
    assert lines == [
        "SwitchSolution: discrete to differential at step 4 (threshold 0.3; val/average_velocity_error is 0.25)",
        "SwitchSolution: rollback to discrete at step 6 with the weights of step 4: val/average_velocity_error went from 0.25 "
        "at the switch to 0.75 (guard_factor 2)",
    ]
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    logged = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    x_axis = [step for step, _ in logged["val/average_velocity_error"]]
    assert logged["switch/step"] == [(x_axis[1], 4.0)]
    assert logged["switch/value"] == [(x_axis[1], 0.25), (x_axis[2], 0.75)]
    assert logged["switch/returned_at"] == [(x_axis[2], 6.0)]


@pytest.mark.parametrize("with_ema", [False, True])
def test_rollback_restores_the_weights_of_the_switch(tmp_path, with_ema):
    module = Scripted({2: 0.5, 4: 0.2, 6: 0.39, 8: 0.41, 10: 0.1}, with_ema)
    snapshots = Snapshots()
    switch = SwitchSolution(threshold=0.3)
    fit(tmp_path, module, switch, snapshots)
    # At step 10 the metric passes the threshold, but there is no second switch.
    assert module.trained_phases == ["discrete"] * 4 + ["differential"] * 4 + ["discrete"] * 12
    at_switch, before_rollback, after_rollback = snapshots.weights[4], snapshots.weights[7], snapshots.weights[8]
    assert "networks.student.weight" in at_switch
    assert ("networks.ema.module.weight" in at_switch) == with_ema
    for name, value in at_switch.items():
        assert torch.equal(after_rollback[name], value)
        assert not torch.equal(before_rollback[name], value)
    assert switch.state.returned_at == 8
    assert switch.state_dict()["weights"] is None


def test_rollback_resets_the_optimizer(tmp_path):
    class Moments(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            state = list(optimizer.state.values())
            self.steps = [*getattr(self, "steps", []), int(state[0]["step"]) if state else 0]

    moments = Moments()
    fit(tmp_path, Scripted({2: 0.5, 4: 0.2, 6: 0.9}), SwitchSolution(threshold=0.3), moments, epochs=2)
    assert moments.steps == [0, 1, 2, 3, 4, 5, 0, 1]


def test_rollback_drops_accumulated_gradients(tmp_path):
    class Gradients(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.exist = [*getattr(self, "exist", []), pl_module.student.weight.grad is not None]

    class InTurn(Scripted):
        errors = iter((0.5, 0.2, 0.9, 0.9))  # rollback in the middle of the second epoch; an epoch has four batches

        def validation_step(self, batch, batch_idx):
            self.log("val/average_velocity_error", next(self.errors), batch_size=1)

    gradients, switch = Gradients(), SwitchSolution(threshold=0.3)
    settings = {"epochs": 2, "accumulate_grad_batches": 3, "num_sanity_val_steps": 0}
    fit(tmp_path, InTurn({}), switch, gradients, **settings)
    assert switch.state.returned_at == 2
    assert gradients.exist[5:7] == [True, False]  # before and after the rollback


def test_rollback_resets_the_optimizers_inside_an_optimizer(tmp_path):
    class Composed(Scripted):
        def configure_optimizers(self):
            groups = [
                {"params": [self.student.weight], "block_matrices": True},
                {"params": [self.student.bias], "block_matrices": False},
            ]
            return MuonWithAdamW(groups)

    class Restarted(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            inner = trainer.optimizers[0]
            self.sizes = [*getattr(self, "sizes", []), (len(inner.muon.state), len(inner.adamw.state))]

    restarted = Restarted()
    fit(tmp_path, Composed({2: 0.5, 4: 0.2, 6: 0.9}), SwitchSolution(threshold=0.3), restarted, epochs=2)
    assert restarted.sizes == [(0, 0), *[(1, 1)] * 5, (0, 0), (1, 1)]


@pytest.mark.filterwarnings("ignore:SwitchSolution. validation does not log")
@pytest.mark.parametrize(
    ("script", "settings", "returned_at"),
    [
        ({2: 0.5, 4: 0.2, 6: 0.9}, {"threshold": 0.3, "guard_factor": None}, None),
        ({2: 0.5, 4: 0.2, 6: 0.9}, {"threshold": 0.3, "guard_factor": 5.0}, None),
        ({2: 0.5, 4: 0.2, 6: float("nan")}, {"threshold": 0.3}, 6),
        ({2: 0.5, 4: 0.8, 6: 0.5, 8: 0.3}, {"threshold": 0.7, "mode": "max"}, 8),
        ({4: 0.2, 6: 0.3, 8: 0.5}, {"latest_step": 5}, 8),
        ({4: 0.2, 6: 0.3, 8: 0.5}, {"latest_step": 3}, 8),
    ],
    ids=["no guard", "not enough", "nan", "max", "measured before the latest step", "measured after it"],
)
def test_condition_of_the_rollback(tmp_path, script, settings, returned_at):
    switch = SwitchSolution(**settings)
    module = Scripted(script)
    fit(tmp_path, module, switch)
    assert switch.state.returned_at == returned_at
    assert module.phase == ("differential" if returned_at is None else "discrete")


def test_resumed_run_continues_and_can_roll_back(tmp_path):
    script = {2: 0.5, 4: 0.2, 6: 0.3, 8: 0.9}
    uninterrupted, snapshots = Scripted(script, with_ema=True), Snapshots()
    checkpoint = AtomicCheckpoint(str(tmp_path), filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(tmp_path, uninterrupted, SwitchSolution(threshold=0.3), snapshots, checkpoint, epochs=3)
    for step in (3, 6, 10):  # before the switch, after it, after the rollback
        resumed, switch = Scripted(script, with_ema=True), SwitchSolution(threshold=0.3)
        resumed_snapshots = Snapshots()
        fit(tmp_path, resumed, switch, resumed_snapshots, epochs=3, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert resumed.trained_phases == uninterrupted.trained_phases[step:]
        assert switch.state.step == 4
        assert switch.state.returned_at == 8
        if step < 8:
            expected = snapshots.weights[4].items()
            assert all(torch.equal(resumed_snapshots.weights[8][name], value) for name, value in expected)


def test_checkpoint_after_the_switching_validation_has_the_new_phase(tmp_path):
    checkpoint = AtomicCheckpoint(str(tmp_path), filename="{step}", save_top_k=-1, monitor="val/average_velocity_error")
    fit(tmp_path, Scripted({2: 0.5, 4: 0.2}), SwitchSolution(threshold=0.3), checkpoint, epochs=1)
    resumed = Scripted({4: 0.2})
    fit(tmp_path, resumed, SwitchSolution(threshold=0.3), epochs=2, ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert resumed.trained_phases == ["differential"] * 4


def test_run_without_guard_drops_the_snapshot(tmp_path):
    switch = SwitchSolution(threshold=0.3)
    fit(tmp_path, Scripted({2: 0.5, 4: 0.2}), switch, epochs=2)
    assert set(switch.state_dict()["weights"]) == {"networks.student"}
    unguarded = SwitchSolution(threshold=0.3, guard_factor=None)
    unguarded.load_state_dict(switch.state_dict())
    assert unguarded.state == switch.state
    assert unguarded.state_dict()["weights"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "threshold and SwitchSolution.latest_step are null, so it would never switch"),
        ({"threshold": 0.3, "mode": "least"}, "choose min for an error"),
        ({"threshold": 0.3, "patience": 0}, "patience is 0; set it to at least 1 validation"),
        ({"earliest_step": 10, "latest_step": 9}, "before earliest_step 10"),
        ({"threshold": 0.3, "guard_factor": 1.0}, "set it above 1"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        SwitchSolution(**settings)


def test_methods_without_the_target_phase():
    trainer = SimpleNamespace(strategy=None)
    with pytest.raises(ConfigurationError, match="Linear has none to switch to; remove the callback"):
        SwitchSolution(latest_step=1).setup(trainer, torch.nn.Linear(1, 1), "fit")
    with pytest.raises(ConfigurationError, match="SinglePhase has none to switch to; remove the callback"):
        SwitchSolution(latest_step=1).setup(trainer, SinglePhase({}), "fit")
    with pytest.raises(ConfigurationError, match="'continuous'; choose one of discrete, bootstrapped, differential"):
        SwitchSolution(latest_step=1, to="continuous").setup(trainer, Scripted({}), "fit")
    with pytest.raises(ConfigurationError, match="solution is already 'differential'"):
        SwitchSolution(latest_step=1).setup(trainer, Scripted({}, phase="differential"), "fit")


class SinglePhase(Scripted):
    phases = ("discrete",)
