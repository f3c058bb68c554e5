import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_distill.commands import generation
from lightning_distill.commands import main as cli
from lightning_distill.commands.image_output import GAP, write_grid
from lightning_distill.commands.pipelines import load_pipeline
from lightning_distill.commands.sample import main
from lightning_distill.digests import MANIFEST, write_manifest
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.formats import FormatOptions
from lightning_distill.export.students import export_student
from lightning_distill.students.few_step import pack_latents
from lightning_distill.teachers import registry
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.teachers.tiny_families import save_family
from tests.tiny import FLUX_DEV_SHIFT, PROMPTS, load_adapter, noise, perturb_weights, sample_images, save_tiny_pipeline


@pytest.fixture(autouse=True)
def _modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a temporary directory for code that diffusers copies; by default all processes share one."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | Tensor]:
    """Directories of teachers and exported students, and `images` that the training code samples with the student."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("pipelines")
    adapter = load_adapter(save_tiny_pipeline(directory / "teacher", scheduler={"shift": 2.0}))
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions())
    card = ModelCard("MeanFlow", "shapes-teacher", (1, 4), 32, 32)
    export_student(adapter, perturb_weights(student).eval(), directory / "student", card)
    lora, _ = adapter.build_student(adapter.load_teacher(), StudentOptions(lora=LoraOptions(rank=2)))
    export_student(adapter, lora, directory / "lora", card, options=FormatOptions(lora="unmerged"))
    save_tiny_pipeline(directory / "guided", guidance_embeds=True, scheduler=FLUX_DEV_SHIFT)
    torch.set_num_threads(1)
    return {name: directory / name for name in ("teacher", "student", "lora", "guided")} | {
        "images": sample_images(adapter, student, PROMPTS, 4)
    }


def read(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def to_bytes(images: Tensor) -> np.ndarray:
    """Convert images to (B, H, W, 3) in 0 to 255."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def prompts(*words: str) -> list[str]:
    return [part for prompt in words for part in ("--prompt", prompt)]


# Images


def test_sample_writes_a_file_and_has_defaults(
    pipelines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "x.png"
    arguments = ["--pipeline", str(pipelines["student"]), *prompts(PROMPTS[0])]
    cli.main(["sample", *arguments, "--nfe", "4", "--seed", "0", "--out", str(out)])
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert read(out).shape == (32, 32, 3)
    main([*arguments, "--out", str(tmp_path / "y.png")])
    assert np.array_equal(read(tmp_path / "y.png"), read(out))


def test_an_error_is_one_line_and_exits_with_code_2(pipelines: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["sample", "--pipeline", str(pipelines["student"]), *prompts("a circle"), "--nfe", "0", "--out", "x.png"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --nfe is 0; set it to at least 1 step\n"


def test_several_prompts_give_a_grid_of_the_images_of_the_training_code(
    pipelines: dict[str, Path | Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "grid.png"
    main(["--pipeline", str(pipelines["student"]), *prompts(*PROMPTS), "--nfe", "4", "--out", str(out)])
    grid = read(out)
    assert grid.shape == (64 + GAP, 64 + GAP, 3)
    offset = 32 + GAP
    corners = [(0, 0), (0, offset), (offset, 0)]
    images = np.stack([grid[top : top + 32, left : left + 32] for top, left in corners])
    assert isinstance(pipelines["images"], Tensor)
    assert np.array_equal(images, to_bytes(pipelines["images"]))
    assert (grid[offset:, offset:] == 255).all()
    assert len({image.tobytes() for image in images}) == 3


def test_each_image_has_a_seed_independent_of_the_batch(
    pipelines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(str(pipelines["student"]))
    pipeline.set_progress_bar_config(disable=True)
    together = generation.sample(pipeline, PROMPTS, nfe=2, seed=5)
    monkeypatch.setattr(generation, "BATCH_SIZE", 2)
    torch.testing.assert_close(generation.sample(pipeline, PROMPTS, nfe=2, seed=5), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(generation.sample(pipeline, PROMPTS[1:], nfe=2, seed=6), together[1:], rtol=0, atol=1e-5)
    assert not torch.allclose(generation.sample(pipeline, PROMPTS, nfe=2, seed=6), together, atol=1e-3)


@pytest.mark.parametrize("scale", [None, 2.5])
def test_a_teacher_samples_with_two_branch_guidance(pipelines: dict[str, Path], scale: float | None, tmp_path: Path) -> None:
    arguments = ["--pipeline", str(pipelines["teacher"]), *prompts(*PROMPTS), "--nfe", "6", "--out", str(tmp_path / "x.png")]
    main(arguments if scale is None else [*arguments, "--guidance_scale", str(scale)])
    stock = FluxPipeline.from_pretrained(pipelines["teacher"])
    guidance = {} if scale is None else {"true_cfg_scale": scale, "negative_prompt": [""] * 3}
    images = stock(
        PROMPTS,
        latents=pack_latents(noise(3)),
        num_inference_steps=6,
        height=32,
        width=32,
        max_sequence_length=8,
        output_type="pt",
        **guidance,
    ).images
    write_grid(images, tmp_path / "expected.png")
    difference = read(tmp_path / "x.png").astype(int) - read(tmp_path / "expected.png")
    assert np.abs(difference).max() <= 1


def test_students_and_teachers_of_another_family(tmp_path: Path) -> None:
    adapter = load_adapter(save_family("stable_diffusion_3", tmp_path / "teacher"))
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions())
    export_student(adapter, student, tmp_path / "student", ModelCard("MeanFlow", "tiny", (1,), 32, 32))
    for name, scale in (("teacher", ["--guidance_scale", "2.5"]), ("student", [])):
        out = tmp_path / f"{name}.png"
        main(["--pipeline", str(tmp_path / name), *prompts(*PROMPTS), "--nfe", "2", *scale, "--out", str(out)])
        assert read(out).shape == (64 + GAP, 64 + GAP, 3)


def test_a_lora_student_is_loaded_on_its_base(
    pipelines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--pipeline", str(pipelines["lora"]), *prompts(*PROMPTS), "--out", str(tmp_path / "x.png")]
    main([*arguments, "--base", str(pipelines["teacher"])])
    assert read(tmp_path / "x.png").shape == (64 + GAP, 64 + GAP, 3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"needs its base, which cannot be loaded .*set --base to the directory or hub id"
    ):
        main(arguments)  # the student records only the name of the teacher's directory
    monkeypatch.setitem(registry.SHIPPED, "shapes-teacher", str(pipelines["teacher"]))
    shutil.copytree(pipelines["lora"], tmp_path / "named")
    settings = json.loads((pipelines["lora"] / "student.json").read_text())
    (tmp_path / "named" / "student.json").write_text(json.dumps({**settings, "base_model": "shapes-teacher"}))
    write_manifest(tmp_path / "named")
    main(["--pipeline", "named", *prompts(*PROMPTS), "--out", "y.png"])
    assert np.array_equal(read(Path("y.png")), read(Path("x.png")))


def test_code_in_the_directory_of_a_lora_student_is_not_run(pipelines: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(pipelines["lora"], tmp_path / "changed")
    (tmp_path / "changed" / "few_step_student" / "lora_student.py").write_text("raise RuntimeError")
    (tmp_path / "changed" / MANIFEST).unlink()
    main(
        [
            "--pipeline",
            str(tmp_path / "changed"),
            "--base",
            str(pipelines["teacher"]),
            *prompts("a circle"),
            "--out",
            str(tmp_path / "x.png"),
        ]
    )


@pytest.mark.parametrize(
    ("pipeline", "base", "message"),
    [
        ("student", "teacher", "is a complete pipeline; leave --base out"),
        ("lora", "guided", "does not fit the base .* guidance_embeds"),
        ("lora", "student", "cannot be loaded .* set --base to the directory or hub id of the base"),
    ],
)
def test_incompatible_bases_raise(pipelines: dict[str, Path], pipeline: str, base: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_pipeline(str(pipelines[pipeline]), base=str(pipelines[base]))


def test_a_teacher_with_embedded_guidance_takes_the_scale_as_input(pipelines: dict[str, Path]) -> None:
    pipeline = load_pipeline(str(pipelines["guided"]))
    assert generation.guidance_arguments(pipeline, None, 2) == {"guidance_scale": 3.5}
    assert generation.guidance_arguments(pipeline, 1.0, 2) == {"guidance_scale": 1.0}


def test_size_and_enlargement(pipelines: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["--pipeline", str(pipelines["student"]), *prompts("a circle"), "--nfe", "1", "--height", "16", "--width", "24"]
    main([*arguments, "--out", str(tmp_path / "small.png")])
    main([*arguments, "--out", str(tmp_path / "large.png"), "--scale", "3"])
    small, large = read(tmp_path / "small.png"), read(tmp_path / "large.png")
    assert small.shape == (16, 24, 3)
    assert np.array_equal(large, small.repeat(3, axis=0).repeat(3, axis=1))


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (4, 2, 2), (5, 2, 3), (7, 3, 3)])
def test_grids_are_approximately_square(count: int, rows: int, columns: int, tmp_path: Path) -> None:
    write_grid(torch.zeros(count, 3, 4, 6), tmp_path / "x.png")
    assert read(tmp_path / "x.png").shape == (rows * (4 + GAP) - GAP, columns * (6 + GAP) - GAP, 3)


def test_shipped_names_resolve(pipelines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SHIPPED, "shapes-student", str(pipelines["student"]))
    main(["--pipeline", "shapes-student", *prompts("a circle"), "--nfe", "1", "--out", str(tmp_path / "x.png")])
    assert read(tmp_path / "x.png").shape == (32, 32, 3)


# Untrusted directories


@pytest.mark.parametrize("name", ["two_time_flux.py", "transformer/two_time_flux.py", "scheduler/extra.py"])
def test_foreign_code_needs_trust(name: str, pipelines: dict[str, Path], tmp_path: Path) -> None:
    directory, witness, out = tmp_path / "changed", tmp_path / "witness", tmp_path / "x.png"
    shutil.copytree(pipelines["student"], directory)
    with (directory / name).open("a") as file:
        file.write(f"\nfrom pathlib import Path\nPath({str(witness)!r}).touch()\n")
    arguments = ["--pipeline", str(directory), *prompts("a circle"), "--nfe", "1", "--out", str(out)]
    with pytest.raises(ConfigurationError, match=rf"brings code of its own \({name}\).*--trust_remote_code") as caught:
        main(arguments)
    assert "\n" not in str(caught.value)
    assert not witness.exists()
    write_manifest(directory)
    main([*arguments, "--trust_remote_code"])
    assert out.is_file()
    assert witness.exists() == (name != "scheduler/extra.py")


def test_references_to_code_outside_need_trust(pipelines: dict[str, Path], tmp_path: Path) -> None:
    evil = "from pathlib import Path\nPath({!r}).touch()\nclass Evil: pass\n".format(str(tmp_path / "witness"))

    def check(name: str, reference: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"brings code of its own \({reference}.*--trust_remote_code"):
            load_pipeline(str(tmp_path / name))
        assert not (tmp_path / "witness").exists()

    def changed(name: str, file: str, settings: dict[str, Any]) -> Path:
        shutil.copytree(pipelines["student"], tmp_path / name)
        path = tmp_path / name / file
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return tmp_path / name

    deep = changed("deep", "model_index.json", {"_class_name": ["a/b/evil", "Evil"]}) / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "evil.py").write_text(evil)
    check("deep", r"a/b/evil\.py, a/b/evil")
    (tmp_path / "evil.py").write_text(evil)
    changed("beside", "model_index.json", {"_class_name": ["../evil", "Evil"]})
    check("beside", r"\.\./evil")
    changed("encoder", "text_encoder/config.json", {"auto_map": {"AutoModel": f"{tmp_path}--evil.Evil"}})
    check("encoder", f"{tmp_path}--evil")


def test_pickled_weights_raise(pipelines: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(pipelines["student"], tmp_path / "pickled")
    file = tmp_path / "pickled" / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ConfigurationError, match=r"is damaged: transformer/diffusion_pytorch_model\.safetensors is missing"):
        load_pipeline(str(tmp_path / "pickled"))
    (tmp_path / "pickled" / MANIFEST).unlink()
    with pytest.raises(ConfigurationError, match=r"transformer has diffusion_pytorch_model\.bin and no safetensors file"):
        load_pipeline(str(tmp_path / "pickled"))


def test_an_invalid_index_raises(pipelines: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(pipelines["student"], tmp_path / "broken")
    (tmp_path / "broken" / "model_index.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"has a model_index\.json that cannot be read .*download it again"):
        load_pipeline(str(tmp_path / "broken"))


def test_damaged_pipelines_raise_one_line(pipelines: dict[str, Path], tmp_path: Path) -> None:
    def check(name: str, source: str, file: str, message: str, content: bytes | None = None) -> None:
        directory = shutil.copytree(pipelines[source], tmp_path / name)
        (directory / MANIFEST).unlink(missing_ok=True)
        path = directory / file
        path.write_bytes(path.read_bytes()[:-9] if content is None else content)
        with pytest.raises(ConfigurationError, match=message) as caught:
            load_pipeline(str(directory), base=str(pipelines["teacher"]) if source == "lora" else None)
        assert str(caught.value).startswith("--pipeline")
        assert "\n" not in str(caught.value)

    weights = "transformer/diffusion_pytorch_model.safetensors"
    check("cut student", "student", weights, "whose transformer has an incomplete or damaged")
    check("cut teacher", "teacher", weights, "whose transformer has an incomplete or damaged")
    check("cut lora", "lora", "pytorch_lora_weights.safetensors", "has an incomplete or damaged pytorch_lora_weights")
    check("settings", "lora", "student.json", r"student\.json cannot be loaded", b"[]")
    check("list", "teacher", "model_index.json", "is not the index of a pipeline", b"[]")
    check("class", "teacher", "model_index.json", "a NoSuchPipeline; choose", b'{"_class_name": "NoSuchPipeline"}')
    check("tokenizer", "student", "tokenizer/tokenizer.json", "tokenizer cannot be loaded", b'{"version": "1.0"}')


def test_a_flipped_bit_in_an_export_is_found(pipelines: dict[str, Path], tmp_path: Path) -> None:
    for name, file in (
        ("student", "transformer/diffusion_pytorch_model.safetensors"),
        ("lora", "pytorch_lora_weights.safetensors"),
    ):
        path = shutil.copytree(pipelines[name], tmp_path / name) / file
        content = bytearray(path.read_bytes())
        content[-5] ^= 0x40
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=f"is damaged: {file} is not what was written"):
            load_pipeline(str(tmp_path / name), base=str(pipelines["teacher"]) if name == "lora" else None)


def test_weights_that_are_not_finite_raise(pipelines: dict[str, Path], tmp_path: Path) -> None:
    file = shutil.copytree(pipelines["student"], tmp_path / "nan") / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: value.clone() for name, value in load_file(file).items()}
    weights["decoder.conv_out.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    write_manifest(tmp_path / "nan")
    with pytest.raises(ConfigurationError, match=r"whose vae has weights that are NaN or infinite.* decoder\.conv_out\.weight"):
        load_pipeline(str(tmp_path / "nan"))


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline", "no/such/place"], "--pipeline is 'no/such/place', which has no model_index.json"),
        (["--nfe", "0"], "--nfe is 0; set it to at least 1 step"),
        (["--height", "-32"], "--height is -32; set it to at least 1 pixel"),
        (["--width", "0"], "--width is 0; set it to at least 1 pixel"),
        (["--seed", "9" * 20], f"--seed is {'9' * 20}; set it to 0 or more"),
        (["--scale", "0"], "--scale is 0; set it to an integer of at least 1"),
        (["--out", "x.jpg"], "--out is 'x.jpg'; set it to a file name that ends in .png"),
        (
            ["--height", "100000", "--width", "100000"],
            "--height 100000 and --width 100000: 1 images of this size need at least",
        ),
        (["--scale", "100000"], "a smaller --scale than 100000, or --out to a directory"),
        (["--height", "20"], "--height 20 and --width 32: images of 20 x 32 do not fit; use multiples of 8 pixels"),
        (["--guidance_scale", "3"], "this student has its guidance built in; leave --guidance_scale out"),
        (
            ["--prompt", "a purple circle"],
            "has the unknown word 'purple'; use words of this pipeline's vocabulary: a, circle, green",
        ),
    ],
)
def test_invalid_arguments_are_one_line(arguments: list[str], message: str, pipelines: dict[str, Path], tmp_path: Path) -> None:
    valid = ["--pipeline", str(pipelines["student"]), "--prompt", "a circle", "--out", str(tmp_path / "x.png")]
    with pytest.raises(ConfigurationError) as caught:
        main([*valid, *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("*.png")) == []


def test_missing_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--pipeline", "shapes-student"])
    assert caught.value.code == 2
    assert "--out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--pipeline", "shapes-student", "--out", "x.png"])
    assert "one of the arguments --prompt --prompts_file is required" in capsys.readouterr().err
