"""Two-time transformers: transformers of diffusers that receive the end of a step as well as its start.

Every exported student contains a copy of this file. It imports only torch and diffusers, and runs without this package.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Name suffixes of diffusers' attention projections."""
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Name suffixes of attention projections, with those of the prompt's tokens."""
FEED_FORWARD = ("net.0.proj", "net.2")
"""Name suffixes of diffusers' feed-forward layers."""


def at_least_float32(x: Tensor) -> Tensor:
    """Convert a tensor to float32, unless it is float64."""
    return x if x.dtype == torch.float64 else x.float()


class SmoothTimeProjection(nn.Module):
    """Bounded-frequency sinusoidal time features (smooth time), in place of diffusers' `Timesteps`.

    The original features of a flow model have angular frequencies up to 1000 rad per unit of t. The derivative of the network
    along t inherits these frequencies. Here they are evenly spaced from pi / 4 to `frequency_bound`.

    Args:
        frequency_bound: Largest angular frequency, in rad per unit of t; above pi / 4.
        channels: Number of features; half of them are cosines.
    """

    def __init__(self, frequency_bound: float, channels: int = 256) -> None:
        super().__init__()
        self.frequency_bound = frequency_bound
        self.channels = channels

    def forward(self, t: Tensor) -> Tensor:
        """Compute features (B, channels), at least float32, of times (B,) in [0, 1]."""
        t = at_least_float32(t)
        # Not a buffer: `module.to(bfloat16)` would round the frequencies.
        frequencies = torch.linspace(torch.pi / 4, self.frequency_bound, self.channels // 2, device=t.device, dtype=t.dtype)
        angles = t[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScaledTimeProjection(nn.Module):
    """Original time features of a model.

    Args:
        features: Module that computes features of the model's times.
        scale: The model's time at noise, usually 1000.
    """

    def __init__(self, features: nn.Module, scale: float) -> None:
        super().__init__()
        self.features = features
        self.scale = scale

    def forward(self, t: Tensor) -> Tensor:
        """Compute features (B, F) of times (B,) in [0, 1]."""
        result: Tensor = self.features(t * self.scale)
        return result


class Float32TimestepEmbedding(TimestepEmbedding):
    """A `TimestepEmbedding` whose weights stay float32 when the model is cast to a lower precision.

    In bfloat16 a time near 1 has a resolution of 0.004, too coarse for a derivative along it.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32TimestepEmbedding":
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(move_only, recurse)

    @property
    def layers(self) -> tuple[nn.Linear, nn.Module, nn.Linear]:
        """First layer, activation and last layer."""
        return self.linear_1, self.act, self.linear_2

    def embed(self, features: Tensor) -> Tensor:
        """Embed features (B, F) to (B, D), in the dtype of the weights."""
        first, activation, last = self.layers
        result: Tensor = last(activation(first(features.to(first.weight.dtype))))
        return result


class StudentOnlyModule:
    """Marks modules that a student has in addition to its teacher's weights."""


class TwoTimeEmbedding(Float32TimestepEmbedding, StudentOnlyModule):
    r"""Replacement of a transformer's timestep embedder, which embeds t and r in float32.

    .. math:: e = E_t(\phi(t)) + E_\Delta(\phi_s(t - r)).

    The transformer computes its embedder's input in the dtype of its weights, too imprecise for a derivative. This embedder
    therefore ignores the values of its input. `TwoTimeModel` sets the times for the duration of a forward pass.

    Args:
        like: Embedder to replace; its weights are not copied.
        features: The model's original :math:`\phi`, for times in [0, 1].
        interval_embedding: As in `TwoTimeModel`.
        time_frequency_bound: As in `TwoTimeModel`.
        interval_frequency_bound: As in `TwoTimeModel`.
    """

    embeds_end: ClassVar[bool] = False
    """Whether the embedding is that of r alone, and the stock embedder receives the end of the step."""

    def __init__(
        self,
        like: TimestepEmbedding,
        features: nn.Module,
        interval_embedding: str,
        time_frequency_bound: float | None,
        interval_frequency_bound: float,
    ) -> None:
        channels, width, out = like.linear_1.in_features, like.linear_1.out_features, like.linear_2.out_features
        # A refit needs biases, which some models lack.
        bias = like.linear_1.bias is not None or time_frequency_bound is not None
        super().__init__(channels, width, out_dim=out, sample_proj_bias=bias)
        self.time_proj = features if time_frequency_bound is None else SmoothTimeProjection(time_frequency_bound, channels)
        self.interval_embedder: Float32TimestepEmbedding | None = None
        self.interval_proj: nn.Module | None = None
        if interval_embedding != "none":
            cloned = interval_embedding == "clone"
            self.interval_embedder = Float32TimestepEmbedding(
                channels, width, out_dim=out, sample_proj_bias=bias if cloned else True
            )
            self.interval_proj = self.time_proj if cloned else SmoothTimeProjection(interval_frequency_bound, channels)
        self.times: tuple[Tensor, Tensor] | None = None

    def reset_interval_embedding(self, clone: bool) -> None:
        """Initialise the interval embedder: zeros in the last layer, or a copy of the timestep embedder."""
        if self.interval_embedder is None:
            return
        if clone:
            for layer, own in zip(self.interval_embedder.layers, self.layers, strict=True):
                layer.load_state_dict(own.state_dict())
        else:
            first, _, last = self.interval_embedder.layers
            with torch.random.fork_rng(devices=[]):  # independent of the run's seed, and of how the student is built
                torch.default_generator.manual_seed(0)  # torch.manual_seed would also change the state of GPU generators
                first.load_state_dict(nn.Linear(first.in_features, first.out_features).state_dict())
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def embed_times(self, t: Tensor, r: Tensor) -> Tensor:
        """Embed a step from t (B,) down to r (B,) to (B, D), in the dtype of the weights."""
        # Autocast would round times and features to 16 bits.
        with torch.autocast(t.device.type, enabled=False):
            vector = self.embed(self.time_proj(t))
            if self.interval_embedder is not None and self.interval_proj is not None:
                vector = vector + self.interval_embedder.embed(self.interval_proj(t - r))
        return vector

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embedding (B, D) of the times that are set, in the dtype of `sample`; the values of `sample` are ignored."""
        if self.times is None:
            raise RuntimeError("no times are set; call the transformer, not its embedder")
        return self.embed_times(*self.times).to(sample.dtype)


class TwoTimeModel(ModelMixin, ConfigMixin):
    r"""Transformer of diffusers with float32 time embeddings and, for a student, a second time input.

    Inherit it before the stock class. A `TwoTimeEmbedding` replaces each timestep embedder; everything else is the stock
    class's. With the default settings the model computes the same as the stock class, up to the precision of time. Teachers are
    therefore loaded as this class, too.

    Args:
        interval_embedding: "none" for a network of t alone. "zero" for an :math:`E_\Delta` whose last layer is zero at the
            start, so that the network is independent of r. "clone" for an :math:`E_\Delta` that starts as a copy of
            :math:`E_t`, with the same features for t - r (arXiv 2512.13006, section 4.2).
        time_frequency_bound: Frequency bound of smooth time features, in rad per unit of t; None means the original features.
        interval_frequency_bound: Frequency bound of the features of the interval t - r, for "zero".
        rescaled_time: Whether the original features receive a thousandth of the model's times. Their angular frequencies then
            end at 1 rad per unit of t (arXiv 2512.13006, section 4.2.1). Not supported with smooth features.
        policy_points: Number of a policy's outputs for a full step (`policy`), which are mixed to the average velocity. 1 means
            the original output, without a policy.
        **kwargs: Arguments of the stock class.

    Raises:
        ValueError: If `interval_embedding` is unknown, `rescaled_time` is combined with smooth features, or `policy_points` is
            above 1 in a family without policies.
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["timestep_embedder", "grid"]
    timestep_scale: ClassVar[float] = 1.0
    """The stock forward's `timestep` at noise: 1 or 1000."""
    feature_scale: ClassVar[float] = 1000.0
    """Time at noise that the original features receive."""
    stock_rounds_times: ClassVar[bool] = True
    """Whether the stock pipeline rounds the scheduler's timesteps to the dtype of its latents."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Default LoRA targets in the blocks: name suffixes of linear layers for attention and feed-forward."""
    output_layer: ClassVar[str | None] = None
    """Last layer, whose output tokens are the velocity. None if other operations follow it, which rules out policies."""
    policy_head_class: ClassVar[type[nn.Module] | None] = None
    """Last layer of students with a policy, such as `PolicyHead`.

    Each family's file imports this class, because diffusers finds only what that file imports.
    """
    unused_modules: ClassVar[tuple[str, ...]] = ()
    """Modules with unused results, such as those for the prompt's tokens in the last block; `-1` is the last item of a list."""

    @register_to_config
    def __init__(
        self,
        interval_embedding: str = "none",
        time_frequency_bound: float | None = None,
        interval_frequency_bound: float = 2 * torch.pi,
        rescaled_time: bool = False,
        policy_points: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if interval_embedding not in ("none", "zero", "clone"):
            raise ValueError(f"interval_embedding is {interval_embedding!r}; choose 'none', 'zero' or 'clone'")
        if rescaled_time and time_frequency_bound is not None:
            raise ValueError("rescaled_time needs the model's original time features; set time_frequency_bound to None")
        if policy_points > 1:
            if self.output_layer is None or self.policy_head_class is None:
                raise ValueError(f"policy_points is {policy_points}, but {type(self).__name__} has no policies; set it to 1")
            stock = self.get_submodule(self.output_layer)
            self.set_submodule(self.output_layer, self.policy_head_class(stock, policy_points))
        settings = (interval_embedding, time_frequency_bound, interval_frequency_bound)
        for name, stock in list(self.named_modules()):
            if (replacement := self.embedder_class(name.rpartition(".")[2])) is not None:
                features = self.time_features(name)
                if rescaled_time:
                    features = ScaledTimeProjection(features, 1e-3)
                self.set_submodule(name, replacement(stock, features, *settings))

    def unused_module_names(self) -> list[str]:
        """Full names of `unused_modules`. Their weights get no gradient, and DDP would wait for it."""
        names = []
        for part in self.unused_modules:
            blocks, _, rest = part.partition(".-1.")
            names.append(f"{blocks}.{len(self.get_submodule(blocks)) - 1}.{rest}")
        return names

    def embedder_class(self, name: str) -> type[TwoTimeEmbedding] | None:
        """Class that replaces a module with this name in its parent, or None."""
        return TwoTimeEmbedding if name == "timestep_embedder" else None

    def time_features(self, embedder: str) -> nn.Module:
        """Original features of one of the stock class's embedders, for times in [0, 1]."""
        return ScaledTimeProjection(self.get_submodule(f"{embedder.rpartition('.')[0]}.time_proj"), self.feature_scale)

    def stock_time_arguments(self, t: Tensor, r: Tensor) -> dict[str, Tensor]:
        """Convert times to arguments of the stock forward."""
        return {"timestep": t * self.timestep_scale}

    def stock_time_features(self, embedder: str, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Features (N, F) that the stock pipeline computes for one of its embedders, at least float32.

        Args:
            embedder: Name of the embedder.
            timesteps: Timesteps (N,) of the stock scheduler in [0, 1000], float32.
            dtype: Dtype of the stock transformer and its latents.
        """
        times = timesteps.to(dtype) if self.stock_rounds_times else timesteps
        if self.timestep_scale == 1:
            times = times / 1000 * self.feature_scale
        features: Tensor = self.get_submodule(f"{embedder.rpartition('.')[0]}.time_proj")(times)
        return features

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Collect the settings of all parent classes, so that a configuration includes those of the stock class."""
        keys: set[str] = set()
        for parent in input_class.__mro__:
            if (init := vars(parent).get("__init__")) is not None:
                keys |= inspect.signature(init).parameters.keys()
        return keys - {"args"}

    @property
    def is_stock(self) -> bool:
        """Whether the stock class can represent this network: one time, its original features, and no policy."""
        config = self.config
        has_original_time = config.time_frequency_bound is None and not config.rescaled_time
        return config.interval_embedding == "none" and has_original_time and config.policy_points == 1

    @property
    def timestep_embedders(self) -> list[TwoTimeEmbedding]:
        """All timestep embedders; most models have one."""
        return [module for module in self.modules() if isinstance(module, TwoTimeEmbedding)]

    def reset_interval_embedding(self) -> None:
        """Initialise the interval input: without effect, or as a copy of the timestep embedder.

        Raises:
            ValueError: If `interval_embedding` is "none".
        """
        kind = self.config.interval_embedding
        if kind == "none":
            raise ValueError("interval_embedding is 'none': this network has no interval embedder to reset")
        for embedder in self.timestep_embedders:
            embedder.reset_interval_embedding(clone=kind == "clone")

    @property
    def policy_head(self) -> Any:
        """Last layer of a network with a policy, or None."""
        layer = self.output_layer
        return None if layer is None or self.config.policy_points == 1 else self.get_submodule(layer)

    def forward(
        self, *args: Any, timestep: Tensor, timestep_r: Tensor | None = None, all_points: bool = False, **kwargs: Any
    ) -> Any:
        """Average velocity from t down to r, or the velocity at t if r is None.

        Args:
            *args: Arguments of the stock forward.
            timestep: t (B,) in [0, 1], float32 for any dtype of the states; 1 is noise.
            timestep_r: r (B,) in [0, t], or None for r = t.
            all_points: Whether to return all outputs of a policy; N output rows then replace each row.
            **kwargs: Keyword arguments of the stock forward.

        Returns:
            Result of the stock forward.
        """
        t = at_least_float32(timestep)
        r = t if timestep_r is None else at_least_float32(timestep_r)
        embedders, head = self.timestep_embedders, self.policy_head
        for embedder in embedders:
            embedder.times = t, r
        if head is not None:
            head.set_mixture(r, t, all_points)
        try:
            return super().forward(*args, **self.stock_time_arguments(t, r), **kwargs)
        finally:
            for embedder in embedders:
                embedder.times = None
            if head is not None:
                head.mixture = None
