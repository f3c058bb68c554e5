"""The linear path between data and noise, `x_t = (1 - t) x0 + t noise` (arXiv 2209.03003, 2210.02747).

Times are (B,), in [0, 1], and 1 is noise; states are (B, ...), most often latents (B, C, h, w). Times in float32 lift states
of lower precision to float32, which is wanted: a jump of 1/32 is lost in the rounding of bfloat16.
"""

from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Times (B,) as (B, 1, ..., 1), to be multiplied with states `like` (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """State on the path, `x_t = (1 - t) x0 + t noise`.

    Args:
        x0: Data, (B, ...).
        noise: Standard normal, (B, ...).
        t: (B,), in [0, 1].

    Returns:
        x_t, (B, ...).
    """
    t = expand(t, x0)
    return (1 - t) * x0 + t * noise


def conditional_velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """Velocity of one pair's path, `d x_t / dt = noise - x0`, (B, ...); its mean given x_t is the velocity field."""
    return noise - x0


def predict_x0(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Clean end of the path through x_t with velocity v, `x_t - t v`, (B, ...)."""
    return x_t - expand(t, x_t) * v


def predict_noise(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Noisy end of the path through x_t with velocity v, `x_t + (1 - t) v`, (B, ...)."""
    return x_t + (1 - expand(t, x_t)) * v


def flow_step(x_t: Tensor, u: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """State at r reached from t with average velocity u, `x_r = x_t - (t - r) u` (MeanFlow, arXiv 2505.13447, Eq. 12).

    Args:
        x_t: (B, ...).
        u: Average velocity between r and t at x_t, (B, ...).
        r: End, (B,).
        t: Start, (B,). `r > t` goes toward noise.

    Returns:
        x_r, (B, ...).
    """
    return x_t - expand(t - r, x_t) * u


def renoise(x_s: Tensor, s: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """Diffuse a state from s on to tau, `x_tau = a x_s + b noise`, such that the path's marginals are kept.

    With `a = (1 - tau) / (1 - s)` the data's share of x_tau is `1 - tau`, and with `b^2 = tau^2 - a^2 s^2` the variance of
    the old and the new noise together is `tau^2`.

    Args:
        x_s: (B, ...).
        s: Time of x_s, (B,), in [0, 1).
        tau: (B,), in [s, 1]. The result is NaN where `tau < s`.
        noise: Standard normal, independent of the noise in x_s, (B, ...).

    Returns:
        x_tau, (B, ...).
    """
    a = (1 - tau) / (1 - s)
    # b^2 factored: the difference of the two squares cancels, and may turn negative, where tau is just above s
    b = ((tau - s) * (tau + s - 2 * tau * s)).sqrt() / (1 - s)
    return expand(a, x_s) * x_s + expand(b, x_s) * noise
