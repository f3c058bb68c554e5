"""The command `plan`: GPU memory and communication of a training run, from its settings."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import rich
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.strategies import DDPStrategy

from lightning_distill.callbacks.switch import SwitchSolution
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.encoder import EncodedData
from lightning_distill.methods.setup_checks import check_image_sizes
from lightning_distill.outputs import check_file, writing
from lightning_distill.paths import expand_path
from lightning_distill.planning import hunyuan_image3
from lightning_distill.planning.fake_pipeline import pipeline_config_directory
from lightning_distill.planning.machine import STRATEGIES, Machine, Plan, Strategy, plan_for, smallest_gpu_count
from lightning_distill.planning.report import plan_numbers, plan_table, verdict
from lightning_distill.planning.step import BatchShape, measure_step
from lightning_distill.sharding.fsdp2 import FSDP2Strategy
from lightning_distill.sharding.zero3 import ZeRO3Strategy
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.hunyuan_image3.adapter import HunyuanImage3Adapter
from lightning_distill.teachers.hunyuan_image3.directory import read_config


@dataclass(frozen=True)
class PlanOptions:
    """Machine of the training run.

    Args:
        gpus: GPUs per node. None means trainer.devices, or 8 if that is not a number.
        nodes: Number of nodes. None means trainer.num_nodes.
        gpu_memory: Memory of a GPU in GiB.
        reserve: Memory of a GPU in GiB to leave free for CUDA's context, libraries and fragmentation.
        model_config: Directory with the configurations of the teacher, if adapter.pretrained is not on this machine. It needs
            no weights.
        json: File for the numbers of the plan.

    Raises:
        ConfigurationError: If an option is out of its range.
    """

    gpus: int | None = None
    nodes: int | None = None
    gpu_memory: float = 80.0
    reserve: float = 4.0
    model_config: str | None = None
    json: str | None = None

    def __post_init__(self) -> None:
        for name, value in {"gpus": self.gpus, "nodes": self.nodes}.items():
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} is {value}; set it to at least 1, or omit it for the trainer's number")
        if self.json is not None:
            check_file(expand_path(self.json, "json"), "json")
        if not 0 <= self.reserve < self.gpu_memory:
            raise ConfigurationError(
                f"reserve is {self.reserve} and gpu_memory is {self.gpu_memory}; set reserve to at least 0 and below gpu_memory"
            )


@runtime_checkable
class BatchedData(Protocol):
    """A DataModule with batches of one size.

    Attributes:
        batch_size: Samples per process.
    """

    batch_size: int


def plan(model: LightningModule, data: LightningDataModule, trainer: Mapping[str, Any], options: PlanOptions) -> Plan:
    """Estimate the cost of a training run and print it; loads neither weights nor images.

    The method's own training step is executed on fake tensors, with a different time for each sample, which takes the most
    memory. Validation and the CPU memory of data workers are not counted.

    Args:
        model: The method.
        data: Training data, which determine the size of a batch.
        trainer: Settings of the trainer: `strategy`, `precision`, `accelerator`, `devices`, `num_nodes`,
            `accumulate_grad_batches` and `callbacks`.
        options: Machine of the training run.

    Raises:
        ConfigurationError: If `plan` does not support the settings.
    """
    if not isinstance(model, TeacherStudentBase) or not model.has_teacher:
        raise ConfigurationError(
            f"model is {type(model).__name__}, which has no teacher; plan supports distillation methods only"
        )
    adapter = model.adapter
    if not isinstance(adapter, DiffusersAdapter | HunyuanImage3Adapter):
        raise ConfigurationError(
            f"model.adapter is {type(adapter).__name__}; plan supports DiffusersAdapter and HunyuanImage3Adapter only"
        )
    if model.auxiliary.feature_readers:
        raise ConfigurationError(
            f"model is {type(model).__name__} with a discriminator, which plan does not support; plan DMD2 with model.gan null "
            "for its other three networks"
        )
    directory = _set_config_directory(adapter, options.model_config)
    adapter.check_student(model.student_options)
    check_image_sizes(adapter, model.validation, data)
    model.guidance.check(adapter.embeds_guidance)
    machine, strategy = _machine(trainer, options), _strategy(trainer)
    shares_weights = _shares_weights(model)
    if strategy.kind == "zero3" and shares_weights:
        raise ConfigurationError(
            f"trainer.strategy is {strategy.name} and student.lora is set, but ZeRO-3 does not support LoRA; set "
            "trainer.strategy to fsdp2, auto or ddp"
        )
    switches = [callback for callback in _as_list(trainer.get("callbacks")) if isinstance(callback, SwitchSolution)]
    phases = list(dict.fromkeys([model.phase, *(switch.to for switch in switches)]))
    accumulate = int(trainer.get("accumulate_grad_batches") or 1)
    precision, gpu = str(trainer["precision"] or "32-true"), trainer.get("accelerator") != "cpu"
    cost = measure_step(model, directory, _batch_shape(model, data, accumulate), phases, precision, gpu)
    rollback = any(switch.guard_factor is not None for switch in switches)

    def plan_with(strategy: Strategy, processes: int) -> Plan:
        if strategy.kind == "single" and processes > 1:  # `auto` is DDP on several processes
            strategy = STRATEGIES["ddp"]
        return plan_for(cost, strategy, processes, accumulate, rollback)

    result = plan_with(strategy, machine.processes)
    smallest = smallest_gpu_count(lambda count: machine.fits(plan_with(strategy, count).peak))
    alternatives = [
        other.name
        for other in STRATEGIES.values()
        if other.kind != "single"
        and not (other.kind == "zero3" and shares_weights)
        and machine.fits(plan_with(other, machine.processes).peak)
    ]
    console = rich.get_console()
    console.print(plan_table(result, f"{_machine_label(machine)}, {result.strategy}, {_batch_label(model, data)}"))
    console.print(verdict(result, machine, smallest, alternatives))
    if options.json is not None:
        file = Path(expand_path(options.json, "json"))
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(plan_numbers(result, machine, smallest, alternatives), indent=2) + "\n")
    return result


def _set_config_directory(adapter: DiffusersAdapter | HunyuanImage3Adapter, model_config: str | None) -> Path:
    """Find the configurations of the teacher, and set the adapter up from them."""
    if isinstance(adapter, HunyuanImage3Adapter):
        directory = hunyuan_image3.checkpoint_config_directory(adapter, model_config)
        adapter.embeds_guidance = bool(read_config(directory).get("cfg_distilled", False))
        return directory
    directory = pipeline_config_directory(adapter.pretrained, adapter.revision, model_config)
    adapter.pretrained, adapter.revision = str(directory), None
    adapter.check(weights=False)
    return directory


def _shares_weights(model: TeacherStudentBase) -> bool:
    """Whether some network has the teacher's weights as shared base weights of LoRA."""
    return any(options.lora is not None for options in (model.student_options, *model.auxiliary_students().values()))


def _machine(trainer: Mapping[str, Any], options: PlanOptions) -> Machine:
    devices = trainer.get("devices")
    gpus = options.gpus or (devices if isinstance(devices, int) and devices > 0 else 8)
    return Machine(gpus, options.nodes or int(trainer.get("num_nodes") or 1), options.gpu_memory, options.reserve)


def _strategy(trainer: Mapping[str, Any]) -> Strategy:
    strategy = trainer.get("strategy") or "auto"
    if isinstance(strategy, FSDP2Strategy):
        strategy = "fsdp2_offload" if strategy.offload else "fsdp2"
    elif isinstance(strategy, ZeRO3Strategy):
        zero = strategy.settings["zero_optimization"]
        default = STRATEGIES["deepspeed_stage_3"].max_live_parameters
        return Strategy(
            "deepspeed_stage_3",
            "zero3",
            offloads_weights="offload_param" in zero,
            offloads_optimizer="offload_optimizer" in zero,
            reduce_bucket_size=strategy.bucket,
            max_live_parameters=int(zero.get("stage3_max_live_parameters", default)),
        )
    elif type(strategy) is DDPStrategy or (isinstance(strategy, str) and strategy.startswith("ddp")):
        strategy = "ddp"
    if strategy not in STRATEGIES:
        raise ConfigurationError(
            f"trainer.strategy is {strategy}, which plan does not support; choose one of {', '.join(STRATEGIES)}"
        )
    return STRATEGIES[strategy]


def _batch_shape(model: TeacherStudentBase, data: LightningDataModule, accumulate: int) -> BatchShape:
    if not isinstance(data, BatchedData) or not isinstance(data.batch_size, int):
        raise ConfigurationError(f"data is {type(data).__name__}, which has no batch_size; use a DataModule that has one")
    size = _image_size(model, data)
    images = getattr(data, "has_images", True)
    return BatchShape(data.batch_size, size, images, isinstance(data, EncodedData), accumulate > 1)


def _image_size(model: TeacherStudentBase, data: LightningDataModule) -> tuple[int, int]:
    """Height and width of the training images in pixels; without images, of the validation images."""
    size = getattr(data, "size", None)
    return size if isinstance(size, tuple) else (model.validation.height, model.validation.width)


def _batch_label(model: TeacherStudentBase, data: LightningDataModule) -> str:
    height, width = _image_size(model, data)
    return f"{data.batch_size if isinstance(data, BatchedData) else '?'} x {height} x {width}"


def _machine_label(machine: Machine) -> str:
    nodes = f"{machine.nodes} x " if machine.nodes > 1 else ""
    return f"{nodes}{machine.gpus} x {machine.gpu_memory:g} GB"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []
