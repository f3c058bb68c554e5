"""Transformers of diffusers that are told where a step ends as well as where it starts.

This file imports torch and diffusers only: it travels with every exported student and must run without this package.
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
"""Ends of the names of diffusers' projections for attention."""
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The same with those of the prompt's tokens."""
FEED_FORWARD = ("net.0.proj", "net.2")
"""Ends of the names of diffusers' feed-forward layers."""


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


class SmoothTimeProjection(nn.Module):
    """Sinusoidal features of bounded frequency, in place of diffusers' `Timesteps`.

    A flow model's own features oscillate with up to 1000 rad per unit of t, and the derivative of the network along t inherits
    that. Here the angular frequencies are spaced evenly from a quarter of pi up to `frequency_bound`.

    Args:
        frequency_bound: Largest angular frequency, in rad per unit of t; above pi / 4.
        channels: Number of features, half of them cosines.
    """

    def __init__(self, frequency_bound: float, channels: int = 256) -> None:
        super().__init__()
        self.frequency_bound = frequency_bound
        self.channels = channels

    def forward(self, t: Tensor) -> Tensor:
        """Features (B, channels), at least float32, of times (B,) in [0, 1]."""
        t = at_least_float32(t)
        # Not a buffer: `module.to(bfloat16)` would round the frequencies.
        frequencies = torch.linspace(torch.pi / 4, self.frequency_bound, self.channels // 2, device=t.device, dtype=t.dtype)
        angles = t[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScaledTimeProjection(nn.Module):
    """A model's own features of time.

    Args:
        features: Of times as the model counts them.
        scale: Of those times: the model's start of the noise, mostly 1000.
    """

    def __init__(self, features: nn.Module, scale: float) -> None:
        super().__init__()
        self.features = features
        self.scale = scale

    def forward(self, t: Tensor) -> Tensor:
        """Features (B, F) of times (B,) in [0, 1]."""
        result: Tensor = self.features(t * self.scale)
        return result


class Float32TimestepEmbedding(TimestepEmbedding):
    """A `TimestepEmbedding` whose weights stay float32 when the model around it is cast to less.

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
        """Embeddings (B, D) of features (B, F), in the precision of the weights."""
        first, activation, last = self.layers
        result: Tensor = last(activation(first(features.to(first.weight.dtype))))
        return result


class OwnPart:
    """Marks parts of a student that are its own, beside its teacher's weights."""


class TwoTimeEmbedding(Float32TimestepEmbedding, OwnPart):
    r"""Stands where a transformer has its timestep embedder, and embeds t and r in float32 whatever is handed to it.

    .. math:: e = E_t(\phi(t)) + E_\Delta(\phi_s(t - r)).

    What the transformer computes from its `timestep` is in the precision of its weights, too low for a derivative; the times
    themselves are set by `TwoTimeModel` for the length of a forward.

    Args:
        like: The embedder it replaces; its weights are not copied.
        features: The model's own :math:`\phi`, of times in [0, 1].
        interval_embedding: As of `TwoTimeModel`.
        time_frequency_bound: Likewise.
        interval_frequency_bound: Likewise.
    """

    def __init__(
        self,
        like: TimestepEmbedding,
        features: nn.Module,
        interval_embedding: str,
        time_frequency_bound: float | None,
        interval_frequency_bound: float,
    ) -> None:
        channels, width, out = like.linear_1.in_features, like.linear_1.out_features, like.linear_2.out_features
        # A refit needs biases, which some models have not.
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
        """Bring the interval embedder to its start: zeros behind the last layer, or a copy of the timestep embedder."""
        if self.interval_embedder is None:
            return
        if clone:
            for layer, own in zip(self.interval_embedder.layers, self.layers, strict=True):
                layer.load_state_dict(own.state_dict())
        else:
            first, _, last = self.interval_embedder.layers
            with torch.random.fork_rng(devices=[]):  # a student does not depend on the run's seed, nor on how it is built
                torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too, and leave them so
                first.load_state_dict(nn.Linear(first.in_features, first.out_features).state_dict())
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def embed_times(self, t: Tensor, r: Tensor) -> Tensor:
        """The embedding (B, D) of a step from t (B,) down to r (B,), in the precision of the weights."""
        # Autocast would round times and features to 16 bits.
        with torch.autocast(t.device.type, enabled=False):
            vector = self.embed(self.time_proj(t))
            if self.interval_embedder is not None and self.interval_proj is not None:
                vector = vector + self.interval_embedder.embed(self.interval_proj(t - r))
        return vector

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """The embedding (B, D) of the times that are set, in the precision of `sample`, which is not looked at otherwise."""
        if self.times is None:
            raise RuntimeError("no times are set; call the transformer, not its embedder")
        return self.embed_times(*self.times).to(sample.dtype)


class TwoTimeModel(ModelMixin, ConfigMixin):
    r"""A transformer of diffusers with float32 time embeddings and, for a student, a second time input.

    To be inherited before the stock class. Every timestep embedder in it becomes a `TwoTimeEmbedding`; everything else is the
    stock class's own. With neither extra it computes what the stock class computes, up to the precision of time, so it loads,
    and serves as, a teacher.

    Args:
        interval_embedding: "none": a network of t alone. "zero": :math:`E_\Delta` ends in a layer of zeros, so that the
            network starts out independent of r. "clone": :math:`E_\Delta` starts as a copy of :math:`E_t`, fed t - r
            through the same features (arXiv 2512.13006, section 4.2).
        time_frequency_bound: Bound in rad per unit of t of smooth time features, or None for the model's own.
        interval_frequency_bound: The same for the features of the interval t - r, under "zero".
        rescaled_time: Whether the model's own features are fed a thousandth of its times, so that their angular frequencies
            end at 1 rad per unit of t (arXiv 2512.13006, section 4.2.1); not with smooth ones.
        policy_points: Outputs of a policy for a whole step (`policy`), of which the average velocity is a mixture; 1 is the
            model's own output, and no policy.
        **kwargs: Of the stock class.

    Raises:
        ValueError: If `interval_embedding` is none of these, time is to be both smooth and rescaled, or the family has no
            policies.
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["timestep_embedder", "grid"]
    timestep_scale: ClassVar[float] = 1.0
    """What the stock forward's `timestep` is at noise: 1, or 1000."""
    feature_scale: ClassVar[float] = 1000.0
    """What the model's own features of time get at noise."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Ends of the names of the linear layers in its blocks that LoRA is for, unless told otherwise: attention, feed-forward."""
    output_layer: ClassVar[str | None] = None
    """The last layer, whose tokens are the velocity's as they are; None where more comes after it, and no policy can be."""
    policy_head_class: ClassVar[type[nn.Module] | None] = None
    """What stands there in students with a policy, such as `PolicyHead`: diffusers finds only what a family's file imports."""
    unread: ClassVar[tuple[str, ...]] = ()
    """Parts whose results nothing reads, such as a last block's for the prompt's tokens; `-1` is the last of a list."""

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
            raise ValueError("rescaled_time is of the model's own features of time; set time_frequency_bound to None")
        if policy_points > 1:
            if self.output_layer is None or self.policy_head_class is None:
                raise ValueError(f"policy_points is {policy_points}, and {type(self).__name__} has no policies; set it to 1")
            stock = self.get_submodule(self.output_layer)
            self.set_submodule(self.output_layer, self.policy_head_class(stock, policy_points))
        settings = (interval_embedding, time_frequency_bound, interval_frequency_bound)
        for name, stock in list(self.named_modules()):
            if (replacement := self.embedding_of(name.rpartition(".")[2])) is not None:
                features = self.own_features(name)
                if rescaled_time:
                    features = ScaledTimeProjection(features, 1e-3)
                self.set_submodule(name, replacement(stock, features, *settings))

    def unread_parts(self) -> list[str]:
        """Names of the parts in `unread`: no loss has a gradient for their weights, which DDP would wait for."""
        found = []
        for part in self.unread:
            blocks, _, rest = part.partition(".-1.")
            found.append(f"{blocks}.{len(self.get_submodule(blocks)) - 1}.{rest}")
        return found

    def embedding_of(self, name: str) -> type[TwoTimeEmbedding] | None:
        """What replaces a module of this name within its parent; None leaves it."""
        return TwoTimeEmbedding if name == "timestep_embedder" else None

    def own_features(self, embedder: str) -> nn.Module:
        """The features of times in [0, 1] that the stock class gives to one of its embedders."""
        return ScaledTimeProjection(self.get_submodule(f"{embedder.rpartition('.')[0]}.time_proj"), self.feature_scale)

    def stock_times(self, t: Tensor, r: Tensor) -> dict[str, Tensor]:
        """Times as arguments of the stock forward."""
        return {"timestep": t * self.timestep_scale}

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """The settings of all classes, so that a configuration holds the stock class's as well."""
        keys: set[str] = set()
        for parent in input_class.__mro__:
            if (init := vars(parent).get("__init__")) is not None:
                keys |= inspect.signature(init).parameters.keys()
        return keys - {"args"}

    @property
    def timestep_embedders(self) -> list[TwoTimeEmbedding]:
        """All of them; most models have one."""
        return [module for module in self.modules() if isinstance(module, TwoTimeEmbedding)]

    def reset_interval_embedding(self) -> None:
        """Bring the interval input to its start: without effect, or as a copy of the timestep embedder.

        Raises:
            ValueError: If there is none.
        """
        kind = self.config.interval_embedding
        if kind == "none":
            raise ValueError("interval_embedding is 'none': this network has no interval embedder to reset")
        for embedder in self.timestep_embedders:
            embedder.reset_interval_embedding(clone=kind == "clone")

    @property
    def policy_head(self) -> Any:
        """The last layer where it has a policy's outputs, or None."""
        layer = self.output_layer
        return None if layer is None or self.config.policy_points == 1 else self.get_submodule(layer)

    def forward(
        self, *args: Any, timestep: Tensor, timestep_r: Tensor | None = None, all_points: bool = False, **kwargs: Any
    ) -> Any:
        """Average velocity from t down to r, or the velocity at t where r is not given.

        Args:
            *args: Of the stock forward.
            timestep: t (B,) in [0, 1], float32 whatever the dtype of the states; 1 is noise.
            timestep_r: r (B,) in [0, t], or None for r = t.
            all_points: Of a network with a policy: give its outputs one by one, in the place of each row N of them.
            **kwargs: Of the stock forward.

        Returns:
            What the stock forward returns.
        """
        t = at_least_float32(timestep)
        r = t if timestep_r is None else at_least_float32(timestep_r)
        embedders, head = self.timestep_embedders, self.policy_head
        for embedder in embedders:
            embedder.times = t, r
        if head is not None:
            head.mix_for(r, t, all_points)
        try:
            return super().forward(*args, **self.stock_times(t, r), **kwargs)
        finally:
            for embedder in embedders:
                embedder.times = None
            if head is not None:
                head.mixture = None
