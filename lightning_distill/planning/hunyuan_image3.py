"""HunyuanImage 3.0 on fake tensors: networks, autoencoder and token layout, from the `config.json` of a checkpoint."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLHunyuanVideo15
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.planning.fake_pipeline import to_fake
from lightning_distill.planning.hunyuan_image3_network import HunyuanImage3Model
from lightning_distill.planning.networks import MEASURED_BLOCKS, set_networks
from lightning_distill.students import expert_routing
from lightning_distill.students.hunyuan_image3_layout import ImageTokens, TokenLayout
from lightning_distill.students.two_time_hunyuan_image3 import TwoTimeHunyuanImage3
from lightning_distill.teachers.diffusers_adapter import DTYPES
from lightning_distill.teachers.hunyuan_image3.adapter import HunyuanImage3Adapter
from lightning_distill.teachers.hunyuan_image3.directory import read_config, two_time_class
from lightning_distill.teachers.hunyuan_image3.networks import build_on_meta_device, student_config
from lightning_distill.teachers.student_options import StudentOptions

SHIPPED_CONFIG = Path(__file__).resolve().parent / "pipelines" / "HunyuanImage-3.0"
"""Directory with the published sizes, as public reimplementations state them; the published file itself was not at hand."""
HUB_ID = "tencent/HunyuanImage-3.0"
FLOW_SHIFT = 3.0


def checkpoint_config_directory(adapter: HunyuanImage3Adapter, model_config: str | None) -> Path:
    """Directory with the `config.json` of a checkpoint; weights and code may be missing there.

    Args:
        adapter: Adapter of the checkpoint.
        model_config: Directory to use in place of `adapter.pretrained`.

    Raises:
        ConfigurationError: If there is no such directory on this machine.
    """
    directory = Path(model_config or adapter.pretrained)
    if read_config(directory).get("model_type") == "hunyuan_image_3_moe":
        return directory
    if model_config is not None:
        raise ConfigurationError(
            f"model_config is {model_config!r}, which has no config.json of HunyuanImage 3.0; set it to a directory with one"
        )
    cached = None
    if adapter.pretrained.count("/") == 1 and not directory.is_dir():
        cached = try_to_load_from_cache(adapter.pretrained, "config.json", revision=adapter.revision)
    if isinstance(cached, str):
        return Path(cached).parent
    if adapter.pretrained == HUB_ID:
        return SHIPPED_CONFIG
    raise ConfigurationError(
        f"adapter.pretrained is {adapter.pretrained!r}, whose config.json is not on this machine; set --model_config to a "
        f"directory that has it, or plan for {HUB_ID}"
    )


class FixedLengthLayout(TokenLayout):
    """Token layout in which every prompt has the maximum length; the tokens are all zero.

    Args:
        config: Configuration of the checkpoint.
        max_sequence_length: Number of tokens of each prompt.
    """

    def __init__(self, config: Any, max_sequence_length: int) -> None:
        super().__init__(SimpleNamespace(pad_token_id=0), None, config, "pretrain", None, max_sequence_length)

    def condition(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Token ids (B, L) of B prompts and of the empty prompt, and prompt lengths (B,)."""
        ids = torch.zeros(len(prompts), self.max_sequence_length, dtype=torch.long)
        return {"prompt_ids": ids, "null_ids": ids, "prompt_length": torch.full((len(prompts),), self.max_sequence_length)}

    def image_tokens(self, height: int, width: int) -> ImageTokens:
        """Tokens of an image of height x width pixels, which need not be one of the checkpoint's sizes."""
        vertical, horizontal = (factor * self.config.patch_size for factor in self.config.vae_downsample_factor)
        rows, columns = height // vertical, width // horizontal
        guided, two_times = (bool(getattr(self.config, flag, False)) for flag in ("cfg_distilled", "use_meanflow"))
        start = 4 + guided + two_times  # after <boi> <size> <ratio> <timestep>
        return ImageTokens(
            ids=torch.zeros(start + rows * columns + 1, dtype=torch.long),
            image=slice(start, start + rows * columns),
            shape=(rows, columns),
            timestep=3,
            guidance=4 if guided else None,
            timestep_r=4 + guided if two_times else None,
        )


class ImageAutoencoder(AutoencoderKLHunyuanVideo15):
    """Autoencoder of HunyuanVideo 1.5, which has the sizes of this model's, for images.

    An image is encoded as a clip of equal frames, as many as the autoencoder processes at once.
    """

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode images (B, 3, H, W) side by side: attention in diffusers 0.42 fails for more than one sample."""
        count, frames = len(x), self.config.temporal_compression_ratio + 1
        wide = torch.cat(x.unbind(), dim=-1)[None, :, None].expand(-1, -1, frames, -1, -1)
        latents = torch.cat(super().encode(wide).latent_dist.mode().chunk(count, dim=-1))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))


def attach_fake_components(adapter: HunyuanImage3Adapter, directory: Path, mode: FakeTensorMode) -> None:
    """Attach an autoencoder on fake tensors and a token layout to an adapter, in place of `check` and `load`."""
    config = _config(directory)
    vae_names = {"ffactor_spatial": "spatial_compression_ratio", "ffactor_temporal": "temporal_compression_ratio"}
    vae_names |= {name: name for name in ("latent_channels", "block_out_channels", "layers_per_block")}
    vae_config = {diffusers_name: config.vae[name] for name, diffusers_name in vae_names.items() if name in config.vae}
    with torch.device("meta"):
        vae = ImageAutoencoder(**vae_config)
    nn.Module.to(vae, DTYPES[adapter.torch_dtype]).requires_grad_(False).eval()
    to_fake(vae, mode)
    adapter.attach(vae, FixedLengthLayout(config, adapter.max_sequence_length), SimpleNamespace(flow_shift=FLOW_SHIFT))


def _config(directory: Path) -> SimpleNamespace:
    return SimpleNamespace(**{"use_mixed_mlp_moe": True, "num_shared_expert": 1, "patch_size": 1, **read_config(directory)})


@dataclass(frozen=True)
class CheckpointNetworks:
    """Networks of a checkpoint.

    Attributes:
        config: Configuration of the checkpoint.
        depths: Number of blocks, under `layers`, if there are more than are measured.
    """

    config: SimpleNamespace
    depths: dict[str, int]

    def build(self, module: TeacherStudentBase, depths: Mapping[str, int], mode: FakeTensorMode) -> None:
        """Build the networks of a method on fake tensors; see `FakeNetworks.build`."""
        adapter = module.adapter
        assert isinstance(adapter, HunyuanImage3Adapter)
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = depths.get("layers", config.num_hidden_layers)
        teacher = _network(config, DTYPES[adapter.torch_dtype], mode).requires_grad_(False).eval()
        set_networks(module, teacher, lambda options: _student(config, options, mode))


def checkpoint_networks(directory: Path) -> CheckpointNetworks:
    """The networks of a checkpoint.

    Args:
        directory: Directory with its `config.json`.
    """
    config = _config(directory)
    depth = config.num_hidden_layers
    return CheckpointNetworks(config, {"layers": depth} if depth > MEASURED_BLOCKS + 1 else {})


def _student(config: Any, options: StudentOptions, mode: FakeTensorMode) -> TwoTimeHunyuanImage3:
    student = _network(student_config(config, options), torch.float32, mode)
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return student.requires_grad_(True).train()


def _network(config: Any, dtype: torch.dtype, mode: FakeTensorMode) -> TwoTimeHunyuanImage3:
    network = build_on_meta_device(two_time_class(HunyuanImage3Model, TwoTimeHunyuanImage3), config, dtype)
    to_fake(network, mode)
    return network


@contextmanager
def even_routing() -> Iterator[None]:
    """Route equally many tokens to all experts: the real counts depend on weights, which are not read."""

    def even(experts: Tensor, count: int) -> list[int]:
        share, more = divmod(len(experts), count)
        return [share + (i < more) for i in range(count)]

    with patch.object(expert_routing, "tokens_per_expert", even):
        yield
