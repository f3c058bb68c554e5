"""How the teacher is guided while it is distilled, as a setting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter


@dataclass(frozen=True)
class Guidance:
    """The guidance that a student learns to do without.

    Args:
        kind: "embedded": the checkpoint takes the guidance scale as an input (FLUX.1-dev). "two_branch": classifier-free
            guidance, `v_null + scale (v_c - v_null)`, inside `interval` (arXiv 2207.12598, 2404.07724). "improved": the mix
            of teacher and student, `omega v_T + kappa u_c + (1 - omega - kappa) u_null` (MeanFlow, arXiv 2505.13447,
            App. B.2); it needs some caption dropout, so that u_null is trained. Its fixed point is two-branch guidance at
            `two_branch_scale`, where v_T is embedded at `scale` if the checkpoint takes that.
        scale: Guidance scale; 1 is none. FLUX.1-dev's usual one is 3.5.
        scales: Scales of which one is drawn for each training sample, in place of `scale`, where it is embedded.
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
        if self.scale < 0 or (self.scales is not None and (not self.scales or min(self.scales) < 0)):
            raise ConfigurationError("guidance.scale and guidance.scales must not be negative; 1 is no guidance")
        if self.scales is not None and not min(self.scales) <= self.scale <= max(self.scales):
            raise ConfigurationError(
                f"guidance.scales is {list(self.scales)}, and guidance.scale, at which validation draws, {self.scale}, which "
                "is not learned; set it to one of them"
            )
        if self.scales is not None and self.kind != "embedded":
            raise ConfigurationError(
                f"guidance.scales needs guidance.kind embedded, and it is {self.kind}: a student without a guidance input "
                "cannot learn several scales; set guidance.scale"
            )
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ConfigurationError(f"guidance.interval is {list(self.interval)}; give two increasing times within [0, 1]")
        if self.interval != (0.0, 1.0) and self.kind != "two_branch":
            raise ConfigurationError(f"guidance.interval applies to kind two_branch only, and kind is {self.kind}; remove it")
        if self.kind == "improved" and not -1 < self.kappa < 1:
            raise ConfigurationError(f"guidance.kappa is {self.kappa}; keep it between -1 and 1, 0.5 is usual")

    @property
    def two_branch_scale(self) -> float:
        """Scale of the two-branch guidance that "improved" comes to."""
        return self.omega / (1 - self.kappa)

    def check(self, embeds_guidance: bool) -> None:
        """Raise `ConfigurationError` where the checkpoint does not go with the kind of guidance."""
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
                f"guidance.scale is {self.scale}, and this checkpoint has no guidance input; improved guidance comes to "
                f"omega / (1 - kappa), which is {self.two_branch_scale:g}: set those two, and scale to 1"
            )

    def teacher_velocity(
        self,
        adapter: ModelAdapter,
        teacher: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        null: Condition,
        scale: Tensor | float,
    ) -> Tensor:
        """The teacher's velocity (B, C, h, w) under the guidance that a student learns; where that is "improved", at its end.

        Args:
            adapter: The teacher's.
            teacher: The network.
            x_t: (B, C, h, w).
            t: (B,).
            condition: Of the prompts.
            null: Of the empty prompt, likewise of B rows.
            scale: A number or (B,), of `draw`.
        """
        if self.kind != "improved":
            return adapter.guided_velocity(teacher, x_t, t, condition, null, scale, self.interval)
        if not adapter.embeds_guidance:
            return adapter.guided_velocity(teacher, x_t, t, condition, null, self.two_branch_scale)
        v_cond = adapter.velocity(teacher, x_t, t, condition, scale)
        v_null = adapter.velocity(teacher, x_t, t, adapter.null_for(condition, null), scale)
        return adapter.mix_guidance(v_cond, v_null, torch.full_like(t, self.two_branch_scale))

    def draw(self, batch_size: int, device: torch.device) -> Tensor:
        """A scale for each sample (B,)."""
        if self.scales is None:
            return torch.full((batch_size,), self.scale, dtype=torch.float32, device=device)
        choices = torch.tensor(self.scales, dtype=torch.float32, device=device)
        return choices[torch.randint(len(choices), (batch_size,), device=device)]
