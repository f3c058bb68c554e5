"""LoRA files that are merged into a teacher: the weights, their consumers, and error messages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.students.lora_student import load_lora_student
from lightning_distill.teachers import DiffusersAdapter, LoraOptions, StudentOptions, TeacherLora
from tests.teachers.lora_files import RANK, random_factors, save_lora, to_kohya
from tests.teachers.tiny_families import save_family
from tests.tiny import load_adapter, save_tiny_pipeline

FAMILIES = ["flux_guided", "flux2", "hunyuan_image", "qwen_image", "sana", "stable_diffusion_3", "z_image"]
TIME_LAYERS = {
    "flux2": "time_guidance_embed.timestep_embedder.linear_2",
    "hunyuan_image": "time_guidance_embed.timestep_embedder.linear_2",
    "sana": "time_embed.emb.timestep_embedder.linear_2",
    "z_image": "t_embedder.mlp.2",
}
"""Last layers of time embedders, where they are not in `time_text_embed`."""
KOHYA = {
    "transformer_blocks.0.attn.to_out.0": "double_blocks_0_img_attn_proj",
    "transformer_blocks.0.attn.to_add_out": "double_blocks_0_txt_attn_proj",
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "teacher", guidance_embeds=True)


def teacher_weights(directory: str, **options: Any) -> dict[str, Tensor]:
    adapter = DiffusersAdapter(directory, **options)
    adapter.check()
    return {name: value.clone() for name, value in adapter.load_teacher().state_dict().items()}


def stock_weights(directory: str, loras: dict[str, float], **options: Any) -> dict[str, Tensor]:
    """Weights of the stock transformer after diffusers has loaded and fused LoRA files."""
    pipeline = DiffusionPipeline.from_pretrained(directory, **options)
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, file in zip(names, loras, strict=True):
        pipeline.load_lora_weights(file, adapter_name=name)
    pipeline.set_adapters(names, list(loras.values()))
    pipeline.fuse_lora(components=["transformer"], adapter_names=names)
    pipeline.unload_lora_weights()
    weights: dict[str, Tensor] = pipeline.transformer.state_dict()
    return weights


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_equals_the_stock_pipeline_with_fused_lora(family: str, tmp_path: Path) -> None:
    """Two files; one also updates the time embedder."""
    directory = save_family(family, tmp_path / "teacher")
    time = TIME_LAYERS.get(family, "time_text_embed.timestep_embedder.linear_2")
    first = save_lora(random_factors(directory, 0, time), tmp_path / "first.safetensors")
    second = save_lora(random_factors(directory, 1), tmp_path / "second.safetensors")
    merged = teacher_weights(directory, lora=[TeacherLora(first, 0.7), TeacherLora(second, -0.5)])
    plain = teacher_weights(directory)
    assert largest_difference(merged, plain) > 0.01
    assert (merged[f"{time}.weight"] - plain[f"{time}.weight"]).abs().max() > 1e-3
    if family == "hunyuan_image":  # diffusers has no LoRA loader for its pipeline
        stock: Any = DiffusionPipeline.from_pretrained(directory).transformer
        for name, file in {"first": first, "second": second}.items():
            stock.load_lora_adapter(load_file(file), adapter_name=name)
        stock.set_adapters(["first", "second"], [0.7, -0.5])
        stock.fuse_lora(adapter_names=["first", "second"])
        stock.unload_lora()
        expected = stock.state_dict()
    else:
        expected = stock_weights(directory, {first: 0.7, second: -0.5})
    assert largest_difference(merged, expected) < 1e-6


def test_names_and_alpha_of_kohya(flux: str, tmp_path: Path) -> None:
    weights = to_kohya(random_factors(flux), KOHYA, alpha=RANK / 2)
    file = save_lora(weights, tmp_path / "kohya.safetensors")
    merged = teacher_weights(flux, lora=file)
    assert largest_difference(merged, stock_weights(flux, {file: 1.0})) < 1e-6
    plain = teacher_weights(flux)
    for name, kohya in KOHYA.items():
        update = weights[f"lora_unet_{kohya}.lora_up.weight"] @ weights[f"lora_unet_{kohya}.lora_down.weight"] / 2
        torch.testing.assert_close(merged[f"{name}.weight"], plain[f"{name}.weight"] + update, atol=1e-6, rtol=0)


def test_alpha_in_the_settings_of_peft(flux: str, tmp_path: Path) -> None:
    weights = {name.removeprefix("transformer."): value for name, value in random_factors(flux).items()}
    layers = sorted({name.rpartition(".lora_")[0] for name in weights})
    settings = LoraConfig(r=RANK, lora_alpha=3 * RANK, target_modules=layers).to_dict()
    DiffusionPipeline.from_pretrained(flux).save_lora_weights(
        tmp_path, transformer_lora_layers=weights, transformer_lora_adapter_metadata=settings
    )
    merged, plain = teacher_weights(flux, lora=str(tmp_path)), teacher_weights(flux)
    for name in layers:
        update = 3 * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
        torch.testing.assert_close(merged[f"{name}.weight"], plain[f"{name}.weight"] + update, atol=1e-6, rtol=0)


def test_update_of_a_bfloat16_teacher_is_rounded_once(flux: str, tmp_path: Path) -> None:
    time = "time_text_embed.timestep_embedder.linear_2"
    factors = random_factors(flux, 0, time)
    file = save_lora({name: value.to(torch.bfloat16) for name, value in factors.items()}, tmp_path / "lora.safetensors")
    merged = teacher_weights(flux, lora=file, torch_dtype="bfloat16")
    plain = teacher_weights(flux)
    for name in {each.rpartition(".lora_")[0].removeprefix("transformer.") for each in factors}:
        down, up = (factors[f"transformer.{name}.lora_{part}.weight"].to(torch.bfloat16).float() for part in "AB")
        dtype = torch.float32 if name == time else torch.bfloat16
        assert merged[f"{name}.weight"].dtype == dtype
        expected = (plain[f"{name}.weight"] + (up.double() @ down.double()).float()).to(dtype)
        assert torch.equal(merged[f"{name}.weight"], expected), name


def test_full_student_starts_from_the_merged_weights(flux: str, tmp_path: Path) -> None:
    file = save_lora(random_factors(flux), tmp_path / "lora.safetensors")
    adapter = load_adapter(flux, lora=file)
    teacher = adapter.load_teacher()
    student, _ = adapter.build_student(teacher, StudentOptions())
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])
    assert not torch.equal(student.state_dict()[name], teacher_weights(flux)[name])


def test_encodings_do_not_depend_on_lora(flux: str, tmp_path: Path) -> None:
    file = save_lora(random_factors(flux), tmp_path / "lora.safetensors")
    assert load_adapter(flux, lora=file).encoding_settings() == load_adapter(flux).encoding_settings()


def test_unmerged_student_names_base_and_lora(flux: str, tmp_path: Path) -> None:
    """It loads onto the stock pipeline with the fused LoRA, and not onto the plain one."""
    file = save_lora(random_factors(flux), tmp_path / "style.safetensors")
    adapter = load_adapter(flux, lora=[TeacherLora(file, 0.5)])
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions(lora=LoraOptions(rank=2)))
    adapter.save_lora(student, tmp_path / "student")
    settings = json.loads((tmp_path / "student" / "student.json").read_text())
    assert settings["base_model"] == "teacher"
    assert settings["base_lora"] == [{"path": "style.safetensors", "weight": 0.5}]
    base = DiffusionPipeline.from_pretrained(flux)
    with pytest.raises(ValueError, match=r"pass its own base, with style\.safetensors fused at weight 0\.5"):
        load_lora_student(base, tmp_path / "student")
    base.load_lora_weights(file)
    base.fuse_lora(lora_scale=0.5)
    base.unload_lora_weights()
    loaded = load_lora_student(base, tmp_path / "student").transformer.state_dict()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(loaded[name], value, atol=1e-6, rtol=0)


def save_renamed(factors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in factors.items()}


def one_not_finite(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(iter(factors))
    return factors | {name: torch.full_like(factors[name], torch.nan)}


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "other layers": (lambda x: save_renamed(x, "blocks.0", "blocks.7"), "whose weight 'transformer.*7.*more fits no layer"),
    "other shapes": (lambda x: {k: v if "_A" in k else v[1:] for k, v in x.items()}, "have the shapes .* but the layer has"),
    "one factor": (lambda x: {k: v for k, v in x.items() if "to_k.lora_A" not in k}, "has one of two LoRA factors of"),
    "not finite": (one_not_finite, "is NaN or infinite"),
    "no LoRA": (lambda x: {"transformer.x_embedder.weight": torch.ones(2, 2)}, "fits no layer"),
    "text encoder": (
        lambda x: x | {"text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)},
        "updates a text encoder by 'text_encoder.layers",
    ),
    "text encoder of kohya": (lambda x: {"lora_te1_layers_0.lora_down.weight": torch.ones(2, 2)}, "updates a text encoder"),
    "DoRA": (lambda x: x | {"transformer.x_embedder.lora_magnitude_vector": torch.ones(2)}, "has DoRA weights"),
    "LoKr": (lambda x: {"transformer.x_embedder.lokr_w1": torch.ones(2, 2)}, "has LoKr weights"),
    "full updates": (lambda x: x | {"transformer.x_embedder.diff_b": torch.ones(2)}, "has full updates"),
    "two tools": (lambda x: x | {"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, "has names of several tools"),
    "unreadable names": (
        lambda x: {"lora_unet_unknown.lora_down.weight": torch.ones(2, 2)},
        r"whose LoRA cannot be loaded \(Incompatible keys",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_refused_before_a_model_loads(fault: str, flux: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    file = save_lora(change(random_factors(flux)), tmp_path / "lora.safetensors")
    with pytest.raises(ConfigurationError, match=message) as error:
        DiffusersAdapter(flux, lora=file).check()
    assert str(error.value).startswith(f"adapter.lora is {file!r}, ")
    assert "\n" not in str(error.value)


def test_places_without_a_file_are_refused(flux: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "lora.bin").write_bytes(b"x")
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 20)

    def message(lora: Any) -> str:
        with pytest.raises(ConfigurationError) as error:
            DiffusersAdapter(flux, lora=lora).check()
        return str(error.value)

    assert "neither a file, a directory nor a hub id" in message(str(tmp_path / "missing.safetensors"))
    assert "cannot be fetched from the hub" in message("someone/style")
    assert "not a safetensors file" in message(str(tmp_path / "lora.bin"))
    assert "incomplete or damaged cut.safetensors" in message(str(tmp_path / "cut.safetensors"))
    assert "has no safetensors file" in message(str(folder))
    for name in ("a", "b"):
        save_lora(random_factors(flux), folder / f"{name}.safetensors")
    assert "has the files a.safetensors, b.safetensors; set its weight_name" in message(str(folder))
    assert "has no safetensors file 'c.safetensors'" in message(TeacherLora(str(folder), weight_name="c.safetensors"))
    DiffusersAdapter(flux, lora=TeacherLora(str(folder), weight_name="a.safetensors")).check()
    assert "has an empty path" in message("")
    with pytest.raises(ConfigurationError, match="has the weight nan"):
        TeacherLora("style.safetensors", float("nan"))
