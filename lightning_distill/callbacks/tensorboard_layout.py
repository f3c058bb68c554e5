"""Chart layout and hyperparameter table of TensorBoard."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from lightning_distill.methods.base import TIME_BINS, TeacherStudentBase
from lightning_distill.methods.evaluation import metric_name

Layout = dict[str, dict[str, list[Any]]]


class TensorBoardLayout(Callback):
    """Fills the Custom Scalars and HParams tabs of TensorBoard at the start of `fit`; ignores other loggers.

    The hyperparameters are those that the method and the DataModule saved, under dotted names. Their metrics are the accuracies
    and the error of the average velocity, which refer to the curves of validation. Unlike `TensorBoardLogger.log_hyperparams`,
    this callback adds no extra value at step 0. Set `default_hp_metric: false` in the logger.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the chart layout and the hyperparameters."""
        if not trainer.is_global_zero:
            return
        quality = quality_tags(pl_module)
        parameters = dict(flat_hyperparameters(pl_module.hparams, "model"))
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is not None:
            parameters |= flat_hyperparameters(datamodule.hparams, "data")
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            logger.experiment.add_custom_scalars(scalars_layout(quality))
            writer = logger.experiment._get_file_writer()
            for summary in hparams(parameters, dict.fromkeys(quality, 0.0)):
                writer.add_summary(summary)


def quality_tags(pl_module: LightningModule) -> list[str]:
    """Names of the curves that compare runs."""
    if not isinstance(pl_module, TeacherStudentBase):
        return []
    accuracies = [f"val/{metric_name(metric)}/nfe_{nfe}" for nfe, metric in pl_module.metrics.items()]
    measured = pl_module.has_teacher and pl_module.validation.average_velocity
    return [*accuracies, "val/average_velocity_error"] if measured else accuracies


def scalars_layout(quality: list[str]) -> Layout:
    """Charts by category and title, each with its curves.

    Args:
        quality: Names of the validation curves, from `quality_tags`.
    """

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]  # tags are regular expressions

    accuracies = [tag for tag in quality if "/nfe_" in tag]
    layout: Layout = {
        "Loss": {"loss": chart("train/loss"), "loss by time": chart(*(f"train/loss_t{i}" for i in range(TIME_BINS)))},
        "Norms": {"gradient": chart("train/grad_norm"), "u and du over dt": chart("train/u_norm", "train/dudt_norm")},
        "Switch": {"average velocity error": chart("val/average_velocity_error"), "phase": chart("train/phase")},
    }
    return {"Accuracy": {"accuracy by steps": chart(*accuracies)}, **layout} if accuracies else layout


def flat_hyperparameters(value: Any, name: str) -> Iterator[tuple[str, bool | int | float | str]]:
    """Pairs of dotted name and plain value: nested settings are flattened, other objects are skipped."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("class_path", "_class_path"):
                yield name, str(item).rsplit(".", 1)[-1]
            elif key in ("init_args", "dict_kwargs"):  # jsonargparse's format of an object, not a setting
                yield from flat_hyperparameters(item, name)
            elif not str(key).startswith("_"):
                yield from flat_hyperparameters(item, f"{name}.{key}")
    elif isinstance(value, bool | int | float | str):
        yield name, value
    elif value is None or isinstance(value, list | tuple):
        yield name, str(value)
