"""Options of students: time embeddings, LoRA and initial weights."""

import math
from dataclasses import dataclass
from typing import Literal

from lightning_distill.errors import ConfigurationError


@dataclass(frozen=True)
class LoraOptions:
    r"""Low-rank updates of linear layers, :math:`W + \frac{\alpha}{\text{rank}} B A` (LoRA, arXiv 2106.09685).

    A and B are float32 for every dtype of W, and B starts as zeros. There is no dropout, because a derivative along time
    needs a deterministic network.

    Args:
        rank: Rows of A, at least 1.
        alpha: Scale of the update, above 0. None: equal to the rank, so that the update is B A.
        targets: Name endings of linear layers in the transformer blocks, such as "to_q". None: `lora_targets` of the family,
            the attention and feed-forward layers.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"lora.rank is {self.rank}; set it to at least 1 (64 is usual), or lora to null")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigurationError(f"lora.alpha is {self.alpha}; set it above 0, or to null to use lora.rank")
        if self.targets is not None and not self.targets:
            raise ConfigurationError("lora.targets is empty; list name endings of linear layers, or set it to null")


@dataclass(frozen=True)
class StudentOptions:
    """Options for building a student from its teacher.

    Args:
        interval_embedding: Initialisation of the second time input. "zero": it has no effect at first, so the student starts
            as the teacher. "clone": it is a copy of the timestep embedder (arXiv 2512.13006), so the student differs. "none":
            there is no such input, and the time embedders stay the teacher's, for methods that evaluate the student at r = 0
            only, with `time_embedding` "original".
        time_embedding: "smooth": refitted on features of bounded frequency. "original": the teacher's embedding. "rescaled":
            the teacher's embedding with times in [0, 1] in place of [0, 1000]. The student has to learn rescaled times with
            `TimestepRescaling`; other methods start from its export.
        frequency_bound: Largest angular frequency of smooth features, in rad per unit of t.
        derivative_penalty: Weight of the squared derivative along t in the refit. Larger values give a smoother embedding
            that is further from the teacher's.
        gradient_checkpointing: Whether the backward pass recomputes the activations of blocks instead of storing them.
        max_drift: Largest relative change of the teacher's velocities that the refit may cause, on a probe batch. Not checked
            if the interval input starts as a clone, which itself changes the velocities.
        policy_points: Number of outputs of a policy for one step (`students.policy`); 1 is no policy. `PiFlow` trains
            policies, and other methods can continue from its students.
        lora: None: the student is a copy of the teacher in float32, and every weight trains. Otherwise the student shares the
            teacher's weights in memory, and only low-rank updates and the time embedders train.
        pretrained: None: the student starts as its teacher. Otherwise it starts with the weights of an exported student:
            a shipped name ("shapes-student"), a pipeline directory, or a hub id. Its settings must equal those above.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    interval_embedding: Literal["zero", "clone", "none"] = "zero"
    time_embedding: Literal["smooth", "original", "rescaled"] = "smooth"
    frequency_bound: float = 6.2832
    derivative_penalty: float = 3e-4
    gradient_checkpointing: bool = False
    max_drift: float = 0.1
    policy_points: int = 1
    lora: LoraOptions | None = None
    pretrained: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.frequency_bound < math.inf:
            raise ConfigurationError(f"student.frequency_bound is {self.frequency_bound}; set it above 0, 6.2832 is usual")
        if not 0 <= self.derivative_penalty < math.inf:
            raise ConfigurationError(
                f"student.derivative_penalty is {self.derivative_penalty}; set it to 0 for none, or above, 0.0003 is usual"
            )
        if not self.max_drift >= 0:
            raise ConfigurationError(f"student.max_drift is {self.max_drift}; set it to 0 or more, 0.1 is usual")
        if self.policy_points < 1:
            raise ConfigurationError(f"student.policy_points is {self.policy_points}; set it to 1 for no policy, or above")
        if self.interval_embedding == "none" and self.time_embedding != "original":
            raise ConfigurationError(
                f"student.interval_embedding is none, but student.time_embedding is {self.time_embedding}; set it to original, "
                "or interval_embedding to zero"
            )
        if self.interval_embedding == "none" and self.policy_points > 1:
            raise ConfigurationError(
                f"student.interval_embedding is none, but student.policy_points is {self.policy_points}, and a policy needs "
                "the end of its step; set policy_points to 1, or interval_embedding to zero"
            )
