"""Pictures in a few steps, and the measures of them in validation, test and prediction."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from lightning import LightningModule
from torch import Generator, Tensor, nn
from torchmetrics import Metric

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import flow_step, interpolate
from lightning_distill.methods.guidance import Guidance
from lightning_distill.methods.validation import AverageVelocityReference, ValidationOptions
from lightning_distill.sharding.protocols import Sharding
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter

Batch = dict[str, Any]
"""`prompt`: B captions; `image` (B, 3, H, W) in [-1, 1], if there are pictures; `index` (B,), places in the data set.

Precomputed data have `latents` (B, C, h, w) in the place of `image`, and `condition`: what networks are told of the captions.
"""


class SamplingModule(LightningModule, ABC):
    """Draws pictures with a student or its teacher, and measures the student's.

    The part of `TeacherStudentBase` that knows nothing of training. Pictures are (B, 3, H, W) in [0, 1].
    """

    has_teacher: ClassVar[bool] = True
    """Whether the method distils; plain training has a network and no teacher."""
    stochastic_sampling: ClassVar[bool] = False
    """Whether a step of the student goes to data and back by fresh noise (arXiv 2303.01469, Algorithm 1).

    Such a student is asked for r = 0 only. Others jump along the trajectory.
    """

    adapter: ModelAdapter
    teacher: nn.Module
    guidance: Guidance
    validation: ValidationOptions
    metrics: nn.ModuleDict
    _reference: AverageVelocityReference | None

    @property
    @abstractmethod
    def sampling_student(self) -> nn.Module:
        """The student that is validated and exported."""

    @abstractmethod
    def latents(self, batch: Batch) -> Tensor:
        """Latents (B, C, h, w) of a batch's pictures."""

    @abstractmethod
    def condition(self, batch: Batch) -> Condition:
        """Conditions of a batch's prompts."""

    @abstractmethod
    def encode_prompt(self, prompts: list[str]) -> Condition:
        """Conditions of B prompts."""

    @abstractmethod
    def null_condition(self, batch_size: int) -> Condition:
        """Condition of the empty prompt, in B rows."""

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        nfe: int,
        seeds: Sequence[int] | None = None,
        network: Literal["student", "teacher"] = "student",
        batch_size: int = 64,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of B prompts.

        Args:
            prompts: B captions.
            nfe: Steps. One forward each, two for a teacher under two-branch guidance.
            seeds: One seed a picture, which alone decides its noise, that of stochastic sampling included; 0 to B - 1 if not
                given.
            network: The student's jumps, or the teacher's Euler steps under guidance.
            batch_size: Pictures at a time.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        shape = self.latent_shape
        images = []
        for start in range(0, len(prompts), batch_size):
            chunk = list(prompts[start : start + batch_size])
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            noise = randn_tensor((len(chunk), *shape), generator=generators, device=self.device)
            latents = self.sample_latents(noise, self.encode_prompt(chunk), nfe, network, generators)
            images.append((self.adapter.decode_latents(latents) / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    def sample_latents(
        self,
        noise: Tensor,
        condition: Condition,
        nfe: int,
        network: Literal["student", "teacher"],
        generators: list[Generator] | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) from noise of that shape, over the family's grid of times.

        Args:
            noise: Where trajectories start.
            condition: Of B prompts.
            nfe: Steps.
            network: "student" or "teacher".
            generators: Sources of the fresh noise of stochastic sampling, one a picture.
        """
        x = noise
        null = self.null_condition(len(noise))
        grid = self.adapter.time_grid(nfe, tuple(noise.shape[1:])).to(noise.device)
        for t, r in pairwise(grid):
            fresh = network == "student" and self.stochastic_sampling
            times, ends = t.expand(len(x)), (torch.zeros_like(r) if fresh else r).expand(len(x))
            x = flow_step(x, self.sampling_velocity(x, ends, times, condition, null, network), ends, times)
            if fresh and r > 0:
                x = interpolate(x, randn_tensor(x.shape, generator=generators, device=x.device), r.expand(len(x)))
        return x

    def sampling_velocity(
        self, x: Tensor, r: Tensor, t: Tensor, condition: Condition, null: Condition, network: Literal["student", "teacher"]
    ) -> Tensor:
        """Velocity (B, C, h, w) of a sampling step from t down to r."""
        if network == "student":
            return self.adapter.average_velocity(self.sampling_student, x, r, t, condition, self.guidance.scale)
        return self.guidance.teacher_velocity(self.adapter, self.teacher, x, t, condition, null, self.guidance.scale)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of the configured picture size."""
        return self.adapter.latent_shape(self.validation.height, self.validation.width)

    # Validation

    @property
    def measured_intervals(self) -> list[tuple[float, float]]:
        """The (r, t) at which the average velocity's error is measured; to 0 alone where a student is asked for nothing else.

        Where students learn the steps of grids alone, others are measured as well.
        """
        return [(r, t) for r, t in self.validation.intervals if r == 0 or not self.stochastic_sampling]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the student's average velocity on the first batch, and its pictures on all."""
        if self.has_teacher and batch_idx == 0 and self.validation.average_velocity:
            self._log_average_velocity_error(batch)
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the measures of the pictures, for each number of steps."""
        self._log_measures("val", prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the student's pictures of the test prompts."""
        self._measure(batch)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self._log_measures("test", prog_bar=False)

    def on_predict_start(self) -> None:
        """Refuse prompts that processes have unequal shares of, where they need each other for every forward.

        Raises:
            ConfigurationError: If they would wait for ever.
        """
        if not isinstance(self.trainer.strategy, Sharding):
            return
        processes, loader = self.trainer.world_size, self.trainer.predict_dataloaders
        assert loader is not None
        if (prompts := len(loader.dataset)) % processes:
            raise ConfigurationError(
                f"{prompts} prompts do not divide evenly among {processes} processes, which trainer.strategy needs; give a "
                "multiple, or draw with an export"
            )

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] at the largest validated number of steps."""
        return self.sample(batch["prompt"], max(self.validation.nfe), self._seeds(batch))

    def measures(self) -> Iterator[tuple[int, Metric]]:
        """The measures of pictures, each with its number of steps."""
        for nfe, metric in self.metrics.items():
            assert isinstance(metric, Metric)
            yield int(nfe), metric

    def _seeds(self, batch: Batch) -> list[int]:
        return [self.validation.seed + place for place in batch["index"].tolist()]

    def _measure(self, batch: Batch) -> None:
        for nfe, metric in self.measures():
            metric.update(self.sample(batch["prompt"], nfe, self._seeds(batch)), batch["prompt"])

    def _log_measures(self, stage: str, prog_bar: bool) -> None:
        for nfe, metric in self.measures():
            key = f"{stage}/{metric_name(metric)}/nfe_{nfe}"
            for name, value in computed(metric).items():
                overall = name == "overall"
                # torchmetrics has synchronized the value; the flag keeps Lightning from warning that nobody has
                self.log(key if overall else f"{key}/{name}", value, prog_bar=overall and prog_bar, sync_dist=True)
            metric.reset()

    def _log_average_velocity_error(self, batch: Batch) -> None:
        if self._reference is None:
            self._reference = AverageVelocityReference.measure(self, batch)
        error = self._reference.relative_error(self)
        self.log("val/average_velocity_error", error, prog_bar=True, sync_dist=True)


def computed(metric: Metric) -> dict[str, Tensor]:
    """What a metric has come to, by name; what is one number is `overall`.

    Raises:
        ConfigurationError: If there are several, and none is `overall`.
    """
    values = metric.compute()
    if not isinstance(values, dict):
        return {"overall": values}
    if "overall" not in values:
        raise ConfigurationError(
            f"model.metric is {type(metric).__name__}, which computes {', '.join(values)}; let it compute one number, or "
            "one of them named overall"
        )
    return values


def metric_name(metric: nn.Module) -> str:
    """The class name in snake case: `PromptAccuracy` is `prompt_accuracy`."""
    name = type(metric).__name__
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
