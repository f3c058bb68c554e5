"""Script that trains a tiny model for a few steps under a strategy, and writes its weights and further facts to files."""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Sampler

import lightning_distill.sharding.strategies  # noqa: F401  # registers the names of the strategies
from lightning_distill.callbacks import AtomicCheckpoint, SwitchSolution
from lightning_distill.methods import DMD2, TDM, MeanFlow, Objective, ObjectiveSteps, TeacherStudentBase, TrajectoryAlignment
from lightning_distill.methods.guidance import Guidance
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.sharding.base_weights import BaseUnit
from lightning_distill.sharding.protocols import local_part
from lightning_distill.teachers import Condition, TeacherLora
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.teachers.tiny_families import make_adapter
from tests.tiny import PROMPTS


class SameRandomNumbers(TeacherStudentBase):
    """Samples the same random numbers in every process and run, so that several processes compute what one computes."""

    errors: ClassVar[dict[str, float]] = {}
    """Validation error by step, in place of the measured one; empty for none."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.errors:
            self.evaluator.average_velocity_error = lambda batch: torch.tensor(self.errors[str(self.global_step)])

    def objective(self, x0: torch.Tensor, condition: Condition) -> Objective | ObjectiveSteps:
        torch.manual_seed(100 + self.global_step)
        return super().objective(x0, condition)


def eight_bit(groups: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit  # type: ignore[import-untyped]  # its import takes a second

    torch._dynamo.config.disable = True  # compiling the step for each shape takes longer than the test
    return AdamW8bit(groups, lr=1e-3)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "8bit": eight_bit,
}


class RepeatableMeanFlow(SameRandomNumbers, MeanFlow):
    pass


class RepeatableDMD2(SameRandomNumbers, DMD2):
    pass


class RepeatableTDM(SameRandomNumbers, TDM):
    pass


def build_method(
    pretrained: str,
    solution: str,
    checkpointing: bool,
    aligned: bool,
    ema: bool,
    optimizer: str = "adamw",
    lora: int = 0,
    critic_lora: int = 0,
    dtype: str = "float32",
    name: str = "MeanFlow",
    student: str | None = None,
    teacher_lora: list[str] | None = None,
    one_time: bool = False,
) -> Any:
    merged = {"lora": [TeacherLora(file, 0.5) for file in teacher_lora]} if teacher_lora else {}
    adapter = make_adapter(pretrained, torch_dtype=dtype, **merged)
    adapter.check()
    time: dict[str, Any] = {"interval_embedding": "none", "time_embedding": "original"} if one_time else {}
    low_rank = LoraOptions(lora) if lora else None
    shared: dict[str, Any] = {
        "guidance": Guidance("embedded" if adapter.embeds_guidance else "two_branch", 2.0),
        "student": StudentOptions(
            gradient_checkpointing=checkpointing, max_drift=1.0, lora=low_rank, pretrained=student, **time
        ),
        "validation": ValidationOptions(nfe=(1,), average_velocity=bool(SameRandomNumbers.errors)),
        "ema_decay": 0.9 if ema else None,
        "optimizer": OPTIMIZERS[optimizer],
    }
    if name != "MeanFlow":
        kind = {"DMD2": RepeatableDMD2, "TDM": RepeatableTDM}[name]
        return kind(adapter, nfe=(1, 2), critic_updates=2, critic_lr=1e-3, **shared)
    critic: Any = LoraOptions(critic_lora) if critic_lora else "student"
    alignment = TrajectoryAlignment(nfe=(2,), critic_lr=1e-3, critic_lora=critic) if aligned else None
    return RepeatableMeanFlow(adapter, solution=solution, alignment=alignment, **shared)


def training_data(count: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1
    return [{"image": image, "prompt": PROMPTS[i % 3], "index": i} for i, image in enumerate(images)] * 8


class OneSamplePerProcess(Sampler[int]):
    """For batches of one sample: two processes get different samples, and one process the samples of both in turn."""

    def __iter__(self) -> Iterator[int]:
        distributed = torch.distributed.is_initialized()
        yield from range(torch.distributed.get_rank(), 16, 2) if distributed else range(16)

    def __len__(self) -> int:
        return 8 if torch.distributed.is_initialized() else 16


class CountTokens(Callback):
    """Writes the number of tokens of each expert in the student's first layer, in the first forward pass of the run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts: list[int] = []
        file = self.directory / f"tokens{trainer.global_rank}.json"

        def count(expert: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            counts.append(len(args[0]))
            file.write_text(json.dumps(counts[: len(experts)]))

        experts = pl_module.student.blocks[0].mlp.experts
        for expert in experts:
            expert.register_forward_pre_hook(count)


class GatheredUnits:
    """Records which units of base weights are unsharded, or being prefetched, and the largest such set."""

    def __init__(self) -> None:
        self.current: set[BaseUnit] = set()
        self.largest: list[str] = []
        changes = {"prefetch": self.current.add, "unshard": self.current.add, "reshard": self.current.discard}
        for name, change in changes.items():
            setattr(BaseUnit, name, self._recorded(getattr(BaseUnit, name), change))

    def _recorded(self, method: Any, change: Any) -> Any:
        def recorded(unit: BaseUnit) -> None:
            method(unit)
            change(unit)
            if len(self.current) > len(self.largest):
                self.largest = sorted("root" if hasattr(each.base, "x_embedder") else "block" for each in self.current)

        return recorded


def run(arguments: argparse.Namespace) -> None:
    seed_everything(0)
    gathered = GatheredUnits()
    parts = arguments.checkpointing, arguments.aligned, arguments.ema, arguments.optimizer
    low_rank = arguments.lora, arguments.critic_lora, arguments.dtype, arguments.method, arguments.student
    SameRandomNumbers.errors = json.loads(arguments.errors)
    further = arguments.teacher_lora, arguments.one_time
    module = build_method(arguments.pretrained, arguments.solution, *parts, *low_rank, *further)
    switch = SwitchSolution(threshold=0.5, guard_factor=None if arguments.unguarded else 2.0)
    best = AtomicCheckpoint(str(arguments.out), filename="best", monitor="val/average_velocity_error", save_last=False)
    trainer = Trainer(
        max_steps=arguments.steps,
        accelerator="cpu",
        devices=arguments.devices,
        strategy=arguments.strategy,
        gradient_clip_val=1.0,
        precision=arguments.precision,
        accumulate_grad_batches=arguments.accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=1,
        callbacks=[
            AtomicCheckpoint(str(arguments.out), every_n_train_steps=arguments.save_every),
            *([CountTokens(arguments.out)] if arguments.one_sample_per_process else []),
            *([switch, best] if SameRandomNumbers.errors else []),
        ],
    )
    if arguments.one_sample_per_process:
        loader = DataLoader(training_data(2), sampler=OneSamplePerProcess())
    else:
        loader = DataLoader(training_data(), batch_size=4)
    validation = [DataLoader(training_data()[:4], batch_size=4)] if SameRandomNumbers.errors else []
    trainer.fit(module, loader, *validation, ckpt_path=arguments.resume)
    weights = {}
    matching = module.alignment if isinstance(module, MeanFlow) else module.matching
    networks = {"student": module.student, "critic": getattr(matching, "critic", None), "ema": module.ema}
    for name, network in networks.items():
        if network is not None:
            gathered_weights = dict(network.named_parameters()) if module.sharding is None else module.sharding.gather(network)
            weights |= {f"{name}.{key}": value.detach().clone() for key, value in gathered_weights.items()}
    unsharded = module.adapter.unsharded_copy(module.student)
    if trainer.is_global_zero:
        torch.save(module.adapter.merge_lora(unsharded).state_dict(), arguments.out / "merged.pt")
        torch.save(weights, arguments.out / "weights.pt")
        local = sum(local_part(parameter).numel() for parameter in module.teacher.parameters())
        total = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in module.teacher.parameters())
        facts = {"teacher_local": local, "teacher_total": total, "steps": trainer.global_step}
        if (engine := getattr(trainer.strategy, "deepspeed_engine", None)) is not None:
            (bucket,) = engine.optimizer.ipg_buckets.values()
            facts["bucket"] = bucket.buffer.numel()
            facts["trained"] = sum(p.ds_numel for p in module.student.parameters() if p.requires_grad)
        states = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
        facts["states"] = sorted({type(local_part(state)).__name__ for state in states})
        facts |= {"gathered": gathered.largest, "still_gathered": len(gathered.current)}
        facts |= {"switched": switch.state.step, "returned": switch.state.returned_at}
        facts["solution"] = getattr(module, "solution", None)
        (arguments.out / "facts.json").write_text(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--pretrained")
    parser.add_argument("--method", default="MeanFlow")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--solution", default="differential")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--aligned", action="store_true")
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--one-sample-per-process", action="store_true")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--critic-lora", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--student")
    parser.add_argument("--teacher-lora", action="append")
    parser.add_argument("--one-time", action="store_true")
    parser.add_argument("--errors", default="{}")
    parser.add_argument("--unguarded", action="store_true")
    parser.add_argument("--resume")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
