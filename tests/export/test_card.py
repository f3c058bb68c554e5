"""Contents of model cards."""

from dataclasses import replace
from pathlib import Path

from huggingface_hub import metadata_load

from lightning_distill.export.card import ModelCard
from lightning_distill.export.readme import IMAGES, render_card, write_card, write_overview
from lightning_distill.export.teacher_license import TeacherLicense
from lightning_distill.methods.guidance import Guidance
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from lightning_distill.teachers.teacher_lora import TeacherLora
from lightning_distill.teachers.usage import DIFFUSERS_CODE_WITHOUT_LOADER
from tests.callbacks.distillation import PixelDistillation

SCHEDULER = {
    "class": "FlowMatchEulerDiscreteScheduler",
    "config": {"num_train_timesteps": 1000, "shift": 3.0, "stochastic_sampling": True, "_diffusers_version": "0.42.1"},
}
FLUX = ModelCard("TDM", "black-forest-labs/FLUX.1-dev", (4,), 512, 768, pipeline_class="FluxPipeline", scheduler=SCHEDULER)


def test_card_has_settings_figures_and_code() -> None:
    figures = {
        "student/accuracy/nfe_4": 0.98765,
        "student/accuracy/nfe_1": 0.5,
        "teacher/accuracy/nfe_4": 0.75,
        "val/loss": 2.0,
    }
    card = ModelCard(
        "MeanFlow",
        "black-forest-labs/FLUX.1-dev",
        (1, 2, 4),
        512,
        768,
        4.5,
        1000,
        12.34,
        figures,
        "A note.",
        settings={"EMA": 1},
    )
    text = render_card(card, "any_step", {"guidance_scale": 4.5})
    for part in (
        "library_name: diffusers",
        "base_model: black-forest-labs/FLUX.1-dev",
        "base_model_relation: finetune",
        "generates images in 1, 2 or 4 steps",
        "| Method | MeanFlow |",
        "| Teacher | black-forest-labs/FLUX.1-dev |",
        "| Image size | 512 x 768 pixels |",
        "| Training steps | 1000 |",
        "| Training time | 12.3 minutes |",
        "| EMA | 1 |",
        "| steps | student, accuracy | teacher, accuracy |\n|---:|---:|---:|\n| 1 | 0.5 |  |\n| 4 | 0.9877 | 0.75 |\n",
        "| loss | 2 |",
        "trust_remote_code=True",
        "guidance_scale=4.5",
        "A note.",
        "whose license applies",
    ):
        assert part in text


def test_card_of_a_method_has_its_settings() -> None:
    options = StudentOptions(pretrained="shapes-student", lora=LoraOptions(rank=4))
    module = PixelDistillation(nfe=(2, 8), guidance=Guidance(scale=3.0), student=options, with_metric=False)
    expected = ModelCard(
        "PixelDistillation",
        "PixelAdapter",
        (2, 8),
        32,
        32,
        3.0,
        7,
        1.5,
        {"val/loss": 0.5},
        "A note.",
        "float32",
        "shapes-student",
        settings={"LoRA": "rank 4, alpha 4", "Time embedding": "smooth"},
    )
    found = ModelCard.from_method(module, steps=7, minutes=1.5, figures={"val/loss": 0.5}, notes="A note.")
    assert found == expected
    assert ModelCard.from_method(module, steps=7).minutes is None


def test_card_has_the_last_part_of_a_local_path(tmp_path: Path) -> None:
    (tmp_path / "my-teacher").mkdir()
    text = render_card(ModelCard("MeanFlow", str(tmp_path / "my-teacher"), (4,), 32, 32), "any_step", {})
    assert str(tmp_path) not in text
    assert "| Teacher | my-teacher |" in text
    assert "base_model" not in text
    for path in ("/data/models/my-teacher", "~/my-teacher", "models/flux/my-teacher"):
        text = render_card(ModelCard("MeanFlow", path, (4,), 32, 32), "lora_student", {})
        assert "| Teacher | my-teacher |" in text
        assert path not in text
        assert "base_model" not in text


def test_card_of_lora_weights_has_base_scheduler_and_settings_of_comfyui() -> None:
    text = render_card(FLUX, "comfyui", {"guidance_scale": 3.5})
    for part in (
        "base_model_relation: adapter",
        "- lora\n- comfyui",
        "in 4 steps",
        "FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)",
        'load_lora_weights("this/directory", weight_name="pytorch_lora_weights.safetensors")',
        "## Settings in ComfyUI",
        "| steps | 4 |\n| cfg | 1 |\n| sampler | lcm |\n| scheduler | simple |\n| shift | 3, node `ModelSamplingAuraFlow` |",
        "| guidance | 3.5, node `FluxGuidance` |",
        '"shift": 3.0',
    ):
        assert part in text


def test_card_of_a_stock_pipeline_states_its_number_of_steps_and_the_errors_of_its_times() -> None:
    card = ModelCard("TDM", "tiny", (1,), 32, 32, scheduler=SCHEDULER, residual=1.23e-7, condition_number=2600.0)
    text = render_card(card, "stock", {})
    for part in (
        "in 1 step,",
        "this number of steps alone",
        "| Error of the time embeddings | 1.2e-07 |",
        "| Condition number of their hidden vectors | 2.6e+03 |",
    ):
        assert part in text
    assert "trust_remote_code" not in text
    assert "this number of steps alone" not in render_card(replace(card, residual=None), "stock", {})
    assert "ComfyUI" not in text


def test_the_card_of_several_exports_lists_them(tmp_path: Path) -> None:
    for name in ("any_step", "stock_1", "stock_4", "single_file_4"):
        (tmp_path / name).mkdir()
    license = TeacherLicense("apache-2.0")
    write_overview(tmp_path, replace(FLUX, license=license, figures={"student/accuracy/nfe_4": 0.5}), "diffusers")
    text = (tmp_path / "README.md").read_text()
    for part in (
        "license: apache-2.0",
        "base_model_relation: finetune",
        "| `any_step` | pipeline for any number of steps, with code of its own |",
        "| `stock_1` | stock pipeline of diffusers for 1 step |",
        "| `stock_4` | stock pipeline of diffusers for 4 steps |",
        "| `single_file_4` | transformer in one file for 4 steps |",
        'allow_patterns="any_step/*"',
        "| 4 | 0.5 |",
        "whose license (apache-2.0) applies",
    ):
        assert part in text
    out = tmp_path / "lora"
    (out / "lora_2").mkdir(parents=True)
    write_overview(out, FLUX, "diffusers")
    assert "base_model_relation: adapter" in (out / "README.md").read_text()


def test_card_has_the_license_of_the_teacher_and_a_grid_of_images(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.md").write_text("terms")
    (tmp_path / "grid.png").write_bytes(b"png")
    license = TeacherLicense("other", "my-license", "LICENSE.md", (tmp_path / "LICENSE.md",))
    card = ModelCard("TDM", "tiny", (1,), 32, 32, license=license, images=tmp_path / "grid.png")
    out = tmp_path / "out"
    out.mkdir()
    write_card(out, card, "any_step", {})
    text = (out / "README.md").read_text()
    assert f"]({IMAGES})" in text
    assert (out / IMAGES).read_bytes() == b"png"
    assert (out / "LICENSE.md").read_text() == "terms"
    assert "whose license ([my-license](LICENSE.md)) applies to them" in text
    metadata = metadata_load(out / "README.md")
    assert metadata is not None
    assert {name: metadata[name] for name in ("license", "license_name", "license_link")} == {
        "license": "other",
        "license_name": "my-license",
        "license_link": "LICENSE.md",
    }


def test_card_merges_the_lora_of_the_teacher_into_the_base() -> None:
    loras = (TeacherLora("someone/style", 0.8, "style.safetensors"), TeacherLora("someone/light"))
    card = ModelCard("MeanFlow", "a/base", (4,), 32, 32, torch_dtype="bfloat16", teacher_lora=loras)
    text = render_card(card, "lora_student", {})
    assert "| LoRA merged into it | someone/style/style.safetensors (weight 0.8), someone/light (weight 1) |" in text
    first = text.index('base.load_lora_weights("someone/style", weight_name="style.safetensors")')
    assert text.index("base = DiffusionPipeline") < first < text.index("base.fuse_lora(lora_scale=0.8)")
    assert text.index('base.load_lora_weights("someone/light")') < text.index("pipeline = load_lora_student")
    without_loader = render_card(card, "lora_student", {}, DIFFUSERS_CODE_WITHOUT_LOADER)
    assert 'base.transformer.load_lora_adapter("someone/light", prefix="transformer")' in without_loader
    assert "load_lora_weights" not in without_loader
    comfyui = replace(FLUX, teacher_lora=loras)
    row = "| LoRA of the teacher | someone/style/style.safetensors (weight 0.8), someone/light (weight 1), node `LoraLoader"
    assert row in render_card(comfyui, "comfyui", {})
    assert "LoRA of the teacher" not in render_card(comfyui, "single_file", {})  # whose weights have it
