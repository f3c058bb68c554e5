"""Checkpoints of sharded runs: a directory to which every process writes its part, and from which any number resumes."""

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
"""File by which a directory of torch's distributed checkpoints is known."""
REST = "rest.pt"
"""What is neither a weight nor an optimizer's state, the same in all processes."""

PROCESSES = "processes"
"""Key in it of the number of processes that have saved."""

State = dict[str, Any]


class ShardedCheckpoints(ParallelStrategy):
    """The part of a strategy that saves and restores by `torch.distributed.checkpoint`.

    Weights that train, their average, the optimizers' states and weights that were kept are saved as they are spread; frozen
    networks never are. A checkpoint is written beside its place and renamed: it is whole or not there.
    """

    _snapshot: State | None = None

    @abstractmethod
    def spread(self, value: Tensor) -> Tensor:
        """A parameter or a buffer as a tensor that knows which part of it this process has, in the same memory."""

    @abstractmethod
    def optimizer_states(self) -> State:
        """Optimizers' states, as tensors that know how they are spread, which loading overwrites."""

    @abstractmethod
    def restore_optimizer_states(self, state: State) -> None:
        """Put loaded states to their places, where loading has not done so already."""

    @abstractmethod
    def follow_weights(self) -> None:
        """Carry weights that were changed in place to whatever else holds them."""

    @property
    def fits(self) -> bool:
        """Whether there are optimizers, also while a validation within the training runs."""
        module = self.lightning_module
        assert module is not None
        return module.trainer.state.fn == TrainerFn.FITTING

    def saved_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the module, but for those that are never saved, under whatever name."""
        module = self.lightning_module
        assert module is not None
        kept = module.saved_names() if isinstance(module, TrainedModule) else set(module.state_dict())
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        return {name: value for name, value in named if name in kept}

    @property
    def has_snapshot(self) -> bool:
        """Whether there is a snapshot of weights."""
        return self._snapshot is not None

    def take_snapshot(self, networks: Sequence[str]) -> None:
        """Copy the saved weights of the networks at these paths, this process's parts, to the CPU; none drops the snapshot."""
        prefixes = tuple(f"{path}." for path in networks)
        self._snapshot = self._copies(name for name in self.saved_tensors() if prefixes and name.startswith(prefixes))

    @torch.no_grad()
    def restore_snapshot(self) -> None:
        """Give the weights that were kept back to their networks."""
        assert self._snapshot is not None
        saved = self.saved_tensors()
        for name, value in self._snapshot.items():
            local_part(self.spread(saved[name])).copy_(local_part(value))
        self.follow_weights()

    def _copies(self, names: Iterable[str]) -> State | None:
        saved = self.saved_tensors()
        with torch.inference_mode(False):  # validation runs in inference mode, whose tensors cannot be used in training
            return {name: self.spread(saved[name]).to("cpu", copy=True) for name in names} or None

    def _state(self) -> State:
        state = self.optimizer_states()  # first: to make one may move the weights
        state |= {"weights": {name: self.spread(value) for name, value in self.saved_tensors().items()}}
        return state if self._snapshot is None else {**state, "snapshot": self._snapshot}

    def lightning_module_state_dict(self) -> State:
        """Nothing: weights are not part of the dictionary that Lightning makes of a run's state."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> State:
        """Nothing, likewise."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has done it."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing, likewise."""

    def save_checkpoint(self, checkpoint: State, filepath: str | Path, storage_options: Any | None = None) -> None:
        """Save a directory, which all processes can reach."""
        path = Path(self.broadcast(filepath)).absolute()
        unfinished = path.with_name(f".{path.name}.unfinished")
        if self.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
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
            _put_in_place(unfinished, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> State:
        """Restore what any number of processes has saved.

        Raises:
            ConfigurationError: If it is not a sharded checkpoint, or lacks a part of what is trained.
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
                f"the checkpoint was saved by {saved_by} processes, and its optimizer kept blocks of their parts, which "
                f"{self.world_size} cannot take over; resume it with as many"
            )
        reader = FileSystemReader(path)
        found = reader.read_metadata().state_dict_metadata.keys()
        names = self.saved_tensors() if self.fits else ()
        self._snapshot = self._copies(name for name in names if f"snapshot.{name}" in found)
        state, saved = self._state(), {name.removeprefix("weights.") for name in found}
        if missing := sorted(state["weights"].keys() - saved):
            raise ConfigurationError(
                f"the checkpoint lacks {missing[0]!r} and {len(missing) - 1} more weights of this configuration; "
                "resume with the model settings it was trained with"
            )
        dcp.load(state, storage_reader=reader)
        self.restore_optimizer_states(state)
        self.follow_weights()
        return {**rest, "state_dict": {}}


def check_elementwise_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    """Raise `ConfigurationError` for an optimizer that looks at whole matrices, which no process has."""
    if isinstance(optimizer, MuonWithAdamW | torch.optim.Muon):
        raise ConfigurationError(
            f"model.optimizer is {type(optimizer).__name__}, which needs whole matrices, and the strategy has spread them over "
            "processes; choose torch.optim.AdamW, or trainer.strategy ddp"
        )


def _put_in_place(unfinished: Path, path: Path) -> None:
    replaced = _replaced(path)
    shutil.rmtree(replaced, ignore_errors=True)
    if path.is_dir():
        os.replace(path, replaced)  # a directory that is not empty cannot be replaced in one go
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
    """Take the checkpoint back that a process was about to replace when it was killed."""
    if not path.exists() and _replaced(path).is_dir():
        os.replace(_replaced(path), path)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")
