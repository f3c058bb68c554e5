"""What strategies refuse, which parts of a network they spread together, and how a checkpoint's directory is replaced."""

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
from lightning_distill.sharding import FSDP2Strategy, ZeRO3Strategy
from lightning_distill.sharding.blocks import blocks
from lightning_distill.sharding.checkpoint import _put_in_place, check_elementwise_optimizer, recover
from lightning_distill.sharding.stored_weights import StoredWeights
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.families import FAMILIES
from tests.tiny import save_tiny_pipeline


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fsdp2", FSDP2Strategy), ("fsdp2_offload", FSDP2Strategy), ("deepspeed_stage_3", ZeRO3Strategy)],
)
def test_they_are_known_by_name(name: str, kind: type) -> None:
    assert type(Trainer(strategy=name, accelerator="cpu", logger=False).strategy) is kind


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_nearly_all_of_a_transformer_is_in_blocks(family: type[FewStepPipeline]) -> None:
    with init_empty_weights(include_buffers=False):
        network = family.network_class()  # diffusers' defaults are the sizes that are published
    found = blocks(network)
    inside = sum(p.numel() for block in found for p in block.parameters())
    assert inside > 0.95 * sum(p.numel() for p in network.parameters())
    parts = [id(part) for block in found for part in block.modules()]
    assert len(parts) == len(set(parts))  # none within another


def test_a_list_is_taken_apart_where_a_model_names_no_blocks() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), nn.Linear(2, 2)]))
    assert blocks(network) == list(network[1])


def test_weights_are_read_in_parts_of_one_file_or_several(tmp_path: Path) -> None:
    whole = {"a": torch.randn(5, 3), "b": torch.randn(()), "c": torch.randn(4)}
    (tmp_path / "one").mkdir()
    save_file(whole, tmp_path / "one" / "model.safetensors")
    save_file({name: value.half() for name, value in whole.items()}, tmp_path / "one" / "model.fp16.safetensors")
    (tmp_path / "two").mkdir()
    save_file({"a": whole["a"]}, tmp_path / "two" / "1.safetensors")
    save_file({"b": whole["b"], "c": whole["c"]}, tmp_path / "two" / "2.safetensors")
    index = '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}'
    (tmp_path / "two" / "model.safetensors.index.json").write_text(index)
    for folder in ("one", "two"):
        weights = StoredWeights.of_component(tmp_path / folder)
        assert all(torch.equal(weights.read(name), value) for name, value in whole.items())
        assert torch.equal(weights.read("a", 1, 3), whole["a"][1:3])
        assert "a" in weights
        assert "d" not in weights
        assert sorted(weights.names()) == ["a", "b", "c"]
        assert torch.equal(weights.renamed({"x": "b"}).renamed({"y": "x"}).read("y"), whole["b"])
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no"):
        StoredWeights.of_component(tmp_path / "none")


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, DeepSpeedStrategy])
def test_lightnings_own_sharded_strategies_are_refused(strategy: type, tmp_path: Path) -> None:
    adapter = DiffusersAdapter(save_tiny_pipeline(tmp_path))
    module = MeanFlow(adapter, guidance=Guidance("two_branch", 2.0))
    module._trainer = SimpleNamespace(strategy=strategy(), datamodule=None)
    with pytest.raises(ConfigurationError, match=f"a {strategy.__name__}, which derivatives .* choose fsdp2"):
        module.setup("fit")


def test_other_stages_of_deepspeed_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="leave stage"):
        ZeRO3Strategy(stage=2)


def test_optimizers_of_whole_matrices_are_refused() -> None:
    matrix, vector = (nn.Parameter(torch.zeros(*shape)) for shape in ((2, 2), (2,)))
    groups = [{"params": [matrix], "block_matrices": True}, {"params": [vector], "block_matrices": False}]
    with pytest.raises(ConfigurationError, match="MuonWithAdamW, which needs whole matrices"):
        check_elementwise_optimizer(MuonWithAdamW(groups))
    check_elementwise_optimizer(torch.optim.AdamW([matrix]))


def test_a_checkpoint_is_replaced_by_a_whole_one_or_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for content in ("first", "second"):
        unfinished = tmp_path / ".last.ckpt.unfinished"
        unfinished.mkdir()
        (unfinished / "file").write_text(content)
        _put_in_place(unfinished, path)
        assert (path / "file").read_text() == content
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    path.rename(tmp_path / ".last.ckpt.replaced")  # as a process leaves it that is killed between the two renames
    recover(path)
    assert (path / "file").read_text() == "second"
    recover(path)
    assert (path / "file").read_text() == "second"
