"""Contents of exported directories, their images in a fresh process, and their replacement."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_distill.digests import MANIFEST
from lightning_distill.errors import ConfigurationError, NonFiniteError, StorageError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.directory import check_export_directory
from lightning_distill.export.formats import FormatOptions
from lightning_distill.export.mark import MARK
from lightning_distill.export.students import export_student, export_teacher
from lightning_distill.students.lora_student import load_lora_student
from lightning_distill.students.two_time_flux import TwoTimeFluxTransformer2DModel
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.preloaded import with_diffusers
from tests.teachers.tiny_families import save_family
from tests.tiny import FLUX_DEV_SHIFT, PROMPTS, load_adapter, noise, perturb_weights, sample_images, save_tiny_pipeline

UNMERGED = FormatOptions(lora="unmerged")
CARD = ModelCard("MeanFlow", "shapes-teacher", (1, 2, 4), 32, 32, guidance_scale=2.0)

CODE = ("few_step.py", "policy.py", "two_time.py", "two_time_flux.py")

# Runs in a process that does not import this package.
LOAD_AND_SAMPLE = """
import sys, torch
from diffusers import DiffusionPipeline
for directory, out, dtype in zip(*[iter(sys.argv[1:])] * 3):
    # Frozen components in the dtype of the teacher; the student is exported in its training dtype, float32.
    precision = {"default": getattr(torch, dtype), "transformer": torch.float32}
    pipeline = DiffusionPipeline.from_pretrained(directory, trust_remote_code=True, torch_dtype=precision)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    prompts = ["a red circle", "a green square", "a circle"]
    images = [pipeline(prompts, guidance_scale=4.5, generator=generators, output_type="pt").images]
    # The last bits of a single image depend on the alignment of weights in memory.
    generators = [torch.Generator().manual_seed(0)]
    images += [pipeline(prompts[:1], guidance_scale=4.5, generator=generators, output_type="pt").images]
    torch.save(images, out)
assert not any(name.startswith("lightning") for name in sys.modules), "the export imports lightning_distill"
"""

# Runs in a process that does not import this package, with the code in the exported directory.
LOAD_LORA_AND_SAMPLE = """
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
assert not any(name.startswith("lightning") for name in sys.modules), "the export imports lightning_distill"
"""


@pytest.fixture
def teacher_directory(tmp_path: Path) -> str:
    return save_tiny_pipeline(tmp_path / "tiny", scheduler={"shift": 2.0})


@pytest.fixture
def adapter(teacher_directory: str) -> DiffusersAdapter:
    return load_adapter(teacher_directory)


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate cache of remote code, which diffusers otherwise shares between processes."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def build_student(adapter: DiffusersAdapter, **options: Any) -> TwoTimeFluxTransformer2DModel:
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions(**options))
    return perturb_weights(student)


def build_lora_student(adapter: DiffusersAdapter) -> TwoTimeFluxTransformer2DModel:
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions(lora=LoraOptions(rank=2)))
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return student


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


# Contents


def test_student_samples_identical_images_in_a_fresh_process(adapter: DiffusersAdapter, tmp_path: Path) -> None:
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
        expected[name] = [sample_images(each, student, prompts, 4, 4.5) for prompts in (PROMPTS, PROMPTS[:1])]

    (tmp_path / "sample.py").write_text(LOAD_AND_SAMPLE)
    with_diffusers().run(["sample.py", *arguments], tmp_path)
    for name, images in expected.items():
        assert images[0].std() > 1e-3
        for found, image in zip(torch.load(tmp_path / f"{name}.pt"), images, strict=True):
            assert torch.equal(found, image), f"{name}: {(found - image).abs().max()}"


def test_files_of_a_student(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    directory = export_student(adapter, build_student(adapter), tmp_path / "out" / "student", CARD)
    assert files(directory) == {
        "README.md",
        MANIFEST,
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
        assert str(tmp_path) not in path.read_text(), f"{path} contains a path of this machine"


def test_lora_student_samples_identical_images_in_a_fresh_process(tmp_path: Path) -> None:
    base = save_tiny_pipeline(tmp_path / "tiny", guidance_embeds=True, scheduler=FLUX_DEV_SHIFT)
    expected = {}
    for dtype in ("float32", "bfloat16"):
        adapter = load_adapter(base, torch_dtype=dtype, max_sequence_length=6)
        adapter.stochastic_sampling = dtype == "bfloat16"
        student = build_lora_student(adapter).eval()
        export_student(adapter, student, tmp_path / dtype, CARD, options=UNMERGED)
        expected[dtype] = sample_images(adapter, student, PROMPTS, 4, 4.5)
    (tmp_path / "sample.py").write_text(LOAD_LORA_AND_SAMPLE)
    with_diffusers().run(["sample.py", base, *expected], tmp_path)
    for dtype, images in expected.items():
        assert images.std() > 1e-3
        assert torch.equal(torch.load(tmp_path / f"{dtype}.pt"), images), dtype


def test_files_of_an_unmerged_lora_student(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    student = build_lora_student(adapter)
    directory = export_student(adapter, student, tmp_path / "student", CARD, options=UNMERGED)
    code = {*CODE, "average_velocity_scheduler.py", "few_step_components.py", "lora_student.py"}
    assert files(directory) == {
        "README.md",
        MANIFEST,
        MARK,
        "adapter_config.json",
        "pytorch_lora_weights.safetensors",
        "student.json",
        "time_embedders.safetensors",
        *(f"few_step_student/{file}" for file in code),
    }
    for path in directory.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), f"{path} contains a path of this machine"
    assert json.loads((directory / "student.json").read_text())["base_model"] == "tiny"
    assert json.loads((directory / MARK).read_text())["kind"] == "lora_student"
    trained = sum(parameter.nbytes for parameter in student.parameters() if parameter.requires_grad)
    assert sum(path.stat().st_size for path in directory.glob("*.safetensors")) < trained + 10_000
    stock = FluxPipeline.from_pretrained(adapter.pretrained)
    stock.load_lora_weights(directory)  # by the names that diffusers expects
    loaded = {name for name, _ in stock.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len([name for name, _ in student.named_parameters() if "lora_" in name])


def test_lora_student_is_merged_by_default(adapter: DiffusersAdapter, tmp_path: Path, modules_cache: None) -> None:
    student = build_lora_student(adapter).eval()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    directory = export_student(adapter, student, tmp_path / "student", CARD)
    assert files(directory) == files(export_student(adapter, build_student(adapter), tmp_path / "full", CARD))
    pipeline = DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipeline(PROMPTS, generator=generators, output_type="pt").images
    torch.testing.assert_close(images, sample_images(adapter, student, PROMPTS, 4), rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_lora_weights_are_merged_in_float32(teacher_directory: str) -> None:
    adapter = load_adapter(teacher_directory, torch_dtype="bfloat16")
    student = build_lora_student(adapter)
    layer = student.get_submodule("transformer_blocks.0.attn.to_q")
    expected = layer.base_layer.weight.double() + layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double()
    found = adapter.merge_lora(student).get_submodule("transformer_blocks.0.attn.to_q").weight
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_lora_student_loads_onto_its_own_base_only(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    directory = export_student(adapter, build_lora_student(adapter), tmp_path / "student", CARD, options=UNMERGED)
    base = FluxPipeline.from_pretrained(adapter.pretrained)
    guided = FluxPipeline.from_pretrained(save_tiny_pipeline(tmp_path / "guided", guidance_embeds=True))
    with pytest.raises(ValueError, match="base has guidance_embeds False, but the given base has True"):
        load_lora_student(guided, directory)
    other = FluxPipeline.from_pretrained(save_tiny_pipeline(tmp_path / "other"))
    with pytest.raises(ValueError, match="weights of the given base are not those"):
        load_lora_student(other, directory)
    with pytest.raises(ValueError, match="base is a FluxPipeline, not a StableDiffusion3Pipeline"):
        load_lora_student(DiffusionPipeline.from_pretrained(save_family("stable_diffusion_3", tmp_path / "sd3")), directory)
    weights = load_file(directory / "pytorch_lora_weights.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, directory / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"do not match the layers in its student\.json"):
        load_lora_student(base, directory)


def test_student_without_lora_cannot_be_exported_unmerged(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="lora is unmerged, but the student has no LoRA"):
        export_student(adapter, build_student(adapter), tmp_path / "student", CARD, options=UNMERGED)
    assert not (tmp_path / "student").exists()


def test_teacher_is_a_stock_pipeline_with_equal_velocities(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    network = perturb_weights(adapter.load_teacher())
    directory = export_teacher(adapter, network, tmp_path / "teacher", CARD)
    assert not list(directory.rglob("*.py"))
    pipeline = FluxPipeline.from_pretrained(directory, use_safetensors=True)
    assert type(pipeline.transformer).__module__.startswith("diffusers.")
    exported = load_adapter(str(directory))
    x, t = noise(3), torch.tensor([0.2, 0.6, 1.0])
    with torch.no_grad():
        before = adapter.velocity(network, x, t, adapter.encode_prompt(PROMPTS))
        after = exported.velocity(exported.load_teacher(), x, t, exported.encode_prompt(PROMPTS))
    assert torch.equal(before, after)
    for path in directory.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), f"{path} contains a path of this machine"


@pytest.mark.parametrize("options", [{"time_embedding": "original"}, {}])
def test_student_cannot_be_exported_as_teacher(adapter: DiffusersAdapter, tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="save it as a student"):
        export_teacher(adapter, build_student(adapter, **options), tmp_path / "teacher", CARD)
    assert not (tmp_path / "teacher").exists()


def test_teacher_is_exported_in_its_dtype(teacher_directory: str, tmp_path: Path) -> None:
    adapter = load_adapter(teacher_directory, torch_dtype="bfloat16")
    directory = export_teacher(adapter, adapter.load_teacher(), tmp_path / "teacher", CARD)
    pipeline = FluxPipeline.from_pretrained(directory, torch_dtype=torch.bfloat16)
    x = pipeline(PROMPTS, num_inference_steps=1, height=32, width=32, max_sequence_length=8, output_type="pt").images
    assert x.isfinite().all()
    size = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    assert size < 0.6 * sum(path.stat().st_size for path in Path(teacher_directory).rglob("*.safetensors"))


def test_student_needs_trust_remote_code(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    directory = export_student(adapter, build_student(adapter), tmp_path / "student", CARD)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(directory)


def test_mark_has_the_kind_of_the_export(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    directory = export_student(adapter, build_student(adapter), tmp_path / "student", CARD)
    assert json.loads((directory / MARK).read_text())["kind"] == "any_step"


# Target directory


def test_earlier_export_is_replaced_completely(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    student = build_student(adapter)
    directory = export_student(adapter, student, tmp_path / "student", CARD)
    (directory / "left.over").touch()
    export_teacher(adapter, adapter.load_teacher(), directory, CARD)
    assert not (directory / "left.over").exists()
    assert not files(directory) & {*CODE}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_directories_with_other_files_raise_and_are_not_changed(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    student = build_student(adapter)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("years of work")
    for target, reason in ((other, "choose another directory, or empty it"), (other / "chapter.tex", "cannot be written")):
        with pytest.raises(ConfigurationError, match=reason):
            export_student(adapter, student, target, CARD)
    assert files(tmp_path / "thesis") == {"chapter.tex"}
    (tmp_path / "empty").mkdir()
    assert check_export_directory(tmp_path / "empty") == tmp_path / "empty"
    export_student(adapter, student, tmp_path / "empty", CARD)
    assert (tmp_path / "empty" / MARK).is_file()


class Failing(DiffusersAdapter):
    """Fails in the middle of an export, or writes another network than its argument."""

    def __init__(self, pretrained: str, replacement: nn.Module | None = None) -> None:
        super().__init__(pretrained)
        self.replacement = [replacement]

    def save_student(self, student: nn.Module, directory: Path) -> None:
        if self.replacement[0] is None:
            (directory / "model_index.json").write_text("{")
            raise OSError(errno.ENOSPC, "No space left on device")
        super().save_student(self.replacement[0], directory)


def test_failed_export_leaves_the_old_one_complete(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    student = build_student(adapter)
    directory = export_student(adapter, student, tmp_path / "student", CARD)
    before = {name: (directory / name).read_bytes() for name in files(directory)}
    failing = Failing(adapter.pretrained)
    failing.load()
    with pytest.raises(StorageError, match=r"no space left on the disk of '.*student'; free some space"):
        export_student(failing, student, directory, CARD)
    assert {name: (directory / name).read_bytes() for name in files(directory)} == before
    assert list(tmp_path.glob(".*")) == []

    (tmp_path / ".student.unfinished").mkdir()  # of a process that was killed
    export_student(adapter, student, directory, CARD)
    assert list(tmp_path.glob(".*")) == []


def test_export_without_all_weights_is_not_renamed(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    other = build_student(adapter, interval_embedding="zero")
    other.proj_out = nn.Linear(other.proj_out.in_features, 32)
    failing = Failing(adapter.pretrained, replacement=other)
    failing.load()
    with pytest.raises(RuntimeError, match="lack weights of the network"):
        export_student(failing, build_student(adapter), tmp_path / "out" / "student", CARD)
    assert list((tmp_path / "out").iterdir()) == []


def test_digests_cover_all_files_in_the_format_of_sha256sum(adapter: DiffusersAdapter, tmp_path: Path) -> None:
    directory = export_student(adapter, build_student(adapter), tmp_path / "student", CARD)
    listed = {line.partition("  ")[2] for line in (directory / MANIFEST).read_text().splitlines()}
    assert listed == files(directory) - {MANIFEST}
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", MANIFEST], cwd=directory, check=True)


@pytest.mark.parametrize("lora", ["merged", "unmerged"])
def test_weights_that_are_not_finite_are_not_exported(lora: Any, adapter: DiffusersAdapter, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    student = build_lora_student(adapter)
    name, weight = next((name, each) for name, each in student.named_parameters() if each.requires_grad and "lora_B" in name)
    with torch.no_grad():
        weight.view(-1)[3] = torch.nan
    layer = name.partition(".lora_B")[0]
    with pytest.raises(NonFiniteError, match=rf"nothing was exported to .*student, because .*{re.escape(layer)}.* is NaN"):
        export_student(adapter, student, tmp_path / "out" / "student", CARD, options=FormatOptions(lora=lora))
    assert list((tmp_path / "out").iterdir()) == []


# Code in the model card


@pytest.mark.parametrize("kind", ["student", "lora_student", "teacher"])
@pytest.mark.parametrize("embeds_guidance", [False, True])
def test_code_in_the_card_runs(kind: str, embeds_guidance: bool, tmp_path: Path, modules_cache: None) -> None:
    directory = save_tiny_pipeline(tmp_path / "tiny", guidance_embeds=embeds_guidance)
    adapter = load_adapter(directory)
    if kind == "student":
        out = export_student(adapter, build_student(adapter), tmp_path / "out", CARD)
    elif kind == "lora_student":
        out = export_student(adapter, build_lora_student(adapter), tmp_path / "out", CARD, options=UNMERGED)
    else:
        out = export_teacher(adapter, adapter.load_teacher(), tmp_path / "out", CARD)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    code = code.replace("this/directory", str(out)).replace("a prompt", "a circle").replace(CARD.teacher, directory)
    exec(code, names)
    assert names["image"].size == (32, 32)
