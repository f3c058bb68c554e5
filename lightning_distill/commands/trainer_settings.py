"""Checks of the trainer's settings and the seed, before anything is built."""

import math
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.strategies import STRATEGIES
from lightning_distill.suggestions import suggestion

SMALLEST: Mapping[str, int] = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 1,
    "max_epochs": -1,
    "max_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
    "fast_dev_run": 0,
}
"""Smallest value of each setting that counts something; -1 is no limit."""
SHARES = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
"""Settings that are a number of batches, or a share of them."""
LOGGER_PACKAGES: Mapping[str, tuple[str, str]] = {
    "CometLogger": ("comet_ml", "comet-ml"),
    "LitLogger": ("litlogger", "litlogger"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "NeptuneLogger": ("neptune", "neptune"),
    "WandbLogger": ("wandb", "wandb"),
}
"""Module and package of Lightning's loggers."""
LARGEST_SEED = 2**32 - 1


def check_seed(seed: Any) -> None:
    """Check the seed of all random generators.

    Raises:
        ConfigurationError: If it is outside NumPy's range.
    """
    if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed <= LARGEST_SEED:
        raise ConfigurationError(f"seed_everything is {seed}; set it to an integer from 0 to {LARGEST_SEED}")


def check_trainer_settings(settings: Mapping[str, Any]) -> None:
    """Check the settings that `Trainer` accepts and fails on later, or reports by its own argument names.

    Args:
        settings: Settings of the trainer as plain values.

    Raises:
        ConfigurationError: If a number is out of its range, a name is unknown, or a logger's package is missing.
    """
    for name, smallest in SMALLEST.items():
        value = settings.get(name)
        if value is not None and value < smallest:
            no_limit = ", -1 is no limit" if smallest == -1 else ""
            raise ConfigurationError(f"trainer.{name} is {value}; set it to an integer of at least {smallest}{no_limit}")
    clip = settings.get("gradient_clip_val")
    if clip is not None and not 0 <= clip < math.inf:
        raise ConfigurationError(
            f"trainer.gradient_clip_val is {clip}; set it to a finite norm of at least 0, or to null for no clipping"
        )
    if (algorithm := settings.get("gradient_clip_algorithm")) not in (None, "norm", "value"):
        raise ConfigurationError(f"trainer.gradient_clip_algorithm is {algorithm!r}; set it to norm or value")
    for name in SHARES:
        _check_share(name, settings.get(name))
    interval = settings.get("val_check_interval")
    if isinstance(interval, int | float) and (interval == 0 or not _is_share(interval)):
        raise ConfigurationError(
            f"trainer.val_check_interval is {interval}; set it to at least 1 step, or set trainer.limit_val_batches to 0"
        )
    if isinstance(interval, float) and settings.get("check_val_every_n_epoch", 1) is None:
        raise ConfigurationError(
            f"trainer.val_check_interval is {interval}, a share of an epoch, and trainer.check_val_every_n_epoch is null; set "
            "trainer.val_check_interval to a number of steps, or trainer.check_val_every_n_epoch to 1"
        )
    duration = settings.get("max_time")
    if isinstance(duration, str) and not re.fullmatch(r"\d+(:\d\d){3}", duration.strip()):
        raise ConfigurationError(f"trainer.max_time is {duration!r}; write it as DD:HH:MM:SS, such as 00:12:00:00")
    _check_places(settings)
    for logger in _loggers(settings.get("logger")):
        module, package = LOGGER_PACKAGES.get(logger, ("", ""))
        if module and find_spec(module) is None:
            raise ConfigurationError(
                f"trainer.logger is {logger}, which needs the package {package}; run `pip install {package}`, or choose "
                "TensorBoardLogger or CSVLogger"
            )


def _check_places(settings: Mapping[str, Any]) -> None:
    """Check the names of accelerator and strategy, and the devices."""
    accelerator, strategy, devices = (settings.get(name) for name in ("accelerator", "strategy", "devices"))
    known = {"auto", "gpu", *AcceleratorRegistry.available_accelerators()}
    if isinstance(accelerator, str) and accelerator not in known:
        raise ConfigurationError(
            f"trainer.accelerator is {accelerator!r}, which does not exist; {suggestion(accelerator, known)}"
        )
    known = {"auto", *StrategyRegistry.available_strategies()}
    if isinstance(strategy, str) and strategy not in known:
        raise ConfigurationError(
            f"trainer.strategy is {strategy!r}, which does not exist; {suggestion(strategy, known, STRATEGIES)}"
        )
    if devices is None or (isinstance(devices, str) and devices == "auto"):
        return
    try:
        numbers = [
            int(each) for each in (devices if isinstance(devices, list) else str(devices).split(",")) if str(each).strip()
        ]
    except ValueError:
        numbers = []
    is_count = isinstance(devices, int) or (isinstance(devices, str) and "," not in devices)
    valid = bool(numbers) and (numbers[0] >= 1 or numbers[0] == -1 if is_count else min(numbers) >= 0)
    if not valid:
        raise ConfigurationError(
            f"trainer.devices is {devices!r}; set it to a number of at least 1, a list of GPU indices, -1 for all GPUs, or auto"
        )
    if accelerator == "cpu" and (not is_count or numbers[0] < 1):
        raise ConfigurationError(f"trainer.devices is {devices!r}; on a CPU, set it to a number of processes of at least 1")


def _check_share(name: str, value: Any) -> None:
    if value is not None and not _is_share(value):
        raise ConfigurationError(f"trainer.{name} is {value}; set it to a number of batches, or to a share between 0.0 and 1.0")


def _is_share(value: float) -> bool:
    return value >= 0 if isinstance(value, int) else 0 <= value <= 1


def _loggers(value: Any) -> Iterator[str]:
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict) and "class_path" in each:
            yield each["class_path"].rpartition(".")[2]
