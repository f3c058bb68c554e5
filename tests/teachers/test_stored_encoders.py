"""Text encoders that are built without memory: what transformers load, weight for weight."""

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
def test_it_is_what_transformers_load(directory: str, dtype: str) -> None:
    adapter = make_adapter(directory, torch_dtype=dtype)
    adapter.check()
    adapter.load()
    for name, whole in adapter.text_encoders().items():
        empty, weights = meta_encoder(directory, None, name, getattr(torch, dtype))
        assert type(empty) is type(whole)
        expected = dict(whole.named_parameters())
        assert {path: (p.shape, p.dtype, p.is_meta) for path, p in empty.named_parameters()} == {
            path: (p.shape, p.dtype, True) for path, p in expected.items()
        }
        assert all(torch.equal(weights.read(path).to(p.dtype), p) for path, p in expected.items())
        buffers = dict(empty.named_buffers())
        assert buffers.keys() == dict(whole.named_buffers()).keys()
        assert all(torch.equal(buffer, buffers[path]) for path, buffer in whole.named_buffers())


def test_a_weight_that_is_not_there(tmp_path: Path) -> None:
    directory = save_family("flux", tmp_path / "flux")
    file = tmp_path / "flux" / "text_encoder_2" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "layer_norm" in name)
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ConfigurationError, match=f"whose text_encoder_2 cannot be read in parts: its files lack {name}"):
        meta_encoder(directory, None, "text_encoder_2", torch.float32)
