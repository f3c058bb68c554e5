"""HunyuanImage 3.0 on fake tensors: shapes, the cost of a step, and the configuration that a plan needs."""

import json
from pathlib import Path

import pytest
import torch

from lightning_distill.commands.main import main
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import MeanFlow, TrajectoryAlignment
from lightning_distill.methods.guidance import Guidance
from lightning_distill.planning import hunyuan_image3
from lightning_distill.planning.step import BatchShape, StepCost, measure_step
from lightning_distill.sharding.blocks import blocks, experts, units
from lightning_distill.students.two_time_hunyuan_image3 import TwoTimeHunyuanImage3
from lightning_distill.teachers import HunyuanImage3Adapter
from lightning_distill.teachers.hunyuan_image3.networks import build_on_meta_device, student_config
from lightning_distill.teachers.student_options import StudentOptions
from tests.teachers.hunyuan_image3.stand_in.configuration_hunyuan_image_3 import HunyuanImage3Config
from tests.teachers.hunyuan_image3.tiny_pipeline import save_stand_in
from tests.teachers.tiny_families import load_family


def shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def planned_network(directory: Path, options: StudentOptions) -> TwoTimeHunyuanImage3:
    config = hunyuan_image3.checkpoint_networks(directory).config
    kind = hunyuan_image3.two_time_class(hunyuan_image3.HunyuanImage3Model, TwoTimeHunyuanImage3)
    return build_on_meta_device(kind, student_config(config, options))


@pytest.mark.parametrize("form", ["newer", "newer_distilled"])
def test_planned_network_has_the_weights_of_the_published_code(form: str, tmp_path: Path) -> None:
    directory = save_stand_in(form, tmp_path / form)
    adapter, options = load_family(directory), StudentOptions()
    student, _ = adapter.build_student(adapter.load_teacher(), options)
    assert shapes(planned_network(Path(directory), options)) == shapes(student)


def test_shipped_config_has_80_billion_parameters() -> None:
    network = planned_network(hunyuan_image3.SHIPPED_CONFIG, StudentOptions())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in (("all", network), ("layers", network.blocks))}
    assert 80e9 < counts["layers"] + 133120 * 4096 < counts["all"] < 82e9
    assert len(blocks(network)) == 32
    assert [len(experts(block)) for block in blocks(network)] == [64] * 32
    largest = max(sum(p.numel() for p in expert.parameters()) for expert in experts(blocks(network)[0]))
    assert largest == 3 * 4096 * 3072
    assert len(units(network)) == 32 * 65


@pytest.fixture(scope="module")
def config_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the configuration of a model of five blocks."""
    directory = tmp_path_factory.mktemp("config")
    vae = {"latent_channels": 4, "block_out_channels": [8, 8, 8], "layers_per_block": 1, "ffactor_spatial": 4}
    config = HunyuanImage3Config(num_hidden_layers=5).to_dict()
    config |= {"model_type": "hunyuan_image_3_moe", "vae": {**vae, "ffactor_temporal": 4}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def measure(directory: Path) -> StepCost:
    module = MeanFlow(
        HunyuanImage3Adapter(str(directory)),
        guidance=Guidance("two_branch", 2.0),
        student=StudentOptions(gradient_checkpointing=True),
        alignment=TrajectoryAlignment(nfe=(1, 3)),
        solver_steps=3,
    )
    return measure_step(module, directory, BatchShape(2, (32, 32)), ["differential"])


@pytest.mark.slow
def test_extrapolation_from_few_blocks_matches_all_blocks(config_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = measure(config_directory)
    monkeypatch.setattr(hunyuan_image3, "MEASURED_BLOCKS", 9)
    full = measure(config_directory)
    assert few.numbers.keys() == full.numbers.keys()
    for name, value in full.numbers.items():
        exact = not name.startswith("pass")
        assert few.numbers[name] == pytest.approx(value, rel=1e-9 if exact else 0.02), name
    parts = 5 * 4 * 3 * 32 * 16  # blocks, experts, matrices
    assert full.numbers["regathered/student"] == full.numbers["regathered/critic"] == 4 * parts
    assert full.numbers["regathered/teacher"] == 0
    block, rest = full.blocks["student"]
    assert block == 4 * (64 * 32 + 32 * 32 + 4 * 32 + 3 * 32 * 16 + 2 * 16 + 2 * 32)  # attention, router, shared expert, norms
    assert rest == full.numbers["weights/student"] - 4 * parts - 4 * block
    assert full.calls["differential"]["student"] > 1


def test_config_directory_of_a_checkpoint(config_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    find = hunyuan_image3.checkpoint_config_directory
    assert find(HunyuanImage3Adapter(str(config_directory)), None) == config_directory
    assert find(HunyuanImage3Adapter("tencent/HunyuanImage-3.0"), None) == hunyuan_image3.SHIPPED_CONFIG
    assert find(HunyuanImage3Adapter("some/model"), str(config_directory)) == config_directory
    with pytest.raises(ConfigurationError, match=r"model_config is '.*', which has no config\.json of HunyuanImage 3\.0"):
        find(HunyuanImage3Adapter("some/model"), str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"'some/model', whose config\.json is not on this machine"):
        find(HunyuanImage3Adapter("some/model"), None)


def test_shipped_config_is_planned_without_weights_or_gpu(
    config_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs no weights, code, images or GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    main(
        [
            *("plan", "--config", "hunyuan_image3_meanflow.yaml", f"--model_config={config_directory}", "--json=plan.json"),
            *("--model.validation.height=32", "--model.validation.width=32", "--model.solver=euler", "--model.solver_steps=1"),
        ]
    )
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["strategy"], found["processes"], found["smallest"]) == ("fsdp2", 64, 1)
    assert found["communication"].keys() == {"discrete", "differential"}
    teacher, trained = found["parameters"]["teacher"], found["parameters"]["student"]
    assert teacher[0] < trained[0] == trained[1]
