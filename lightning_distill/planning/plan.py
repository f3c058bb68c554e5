"""The command `plan`: what a training's settings ask of a machine."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_distill.callbacks.switch import SwitchSolution
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.encoder import EncodedData
from lightning_distill.planning import hunyuan_image3
from lightning_distill.planning.description import description_directory
from lightning_distill.planning.machine import STRATEGIES, Machine, Plan, Strategy, plan_for, smallest
from lightning_distill.planning.report import plan_numbers, plan_table, verdict
from lightning_distill.planning.step import Batch, StepCost, measure_step
from lightning_distill.sharding import FSDP2Strategy, ZeRO3Strategy
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.hunyuan_image3.adapter import HunyuanImage3Adapter
from lightning_distill.teachers.hunyuan_image3.directory import read_config


@dataclass(frozen=True)
class PlanOptions:
    """For which machine.

    Args:
        gpus: GPUs of a node; None is trainer.devices, or 8 if that is not a number.
        nodes: Number of nodes; None is trainer.num_nodes.
        gpu_memory: GiB of a GPU.
        reserve: GiB of a GPU that are left to what no arithmetic knows: CUDA's context, libraries, fragmentation.
        model_config: Directory with the pipeline's configurations, if adapter.pretrained is not on this machine; it needs no
            weights.
        json: File that the figures are written to as well.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    gpus: int | None = None
    nodes: int | None = None
    gpu_memory: float = 80.0
    reserve: float = 4.0
    model_config: str | None = None
    json: str | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} is {value}; give at least 1, or leave it out for the trainer's")
        if self.json is not None and not Path(self.json).resolve().parent.is_dir():
            raise ConfigurationError(f"json is {self.json!r}, whose directory is not there; make it, or give another file")
        if not 0 <= self.reserve < self.gpu_memory:
            raise ConfigurationError(
                f"reserve is {self.reserve} and gpu_memory {self.gpu_memory}; keep the first below the second"
            )


def plan(model: LightningModule, data: LightningDataModule, trainer: Mapping[str, Any], options: PlanOptions) -> Plan:
    """Count what a training would take, and print it; no weights are read, and no pictures.

    Activations are those of the method's own step, run on tensors without memory, with every sample's times apart, which takes
    most. Validation is not counted, nor is what the data's processes take on the CPU.

    Args:
        model: The method.
        data: What it would train on, for the size of its batches.
        trainer: Settings of the trainer; `strategy`, `precision`, `accelerator`, `devices`, `num_nodes`,
            `accumulate_grad_batches` and `callbacks` count.
        options: For which machine.

    Raises:
        ConfigurationError: If the settings cannot be planned.
    """
    if not isinstance(model, TeacherStudentBase) or not model.has_teacher:
        raise ConfigurationError(f"plan needs a method that distils a teacher, and {type(model).__name__} does not")
    adapter = model.adapter
    if not isinstance(adapter, DiffusersAdapter | HunyuanImage3Adapter):
        raise ConfigurationError(
            f"plan supports DiffusersAdapter and HunyuanImage3Adapter, and model.adapter is a {type(adapter).__name__}"
        )
    if model.auxiliary.feature_readers:
        raise ConfigurationError(
            f"plan does not count the discriminator of {type(model).__name__}; plan DMD2 with model.gan null for three networks"
        )
    directory = _describe(adapter, options.model_config)
    adapter.check_student(model.student_options)
    model.guidance.check(adapter.embeds_guidance)
    machine, strategy = _machine(trainer, options), _strategy(trainer, options)
    shared = _shares_weights(model)
    if strategy.kind == "zero3" and shared:
        raise ConfigurationError("LoRA does not go with ZeRO-3; set trainer.strategy to fsdp2, auto or ddp")
    switches = [callback for callback in _listed(trainer.get("callbacks")) if isinstance(callback, SwitchSolution)]
    phases = list(dict.fromkeys([model.phase, *(switch.to for switch in switches)]))
    accumulate = int(trainer.get("accumulate_grad_batches") or 1)
    cost = measure_step(
        model, directory, _batch(model, data, accumulate), phases, str(trainer["precision"] or "32-true"),
        gpu=trainer.get("accelerator") != "cpu",
    )  # fmt: skip
    guard = any(switch.guard_factor is not None for switch in switches)
    found = _placed(cost, strategy, machine.processes, accumulate, guard)
    enough = smallest(lambda count: machine.holds(_placed(cost, strategy, count, accumulate, guard).peak))
    others = [
        other.name
        for other in STRATEGIES.values()
        if other.kind != "single"
        and not (other.kind == "zero3" and shared)
        and machine.holds(plan_for(cost, other, machine.processes, accumulate, guard).peak)
    ]
    rich.get_console().print(plan_table(found, f"{_title(machine)}, {found.strategy}, {batch_label(model, data)}"))
    rich.get_console().print(verdict(found, machine, enough, others))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(plan_numbers(found, machine, enough, others), indent=2) + "\n")
    return found


def _describe(adapter: DiffusersAdapter | HunyuanImage3Adapter, given: str | None) -> Path:
    """Where the model's configurations are, from which the adapter now knows what it has to."""
    if isinstance(adapter, HunyuanImage3Adapter):
        directory = hunyuan_image3.settings_directory(adapter, given)
        adapter.embeds_guidance = bool(read_config(directory).get("cfg_distilled", False))
        return directory
    directory = description_directory(adapter.pretrained, adapter.revision, given)
    adapter.pretrained, adapter.revision = str(directory), None
    adapter.check()
    return directory


def _shares_weights(model: TeacherStudentBase) -> bool:
    """Whether some network is LoRA on the teacher's weights."""
    return any(options.lora is not None for options in (model.student_options, *model.auxiliary_students().values()))


def _placed(cost: StepCost, strategy: Strategy, processes: int, accumulate: int, guard: bool) -> Plan:
    """Under the strategy, where `auto` is DDP as soon as there is more than one process."""
    if strategy.kind == "single" and processes > 1:
        strategy = STRATEGIES["ddp"]
    return plan_for(cost, strategy, processes, accumulate, guard)


def _machine(trainer: Mapping[str, Any], options: PlanOptions) -> Machine:
    devices = trainer.get("devices")
    gpus = options.gpus or (devices if isinstance(devices, int) and devices > 0 else 8)
    return Machine(gpus, options.nodes or int(trainer.get("num_nodes") or 1), options.gpu_memory, options.reserve)


def _strategy(trainer: Mapping[str, Any], options: PlanOptions) -> Strategy:
    given = trainer.get("strategy") or "auto"
    if isinstance(given, FSDP2Strategy):
        given = "fsdp2_offload" if given.offload else "fsdp2"
    elif isinstance(given, ZeRO3Strategy):
        zero = given.settings["zero_optimization"]
        return Strategy(
            "deepspeed_stage_3",
            "zero3",
            offloads_weights="offload_param" in zero,
            offloads_optimizer="offload_optimizer" in zero,
            bucket=given.bucket,
            live=int(zero.get("stage3_max_live_parameters", STRATEGIES["deepspeed_stage_3"].live)),
        )
    elif type(given).__name__ == "DDPStrategy" or (isinstance(given, str) and given.startswith("ddp")):
        given = "ddp"
    if given not in STRATEGIES:
        raise ConfigurationError(
            f"trainer.strategy is {given}, which plan does not know; choose one of {', '.join(STRATEGIES)}"
        )
    return STRATEGIES[given]


def _batch(model: TeacherStudentBase, data: LightningDataModule, accumulate: int) -> Batch:
    samples = getattr(data, "batch_size", None)
    if not isinstance(samples, int):
        raise ConfigurationError(f"{type(data).__name__} has no batch_size, which plan needs; use a DataModule that has")
    size = _size(model, data)
    images = getattr(data, "has_images", True)
    return Batch(samples, size, images, isinstance(data, EncodedData), accumulate > 1)


def _size(model: TeacherStudentBase, data: LightningDataModule) -> tuple[int, int]:
    size = getattr(data, "size", None)
    return size if isinstance(size, tuple) else (model.validation.height, model.validation.width)


def batch_label(model: TeacherStudentBase, data: LightningDataModule) -> str:
    """Batch and size of pictures, for a title."""
    height, width = _size(model, data)
    return f"{getattr(data, 'batch_size', '?')} x {height} x {width}"


def _title(machine: Machine) -> str:
    nodes = f"{machine.nodes} x " if machine.nodes > 1 else ""
    return f"{nodes}{machine.gpus} x {machine.gpu_memory:g} GB"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []
