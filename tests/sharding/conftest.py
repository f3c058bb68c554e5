"""Fixtures of all tests of sharding."""

import pytest
import torch

from tests.tiny import save_tiny_pipeline


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny FLUX pipeline without embedded guidance."""
    torch.manual_seed(0)
    return save_tiny_pipeline(tmp_path_factory.mktemp("teacher"))
