"""Where pipelines are: those that ship with the package by their names, directories, and ids of the hub."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path

SHIPPED = {"shapes-teacher": "shapes_teacher", "shapes-student": "shapes_student"}
ANY_STEP = "any_step"
"""Folder of the export for any number of steps, in a directory of several exports."""
INDEX = "model_index.json"
_DIRECTORY = Path(__file__).resolve().parents[1] / "pretrained"


def resolve_pretrained(name: str) -> str:
    """The directory of a pipeline, or a hub id; a directory of several exports of a student stands for its `any_step` export.

    The directory of "shapes-student" holds its own weights only, without code: `load_shipped_student` loads the pipeline.
    """
    path = expand_pretrained(name)
    several = (Path(path) / ANY_STEP / INDEX).is_file() and not (Path(path) / INDEX).is_file()
    return str(Path(path) / ANY_STEP) if several else path


def expand_pretrained(name: str) -> str:
    """The directory of a shipped pipeline, another directory with `~` and environment variables expanded, or a hub id."""
    return str(_DIRECTORY / SHIPPED[name]) if name in SHIPPED else expand_path(name, "adapter.pretrained")


def check_location(name: str, revision: str | None) -> None:
    """See that a diffusers pipeline is where `adapter.pretrained` says, which the hub is asked only if the cache lacks it.

    Args:
        name: A shipped name, a directory, or a hub id.
        revision: Of a hub id.

    Raises:
        ConfigurationError: If it is not, or the hub cannot be reached.
    """
    directory = Path(resolve_pretrained(name))
    if directory.is_dir():
        if not (directory / INDEX).is_file():
            raise ConfigurationError(
                f"adapter.pretrained is {name!r}, which has no model_index.json; give a diffusers pipeline directory"
            )
    elif name in SHIPPED or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigurationError(
            f"adapter.pretrained is {name!r}, which is neither a pipeline directory nor a hub id like "
            "'black-forest-labs/FLUX.1-dev'; correct the path, or use 'shapes-teacher', which ships with the package"
        )
    elif not isinstance(try_to_load_from_cache(name, INDEX, revision=revision), str):
        _reach_hub(name, revision)


def _reach_hub(name: str, revision: str | None) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision, timeout=5)
    except Exception as error:  # whatever the hub's client of the day raises, the remedy is the same
        raise ConfigurationError(
            f"adapter.pretrained is {name!r}, which is not in the local cache and cannot be fetched from the hub "
            f"({type(error).__name__}); download it first, log in if it is gated, or give a pipeline directory"
        ) from error
