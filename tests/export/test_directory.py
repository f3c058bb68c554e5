import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_distill.errors import ConfigurationError
from lightning_distill.export.directory import (
    MARK,
    ModelCard,
    check_export_directory,
    export_student,
    export_teacher,
    render_card,
)
from lightning_distill.students.lora_student import load_lora_student
from lightning_distill.students.two_time_flux import TwoTimeFluxTransformer2DModel
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.teachers.tiny_families import save_family
from tests.tiny import FLUX_DEV_SHIFT, PROMPTS, draw, load_adapter, noise, save_tiny_pipeline, train_a_little

CARD = ModelCard("MeanFlow", "shapes-teacher", (1, 2, 4), 32, 32, guidance_scale=2.0)

CODE = ("few_step.py", "policy.py", "two_time.py", "two_time_flux.py")

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

# Likewise, with the code that is beside the weights.
LOAD_LORA_AND_DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
base, *directories = sys.argv[1:]
sys.path.append(directories[0])
from few_step_student.lora_student import load_lora_student
for directory in directories:
    stock = DiffusionPipeline.from_pretrained(base, torch_dtype=getattr(torch, directory))
    pipeline = load_lora_student(stock, directory)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    prompts = ["a red circle", "a green square", "a circle"]
    torch.save(pipeline(prompts, guidance_scale=4.5, generator=generators, output_type="pt").images, f"{directory}.pt")
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


def build_lora_student(adapter: DiffusersAdapter) -> TwoTimeFluxTransformer2DModel:
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions(lora=LoraOptions(rank=2)))
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return student


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
        "stochastic": (load_adapter(guided), {}),
    }
    cases["stochastic"][0].stochastic_sampling = True
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


def test_a_lora_student_draws_the_same_bits_on_its_base_in_a_fresh_process(tmp_path: Path) -> None:
    base = save_tiny_pipeline(tmp_path / "tiny", guidance_embeds=True, scheduler=FLUX_DEV_SHIFT)
    expected = {}
    for dtype in ("float32", "bfloat16"):
        adapter = load_adapter(base, torch_dtype=dtype, max_sequence_length=6)
        adapter.stochastic_sampling = dtype == "bfloat16"
        student = build_lora_student(adapter).eval()
        export_student(adapter, student, tmp_path / dtype, CARD, lora="unmerged")
        expected[dtype] = draw(adapter, student, PROMPTS, 4, 4.5)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LOAD_LORA_AND_DRAW, base, *expected], check=True, cwd=tmp_path, env=environment)
    for dtype, images in expected.items():
        assert images.std() > 1e-3
        assert torch.equal(torch.load(tmp_path / f"{dtype}.pt"), images), dtype


def test_a_lora_student_is_written_without_its_base(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    student = build_lora_student(adapter)
    directory = export_student(adapter, student, tmp_path / "student", CARD, lora="unmerged")
    code = {*CODE, "average_velocity_scheduler.py", "few_step_components.py", "lora_student.py"}
    assert files(directory) == {
        "README.md",
        MARK,
        "adapter_config.json",
        "pytorch_lora_weights.safetensors",
        "student.json",
        "time_embedders.safetensors",
        *(f"few_step_student/{file}" for file in code),
    }
    for path in directory.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), f"{path} tells where it was made"
    assert json.loads((directory / "student.json").read_text())["base_model"] == "tiny"
    assert json.loads((directory / MARK).read_text())["kind"] == "lora_student"
    trained = sum(parameter.nbytes for parameter in student.parameters() if parameter.requires_grad)
    assert sum(path.stat().st_size for path in directory.glob("*.safetensors")) < trained + 10_000
    stock = FluxPipeline.from_pretrained(adapter.pretrained)
    stock.load_lora_weights(directory)  # under names that diffusers knows
    given = {name for name, _ in stock.transformer.named_parameters() if "lora_" in name}
    assert len(given) == len([name for name, _ in student.named_parameters() if "lora_" in name])


def test_a_lora_student_is_merged_by_default(adapter: DiffusersAdapter, tmp_path: Path, modules_cache: None) -> None:
    student = build_lora_student(adapter).eval()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    directory = export_student(adapter, student, tmp_path / "student", CARD)
    assert files(directory) == files(export_student(adapter, build_student(adapter), tmp_path / "whole", CARD))
    pipeline = DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipeline(PROMPTS, generator=generators, output_type="pt").images
    torch.testing.assert_close(images, draw(adapter, student, PROMPTS, 4), rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_weights_are_merged_in_float32(teacher_directory: str) -> None:
    adapter = load_adapter(teacher_directory, torch_dtype="bfloat16")
    student = build_lora_student(adapter)
    layer = student.get_submodule("transformer_blocks.0.attn.to_q")
    expected = layer.base_layer.weight.double() + layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double()
    found = adapter.merge_lora(student).get_submodule("transformer_blocks.0.attn.to_q").weight
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_lora_student_goes_onto_its_own_base_only(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    directory = export_student(adapter, build_lora_student(adapter), tmp_path / "student", CARD, lora="unmerged")
    base = FluxPipeline.from_pretrained(adapter.pretrained)
    guided = FluxPipeline.from_pretrained(save_tiny_pipeline(tmp_path / "guided", guidance_embeds=True))
    with pytest.raises(ValueError, match="base has guidance_embeds False, and the one that is given True"):
        load_lora_student(guided, directory)
    other = FluxPipeline.from_pretrained(save_tiny_pipeline(tmp_path / "other"))
    with pytest.raises(ValueError, match="weights of the base that is given are not those"):
        load_lora_student(other, directory)
    with pytest.raises(ValueError, match="base is a FluxPipeline, not a StableDiffusion3Pipeline"):
        load_lora_student(DiffusionPipeline.from_pretrained(save_family("stable_diffusion_3", tmp_path / "sd3")), directory)
    weights = load_file(directory / "pytorch_lora_weights.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, directory / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="are not those of the layers that its settings name"):
        load_lora_student(base, directory)


def test_a_whole_student_cannot_be_written_without_its_base(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no LoRA to export unmerged"):
        export_student(adapter, build_student(adapter), tmp_path / "student", CARD, lora="unmerged")
    assert not (tmp_path / "student").exists()


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


@pytest.mark.parametrize("kind", ["student", "lora_student", "teacher"])
@pytest.mark.parametrize("embeds_guidance", [False, True])
def test_code_in_the_card_runs(kind: str, embeds_guidance: bool, tmp_path: Path, modules_cache: None) -> None:
    directory = save_tiny_pipeline(tmp_path / "tiny", guidance_embeds=embeds_guidance)
    adapter = load_adapter(directory)
    if kind == "student":
        out = export_student(adapter, build_student(adapter), tmp_path / "out", CARD)
    elif kind == "lora_student":
        out = export_student(adapter, build_lora_student(adapter), tmp_path / "out", CARD, lora="unmerged")
    else:
        out = export_teacher(adapter, adapter.load_teacher(), tmp_path / "out", CARD)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    code = code.replace("this/directory", str(out)).replace("a prompt", "a circle").replace(CARD.teacher, directory)
    exec(code, names)
    assert names["image"].size == (32, 32)


def test_a_path_in_the_card_is_cut_to_its_name(tmp_path: Path) -> None:
    (tmp_path / "my-teacher").mkdir()
    text = render_card(ModelCard("MeanFlow", str(tmp_path / "my-teacher"), (4,), 32, 32), "student", {})
    assert str(tmp_path) not in text
    assert "| Teacher | my-teacher |" in text
    assert "base_model" not in text
