"""Scheduler of few-step students: steps along average velocities.

Every exported student contains a copy of this file. It imports only torch and diffusers, and runs without this package.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor


class AverageVelocityScheduler(SchedulerMixin, ConfigMixin):
    r"""Scheduler for networks that predict average velocities (MeanFlow, arXiv 2505.13447, Eq. 12).

    .. math:: x_r = x_t - (t - r) \, u(x_t, r, t).

    Stochastic sampling is that of consistency models (arXiv 2303.01469, Algorithm 1). Each step predicts x0 and re-noises it,
    and the network always receives r = 0:

    .. math:: x_r = (1 - r) (x_t - t \, u(x_t, 0, t)) + r \, \text{noise}.

    Times are in [0, 1]; 1 is noise. The network receives them unscaled, not times 1000.

    Args:
        shift: Shift of the time grid toward noise; 1 is an evenly spaced grid.
        use_dynamic_shifting: Whether the shift grows with the resolution, as `exp(mu)` with FLUX's mu. The pipeline computes
            it.
        base_shift: mu at `base_image_seq_len` tokens.
        max_shift: mu at `max_image_seq_len` tokens.
        base_image_seq_len: Image tokens of the smallest resolution.
        max_image_seq_len: Image tokens of the largest resolution.
        stochastic_sampling: Whether steps predict x0 and re-noise it.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        stochastic_sampling: bool = False,
    ) -> None:
        self.times = torch.tensor([1.0, 0.0])

    @property
    def timesteps(self) -> Tensor:
        """Start of each step (N,), decreasing from 1."""
        return self.times[:-1]

    @property
    def intervals(self) -> list[tuple[Tensor, Tensor]]:
        """Start t of each step and the end r that the network receives, as float32 scalars."""
        ends = torch.zeros_like(self.times[1:]) if self.config.stochastic_sampling else self.times[1:]
        return list(zip(self.times[:-1].unbind(), ends.unbind(), strict=True))

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, shift: float | None = None
    ) -> None:
        """Set the time grid.

        The grid is computed in float64 on the CPU and rounded once. It equals the training grid bit for bit.

        Args:
            num_inference_steps: Number of steps, at least 1.
            device: Device of the times.
            shift: Shift instead of the configured one; required under `use_dynamic_shifting`.

        Raises:
            ValueError: If num_inference_steps is less than 1, or a required shift is missing.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; set it to at least 1")
        if shift is None:
            if self.config.use_dynamic_shifting:
                raise ValueError("use_dynamic_shifting is true, but no shift is given; pass the shift")
            shift = self.config.shift
        even = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64, device="cpu")
        self.times = (shift * even / (1 + (shift - 1) * even)).to(torch.float32).to(device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """State at the end of the step that starts at `timestep`.

        Args:
            model_output: Average velocity u over the step, (B, ...).
            timestep: Start t of the step, one of `timesteps`.
            sample: State x_t, (B, ...).
            generator: Random number generator of stochastic sampling, one for all samples or one per sample.
            return_dict: Whether to return a `SchedulerOutput` instead of a tuple.

        Returns:
            x_r, float32, as `prev_sample` or in a tuple.

        Raises:
            ValueError: If no step of the grid starts at `timestep`.
        """
        matches = (self.timesteps == torch.as_tensor(timestep, device=self.times.device)).nonzero()
        if not len(matches):
            raise ValueError(f"no step starts at timestep {float(timestep)}; pass one of {self.timesteps.tolist()}")
        t, r = self.intervals[matches[0]]
        # bfloat16 would round steps of 1/32 and below away.
        x_r = sample.float() - (t - r) * model_output.float()
        end = self.times[int(matches[0]) + 1]
        if self.config.stochastic_sampling and end > 0:
            noise = randn_tensor(x_r.shape, generator=generator, device=x_r.device, dtype=torch.float32)
            x_r = (1 - end) * x_r + end * noise
        return SchedulerOutput(prev_sample=x_r) if return_dict else (x_r,)

    def __len__(self) -> int:
        return len(self.timesteps)
