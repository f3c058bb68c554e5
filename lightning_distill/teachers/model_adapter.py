"""What a teacher family implements: everything a method needs to know about a model, and nothing about objectives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.guidance import classifier_free, inside_interval
from lightning_distill.flow.times import step_grid
from lightning_distill.sharding.protocols import Sharding
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student_options import StudentOptions
from lightning_distill.teachers.usage import DIFFUSERS_CODE, ExportCode

Condition = dict[str, Tensor]
"""What the network is told about the prompts: named tensors, all with the batch in front."""


class ModelAdapter(nn.Module, ABC):
    """One family of text-to-image flow models, seen by the methods as latents, conditions and velocities.

    Latents are (B, C, h, w), normalised to about unit scale; `t` and `r` are (B,), float32, in [0, 1], and 1 is noise. The
    adapter holds the frozen text encoders and the autoencoder; the networks that are distilled are handed out and passed
    back in, so that a method decides what trains, is averaged, sharded and saved.
    """

    embeds_guidance: bool = False
    """Whether the checkpoint takes the guidance scale as an input; otherwise guidance costs a second branch."""

    shards: ClassVar[bool] = False
    """Whether networks can be spread over processes by `sharding`."""
    sharding: Sharding | None = None
    """The strategy that spreads networks over processes as they are loaded and built, or None where each has them whole."""

    stochastic_sampling: bool = False
    """Whether the students it writes go to data and back by fresh noise in each step, as consistency models do."""

    export_code: ClassVar[ExportCode] = DIFFUSERS_CODE
    """How its exports are used."""

    teacher_time_frequency: ClassVar[float] = 1000.0
    """Largest angular frequency of the teacher's own features of t, in rad per unit of t."""

    def time_frequency(self, options: StudentOptions) -> float:
        """Of the student's features of t, in rad per unit of t: what a difference in time must resolve."""
        if options.time_embedding == "smooth":
            return options.frequency_bound
        if options.time_embedding == "rescaled":
            # A network that has learned to make do with features this slow depends on t more sharply than they do.
            return max(self.teacher_time_frequency / 1000, math.tau)
        return self.teacher_time_frequency

    @abstractmethod
    def check(self) -> None:
        """Raise `ConfigurationError` where the settings cannot work; before anything is loaded. Sets `embeds_guidance`."""

    def check_student(self, options: StudentOptions) -> None:
        """Raise `ConfigurationError` where a student of these options cannot be built; before anything is loaded."""
        if options.lora is not None:
            raise ConfigurationError(
                f"student.lora is set, and {type(self).__name__} makes students that train as a whole; set it to null"
            )
        if options.policy_points > 1:
            raise ConfigurationError(
                f"student.policy_points is {options.policy_points}, and {type(self).__name__} makes students without policies; "
                "set it to 1"
            )
        if options.time_embedding == "rescaled":
            raise ConfigurationError(
                f"student.time_embedding is rescaled, which {type(self).__name__} has not; choose smooth or original"
            )
        if options.pretrained is not None:
            raise ConfigurationError(
                f"student.pretrained is set, and {type(self).__name__} makes students that start as their teacher; set it to "
                "null"
            )

    @abstractmethod
    def load(self, encoders: bool = True) -> None:
        """Load the text encoders and the autoencoder, frozen and in evaluation mode.

        Args:
            encoders: Whether prompts and pictures will be encoded. Where they come encoded, there are no text encoders, and
                the autoencoder stays on the CPU, but for the time that it decodes; what is saved is whole in any case.
        """

    @abstractmethod
    def load_teacher(self) -> nn.Module:
        """Load the teacher's network, frozen and in evaluation mode."""

    @abstractmethod
    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, SmoothTimeReport | None]:
        """A trainable copy of the teacher that takes (r, t), or, with LoRA, a network on the teacher's own weights.

        Returns:
            The student, and how well its refitted time embedder follows the teacher's (None if it was not refitted here).
        """

    def unsharded_copy(self, network: nn.Module) -> nn.Module:
        """The network itself, or of one that is spread over processes a whole copy on the CPU of the first of them."""
        return network

    def meta_student(self, options: StudentOptions) -> nn.Module:
        """A student as `build_student` makes it, whose weights take no memory, and without LoRA.

        Raises:
            ConfigurationError: If the family has none.
        """
        raise ConfigurationError(
            f"adapter is {type(self).__name__}, which does not export checkpoints; let ExportPipeline do it at the end of fit"
        )

    @abstractmethod
    def encoding_settings(self) -> dict[str, Any]:
        """What latents and conditions depend on, as plain values by name, so that those of another teacher can be told.

        Raises:
            ConfigurationError: If there is nothing to tell them by.
        """

    @abstractmethod
    def encode_prompt(self, prompts: list[str]) -> Condition:
        """Conditions of B prompts; the empty prompt gives the null condition of classifier-free guidance."""

    @abstractmethod
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by name, for methods that train them."""

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
        """Times (nfe + 1,) of sampling, from 1 down to 0, float32 on the CPU."""
        return step_grid(nfe, self.time_shift(latent_shape))

    @abstractmethod
    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: Tensor | float | None = None
    ) -> Tensor:
        """Velocity (B, C, h, w) by one forward; the guidance scale goes in where the checkpoint embeds it."""

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
        """The student's average velocity (B, C, h, w) from t down to r, by one forward."""

    def policy(
        self,
        student: nn.Module,
        x_t: Tensor,
        r: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: Tensor | float | None = None,
    ) -> Tensor:
        """A student's outputs for a whole step from t down to r, N velocities (B, N, C, h, w), by one forward.

        Args:
            student: With `StudentOptions.policy_points` above 1, which is N.
            x_t: (B, C, h, w).
            r: (B,).
            t: (B,).
            condition: Of the prompts.
            guidance_scale: Goes in where the checkpoint embeds it.

        Raises:
            ConfigurationError: If the family's students have no policies.
        """
        raise ConfigurationError(f"{type(self).__name__} knows no students with policies; choose another method than PiFlow")

    def feature_widths(self, layers: Sequence[int] | None = None) -> dict[int, int]:
        """Width D of the features that enter each of these layers of a network; before anything is loaded.

        Args:
            layers: Places of transformer blocks, from 0; None is four of them, the last and others evenly before it.

        Raises:
            ConfigurationError: If there is no such layer, or the adapter shows no features.
        """
        raise self._has_no_features()

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
        """Tokens (B, N, D) that enter some layers in one forward, with gradients to x_t and the network where they are on.

        They are the image's, and, where a block takes both in one sequence, the prompt's as well.

        Args:
            network: Teacher, student or a critic.
            x_t: (B, C, h, w).
            r: Ends (B,) of a network of two times; None is the velocity at t.
            t: (B,).
            condition: Of the prompts.
            layers: As of `feature_widths`.
            guidance_scale: Goes in where the checkpoint embeds it.

        Raises:
            ConfigurationError: If the adapter shows none.
        """
        raise self._has_no_features()

    def _has_no_features(self) -> ConfigurationError:
        return ConfigurationError(
            f"adapter is {type(self).__name__}, which does not show the features that discriminators look at; choose a method "
            "without one, or take DiffusersAdapter"
        )

    @abstractmethod
    def save_student(self, student: nn.Module, directory: Path) -> None:
        """Write the student as its library loads it, with all its components and the code it needs."""

    def merge_lora(self, student: nn.Module) -> nn.Module:
        """A student whose low-rank updates are part of its weights; the student itself if it has none."""
        return student

    def save_lora(self, student: nn.Module, directory: Path) -> None:
        """Write the weights alone that a LoRA student trains, and what it takes to put them on their base again.

        Raises:
            ConfigurationError: If the adapter makes no such students.
        """
        raise ConfigurationError(f"{type(self).__name__} makes no students with LoRA; export this one as a whole")

    @abstractmethod
    def save_teacher(self, network: nn.Module, directory: Path) -> None:
        """Write a network of one time as its library loads it without further code, with all its components."""

    def frozen_routing(self) -> AbstractContextManager[Any]:
        """A context in which all passes of a network decide alike where it chooses, as mixtures of experts do."""
        return nullcontext()

    def null_for(self, condition: Condition, null_condition: Condition) -> Condition:
        """The condition of guidance's second branch, of the prompts' own or, as here, that of the empty prompt."""
        return null_condition

    def mix_guidance(self, v_cond: Tensor, v_null: Tensor, scale: Tensor) -> Tensor:
        """The guided velocity of two branches, (B, C, h, w) each, under scales (B,): `v_null + scale (v_cond - v_null)`."""
        return classifier_free(v_cond, v_null, scale)

    def stock_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments by which the pipeline of `save_teacher` draws as training does, besides prompt, steps and size."""
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
        """Velocity under guidance: embedded where the checkpoint takes it, else by two branches (arXiv 2207.12598).

        Args:
            network: A teacher.
            x_t: (B, C, h, w).
            t: (B,).
            condition: Of the prompts.
            null_condition: Of the empty prompt, likewise of B rows.
            guidance_scale: w of `v_null + w (v_c - v_null)`; 1 is no guidance. A number or (B,).
            guidance_interval: Times between which two-branch guidance applies (arXiv 2404.07724).
        """
        if self.embeds_guidance:
            return self.velocity(network, x_t, t, condition, guidance_scale)
        if isinstance(guidance_scale, float | int) and guidance_scale == 1:
            return self.velocity(network, x_t, t, condition)
        # The second branch is computed for the rows that are guided only.
        scale = torch.as_tensor(guidance_scale, device=t.device, dtype=torch.float32).expand(len(t))
        rows = (inside_interval(t, guidance_interval) & (scale != 1)).nonzero()[:, 0]
        null = self.null_for(condition, null_condition)
        both = {name: torch.cat([value, null[name][rows]]) for name, value in condition.items()}
        v = self.velocity(network, torch.cat([x_t, x_t[rows]]), torch.cat([t, t[rows]]), both)
        v_cond, v_null = v.split([len(x_t), len(rows)])
        return v_cond.index_copy(0, rows, self.mix_guidance(v_cond[rows], v_null, scale[rows]))
