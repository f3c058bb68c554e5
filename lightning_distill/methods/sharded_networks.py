"""What a method asks and decides where its networks are spread over processes."""

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.auxiliary import AuxiliaryTraining
from lightning_distill.sharding.protocols import AuxiliaryOptimizer, Sharding
from lightning_distill.teachers.model_adapter import ModelAdapter


class ShardedNetworks(LightningModule):
    """The part of `TeacherStudentBase` that knows of strategies which spread networks over processes.

    A network that is spread needs all processes for each of its forwards, so they must call it equally often. They decide
    together by `any_process`, `first_process` and `rows_where`, which each must call as often as the others.
    """

    @property
    def sharding(self) -> Sharding | None:
        """The trainer's strategy, if it spreads networks over processes."""
        strategy = None if self._trainer is None else self._trainer.strategy
        return strategy if isinstance(strategy, Sharding) else None

    def check_strategy(self, adapter: ModelAdapter | None) -> None:
        """Refuse a strategy that does not go with the networks, before they are loaded.

        Args:
            adapter: Of the networks; None where text encoders train along.

        Raises:
            ConfigurationError: If the networks cannot be spread, or the strategy does not know how.
        """
        strategy = None if self._trainer is None else self._trainer.strategy
        if self.sharding is not None and (adapter is None or not adapter.shards):
            what = "model.train_text_encoders" if adapter is None else type(adapter).__name__
            raise ConfigurationError(f"{what} does not go with a strategy that shards networks; set trainer.strategy to ddp")
        if self.sharding is None and isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise ConfigurationError(
                f"trainer.strategy is a {type(strategy).__name__}, which derivatives and shared networks do not pass; choose "
                "fsdp2, deepspeed_stage_3 or ddp"
            )

    def check_precision(self) -> None:
        """Refuse weights in 16 bits, and scaled losses where networks train on losses of their own, which nothing scales.

        Raises:
            ConfigurationError: If that is the trainer's precision.
        """
        precision = getattr(self._trainer, "precision", None)
        if precision in ("bf16-true", "16-true"):
            raise ConfigurationError(
                f"trainer.precision is {precision}, in which small updates of weights are lost; set it to bf16-mixed, and "
                "adapter.torch_dtype to bfloat16 for what is frozen"
            )
        if (sides := self.auxiliary_networks) and precision == "16-mixed":
            raise ConfigurationError(
                f"trainer.precision is 16-mixed, which scales the student's loss alone, not that of {', '.join(sides)}; set it "
                "to bf16-mixed"
            )

    def any_process(self, flag: bool) -> bool:
        """Whether a flag is set in any of the processes that share networks; else as it is."""
        if self.sharding is None:
            return flag
        return bool(self.trainer.strategy.reduce(torch.tensor(float(flag), device=self.device), reduce_op="sum") > 0)

    def first_process(self, number: int) -> int:
        """The number of the first of the processes that share networks; else as it is."""
        return number if self.sharding is None else self.trainer.strategy.broadcast(number)

    def rows_where(self, mask: Tensor) -> tuple[Tensor, int]:
        """Rows of a batch (N,) that a network is called with, and how many of them count.

        A network cannot be asked for nothing, so it is not called where there are none; but where other processes call it, it
        is called with row 0, which does not count.
        """
        rows = mask.nonzero()[:, 0]
        if self.any_process(len(rows) > 0) and len(rows) == 0:
            return rows.new_zeros(1), 0
        return rows, len(rows)

    def auxiliary_trainings(self) -> dict[str, AuxiliaryTraining]:
        """Of networks that train on losses of their own, by their paths within this module."""
        return {}

    @property
    def auxiliary_networks(self) -> tuple[str, ...]:
        """Paths of those networks."""
        return tuple(self.auxiliary_trainings())

    def auxiliary_optimizers(self, spread: bool = True) -> dict[str, AuxiliaryOptimizer]:
        """Their optimizers, made when first asked for.

        Args:
            spread: Of those that the strategy has spread over processes, or of those that every process has whole.
        """
        if (self.sharding is not None) != spread:
            return {}
        return {
            path: training.optimizer(self.get_submodule(path), self.sharding)
            for path, training in self.auxiliary_trainings().items()
        }

    def apply_auxiliary_settings(self) -> None:
        """Put the settings of those optimizers in force where a checkpoint had others, and warn of it."""
        trainings = self.auxiliary_trainings()
        self.auxiliary_optimizers(spread=self.sharding is not None)  # which takes up what the checkpoint had
        if changes := [f"{path} {change}" for path in trainings for change in trainings[path].apply_settings()]:
            rank_zero_warn(f"training goes on with changed settings: {', '.join(changes)}")
