"""License of a teacher, from its model card, for the model cards of its students."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, metadata_load
from lightning.pytorch.utilities import rank_zero_warn

from lightning_distill.teachers.registry import resolve_pretrained

_CARD = "README.md"
_LICENSE_FILES = ("LICENSE", "LICENCE", "NOTICE")


@dataclass(frozen=True)
class TeacherLicense:
    """License as in the metadata of model cards on the hub.

    Attributes:
        license: Identifier, such as "apache-2.0" or "other"; None if it is not known.
        name: Name of another license.
        link: Its address, or the name of one of `files`.
        files: License files of the teacher's directory, which are copied into exports.
    """

    license: str | None = None
    name: str | None = None
    link: str | None = None
    files: tuple[Path, ...] = ()

    def sentence(self) -> str:
        """Sentence of a model card."""
        label = self.name or (None if self.license == "other" else self.license)
        if label is None:
            label = self.link
        elif self.link is not None:
            label = f"[{label}]({self.link})"
        return f"The weights derive from the teacher's weights, whose license{f' ({label})' if label else ''} applies to them."


def teacher_license(name: str, revision: str | None = None) -> TeacherLicense:
    """License of a pipeline, from the metadata of its README or, without such metadata, from its license file.

    Args:
        name: A shipped name, a directory, or a hub id, whose README is downloaded.
        revision: Revision of a hub id.

    Returns:
        The license; unknown if the README has none or cannot be read.
    """
    directory = Path(resolve_pretrained(name))
    if directory.is_dir():
        files = (file for file in sorted(directory.iterdir()) if file.name.upper().startswith(_LICENSE_FILES))
        found = _from_card(directory / _CARD, tuple(file for file in files if file.is_file()))
        if found.license is None and found.files:
            name = re.sub(r"[^a-z0-9.]+", "-", f"{directory.name}-license".lower())
            return TeacherLicense("other", name, found.files[0].name, found.files)
        return found
    if name.count("/") != 1:
        return TeacherLicense()
    try:
        card = Path(hf_hub_download(name, _CARD, revision=revision))
    except (OSError, ValueError):  # offline, gated, or without a card: the license applies all the same
        rank_zero_warn(f"the license of {name} cannot be read from the hub; the model card does not name it")
        return TeacherLicense()
    found = _from_card(card, ())
    if found.link is not None and "://" not in found.link:
        link = f"https://huggingface.co/{name}/blob/{revision or 'main'}/{found.link}"
        return TeacherLicense(found.license, found.name, link)
    return found


def _from_card(card: Path, files: tuple[Path, ...]) -> TeacherLicense:
    if not card.is_file():
        return TeacherLicense(files=files)
    try:
        metadata: dict[str, Any] = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:
        rank_zero_warn(f"the metadata of {card} cannot be read ({' '.join(str(error).split())}); the card names no license")
        metadata = {}
    license, name, link = (
        str(metadata[key]) if metadata.get(key) else None for key in ("license", "license_name", "license_link")
    )
    if link is not None and "://" not in link and link not in {file.name for file in files} and files:
        link = None
    return TeacherLicense(license, name, link, files)
