"""DeepSpeed ZeRO-3, under which derivatives and few-step students train, on GPUs and, to try things, on CPUs."""

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

BUCKET = 500_000_000
"""Numbers in the buffer that gradients leave from, where nothing is said: DeepSpeed's own."""


class ZeRO3Precision(DeepSpeedPrecision):
    """Mixed precision as under other strategies: weights are float32, and products of matrices may take less.

    DeepSpeed's own would also keep the embeddings of times in 16 bits, too few for a derivative along them.

    Args:
        device: Type of the device.
        dtype: Of the products; None is that of the weights.
    """

    def __init__(self, device: str, dtype: torch.dtype | None) -> None:
        super().__init__("32-true")
        self._device = device
        self._dtype = dtype

    def forward_context(self) -> Any:
        """Autocast."""
        if self._dtype is None:
            return nullcontext()
        # Its cache would hold all weights, whole and in 16 bits, until the end of the forward pass.
        return torch.autocast(self._device, dtype=self._dtype, cache_enabled=False)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module as it is, as under other strategies: frozen networks have a precision of their own."""
        return module

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Backward pass; Lightning has divided the loss by the number of batches that are accumulated already."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class ZeRO3Strategy(ShardedCheckpoints, DeepSpeedStrategy):
    """DeepSpeed with ZeRO stage 3: weights, gradients and the optimizer's state are spread over the processes.

    Networks are filled and spread a module at a time: the frozen teacher, the critic, the average and the text encoders like
    the student, and the autoencoder too, once it has been loaded. Gradients are clipped by DeepSpeed, to
    `trainer.gradient_clip_val`.

    Args:
        **kwargs: Of `DeepSpeedStrategy`, such as `offload_optimizer` and `offload_parameters`; of its stages, 3.

    Raises:
        ConfigurationError: If deepspeed is not installed.
    """

    def __init__(self, **kwargs: Any) -> None:
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                "trainer.strategy deepspeed_stage_3 needs deepspeed, which is not installed; install "
                "lightning-distill[deepspeed], or choose fsdp2"
            ) from error
        super().__init__(**({"stage": 3} | kwargs))
        config = self.settings
        if not self.zero_stage_3:
            raise ConfigurationError("ZeRO3Strategy is for stage 3 of DeepSpeed; leave stage and config's stage at 3")
        # Its autograd function has no forward-mode rule, and it replaces torch's linear in the whole process.
        zero = config.setdefault("zero_optimization", {})
        zero.setdefault("memory_efficient_linear", False)
        # Weights fetched at once would be there twice, in one buffer and in their places: of a text encoder, all of them.
        zero.setdefault("stage3_allgather_sequential", True)
        self.bucket = int(zero.get("reduce_bucket_size", BUCKET))
        # The optimizer of the configuration is taken as it is, also where its state is in the memory of the CPU.
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
        """Whether there is no GPU, which Lightning's strategy would refuse."""
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    def root_device(self) -> torch.device:
        """Of this process."""
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    def setup_environment(self) -> None:
        """Start the processes' group."""
        precision = self.precision_plugin.precision
        if precision not in ("32-true", "bf16-mixed"):
            raise ConfigurationError(
                f"trainer.precision is {precision}, which deepspeed_stage_3 does not take here; choose bf16-mixed or 32-true"
            )
        self.precision_plugin = ZeRO3Precision(self.root_device.type, torch.bfloat16 if precision == "bf16-mixed" else None)
        if not self.on_cpu:
            super().setup_environment()
            return
        import deepspeed

        # It would be compiled at the first start; gloo does its work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Start the processes' group."""
        if not self.on_cpu:
            super().setup_distributed()
            return
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Networks are not spread as they are made, but once they have been filled."""
        self._init_config_if_needed()
        yield

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_blocks(optimizer)
        check_elementwise_optimizer(optimizer)
        if optimizer is not None:
            self._bound_bucket(self.settings, optimizer)
        with _without(model, auxiliary_paths(model)):
            result = super()._setup_model_and_optimizer(model, optimizer, *args, **kwargs)
        register_hook_jvp(model)
        return result

    def _bound_bucket(self, config: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Make the buffer that gradients leave from, which takes its memory whole, no larger than all gradients are."""
        trained = sum(getattr(p, "ds_numel", p.numel()) for group in optimizer.param_groups for p in group["params"])
        config["zero_optimization"]["reduce_bucket_size"] = min(self.bucket, trained)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        with _without(model, auxiliary_paths(model)):
            super()._initialize_deepspeed_inference(model)
        register_hook_jvp(model)

    # Networks

    def shard(self, network: nn.Module, weights: StoredWeights | None = None) -> None:
        """Fill and spread a network, one module's own weights after another's."""
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
        """Spread a text encoder, whose parts are gathered together: they call each other past their hooks."""
        from deepspeed.utils import set_z3_leaf_module

        shared = tied_parameters(encoder)
        for _, *others in shared:
            for module, name in others:
                del module._parameters[name]  # until the first of them is filled and spread
        self.shard(encoder, weights)
        retie_parameters(shared)
        set_z3_leaf_module(encoder, True)

    def gather(self, network: nn.Module) -> dict[str, Tensor]:
        """Whole parameters by name, on the CPU of the first process."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        found = {}
        for name, parameter in network.named_parameters():
            with GatheredParameters([parameter]):
                if self.is_global_zero:
                    found[name] = parameter.detach().to("cpu", copy=True)
        return found

    @property
    def steps_taken(self) -> int:
        """Optimizer steps: DeepSpeed is also told to step where it only accumulates gradients."""
        steps: int = self.deepspeed_engine.global_steps
        return steps

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradients, before clipping."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that DeepSpeed has left out, since gradients were not finite."""
        steps: int = self.deepspeed_engine.skipped_steps
        return steps

    def auxiliary_optimizer(self, network: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> AuxiliaryOptimizer:
        """Train a network by a DeepSpeed engine of its own."""
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
        return _Side(engine, optimizer)

    # Checkpoints

    def spread(self, value: Tensor) -> Tensor:
        """Rows of a flattened parameter."""
        return self._view(value)

    def optimizer_states(self) -> State:
        """As rows of flattened tensors."""
        module = self.lightning_module
        assert module is not None
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        state: State = {}
        for place, engine in self._training_engines().items():
            _make_optimizer_state(engine)
            state[place] = {
                "groups": [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups],
                "tensors": {
                    f"{names[id(parameter)]}.{key}": self._view(parameter, part.clone())
                    for parameter, key, part in _optimizer_parts(engine)
                },
                "scalars": _optimizer_scalars(engine),
            }
        return state

    def follow_weights(self) -> None:
        """Put the weights to where the optimizers keep theirs, and drop whole ones."""
        from deepspeed.utils import safe_set_local_fp32_param

        module = self.lightning_module
        assert module is not None
        drop_gathered(module.parameters())
        for engine in self._training_engines().values():
            for parameter in _trained(engine):
                safe_set_local_fp32_param(parameter, local_part(parameter))

    def restore_optimizer_states(self, state: State) -> None:
        """Put them back."""
        from deepspeed.utils import safe_set_local_optimizer_state

        module = self.lightning_module
        assert module is not None
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for place, engine in self._training_engines().items():
            saved = state[place]
            for parameter, key, part in _optimizer_parts(engine):
                whole = torch.zeros_like(part)
                rows = saved["tensors"][f"{names[id(parameter)]}.{key}"].to_local()
                whole[: len(rows)] = rows
                safe_set_local_optimizer_state(parameter, whole, key)
            for group, values in zip(engine.optimizer.param_groups, saved["groups"], strict=True):
                group.update(values)
            for name, value in _optimizer_scalars(engine).items():
                value.copy_(saved["scalars"][name])

    def _training_engines(self) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        auxiliary: dict[str, Any] = dict(auxiliary_optimizers(module))
        engines = {f"auxiliary_{path}": each.engine for path, each in auxiliary.items()}
        return {"optimizer": self.deepspeed_engine, **engines} if self.fits else {}

    def _view(self, value: Any, part: Tensor | None = None) -> Tensor:
        """A tensor that knows which rows of a flattened parameter this process holds."""
        if not hasattr(value, "ds_tensor"):
            whole: Tensor = value.detach()
            return whole
        part, size = local_part(value) if part is None else part, int(value.ds_numel)
        kind = part.device.type  # a DTensor of a mesh of another kind would be a copy
        if kind not in self._meshes:
            self._meshes[kind] = init_device_mesh(kind, (self.world_size,))
        rows = max(0, min(part.numel(), size - self.global_rank * part.numel()))
        shape = torch.Size([size])
        return DTensor.from_local(
            part.detach()[:rows], self._meshes[kind], [Shard(0)], run_check=False, shape=shape, stride=(1,)
        )


class _Side:
    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self.engine = engine
        self.optimizer = optimizer

    def step(self, loss: Tensor) -> None:
        skipped = self.engine.skipped_steps
        self.engine.backward(loss)
        self.engine.step()
        if self.engine.skipped_steps > skipped:
            raise auxiliary_error()


def _refuse_blocks(optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is not None and has_block_state(optimizer):
        raise ConfigurationError(
            f"model.optimizer is {type(optimizer).__name__}, whose state is in blocks of numbers, and ZeRO-3 cuts its parts "
            "anywhere; choose trainer.strategy fsdp2, or torch.optim.AdamW"
        )


def _trained(engine: Any) -> list[Any]:
    return [parameter for group in engine.optimizer.fp16_groups for parameter in group]


def _make_optimizer_state(engine: Any) -> None:
    """Let an optimizer make what it keeps, as it does at its first step, which here changes nothing."""
    zero = engine.optimizer
    for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
        if zero.optimizer.state[flat]:
            continue
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[i]]
        kept = group["params"], group["lr"], flat.grad
        # As DeepSpeed itself steps: the optimizer knows the part that it updates for so long only.
        group["params"], group["lr"], flat.grad = [flat], 0.0, torch.zeros_like(flat)
        zero.optimizer.step()
        group["params"], group["lr"], flat.grad = kept


def _optimizer_parts(engine: Any) -> Iterator[tuple[Any, str, Tensor]]:
    """Of each parameter that trains: the names and this process's parts of what its optimizer keeps."""
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
def _without(module: nn.Module, paths: tuple[str, ...]) -> Iterator[None]:
    """A module without those of its parts that train by themselves, and have hooks of their own."""
    taken: list[tuple[nn.Module, str, nn.Module]] = []
    for path in paths:
        parent, _, name = path.rpartition(".")
        holder = module.get_submodule(parent)
        taken.append((holder, name, getattr(holder, name)))
        delattr(holder, name)
    try:
        yield
    finally:
        for holder, name, part in taken:
            setattr(holder, name, part)


def register_hook_jvp(module: nn.Module) -> None:
    """Let the hooks of ZeRO-3 hand derivatives on: they are views of their inputs."""

    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)

    for part in module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            if (hook := vars(part).get(name)) is not None:
                hook.jvp = staticmethod(jvp)
