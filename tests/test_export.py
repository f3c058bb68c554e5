import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.export import MARK, ModelCard, check_export_directory, export_student, export_teacher, render_card
from lightning_distill.models.adapter import DiffusersAdapter
from lightning_distill.models.base import StudentOptions
from lightning_distill.models.two_time_flux import TwoTimeFluxTransformer2DModel
from tests.tiny import FLUX_DEV_SHIFT, PROMPTS, draw, load_adapter, noise, save_tiny_pipeline, train_a_little

CARD = ModelCard("MeanFlow", "shapes-teacher", (1, 2, 4), 32, 32, guidance_scale=2.0)

CODE = ("few_step.py", "two_time.py", "two_time_flux.py")

# Runs in a process that has never seen this package.
LOAD_AND_DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
for directory, out, dtype in zip(*[iter(sys.argv[1:])] * 3):
    # The frozen parts in the teacher's precision; a student is written as it trained, in float32.
    precision = {"default": getattr(torch, dtype), "transformer": torch.float32}
    pipeline = DiffusionPipeline.from_pretrained(directory, trust_remote_code=True, torch_dtype=precision)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    prompts = ["a red circle", "a green square", "a circle"]
    images = [pipeline(prompts, guidance_scale=4.5, generator=generators, output_type="pt").images]
    # Of a single picture the last bits depend on the alignment of weights in memory.
    generators = [torch.Generator().manual_seed(0)]
    images += [pipeline(prompts[:1], guidance_scale=4.5, generator=generators, output_type="pt").images]
    torch.save(images, out)
assert not any(name.startswith("lightning") for name in sys.modules), "the export needs its maker"
"""


@pytest.fixture
def teacher_directory(tmp_path: Path) -> str:
    return save_tiny_pipeline(tmp_path / "tiny", scheduler={"shift": 2.0})


@pytest.fixture
def adapter(teacher_directory: str) -> DiffusersAdapter:
    return load_adapter(teacher_directory)


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of its own for the code that diffusers copies to one that all processes share."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def build_student(adapter: DiffusersAdapter, **options: Any) -> TwoTimeFluxTransformer2DModel:
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions(**options))
    return train_a_little(student)


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


# What is written


def test_a_student_draws_the_same_bits_in_a_fresh_process(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    guided = save_tiny_pipeline(tmp_path / "tiny-guided", guidance_embeds=True, scheduler=FLUX_DEV_SHIFT)
    cases = {
        "smooth": (adapter, {}),
        "original": (adapter, {"time_embedding": "original", "interval_embedding": "clone"}),
        "guided": (load_adapter(guided, max_sequence_length=6), {}),
        "wide": (load_adapter(save_tiny_pipeline(tmp_path / "tiny-wide", num_attention_heads=8)), {}),
        "bfloat16": (load_adapter(guided, torch_dtype="bfloat16"), {}),
    }
    arguments, expected = [], {}
    for name, (each, options) in cases.items():
        student = build_student(each, **options).eval()
        export_student(each, student, tmp_path / name, CARD)
        arguments += [str(tmp_path / name), str(tmp_path / f"{name}.pt"), each.torch_dtype]
        expected[name] = [draw(each, student, prompts, 4, 4.5) for prompts in (PROMPTS, PROMPTS[:1])]

    subprocess.run(
        [sys.executable, "-c", LOAD_AND_DRAW, *arguments],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
    )
    for name, images in expected.items():
        assert images[0].std() > 1e-3
        for drawn, image in zip(torch.load(tmp_path / f"{name}.pt"), images, strict=True):
            assert torch.equal(drawn, image), f"{name}: {(drawn - image).abs().max()}"


def test_a_student_is_safetensors_with_its_code_and_a_card(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    directory = export_student(adapter, build_student(adapter), tmp_path / "out" / "student", CARD)
    assert files(directory) == {
        "README.md",
        MARK,
        "model_index.json",
        *CODE,
        "scheduler/average_velocity_scheduler.py",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        *(f"transformer/{file}" for file in CODE),
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert sorted(path.name for path in directory.parent.iterdir()) == ["student"]
    for path in directory.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), f"{path} tells where it was made"


def test_a_teacher_is_a_stock_pipeline_of_the_same_function(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    network = train_a_little(adapter.load_teacher())
    directory = export_teacher(adapter, network, tmp_path / "teacher", CARD)
    assert not list(directory.rglob("*.py"))
    pipeline = FluxPipeline.from_pretrained(directory, use_safetensors=True)
    assert type(pipeline.transformer).__module__.startswith("diffusers.")
    again = load_adapter(str(directory))
    x, t = noise(3), torch.tensor([0.2, 0.6, 1.0])
    with torch.no_grad():
        before = adapter.velocity(network, x, t, adapter.encode_prompt(PROMPTS))
        after = again.velocity(again.load_teacher(), x, t, again.encode_prompt(PROMPTS))
    assert torch.equal(before, after)
    for path in directory.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), f"{path} tells where it was made"


@pytest.mark.parametrize("options", [{"time_embedding": "original"}, {}])
def test_a_student_cannot_pass_for_a_teacher(adapter: DiffusersAdapter, tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="save it as a student"):
        export_teacher(adapter, build_student(adapter, **options), tmp_path / "teacher", CARD)
    assert not (tmp_path / "teacher").exists()


def test_precision_is_kept(teacher_directory: str, tmp_path: Path) -> None:
    adapter = load_adapter(teacher_directory, torch_dtype="bfloat16")
    directory = export_teacher(adapter, adapter.load_teacher(), tmp_path / "teacher", CARD)
    pipeline = FluxPipeline.from_pretrained(directory, torch_dtype=torch.bfloat16)
    x = pipeline(PROMPTS, num_inference_steps=1, height=32, width=32, max_sequence_length=8, output_type="pt").images
    assert x.isfinite().all()
    size = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    assert size < 0.6 * sum(path.stat().st_size for path in Path(teacher_directory).rglob("*.safetensors"))


def test_a_student_needs_trust(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    directory = export_student(adapter, build_student(adapter), tmp_path / "student", CARD)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(directory)


def test_mark_says_what_it_is(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    directory = export_student(adapter, build_student(adapter), tmp_path / "student", CARD)
    assert json.loads((directory / MARK).read_text())["kind"] == "student"


# Where it is written


def test_an_earlier_export_is_replaced_as_a_whole(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    student = build_student(adapter)
    directory = export_student(adapter, student, tmp_path / "student", CARD)
    (directory / "left.over").touch()
    export_teacher(adapter, adapter.load_teacher(), directory, CARD)
    assert not (directory / "left.over").exists()
    assert not files(directory) & {*CODE}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_other_directories_are_refused_and_left_alone(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    student = build_student(adapter)
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.tex").write_text("years of work")
    for target in (mine, mine / "chapter.tex"):
        with pytest.raises(ConfigurationError, match="choose another directory, or empty it"):
            export_student(adapter, student, target, CARD)
    assert files(tmp_path / "thesis") == {"chapter.tex"}
    (tmp_path / "empty").mkdir()
    assert check_export_directory(tmp_path / "empty") == tmp_path / "empty"
    export_student(adapter, student, tmp_path / "empty", CARD)
    assert (tmp_path / "empty" / MARK).is_file()


class Failing(DiffusersAdapter):
    """Breaks off in the middle of an export, or writes another network than it was given."""

    def __init__(self, pretrained: str, instead: nn.Module | None = None) -> None:
        super().__init__(pretrained)
        self.instead = [instead]

    def save_student(self, student: nn.Module, directory: Path) -> None:
        if self.instead[0] is None:
            (directory / "model_index.json").write_text("{")
            raise OSError("no space left on device")
        super().save_student(self.instead[0], directory)


def test_an_export_that_breaks_off_leaves_the_old_one_whole(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    student = build_student(adapter)
    directory = export_student(adapter, student, tmp_path / "student", CARD)
    before = {name: (directory / name).read_bytes() for name in files(directory)}
    failing = Failing(adapter.pretrained)
    failing.load()
    with pytest.raises(OSError, match="no space left"):
        export_student(failing, student, directory, CARD)
    assert {name: (directory / name).read_bytes() for name in files(directory)} == before

    export_student(adapter, student, directory, CARD)  # clears what the broken one left
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_export_that_does_not_hold_the_weights_is_not_put_in_place(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    other = build_student(adapter, interval_embedding="zero")
    other.proj_out = nn.Linear(other.proj_out.in_features, 32)
    failing = Failing(adapter.pretrained, instead=other)
    failing.load()
    with pytest.raises(RuntimeError, match="does not hold the network's weights"):
        export_student(failing, build_student(adapter), tmp_path / "student", CARD)
    assert not (tmp_path / "student").exists()


# The model card


def test_card_tells_method_teacher_steps_figures_and_how_to_load() -> None:
    card = ModelCard(
        "MeanFlow", "black-forest-labs/FLUX.1-dev", (1, 2, 4), 512, 768, 4.5, 1000, 12.34, {"val/accuracy": 0.98765}, "Made so."
    )
    text = render_card(card, "student", {"guidance_scale": 4.5})
    for part in (
        "library_name: diffusers",
        "base_model: black-forest-labs/FLUX.1-dev",
        "draws in 1, 2 or 4 steps",
        "| Method | MeanFlow |",
        "| Teacher | black-forest-labs/FLUX.1-dev |",
        "| Pictures | 512 x 768 pixels |",
        "| Training steps | 1000 |",
        "| Training time | 12.3 minutes |",
        "| val/accuracy | 0.9877 |",
        "trust_remote_code=True",
        "guidance_scale=4.5",
        "Made so.",
        "license applies",
    ):
        assert part in text


@pytest.mark.parametrize("kind", ["student", "teacher"])
@pytest.mark.parametrize("embeds_guidance", [False, True])
def test_code_in_the_card_runs(kind: str, embeds_guidance: bool, tmp_path: Path, modules_cache: None) -> None:
    directory = save_tiny_pipeline(tmp_path / "tiny", guidance_embeds=embeds_guidance)
    adapter = load_adapter(directory)
    if kind == "student":
        out = export_student(adapter, build_student(adapter), tmp_path / "out", CARD)
    else:
        out = export_teacher(adapter, adapter.load_teacher(), tmp_path / "out", CARD)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("this/directory", str(out)).replace("a prompt", "a circle"), names)
    assert names["image"].size == (32, 32)


def test_a_path_in_the_card_is_cut_to_its_name(tmp_path: Path) -> None:
    (tmp_path / "my-teacher").mkdir()
    text = render_card(ModelCard("MeanFlow", str(tmp_path / "my-teacher"), (4,), 32, 32), "student", {})
    assert str(tmp_path) not in text
    assert "| Teacher | my-teacher |" in text
    assert "base_model" not in text
