"""Shipped pipelines, and the shapes configs that use them and train them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from PIL import Image
from safetensors.torch import load_file

from lightning_distill.callbacks.images import unique_prompts
from lightning_distill.commands.config_files import shipped_configs
from lightning_distill.commands.generation import sample
from lightning_distill.commands.main import main
from lightning_distill.data.shapes import CATEGORIES
from lightning_distill.data.shapes_datamodule import evaluation_prompts
from lightning_distill.digests import MANIFEST, file_names, find_damage, read_manifest
from lightning_distill.export.shipped import save_shipped_student
from lightning_distill.metrics import prompt_accuracy
from lightning_distill.students import average_velocity_scheduler
from lightning_distill.students.few_step import pack_latents
from lightning_distill.teachers import load_shipped_student, resolve_pretrained
from lightning_distill.teachers.shipped import SHARED_COMPONENTS

TEACHER, STUDENT = Path(resolve_pretrained("shapes-teacher")), Path(resolve_pretrained("shapes-student"))
FEW = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"),
    *("--data.init_args.size=64", "--data.init_args.batch_size=8", "--data.init_args.prompts_per_category=1"),
    *("--trainer.log_every_n_steps=1", "--model.init_args.lr_scheduler.init_args.warmup_steps=1"),
]
SHORT_VALIDATION = [f"--model.init_args.validation.{setting}" for setting in ("teacher_nfe=3", "solver_steps=2", "samples=4")]
LATER_STAGES = ("second_stage", "one_step")
ONE_PROCESS = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and diversity of two prompts each, where the configs leave more by default."""
    for module in ("report", "images"):
        monkeypatch.setattr(
            f"lightning_distill.callbacks.{module}.unique_prompts", lambda prompts, _: unique_prompts(prompts, 2)
        )


def test_teacher_is_a_small_stock_pipeline() -> None:
    files = [path for path in TEACHER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert {path.suffix for path in files if path.name != MANIFEST} <= {".json", ".safetensors", ".md"}
    assert type(FluxPipeline.from_pretrained(TEACHER)) is FluxPipeline


def test_teacher_has_flux_geometry() -> None:
    pipeline = FluxPipeline.from_pretrained(TEACHER)
    assert pipeline.vae.config.latent_channels == 16
    assert pipeline.transformer.config.in_channels == 64
    assert len(pipeline.transformer.transformer_blocks) > 0
    assert len(pipeline.transformer.single_transformer_blocks) > 0


def test_teacher_accuracy_matches_its_model_card() -> None:
    """With the stock pipeline and guidance, within the sampling error."""
    card = (TEACHER / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("| val/prompt_accuracy/nfe_32 |")]
    stated = float(line.split("|")[2])
    pipeline = FluxPipeline.from_pretrained(TEACHER)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt.text for prompt in evaluation_prompts(16, held_out=False)]
    images = pipeline(
        prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=3.0,
        num_inference_steps=32,
        height=32,
        width=32,
        max_sequence_length=8,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    measured = prompt_accuracy(images, prompts)
    assert set(CATEGORIES) < set(measured)
    deviation = (stated * (1 - stated) / len(prompts)) ** 0.5
    assert measured["overall"].item() == pytest.approx(stated, abs=4 * deviation + 0.02)


@pytest.fixture(scope="module")
def saved_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete directory of the shipped student, with shared components and code."""
    directory = tmp_path_factory.mktemp("saved") / "student"
    save_shipped_student("shapes-student", directory)
    return directory


def test_student_accuracy_matches_its_model_card(saved_student: Path) -> None:
    """With stock classes of diffusers alone."""
    stated = {
        int(n): float(v) for n, v in re.findall(r"student/accuracy/nfe_(\d+) \| ([\d.]+)", (STUDENT / "README.md").read_text())
    }
    assert set(stated) == {1, 2, 4, 8}
    prompts = [prompt.text for prompt in evaluation_prompts(16, held_out=False)]
    for nfe in (1, 4):
        pipeline = FluxPipeline.from_pretrained(saved_student)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(saved_student, weight_name=f"time_update_{nfe}.safetensors")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            settings = {"num_inference_steps": nfe, "height": 32, "width": 32, "max_sequence_length": 8, "output_type": "pt"}
            images = pipeline(prompts, **settings).images
        deviation = (stated[nfe] * (1 - stated[nfe]) / len(prompts)) ** 0.5
        assert prompt_accuracy(images, prompts)["overall"].item() == pytest.approx(stated[nfe], abs=4 * deviation + 0.02)


def test_student_directory_holds_its_own_weights_only() -> None:
    files = [path for path in STUDENT.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    shared = json.loads((STUDENT / SHARED_COMPONENTS).read_text())
    assert Path(resolve_pretrained(shared["base"])) == TEACHER
    own = {path.name for path in STUDENT.iterdir() if path.is_dir()}
    assert own == {"transformer", "scheduler"}
    index = json.loads((STUDENT / "model_index.json").read_text())
    assert own | set(shared["components"]) == {
        name for name, value in index.items() if isinstance(value, list) and value[0]
    } - {"_class_name"}


def test_saved_student_is_a_stock_pipeline_with_time_updates(saved_student: Path) -> None:
    assert not list(saved_student.rglob("*.py"))
    index = json.loads((saved_student / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert {value[0] for value in index.values() if isinstance(value, list)} == {"diffusers", "transformers", None}
    updates = sorted(path.name for path in saved_student.glob("*.safetensors"))
    assert updates == [f"time_update_{nfe}.safetensors" for nfe in (1, 2, 4)]
    for name in ("README.md", "export.json"):
        assert (saved_student / name).read_bytes() == (STUDENT / name).read_bytes()


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_saved_and_shipped_student_sample_the_same_images(
    nfe: int, saved_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same noise: a stock scheduler draws it in the layout of tokens."""
    shipped = load_shipped_student("shapes-student")
    saved = FluxPipeline.from_pretrained(saved_student)
    saved.load_lora_weights(saved_student, weight_name=f"time_update_{nfe}.safetensors")
    shape = shipped.latent_shape(32, 32)
    noises = torch.randn(nfe + 1, 2, *shape, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": nfe, "height": 32, "width": 32, "max_sequence_length": 8, "output_type": "pt"}
    images = []
    for pipeline, scheduler, layout in (
        (shipped, average_velocity_scheduler, lambda noise: noise),
        (saved, scheduling_flow_match_euler_discrete, pack_latents),
    ):
        fresh = iter(noises[1:])
        monkeypatch.setattr(scheduler, "randn_tensor", lambda *_, layout=layout, fresh=fresh, **__: layout(next(fresh)))
        prompts = ["a red circle", "a green square above a blue circle"]
        images.append(pipeline(prompts, latents=layout(noises[0]), **settings).images)
    torch.testing.assert_close(*images, rtol=0, atol=2e-5)


def test_sample_uses_the_stock_form_of_the_shipped_student(saved_student: Path, tmp_path: Path) -> None:
    """For numbers of steps with a time update; the image has what the prompt says."""
    prompt = "a red circle and a blue square"
    main(["sample", "--pipeline", "shapes-student", "--prompt", prompt, "--nfe", "4", "--out", str(tmp_path / "x.png")])
    image = torch.from_numpy(np.array(Image.open(tmp_path / "x.png"))).permute(2, 0, 1)[None] / 255
    assert prompt_accuracy(image, [prompt])["overall"] == 1
    saved = FluxPipeline.from_pretrained(saved_student)
    saved.load_lora_weights(saved_student, weight_name="time_update_4.safetensors")
    expected = sample(saved, [prompt], nfe=4, arguments={})
    assert (image - expected).abs().max() < 1.01 / 255
    other = sample(load_shipped_student("shapes-student"), [prompt], nfe=4)
    assert (image - other).abs().max() > 0.1


@pytest.mark.parametrize("directory", [TEACHER, STUDENT])
def test_shipped_digests_are_those_of_the_files(directory: Path) -> None:
    assert find_damage(directory) is None
    assert read_manifest(directory).keys() == set(file_names(directory))


def test_shipped_student_loads_in_lower_precision() -> None:
    pipeline = load_shipped_student("shapes-student", torch.bfloat16)
    assert {part.dtype for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder_2)} == {torch.bfloat16}


@pytest.mark.usefixtures("_few_prompts")
@pytest.mark.parametrize("name", ["shapes_meanflow.yaml", "shapes_meanflow_full.yaml"])
def test_meanflow_configs_train(name: str) -> None:
    aligned = [f"--model.init_args.alignment.init_args.{setting}=0" for setting in ("start_step", "critic_warmup_steps")]
    main(["fit", "--config", name, *FEW, *ONE_PROCESS, *SHORT_VALIDATION, "--trainer.default_root_dir=run", *aligned])
    summary = yaml.safe_load(Path("run/summary.json").read_text())
    assert set(summary["teacher"]) == {"1", "2", "3", "4", "8"}
    assert set(summary["student"]) == {"1", "2", "4", "8"}
    assert Path("run/images.png").is_file()


@pytest.mark.usefixtures("_few_prompts")
@pytest.mark.parametrize("name", LATER_STAGES)
def test_later_stage_starts_from_the_shipped_student(name: str) -> None:
    start = ["--model.student.pretrained=shapes-student", "--model.init_args.optimizer.init_args.lr=0"]
    main(["fit", "--config", f"shapes_dmd2_{name}.yaml", *FEW, *ONE_PROCESS, *SHORT_VALIDATION, *start])
    stage = Path("runs") / name
    assert "| Started from | shapes-student |" in (stage / "student" / "any_step" / "README.md").read_text()
    files = (path / "transformer" / "diffusion_pytorch_model.safetensors" for path in (STUDENT, stage / "student" / "any_step"))
    before, after = map(load_file, files)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


METHODS = sorted(
    name.removeprefix("shapes_").removesuffix(".yaml")
    for name in shipped_configs()
    if name.startswith("shapes_")
    and not name.startswith("shapes_meanflow")
    and name not in {f"shapes_dmd2_{stage}.yaml" for stage in LATER_STAGES}
    and name not in ("shapes_student.yaml", "shapes_two_cores.yaml", "shapes_teacher.yaml", "shapes_vae.yaml")
)


@pytest.mark.usefixtures("_few_prompts")
@pytest.mark.parametrize("name", METHODS)
def test_configs_of_other_methods_train(name: str) -> None:
    run = f"runs/{name}"
    settings = [*FEW, *ONE_PROCESS, *SHORT_VALIDATION, "--model.init_args.validation.nfe=[1,2]"]
    main(["fit", "--config", f"shapes_{name}.yaml", *settings])
    assert set(yaml.safe_load(Path(f"{run}/summary.json").read_text())["student"]) == {"1", "2"}
    scheduler = yaml.safe_load((Path(resolve_pretrained(f"{run}/student")) / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["stochastic_sampling"] == (name in ("consistency_distillation", "dmd2", "ladd", "scm"))


def test_teacher_trains_from_random_weights() -> None:
    small = ["--model.init_args.block_out_channels=[4,4,4]", "--model.init_args.norm_num_groups=2"]
    main(["fit", "--config", "shapes_vae.yaml", *FEW, *small])
    assert AutoencoderKL.from_pretrained("runs/shapes_vae/vae").config.scaling_factor != 0.18215
    main(["fit", "--config", "shapes_teacher.yaml", *FEW, *ONE_PROCESS, "--model.init_args.validation.nfe=[1,2]"])
    assert type(FluxPipeline.from_pretrained("runs/shapes_teacher/teacher")) is FluxPipeline
