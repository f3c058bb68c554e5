"""The interface of a teacher family: encoding, velocities, networks and exports, independent of training objectives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.guidance import classifier_free, inside_interval
from lightning_distill.flow.times import step_grid
from lightning_distill.sharding.protocols import Sharding
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.stock_student import StockSource
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from lightning_distill.teachers.teacher_lora import TeacherLora
from lightning_distill.teachers.usage import DIFFUSERS_CODE, ExportCode

Condition = dict[str, Tensor]
"""Network inputs that encode the prompts: named tensors whose first dimension is the batch."""


class ModelAdapter(nn.Module, ABC):
    """One family of text-to-image flow models; methods see latents, conditions and velocities.

    Latents are (B, C, h, w), normalised to about unit scale. `t` and `r` are (B,), float32, in [0, 1], and 1 is noise.

    The adapter owns the frozen text encoders and the autoencoder. It does not own the networks: it returns them and receives
    them as arguments. The method decides which networks are trained, have an EMA, are sharded and are saved.
    """

    embeds_guidance: bool = False
    """Whether the checkpoint takes the guidance scale as an input. If not, guidance needs a second branch."""

    supports_sharding: ClassVar[bool] = False
    """Whether `sharding` can shard the networks over processes."""
    sharding: Sharding | None = None
    """Strategy that shards networks when they are loaded and built. None: every process has unsharded networks."""

    stochastic_sampling: bool = False
    """Whether exported students predict x0 and re-noise in each step, as consistency models do."""

    revision: str | None = None
    """Revision of the teacher on the hub."""

    lora: tuple[TeacherLora, ...] = ()
    """LoRA that is merged into the teacher."""

    teacher_time_frequency: ClassVar[float] = 1000.0
    """Largest angular frequency of the teacher's features of t, in rad per unit of t."""

    @property
    def name(self) -> str:
        """Name of the teacher in model cards: hub id, shipped name or directory. The class name if it has none of them."""
        return type(self).__name__

    @property
    def pipeline_class(self) -> str:
        """Name of the class of diffusers of the stock pipeline; empty for teachers outside diffusers."""
        return ""

    @property
    def export_code(self) -> ExportCode:
        """Code snippets for the model cards of exports."""
        return DIFFUSERS_CODE

    @property
    def weights_dtype(self) -> str:
        """Dtype of the frozen weights, such as "bfloat16"."""
        return "float32"

    def time_frequency(self, options: StudentOptions) -> float:
        """Largest angular frequency of the student's features of t, in rad per unit of t.

        Finite differences in time must resolve this frequency.
        """
        if options.time_embedding == "smooth":
            return options.frequency_bound
        if options.time_embedding == "rescaled":
            # The network has adapted to these slow features, so it depends on t more sharply than the features do.
            return max(self.teacher_time_frequency / 1000, math.tau)
        return self.teacher_time_frequency

    @abstractmethod
    def check(self) -> None:
        """Check the settings before anything is loaded, and set `embeds_guidance`.

        Raises:
            ConfigurationError: If the settings cannot work.
        """

    def check_teacher(self) -> None:
        """Check that what is distilled is no few-step student itself; families without stock exports of students accept all.

        Raises:
            ConfigurationError: If it is one.
        """

    def check_image_size(self, height: int, width: int) -> None:
        """Check an image size before anything is loaded; families whose sizes only a loaded checkpoint knows accept all.

        Args:
            height: Height in pixels.
            width: Width in pixels.

        Raises:
            ConfigurationError: If the family does not support the size.
        """

    def check_student(self, options: StudentOptions) -> None:
        """Check the options of a student before anything is loaded.

        Raises:
            ConfigurationError: If the family cannot build a student with these options.
        """
        if options.lora is not None:
            raise ConfigurationError(
                f"student.lora is set, but {type(self).__name__} does not support LoRA; set student.lora to null"
            )
        if options.policy_points > 1:
            raise ConfigurationError(
                f"student.policy_points is {options.policy_points}, but {type(self).__name__} does not support policies; "
                "set it to 1"
            )
        if options.time_embedding == "rescaled":
            raise ConfigurationError(
                f"student.time_embedding is rescaled, which {type(self).__name__} does not support; choose smooth or original"
            )
        if options.interval_embedding == "none":
            raise ConfigurationError(
                f"student.interval_embedding is none, which {type(self).__name__} does not support; choose zero or clone"
            )
        if options.pretrained is not None:
            raise ConfigurationError(
                f"student.pretrained is set, but students of {type(self).__name__} start from their teacher; set it to null"
            )

    @abstractmethod
    def load(self, encoders: bool = True) -> None:
        """Load the text encoders and the autoencoder, frozen and in evaluation mode.

        Args:
            encoders: Whether prompts and images will be encoded. If not, the text encoders are not loaded, and the
                autoencoder is on the CPU except while it decodes. Exports have all components in either case.
        """

    @abstractmethod
    def load_teacher(self) -> nn.Module:
        """Load the teacher's network, frozen and in evaluation mode."""

    @abstractmethod
    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, SmoothTimeReport | None]:
        """Build a trainable network of (r, t): a copy of the teacher, or, with LoRA, a network that shares its weights.

        Returns:
            The student, and the fit of its time embedder to the teacher's (None if this call did not refit it).
        """

    def unsharded_copy(self, network: nn.Module) -> nn.Module:
        """The network itself or, if it is sharded, an unsharded copy on the CPU of the first process."""
        return network

    def meta_student(self, options: StudentOptions) -> nn.Module:
        """A student as from `build_student`, without LoRA, with parameters on the meta device.

        Raises:
            ConfigurationError: If the family cannot export checkpoints.
        """
        raise ConfigurationError(
            f"adapter is {type(self).__name__}, which cannot export checkpoints; export with ExportPipeline at the end of fit"
        )

    @abstractmethod
    def encoding_settings(self) -> dict[str, Any]:
        """Settings that determine latents and conditions, as plain values by name.

        Precomputed data is compared by them, to detect data of another teacher.

        Raises:
            ConfigurationError: If no settings identify the encodings.
        """

    @abstractmethod
    def encode_prompt(self, prompts: list[str]) -> Condition:
        """Encode B prompts; the empty prompt gives the null condition of classifier-free guidance."""

    @abstractmethod
    def text_encoders(self) -> dict[str, nn.Module]:
        """Text encoders by name, for methods that train them."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of latents (B, C, h, w)."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels."""

    @abstractmethod
    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """Shift of the family's sampling grid for latents (C, h, w), as in `flow.shift_times`; it may depend on their size."""

    def time_grid(self, nfe: int, latent_shape: tuple[int, ...]) -> Tensor:
        """Sampling times (nfe + 1,), from 1 down to 0, float32 on the CPU."""
        return step_grid(nfe, self.time_shift(latent_shape))

    @abstractmethod
    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: Tensor | float | None = None
    ) -> Tensor:
        """Velocity (B, C, h, w) from one forward pass; the guidance scale is an input if the checkpoint embeds it."""

    @abstractmethod
    def average_velocity(
        self,
        student: nn.Module,
        x_t: Tensor,
        r: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Average velocity (B, C, h, w) of the student from t down to r, from one forward pass."""

    def policy(
        self,
        student: nn.Module,
        x_t: Tensor,
        r: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Policy of the student for the step from t down to r: N velocities (B, N, C, h, w), from one forward pass.

        Args:
            student: A student with `StudentOptions.policy_points` N above 1.
            x_t: Latents (B, C, h, w).
            r: End times (B,).
            t: Start times (B,).
            condition: Encoded prompts.
            guidance_scale: Network input if the checkpoint embeds it.

        Raises:
            ConfigurationError: If the family's students have no policies.
        """
        raise ConfigurationError(
            f"adapter is {type(self).__name__}, whose students have no policies; choose a method other than PiFlow"
        )

    def feature_widths(self, layers: Sequence[int] | None = None) -> dict[int, int]:
        """Width D of the tokens that enter each of the given blocks; does not need a loaded adapter.

        Args:
            layers: Indices of transformer blocks, from 0. None: four evenly spaced blocks that end with the last.

        Raises:
            ConfigurationError: If a block does not exist, or the adapter provides no features.
        """
        raise self._no_features_error()

    def features(
        self,
        network: nn.Module,
        x_t: Tensor,
        r: Tensor | None,
        t: Tensor,
        condition: Condition,
        layers: Sequence[int],
        guidance_scale: Tensor | float | None = None,
    ) -> list[Tensor]:
        """Tokens (B, N, D) that enter the given blocks in one forward pass.

        Gradients reach x_t and the network if they are enabled. A block that takes image and prompt in one sequence gives
        the tokens of both; other blocks give those of the image.

        Args:
            network: Teacher, student or critic.
            x_t: Latents (B, C, h, w).
            r: End times (B,) for a two-time network. None: the network computes the velocity at t.
            t: Start times (B,).
            condition: Encoded prompts.
            layers: Indices of transformer blocks, from 0.
            guidance_scale: Network input if the checkpoint embeds it.

        Raises:
            ConfigurationError: If the adapter provides no features.
        """
        raise self._no_features_error()

    def _no_features_error(self) -> ConfigurationError:
        return ConfigurationError(
            f"adapter is {type(self).__name__}, which provides no features for discriminators; choose a method without a "
            "discriminator, or set adapter to DiffusersAdapter"
        )

    def stock_obstacle(self, student: StudentOptions) -> str | None:
        """Why no stock network can represent students with these options, or None; does not need a loaded adapter."""
        return f"students of {type(self).__name__} need their own code"

    @property
    def stock_grid_is_free(self) -> bool:
        """Whether the scheduler of a stock form has the student's grid for any number of steps."""
        return True

    def meta_stock_network(self) -> ModelMixin:
        """The stock transformer with parameters on the meta device; the adapter need not be loaded.

        Raises:
            ConfigurationError: If there are no stock forms.
        """
        raise self._no_stock_form_error()

    def lora_target_names(self, options: LoraOptions) -> list[str]:
        """Names of the layers that get low-rank updates; the adapter need not be loaded.

        Raises:
            ConfigurationError: If there are no stock forms.
        """
        raise self._no_stock_form_error()

    def stock_source(self, student: nn.Module, height: int, width: int) -> StockSource:
        """Networks and settings from which the stock forms of a student are computed, for one image size.

        Args:
            student: The student; its parameters may be streamed from a checkpoint.
            height: Height of the images in pixels, which may determine the time grid.
            width: Width of the images in pixels.

        Raises:
            ConfigurationError: If there are no stock forms.
        """
        raise self._no_stock_form_error()

    def check_stock_grid(self, student: nn.Module, nfe: int, height: int, width: int) -> None:
        """Check that a stock form can have N steps for one image size.

        Args:
            student: The student; its weights are not read.
            nfe: Number of steps.
            height: Height of the images in pixels.
            width: Width of the images in pixels.

        Raises:
            ConfigurationError: If there are no stock forms, or two steps have the same time in 16 bits.
        """
        raise self._no_stock_form_error()

    def _no_stock_form_error(self) -> ConfigurationError:
        return ConfigurationError(f"adapter is {type(self).__name__}, whose students have no stock form; export any_step")

    @abstractmethod
    def save_student(self, student: nn.Module, directory: Path) -> None:
        """Write the student in the format of its library, with all components and the code that it needs."""

    def merge_lora(self, student: nn.Module) -> nn.Module:
        """Merge the low-rank updates into the weights; returns the student itself if it has no LoRA."""
        return student

    def save_lora(self, student: nn.Module, directory: Path) -> None:
        """Write only the trained weights of a LoRA student, with the settings and code to load them onto the base model.

        Raises:
            ConfigurationError: If the adapter does not support LoRA.
        """
        raise ConfigurationError(f"adapter is {type(self).__name__}, which does not support LoRA; export the full student")

    @abstractmethod
    def save_teacher(self, network: nn.Module, directory: Path) -> None:
        """Write a one-time network in the format of its library, with all components; loading needs no extra code."""

    def frozen_routing(self) -> AbstractContextManager[Any]:
        """Context with frozen routing: all forward passes make the same discrete choices, as for mixtures of experts."""
        return nullcontext()

    def null_condition_for(self, condition: Condition, null_condition: Condition) -> Condition:
        """Condition of the null branch of guidance: that of the empty prompt, unless the family derives it from the prompts."""
        return null_condition

    def mix_guidance(self, v_cond: Tensor, v_null: Tensor, scale: Tensor) -> Tensor:
        """Guided velocity from two branches, (B, C, h, w) each, and scales (B,): `v_null + scale (v_cond - v_null)`."""
        return classifier_free(v_cond, v_null, scale)

    def stock_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments that make the pipeline of `save_teacher` sample as in training, besides prompt, steps and size."""
        return {}

    def guided_velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        null_condition: Condition,
        guidance_scale: Tensor | float,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Velocity with guidance: embedded if the checkpoint supports it, else from two branches (arXiv 2207.12598).

        Args:
            network: A teacher.
            x_t: Latents (B, C, h, w).
            t: Times (B,).
            condition: Encoded prompts, B rows.
            null_condition: The encoded empty prompt, B rows.
            guidance_scale: w of `v_null + w (v_c - v_null)`; 1 is no guidance. A number or (B,).
            guidance_interval: Interval of t in which two-branch guidance applies (arXiv 2404.07724).
        """
        if self.embeds_guidance:
            return self.velocity(network, x_t, t, condition, guidance_scale)
        if isinstance(guidance_scale, float | int) and guidance_scale == 1:
            return self.velocity(network, x_t, t, condition)
        # The null branch is only computed for the rows with guidance.
        scale = torch.as_tensor(guidance_scale, device=t.device, dtype=torch.float32).expand(len(t))
        rows = (inside_interval(t, guidance_interval) & (scale != 1)).nonzero()[:, 0]
        null = self.null_condition_for(condition, null_condition)
        both = {name: torch.cat([value, null[name][rows]]) for name, value in condition.items()}
        v = self.velocity(network, torch.cat([x_t, x_t[rows]]), torch.cat([t, t[rows]]), both)
        v_cond, v_null = v.split([len(x_t), len(rows)])
        return v_cond.index_copy(0, rows, self.mix_guidance(v_cond[rows], v_null, scale[rows]))
