"""Positions in training data that the data of a resumed run cannot restore."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.data.resumable import ResumableData
from lightning_distill.data.resumable_loader import is_position


class DataPosition(Callback):
    """Drops the position of the checkpoint's data if the data of a resumed run does not restore positions.

    The DataModules of the package restore positions, also those of each other. For others Lightning raises an error.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drop the position before Lightning restores it."""
        state = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ResumableData) or not any(is_position(each) for each in state.get("combined_loader", [])):
            return
        del state["combined_loader"]
        if trainer.state.fn == "fit":
            name = "the data" if data is None else type(data).__name__
            rank_zero_warn(
                f"{name} cannot restore the position in the checkpoint's data: it starts an epoch, and samples may repeat"
            )
