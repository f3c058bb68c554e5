"""Shipped configs: parsing, comments, error messages, and short training runs of the FLUX.1-dev configs."""

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch  # noqa: F401  # creates its log handler now: one on a captured stderr fails in later tests
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from lightning_distill.commands.config_files import config_directory, flatten, shipped_configs
from lightning_distill.commands.main import main
from lightning_distill.export.mark import ExportMark
from tests.teachers.hunyuan_image3.tiny_pipeline import save_stand_in
from tests.tiny import FLUX_DEV_SHIFT, PROMPTS, save_tiny_pipeline

FLUX = "flux_meanflow.yaml"
FLUX_LORA = "flux_meanflow_lora.yaml"
HUNYUAN = "hunyuan_image3_meanflow.yaml"
SHORT_VALIDATION = [f"--model.validation.{setting}" for setting in ("height=32", "width=32", "teacher_nfe=2", "solver_steps=2")]
NO_GPU = not torch.cuda.is_available() and not torch.backends.mps.is_available()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    """Use a working directory without configs, and an empty hub cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path) -> Path:
    """Directory with twelve captioned images."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for i in range(12):
        Image.new("RGB", (40, 36), (20 * i, 100, 255 - 20 * i)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i % len(PROMPTS)]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def print_config(capsys, name: str, *further: str) -> dict:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", name, *further, "--print_config"])
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    return yaml.safe_load(output.out)


def error_line(capsys, *arguments: str, config: str = FLUX) -> str:
    """The single error line on stderr of a command that exits with code 2."""
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", config, *arguments])
    errors = capsys.readouterr().err
    assert end.value.code == 2, errors
    assert "Traceback" not in errors
    line = errors[errors.index("error: ") :]
    assert line.count("\n") == 1
    return line


def test_configs_are_shipped():
    assert FLUX in shipped_configs()


@pytest.mark.parametrize("name", shipped_configs())
def test_config_parses_and_prints_its_settings(capsys, name):
    config = print_config(capsys, name)
    assert config["model"]["class_path"].startswith("lightning_distill.methods.")
    assert config["data"]["class_path"].startswith("lightning_distill.data.")
    own = yaml.safe_load((config_directory() / name).read_text())
    given = {
        path: value
        for path, value in flatten(own).items()
        if path.startswith("trainer.") and "callbacks" not in path and "${" not in str(value)
    }
    found = flatten(config)
    assert {path: found[path] for path in given if not path.endswith("class_path")} == {
        path: value for path, value in given.items() if not path.endswith("class_path")
    }


@pytest.mark.parametrize("name", shipped_configs())
def test_one_setting_moves_all_outputs(capsys, name):
    config = flatten(print_config(capsys, name, "--trainer.default_root_dir=elsewhere")["trainer"])
    outputs = [config[path] for path in config if path.endswith(("_dir", "dirpath", "directory")) and config[path] is not None]
    assert len(outputs) > 1
    assert all(path.split("/")[0] == "elsewhere" for path in outputs)
    versions = [value for path, value in config.items() if path.startswith("logger.") and path.endswith((".name", ".version"))]
    assert not any(versions)  # one entry of TensorBoard is one run


def test_configs_have_directories_of_their_own(capsys):
    names = [name for name in shipped_configs() if name != "shapes_student.yaml"]
    directories = [yaml.safe_load((config_directory() / name).read_text())["trainer"]["default_root_dir"] for name in names]
    assert len({*directories}) == len(directories)


@pytest.mark.parametrize("name", shipped_configs())
def test_config_starts_with_its_purpose(name):
    first = (config_directory() / name).read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 40


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith(("flux_", "hunyuan_"))])
def test_every_setting_has_a_comment(name):
    lines = [line.strip().removeprefix("- ") for line in (config_directory() / name).read_text().splitlines()]
    settings = [line for line in lines if line and not line.startswith("#")]
    sections = ("init_args:", "model:", "data:", "trainer:", "logger:", "callbacks:", "callbacks+:")
    uncommented = [line for line in settings if line not in sections and " # " not in line]
    assert settings
    assert not uncommented


def test_interpolated_settings_survive_a_change_of_method(capsys):
    config = print_config(capsys, "shapes_two_cores.yaml", "--model=SCM", "--trainer.max_steps=77")
    assert config["model"]["class_path"].endswith(".SCM")
    assert config["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"] == 77


@pytest.mark.slow
@pytest.mark.parametrize("name", [FLUX, HUNYUAN])
def test_header_states_the_estimates_of_plan(name, tmp_path):
    comment = " ".join(
        line.removeprefix("# ") for line in (config_directory() / name).read_text().splitlines() if line.startswith("#")
    )
    pattern = (
        r"a peak of (\S+) GiB per GPU \((\S+) GiB activations\)\. Each GPU receives (\S+) GiB per step of the discrete "
        r"solution, and (\S+) GiB per step of the differential solution"
    )
    stated = re.search(pattern, comment)
    assert stated is not None
    main(["plan", "--config", name, "--json=plan.json"])
    found = json.loads((tmp_path / "plan.json").read_text())
    figures = [found["peak"], found["gpu"]["activations"], *found["communication"].values()]
    assert list(stated.groups()) == [f"{value / 2**30:,.0f}" for value in figures]


def test_data_size_follows_validation_size(capsys):
    config = print_config(capsys, FLUX, "--model.validation.height=256", "--model.validation.width=384")
    assert config["data"]["init_args"]["height"] == 256
    assert config["data"]["init_args"]["width"] == 384


@pytest.mark.parametrize(("name", "teacher"), [(FLUX, "black-forest-labs/FLUX.1-dev"), (HUNYUAN, "tencent/HunyuanImage-3.0")])
def test_missing_weights_raise_without_waiting(capsys, images, name, teacher):
    """No process waits for the processes of other machines."""
    start = time.monotonic()
    line = error_line(capsys, "--trainer.accelerator=cpu", f"--data.directory={images}", config=name)
    assert time.monotonic() - start < 30
    assert f"adapter.pretrained is '{teacher}', which is not in the local cache" in line


def test_untrusted_code_raises(capsys, images, tmp_path):
    teacher = save_stand_in("newer", tmp_path / "teacher")
    place = f"--model.adapter.pretrained={teacher}"
    line = error_line(capsys, "--trainer.accelerator=cpu", f"--data.directory={images}", place, config=HUNYUAN)
    assert "review its Python files, and set model.adapter.trust_remote_code to true" in line


def test_missing_images_raise(capsys, tmp_path):
    teacher = save_tiny_pipeline(tmp_path / "teacher", guidance_embeds=True)
    line = error_line(capsys, "--trainer.accelerator=cpu", f"--model.adapter.pretrained={teacher}")
    assert "data.directory is 'data/images', which is not a directory" in line


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize("name", [FLUX, HUNYUAN])
def test_missing_gpu_raises(capsys, images, name):
    start = time.monotonic()
    line = error_line(capsys, f"--data.directory={images}", config=name)
    assert time.monotonic() - start < 30
    assert "trainer.accelerator is 'gpu'" in line


def two_steps(name: str, teacher: str, images: Path, *further: str) -> None:
    main(
        [
            *("fit", "--config", name, "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.val_check_interval=2"),
            "--trainer.strategy=auto",
            *(f"--model.adapter.pretrained={teacher}", *SHORT_VALIDATION),
            *(f"--data.directory={images}", "--data.validation_share=0.25", "--data.batch_size=4", "--data.num_workers=0"),
            *further,
        ]
    )


def test_two_steps_of_lora_on_the_cpu(tmp_path, images):
    teacher = save_tiny_pipeline(tmp_path / "teacher", guidance_embeds=True, scheduler=FLUX_DEV_SHIFT)
    soon = ("--model.alignment.start_step=0", "--model.alignment.critic_warmup_steps=0", "--trainer.accumulate_grad_batches=1")
    two_steps(FLUX_LORA, teacher, images, *soon, "--model.student.lora.rank=2")
    run = tmp_path / "runs" / "flux_meanflow_lora"
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained = ("lora_", "timestep_embedder", "n_averaged")
    assert network_paths(state) == {"networks.student", "networks.ema", "alignment.critic"}
    assert not [name for name in state if not any(part in name for part in trained)]
    assert all(value.any() for name, value in state.items() if name.startswith("networks.student.") and "lora_B" in name)
    assert all(value.dtype == torch.float32 for name, value in state.items() if "lora_" in name)
    assert_lora_samples(run, teacher)


def test_two_steps_of_meanflow_on_the_cpu(tmp_path, images):
    teacher = save_tiny_pipeline(tmp_path / "teacher", guidance_embeds=True, scheduler=FLUX_DEV_SHIFT)
    two_steps(FLUX, teacher, images)
    run = tmp_path / "runs" / "flux_meanflow"
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["meanflow"]["solution"] == "discrete"
    assert not [name for name in checkpoint["state_dict"] if name.startswith(("networks.teacher.", "networks.adapter."))]
    assert (run / "images.png").is_file()
    assert json.loads((run / "summary.json").read_text())["diversity"].keys() == {"student", "teacher"}

    (weights,) = (run / "student" / "any_step" / "transformer").glob("*.safetensors")
    before = load_file(next((Path(teacher) / "transformer").glob("*.safetensors")))
    after = load_file(weights)
    matrices = [name for name in before if "blocks." in name and before[name].ndim == 2]
    moved = [name for name in matrices if (after[name].float() != before[name].to(torch.bfloat16).float()).any()]
    assert moved == matrices

    assert_samples(run)


@pytest.mark.parametrize("name", ["dmd2", "tdm"])
def test_two_steps_from_prompts_on_the_cpu(tmp_path, name):
    teacher = save_tiny_pipeline(tmp_path / "teacher", guidance_embeds=True, scheduler=FLUX_DEV_SHIFT)
    (tmp_path / "prompts.txt").write_text("\n".join(f"{prompt} {i}" for i in range(4) for prompt in PROMPTS))
    main(
        [
            *("fit", "--config", f"flux_{name}.yaml", "--trainer.accelerator=cpu", "--trainer.max_steps=2"),
            *("--trainer.strategy=auto", f"--model.adapter.pretrained={teacher}", "--data.file=prompts.txt"),
            *("--trainer.val_check_interval=2", "--data.validation_samples=4", "--data.batch_size=4"),
            *(*SHORT_VALIDATION, "--model.validation.nfe=[1,2]"),
        ]
    )
    assert_trained(tmp_path / "runs" / f"flux_{name}", {"networks.student", "matching.critic"})
    assert_samples(tmp_path / "runs" / f"flux_{name}")


def test_two_steps_of_ladd_on_the_cpu(tmp_path, images):
    """With LoRA, gradient checkpointing, and mixed precision between discriminator heads and student."""
    teacher = save_tiny_pipeline(tmp_path / "teacher", guidance_embeds=True, scheduler=FLUX_DEV_SHIFT)
    few = ("--model.layers=[0,1]", "--model.student.lora.rank=2", "--trainer.accumulate_grad_batches=1")
    two_steps("flux_ladd.yaml", teacher, images, *few, "--model.validation.nfe=[1,2]")
    assert_trained(tmp_path / "runs" / "flux_ladd", {"networks.student", "heads"})
    assert_lora_samples(tmp_path / "runs" / "flux_ladd", teacher)


def network_paths(names: Iterable[str]) -> set[str]:
    """Paths of the networks that names of weights belong to; the discriminator heads have no parent."""
    return {".".join(name.split(".")[: 1 if name.startswith("heads.") else 2]) for name in names}


def assert_samples(run: Path) -> None:
    """The student samples as a pipeline for any number of steps, and as a stock pipeline."""
    folder = run / "student"
    pipeline = DiffusionPipeline.from_pretrained(folder / "any_step", torch_dtype=torch.bfloat16, trust_remote_code=True)
    assert len(pipeline(PROMPTS[0], num_inference_steps=2, height=32, width=32).images) == 1
    (stock,) = folder.glob("stock_*")
    mark = ExportMark.read(stock)
    assert mark.nfe is not None
    pipeline = DiffusionPipeline.from_pretrained(stock, torch_dtype=torch.bfloat16)
    settings = {"num_inference_steps": mark.nfe[0], "height": 32, "width": 32, **mark.arguments}
    assert len(pipeline(PROMPTS[0], **settings).images) == 1


def assert_lora_samples(run: Path, teacher: str) -> None:
    """The LoRA files of all numbers of steps load over the teacher and sample."""
    exports = sorted((run / "student").glob("lora_*"))
    assert exports
    for export in exports:
        pipeline = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.bfloat16)
        pipeline.load_lora_weights(export)
        mark = ExportMark.read(export)
        assert mark.nfe is not None
        settings = {"num_inference_steps": mark.nfe[0], "height": 32, "width": 32, **mark.arguments}
        assert len(pipeline(PROMPTS[0], **settings).images) == 1


def assert_trained(run: Path, networks: set[str]) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert network_paths(checkpoint["state_dict"]) == networks
    assert all(auxiliary["state"] for auxiliary in checkpoint["auxiliary_optimizers"].values())
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
