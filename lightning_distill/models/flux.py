"""FLUX.1: dev, lite, schnell-type checkpoints and the embedded teacher, from a directory or a hub id."""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.models.base import Condition, ModelAdapter, StudentOptions
from lightning_distill.models.flux_directory import save_flux_pipeline, save_two_time_pipeline
from lightning_distill.models.registry import SHIPPED, resolve_pretrained
from lightning_distill.models.smooth_time import SmoothTimeReport, refit_embedder
from lightning_distill.models.two_time_flux import TIME_SCALE, TwoTimeFluxTransformer2DModel
from lightning_distill.models.two_time_flux_pipeline import align_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FluxAdapter(ModelAdapter):
    """Every FLUX.1 pipeline that diffusers' `FluxPipeline` loads.

    Args:
        pretrained: A shipped name ("shapes-teacher"), a pipeline directory, or a hub id ("black-forest-labs/FLUX.1-dev").
        revision: Revision of a hub id.
        torch_dtype: Precision of the frozen parts: "float32", "bfloat16" or "float16". Time embeddings, and the weights
            that train, are float32 in any case.
        max_sequence_length: Text tokens of the T5 encoder, or None for what the checkpoint's tokenizer was made for.
        attention_backend: Name of a diffusers attention backend for teacher and student ("native", "_native_math", "flash"),
            or None for diffusers' choice, which an exported pipeline uses in any case.
    """

    vae: nn.Module
    text_encoder: nn.Module
    text_encoder_2: nn.Module

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        torch_dtype: str = "float32",
        max_sequence_length: int | None = None,
        attention_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.attention_backend = attention_backend
        self.pretrained = pretrained
        self.revision = revision
        self.torch_dtype = torch_dtype
        self.max_sequence_length = max_sequence_length
        self._pipeline: FluxPipeline | None = None
        self.embeds_guidance = False

    def check(self) -> None:
        """Raise `ConfigurationError` where the settings cannot work."""
        if self.torch_dtype not in DTYPES:
            raise ConfigurationError(f"adapter.torch_dtype is {self.torch_dtype!r}; choose one of {', '.join(DTYPES)}")
        self._check_attention_backend()
        name = self.pretrained
        directory = Path(resolve_pretrained(name))
        if directory.is_dir():
            if not (directory / "model_index.json").is_file():
                raise ConfigurationError(
                    f"adapter.pretrained is {name!r}, which has no model_index.json; give a diffusers pipeline directory"
                )
        elif name in SHIPPED or name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ConfigurationError(
                f"adapter.pretrained is {name!r}, which is neither a pipeline directory nor a hub id like "
                "'black-forest-labs/FLUX.1-dev'; correct the path, or use 'shapes-teacher', which ships with the package"
            )
        elif not isinstance(try_to_load_from_cache(name, "model_index.json", revision=self.revision), str):
            self._reach_hub(name)
        try:
            config = TwoTimeFluxTransformer2DModel.load_config(
                resolve_pretrained(name), subfolder="transformer", revision=self.revision
            )
        except OSError as error:
            raise ConfigurationError(
                f"adapter.pretrained is {name!r}, whose transformer/config.json cannot be read; download the whole pipeline, "
                "and log in if it is gated"
            ) from error
        self.embeds_guidance = bool(config.get("guidance_embeds", False))

    def _check_attention_backend(self) -> None:
        known = [backend.value for backend in AttentionBackendName]
        if self.attention_backend is not None and self.attention_backend not in known:
            raise ConfigurationError(
                f"adapter.attention_backend is {self.attention_backend!r}; choose one of {', '.join(known)}, or null"
            )

    def _use_attention_backend(self, transformer: TwoTimeFluxTransformer2DModel) -> None:
        if self.attention_backend is None:
            return
        # diffusers would make it the default of all models in the process; the context takes that back.
        with attention_backend(self.attention_backend):
            transformer.set_attention_backend(self.attention_backend)

    def _reach_hub(self, name: str) -> None:
        from huggingface_hub import HfApi

        try:
            HfApi().model_info(name, revision=self.revision, timeout=5)
        except Exception as error:  # whatever the hub's client of the day raises, the remedy is the same
            raise ConfigurationError(
                f"adapter.pretrained is {name!r}, which is not in the local cache and cannot be fetched from the hub "
                f"({type(error).__name__}); download it first, log in if it is gated, or give a pipeline directory"
            ) from error

    def load(self) -> None:
        """Load the text encoders and the autoencoder, frozen and in evaluation mode."""
        pipeline = FluxPipeline.from_pretrained(
            resolve_pretrained(self.pretrained),
            transformer=None,
            revision=self.revision,
            torch_dtype=DTYPES[self.torch_dtype],
            use_safetensors=True,
        )
        self.attach(pipeline)

    def attach(self, pipeline: FluxPipeline) -> None:
        """Take over a pipeline's tokenizers, scheduler, text encoders and autoencoder, frozen."""
        self._pipeline = pipeline
        for name in ("vae", "text_encoder", "text_encoder_2"):
            setattr(self, name, getattr(pipeline, name).requires_grad_(False).eval())
            align_weights(getattr(self, name))  # so that an exported pipeline repeats this adapter bit for bit

    @property
    def pipeline(self) -> FluxPipeline:
        """The loaded pipeline, without its transformer."""
        if self._pipeline is None:
            raise RuntimeError("the adapter is not loaded yet; call load() first")
        return self._pipeline

    def load_teacher(self) -> nn.Module:
        """Load the transformer, frozen and in evaluation mode."""
        teacher = TwoTimeFluxTransformer2DModel.from_pretrained(
            resolve_pretrained(self.pretrained),
            subfolder="transformer",
            revision=self.revision,
            torch_dtype=DTYPES[self.torch_dtype],
            use_safetensors=True,
        )
        return self.adopt(teacher)

    def adopt(self, network: nn.Module) -> nn.Module:
        """Note whether a transformer embeds the guidance scale, and freeze it."""
        transformer = _flux(network)
        self.embeds_guidance = bool(transformer.config.guidance_embeds)
        self._use_attention_backend(transformer)
        return network.requires_grad_(False).eval()

    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, SmoothTimeReport | None]:
        """A trainable copy of the teacher with an interval input and, by default, smooth time."""
        smooth = options.time_embedding == "smooth"
        teacher = _flux(teacher)
        config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
        config |= {
            "interval_embedding": options.interval_embedding,
            "time_frequency_bound": options.frequency_bound if smooth else None,
            "interval_frequency_bound": options.frequency_bound,
        }
        # In float32 whatever the teacher's precision: an update of a bfloat16 weight is mostly rounded away.
        student = TwoTimeFluxTransformer2DModel.from_config(config).to(teacher.device)
        missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
        if unexpected or not all(name.startswith("interval_embedder.") for name in missing):
            raise RuntimeError(f"the student does not match its teacher: missing {missing}, unexpected {unexpected}")
        report = self._refit(teacher, student, options) if smooth else None
        student.reset_interval_embedding()
        self._use_attention_backend(student)
        if options.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        return student.requires_grad_(True).train(), report

    @staticmethod
    def _refit(
        teacher: TwoTimeFluxTransformer2DModel, student: TwoTimeFluxTransformer2DModel, options: StudentOptions
    ) -> SmoothTimeReport:
        old, new = teacher.time_text_embed, student.time_text_embed
        return refit_embedder(
            original=lambda t: old.timestep_embedder(old.time_proj(t * TIME_SCALE)),
            features=lambda t: new.time_proj(t * TIME_SCALE),
            embedder=new.timestep_embedder,
            derivative_penalty=options.derivative_penalty,
        )

    @property
    def sequence_length(self) -> int:
        """Tokens that prompts are padded to for T5."""
        return self.max_sequence_length or min(512, self.pipeline.tokenizer_2.model_max_length)

    def encode_prompt(self, prompts: list[str]) -> Condition:
        """`prompt_embeds` (B, L, D) of T5 and `pooled_prompt_embeds` (B, P) of CLIP."""
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(prompts, None, max_sequence_length=self.sequence_length)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def text_encoders(self) -> dict[str, nn.Module]:
        """CLIP as `text_encoder` and T5 as `text_encoder_2`."""
        return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: the posterior's mean, shifted and scaled."""
        vae: AutoencoderKL = self.pipeline.vae
        latents = vae.encode(images.to(vae.dtype)).latent_dist.mode()
        return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of latents (B, C, h, w)."""
        vae: AutoencoderKL = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(latents.to(vae.dtype)).sample
        return images.float()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels, both multiples of twice the VAE's factor."""
        factor = self.pipeline.vae_scale_factor
        if height % (2 * factor) or width % (2 * factor):
            raise ConfigurationError(f"images of {height} x {width} do not fit; use multiples of {2 * factor} pixels")
        return self.pipeline.vae.config.latent_channels, height // factor, width // factor

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """The scheduler's shift, which for FLUX.1-dev grows with the resolution."""
        config = self.pipeline.scheduler.config
        if config.use_dynamic_shifting:
            tokens = latent_shape[-2] * latent_shape[-1] // 4
            mu = calculate_shift(
                tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
            )
            return math.exp(mu)
        return float(config.shift)

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: Tensor | float | None = None
    ) -> Tensor:
        """Velocity (B, C, h, w) by one forward."""
        return self._forward(network, x_t, None, t, condition, guidance_scale)

    def average_velocity(
        self,
        student: nn.Module,
        x_t: Tensor,
        r: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: Tensor | float | None = None,
    ) -> Tensor:
        """The student's average velocity (B, C, h, w) from t down to r, by one forward."""
        return self._forward(student, x_t, r, t, condition, guidance_scale)

    def save_student(self, student: nn.Module, directory: Path) -> None:
        """Write a `TwoTimeFluxPipeline`, which loads with `trust_remote_code=True`."""
        save_two_time_pipeline(self.pipeline, student, self.sequence_length, directory)

    def save_teacher(self, network: nn.Module, directory: Path) -> None:
        """Write a stock `FluxPipeline`."""
        save_flux_pipeline(self.pipeline, network, directory)

    def _forward(
        self,
        network: nn.Module,
        x_t: Tensor,
        r: Tensor | None,
        t: Tensor,
        condition: Condition,
        guidance_scale: Tensor | float | None,
    ) -> Tensor:
        guidance = None
        if self.embeds_guidance:
            if guidance_scale is None:
                raise ConfigurationError("this checkpoint embeds the guidance scale; set guidance.scale, 3.5 is usual")
            guidance = torch.as_tensor(guidance_scale, device=t.device, dtype=torch.float32).expand(len(t))
        prompt_embeds = condition["prompt_embeds"]
        dtype = _flux(network).x_embedder.weight.dtype
        tokens, img_ids = pack_latents(x_t), image_ids(x_t.shape[-2] // 2, x_t.shape[-1] // 2, x_t.device)
        (tokens,) = network(
            hidden_states=tokens.to(dtype),
            encoder_hidden_states=prompt_embeds.to(dtype),
            pooled_projections=condition["pooled_prompt_embeds"].to(dtype),
            timestep=t,
            timestep_r=r,
            guidance=guidance,
            img_ids=img_ids,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=x_t.device),
            return_dict=False,
        )
        return unpack_latents(tokens.to(x_t.dtype), x_t.shape[-2], x_t.shape[-1])


def _flux(network: nn.Module) -> TwoTimeFluxTransformer2DModel:
    if not isinstance(network, TwoTimeFluxTransformer2DModel):
        raise TypeError(f"FluxAdapter works with its own transformers, not with {type(network).__name__}")
    return network


def pack_latents(latents: Tensor) -> Tensor:
    """Tokens (B, h/2 * w/2, 4 C) of latents (B, C, h, w), each a 2 x 2 patch, in FLUX's order."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, height, width) of tokens (B, N, 4 C): the inverse of `pack_latents`."""
    batch, _, width_4c = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, width_4c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, width_4c // 4, height, width)


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions (rows * columns, 3) of image tokens: zero, row, column."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    return ids.reshape(-1, 3)
