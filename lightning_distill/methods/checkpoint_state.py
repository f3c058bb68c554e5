"""What a method's checkpoints hold, and how a run takes it up again."""

from collections.abc import Iterable
from typing import Any, ClassVar

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.sharded_networks import ShardedNetworks
from lightning_distill.optimizers import packed, unpacked
from lightning_distill.sharding.shared_weights import shared_names


class SavedState(ShardedNetworks):
    """The part of `TeacherStudentBase` that knows of checkpoints: they hold what trains, and never the teacher."""

    frozen_prefixes: ClassVar[tuple[str, ...]] = ("teacher.", "adapter.", "metrics.")
    """Modules that are never saved."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen parts out, add the optimizers that the trainer does not know, and take blocks of state apart."""
        names = self._saved_names(checkpoint["state_dict"])
        checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in names}
        checkpoint["optimizer_states"] = packed(checkpoint.get("optimizer_states", []))
        whole = self.auxiliary_optimizers(spread=False)
        checkpoint["auxiliary_optimizers"] = packed({path: side.optimizer.state_dict() for path, side in whole.items()})

    def _saved_names(self, state: Iterable[str]) -> list[str]:
        shared = shared_names(self, getattr(self, "teacher", None))
        return [name for name in state if not name.startswith(self.frozen_prefixes) and name not in shared]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another student; loading is not strict, since frozen parts are left out."""
        trainings = self.auxiliary_trainings()
        for path, state in unpacked(checkpoint["auxiliary_optimizers"]).items():
            if path in trainings:  # else the run goes on without what it trained
                trainings[path].load_state_dict(state)
        if self.sharding is not None:  # its strategy has looked
            return
        checkpoint["optimizer_states"] = unpacked(checkpoint.get("optimizer_states", []))
        expected, found = set(self._saved_names(self.state_dict())), checkpoint["state_dict"].keys()
        if surplus := sorted(name for name in found - expected if name.startswith(("student.", "networks."))):
            raise ConfigurationError(
                f"the checkpoint has {surplus[0]!r} and {len(surplus) - 1} more weights that this configuration has not; "
                "resume with the model settings it was trained with"
            )
        if missing := sorted(expected - found):
            raise ConfigurationError(
                f"the checkpoint lacks {missing[0]!r} and {len(missing) - 1} more weights of this configuration; "
                "resume with the model settings it was trained with"
            )
