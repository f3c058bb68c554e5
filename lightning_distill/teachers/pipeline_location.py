"""A teacher's pipeline, in a directory or on the hub: its index, configurations, files and components."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline

from lightning_distill.paths import expand_path
from lightning_distill.teachers.pipeline_files import (
    INDEX,
    PipelineFiles,
    check_pipeline,
    component_classes,
    load_component,
    read_index,
    stock_class,
)
from lightning_distill.teachers.pipeline_source import PipelineSource
from lightning_distill.teachers.registry import resolve_pretrained


class PipelineLocation:
    """Directory or hub id of a stock pipeline of diffusers.

    Args:
        pretrained: A shipped name, a directory, or a hub id.
        revision: Revision of a hub id.
        variant: Preferred variant of the weights, such as "fp16".
        setting: Dotted name of the setting of `pretrained`, for error messages.
    """

    def __init__(self, pretrained: str, revision: str | None, variant: str | None, setting: str = "adapter.pretrained") -> None:
        self.source = PipelineSource(setting, pretrained)
        self.path = resolve_pretrained(expand_path(pretrained, setting))
        self.revision = revision
        self.variant = variant
        self._files: PipelineFiles | None = None

    @property
    def directory(self) -> Path | None:
        """The directory; None for a hub id."""
        return Path(self.path) if Path(self.path).is_dir() else None

    def index(self) -> dict[str, Any]:
        """Contents of `model_index.json`, downloaded for a hub id.

        Raises:
            ConfigurationError: If it cannot be read.
        """
        if self.directory is not None:
            return read_index(self.directory, self.source)
        return self.read_config(DiffusionPipeline, INDEX)

    def read_config(self, kind: type[ConfigMixin], file: str, **where: str) -> dict[str, Any]:
        """Read a configuration, downloaded for a hub id.

        Args:
            kind: Class of the component or pipeline.
            file: Path of the file in the pipeline, for the error message.
            **where: `subfolder` of a component.

        Raises:
            ConfigurationError: If it cannot be read.
        """
        try:
            config: Any = kind.load_config(self.path, revision=self.revision, **where)
        except (OSError, ValueError) as error:
            raise self.source.error(
                f"whose {file} cannot be read; download the complete pipeline, and log in if it is gated"
            ) from error
        if not isinstance(config, dict):
            raise self.source.error(f"whose {file} is not a configuration; download it again")
        return config

    def check_files(self) -> None:
        """Check the files of a directory once; those of a hub id are checked when they are loaded.

        Raises:
            ConfigurationError: If a file is missing or damaged.
        """
        if self._files is None and self.directory is not None:
            self._files = check_pipeline(self.directory, self.source, variant=self.variant)

    def variant_of(self, component: str) -> str | None:
        """Variant of a component's weights."""
        return self.variant if self._files is None else self._files.variants.get(component)

    def absent(self) -> Collection[str]:
        """Components that the pipeline does without."""
        self.check_files()
        if self._files is not None:
            return self._files.absent
        return [name for name, value in self.index().items() if value == [None, None]]

    def components(self) -> list[str]:
        """Names of the components that the pipeline has."""
        absent = self.absent()
        return [name for name in component_classes(self.index()) if name not in absent]

    def load(self, name: str, kind: type[Any], dtype: torch.dtype) -> Any:
        """Load a component.

        Raises:
            ConfigurationError: If it cannot be loaded.
        """
        return load_component(self.path, name, kind, self.source, dtype, self.variant_of(name), self.revision)

    def load_pipeline(self, family: type[DiffusionPipeline], dtype: torch.dtype, without: Collection[str] = ()) -> Any:
        """Load the components, with the settings of the index.

        Args:
            family: Class of the pipeline: the stock class or the few-step class of its family.
            dtype: Dtype of the weights.
            without: Components that are not loaded.

        Raises:
            ConfigurationError: If a component cannot be loaded.
        """
        absent = self.absent()
        components: dict[str, Any] = dict.fromkeys([*absent, *without])
        for name, (library, kind_name) in component_classes(self.index()).items():
            kind = stock_class(library, kind_name)
            if name not in components and kind is not None:
                components[name] = self.load(name, kind, dtype)
        with self.source.loading("pipeline"):
            return family.from_pretrained(self.path, revision=self.revision, **components)
