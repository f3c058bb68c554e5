"""The scheduler of few-step students: jumps along average velocities.

This file imports torch and diffusers only: it travels with every exported student and must run without this package.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor


class AverageVelocityScheduler(SchedulerMixin, ConfigMixin):
    r"""Steps of a network that predicts average velocities (MeanFlow, arXiv 2505.13447, Eq. 12).

    .. math:: x_r = x_t - (t - r) \, u(x_t, r, t).

    Under stochastic sampling, that of consistency models (arXiv 2303.01469, Algorithm 1), each step goes to data and back by
    fresh noise, and the network is asked for r = 0 only:

    .. math:: x_r = (1 - r) (x_t - t \, u(x_t, 0, t)) + r \, \text{noise}.

    Times lie in [0, 1] and 1 is noise; the network is told them as they are, not times 1000.

    Args:
        shift: Shift of the grid of times toward noise; 1 is an evenly spaced grid.
        use_dynamic_shifting: Whether the shift grows with the resolution, as `exp(mu)` with FLUX's mu; the pipeline knows how.
        base_shift: mu at `base_image_seq_len` tokens.
        max_shift: mu at `max_image_seq_len` tokens.
        base_image_seq_len: Image tokens of the smallest resolution.
        max_image_seq_len: Image tokens of the largest resolution.
        stochastic_sampling: Whether steps go to data and back by fresh noise.
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
        """Start of each step (N,), falling from 1."""
        return self.times[:-1]

    @property
    def intervals(self) -> list[tuple[Tensor, Tensor]]:
        """Start t of each step and the end r that the network is told, each a float32 scalar."""
        ends = torch.zeros_like(self.times[1:]) if self.config.stochastic_sampling else self.times[1:]
        return list(zip(self.times[:-1].unbind(), ends.unbind(), strict=True))

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, shift: float | None = None
    ) -> None:
        """Lay out the grid of times.

        The grid is computed in float64 on the CPU and rounded once: bit for bit the grid that the student was trained with.

        Args:
            num_inference_steps: Number of steps, at least 1.
            device: Where the times are kept.
            shift: In place of the configured one; needed under `use_dynamic_shifting`.

        Raises:
            ValueError: If there are no steps, or the shift is missing.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; give at least 1")
        if shift is None:
            if self.config.use_dynamic_shifting:
                raise ValueError("this scheduler shifts its times with the resolution; pass the shift")
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
        """The state at the end of the step that starts at `timestep`.

        Args:
            model_output: Average velocity u over the step, (B, ...).
            timestep: Start t of the step, one of `timesteps`.
            sample: State x_t, (B, ...).
            generator: Source of the noise of stochastic sampling, one for all samples or one a sample.
            return_dict: Whether to wrap the result.

        Returns:
            x_r, float32, as `prev_sample` or in a tuple.

        Raises:
            ValueError: If no step of the grid starts at `timestep`.
        """
        places = (self.timesteps == torch.as_tensor(timestep, device=self.times.device)).nonzero()
        if not len(places):
            raise ValueError(f"no step starts at timestep {float(timestep)}; take one of {self.timesteps.tolist()}")
        t, r = self.intervals[places[0]]
        # In bfloat16 the result would lose jumps of 1/32 and below.
        x_r = sample.float() - (t - r) * model_output.float()
        end = self.times[int(places[0]) + 1]
        if self.config.stochastic_sampling and end > 0:
            noise = randn_tensor(x_r.shape, generator=generator, device=x_r.device, dtype=torch.float32)
            x_r = (1 - end) * x_r + end * noise
        return SchedulerOutput(prev_sample=x_r) if return_dict else (x_r,)

    def __len__(self) -> int:
        return len(self.timesteps)
