"""Text encoders on the meta device and their stored weights equal those that transformers loads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_distill.errors import ConfigurationError
from lightning_distill.teachers.stored_encoders import meta_encoder
from tests.teachers.tiny_families import FAMILIES, make_adapter, save_family


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_family(request.param, tmp_path_factory.mktemp("family") / request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_meta_encoder_and_stored_weights_equal_transformers(directory: str, dtype: str) -> None:
    adapter = make_adapter(directory, torch_dtype=dtype)
    adapter.check()
    adapter.load()
    for name, loaded in adapter.text_encoders().items():
        encoder, weights = meta_encoder(directory, None, name, getattr(torch, dtype))
        assert type(encoder) is type(loaded)
        expected = dict(loaded.named_parameters())
        assert {path: (p.shape, p.dtype, p.is_meta) for path, p in encoder.named_parameters()} == {
            path: (p.shape, p.dtype, True) for path, p in expected.items()
        }
        assert all(torch.equal(weights.read(path).to(p.dtype), p) for path, p in expected.items())
        buffers = dict(encoder.named_buffers())
        assert buffers.keys() == dict(loaded.named_buffers()).keys()
        assert all(torch.equal(buffer, buffers[path]) for path, buffer in loaded.named_buffers())


def test_missing_weight_raises(tmp_path: Path) -> None:
    directory = save_family("flux", tmp_path / "flux")
    file = tmp_path / "flux" / "text_encoder_2" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "layer_norm" in name)
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(
        ConfigurationError, match=f"whose text_encoder_2 cannot be read in shards: its files lack the weight '{name}'"
    ):
        meta_encoder(directory, None, "text_encoder_2", torch.float32)
