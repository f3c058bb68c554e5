"""Few-step sampling of a student or its teacher, and the measures of their images."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn
from torchmetrics import Metric

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import flow_step, interpolate
from lightning_distill.methods.encoder import Batch, BatchEncoder
from lightning_distill.methods.validation import AverageVelocityReference, ValidationOptions
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter

Network = Literal["student", "teacher"]


class SamplingVelocity(Protocol):
    """Velocity of a sampling step."""

    def __call__(self, x: Tensor, r: Tensor, t: Tensor, condition: Condition, null: Condition, network: Network) -> Tensor:
        """Velocity (B, C, h, w) of a step from t down to r, of the student or of the guided teacher."""


class Evaluator:
    """Samples images with a student or its teacher, and measures the student's.

    Images are (B, 3, H, W) in [0, 1].

    Args:
        adapter: Teacher family.
        encoder: Encoder of the prompts.
        velocity: Velocity of a sampling step.
        stochastic_sampling: Whether the student's step predicts x0 and re-noises it (arXiv 2303.01469, Algorithm 1). Such a
            student is evaluated at r = 0 only; others step along the trajectory.
        options: Settings of validation.
        metrics: A metric of images for each number of steps, by that number.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        encoder: BatchEncoder,
        velocity: SamplingVelocity,
        stochastic_sampling: bool,
        options: ValidationOptions,
        metrics: nn.ModuleDict,
    ) -> None:
        self.adapter = adapter
        self.encoder = encoder
        self.velocity = velocity
        self.stochastic_sampling = stochastic_sampling
        self.options = options
        self.metrics = metrics
        self._reference: tuple[AverageVelocityReference, Condition] | None = None

    def reset(self) -> None:
        """Drop the reference of the average velocity's error, because the data may have changed."""
        self._reference = None

    # Sampling

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of the configured image size."""
        return self.adapter.latent_shape(self.options.height, self.options.width)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        nfe: int,
        seeds: Sequence[int] | None = None,
        network: Network = "student",
        batch_size: int = 64,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of B prompts.

        Args:
            prompts: B captions.
            nfe: Number of steps. One forward each, two for a teacher under two-branch guidance.
            seeds: One seed per image, which alone decides its noise, that of stochastic sampling included; None is 0 to B - 1.
            network: The student's steps, or the teacher's Euler steps under guidance.
            batch_size: Images per batch.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        device, images = self.encoder.device(), []
        for start in range(0, len(prompts), batch_size):
            chunk = list(prompts[start : start + batch_size])
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            noise = randn_tensor((len(chunk), *self.latent_shape), generator=generators, device=device)
            latents = self.sample_latents(noise, self.encoder.encode_prompt(chunk), nfe, network, generators)
            images.append((self.adapter.decode_latents(latents) / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    def sample_latents(
        self,
        noise: Tensor,
        condition: Condition,
        nfe: int,
        network: Network,
        generators: list[Generator] | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) sampled from noise over the family's time grid.

        Args:
            noise: Start of the trajectories (B, C, h, w).
            condition: Condition of B prompts.
            nfe: Number of steps.
            network: "student" or "teacher".
            generators: Generators of the fresh noise of stochastic sampling, one per image.
        """
        x = noise
        null = self.encoder.null_condition(len(noise))
        grid = self.adapter.time_grid(nfe, tuple(noise.shape[1:])).to(noise.device)
        for t, r in pairwise(grid):
            renoise = network == "student" and self.stochastic_sampling
            times, ends = t.expand(len(x)), (torch.zeros_like(r) if renoise else r).expand(len(x))
            x = flow_step(x, self.velocity(x, ends, times, condition, null, network), ends, times)
            if renoise and r > 0:
                x = interpolate(x, randn_tensor(x.shape, generator=generators, device=x.device), r.expand(len(x)))
        return x

    # Measures

    @property
    def measured_intervals(self) -> list[tuple[float, float]]:
        """Intervals (r, t) at which the average velocity's error is measured; r = 0 only for stochastic sampling.

        Students that learn only the steps of sampling grids are measured at the other intervals as well.
        """
        return [(r, t) for r, t in self.options.intervals if r == 0 or not self.stochastic_sampling]

    def average_velocity_error(self, batch: Batch) -> Tensor:
        """Relative error of the student's average velocity on the first validation batch."""
        if self._reference is None:
            self._reference = self._measure_reference(batch)
        reference, condition = self._reference
        return reference.relative_error(lambda x, r, t: self.velocity(x, r, t, condition, condition, "student"))

    def _measure_reference(self, batch: Batch) -> tuple[AverageVelocityReference, Condition]:
        options, device = self.options, self.encoder.device()
        count = len(batch["prompt"][: options.samples])
        # The full batch is encoded, as precomputed batches are: the last bits depend on the number of samples.
        x0 = self.encoder.latents(batch)[:count] if "image" in batch or "latents" in batch else None
        condition = {name: value[:count] for name, value in self.encoder.condition(batch).items()}
        null = self.encoder.null_condition(count)
        shape = self.latent_shape if x0 is None else x0.shape[1:]
        noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(options.seed)).to(device)
        reference = AverageVelocityReference.measure(
            lambda x, r, t: self.velocity(x, r, t, condition, null, "teacher"),
            noise,
            x0,
            self.measured_intervals,
            options.solver_steps,
            self.adapter.time_shift(tuple(shape)),
        )
        return reference, condition

    def nfe_metrics(self) -> Iterator[tuple[int, Metric]]:
        """The metrics of images, each with its number of steps."""
        for nfe, metric in self.metrics.items():
            assert isinstance(metric, Metric)
            yield int(nfe), metric

    def metric_names(self) -> list[str]:
        """Name of the overall value of each metric of images, such as `prompt_accuracy/nfe_4`."""
        return [f"{metric_name(metric)}/nfe_{nfe}" for nfe, metric in self.nfe_metrics()]

    def seeds(self, batch: Batch) -> list[int]:
        """Noise seeds of the images of a batch."""
        return [self.options.seed + index for index in batch["index"].tolist()]

    def update_metrics(self, batch: Batch) -> None:
        """Sample the images of a batch at each number of steps and update the metrics."""
        for nfe, metric in self.nfe_metrics():
            metric.update(self.sample(batch["prompt"], nfe, self.seeds(batch)), batch["prompt"])

    def compute_metrics(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Name, value, and whether it is the overall one, of each value of the metrics, which are then reset.

        A name is `prompt_accuracy/nfe_4`, or `prompt_accuracy/nfe_4/counting` for further values.
        """
        for key, (_, metric) in zip(self.metric_names(), self.nfe_metrics(), strict=True):
            for name, value in computed_values(metric).items():
                overall = name == "overall"
                yield key if overall else f"{key}/{name}", value, overall
            metric.reset()


def computed_values(metric: Metric) -> dict[str, Tensor]:
    """Values of a metric by name; a single number is `overall`.

    Raises:
        ConfigurationError: If the metric computes several values, and none is named `overall`.
    """
    values = metric.compute()
    if not isinstance(values, dict):
        return {"overall": values}
    if "overall" not in values:
        raise ConfigurationError(
            f"model.metric is {type(metric).__name__}, which computes {', '.join(values)}; let it compute one number, or "
            "name one of them overall"
        )
    return values


def metric_name(metric: nn.Module) -> str:
    """The class name in snake case: `PromptAccuracy` is `prompt_accuracy`."""
    name = type(metric).__name__
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
