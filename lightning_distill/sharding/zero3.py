"""Strategy for DeepSpeed ZeRO-3, with forward-mode derivatives, on GPUs and, for trials, on CPUs."""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lightning_distill.errors import ConfigurationError
from lightning_distill.optimizers import has_block_state
from lightning_distill.sharding.checkpoint import ShardedCheckpoints, State, check_elementwise_optimizer
from lightning_distill.sharding.protocols import (
    AuxiliaryOptimizer,
    auxiliary_error,
    auxiliary_optimizers,
    auxiliary_paths,
    drop_gathered,
    local_part,
    retie_parameters,
    tied_parameters,
)
from lightning_distill.sharding.stored_weights import StoredWeights

DEFAULT_BUCKET_SIZE = 500_000_000
"""Default number of elements in the gradient reduction buffer, as in DeepSpeed."""


class ZeRO3Precision(DeepSpeedPrecision):
    """Mixed precision as under other strategies: float32 weights, with autocast to a lower precision.

    DeepSpeed's precision plugin would also store time embeddings in 16 bits, which is too coarse for derivatives in time.

    Args:
        device: Type of the device.
        dtype: Autocast dtype; None is no autocast.
    """

    def __init__(self, device: str, dtype: torch.dtype | None) -> None:
        super().__init__("32-true")
        self._device = device
        self._dtype = dtype

    def forward_context(self) -> Any:
        """The autocast context, if there is a dtype."""
        if self._dtype is None:
            return nullcontext()
        # Its cache would hold all weights, unsharded in 16 bits, until the end of the forward pass.
        return torch.autocast(self._device, dtype=self._dtype, cache_enabled=False)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module unchanged, as under other strategies: the adapter sets the dtype of frozen networks."""
        return module

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Backward pass without scaling: Lightning has already divided the loss by the number of accumulated batches."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class ZeRO3Strategy(ShardedCheckpoints, DeepSpeedStrategy):
    """DeepSpeed with ZeRO stage 3: weights, gradients and optimizer states are sharded over the processes.

    Networks are read and sharded one module at a time: the student, the frozen teacher, the critic, the EMA and the text
    encoders. The autoencoder is sharded after it has been loaded. DeepSpeed clips gradients to `trainer.gradient_clip_val`.

    Args:
        stage: Stage of ZeRO, which is 3.
        **kwargs: Further arguments of `DeepSpeedStrategy`, such as `offload_optimizer`, `offload_parameters` and `timeout`.

    Raises:
        ConfigurationError: If deepspeed is not installed, or another stage is set.
    """

    def __init__(self, stage: int = 3, **kwargs: Any) -> None:
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                "trainer.strategy is deepspeed_stage_3, and deepspeed is not installed; install "
                "lightning-distill[deepspeed], or set trainer.strategy to fsdp2"
            ) from error
        super().__init__(stage=stage, **kwargs)
        config = self.settings
        if not self.zero_stage_3:
            raise ConfigurationError(
                "ZeRO3Strategy supports stage 3 of DeepSpeed only; leave stage and the stage in config at 3"
            )
        zero = config.setdefault("zero_optimization", {})
        # DeepSpeed's memory-efficient linear has no forward-mode rule, and it replaces torch's in the entire process.
        zero.setdefault("memory_efficient_linear", False)
        # A joint all-gather holds its weights twice, in its buffer and in the parameters: all weights of a text encoder.
        zero.setdefault("stage3_allgather_sequential", True)
        self.bucket = int(zero.get("reduce_bucket_size", DEFAULT_BUCKET_SIZE))
        # DeepSpeed uses the configured optimizer, also with its state in CPU memory.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
        self._engines: list[Any] = []
        self._meshes: dict[str, DeviceMesh] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        assert isinstance(self.config, dict)
        return self.config

    # Processes and precision

    @property
    def on_cpu(self) -> bool:
        """Whether training runs on the CPU, for which Lightning's strategy raises an error."""
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    def root_device(self) -> torch.device:
        """Device of this process."""
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    def setup_environment(self) -> None:
        """Check the precision, and initialize the process group.

        Raises:
            ConfigurationError: If the precision is neither float32 nor mixed bfloat16.
        """
        precision = self.precision_plugin.precision
        if precision not in ("32-true", "bf16-mixed"):
            raise ConfigurationError(
                f"trainer.precision is {precision}, which trainer.strategy deepspeed_stage_3 does not support; set "
                "trainer.precision to bf16-mixed or 32-true"
            )
        self.precision_plugin = ZeRO3Precision(self.root_device.type, torch.bfloat16 if precision == "bf16-mixed" else None)
        if not self.on_cpu:
            super().setup_environment()
            return
        import deepspeed

        # This operator would be compiled at the first start; gloo replaces it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Initialize the process group."""
        if not self.on_cpu:
            super().setup_distributed()
            return
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Does not shard networks at construction: `shard` does so when they have their weights."""
        self._init_config_if_needed()
        yield

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        check_no_block_state(optimizer)
        check_elementwise_optimizer(optimizer)
        if optimizer is not None:
            self._bound_bucket(self.settings, optimizer)
        with _detached(model, auxiliary_paths(model)):
            result = super()._setup_model_and_optimizer(model, optimizer, *args, **kwargs)
        register_hook_jvp(model)
        return result

    def _bound_bucket(self, config: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Bound the gradient reduction buffer, which is allocated at its full size, by the size of all gradients."""
        trained = sum(getattr(p, "ds_numel", p.numel()) for group in optimizer.param_groups for p in group["params"])
        config["zero_optimization"]["reduce_bucket_size"] = min(self.bucket, trained)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        with _detached(model, auxiliary_paths(model)):
            super()._initialize_deepspeed_inference(model)
        register_hook_jvp(model)

    # Networks

    def shard(self, network: nn.Module, weights: StoredWeights | None = None) -> None:
        """Read and shard a network, one module at a time."""
        from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param

        for path, module in network.named_modules():
            own = nn.Module()
            for key, parameter in list(module.named_parameters(recurse=False)):
                if is_zero_param(parameter):
                    continue
                if parameter.is_meta:
                    assert weights is not None, "a network on the meta device comes with its weights"
                    value = weights.read(f"{path}.{key}" if path else key).to(self.root_device, parameter.dtype)
                    parameter = nn.Parameter(value, requires_grad=parameter.requires_grad)
                    setattr(module, key, parameter)
                own.register_parameter(key, parameter)
            if next(own.parameters(), None) is not None:
                Init(module=own, config_dict_or_path=self.settings, remote_device=self.remote_device)

    def shard_encoder(self, encoder: nn.Module, weights: StoredWeights) -> None:
        """Shard a text encoder in one unit: its submodules call each other past their hooks."""
        from deepspeed.utils import set_z3_leaf_module

        tied = tied_parameters(encoder)
        for _, *others in tied:
            for module, name in others:
                del module._parameters[name]  # until the first one is read and sharded
        self.shard(encoder, weights)
        retie_parameters(tied)
        set_z3_leaf_module(encoder, True)

    def gather(self, network: nn.Module) -> dict[str, Tensor]:
        """The unsharded parameters by name, on the CPU of the first process; empty on the others."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        found = {}
        for name, parameter in network.named_parameters():
            with GatheredParameters([parameter]):
                if self.is_global_zero:
                    found[name] = parameter.detach().to("cpu", copy=True)
        return found

    @property
    def steps_taken(self) -> int:
        """Number of optimizer steps: Lightning also calls DeepSpeed's step where it only accumulates gradients."""
        steps: int = self.deepspeed_engine.global_steps
        return steps

    def gradient_norm(self) -> float | None:
        """Norm of the gradients of the last step, before clipping."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps that DeepSpeed skipped because gradients were not finite."""
        steps: int = self.deepspeed_engine.skipped_steps
        return steps

    def auxiliary_optimizer(self, network: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> AuxiliaryOptimizer:
        """An optimizer that trains a sharded network by a separate DeepSpeed engine."""
        import deepspeed

        config = copy.deepcopy(self.settings) | {"gradient_clipping": clip, "gradient_accumulation_steps": 1}
        self._bound_bucket(config, optimizer)
        engine, _, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index),
            config=config,
            model=network,
            model_parameters=list(network.parameters()),
            optimizer=optimizer,
            dist_init_required=False,
        )
        register_hook_jvp(network)
        self._engines.append(engine)
        return _AuxiliaryOptimizer(engine, optimizer)

    # Checkpoints

    def sharded_view(self, value: Tensor) -> Tensor:
        """The rows of a flattened parameter as a DTensor."""
        return self._view(value)

    def optimizer_states(self) -> State:
        """States of all optimizers by key, with rows of flattened tensors as DTensors."""
        module = self.lightning_module
        assert module is not None
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        state: State = {}
        for key, engine in self._training_engines().items():
            _initialize_optimizer_state(engine)
            state[key] = {
                "groups": [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups],
                "tensors": {
                    f"{names[id(parameter)]}.{name}": self._view(parameter, part.clone())
                    for parameter, name, part in _optimizer_parts(engine)
                },
                "scalars": _optimizer_scalars(engine),
            }
        return state

    def refresh_weight_copies(self) -> None:
        """Copy the weights to the optimizers' float32 weights, and drop gathered copies."""
        from deepspeed.utils import safe_set_local_fp32_param

        module = self.lightning_module
        assert module is not None
        drop_gathered(module.parameters())
        for engine in self._training_engines().values():
            for parameter in _trained(engine):
                safe_set_local_fp32_param(parameter, local_part(parameter))

    def restore_optimizer_states(self, state: State) -> None:
        """Copy the states into the optimizers."""
        from deepspeed.utils import safe_set_local_optimizer_state

        module = self.lightning_module
        assert module is not None
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for key, engine in self._training_engines().items():
            saved = state[key]
            for parameter, name, part in _optimizer_parts(engine):
                padded = torch.zeros_like(part)
                rows = saved["tensors"][f"{names[id(parameter)]}.{name}"].to_local()
                padded[: len(rows)] = rows
                safe_set_local_optimizer_state(parameter, padded, name)
            for group, values in zip(engine.optimizer.param_groups, saved["groups"], strict=True):
                group.update(values)
            for scalar, value in _optimizer_scalars(engine).items():
                value.copy_(saved["scalars"][scalar])

    def _training_engines(self) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        auxiliary: dict[str, Any] = dict(auxiliary_optimizers(module))
        engines = {f"auxiliary_{path}": each.engine for path, each in auxiliary.items()}
        return {"optimizer": self.deepspeed_engine, **engines} if self.fitting else {}

    def _view(self, value: Any, part: Tensor | None = None) -> Tensor:
        """This process's rows of a flattened parameter, or of a state of its optimizer, as a DTensor in the same memory."""
        if not hasattr(value, "ds_tensor"):
            unsharded: Tensor = value.detach()
            return unsharded
        part, size = local_part(value) if part is None else part, int(value.ds_numel)
        device = part.device.type  # a DTensor on a mesh of another device type would be a copy
        if device not in self._meshes:
            self._meshes[device] = init_device_mesh(device, (self.world_size,))
        rows = max(0, min(part.numel(), size - self.global_rank * part.numel()))
        shape = torch.Size([size])
        return DTensor.from_local(
            part.detach()[:rows], self._meshes[device], [Shard(0)], run_check=False, shape=shape, stride=(1,)
        )


class _AuxiliaryOptimizer:
    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self.engine = engine
        self.optimizer = optimizer

    def step(self, loss: Tensor) -> None:
        skipped = self.engine.skipped_steps
        self.engine.backward(loss)
        self.engine.step()
        if self.engine.skipped_steps > skipped:
            raise auxiliary_error()


def check_no_block_state(optimizer: torch.optim.Optimizer | None) -> None:
    """Check that an optimizer has no block-wise state, such as that of 8-bit AdamW: ZeRO-3 splits weights within blocks.

    Raises:
        ConfigurationError: If it has.
    """
    if optimizer is not None and has_block_state(optimizer):
        raise ConfigurationError(
            f"model.optimizer is {type(optimizer).__name__}, whose state is block-wise, and deepspeed_stage_3 splits weights "
            "within blocks; set trainer.strategy to fsdp2, or model.optimizer to torch.optim.AdamW"
        )


def _trained(engine: Any) -> list[Any]:
    return [parameter for group in engine.optimizer.fp16_groups for parameter in group]


def _initialize_optimizer_state(engine: Any) -> None:
    """Let an optimizer initialize its state, by a step with learning rate 0 that changes no weight."""
    zero = engine.optimizer
    for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
        if zero.optimizer.state[flat]:
            continue
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[i]]
        original = group["params"], group["lr"], flat.grad
        # DeepSpeed also sets the updated part only for the time of a step.
        group["params"], group["lr"], flat.grad = [flat], 0.0, torch.zeros_like(flat)
        zero.optimizer.step()
        group["params"], group["lr"], flat.grad = original


def _optimizer_parts(engine: Any) -> Iterator[tuple[Any, str, Tensor]]:
    """Each trained parameter with the names of its optimizer states and this process's parts of them."""
    from deepspeed.utils import safe_get_local_optimizer_state

    zero = engine.optimizer
    for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        keys = [k for k, v in zero.optimizer.state[flat].items() if torch.is_tensor(v) and v.numel() == flat.numel() > 1]
        for parameter in group:
            for key in keys:
                yield parameter, key, safe_get_local_optimizer_state(parameter, key)


def _optimizer_scalars(engine: Any) -> dict[str, Tensor]:
    zero = engine.optimizer
    return {
        f"{i}.{key}": value
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat)
        for key, value in zero.optimizer.state[flat].items()
        if torch.is_tensor(value) and value.numel() == 1
    }


@contextmanager
def _detached(module: nn.Module, paths: tuple[str, ...]) -> Iterator[None]:
    """Remove auxiliary networks from a module within the context: their own engines register hooks on them."""
    detached: list[tuple[nn.Module, str, nn.Module]] = []
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        parent = module.get_submodule(parent_path)
        detached.append((parent, name, getattr(parent, name)))
        delattr(parent, name)
    try:
        yield
    finally:
        for parent, name, network in detached:
            setattr(parent, name, network)


def register_hook_jvp(module: nn.Module) -> None:
    """Register forward-mode rules for the hooks of ZeRO-3, whose outputs are views of their inputs."""

    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)

    for part in module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            if (hook := vars(part).get(name)) is not None:
                hook.jvp = staticmethod(jvp)
