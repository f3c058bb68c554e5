"""Stock form of a student: diffusers' own transformer and scheduler, for one number of steps."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import Tensor

from lightning_distill.flow.times import step_grid
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.students.few_step_components import pipeline_arguments
from lightning_distill.students.two_time import TwoTimeEmbedding, TwoTimeModel
from lightning_distill.teachers.pipeline_directory import meta_stock_network, remove_local_paths
from lightning_distill.teachers.streamed_weights import Read, stream_weights, weight_stream
from lightning_distill.teachers.time_update import TimeUpdate, check_separable, merged_weight, solve_time_update


@dataclass(frozen=True)
class StepGrid:
    """Time grid of a student for one number of steps.

    Args:
        nfe: Number of steps.
        shift: Shift of the times toward noise.
        stochastic_sampling: Whether each step predicts x0 and re-noises it, so that the network receives r = 0.
    """

    nfe: int
    shift: float
    stochastic_sampling: bool = False

    def intervals(self) -> tuple[Tensor, Tensor]:
        """Starts t (N,) and ends r (N,) that the network receives."""
        times = step_grid(self.nfe, self.shift)
        ends = times[1:]
        return times[:-1], torch.zeros_like(ends) if self.stochastic_sampling else ends


def stock_scheduler(family: type[FewStepPipeline], grid: StepGrid) -> FlowMatchEulerDiscreteScheduler:
    r"""Stock scheduler whose N steps are those of a grid, in the stock pipeline of a family.

    Most pipelines pass the sigmas 1, ..., 1 / N, to which the scheduler applies its shift. Others let the scheduler space its
    sigmas evenly from 1 to :math:`\sigma_{min}`, which it shifts and then stretches to `shift_terminal`. All three maps are
    fractional linear in the index of the step, and so is the grid. Such maps are equal if they agree at 1, at the last step,
    and in their pole, which determines the scheduler's shift.

    Args:
        family: Few-step pipeline class of the family.
        grid: The grid.
    """
    settings = {"stochastic_sampling": grid.stochastic_sampling}
    if family.stock_passes_sigmas or grid.nfe == 1:
        return FlowMatchEulerDiscreteScheduler(shift=grid.shift, **settings)
    last = step_grid(grid.nfe, grid.shift)[-2].item()
    if grid.shift == 1:
        return FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=last, **settings)
    shift = grid.shift
    for _ in range(50):  # a contraction: sigma_min is small
        lowest = 1e-3 * shift / (1 + (shift - 1) * 1e-3)
        pole = (1 - lowest) * grid.nfe * grid.shift / ((grid.nfe - 1) * (grid.shift - 1))
        shift = pole / (pole - 1)
    return FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=last, **settings)


def set_steps(scheduler: FlowMatchEulerDiscreteScheduler, family: type[FewStepPipeline], nfe: int) -> None:
    """Set the steps of a scheduler as the stock pipeline of a family does."""
    if family.stock_passes_sigmas:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / nfe, nfe).tolist())
    else:
        scheduler.set_timesteps(nfe)


@dataclass(frozen=True)
class StockSource:
    """Networks and settings from which the stock forms of a student are computed.

    Args:
        family: Few-step pipeline class of the family.
        load_pipeline: Returns the pipeline of the teacher, without transformer.
        student: The student; its parameters may be streamed from a checkpoint.
        teacher: The teacher; only its timestep embedders are in memory.
        weights: Stored weights of the teacher.
        shift: Shift of the time grid toward noise, for one image size.
        stochastic_sampling: Whether each step predicts x0 and re-noises it.
    """

    family: type[FewStepPipeline]
    load_pipeline: Callable[[], FewStepPipeline]
    student: TwoTimeModel
    teacher: TwoTimeModel
    weights: StoredWeights
    shift: float
    stochastic_sampling: bool

    def grid(self, nfe: int) -> StepGrid:
        """The time grid of N steps."""
        return StepGrid(nfe, self.shift, self.stochastic_sampling)


def time_updates(source: StockSource, nfe: int) -> list[TimeUpdate]:
    """Updates of the teacher's timestep embedders that give the student's embeddings at N steps.

    Args:
        source: Student and teacher.
        nfe: Number of steps.

    Returns:
        One update for each embedder; none if the student has its teacher's time embeddings.

    Raises:
        ConfigurationError: If no update is exact.
    """
    student, grid = source.student, source.grid(nfe)
    if student.is_stock:
        return []
    t, r = grid.intervals()
    read = weight_stream(student).read
    updates = []
    for name, embedder in _embedders(source.teacher).items():
        first, activation, last = embedder.layers
        own = _in_memory(student, name, read)
        timesteps = _fed_timesteps(own, source.family, grid)
        layer = next(path for path, part in embedder.named_modules(remove_duplicate=False) if part is last)
        features = partial(student.stock_time_features, name)
        target = own.embed_times(t, r)
        updates.append(solve_time_update(f"{name}.{layer}", first, activation, last, features, timesteps, target))
    return updates


def check_grid(student: TwoTimeModel, family: type[FewStepPipeline], grid: StepGrid) -> None:
    """Check that a stock pipeline separates the steps of a grid, before there are weights to export.

    Args:
        student: The student; its weights are not read.
        family: Few-step pipeline class of the family.
        grid: The grid.

    Raises:
        ConfigurationError: If two steps have the same time.
    """
    if student.is_stock:
        return
    for name, embedder in _embedders(student).items():
        check_separable(partial(student.stock_time_features, name), _fed_timesteps(embedder, family, grid))


def stock_network(source: StockSource, updates: Sequence[TimeUpdate]) -> ModelMixin:
    """The student as a stock transformer on the meta device, whose `save_pretrained` streams its weights.

    Args:
        source: Student and teacher. The student has no LoRA layers.
        updates: Time updates. Without them, the timestep embedders are the teacher's.
    """
    student = source.student
    stock = meta_stock_network(type(student), student.config)
    own = {
        f"{name}.{path}": value.float()
        for name, part in _embedders(source.teacher).items()
        for path, value in part.state_dict().items()
        if not student.is_stock
    }
    for update in updates:
        own[f"{update.layer}.weight"] = merged_weight(own[f"{update.layer}.weight"], update)
    stream = weight_stream(student)

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        requested = list(names)
        return stream.read([name for name in requested if name not in own]) | {
            name: own[name] for name in requested if name in own
        }

    stream_weights(stock, read, stream.max_shard_size)
    return stock


def save_stock_student(source: StockSource, nfe: int, updates: Sequence[TimeUpdate], directory: Path) -> ModelMixin:
    """Write a student as a stock pipeline of diffusers for one number of steps.

    Args:
        source: Student and teacher. The student has no LoRA layers.
        nfe: Number of steps.
        updates: Result of `time_updates`.
        directory: Output directory; created if it does not exist.

    Returns:
        The stock transformer, on the meta device.
    """
    family, network = source.family, stock_network(source, updates)
    replaced = {
        "transformer": network,
        "scheduler": stock_scheduler(family, source.grid(nfe)),
        **family.stock_without_guidance,
    }
    stock: DiffusionPipeline = family.stock_class(**{**pipeline_arguments(source.load_pipeline()), **replaced})
    stock.save_pretrained(directory)
    remove_local_paths(directory)
    return network


def _embedders(network: TwoTimeModel) -> dict[str, TwoTimeEmbedding]:
    return {name: part for name, part in network.named_modules() if isinstance(part, TwoTimeEmbedding)}


def _fed_timesteps(embedder: TwoTimeEmbedding, family: type[FewStepPipeline], grid: StepGrid) -> Tensor:
    """Timesteps (N,) in [0, 1000] that the stock pipeline feeds to an embedder, as features."""
    scheduler = stock_scheduler(family, grid)
    set_steps(scheduler, family, grid.nfe)
    timesteps: Tensor = scheduler.timesteps.cpu()
    return torch.cat([timesteps[1:], torch.zeros(1)]) if embedder.embeds_end else timesteps


def _in_memory(student: TwoTimeModel, name: str, read: Read) -> TwoTimeEmbedding:
    """A copy of one of the student's embedders, on the CPU."""
    embedder = copy.deepcopy(student.get_submodule(name)).to_empty(device="cpu")
    assert isinstance(embedder, TwoTimeEmbedding)
    state = embedder.state_dict()
    values = read([f"{name}.{path}" for path in state])
    embedder.load_state_dict({path: values[f"{name}.{path}"].reshape(value.shape) for path, value in state.items()})
    return embedder
