"""Strategy for FSDP2, with forward-mode derivatives and shared base weights."""

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
    """Fully sharded data parallelism by `torch.distributed.fsdp.fully_shard`, in units of transformer blocks and experts.

    Each process reads only its rows of a pipeline's weights. The frozen teacher, the critic, the EMA and the blocks of the text
    encoders are sharded like the student; the autoencoder is not. LoRA networks gather their base weights from the teacher.

    Args:
        offload: Whether parameters, gradients and optimizer states stay in CPU memory between uses.
        **kwargs: Arguments of `ModelParallelStrategy` except its parallel sizes, since weights are sharded over all processes.
    """

    def __init__(self, offload: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.offload = offload
        self._mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        """Initialize the process group, with all processes data parallel."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        # By the name "fsdp" peft recognizes weights that are gathered before use, unlike those of tensor parallelism.
        self._mesh = init_device_mesh(self.root_device.type, (self.world_size,), mesh_dim_names=("fsdp",))
        register_hook_jvp()

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Create the optimizers.

        Raises:
            ConfigurationError: If an optimizer needs unsharded matrices.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            check_elementwise_optimizer(optimizer)

    def shard(self, network: nn.Module, weights: StoredWeights | None = None) -> None:
        """Shard a network in units of blocks and experts; each process reads only its rows."""
        self._broadcast(parameter for parameter in network.parameters() if not parameter.is_meta)
        for unit in units(network):
            self._shard(unit)
        self._shard(network)
        device = torch.device("cpu") if self.offload else self.root_device
        missing = [name for name, parameter in network.named_parameters() if parameter.is_meta]
        network._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
        parameters = dict(network.named_parameters())
        for name in missing:
            assert weights is not None, "a network on the meta device comes with its weights"
            _read_rows(parameters[name], weights, name)

    def shard_on_base(self, network: nn.Module, base: nn.Module) -> None:
        """Shard the weights that a network does not share, in units of blocks; it gathers the base's shards of the others."""
        shared: set[nn.Parameter] = set(base.parameters())
        self._broadcast(parameter for parameter in network.parameters() if parameter not in shared)
        network_blocks = named_blocks(network)
        share_base_weights(network, base, network_blocks)
        for module in (*network_blocks.values(), network):
            self._shard(module, shared)

    def shard_encoder(self, encoder: nn.Module, weights: StoredWeights) -> None:
        """Shard the blocks of a text encoder; its other weights stay unsharded."""
        tied = tied_parameters(encoder)
        for block in blocks(encoder):
            self._shard(block)

        def place(x: Tensor) -> Tensor:
            device = torch.device("cpu") if self.offload and isinstance(x, DTensor) else self.root_device
            return torch.empty_like(x, device=device) if x.is_meta else x.to(device)

        encoder._apply(place)
        retie_parameters(tied)
        for name, parameter in encoder.named_parameters():
            _read_rows(parameter, weights, name)

    def gather(self, network: nn.Module) -> dict[str, Tensor]:
        """The unsharded parameters by name, on the CPU of the first process; empty on the others."""
        found = {}
        for name, parameter in network.named_parameters():
            value = parameter.detach().to(self.root_device)
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if self.is_global_zero:
                found[name] = value.to("cpu", copy=True)
        return found

    def auxiliary_optimizer(self, network: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> AuxiliaryOptimizer:
        """An optimizer that runs a backward pass of its own for a sharded network."""
        return _AuxiliaryOptimizer(optimizer, clip)

    # Checkpoints

    def sharded_view(self, value: Tensor) -> Tensor:
        """The detached value: a DTensor, or an unsharded tensor."""
        return value.detach()

    def refresh_weight_copies(self) -> None:
        """Does nothing: there are no other copies."""

    def optimizer_states(self) -> State:
        """States of all optimizers by key, with DTensors."""
        return {key: get_optimizer_state_dict(*training) for key, training in self._trainings().items()}

    def restore_optimizer_states(self, state: State) -> None:
        """Load the states into the optimizers."""
        for key, training in self._trainings().items():
            set_optimizer_state_dict(*training, optim_state_dict=state[key])

    def _trainings(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        module = self.lightning_module
        assert module is not None
        if not self.fitting:
            return {}
        return {
            **{f"optimizer_{i}": (module, optimizer) for i, optimizer in enumerate(self.optimizers)},
            **{f"auxiliary_{path}": (module, each.optimizer) for path, each in auxiliary_optimizers(module).items()},
        }

    def _broadcast(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the values of the first process to all processes."""
        for parameter in parameters:
            parameter.data = parameter.data.to(self.root_device)
            torch.distributed.broadcast(parameter.data, 0)

    def _shard(self, module: nn.Module, ignored: set[nn.Parameter] | None = None) -> FSDPModule:
        policy = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda") if self.offload else OffloadPolicy()
        return fully_shard(module, mesh=self._mesh, reshard_after_forward=True, offload_policy=policy, ignored_params=ignored)


class _AuxiliaryOptimizer:
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
    """Register a forward-mode rule for FSDP2's post-backward hook, which is the identity.

    Earlier versions of torch have no rule. That of torch 2.13 returns its inputs, where forward mode needs views of them.
    """

    def jvp(ctx: Any, group: Any, *tangents: Any) -> Any:
        return tuple(None if tangent is None else tangent.view_as(tangent) for tangent in tangents)

    setattr(RegisterPostBackwardFunction, "jvp", staticmethod(jvp))  # noqa: B010  # assigning it is a type error
