"""The setting `adapter.lora`: LoRA files that are merged into a teacher, and where they are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path
from lightning_distill.teachers.pipeline_source import PipelineSource

SETTING = "adapter.lora"
WEIGHTS = "pytorch_lora_weights.safetensors"
"""Name of the file that diffusers writes."""
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class TeacherLora:
    r"""LoRA that is merged into the teacher's transformer, :math:`W + w \frac{\alpha}{\text{rank}} B A`.

    Args:
        path: A safetensors file, a directory, or a hub id.
        weight: Weight w of the update, a finite number; 1 is its full strength.
        weight_name: Name of the file in a directory or on the hub. None: the only safetensors file, or
            pytorch_lora_weights.safetensors.

    Raises:
        ConfigurationError: If the path is empty, or the weight is not finite.
    """

    path: str
    weight: float = 1.0
    weight_name: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigurationError(f"{SETTING} has an empty path; set it to a safetensors file, a directory or a hub id")
        if not math.isfinite(self.weight):
            raise ConfigurationError(f"{SETTING} has the weight {self.weight} for {self.path!r}; set it to a finite number")

    @property
    def source(self) -> PipelineSource:
        """The setting that names the file, for error messages."""
        return PipelineSource(SETTING, self.path)

    @property
    def name(self) -> str:
        """Name in exports: the hub id, or the last part of a path, which means nothing on other machines."""
        path = Path(expand_path(self.path, SETTING))
        return path.name if path.exists() else self.path

    def __str__(self) -> str:
        """Name, file name and weight, for model cards."""
        return f"{self.name}{'' if self.weight_name is None else f'/{self.weight_name}'} (weight {self.weight:g})"

    def file(self) -> Path:
        """The file, downloaded for a hub id.

        Raises:
            ConfigurationError: If there is no such file, or several files are possible.
        """
        path = Path(expand_path(self.path, SETTING))
        if path.is_dir():
            return path / self._choose([each.name for each in path.iterdir() if each.is_file()])
        if not path.exists() and _is_hub_id(self.path):
            return self._download()
        if not path.exists():
            raise self.source.error("which is neither a file, a directory nor a hub id; correct the path")
        if path.suffix != _SUFFIX:
            raise self.source.error("which is not a safetensors file; convert it to safetensors")
        if self.weight_name is not None:
            raise self.source.error(f"a file, but its weight_name is {self.weight_name!r}; set weight_name to null")
        return path

    def _choose(self, names: Iterable[str]) -> str:
        found = sorted(name for name in names if name.endswith(_SUFFIX))
        if self.weight_name is not None:
            if self.weight_name not in found:
                raise self.source.error(f"which has no safetensors file {self.weight_name!r}; correct its weight_name")
            return self.weight_name
        if WEIGHTS in found:
            return WEIGHTS
        if not found:
            raise self.source.error("which has no safetensors file; set it to LoRA in safetensors files")
        if len(found) > 1:
            raise self.source.error(f"which has the files {', '.join(found)}; set its weight_name to one of them")
        return found[0]

    def _download(self) -> Path:
        cached = try_to_load_from_cache(self.path, self.weight_name or WEIGHTS)
        if isinstance(cached, str):
            return Path(cached)
        try:
            name = self._choose(HfApi().list_repo_files(self.path))
            return Path(hf_hub_download(self.path, name))
        except ConfigurationError:
            raise
        except Exception as error:  # as `registry.check_location`: the remedy is the same for all errors of the hub's client
            raise self.source.error(
                f"which is not in the local cache and cannot be fetched from the hub ({type(error).__name__}); download it "
                "first, log in if it is gated, or give a file"
            ) from error


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(_SUFFIX)
