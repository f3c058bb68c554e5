"""Adapter for diffusers pipelines of all supported families, from a directory or a hub id."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor, nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path
from lightning_distill.sharding.low_rank_update import LowRankUpdate
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.students.lora_student import ADAPTER, add_lora, lora_layers, merge_lora_weights
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.teachers.families import FAMILIES, stock_options, two_time, without_weights
from lightning_distill.teachers.features import evenly_spaced_layers, record_block_inputs, trunk, trunk_width
from lightning_distill.teachers.fingerprint import fingerprint
from lightning_distill.teachers.lora_directory import save_lora_student
from lightning_distill.teachers.lora_files import read_updates
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.pipeline_directory import meta_stock_network, save_few_step_pipeline, save_stock_pipeline
from lightning_distill.teachers.pipeline_files import component_classes, pipeline_class_name, stock_class
from lightning_distill.teachers.pipeline_location import PipelineLocation
from lightning_distill.teachers.registry import check_location
from lightning_distill.teachers.sharded_loading import (
    build_sharded_lora,
    build_sharded_student,
    meta_network,
    read_updated,
    stored_component,
)
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.stock_student import StepGrid, StockSource, check_grid
from lightning_distill.teachers.stored_encoders import meta_encoder
from lightning_distill.teachers.student import build_student, check_pretrained, lora_config, student_config
from lightning_distill.teachers.student_exports import check_no_student
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from lightning_distill.teachers.teacher_lora import TeacherLora
from lightning_distill.teachers.usage import DIFFUSERS_CODE, DIFFUSERS_CODE_WITHOUT_LOADER, ExportCode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DiffusersAdapter(ModelAdapter):
    """Adapter for a diffusers pipeline; `model_index.json` gives the family.

    Args:
        pretrained: A shipped name ("shapes-teacher"), a pipeline directory, or a hub id ("black-forest-labs/FLUX.1-dev").
        revision: Revision of a hub id.
        variant: Variant of the weights, such as "fp16" in `diffusion_pytorch_model.fp16.safetensors`; components without it
            are loaded without variant. None: the weights without variant or, in a component without those, its only variant.
        torch_dtype: Dtype of the frozen weights: "float32", "bfloat16" or "float16". Time embeddings and trainable weights
            are always float32.
        max_sequence_length: Number of tokens to which prompts are padded. None: the length of the checkpoint's tokenizer.
        attention_backend: Name of a diffusers attention backend for teacher and student ("native", "_native_math", "flash").
            None: diffusers' default. Exported pipelines always use the default.
        lora: LoRA files that are merged into the transformer: paths or hub ids, or with weights, `TeacherLora`. The merged
            transformer is the teacher.
    """

    supports_sharding: ClassVar[bool] = True

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        torch_dtype: str = "float32",
        max_sequence_length: int | None = None,
        attention_backend: str | None = None,
        variant: str | None = None,
        lora: Sequence[TeacherLora | str] | TeacherLora | str = (),
    ) -> None:
        super().__init__()
        self.attention_backend = attention_backend
        self.variant = variant
        self.pretrained = expand_path(pretrained, "adapter.pretrained")
        self.revision = revision
        self.torch_dtype = torch_dtype
        self.max_sequence_length = max_sequence_length
        listed = [lora] if isinstance(lora, TeacherLora | str) else lora
        self.lora = tuple(TeacherLora(each) if isinstance(each, str) else each for each in listed)
        self._updates: Mapping[str, LowRankUpdate] | None = None
        self._pipeline: FewStepPipeline | None = None
        self._family: type[FewStepPipeline] | None = None
        self._encoders = True
        self._location: PipelineLocation | None = None
        self._sizes: FewStepPipeline | None = None
        self.embeds_guidance = False

    @property
    def name(self) -> str:
        """Name of the teacher in model cards: the shipped name, directory or hub id."""
        return str(self.pretrained)

    @property
    def pipeline_class(self) -> str:
        """Name of the class of the stock pipeline."""
        return self.family.stock_class.__name__

    @property
    def export_code(self) -> ExportCode:
        """Code snippets for the model cards of exports."""
        return DIFFUSERS_CODE if hasattr(self.family.stock_class, "load_lora_weights") else DIFFUSERS_CODE_WITHOUT_LOADER

    @property
    def weights_dtype(self) -> str:
        """Dtype of the frozen weights, such as "bfloat16"."""
        return str(self.torch_dtype)

    def check(self, weights: bool = True) -> None:
        """Check the settings and the pipeline's files before anything is loaded, and set `embeds_guidance`.

        Args:
            weights: Whether to check all files of a directory. `plan` needs configurations only.

        Raises:
            ConfigurationError: If the settings cannot work, or the pipeline is incomplete or damaged.
        """
        if self.torch_dtype not in DTYPES:
            raise ConfigurationError(f"adapter.torch_dtype is {self.torch_dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            raise ConfigurationError(
                f"adapter.max_sequence_length is {self.max_sequence_length}; set it to at least 1 token, or to null for the "
                "length of the checkpoint's tokenizer"
            )
        self.check_attention_backend()
        name = self.pretrained
        check_location(name, self.revision)
        index = self.location.index()
        kind = pipeline_class_name(index)
        if kind not in FAMILIES:
            raise ConfigurationError(f"adapter.pretrained is {name!r}, a {kind}; set it to one of {', '.join(FAMILIES)}")
        self._family = FAMILIES[kind]
        self.embeds_guidance = bool(self._transformer_config().get("guidance_embeds", False))
        if weights:
            self.location.check_files()
            self._lora_updates()
        components = self.location.components() if weights else component_classes(index)
        tokenizer = self._family.prompt_tokenizer
        if self.max_sequence_length is not None and tokenizer not in components:
            raise ConfigurationError(
                f"adapter.max_sequence_length is {self.max_sequence_length}, but {name!r} has no {tokenizer} to pad prompts; "
                "set it to null"
            )

    def check_teacher(self) -> None:
        """Check that pipeline and LoRA are no exports of few-step students; `check` comes first.

        Raises:
            ConfigurationError: If one is, so that it has no velocities at most times.
        """
        if self.location.directory is not None:
            check_no_student(self.location.directory, self.location.source)
        for each in self.lora:
            check_no_student(each.file().parent, each.source)

    @property
    def location(self) -> PipelineLocation:
        """Where the pipeline is."""
        if self._location is None or self._location.source.value != self.pretrained:
            self._location = PipelineLocation(self.pretrained, self.revision, self.variant)
        return self._location

    def check_image_size(self, height: int, width: int) -> None:
        """Check an image size before anything is loaded, by a pipeline that has only an autoencoder without weights.

        Args:
            height: Height in pixels.
            width: Width in pixels.

        Raises:
            ConfigurationError: If the family does not support the size.
        """
        if self._sizes is None:
            self._sizes = self._pipeline or without_weights(self.family, self.meta_vae())
        try:
            self._sizes.latent_shape(height, width)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    def meta_vae(self) -> nn.Module:
        """The autoencoder, with parameters on the meta device."""
        library, kind_name = component_classes(self.location.index())["vae"]
        kind: Any = stock_class(library, kind_name)
        config = self.location.read_config(kind, "vae/config.json", subfolder="vae")
        with torch.device("meta"):
            vae: nn.Module = kind.from_config(config)
        return vae

    def check_student(self, options: StudentOptions) -> None:
        """Check the options of a student before anything is loaded.

        Raises:
            ConfigurationError: If policy, LoRA or pretrained student do not fit the transformer.
        """
        if options.policy_points > 1 and self.family.network_class.output_layer is None:
            raise ConfigurationError(
                f"student.policy_points is {options.policy_points}, but {self.family.network_class.__name__} does not support "
                "policies; set it to 1"
            )
        if options.interval_embedding == "none" and self._transformer_config().get("use_meanflow"):
            raise ConfigurationError(
                f"student.interval_embedding is none, but the transformer of adapter.pretrained {self.pretrained!r} has two "
                "times itself; set interval_embedding to zero"
            )
        if options.pretrained is not None:
            check_pretrained(options, self.family.network_class, student_config(self._transformer_config(), options))
        if options.lora is not None:
            with torch.device("meta"):
                network = self.family.network_class.from_config(self._transformer_config())
            lora_config(network, options.lora)

    def _transformer_config(self) -> dict[str, Any]:
        return self.location.read_config(self.family.network_class, "transformer/config.json", subfolder="transformer")

    def check_attention_backend(self) -> None:
        """Check `attention_backend`.

        Raises:
            ConfigurationError: If diffusers has no backend of this name.
        """
        known = [backend.value for backend in AttentionBackendName]
        if self.attention_backend is not None and self.attention_backend not in known:
            raise ConfigurationError(
                f"adapter.attention_backend is {self.attention_backend!r}; choose one of {', '.join(known)}, or null"
            )

    def use_attention_backend(self, network: TwoTimeModel) -> None:
        """Set `attention_backend` in the attention layers of a network; no effect if it is None."""
        if self.attention_backend is None:
            return
        # diffusers also makes it the default of all models in the process; the context restores the previous default.
        with attention_backend(self.attention_backend):
            network.set_attention_backend(self.attention_backend)

    def load(self, encoders: bool = True) -> None:
        """Load the text encoders, if `encoders` is True, and the autoencoder, frozen and in evaluation mode."""
        sharded = encoders and self.sharding is not None
        pipeline = self._load_pipeline(encoders and not sharded)
        weights = {}
        for name in filter(_is_text_encoder, self.location.components() if sharded else []):
            source = self.location.path, self.revision, name
            encoder, weights[name] = meta_encoder(*source, DTYPES[self.torch_dtype], self.location.variant_of(name))
            pipeline.register_modules(**{name: encoder})
        self.attach(pipeline, encoders)
        for name, stored in weights.items():
            assert self.sharding is not None
            self.sharding.shard_encoder(self.text_encoders()[name], stored)

    def _load_pipeline(self, encoders: bool) -> FewStepPipeline:
        skipped = ["transformer", *(() if encoders else filter(_is_text_encoder, self.location.components()))]
        pipeline: FewStepPipeline = self.location.load_pipeline(self.family, DTYPES[self.torch_dtype], skipped)
        return pipeline

    def attach(self, pipeline: FewStepPipeline, encoders: bool = True) -> None:
        """Use the tokenizers, scheduler, text encoders and autoencoder of a pipeline; freezes them.

        Args:
            pipeline: A pipeline without transformer.
            encoders: Whether prompts and images will be encoded. If not, the autoencoder is on the CPU except while it decodes.
        """
        self._pipeline, self._family, self._encoders = pipeline, type(pipeline), encoders
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
                if encoders:  # submodules move to the GPU together with the adapter
                    setattr(self, name, component)

    @property
    def family(self) -> type[FewStepPipeline]:
        """Few-step pipeline class of the family."""
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
            weights = self._stored_weights()
            network = meta_network(self.family.network_class, self._transformer_config(), weights).to(DTYPES[self.torch_dtype])
            self.prepare_teacher(network)
            self.sharding.shard(network, weights)
            return network
        teacher = self.location.load("transformer", self.family.network_class, DTYPES[self.torch_dtype])
        if updates := self._lora_updates():
            read_updated(teacher, self._stored_weights(), updates)
        return self.prepare_teacher(teacher)

    def _lora_updates(self) -> Mapping[str, LowRankUpdate]:
        """Updates of the teacher's weights by `lora`, read and checked once."""
        if not self.lora:
            return {}
        if self._updates is None:
            config = self._transformer_config()
            if "quantization_config" in config:
                raise self.location.source.error(
                    f"whose transformer is quantized, so adapter.lora {self.lora[0].path!r} cannot be merged into it; set "
                    "adapter.pretrained to the original weights"
                )

            def build() -> nn.Module:
                with init_empty_weights(include_buffers=False):
                    network = self.family.network_class.from_config(config)
                return nn.Module.to(network, DTYPES[self.torch_dtype])  # the override in diffusers warns about float32 modules

            self._updates = read_updates(self.lora, self.family.stock_class, build)
        return self._updates

    def prepare_teacher(self, network: nn.Module) -> nn.Module:
        """Freeze a transformer, set its attention backend, and set `embeds_guidance` from its configuration."""
        network = two_time(network)
        self.embeds_guidance = bool(network.config.get("guidance_embeds", False))
        self.use_attention_backend(network)
        return network.requires_grad_(False).eval()

    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, SmoothTimeReport | None]:
        """Build a copy of the teacher, or LoRA on its weights, with an interval input and, by default, smooth time."""
        teacher = two_time(teacher)
        if self.sharding is None:
            student, report = build_student(teacher, options)
        elif options.lora is None:
            source = self._stored_weights(options.pretrained), self.sharding
            student, report = build_sharded_student(self.family.network_class, dict(teacher.config), options, *source)
        else:
            source = self._stored_weights(), self.sharding
            student, report = build_sharded_lora(self.family.network_class, teacher, options, *source)
        self.use_attention_backend(student)
        return student, report

    def meta_student(self, options: StudentOptions) -> nn.Module:
        """A student as from `build_student`, without LoRA, with parameters on the meta device."""
        with init_empty_weights(include_buffers=False):
            student: TwoTimeModel = self.family.network_class.from_config(student_config(self._transformer_config(), options))
        return student

    def _stored_weights(self, student: str | None = None) -> StoredWeights:
        if student is not None:
            location = PipelineLocation(student, None, None, "student.pretrained")
            return stored_component(location.path, None, "transformer", "student.pretrained")[0]
        variant = self.location.variant_of("transformer")
        weights, _ = stored_component(self.location.path, self.revision, "transformer", variant=variant)
        return weights.updated(self._lora_updates())

    def unsharded_copy(self, network: nn.Module) -> nn.Module:
        """The network itself or, if it is sharded, an unsharded copy on the CPU of the first process."""
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
        """Number of tokens to which prompts are padded."""
        return self.max_sequence_length or self.pipeline.sequence_length

    def encoding_settings(self) -> dict[str, Any]:
        """Settings that determine latents and conditions: a fingerprint or the hub id of the pipeline, and its options."""
        pretrained, directory = self.pretrained, self.location.directory
        if directory is not None:
            components = [name for name in self.location.components() if name not in ("transformer", "scheduler")]
            pretrained = f"sha256:{fingerprint(directory, components)}"
        return {
            "pretrained": pretrained,
            "revision": self.revision,
            "variant": self.variant,
            "torch_dtype": self.torch_dtype,
            "max_sequence_length": self.max_sequence_length,
        }

    def encode_prompt(self, prompts: list[str]) -> Condition:
        """Encode B prompts; the empty prompt gives the null condition."""
        return self.pipeline.encode_condition(prompts, self.sequence_length)

    def text_encoders(self) -> dict[str, nn.Module]:
        """Text encoders of the pipeline: `text_encoder`, `text_encoder_2` and so on."""
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
            ConfigurationError: If the pipeline does not support the size.
        """
        try:
            return self.pipeline.latent_shape(height, width)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """Shift of the scheduler, which may increase with the resolution."""
        return self.pipeline.time_shift(latent_shape)

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: Tensor | float | None = None
    ) -> Tensor:
        """Velocity (B, C, h, w) from one forward pass."""
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
        """Average velocity (B, C, h, w) of the student from t down to r, from one forward pass."""
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
        """Policy of the student for the step from t down to r: N velocities (B, N, C, h, w), from one forward pass."""
        # The family converts tokens to latents row by row, so the N outputs are rows of a larger batch.
        outputs = self.pipeline.average_velocity(
            two_time(student), x_t, r, t, condition, self._guidance(guidance_scale, t), all_points=True
        )
        return outputs.unflatten(0, (len(x_t), -1))

    def mix_guidance(self, v_cond: Tensor, v_null: Tensor, scale: Tensor) -> Tensor:
        """Guided velocity from two branches, (B, C, h, w) each, and scales (B,), with the family's formula."""
        return self.pipeline.rescale_guidance(super().mix_guidance(v_cond, v_null, scale), v_cond)

    def feature_widths(self, layers: Sequence[int] | None = None) -> dict[int, int]:
        """Width D of the tokens that enter each of the given blocks; None: four evenly spaced blocks."""
        config = self._transformer_config()
        with torch.device("meta"):
            depth = len(trunk(self.family.network_class.from_config(config)))
        if layers is not None and (not layers or min(layers) < 0 or max(layers) >= depth):
            raise ConfigurationError(
                f"layers for features are {list(layers)}, but this transformer has blocks 0 to {depth - 1}; choose from these, "
                "or set layers to null"
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
        """Tokens (B, N, D) that enter the given blocks in one forward pass."""
        with record_block_inputs(network, layers) as inputs:
            self.pipeline.average_velocity(two_time(network), x_t, r, t, condition, self._guidance(guidance_scale, t))
        return [inputs[layer] for layer in layers]

    def _guidance(self, scale: Tensor | float | None, t: Tensor) -> Tensor | None:
        if not self.embeds_guidance:
            return None
        if scale is None:
            raise ConfigurationError(
                "guidance.scale is not set, but this checkpoint embeds the guidance scale; set it (3.5 is usual)"
            )
        return torch.as_tensor(scale, device=t.device, dtype=torch.float32).expand(len(t))

    def stock_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments that make the pipeline of `save_teacher` sample as in training, besides prompt, steps and size."""
        guidance = self.family.stock_guidance(guidance_scale, self.embeds_guidance)
        return guidance | stock_options(self.family.stock_class, self.sequence_length)

    def save_student(self, student: nn.Module, directory: Path) -> None:
        """Write the few-step pipeline of the family, which loads with `trust_remote_code=True`."""
        settings = self.sequence_length, self.stochastic_sampling
        save_few_step_pipeline(self._full_pipeline(), two_time(student), *settings, directory)

    def stock_obstacle(self, student: StudentOptions) -> str | None:
        """Why no stock network can represent students with these options, or None."""
        if student.policy_points > 1:
            return f"student.policy_points is {student.policy_points}, and stock networks have no policies"
        return None

    def stock_source(self, student: nn.Module, height: int, width: int) -> StockSource:
        """Networks and settings from which the stock forms of a student are computed, for one image size."""
        weights = self._stored_weights()
        teacher = meta_network(self.family.network_class, self._transformer_config(), weights)
        shift = self.time_shift(self.latent_shape(height, width))
        source = self.family, self._full_pipeline, two_time(student), teacher, weights
        return StockSource(*source, shift, self.stochastic_sampling)

    def check_stock_grid(self, student: nn.Module, nfe: int, height: int, width: int) -> None:
        """Check that a stock form can have N steps for one image size."""
        shift = self.time_shift(self.latent_shape(height, width))
        check_grid(two_time(student), self.family, StepGrid(nfe, shift, self.stochastic_sampling))

    @property
    def stock_grid_is_free(self) -> bool:
        """Whether the scheduler of a stock form has the student's grid for any number of steps."""
        return self.family.stock_passes_sigmas

    def meta_stock_network(self) -> ModelMixin:
        """The stock transformer with parameters on the meta device; the adapter need not be loaded."""
        return meta_stock_network(self.family.network_class, self._transformer_config())

    def lora_target_names(self, options: LoraOptions) -> list[str]:
        """Names of the layers that get low-rank updates; the adapter need not be loaded."""
        with torch.device("meta"):
            network = self.family.network_class.from_config(self._transformer_config())
        return sorted(lora_config(network, options).target_modules)

    def merge_lora(self, student: nn.Module) -> nn.Module:
        """Merge LoRA updates into the weights, in float32 on the CPU; returns the student itself if it has no LoRA."""
        return merge_lora_weights(two_time(student)) if lora_layers(student) else student

    def save_lora(self, student: nn.Module, directory: Path) -> None:
        """Write a LoRA student without its base model, for `load_lora_student`."""
        base_model = self.pretrained if self.revision is None else f"{self.pretrained}@{self.revision}"
        settings = self.sequence_length, self.stochastic_sampling
        save_lora_student(self.pipeline, two_time(student), *settings, base_model, self.lora, directory)

    def save_teacher(self, network: nn.Module, directory: Path) -> None:
        """Write the stock pipeline of the family."""
        save_stock_pipeline(self._full_pipeline(), two_time(network), directory)

    def _full_pipeline(self) -> FewStepPipeline:
        """The pipeline with unsharded text encoders; loads them if training has none, or has sharded ones."""
        return self.pipeline if self._encoders and self.sharding is None else self._load_pipeline(encoders=True)


def _is_text_encoder(component: str) -> bool:
    return component.startswith("text_encoder")
