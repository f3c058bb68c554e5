"""Students in the package: own weights beside the shared components of their teacher, and no code."""

import json
import shutil
from pathlib import Path

import torch

from lightning_distill.digests import write_manifest
from lightning_distill.students.average_velocity_scheduler import AverageVelocityScheduler
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.teachers.families import FAMILIES
from lightning_distill.teachers.pipeline_directory import save_few_step_pipeline
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


def save_shipped_student(name: str, directory: str | Path) -> None:
    """Write the complete pipeline, which loads with `DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)`.

    Args:
        name: A shipped name ("shapes-student").
        directory: Where to write; created if missing. Files of the same names are replaced.

    Raises:
        OSError: If a component is missing or not in safetensors.
    """
    source, directory = Path(resolve_pretrained(name)), Path(directory)
    pipeline = load_shipped_student(name)
    stochastic_sampling: bool = pipeline.scheduler.config.stochastic_sampling
    save_few_step_pipeline(pipeline, pipeline.transformer, pipeline.sequence_length, stochastic_sampling, directory)
    for file in ("README.md", "export.json"):
        shutil.copyfile(source / file, directory / file)
    write_manifest(directory)
