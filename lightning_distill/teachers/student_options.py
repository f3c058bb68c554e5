"""How students are built from their teachers."""

from dataclasses import dataclass
from typing import Literal

from lightning_distill.errors import ConfigurationError


@dataclass(frozen=True)
class LoraOptions:
    r"""Low-rank updates of a network's linear layers, :math:`W + \frac{\alpha}{\text{rank}} B A` (LoRA, arXiv 2106.09685).

    A and B are float32 whatever the precision of W, and B starts as zeros. There is no dropout: a derivative along time takes
    the network as one function.

    Args:
        rank: Rows of A, at least 1.
        alpha: Scale of the update, above 0; None is the rank, so that the update is B A.
        targets: Ends of the names of linear layers in the transformer's blocks, such as "to_q"; None is what the family's
            `lora_targets` says, attention and feed-forward.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"lora.rank is {self.rank}; take at least 1, 64 is usual, or set lora to null for none")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigurationError(f"lora.alpha is {self.alpha}; set it above 0, or to null for the rank")
        if self.targets is not None and not self.targets:
            raise ConfigurationError("lora.targets is empty; name linear layers, or set it to null for the family's own")


@dataclass(frozen=True)
class StudentOptions:
    """How a student's time inputs are built from its teacher's.

    Args:
        interval_embedding: "zero": the second time input starts without effect, so the student starts as the teacher.
            "clone": it starts as a copy of the timestep embedder (arXiv 2512.13006), and the student does not.
        time_embedding: "smooth": refitted on features of bounded frequency. "original": the teacher's own. "rescaled":
            the teacher's own, fed times in [0, 1] in place of [0, 1000], which the student has to be taught: by
            `TimestepRescaling`, from whose export other methods start.
        frequency_bound: Largest angular frequency of smooth features, in rad per unit of t.
        derivative_penalty: Weight of the squared derivative along t in the refit; larger is smoother and further from the
            teacher.
        gradient_checkpointing: Whether blocks are run again in the backward pass instead of keeping their activations.
        max_drift: Largest relative change of the teacher's velocities that the refit may cause on a probe batch; not looked at
            where the interval input starts as a clone, which changes them by itself.
        policy_points: Outputs of a policy for a whole step (`models.policy`), which `PiFlow` trains, and other methods that go
            on from its students; 1 is none.
        lora: None: every weight trains, in a copy of the teacher in float32. Else the student's weights are the teacher's own,
            in one memory, and low-rank updates and the time embedders train.
        pretrained: None: the student starts as its teacher. Else a student that was exported before, whose weights it starts
            with: a shipped name ("shapes-student"), a pipeline directory, or a hub id. Its own settings must be those above.
    """

    interval_embedding: Literal["zero", "clone"] = "zero"
    time_embedding: Literal["smooth", "original", "rescaled"] = "smooth"
    frequency_bound: float = 6.2832
    derivative_penalty: float = 3e-4
    gradient_checkpointing: bool = False
    max_drift: float = 0.1
    policy_points: int = 1
    lora: LoraOptions | None = None
    pretrained: str | None = None
