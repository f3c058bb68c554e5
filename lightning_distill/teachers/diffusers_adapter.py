"""Every family of diffusers pipelines that students are known for, from a directory or a hub id."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.students.lora_student import ADAPTER, add_lora, lora_layers, merged
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.teachers.families import FAMILIES, stock_options, two_time
from lightning_distill.teachers.features import entering, evenly_spaced_layers, trunk, trunk_width
from lightning_distill.teachers.fingerprint import fingerprint
from lightning_distill.teachers.lora_directory import save_lora_student
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.pipeline_directory import save_few_step_pipeline, save_stock_pipeline
from lightning_distill.teachers.registry import check_location, resolve_pretrained
from lightning_distill.teachers.sharded_loading import (
    build_sharded_lora,
    build_sharded_student,
    meta_network,
    stored_component,
)
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.stored_encoders import meta_encoder
from lightning_distill.teachers.student import build_student, check_pretrained, lora_config, student_config
from lightning_distill.teachers.student_options import StudentOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DiffusersAdapter(ModelAdapter):
    """A pipeline of diffusers; its family is read from its directory.

    Args:
        pretrained: A shipped name ("shapes-teacher"), a pipeline directory, or a hub id ("black-forest-labs/FLUX.1-dev").
        revision: Revision of a hub id.
        torch_dtype: Precision of the frozen parts: "float32", "bfloat16" or "float16". Time embeddings, and the weights
            that train, are float32 in any case.
        max_sequence_length: Tokens that prompts are padded to, or None for what the checkpoint's tokenizer was made for.
        attention_backend: Name of a diffusers attention backend for teacher and student ("native", "_native_math", "flash"),
            or None for diffusers' choice, which an exported pipeline uses in any case.
    """

    shards: ClassVar[bool] = True

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
        self._pipeline: FewStepPipeline | None = None
        self._family: type[FewStepPipeline] | None = None
        self._encoders = True
        self.embeds_guidance = False

    def check(self) -> None:
        """Raise `ConfigurationError` where the settings cannot work."""
        if self.torch_dtype not in DTYPES:
            raise ConfigurationError(f"adapter.torch_dtype is {self.torch_dtype!r}; choose one of {', '.join(DTYPES)}")
        self._check_attention_backend()
        name = self.pretrained
        check_location(name, self.revision)
        index = self._read(DiffusionPipeline, "model_index.json")
        kind = index.get("_class_name")
        kind = kind[-1] if isinstance(kind, list) else kind  # a class that the directory brings along, as students do
        if kind not in FAMILIES:
            raise ConfigurationError(f"adapter.pretrained is {name!r}, a {kind}; give a pipeline of {', '.join(FAMILIES)}")
        self._family = FAMILIES[kind]
        self.embeds_guidance = bool(self._transformer_config().get("guidance_embeds", False))

    def check_student(self, options: StudentOptions) -> None:
        """Raise `ConfigurationError` where a policy, LoRA or a student to start from does not fit the transformer."""
        if options.policy_points > 1 and self.family.network_class.output_layer is None:
            raise ConfigurationError(
                f"student.policy_points is {options.policy_points}, and {self.family.network_class.__name__} has no policies; "
                "set it to 1"
            )
        if options.pretrained is not None:
            check_pretrained(options, self.family.network_class, student_config(self._transformer_config(), options))
        if options.lora is not None:
            with torch.device("meta"):
                network = self.family.network_class.from_config(self._transformer_config())
            lora_config(network, options.lora)

    def _transformer_config(self) -> dict[str, Any]:
        return self._read(self.family.network_class, "transformer/config.json", subfolder="transformer")

    def _read(self, kind: type[ConfigMixin], file: str, **where: str) -> dict[str, Any]:
        try:
            config: dict[str, Any] = kind.load_config(resolve_pretrained(self.pretrained), revision=self.revision, **where)
        except OSError as error:
            raise ConfigurationError(
                f"adapter.pretrained is {self.pretrained!r}, whose {file} cannot be read; download the whole pipeline, "
                "and log in if it is gated"
            ) from error
        return config

    def _check_attention_backend(self) -> None:
        known = [backend.value for backend in AttentionBackendName]
        if self.attention_backend is not None and self.attention_backend not in known:
            raise ConfigurationError(
                f"adapter.attention_backend is {self.attention_backend!r}; choose one of {', '.join(known)}, or null"
            )

    def _use_attention_backend(self, network: TwoTimeModel) -> None:
        if self.attention_backend is None:
            return
        # diffusers would make it the default of all models in the process; the context takes that back.
        with attention_backend(self.attention_backend):
            network.set_attention_backend(self.attention_backend)

    def load(self, encoders: bool = True) -> None:
        """Load the text encoders and the autoencoder, frozen and in evaluation mode; without encoders the latter alone."""
        spread = encoders and self.sharding is not None
        pipeline = self._load_pipeline(encoders and not spread)
        weights = {}
        for name in filter(_is_text_encoder, self._components() if spread else []):
            where = resolve_pretrained(self.pretrained), self.revision, name
            encoder, weights[name] = meta_encoder(*where, DTYPES[self.torch_dtype])
            pipeline.register_modules(**{name: encoder})
        self.attach(pipeline, encoders)
        for name, stored in weights.items():
            assert self.sharding is not None
            self.sharding.shard_encoder(self.text_encoders()[name], stored)

    def _load_pipeline(self, encoders: bool) -> FewStepPipeline:
        left_out = ["transformer", *(() if encoders else filter(_is_text_encoder, self._components()))]
        pipeline: FewStepPipeline = self.family.from_pretrained(
            resolve_pretrained(self.pretrained),
            revision=self.revision,
            torch_dtype=DTYPES[self.torch_dtype],
            use_safetensors=True,
            **dict.fromkeys(left_out),
        )
        return pipeline

    def _components(self) -> list[str]:
        index = self._read(DiffusionPipeline, "model_index.json")
        return [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_") and value[0]]

    def attach(self, pipeline: FewStepPipeline, encoders: bool = True) -> None:
        """Take over a pipeline's tokenizers, scheduler, text encoders and autoencoder, frozen.

        Args:
            pipeline: Without its transformer.
            encoders: As of `load`.
        """
        self._pipeline, self._family, self._encoders = pipeline, type(pipeline), encoders
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
                if encoders:  # what is a part of this module moves to the GPU with it
                    setattr(self, name, component)

    @property
    def family(self) -> type[FewStepPipeline]:
        """How the family draws."""
        if self._family is None:
            self.check()
        assert self._family is not None
        return self._family

    @property
    def pipeline(self) -> FewStepPipeline:
        """The loaded pipeline, without its transformer."""
        if self._pipeline is None:
            raise RuntimeError("the adapter is not loaded yet; call load() first")
        return self._pipeline

    def load_teacher(self) -> nn.Module:
        """Load the transformer, frozen and in evaluation mode."""
        if self.sharding is not None:
            config = self._read(self.family.network_class, "transformer/config.json", subfolder="transformer")
            weights = self._stored()
            empty = meta_network(self.family.network_class, config, weights).to(DTYPES[self.torch_dtype])
            self.adopt(empty)
            self.sharding.shard(empty, weights)
            return empty
        teacher = self.family.network_class.from_pretrained(
            resolve_pretrained(self.pretrained),
            subfolder="transformer",
            revision=self.revision,
            torch_dtype=DTYPES[self.torch_dtype],
            use_safetensors=True,
        )
        return self.adopt(teacher)

    def adopt(self, network: nn.Module) -> nn.Module:
        """Note whether a transformer embeds the guidance scale, and freeze it."""
        network = two_time(network)
        self.embeds_guidance = bool(network.config.get("guidance_embeds", False))
        self._use_attention_backend(network)
        return network.requires_grad_(False).eval()

    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, SmoothTimeReport | None]:
        """A trainable copy of the teacher, or LoRA on its own weights, with an interval input and, by default, smooth time."""
        teacher = two_time(teacher)
        if self.sharding is None:
            student, report = build_student(teacher, options)
        elif options.lora is None:
            parts = self._stored(options.pretrained), self.sharding
            student, report = build_sharded_student(self.family.network_class, dict(teacher.config), options, *parts)
        else:
            parts = self._stored(), self.sharding
            student, report = build_sharded_lora(self.family.network_class, teacher, options, *parts)
        self._use_attention_backend(student)
        return student, report

    def meta_student(self, options: StudentOptions) -> nn.Module:
        """A student as `build_student` makes it, whose weights take no memory, and without LoRA."""
        with init_empty_weights(include_buffers=False):
            student: TwoTimeModel = self.family.network_class.from_config(student_config(self._transformer_config(), options))
        return student

    def _stored(self, student: str | None = None) -> StoredWeights:
        if student is not None:
            return stored_component(resolve_pretrained(student), None, "transformer", "student.pretrained")[0]
        return stored_component(resolve_pretrained(self.pretrained), self.revision, "transformer")[0]

    def unsharded_copy(self, network: nn.Module) -> nn.Module:
        """The network itself, or of one that is spread over processes a whole copy on the CPU of the first of them."""
        if self.sharding is None:
            return network
        with init_empty_weights(include_buffers=False):
            copy = self.family.network_class.from_config(dict(two_time(network).config))
            if lora_layers(network):
                add_lora(copy, two_time(network).peft_config[ADAPTER])
        if state := self.sharding.gather(network):
            copy.load_state_dict({**state, **dict(network.named_buffers())}, assign=True, strict=False)
        return copy

    @property
    def sequence_length(self) -> int:
        """Tokens that prompts are padded to."""
        return self.max_sequence_length or self.pipeline.sequence_length

    def encoding_settings(self) -> dict[str, Any]:
        """What latents and conditions depend on: the pipeline, by its files or its hub id, and what it is asked."""
        pretrained, directory = self.pretrained, Path(resolve_pretrained(self.pretrained))
        if directory.is_dir():
            parts = [name for name in self._components() if name not in ("transformer", "scheduler")]
            pretrained = f"sha256:{fingerprint(directory, parts)}"
        return {
            "pretrained": pretrained,
            "revision": self.revision,
            "torch_dtype": self.torch_dtype,
            "max_sequence_length": self.max_sequence_length,
        }

    def encode_prompt(self, prompts: list[str]) -> Condition:
        """Conditions of B prompts."""
        return self.pipeline.encode_condition(prompts, self.sequence_length)

    def text_encoders(self) -> dict[str, nn.Module]:
        """Those of the pipeline, `text_encoder`, `text_encoder_2` and so on."""
        return {name: module for name, module in self.named_children() if _is_text_encoder(name)}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""
        return self.pipeline.encode_latents(images)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of latents (B, C, h, w)."""
        if self._encoders:
            return self.pipeline.decode_latents(latents)
        vae: nn.Module = self.pipeline.vae
        try:
            vae.to(latents.device)
            return self.pipeline.decode_latents(latents)
        finally:
            vae.cpu()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels.

        Raises:
            ConfigurationError: If the size does not fit.
        """
        try:
            return self.pipeline.latent_shape(height, width)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """The scheduler's shift, which may grow with the resolution."""
        return self.pipeline.time_shift(latent_shape)

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: Tensor | float | None = None
    ) -> Tensor:
        """Velocity (B, C, h, w) by one forward."""
        return self.pipeline.average_velocity(two_time(network), x_t, None, t, condition, self._guidance(guidance_scale, t))

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
        return self.pipeline.average_velocity(two_time(student), x_t, r, t, condition, self._guidance(guidance_scale, t))

    def policy(
        self,
        student: nn.Module,
        x_t: Tensor,
        r: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: Tensor | float | None = None,
    ) -> Tensor:
        """A student's outputs for a whole step from t down to r, N velocities (B, N, C, h, w), by one forward."""
        # The family makes latents of tokens row by row: the outputs are rows of a larger batch.
        outputs = self.pipeline.average_velocity(
            two_time(student), x_t, r, t, condition, self._guidance(guidance_scale, t), all_points=True
        )
        return outputs.unflatten(0, (len(x_t), -1))

    def mix_guidance(self, v_cond: Tensor, v_null: Tensor, scale: Tensor) -> Tensor:
        """The guided velocity of two branches, (B, C, h, w) each, under scales (B,), as the family mixes them."""
        return self.pipeline.mix_guidance(v_cond, v_null, scale)

    def feature_widths(self, layers: Sequence[int] | None = None) -> dict[int, int]:
        """Width D of the tokens that enter each of these transformer blocks; None is four of them."""
        config = self._transformer_config()
        with torch.device("meta"):
            depth = len(trunk(self.family.network_class.from_config(config)))
        if layers is not None and (not layers or min(layers) < 0 or max(layers) >= depth):
            raise ConfigurationError(
                f"layers of features are {list(layers)}, and this transformer has blocks 0 to {depth - 1}; name some of "
                "them, or set them to null"
            )
        return dict.fromkeys(evenly_spaced_layers(depth) if layers is None else layers, trunk_width(config))

    def features(
        self,
        network: nn.Module,
        x_t: Tensor,
        r: Tensor | None,
        t: Tensor,
        condition: Condition,
        layers: Sequence[int],
        guidance_scale: Tensor | float | None = None,
    ) -> list[Tensor]:
        """Tokens (B, N, D) that enter these transformer blocks in one forward."""
        with entering(network, layers) as found:
            self.pipeline.average_velocity(two_time(network), x_t, r, t, condition, self._guidance(guidance_scale, t))
        return [found[layer] for layer in layers]

    def _guidance(self, scale: Tensor | float | None, t: Tensor) -> Tensor | None:
        if not self.embeds_guidance:
            return None
        if scale is None:
            raise ConfigurationError("this checkpoint embeds the guidance scale; set guidance.scale, 3.5 is usual")
        return torch.as_tensor(scale, device=t.device, dtype=torch.float32).expand(len(t))

    def stock_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments by which the pipeline of `save_teacher` draws as training does, besides prompt, steps and size."""
        guidance = self.family.stock_guidance(guidance_scale, self.embeds_guidance)
        return guidance | stock_options(self.family.stock_class, self.sequence_length)

    def save_student(self, student: nn.Module, directory: Path) -> None:
        """Write the family's few-step pipeline, which loads with `trust_remote_code=True`."""
        how = self.sequence_length, self.stochastic_sampling
        save_few_step_pipeline(self._full_pipeline(), two_time(student), *how, directory)

    def merge_lora(self, student: nn.Module) -> nn.Module:
        """A plain student in place of one with LoRA, in float32 on the CPU; any other as it is."""
        return merged(two_time(student)) if lora_layers(student) else student

    def save_lora(self, student: nn.Module, directory: Path) -> None:
        """Write a LoRA student without its base, as `load_lora_student` reads it."""
        origin = self.pretrained if self.revision is None else f"{self.pretrained}@{self.revision}"
        how = self.sequence_length, self.stochastic_sampling
        save_lora_student(self.pipeline, two_time(student), *how, origin, directory)

    def save_teacher(self, network: nn.Module, directory: Path) -> None:
        """Write the family's stock pipeline."""
        save_stock_pipeline(self._full_pipeline(), two_time(network), directory)

    def _full_pipeline(self) -> FewStepPipeline:
        """With whole text encoders, which are loaded now where training did without, or had spread them over processes."""
        return self.pipeline if self._encoders and self.sharding is None else self._load_pipeline(encoders=True)


def _is_text_encoder(component: str) -> bool:
    return component.startswith("text_encoder")
