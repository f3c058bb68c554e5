"""Directories of exports: written completely or not at all, with a card, a mark and a manifest."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lightning_distill.digests import write_manifest
from lightning_distill.errors import ConfigurationError, NonFiniteError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.mark import MARK, ExportMark
from lightning_distill.export.readme import write_card
from lightning_distill.outputs import check_directory, directory_contents, sync, writing
from lightning_distill.paths import expand_path
from lightning_distill.sharding.weight_files import safetensors_shapes
from lightning_distill.teachers.finite import first_non_finite
from lightning_distill.teachers.usage import ExportCode


def check_export_directory(directory: str | Path, setting: str = "directory") -> Path:
    """Check that an export to this directory is possible and would destroy no other files.

    Args:
        directory: Target directory.
        setting: Name of its setting, for error messages.

    Raises:
        ConfigurationError: If the directory cannot be written, or has files that are not an earlier export.
    """
    directory = Path(expand_path(str(directory), setting))
    check_directory(directory, setting)
    occupied = bool(directory_contents(directory)) if directory.is_dir() else directory.exists()
    if occupied and not (directory / MARK).is_file():
        raise ConfigurationError(
            f"{setting} is {str(directory)!r}, which has files that are not an earlier export; choose another directory, or "
            "empty it"
        )
    return directory


def complete_export(
    directory: Path,
    target: Path,
    mark: ExportMark,
    weights: Mapping[str, Tensor] | None,
    card: ModelCard,
    arguments: Mapping[str, object],
    code: ExportCode,
) -> None:
    """Add card, mark and manifest to written weights, after a check that these are complete and finite.

    Args:
        directory: Directory with the weights.
        target: Where it is moved to, for error messages.
        mark: Contents of `export.json`.
        weights: Tensors with the names and shapes of the weights. None: only whether the written ones are finite is checked.
        card: Contents of the README.
        arguments: Arguments of the pipeline for the card, besides prompt, steps and size.
        code: Code snippets for the card.

    Raises:
        NonFiniteError: If a weight is NaN or infinite.
    """
    write_card(directory, card, mark.kind, arguments, code)
    mark.write(directory)
    _check_weights(directory, weights, target)
    write_manifest(directory)


def replace_directory(directory: str | Path, write: Callable[[Path], None]) -> Path:
    """Write to a temporary sibling, and rename: the target is the complete old export or the complete new one.

    Args:
        directory: Target directory; an earlier export in it is replaced.
        write: Writes the contents to a given directory.

    Returns:
        The directory.

    Raises:
        ConfigurationError: If the directory has files that are not an earlier export.
    """
    target = check_export_directory(directory).absolute()
    unfinished, replaced = (target.with_name(f".{target.name}.{state}") for state in ("unfinished", "replaced"))
    for leftover in (unfinished, replaced):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with writing(target):
        try:
            unfinished.mkdir(parents=True)
            write(unfinished)
            for path in (*unfinished.rglob("*"), unfinished):
                sync(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)  # it would keep a full disk full
            raise
    if target.exists():
        os.replace(target, replaced)  # a rename cannot replace a directory that is not empty
    os.replace(unfinished, target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def _check_weights(directory: Path, weights: Mapping[str, Tensor] | None, target: Path) -> None:
    """Check that one component, or the directory itself, has all weights, and that they are finite; reads the written files.

    Raises:
        NonFiniteError: If a weight is NaN or infinite.
    """
    expected = {(name, *value.shape) for name, value in (weights or {}).items()}
    for component in (directory, *(path for path in directory.iterdir() if path.is_dir())):
        shapes: set[tuple[object, ...]] = set()
        for file in component.glob("*.safetensors"):
            shapes |= {(name, *shape) for name, shape in safetensors_shapes(file).items()}
        if shapes and shapes >= expected:
            break
    else:
        raise RuntimeError(f"nothing was exported to {target}: the files written lack weights of the network")
    for file in component.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping
                if (weights is None or name in weights) and first_non_finite({name: tensors.get_tensor(name)}):
                    raise NonFiniteError(
                        f"nothing was exported to {target}, because {name} is NaN or infinite; export an earlier checkpoint"
                    )
