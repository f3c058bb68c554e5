"""`export.json`, which identifies a directory as an export of this package and says how to use it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_distill import __version__
from lightning_distill.teachers.student_exports import MARK


@dataclass(frozen=True)
class ExportMark:
    """Contents of `export.json`.

    Attributes:
        kind: Kind of the export, such as "any_step", "stock" or "lora".
        nfe: Numbers of steps that the export is for; None for any number.
        method: Name of the method that trained the network.
        base_model: Name or hub id of the pipeline that a LoRA or a single transformer is used with.
        base_lora: "path" and "weight" of each LoRA that has to be merged into that pipeline first, since the teacher had it.
        arguments: Arguments of the pipeline besides prompt, steps and size, such as `guidance_scale`.
        height: Default height of an image in pixels; None for the default of the pipeline.
        width: Default width of an image in pixels; None for the default of the pipeline.
        scheduler: "class" and "config" of the scheduler; None for the scheduler of the pipeline.
    """

    kind: str
    nfe: tuple[int, ...] | None = None
    method: str = ""
    base_model: str | None = None
    base_lora: Sequence[Mapping[str, Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    scheduler: Mapping[str, Any] | None = None

    def write(self, directory: Path) -> None:
        """Write the file."""
        (directory / MARK).write_text(json.dumps(asdict(self) | {"lightning_distill": __version__}, indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> "ExportMark":
        """Read the file of a directory.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is not what `write` writes.
        """
        content = json.loads((directory / MARK).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("kind"), str):
            raise ValueError(f"{MARK} names no kind of an export")
        nfe = content.get("nfe")
        if nfe is not None and not (isinstance(nfe, list) and nfe and all(type(each) is int for each in nfe)):
            raise ValueError(f"{MARK} has {nfe!r} for nfe, not a list of numbers of steps")
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        return cls(**{**known, "nfe": None if nfe is None else tuple(nfe)})
