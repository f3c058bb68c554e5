"""Sharded checkpoints: directories to which every process writes its shards, and from which any number of processes resumes."""

import os
import shutil
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from lightning_distill.digests import digests, find_damage, read_manifest, write_manifest
from lightning_distill.errors import ConfigurationError, StorageError, first_and_count
from lightning_distill.optimizers import MuonWithAdamW, has_block_state
from lightning_distill.outputs import sync, unfinished_path, writing
from lightning_distill.sharding.checkpoint_files import (
    METADATA,
    REST,
    check_directory,
    damaged,
    local_path,
    read_checkpoint,
    recover,
    remove,
    replaced,
)
from lightning_distill.sharding.finite import named_tensors, non_finite
from lightning_distill.sharding.protocols import local_part, saved_tensors
from lightning_distill.sharding.shard_reader import ShardReader, load_shards

PROCESSES = "processes"
"""Key in that file for the number of processes that saved the checkpoint."""

State = dict[str, Any]


class ShardedCheckpoints(ParallelStrategy):
    """Mixin of strategies that saves and restores checkpoints with `torch.distributed.checkpoint`.

    Trained weights, their EMA, optimizer states and the snapshot are saved in shards; frozen networks are not saved. A
    checkpoint is written to a temporary directory and then renamed: its path never holds an incomplete one.
    """

    _snapshot: State | None = None

    @abstractmethod
    def sharded_view(self, value: Tensor) -> Tensor:
        """A parameter or buffer as a DTensor in the same memory, or the tensor itself if it is unsharded."""

    @abstractmethod
    def optimizer_states(self) -> State:
        """States of all optimizers, with DTensors for sharded ones; loading a checkpoint overwrites them in place."""

    @abstractmethod
    def restore_optimizer_states(self, state: State) -> None:
        """Copy loaded states into the optimizers, for optimizers whose `optimizer_states` are copies."""

    @abstractmethod
    def refresh_weight_copies(self) -> None:
        """Update other copies of the weights, such as an optimizer's float32 weights, after in-place changes."""

    @property
    def fitting(self) -> bool:
        """Whether the trainer fits, including validation within it; only then there are optimizers."""
        module = self.lightning_module
        assert module is not None
        return module.trainer.state.fn == TrainerFn.FITTING

    def saved_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers that checkpoints hold, by name; a shared parameter under each of its names."""
        module = self.lightning_module
        assert module is not None
        return saved_tensors(module)

    @property
    def has_snapshot(self) -> bool:
        """Whether there is a snapshot of weights."""
        return self._snapshot is not None

    def take_snapshot(self, networks: Sequence[str]) -> None:
        """Copy this process's shards of the saved weights of some networks to the CPU.

        Args:
            networks: Paths of the networks within the trainer's module; none drops the snapshot.
        """
        prefixes = tuple(f"{path}." for path in networks)
        self._snapshot = self._copies(name for name in self.saved_tensors() if prefixes and name.startswith(prefixes))

    @torch.no_grad()
    def restore_snapshot(self) -> None:
        """Copy the weights of the snapshot back into their networks."""
        assert self._snapshot is not None
        saved = self.saved_tensors()
        for name, value in self._snapshot.items():
            local_part(self.sharded_view(saved[name])).copy_(local_part(value))
        self.refresh_weight_copies()

    def _copies(self, names: Iterable[str]) -> State | None:
        saved = self.saved_tensors()
        with torch.inference_mode(False):  # validation runs in inference mode, whose tensors cannot be used in training
            return {name: self.sharded_view(saved[name]).to("cpu", copy=True) for name in names} or None

    def _state(self) -> State:
        state = self.optimizer_states()  # first: creating a state may move the weights
        state |= {"weights": {name: self.sharded_view(value) for name, value in self.saved_tensors().items()}}
        return state if self._snapshot is None else {**state, "snapshot": self._snapshot}

    def lightning_module_state_dict(self) -> State:
        """Empty: `save_checkpoint` saves the weights in shards."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> State:
        """Empty: `save_checkpoint` saves the optimizer states in shards."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Does nothing: `load_checkpoint` has loaded the weights."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Does nothing: `load_checkpoint` has loaded the optimizer states."""

    def save_checkpoint(self, checkpoint: State, filepath: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint directory on a file system that all processes share.

        Raises:
            StorageError: In all processes, if the disk of one of them is full or fails; nothing of the checkpoint is left.
        """
        path = Path(self.broadcast(filepath)).absolute()
        target = unfinished_path(path)
        state = self._state()
        failure = (
            self._first(self._prepare(target))
            or self._write_shards(state, target)
            or self._first(self._write_rest(checkpoint, target, path))
        )
        if failure is not None:
            if self.is_global_zero:
                remove(target)
            raise StorageError(failure)

    def _prepare(self, target: Path) -> str | None:
        try:
            if self.is_global_zero:
                with writing(target):
                    remove(target)  # left by a killed process
                    target.mkdir(parents=True)
        except StorageError as error:
            return str(error)
        return None

    def _write_shards(self, state: State, target: Path) -> str | None:
        """Write this process's shards; returns, in all processes, what failed in one of them."""
        try:
            dcp.save(state, storage_writer=_ShardWriter(target, sync_files=True))
        except dcp.api.CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            if not isinstance(first, StorageError):
                raise
            return str(first)
        return None

    def _write_rest(self, checkpoint: State, target: Path, path: Path) -> str | None:
        """Write digests of the shards and what all processes share, and rename the directory to its path."""
        own = digests(target, [file.name for file in target.glob(f"__{self.global_rank}_*.distcp")])
        gathered: list[dict[str, str]] = [{} for _ in range(self.world_size)]
        torch.distributed.all_gather_object(gathered, own)
        if not self.is_global_zero:
            return None
        rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        rest[PROCESSES] = self.world_size
        try:
            with writing(path):
                with (target / REST).open("wb") as file:
                    torch.save(rest, file)
                    file.flush()
                    os.fsync(file.fileno())
                known = {name: digest for part in gathered for name, digest in part.items()}
                write_manifest(target, known | digests(target, (METADATA, REST)))
                replace_checkpoint(target, path)
        except StorageError as error:
            return str(error)
        return None

    def _first(self, found: str | None) -> str | None:
        """What the first process found that found something, in all processes."""
        gathered: list[str | None] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, found)
        return next((each for each in gathered if each is not None), None)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> State:
        """Load a checkpoint that any number of processes saved.

        Each process verifies its share of the files first.

        Raises:
            ConfigurationError: If it is not a sharded checkpoint, it is damaged, it lacks trained weights, or another number of
                processes saved block-wise optimizer states, which cannot be resharded.
        """
        given = self.broadcast(checkpoint_path)
        path = (local_path(given) or Path(str(given))).absolute()
        if self.is_global_zero:
            recover(path)
        self.barrier()
        check_directory(path)
        rest = read_checkpoint(path)
        if damage := self._first(find_damage(path, sorted(read_manifest(path))[self.global_rank :: self.world_size])):
            raise damaged(path, damage)
        saved_by = rest.pop(PROCESSES, self.world_size)
        if saved_by != self.world_size and any(has_block_state(optimizer) for optimizer in self.optimizers):
            raise ConfigurationError(
                f"ckpt_path {str(checkpoint_path)!r} was saved by {saved_by} processes, and block-wise states of "
                f"model.optimizer cannot be resharded to {self.world_size}; resume it with {saved_by} processes"
            )
        found = ShardReader(path).read_metadata().state_dict_metadata.keys()
        names = self.saved_tensors() if self.fitting else ()
        self._snapshot = self._copies(name for name in names if f"snapshot.{name}" in found)
        state, saved = self._state(), {name.removeprefix("weights.") for name in found}
        if missing := sorted(state["weights"].keys() - saved):
            raise ConfigurationError(
                f"ckpt_path {str(checkpoint_path)!r} lacks the weight {first_and_count(missing)} of this "
                "configuration; use the model settings it was trained with"
            )
        own_settings = _take_settings_without(state, found)
        load_shards(state, path)
        for group, setting, value in own_settings:
            group[setting] = value
        broken = non_finite(dict(named_tensors(state)), infinite=True)
        if name := self._first(broken[0] if broken else None):
            raise damaged(path, f"{name!r} is NaN")
        self.restore_optimizer_states(state)
        self.refresh_weight_copies()
        return {**rest, "state_dict": {}}


class _ShardWriter(FileSystemWriter):
    """Raises `StorageError` where the error occurs: the others get it without its cause."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        with writing(Path(self.path)):
            return super().write_data(*args, **kwargs)

    def finish(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(self.path)):
            super().finish(*args, **kwargs)


def _take_settings_without(state: State, found: Collection[str]) -> list[tuple[State, str, Any]]:
    """Take the settings of parameter groups that a checkpoint lacks out of a state, such as the base rate of an added schedule.

    Args:
        state: Nested state of the optimizers.
        found: Dotted names in the checkpoint.

    Returns:
        Group, name and value of each.
    """
    taken = []
    for key, optimizer in state.items():
        for kind in ("param_groups", "groups"):
            for i, group in enumerate(optimizer.get(kind, ())):
                path = f"{key}.{kind}.{i}"
                if path in found:  # saved as one value
                    continue
                lacking = [name for name in group if not any(f"{each}.".startswith(f"{path}.{name}.") for each in found)]
                taken += [(group, name, group.pop(name)) for name in lacking]
    return taken


def check_elementwise_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    """Check that an optimizer does not need unsharded matrices, which no process has.

    Raises:
        ConfigurationError: If it is Muon.
    """
    if isinstance(optimizer, MuonWithAdamW | torch.optim.Muon):
        raise ConfigurationError(
            f"model.optimizer is {type(optimizer).__name__}, which needs unsharded matrices, and trainer.strategy shards "
            "them; set model.optimizer to torch.optim.AdamW, or trainer.strategy to ddp"
        )


def replace_checkpoint(finished: Path, path: Path) -> None:
    """Rename a finished checkpoint directory to its path, and delete the checkpoint that was there.

    A process killed between the two renames leaves the previous checkpoint beside the path, where `recover` finds it.
    """
    previous = replaced(path)
    shutil.rmtree(previous, ignore_errors=True)
    if path.is_dir():
        os.replace(path, previous)  # a rename cannot replace a directory that is not empty
    elif path.exists():
        path.unlink()
    os.replace(finished, path)
    sync(path.parent)
    shutil.rmtree(previous, ignore_errors=True)
