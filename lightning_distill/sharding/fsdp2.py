"""FSDP2, under which derivatives and few-step students train."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_distill.sharding.base_weights import share_base_weights
from lightning_distill.sharding.blocks import blocks, named_blocks, units
from lightning_distill.sharding.checkpoint import ShardedCheckpoints, State, check_elementwise_optimizer
from lightning_distill.sharding.protocols import (
    AuxiliaryOptimizer,
    auxiliary_optimizers,
    clip_finite,
    retie_parameters,
    tied_parameters,
)
from lightning_distill.sharding.stored_weights import StoredWeights


class FSDP2Strategy(ShardedCheckpoints, ModelParallelStrategy):
    """Fully sharded data parallelism by `torch.distributed.fsdp.fully_shard`, a transformer block a unit, or an expert.

    Each process reads its own rows of a pipeline's weights. The frozen teacher, the critic, the average and the blocks of the
    text encoders are sharded like the student; the autoencoder is not. Networks with LoRA gather the teacher's weights.

    Args:
        offload: Whether parameters, gradients and the optimizer's state stay in the memory of the CPU.
        **kwargs: Of `ModelParallelStrategy`, but for its sizes: all processes share the weights.
    """

    def __init__(self, offload: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.offload = offload
        self._mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        """Start the processes' group, all of them data parallel."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        # By this name peft tells weights that are gathered from those that layers compute with a part of.
        self._mesh = init_device_mesh(self.root_device.type, (self.world_size,), mesh_dim_names=("fsdp",))
        register_hook_jvp()

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizers."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            check_elementwise_optimizer(optimizer)

    def shard(self, network: nn.Module, weights: StoredWeights | None = None) -> None:
        """Spread a network over the processes, by blocks and experts; each reads the rows that it keeps."""
        self._make_equal(parameter for parameter in network.parameters() if not parameter.is_meta)
        for unit in units(network):
            self._shard(unit)
        self._shard(network)
        home = torch.device("cpu") if self.offload else self.root_device
        missing = [name for name, parameter in network.named_parameters() if parameter.is_meta]
        network._apply(lambda x: torch.empty_like(x, device=home) if x.is_meta else x.to(home))
        parameters = dict(network.named_parameters())
        for name in missing:
            assert weights is not None, "a network on the meta device comes with its weights"
            _read_rows(parameters[name], weights, name)

    def shard_on_base(self, network: nn.Module, base: nn.Module) -> None:
        """Spread what is a network's own, by blocks; it gathers the rest from where it is spread as the base's."""
        lent: set[nn.Parameter] = set(base.parameters())
        self._make_equal(parameter for parameter in network.parameters() if parameter not in lent)
        found = named_blocks(network)
        share_base_weights(network, base, found)
        for module in (*found.values(), network):
            self._shard(module, lent)

    def shard_encoder(self, encoder: nn.Module, weights: StoredWeights) -> None:
        """Spread a text encoder's blocks, of which each process reads its rows; the rest of it stays whole."""
        shared = tied_parameters(encoder)
        for block in blocks(encoder):
            self._shard(block)

        def place(x: Tensor) -> Tensor:
            home = torch.device("cpu") if self.offload and isinstance(x, DTensor) else self.root_device
            return torch.empty_like(x, device=home) if x.is_meta else x.to(home)

        encoder._apply(place)
        retie_parameters(shared)
        for name, parameter in encoder.named_parameters():
            _read_rows(parameter, weights, name)

    def gather(self, network: nn.Module) -> dict[str, Tensor]:
        """Whole parameters by name, on the CPU of the first process."""
        found = {}
        for name, parameter in network.named_parameters():
            whole = parameter.detach().to(self.root_device)
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            if self.is_global_zero:
                found[name] = whole.to("cpu", copy=True)
        return found

    def auxiliary_optimizer(self, network: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> AuxiliaryOptimizer:
        """Train a sharded network by its own backward pass."""
        return _Side(optimizer, clip)

    # Checkpoints

    def spread(self, value: Tensor) -> Tensor:
        """A DTensor, or what every process has a whole of."""
        return value.detach()

    def follow_weights(self) -> None:
        """Nothing: there is no other copy."""

    def optimizer_states(self) -> State:
        """As DTensors."""
        return {place: get_optimizer_state_dict(*parts) for place, parts in self._training_parts().items()}

    def restore_optimizer_states(self, state: State) -> None:
        """Put them back."""
        for place, parts in self._training_parts().items():
            set_optimizer_state_dict(*parts, optim_state_dict=state[place])

    def _training_parts(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        module = self.lightning_module
        assert module is not None
        if not self.fits:
            return {}
        return {
            **{f"optimizer_{i}": (module, optimizer) for i, optimizer in enumerate(self.optimizers)},
            **{f"auxiliary_{path}": (module, each.optimizer) for path, each in auxiliary_optimizers(module).items()},
        }

    def _make_equal(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(self.root_device)
            torch.distributed.broadcast(parameter.data, 0)

    def _shard(self, module: nn.Module, ignored: set[nn.Parameter] | None = None) -> FSDPModule:
        policy = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda") if self.offload else OffloadPolicy()
        return fully_shard(module, mesh=self._mesh, reshard_after_forward=True, offload_policy=policy, ignored_params=ignored)


class _Side:
    def __init__(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        self.optimizer = optimizer
        self._clip = clip

    def step(self, loss: Tensor) -> None:
        loss.backward()
        clip_finite([p for group in self.optimizer.param_groups for p in group["params"]], self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _read_rows(parameter: nn.Parameter, weights: StoredWeights, name: str) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(weights.read(name))
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if shape[0]:
        parameter.to_local().copy_(weights.read(name, offset[0], offset[0] + shape[0]))


def register_hook_jvp() -> None:
    """Let the hook that starts a backward pass hand derivatives on: it is the identity.

    Earlier versions of torch have no rule; torch 2.13 has one that returns its inputs, where forward mode wants views of them.
    """

    def jvp(ctx: Any, group: Any, *tangents: Any) -> Any:
        return tuple(None if tangent is None else tangent.view_as(tangent) for tangent in tangents)

    setattr(RegisterPostBackwardFunction, "jvp", staticmethod(jvp))  # noqa: B010  # a type checker knows torch's own
