"""Guidance of the teacher in distillation, as a setting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_distill.errors import ConfigurationError


@dataclass(frozen=True)
class Guidance:
    """The guidance that is distilled into the student.

    Args:
        kind: "embedded": the checkpoint takes the guidance scale as an input (FLUX.1-dev). "two_branch": classifier-free
            guidance, `v_null + scale (v_c - v_null)`, inside `interval` (arXiv 2207.12598, 2404.07724). "improved": the mix
            of teacher and student, `omega v_T + kappa u_c + (1 - omega - kappa) u_null` (MeanFlow, arXiv 2505.13447,
            App. B.2). It needs caption dropout, which trains u_null. Its fixed point is two-branch guidance at
            `two_branch_scale`, with v_T evaluated at `scale` if the checkpoint takes a guidance scale.
        scale: Guidance scale, at least 0; 1 is no guidance. 3.5 is usual for FLUX.1-dev.
        scales: Scales for kind "embedded"; one is sampled for each training sample, in place of `scale`.
        interval: Times between which "two_branch" applies, within [0, 1].
        omega: Weight of the teacher in "improved".
        kappa: Weight of the conditional student in "improved", in (-1, 1).

    Raises:
        ConfigurationError: If settings contradict each other.
    """

    kind: Literal["embedded", "two_branch", "improved"] = "two_branch"
    scale: float = 1.0
    scales: Sequence[float] | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    omega: float = 1.0
    kappa: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ConfigurationError(f"guidance.scale is {self.scale}; set it to 0 or more, 1 is no guidance")
        if self.scales is not None and (not self.scales or not all(0 <= scale < math.inf for scale in self.scales)):
            raise ConfigurationError(
                f"guidance.scales is {list(self.scales)}; list scales of 0 or more, or set it to null for guidance.scale alone"
            )
        if not math.isfinite(self.omega):
            raise ConfigurationError(f"guidance.omega is {self.omega}; set it to a finite number, 1 is usual")
        if self.scales is not None and not min(self.scales) <= self.scale <= max(self.scales):
            raise ConfigurationError(
                f"guidance.scale is {self.scale}, at which validation samples, and guidance.scales {list(self.scales)} do not "
                "train it; set it between the smallest and the largest of them"
            )
        if self.scales is not None and self.kind != "embedded":
            raise ConfigurationError(
                f"guidance.scales is set, and guidance.kind is {self.kind}: a student without a guidance input cannot learn "
                "several scales; set guidance.scale, or guidance.kind to embedded"
            )
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ConfigurationError(f"guidance.interval is {list(self.interval)}; give two increasing times within [0, 1]")
        if self.interval != (0.0, 1.0) and self.kind != "two_branch":
            raise ConfigurationError(f"guidance.interval applies to kind two_branch only, and kind is {self.kind}; remove it")
        if not -1 < self.kappa < 1:
            raise ConfigurationError(f"guidance.kappa is {self.kappa}; keep it between -1 and 1, 0.5 is usual")

    @property
    def two_branch_scale(self) -> float:
        """Scale of the two-branch guidance at the fixed point of "improved"."""
        return self.omega / (1 - self.kappa)

    def check(self, embeds_guidance: bool) -> None:
        """Raise `ConfigurationError` if the checkpoint does not support this kind of guidance."""
        if self.kind == "embedded" and not embeds_guidance:
            raise ConfigurationError(
                "guidance.kind is embedded, but this checkpoint has no guidance input; use two_branch or improved"
            )
        if self.kind == "two_branch" and embeds_guidance:
            raise ConfigurationError(
                "guidance.kind is two_branch, but this checkpoint takes the guidance scale as an input; use embedded"
            )
        if self.kind == "improved" and not embeds_guidance and self.scale != 1:
            raise ConfigurationError(
                f"guidance.scale is {self.scale}, and this checkpoint has no guidance input; improved guidance has the "
                f"scale omega / (1 - kappa) = {self.two_branch_scale:g}; set guidance.omega and guidance.kappa, and scale to 1"
            )
