"""Fixtures of tiny FLUX pipelines, written once per session."""

from pathlib import Path

import pytest
import torch

from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from tests.tiny import FLUX_DEV_SHIFT, load_adapter, save_tiny_pipeline


@pytest.fixture(scope="session")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stock FLUX pipeline without embedded guidance, like that of `EmbeddedFluxAdapter`."""
    torch.manual_seed(0)
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "teacher", scheduler={"shift": 2.0})


@pytest.fixture(scope="session")
def guided_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stock FLUX pipeline with embedded guidance and a resolution-dependent shift, like FLUX.1-dev."""
    torch.manual_seed(1)
    path: Path = tmp_path_factory.mktemp("tiny") / "guided"
    return save_tiny_pipeline(path, guidance_embeds=True, scheduler=FLUX_DEV_SHIFT)


@pytest.fixture
def adapter(teacher_directory: str) -> DiffusersAdapter:
    """Adapter of the teacher without embedded guidance."""
    return load_adapter(teacher_directory)


@pytest.fixture
def guided_adapter(guided_directory: str) -> DiffusersAdapter:
    """Adapter of the teacher with embedded guidance."""
    return load_adapter(guided_directory)
