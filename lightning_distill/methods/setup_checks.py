"""Checks of a run's settings before anything large is loaded."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.encoder import BatchEncoder
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.optimizers import split_parameters
from lightning_distill.sharding.protocols import Sharding
from lightning_distill.teachers.model_adapter import ModelAdapter


def check_optimizer(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
    """Build the optimizer and its scheduler on two small parameters: their own errors would come after loading.

    Raises:
        ConfigurationError: If one of them does not accept its settings.
    """
    parameters = {"blocks.weight": nn.Parameter(torch.zeros(2, 2)), "bias": nn.Parameter(torch.zeros(2))}
    setting = "model.optimizer"
    try:
        built = optimizer(split_parameters(parameters.items()))
        setting = "model.lr_scheduler"
        if lr_scheduler is not None and isinstance(lr_scheduler(built), ReduceLROnPlateau):
            raise ConfigurationError(
                "model.lr_scheduler is ReduceLROnPlateau, which needs a monitored metric at each step; choose a schedule of "
                "steps, such as WarmupCosine"
            )
    except ConfigurationError:
        raise
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{setting} does not accept its settings ({reason}); correct its init_args") from error


def check_strategy(method: str, strategy: Any, encoder: BatchEncoder, feature_readers: tuple[str, ...]) -> None:
    """Check that the trainer's strategy supports the networks of a method.

    Args:
        method: Class name of the method.
        strategy: The trainer's strategy, or None without a trainer.
        encoder: The encoder of its batches.
        feature_readers: Paths of the auxiliary networks that read features of other networks.

    Raises:
        ConfigurationError: If the networks cannot be sharded, or the strategy supports no forward-mode derivatives.
    """
    check_strategy_class(strategy)
    if not isinstance(strategy, Sharding):
        return
    if encoder.trains_text_encoders or not encoder.adapter.supports_sharding:
        what = "model.train_text_encoders" if encoder.trains_text_encoders else type(encoder.adapter).__name__
        raise ConfigurationError(f"{what} does not support a strategy that shards networks; set trainer.strategy to ddp")
    if feature_readers:
        raise ConfigurationError(
            f"trainer.strategy is a {type(strategy).__name__}, which shards networks, and the discriminator of {method} "
            f"({', '.join(feature_readers)}) needs unsharded features; set trainer.strategy to auto or ddp, or choose settings "
            "without a discriminator (model.gan null)"
        )


def check_strategy_class(strategy: Any) -> None:
    """Check that a strategy is none of Lightning's own that shard networks.

    Raises:
        ConfigurationError: If it is one of them.
    """
    if not isinstance(strategy, Sharding) and isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        name, config = type(strategy).__name__, getattr(strategy, "config", None)
        if isinstance(config, dict) and (stage := config.get("zero_optimization", {}).get("stage")) is not None:
            name = f"{name} (deepspeed_stage_{stage})"
        raise ConfigurationError(
            f"trainer.strategy is a {name}, which supports neither forward-mode derivatives nor shared weights; choose fsdp2, "
            "deepspeed_stage_3 or ddp"
        )


def check_image_sizes(adapter: ModelAdapter, validation: ValidationOptions, data: Any) -> None:
    """Check that the teacher's family supports the image sizes of the settings.

    Args:
        adapter: Teacher family.
        validation: Settings of validation.
        data: DataModule of the trainer, or None. It may have `image_sizes`, sizes (height, width) by the names of settings.

    Raises:
        ConfigurationError: If it does not support a size.
    """
    validated = {"validation.height and validation.width": [(validation.height, validation.width)]}
    for settings, sizes in {**validated, **getattr(data, "image_sizes", {})}.items():
        for height, width in sizes:
            try:
                adapter.check_image_size(height, width)
            except ConfigurationError as error:
                raise ConfigurationError(f"{settings} do not fit the model: {error}") from error


def check_precision(precision: Any, auxiliary_paths: tuple[str, ...]) -> None:
    """Check that the trainer's precision keeps small updates, and that every loss is scaled if one is.

    Args:
        precision: The trainer's precision, or None without a trainer.
        auxiliary_paths: Paths of the auxiliary networks.

    Raises:
        ConfigurationError: If the weights are in 16 bits, or a gradient scaler meets auxiliary networks.
    """
    if precision in ("bf16-true", "16-true"):
        raise ConfigurationError(
            f"trainer.precision is {precision}, which rounds small updates of weights away; set it to bf16-mixed, and "
            "adapter.torch_dtype to bfloat16 for the frozen networks"
        )
    if auxiliary_paths and precision == "16-mixed":
        raise ConfigurationError(
            f"trainer.precision is 16-mixed, which scales the student's loss but not that of {', '.join(auxiliary_paths)}; "
            "set it to bf16-mixed"
        )
