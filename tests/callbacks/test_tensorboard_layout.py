"""Chart layout and hyperparameters of TensorBoard, with names of existing curves."""

import re
from dataclasses import dataclass

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_distill.callbacks.tensorboard_layout import TensorBoardLayout, flat_hyperparameters
from lightning_distill.data import ShapesData
from tests.callbacks.distillation import PixelDistillation, PixelTraining
from tests.toy import ToyModule


def fit(directory, module, logger=None):
    logger = logger or TensorBoardLogger(directory, name=None, version="", default_hp_metric=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TensorBoardLayout()],
    )
    trainer.fit(module, ShapesData(size=16, batch_size=8, prompts_per_category=1))
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


def charts(events):
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    return {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}


def hyperparameters(events):
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()}


def compared_curves(events):
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    return [info.name.tag for info in plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos]


def test_charts_have_the_logged_curves(tmp_path):
    events = fit(tmp_path, PixelDistillation())
    found = charts(events)
    logged = events.Tags()["scalars"]
    assert found["accuracy by steps"] == ["^val/prompt_accuracy/nfe_1$", "^val/prompt_accuracy/nfe_2$"]
    for title in ("loss", "accuracy by steps", "gradient"):
        assert all(any(re.match(tag, name) for name in logged) for tag in found[title])
    assert [sum(bool(re.match(tag, name)) for name in logged) for tag in found["accuracy by steps"]] == [1, 1]
    assert any(re.match(tag, "train/loss_t3") for tag in found["loss by time"])
    assert found["phase"] == ["^train/phase$"]
    assert found["average velocity error"] == ["^val/average_velocity_error$"]


def test_hyperparameters_of_method_and_data(tmp_path):
    events = fit(tmp_path, PixelDistillation(strength=0.25, nfe=(1, 4)))
    found = hyperparameters(events)
    assert found["model.strength"] == 0.25
    assert found["model.nfe"] == "(1, 4)"
    assert found["data.size"] == 16
    assert compared_curves(events) == ["val/prompt_accuracy/nfe_1", "val/prompt_accuracy/nfe_4"]
    # All values of these curves were measured; the callback adds none at the start.
    assert [len(events.Scalars(tag)) for tag in compared_curves(events)] == [1, 1]


def test_methods_without_teacher_or_metric(tmp_path):
    training = PixelTraining()
    training.validation = type(training.validation)(nfe=(1, 2))  # average_velocity is true, but there is no teacher
    assert compared_curves(fit(tmp_path / "training", training)) == ["val/prompt_accuracy/nfe_1", "val/prompt_accuracy/nfe_2"]
    bare = fit(tmp_path / "bare", PixelDistillation(with_metric=False))
    assert compared_curves(bare) == []
    assert "accuracy by steps" not in charts(bare)
    assert "loss" in charts(fit(tmp_path / "other", ToyModule()))


def test_other_loggers_are_ignored(tmp_path):
    fit(tmp_path, PixelDistillation(), CSVLogger(tmp_path))
    assert not list(tmp_path.rglob("events.out.tfevents*"))
    assert list(tmp_path.rglob("metrics.csv"))


@dataclass(frozen=True)
class Options:
    steps: int = 4
    solver: str = "heun"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"lr": 0.1, "ema": None, "nfe": [1, 2], "on": True}, {"m.lr": 0.1, "m.ema": "None", "m.nfe": "[1, 2]", "m.on": True}),
        ({"options": Options()}, {"m.options.steps": 4, "m.options.solver": "heun"}),
        (
            {
                "_class_path": "package.MeanFlow",
                "loss": {"class_path": "losses.PowerLoss", "init_args": {"gamma": 2.0}},
            },
            {"m": "MeanFlow", "m.loss": "PowerLoss", "m.loss.gamma": 2.0},
        ),
        ({"_instantiator": "cli", "callback": print}, {}),
    ],
)
def test_flat_hyperparameters(value, expected):
    assert dict(flat_hyperparameters(value, "m")) == expected
