"""Sharded checkpoints: directories to which every process writes its shards, and from which any number of processes resumes."""

import os
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from lightning_distill.errors import ConfigurationError
from lightning_distill.optimizers import MuonWithAdamW, has_block_state
from lightning_distill.sharding.protocols import TrainedModule, local_part

METADATA = ".metadata"
"""File that marks a directory as a checkpoint of `torch.distributed.checkpoint`."""
REST = "rest.pt"
"""File of everything but weights and optimizer states, which is the same in all processes."""
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
        saved = module.saved_names() if isinstance(module, TrainedModule) else set(module.state_dict())
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        return {name: value for name, value in named if name in saved}

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
        """Save a checkpoint directory on a file system that all processes share."""
        path = Path(self.broadcast(filepath)).absolute()
        unfinished = path.with_name(f".{path.name}.unfinished")
        if self.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
            unfinished.mkdir(parents=True)
        self.barrier()
        dcp.save(self._state(), storage_writer=FileSystemWriter(unfinished, sync_files=True))
        if self.is_global_zero:
            rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
            rest[PROCESSES] = self.world_size
            with (unfinished / REST).open("wb") as file:
                torch.save(rest, file)
                file.flush()
                os.fsync(file.fileno())
            replace_checkpoint(unfinished, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> State:
        """Load a checkpoint that any number of processes saved.

        Raises:
            ConfigurationError: If it is not a sharded checkpoint, it lacks trained weights, or another number of processes
                saved block-wise optimizer states, which cannot be resharded.
        """
        path = Path(self.broadcast(checkpoint_path)).absolute()
        if self.is_global_zero:
            recover(path)
        self.barrier()
        if not (path / METADATA).is_file():
            raise ConfigurationError(
                f"ckpt_path {str(checkpoint_path)!r} is not a checkpoint of a sharded strategy; resume it with the "
                "trainer.strategy that saved it"
            )
        rest: State = torch.load(path / REST, map_location="cpu", weights_only=True)
        saved_by = rest.pop(PROCESSES, self.world_size)
        if saved_by != self.world_size and any(has_block_state(optimizer) for optimizer in self.optimizers):
            raise ConfigurationError(
                f"ckpt_path {str(checkpoint_path)!r} was saved by {saved_by} processes, and block-wise states of "
                f"model.optimizer cannot be resharded to {self.world_size}; resume it with {saved_by} processes"
            )
        reader = FileSystemReader(path)
        found = reader.read_metadata().state_dict_metadata.keys()
        names = self.saved_tensors() if self.fitting else ()
        self._snapshot = self._copies(name for name in names if f"snapshot.{name}" in found)
        state, saved = self._state(), {name.removeprefix("weights.") for name in found}
        if missing := sorted(state["weights"].keys() - saved):
            raise ConfigurationError(
                f"ckpt_path {str(checkpoint_path)!r} lacks {missing[0]!r} and {len(missing) - 1} more weights of this "
                "configuration; resume it with the model settings that it was trained with"
            )
        dcp.load(state, storage_reader=reader)
        self.restore_optimizer_states(state)
        self.refresh_weight_copies()
        return {**rest, "state_dict": {}}


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


def replace_checkpoint(unfinished: Path, path: Path) -> None:
    """Rename a finished checkpoint directory to its path, and delete the checkpoint that was there.

    A process killed between the two renames leaves the previous checkpoint beside the path, where `recover` finds it.
    """
    replaced = _replaced(path)
    shutil.rmtree(replaced, ignore_errors=True)
    if path.is_dir():
        os.replace(path, replaced)  # a rename cannot replace a directory that is not empty
    elif path.exists():
        path.unlink()
    os.replace(unfinished, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(path: Path) -> None:
    """Restore the previous checkpoint at a path if a process was killed while it replaced it."""
    if not path.exists() and _replaced(path).is_dir():
        os.replace(_replaced(path), path)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")
