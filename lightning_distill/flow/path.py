"""The linear path between data and noise, `x_t = (1 - t) x0 + t noise` (arXiv 2209.03003, 2210.02747).

Times are (B,), in [0, 1]; 1 is noise. States are (B, ...), usually latents (B, C, h, w). Times in float32 promote states of
lower precision to float32. This is intended: bfloat16 would round a step of 1/32 away.
"""

from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Reshape times (B,) to (B, 1, ..., 1), so that they broadcast against states `like` (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """State on the path, `x_t = (1 - t) x0 + t noise`.

    Args:
        x0: Data, (B, ...).
        noise: Standard normal noise, (B, ...).
        t: (B,), in [0, 1].

    Returns:
        x_t, (B, ...).
    """
    t = expand(t, x0)
    return (1 - t) * x0 + t * noise


def conditional_velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """Velocity along the path of one pair, `d x_t / dt = noise - x0`, (B, ...); its mean given x_t is the velocity field."""
    return noise - x0


def predict_x0(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Clean end of the path through x_t with velocity v, `x_t - t v`, (B, ...)."""
    return x_t - expand(t, x_t) * v


def predict_noise(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Noisy end of the path through x_t with velocity v, `x_t + (1 - t) v`, (B, ...)."""
    return x_t + (1 - expand(t, x_t)) * v


def flow_step(x_t: Tensor, u: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """State at r, reached from t with average velocity u, `x_r = x_t - (t - r) u` (MeanFlow, arXiv 2505.13447, Eq. 12).

    Args:
        x_t: State at t, (B, ...).
        u: Average velocity between r and t at x_t, (B, ...).
        r: End, (B,).
        t: Start, (B,). `r > t` steps toward noise.

    Returns:
        x_r, (B, ...).
    """
    return x_t - expand(t - r, x_t) * u


def renoise(x_s: Tensor, s: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """Re-noise a state from s to tau, `x_tau = a x_s + b noise`, without changing the path's marginals.

    The coefficient `a = (1 - tau) / (1 - s)` gives the data in x_tau the coefficient `1 - tau`. The coefficient b, with
    `b^2 = tau^2 - a^2 s^2`, gives the old and new noise together the variance `tau^2`.

    Args:
        x_s: State at s, (B, ...).
        s: Time of x_s, (B,), in [0, 1).
        tau: (B,), in [s, 1]. The result is NaN if `tau < s`.
        noise: Standard normal, independent of the noise in x_s, (B, ...).

    Returns:
        x_tau, (B, ...).
    """
    a = (1 - tau) / (1 - s)
    # b^2 is factored: where tau is just above s, the difference of squares cancels and may become negative.
    b = ((tau - s) * (tau + s - 2 * tau * s)).sqrt() / (1 - s)
    return expand(a, x_s) * x_s + expand(b, x_s) * noise
