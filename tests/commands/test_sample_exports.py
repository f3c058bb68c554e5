"""`sample` with exports for one number of steps, several exports, LoRA files, files of prompts, and directories of images."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lightning_distill.commands import generation
from lightning_distill.commands.image_output import GAP, METADATA
from lightning_distill.commands.pipelines import load_pipeline
from lightning_distill.commands.sample import main
from lightning_distill.data.image_folder import ImageFolder
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.formats import TOOLS, FormatOptions, PlannedExport
from lightning_distill.export.lora_layers import save_lora_file
from lightning_distill.export.mark import MARK, ExportMark
from lightning_distill.export.single_file import save_single_file
from lightning_distill.export.students import export_student
from lightning_distill.export.tool_keys import save_tool_lora
from lightning_distill.students.few_step import pack_latents
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from lightning_distill.teachers.teacher_lora import TeacherLora
from tests.teachers.tiny_families import save_family
from tests.tiny import PROMPTS, load_adapter, noise, perturb_weights, sample_images, save_tiny_pipeline

LAYER = "transformer.proj_out"
SCHEDULER = {"class": "FlowMatchEulerDiscreteScheduler", "config": {"shift": 5.0}}


def lora_state(seed: int = 0, width: int = 64, layer: str = LAYER) -> dict[str, Tensor]:
    """Factors of a layer of `width` inputs and outputs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (2, width), "lora_B": (width, 2)}
    return {f"{layer}.{name}.weight": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_lora(directory: Path, mark: ExportMark | None = None, seed: int = 0) -> Path:
    directory.mkdir(parents=True)
    save_file(lora_state(seed), directory / "pytorch_lora_weights.safetensors")
    if mark is not None:
        mark.write(directory)
    return directory


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories: a teacher, one marked as a stock export, LoRA of it with and without mark, and several exports."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("exports")
    teacher = Path(save_tiny_pipeline(directory / "teacher", scheduler={"shift": 2.0}))
    several = directory / "several"
    for n in (2, 4):
        stock = shutil.copytree(teacher, several / f"stock_{n}")
        ExportMark("stock", (n,), arguments={"guidance_scale": 1.0}, height=16, width=24).write(stock)
    shutil.copytree(several / "stock_2", directory / "stock")
    any_step = shutil.copytree(teacher, several / "any_step")
    ExportMark("any_step").write(any_step)
    save_lora(directory / "lora", ExportMark("lora", (3,), base_model=str(teacher), scheduler=SCHEDULER))
    save_lora(directory / "style", seed=1)
    needed = [{"path": "style.safetensors", "weight": 0.5}]
    save_lora(directory / "of_style", ExportMark("lora", (3,), base_model=str(teacher), base_lora=needed, scheduler=SCHEDULER))
    save_lora(directory / "unmerged", ExportMark("lora_student"))
    return {path.name: path for path in directory.iterdir()}


def sampled(out: Path, *arguments: str | Path) -> np.ndarray:
    main([*map(str, arguments), "--prompt", "a circle", "--out", str(out)])
    return np.asarray(Image.open(out))


# Exports for one number of steps


def test_a_stock_export_has_its_own_steps_size_and_arguments(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    call = FluxPipeline.__call__

    def recorded(self: FluxPipeline, **arguments: Any) -> Any:
        calls.append(arguments)
        return call(self, **arguments)

    monkeypatch.setattr(FluxPipeline, "__call__", recorded)
    image = sampled(tmp_path / "x.png", "--pipeline", exports["stock"])
    assert image.shape == (16, 24, 3)
    assert {name: calls[0][name] for name in ("num_inference_steps", "guidance_scale", "height", "width")} == {
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "height": 16,
        "width": 24,
    }
    assert sampled(tmp_path / "y.png", "--pipeline", exports["stock"], "--height", "32", "--width", "32").shape == (32, 32, 3)


def test_another_number_of_steps_names_those_of_the_export(exports: dict[str, Path], tmp_path: Path) -> None:
    for name, argument, n in (("stock", "--pipeline", 2), ("lora", "--pipeline", 3)):
        with pytest.raises(
            ConfigurationError, match=rf"--nfe is 8, but --pipeline .* for {n} steps; set --nfe to {n}, or"
        ) as error:
            sampled(tmp_path / "x.png", argument, exports[name], "--nfe", "8")
        assert "\n" not in str(error.value)


def test_two_students_raise(exports: dict[str, Path], tmp_path: Path) -> None:
    for base in (["--pipeline", exports["stock"]], ["--base", exports["teacher"], "--lora", exports["of_style"]]):
        with pytest.raises(ConfigurationError, match=r"^--\w+ '.*' and --lora '.*' are few-step students") as error:
            sampled(tmp_path / "x.png", *base, "--lora", exports["lora"])
        assert "\n" not in str(error.value)


def test_guidance_of_a_stock_export_is_built_in(exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has its guidance built in; leave --guidance_scale out"):
        sampled(tmp_path / "x.png", "--pipeline", exports["stock"], "--guidance_scale", "3")


@pytest.mark.parametrize(
    ("arguments", "chosen", "steps"),
    [([], "stock_4", 4), (["--nfe", "2"], "stock_2", 2), (["--nfe", "3"], "any_step", 3)],
)
def test_one_of_several_exports_is_chosen_by_its_steps(
    arguments: list[str],
    chosen: str,
    steps: int,
    exports: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: list[int] = []
    call = FluxPipeline.__call__

    def recorded(self: FluxPipeline, **settings: Any) -> Any:
        found.append(settings["num_inference_steps"])
        return call(self, **settings)

    monkeypatch.setattr(FluxPipeline, "__call__", recorded)

    sampled(tmp_path / "x.png", "--pipeline", exports["several"], *arguments)
    assert f"generates with {exports['several'] / chosen}\n" in capsys.readouterr().out
    assert found == [steps]


def test_several_exports_without_the_steps_name_theirs(exports: dict[str, Path], tmp_path: Path) -> None:
    several = shutil.copytree(exports["several"], tmp_path / "several")
    shutil.rmtree(several / "any_step")
    with pytest.raises(ConfigurationError, match=r"--nfe is 3, but the exports in --pipeline .* are for 2 or 4 steps"):
        sampled(tmp_path / "x.png", "--pipeline", several, "--nfe", "3")


def test_a_damaged_mark_is_one_line(exports: dict[str, Path], tmp_path: Path) -> None:
    stock = shutil.copytree(exports["stock"], tmp_path / "stock")
    (stock / MARK).write_text('{"kind": "stock", "nfe": "four"}')
    with pytest.raises(ConfigurationError, match=r"--pipeline is .*, whose export\.json cannot be read .*; export it again"):
        sampled(tmp_path / "x.png", "--pipeline", stock)


def test_a_stochastic_stock_export_repeats_each_image_by_its_seed(exports: dict[str, Path]) -> None:
    pipeline = load_pipeline(str(exports["stock"]))
    pipeline.register_modules(scheduler=type(pipeline.scheduler)(shift=2.0, stochastic_sampling=True))
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"nfe": 2, "height": 32, "width": 32, "arguments": {"guidance_scale": 1.0}}
    state = torch.get_rng_state()
    together = generation.sample(pipeline, PROMPTS, seed=5, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generation.sample(pipeline, PROMPTS[1:], seed=6, **settings), together[1:])
    assert not torch.allclose(generation.sample(pipeline, PROMPTS[:1], seed=6, **settings), together[:1], atol=1e-3)


# LoRA


def merged(exports: dict[str, Path], *files: tuple[str, float], shift: float = 2.0) -> Tensor:
    """An image of the teacher with LoRA added to its weights by hand."""
    pipeline = FluxPipeline.from_pretrained(exports["teacher"])
    weight = pipeline.transformer.get_submodule(LAYER.removeprefix("transformer.")).weight
    for name, scale in files:
        state = lora_state({"lora": 0, "style": 1}[name])
        weight.data += scale * state[f"{LAYER}.lora_B.weight"] @ state[f"{LAYER}.lora_A.weight"]
    pipeline.register_modules(scheduler=type(pipeline.scheduler)(shift=shift))
    settings: dict[str, Any] = {"num_inference_steps": 3, "height": 32, "width": 32, "max_sequence_length": 8}
    image: Tensor = pipeline(["a circle"], latents=pack_latents(noise(1)), output_type="pt", **settings).images[0]
    return (image * 255).round().permute(1, 2, 0)


def check_equal(image: np.ndarray, expected: Tensor) -> None:
    assert np.abs(image.astype(int) - expected.numpy()).max() <= 1


def test_a_lora_export_has_base_scheduler_and_steps(exports: dict[str, Path], tmp_path: Path) -> None:
    image = sampled(tmp_path / "x.png", "--pipeline", exports["lora"])
    check_equal(image, merged(exports, ("lora", 1.0), shift=5.0))
    assert np.abs(image.astype(int) - merged(exports, shift=5.0).numpy()).max() > 5


def test_lora_files_on_a_base_have_weights(exports: dict[str, Path], tmp_path: Path) -> None:
    file = exports["style"] / "pytorch_lora_weights.safetensors"
    base = ["--base", exports["teacher"], "--lora", exports["lora"], "--lora", file, "0.5"]
    check_equal(sampled(tmp_path / "x.png", *base), merged(exports, ("lora", 1.0), ("style", 0.5), shift=5.0))
    on_pipeline = ["--pipeline", exports["teacher"], "--lora", file, "-0.5", "--nfe", "3"]
    check_equal(sampled(tmp_path / "y.png", *on_pipeline), merged(exports, ("style", -0.5)))


def test_lora_in_the_names_of_other_tools_gives_the_same_image(exports: dict[str, Path], tmp_path: Path) -> None:
    layers = {"transformer_blocks.0.attn.to_q": (torch.randn(2, 64), torch.randn(64, 2))}
    save_lora_file(layers, tmp_path / "lora")
    for tool in TOOLS:
        (tmp_path / tool).mkdir()
        save_tool_lora(layers, "FluxTransformer2DModel", tool, tmp_path / tool / "pytorch_lora_weights.safetensors")
    images = []
    for kind in ("lora", *TOOLS):
        ExportMark(kind, (1,), base_model=str(exports["teacher"])).write(tmp_path / kind)
        images.append(sampled(tmp_path / f"{kind}.png", "--pipeline", tmp_path / kind))
    assert not np.array_equal(images[0], sampled(tmp_path / "x.png", "--pipeline", exports["teacher"], "--nfe", "1"))
    for image in images[1:]:
        check_equal(image, torch.tensor(images[0]))


def test_lora_of_a_family_without_a_loader_of_pipelines(tmp_path: Path) -> None:
    base = save_family("hunyuan_image", tmp_path / "base")
    image = sampled(tmp_path / "x.png", "--pipeline", base, "--nfe", "1", "--height", "32", "--width", "32")
    (tmp_path / "lora").mkdir()
    save_file(lora_state(width=16, layer="transformer.transformer_blocks.0.attn.to_q"), tmp_path / "lora" / "a.safetensors")
    arguments = ["--base", base, "--lora", tmp_path / "lora", "--nfe", "1", "--height", "32", "--width", "32"]
    assert not np.array_equal(sampled(tmp_path / "y.png", *arguments), image)


def test_a_single_file_is_the_transformer_of_its_base(tmp_path: Path) -> None:
    base = str(save_family("stable_diffusion_3", tmp_path / "base"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    transformer = perturb_weights(pipeline.transformer)
    weights = transformer.state_dict()
    (tmp_path / "file").mkdir()
    settings = type(transformer).__name__, dict(transformer.config), tmp_path / "file" / "transformer.safetensors"
    save_single_file(weights, lambda names: {name: weights[name] for name in names}, *settings)
    ExportMark("single_file", (2,), base_model=base, height=32, width=32).write(tmp_path / "file")
    pipeline.save_pretrained(tmp_path / "expected")
    ExportMark("stock", (2,), height=32, width=32).write(tmp_path / "expected")
    found, expected = (sampled(tmp_path / f"{name}.png", "--pipeline", tmp_path / name) for name in ("file", "expected"))
    check_equal(found, torch.tensor(expected))
    assert np.abs(found.astype(int) - sampled(tmp_path / "x.png", "--pipeline", base, "--nfe", "2")).max() > 5


def test_a_lora_student_of_a_teacher_with_lora_needs_both(exports: dict[str, Path], tmp_path: Path) -> None:
    style = str(exports["style"] / "pytorch_lora_weights.safetensors")
    adapter = load_adapter(str(exports["teacher"]), lora=[TeacherLora(style, 0.5)])
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions(lora=LoraOptions(rank=2)))
    card, options = ModelCard("MeanFlow", "tiny", (3,), 32, 32), FormatOptions(lora="unmerged")
    export_student(adapter, student, tmp_path / "student", card, options=options)
    arguments = ["--pipeline", tmp_path / "student", "--base", exports["teacher"], "--nfe", "3"]
    file = "pytorch_lora_weights.safetensors"
    with pytest.raises(ConfigurationError, match=rf"the student of a base with LoRA; give --lora {re.escape(file)} 0\.5"):
        sampled(tmp_path / "x.png", *arguments)
    image = sampled(tmp_path / "x.png", *arguments, "--lora", style, "0.5")
    expected = (sample_images(adapter, student, ["a circle"], 3)[0] * 255).round().permute(1, 2, 0)
    check_equal(image, expected)

    export_student(adapter, student, tmp_path / "lora", replace(card, teacher_lora=adapter.lora), [PlannedExport("lora", 3)])
    arguments = ["--pipeline", tmp_path / "lora", "--base", exports["teacher"]]
    with pytest.raises(ConfigurationError, match=rf"a student of a base with LoRA; give --lora {re.escape(file)} 0\.5 as well"):
        sampled(tmp_path / "x.png", *arguments)
    check_equal(sampled(tmp_path / "x.png", *arguments, "--lora", style, "0.5"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "lora"], "there is no --pipeline; set it, or set --base and --lora"),
        (["--base", "teacher"], "there is no --pipeline; set it, or set --base and --lora"),
        (["--pipeline", "teacher", "--lora", "lora", "heavy"], "give a path, and at most one weight"),
        (["--pipeline", "teacher", "--lora", "lora", "1", "2"], "give a path, and at most one weight"),
        (["--pipeline", "teacher", "--lora", "lora", "nan"], "with the weight nan; give a finite weight"),
        (["--pipeline", "teacher", "--lora", "nothing"], "which is no .safetensors file"),
        (["--pipeline", "teacher", "--lora", "several"], "a directory with 0 .safetensors files; give one file"),
        (["--pipeline", "teacher", "--base", "teacher"], "is a complete pipeline; leave --base out"),
        (["--base", "stock", "--lora", "style"], "--base is 'stock', a few-step student; give it as --pipeline"),
        (["--pipeline", "teacher", "--lora", "unmerged"], "whose LoRA alone is incomplete; set --pipeline to it"),
        (["--pipeline", "of_style"], "a student of a base with LoRA; give --lora style.safetensors 0.5 as well"),
        (["--base", "teacher", "--lora", "of_style"], "a student of a base with LoRA; give --lora style.safetensors 0.5 as"),
        (["--base", "nowhere", "--lora", "style"], "needs its base, which cannot be loaded"),
    ],
)
def test_invalid_arguments_of_lora_are_one_line(
    arguments: list[str], message: str, exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exports["teacher"].parent)
    with pytest.raises(ConfigurationError) as caught:
        sampled(tmp_path / "x.png", *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lora_with_other_layers_or_damage_raises(exports: dict[str, Path], tmp_path: Path) -> None:
    state = {name.replace("proj_out", "transformer_blocks.7.attn.to_q"): value for name, value in lora_state().items()}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ConfigurationError, match=r"--lora is .*transformer_blocks\.7\.attn\.to_q"):
        sampled(tmp_path / "x.png", "--pipeline", exports["teacher"], "--lora", tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-9])
    with pytest.raises(ConfigurationError, match="has an incomplete or damaged cut"):
        sampled(tmp_path / "x.png", "--pipeline", exports["teacher"], "--lora", tmp_path / "cut.safetensors")


# Prompts and images


def test_each_prompt_has_a_row_of_images(exports: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["--pipeline", str(exports["teacher"]), "--nfe", "1", "--num_images", "3", "--out", str(tmp_path / "x.png")]
    main([*arguments, "--prompt", "a circle", "--prompt", "a square"])
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    assert grid.shape == (64 + GAP, 96 + 2 * GAP, 3)
    last = sampled(tmp_path / "y.png", "--pipeline", exports["teacher"], "--nfe", "1", "--seed", "2")
    assert np.abs(grid[:32, -32:].astype(int) - last).max() <= 1


def test_a_directory_has_a_file_an_image_and_a_table_that_training_reads(
    exports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"words": "a circle"}\n{"words": "a square"}\n{"words": "a circle"}\n')
    out, arguments = tmp_path / "images", ["--pipeline", str(exports["teacher"]), "--nfe", "1", "--seed", "5"]
    file = ["--prompts_file", str(tmp_path / "prompts.jsonl"), "--caption_column", "words"]
    main([*arguments, *file, "--num_images", "2", "--out", str(out)])
    assert f"wrote 4 images to {out}\n" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / METADATA).read_text().splitlines()]
    assert [(row["file_name"], row["prompt"], row["seed"]) for row in rows] == [
        ("00000-000.png", "a circle", 5),
        ("00000-001.png", "a circle", 6),
        ("00001-000.png", "a square", 7),
        ("00001-001.png", "a square", 8),
    ]
    assert sorted(path.name for path in out.iterdir()) == [*(row["file_name"] for row in rows), METADATA]
    second = sampled(tmp_path / "y.png", "--pipeline", exports["teacher"], "--nfe", "1", "--seed", "6")
    assert np.abs(np.asarray(Image.open(out / "00000-001.png")).astype(int) - second).max() <= 1
    data = ImageFolder(str(out), height=32, width=32, validation_share=0.5, num_workers=0)
    data.setup("fit")
    assert {batch["prompt"][0] for batch in data.val_dataloader()} <= {"a circle", "a square"}
    with pytest.raises(ConfigurationError, match="which has files; choose another directory, or empty it"):
        main([*arguments, *file, "--out", str(out)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_images", "0"], "--num_images is 0; set it to at least 1 image per prompt"),
        (["--caption_column", "words"], "but there is no --prompts_file; leave --caption_column out"),
        (["--out", "x.jpg"], "set it to a file name that ends in .png, or to a directory"),
    ],
)
def test_invalid_arguments_are_one_line(
    arguments: list[str], message: str, exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        main(["--pipeline", str(exports["teacher"]), "--prompt", "a circle", "--out", "x.png", *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_prompts_that_cannot_be_read_name_their_option(exports: dict[str, Path], tmp_path: Path) -> None:
    for name, content, message in (
        ("a.jsonl", '{"words": "a circle"}', "set --caption_column to one of words"),
        ("a.md", "a circle", r"--prompts_file is .*, which has the ending '\.md'"),
        ("a.txt", "", "of --prompts_file is empty"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigurationError, match=message):
            main(
                [
                    "--pipeline",
                    str(exports["teacher"]),
                    "--prompts_file",
                    str(tmp_path / name),
                    "--out",
                    str(tmp_path / "x.png"),
                ]
            )
