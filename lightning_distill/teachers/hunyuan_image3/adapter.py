"""Adapter for HunyuanImage 3.0, whose model code is part of the checkpoint."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from torch import Tensor, nn
from transformers import GenerationConfig

from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path
from lightning_distill.students import few_step_hunyuan_image3 as family
from lightning_distill.students.expert_routing import Routing
from lightning_distill.students.hunyuan_image3_layout import TokenLayout
from lightning_distill.students.two_time_hunyuan_image3 import TwoTimeHunyuanImage3
from lightning_distill.teachers.component_files import check_component
from lightning_distill.teachers.diffusers_adapter import DTYPES
from lightning_distill.teachers.fingerprint import fingerprint
from lightning_distill.teachers.hunyuan_image3.directory import (
    is_hunyuan_image3,
    is_student,
    missing_files,
    published_class,
    read_config,
    read_weights,
    save_model,
    two_time_class,
)
from lightning_distill.teachers.hunyuan_image3.networks import (
    IMPLEMENTATIONS,
    build_meta_student,
    build_on_meta_device,
    build_student,
    read_teacher,
)
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.pipeline_files import check_digests
from lightning_distill.teachers.pipeline_source import PipelineSource
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student_options import StudentOptions
from lightning_distill.teachers.usage import ExportCode

_LOAD = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this/directory", trust_remote_code=True{options})
model.load_tokenizer("this/directory")
"""
_STUDENT = """image = model.sample_images(
{inputs}
)[0]
"""
_TEACHER = """model.generation_config.diff_infer_steps = {steps}
model.generation_config.diff_guidance_scale = {guidance_scale}
image = model.generate_image(prompt="a prompt", image_size="{height}x{width}")
"""
_CODE = ExportCode(
    library="transformers",
    student=_LOAD.format(options="") + _STUDENT,
    teacher=_LOAD.format(options=', attn_implementation="sdpa", moe_impl="eager"') + _TEACHER,
)


class HunyuanImage3Adapter(ModelAdapter):
    """Adapter for HunyuanImage 3.0, a mixture of experts with prompt and image tokens in one sequence.

    The checkpoint contains the model code, in an older or a newer version; this adapter supports both. The newer version has
    two flags. `cfg_distilled`: guidance is an input (otherwise, it needs two branches). `use_meanflow`: r has a separate
    token. The published model can also rewrite prompts; this adapter does not change them.

    Args:
        pretrained: A directory in the published layout, or a hub id ("tencent/HunyuanImage-3.0"), which is downloaded
            completely.
        trust_remote_code: Whether to run the Python files of the checkpoint. Loading needs True.
        revision: Revision of a hub id.
        torch_dtype: Dtype of the frozen weights: "float32", "bfloat16" or "float16". Time embeddings and trainable weights
            are always float32.
        max_sequence_length: Number of tokens before the image, including template and system prompt. Longer prompts are
            truncated.
        system_prompt: Text before every prompt, or None.
    """

    supports_sharding: ClassVar[bool] = True

    def __init__(
        self,
        pretrained: str,
        trust_remote_code: bool = False,
        revision: str | None = None,
        torch_dtype: str = "bfloat16",
        max_sequence_length: int = 256,
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        self.pretrained = expand_path(pretrained, "adapter.pretrained")
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.torch_dtype = torch_dtype
        self.max_sequence_length = max_sequence_length
        self.system_prompt = system_prompt
        self.embeds_guidance = False
        self._layout: TokenLayout | None = None
        self._generation_config: Any = None
        self._vae: list[Any] = []  # a list, because submodules move to the GPU together with the adapter
        self._encoders = True

    @property
    def name(self) -> str:
        """Name of the teacher in model cards: the directory or hub id."""
        return str(self.pretrained)

    @property
    def export_code(self) -> ExportCode:
        """Code snippets for the model cards of exports."""
        return _CODE

    @property
    def weights_dtype(self) -> str:
        """Dtype of the frozen weights, such as "bfloat16"."""
        return str(self.torch_dtype)

    def check(self) -> None:
        """Check the settings before anything is loaded, and set `embeds_guidance`.

        Raises:
            ConfigurationError: If the settings cannot work.
        """
        if self.torch_dtype not in DTYPES:
            raise ConfigurationError(f"adapter.torch_dtype is {self.torch_dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.max_sequence_length < 1:
            raise ConfigurationError(
                f"adapter.max_sequence_length is {self.max_sequence_length}; set it to the length of the longest prompts in "
                "tokens, such as 256"
            )
        config = self._read_config()
        if is_student(config):
            raise ConfigurationError(
                f"adapter.pretrained is {self.pretrained!r}, an exported student; set it to the checkpoint of its teacher"
            )
        if not is_hunyuan_image3(config):
            raise ConfigurationError(
                f"adapter.pretrained is {self.pretrained!r}, which is not HunyuanImage 3.0 with its code; set it to a "
                "directory whose config.json has the model_type hunyuan_image_3_moe and an auto_map"
            )
        if Path(self.pretrained).is_dir():
            self._check_files(Path(self.pretrained))
        if not self.trust_remote_code:
            raise ConfigurationError(
                f"adapter.pretrained is {self.pretrained!r}, which contains model code; review its Python files, and set "
                "adapter.trust_remote_code to true to run them"
            )
        self.embeds_guidance = bool(config.get("cfg_distilled", False))

    def _check_files(self, directory: Path) -> None:
        source = PipelineSource("adapter.pretrained", self.pretrained)
        check_digests(directory, source)
        with source.loading("index"):
            missing = missing_files(directory)
        if missing:
            raise source.error(f"which lacks {', '.join(missing)}; download the complete checkpoint")
        check_component(directory, ".", None, source)

    def _read_config(self) -> dict[str, Any]:
        name = self.pretrained
        if Path(name).is_dir():
            return read_config(Path(name))
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ConfigurationError(
                f"adapter.pretrained is {name!r}, which is neither a directory nor a hub id like 'tencent/HunyuanImage-3.0'; "
                "correct the path"
            )
        try:
            return read_config(Path(hf_hub_download(name, "config.json", revision=self.revision)).parent)
        except Exception as error:  # hub clients raise many types of errors, with the same remedy
            raise ConfigurationError(
                f"adapter.pretrained is {name!r}, which is not in the local cache and cannot be fetched from the hub "
                f"({type(error).__name__}); download it first, or set it to a directory"
            ) from error

    @property
    def directory(self) -> Path:
        """Directory of the checkpoint; a hub id is downloaded."""
        local = Path(self.pretrained)
        return local if local.is_dir() else Path(snapshot_download(self.pretrained, revision=self.revision))

    def encoding_settings(self) -> dict[str, Any]:
        """Settings that determine latents and conditions: a fingerprint or the hub id of the checkpoint, and its options."""
        pretrained, directory = self.pretrained, Path(self.pretrained)
        return {
            "pretrained": f"sha256:{fingerprint(directory, ['.'])}" if directory.is_dir() else pretrained,
            "revision": self.revision,
            "torch_dtype": self.torch_dtype,
            "max_sequence_length": self.max_sequence_length,
            "system_prompt": self.system_prompt,
        }

    def load(self, encoders: bool = True) -> None:
        """Load the tokenizer and the autoencoder, frozen and in evaluation mode; there are no text encoders."""
        self.check()  # run no code of the checkpoint unless it is trusted
        directory = self.directory
        published: Any = published_class(directory)
        config = published.config_class.from_pretrained(directory, **IMPLEMENTATIONS)
        with torch.device("meta"):
            model = published(config)
        model.generation_config = GenerationConfig.from_pretrained(directory)
        family.load_tokenizer(model, published, str(directory))
        layout = family.token_layout(model, self.system_prompt, self.max_sequence_length)
        vae = type(model.vae).from_config(config.vae)
        vae.load_state_dict(
            {
                name.removeprefix("vae."): weight
                for name, weight in read_weights(directory, {f"vae.{name}" for name in vae.state_dict()}).items()
            }
        )
        # The `to` of diffusers warns of modules in float32, which this autoencoder does not have.
        vae = nn.Module.to(vae, DTYPES[self.torch_dtype]).requires_grad_(False).eval()
        self.attach(vae, layout, model.generation_config, encoders)

    def attach(self, vae: nn.Module, layout: TokenLayout, generation_config: Any, encoders: bool = True) -> None:
        """Use this autoencoder and this token layout.

        Args:
            vae: Frozen autoencoder in evaluation mode.
            layout: Token layout of prompts and images.
            generation_config: Generation settings of the checkpoint; `flow_shift` is the shift of the sampling grid.
            encoders: Whether images will be encoded. If not, the autoencoder is on the CPU except while it decodes.
        """
        self._vae, self._layout, self._generation_config, self._encoders = [vae], layout, generation_config, encoders
        if encoders:
            self.add_module("vae", vae)

    @property
    def layout(self) -> TokenLayout:
        """Token layout of prompts and images."""
        if self._layout is None:
            raise RuntimeError("the adapter is not loaded yet; call load() first")
        return self._layout

    def load_teacher(self) -> nn.Module:
        """Load the image generation network, frozen and in evaluation mode."""
        self.check()
        return read_teacher(self.directory, DTYPES[self.torch_dtype], self.sharding)

    def build_student(self, teacher: nn.Module, options: StudentOptions) -> tuple[nn.Module, SmoothTimeReport | None]:
        """Build a trainable copy of the teacher with an interval input and, by default, smooth time."""
        return build_student(two_time(teacher), options, self.directory, self.sharding)

    def meta_student(self, options: StudentOptions) -> nn.Module:
        """A student as from `build_student`, with parameters on the meta device."""
        return build_meta_student(self.directory, options)

    def unsharded_copy(self, network: nn.Module) -> nn.Module:
        """The network itself or, if it is sharded, an unsharded copy on the CPU of the first process."""
        if self.sharding is None:
            return network
        sharded = two_time(network)
        copy = build_on_meta_device(two_time_class(sharded.published, TwoTimeHunyuanImage3), sharded.config)
        if state := self.sharding.gather(network):
            copy.load_state_dict({**state, **dict(network.named_buffers())}, assign=True, strict=False)
        return copy

    def frozen_routing(self) -> Routing:
        """Context with frozen routing: every forward pass uses the expert assignments of the first."""
        return Routing()

    def encode_prompt(self, prompts: list[str]) -> Condition:
        """Tokenize B prompts; the network encodes the tokens itself."""
        try:
            return self.layout.condition(prompts, self._vae[0].device)
        except ValueError as error:
            raise ConfigurationError(f"adapter.{error}") from error

    def null_condition_for(self, condition: Condition, null_condition: Condition) -> Condition:
        """The prompts with all tokens dropped: the published null condition has the length of the prompt."""
        return {**condition, "prompt_ids": condition["null_ids"]}

    def text_encoders(self) -> dict[str, nn.Module]:
        """No text encoders: the network encodes prompts itself."""
        return {}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""
        return family.encode_latents(self._vae[0], images)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of latents (B, C, h, w)."""
        (vae,) = self._vae
        if self._encoders:
            return family.decode_latents(vae, latents)
        try:
            return family.decode_latents(nn.Module.to(vae, latents.device), latents)
        finally:
            vae.cpu()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of H x W pixels.

        Raises:
            ConfigurationError: If the checkpoint does not support the size.
        """
        try:
            return family.latent_shape(self.layout.config, self.layout, height, width)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    def time_shift(self, latent_shape: tuple[int, ...]) -> float:
        """Shift of the checkpoint's sampling grid."""
        return float(self._generation_config.flow_shift)

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: Tensor | float | None = None
    ) -> Tensor:
        """Velocity (B, C, h, w) from one forward pass."""
        return self._evaluate(network, x_t, None, t, condition, guidance_scale)

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
        return self._evaluate(student, x_t, r, t, condition, guidance_scale)

    def _evaluate(
        self,
        network: nn.Module,
        x_t: Tensor,
        r: Tensor | None,
        t: Tensor,
        condition: Condition,
        guidance_scale: Tensor | float | None,
    ) -> Tensor:
        vertical, horizontal = self.layout.config.vae_downsample_factor
        sequence = self.layout.sequence(condition, vertical * x_t.shape[-2], horizontal * x_t.shape[-1])
        guidance = None
        if self.embeds_guidance:
            if guidance_scale is None:
                raise ConfigurationError(
                    "guidance.scale is not set, but this checkpoint embeds the guidance scale; set it (2.5 is usual)"
                )
            guidance = torch.as_tensor(guidance_scale, device=t.device, dtype=torch.float32).expand(len(t))
        return two_time(network).average_velocity(x_t, r, t, sequence, guidance)

    def save_student(self, student: nn.Module, directory: Path) -> None:
        """Write the model in its published layout, with the few-step sampler; it loads with `trust_remote_code=True`."""
        student = two_time(student)
        settings = {
            "interval_embedding": student.config.interval_embedding,
            "time_frequency_bound": student.config.time_frequency_bound,
            "interval_frequency_bound": student.config.interval_frequency_bound,
            "system_prompt": self.system_prompt,
            "max_sequence_length": self.max_sequence_length,
            "stochastic_sampling": self.stochastic_sampling,
        }
        save_model(student, self.directory, directory, settings)

    def save_teacher(self, network: nn.Module, directory: Path) -> None:
        """Write the network as a published model.

        Raises:
            ValueError: If the published model cannot represent the network.
        """
        network = two_time(network)
        if hasattr(network.config, "interval_embedding"):
            raise ValueError("the published model cannot represent a network with two times; save it as a student")
        save_model(network, self.directory, directory, {})


def two_time(network: nn.Module) -> TwoTimeHunyuanImage3:
    """Narrow the type of a network.

    Raises:
        TypeError: If it is not a two-time HunyuanImage 3.0 network.
    """
    if not isinstance(network, TwoTimeHunyuanImage3):
        raise TypeError(f"HunyuanImage3Adapter needs a two-time HunyuanImage 3.0 network, not a {type(network).__name__}")
    return network
