"""Students in the package: own weights beside the shared components of their teacher, and no code."""

import json
from pathlib import Path

import torch

from lightning_distill.students.average_velocity_scheduler import AverageVelocityScheduler
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.teachers.families import FAMILIES
from lightning_distill.teachers.registry import resolve_pretrained

SHARED_COMPONENTS = "shared_components.json"
"""File of a student's directory that names another pipeline and the components to load from it."""


def has_shared_components(directory: Path) -> bool:
    """Whether a directory holds a part of its pipeline only, which `load_shipped_student` completes."""
    return (directory / SHARED_COMPONENTS).is_file()


def shared_components(directory: Path) -> list[str]:
    """Names of the components that a directory shares with another pipeline."""
    names: list[str] = json.loads((directory / SHARED_COMPONENTS).read_text())["components"]
    return names


def shared_base(directory: Path) -> str:
    """Name of the pipeline that a directory shares components with."""
    name: str = json.loads((directory / SHARED_COMPONENTS).read_text())["base"]
    return name


def load_shipped_student(name: str, torch_dtype: torch.dtype = torch.float32) -> FewStepPipeline:
    """Load a student with the classes of this package; no code of a directory runs.

    Args:
        name: A shipped name ("shapes-student").
        torch_dtype: Precision to load with.

    Raises:
        OSError: If a component is missing or not in safetensors.
    """
    directory = Path(resolve_pretrained(name))
    _, pipeline_class = json.loads((directory / "model_index.json").read_text())["_class_name"]
    (family,) = {family for family in FAMILIES.values() if family.__name__ == pipeline_class}
    shared = json.loads((directory / SHARED_COMPONENTS).read_text())
    own = {
        "transformer": family.network_class.from_pretrained(
            directory, subfolder="transformer", torch_dtype=torch_dtype, use_safetensors=True
        ),
        "scheduler": AverageVelocityScheduler.from_pretrained(directory, subfolder="scheduler"),
    }
    base = family.stock_class.from_pretrained(
        resolve_pretrained(shared["base"]), torch_dtype=torch_dtype, use_safetensors=True, **dict.fromkeys(own)
    )
    return family(**own, **{component: getattr(base, component) for component in shared["components"]})
