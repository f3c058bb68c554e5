"""Checks of the strategies, sharding units, stored weights, and replacement of checkpoint directories."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from lightning import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from safetensors.torch import save_file
from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import MeanFlow
from lightning_distill.methods.guidance import Guidance
from lightning_distill.optimizers import MuonWithAdamW
from lightning_distill.sharding.blocks import blocks
from lightning_distill.sharding.checkpoint import check_elementwise_optimizer, replace_checkpoint
from lightning_distill.sharding.checkpoint_files import recover
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.sharding.strategies import FSDP2Strategy, ZeRO3Strategy
from lightning_distill.sharding.weight_files import WeightFilesError
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.families import FAMILIES
from tests.processes import run_isolated
from tests.tiny import save_tiny_pipeline


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("fsdp2", FSDP2Strategy), ("fsdp2_offload", FSDP2Strategy), ("deepspeed_stage_3", ZeRO3Strategy)],
)
def test_strategies_are_registered_by_name(name: str, strategy: type) -> None:
    assert type(Trainer(strategy=name, accelerator="cpu", logger=False).strategy) is strategy


def test_protocols_import_without_lightning(tmp_path: Path) -> None:
    code = "import sys, lightning_distill.sharding.protocols; sys.exit('lightning' in sys.modules)"
    run_isolated(["-c", code], tmp_path)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_blocks_hold_most_parameters_of_a_transformer(family: type[FewStepPipeline]) -> None:
    with init_empty_weights(include_buffers=False):
        network = family.network_class()  # diffusers' defaults are the published sizes
    found = blocks(network)
    in_blocks = sum(p.numel() for block in found for p in block.parameters())
    assert in_blocks > 0.95 * sum(p.numel() for p in network.parameters())
    parts = [id(part) for block in found for part in block.modules()]
    assert len(parts) == len(set(parts))  # blocks are not nested


def test_entries_of_outer_lists_are_blocks_of_a_model_that_names_none() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), nn.Linear(2, 2)]))
    assert blocks(network) == list(network[1])


def test_stored_weights_read_rows_from_one_file_or_several(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(()), "c": torch.randn(4)}
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    save_file({name: value.half() for name, value in tensors.items()}, tmp_path / "one" / "model.fp16.safetensors")
    (tmp_path / "two").mkdir()
    save_file({"a": tensors["a"]}, tmp_path / "two" / "1.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, tmp_path / "two" / "2.safetensors")
    index = '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}'
    (tmp_path / "two" / "model.safetensors.index.json").write_text(index)
    for folder in ("one", "two"):
        weights = StoredWeights.of_component(tmp_path / folder)
        assert all(torch.equal(weights.read(name), value) for name, value in tensors.items())
        assert torch.equal(weights.read("a", 1, 3), tensors["a"][1:3])
        assert "a" in weights
        assert "d" not in weights
        assert sorted(weights.names()) == ["a", "b", "c"]
        assert torch.equal(weights.renamed({"x": "b"}).renamed({"y": "x"}).read("y"), tensors["b"])
    (tmp_path / "none").mkdir()
    with pytest.raises(WeightFilesError, match="has no weights"):
        StoredWeights.of_component(tmp_path / "none")


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, DeepSpeedStrategy])
def test_sharded_strategies_of_lightning_raise_an_error(strategy: type, tmp_path: Path) -> None:
    adapter = DiffusersAdapter(save_tiny_pipeline(tmp_path))
    module = MeanFlow(adapter, guidance=Guidance("two_branch", 2.0))
    module._trainer = SimpleNamespace(strategy=strategy(), callbacks=[], datamodule=None)
    with pytest.raises(ConfigurationError, match=rf"a {strategy.__name__}( \(\w+\))?, which supports neither .* choose fsdp2"):
        module.setup("fit")


def test_other_stages_of_deepspeed_raise_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"stage 3 of DeepSpeed only; leave stage"):
        ZeRO3Strategy(stage=2)


def test_optimizers_of_unsharded_matrices_raise_an_error() -> None:
    matrix, vector = (nn.Parameter(torch.zeros(*shape)) for shape in ((2, 2), (2,)))
    groups = [{"params": [matrix], "block_matrices": True}, {"params": [vector], "block_matrices": False}]
    with pytest.raises(ConfigurationError, match="MuonWithAdamW, which needs unsharded matrices"):
        check_elementwise_optimizer(MuonWithAdamW(groups))
    check_elementwise_optimizer(torch.optim.AdamW([matrix]))


def test_a_checkpoint_is_replaced_or_recovered(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for content in ("first", "second"):
        unfinished = tmp_path / ".last.ckpt.unfinished"
        unfinished.mkdir()
        (unfinished / "file").write_text(content)
        replace_checkpoint(unfinished, path)
        assert (path / "file").read_text() == content
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    path.rename(tmp_path / ".last.ckpt.replaced")  # the state after a kill between the two renames
    recover(path)
    assert (path / "file").read_text() == "second"
    recover(path)
    assert (path / "file").read_text() == "second"
