"""The flow of Gaussian data in closed form."""

from dataclasses import dataclass

from torch import Tensor

from lightning_distill.flow.path import expand


@dataclass(frozen=True)
class GaussianTeacher:
    """The linear path's flow for data with independent entries `x0 ~ N(mean, std^2)`.

    The marginal at t is `N((1 - t) mean, sigma_t^2)` with `sigma_t^2 = (1 - t)^2 std^2 + t^2`. The flow conserves
    `(x_t - (1 - t) mean) / sigma_t`. All functions are differentiable in x, r and t, also at `r = t`.

    Args:
        mean: Mean of each entry of the data.
        std: Standard deviation of each entry of the data, above 0.
    """

    mean: float = 0.7
    std: float = 0.4

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t, in the shape of t."""
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """`E[noise - x0 | x_t = x]` for x (B, ...) and t (B,), by the regression of noise and x0 on x_t."""
        t = expand(t, x)
        offset = (x - (1 - t) * self.mean) / self.sigma(t) ** 2
        mean_noise = t * offset
        mean_x0 = self.mean + (1 - t) * self.std**2 * offset
        return mean_noise - mean_x0

    def flow_map(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """State at r (B,) of the trajectory through x (B, ...) at t (B,)."""
        t, r = expand(t, x), expand(r, x)
        return (1 - r) * self.mean + self.sigma(r) / self.sigma(t) * (x - (1 - t) * self.mean)

    def average_velocity(self, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """`(x - flow_map(x, t, r)) / (t - r)`. The factor t - r is canceled by hand, so that `r = t` gives the velocity."""
        t, r = expand(t, x), expand(r, x)
        slope = (t + r - self.std**2 * (2 - t - r)) / (self.sigma(t) + self.sigma(r))  # (sigma_t - sigma_r) / (t - r)
        return slope / self.sigma(t) * (x - (1 - t) * self.mean) - self.mean
