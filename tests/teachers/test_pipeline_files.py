"""Pipeline directories as they are found on disks: they load, or one line says what they lack."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_distill.digests import write_manifest
from lightning_distill.errors import ConfigurationError
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.teachers.test_pretrained_student import export_perturbed_student
from tests.teachers.tiny_families import save_family
from tests.tiny import PROMPTS, tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_family("flux", tmp_path_factory.mktemp("complete") / "flux"))


@pytest.fixture
def model(complete: Path, tmp_path: Path) -> Path:
    """A copy of a complete pipeline."""
    return shutil.copytree(complete, tmp_path / "model")


def error_of(directory: Path, **options: Any) -> str:
    """The one line that checking a directory raises."""
    with pytest.raises(ConfigurationError) as caught:
        DiffusersAdapter(str(directory), **options).check()
    message = str(caught.value)
    assert message.startswith(f"adapter.pretrained is {str(directory)!r}")
    assert "\n" not in message
    return message


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_a_tensor(file: Path) -> None:
    weights = {name: value.clone() for name, value in load_file(file).items()}  # the file is memory-mapped
    save_file({name: weights[name] for name in sorted(weights)[1:]}, file, {"format": "pt"})


def remove(*parts: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def write(file: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / file).write_text(text) and None


def cut_file(file: str) -> Callable[[Path], None]:
    return lambda model: cut(model / file)


def lose_a_tensor(file: str) -> Callable[[Path], None]:
    return lambda model: without_a_tensor(model / file)


def configure(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda model: edit(model / file, **changes)


VAE, ENCODER = f"vae/{WEIGHTS}", "text_encoder_2/model.safetensors"
INDEX, TRANSFORMER = "model_index.json", "transformer/config.json"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing encoder": (remove("text_encoder_2"), "lacks the folder text_encoder_2"),
    "missing autoencoder": (remove("vae"), "lacks the folder vae"),
    "missing tokenizer": (remove("tokenizer"), "lacks the folder tokenizer"),
    "missing scheduler": (remove("scheduler"), "lacks the folder scheduler"),
    "missing weights": (remove("vae", WEIGHTS), "vae has no weights"),
    "truncated autoencoder": (cut_file(VAE), f"vae has an incomplete or damaged {WEIGHTS}"),
    "truncated encoder": (cut_file(ENCODER), "text_encoder_2 has an incomplete or damaged model.safetensors"),
    "empty tokenizer": (write("tokenizer/tokenizer.json", ""), "tokenizer has an empty tokenizer.json"),
    "truncated config": (cut_file("vae/config.json"), "vae has a config.json that is not JSON"),
    "missing config": (remove("vae", "config.json"), "vae lacks config.json"),
    "missing tensor": (lose_a_tensor(VAE), "vae has files without the weight 'decoder.conv_in.bias' of its config.json"),
    "missing tensor of an encoder": (lose_a_tensor(ENCODER), "text_encoder_2 has files without"),
    "other heads": (configure(TRANSFORMER, num_attention_heads=4), "where its config.json has"),
    "more layers": (configure(TRANSFORMER, num_layers=2), "transformer has files without"),
    "fewer layers of an encoder": (
        configure("text_encoder_2/config.json", num_layers=1),
        "text_encoder_2 has weights of more layers than its config.json",
    ),
    "nonsense in a config": (configure("vae/config.json", block_out_channels="wide"), "vae cannot be loaded"),
    "foreign class": (configure(INDEX, vae=["own", "Own"]), "vae is the class Own of own, which is not a class of diffusers"),
    "unknown class": (configure(INDEX, vae=["diffusers", "NoSuchVAE"]), "vae is the class NoSuchVAE of diffusers"),
    "null component": (configure(INDEX, text_encoder_2=[None, None]), "whose model_index.json has no text_encoder_2"),
    "reference without a class": (configure(INDEX, vae=["diffusers"]), "has ['diffusers'] for vae"),
    "unknown pipeline": (configure(INDEX, _class_name="NoSuchPipeline"), "a NoSuchPipeline; set it to one of"),
    "index without a class": (write(INDEX, "{}"), "is not the index of a pipeline"),
    "index of a list": (write(INDEX, "[]"), "is not the index of a pipeline"),
    "empty index": (write(INDEX, ""), "which has a model_index.json that cannot be read"),
    "deep index": (write(INDEX, "[" * 99999), "which has a model_index.json that cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_incomplete_and_damaged_pipelines_raise_one_line(name: str, model: Path) -> None:
    damage, message = DAMAGE[name]
    damage(model)
    assert message in error_of(model)


def test_code_in_the_directory_does_not_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (model, model / "vae"):
        (folder / "own.py").write_text("open('ran', 'w')\nclass Own: pass\n")
    edit(model / "model_index.json", vae=["own", "Own"])
    error_of(model)
    assert not (tmp_path / "ran").exists()


# Digests


def test_a_flipped_bit_is_found_by_the_digests(model: Path) -> None:
    write_manifest(model)
    (model / "README.md").write_text("A model card that was edited later.")
    DiffusersAdapter(str(model)).check()
    file = model / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 0x40
    file.write_bytes(content)
    assert "is damaged: text_encoder/model.safetensors is not what was written" in error_of(model)


def test_a_damaged_student_is_not_trained_further(model: Path) -> None:
    adapter = DiffusersAdapter(str(model))
    adapter.check()
    adapter.load()
    directory = model.with_name("student")
    export_perturbed_student(adapter, directory)
    options = StudentOptions(pretrained=str(directory))
    adapter.check_student(options)
    cut(directory / "transformer" / WEIGHTS)
    with pytest.raises(ConfigurationError, match=r"student\.pretrained is .*, whose transformer has an incomplete or damaged"):
        adapter.check_student(options)
    write_manifest(directory)
    (directory / "vae" / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"student\.pretrained is .*, which is damaged: vae/config\.json"):
        adapter.check_student(options)


# Variants


def encode(directory: Path, **options: Any) -> dict[str, torch.Tensor]:
    adapter = DiffusersAdapter(str(directory), **options)
    adapter.check()
    adapter.load()
    return adapter.encode_prompt(PROMPTS)


def test_the_only_variant_is_found_in_each_component(model: Path) -> None:
    expected = encode(model)
    file = model / "text_encoder_2" / "model.safetensors"
    half = {name: value.half() for name, value in load_file(file).items()}
    save_file(half, file.with_name("model.fp16.safetensors"), {"format": "pt"})
    assert torch.equal(encode(model)["prompt_embeds"], expected["prompt_embeds"])  # the weights without variant
    preferred = encode(model, variant="fp16")
    file.unlink()
    found = encode(model)
    assert torch.equal(found["prompt_embeds"], preferred["prompt_embeds"])
    assert not torch.equal(found["prompt_embeds"], expected["prompt_embeds"])
    assert torch.equal(found["pooled_prompt_embeds"], expected["pooled_prompt_embeds"])  # CLIP has no variant
    assert "has no weights of the variant 'fp8'" in error_of(model, variant="fp8")


def test_a_pipeline_of_one_variant_trains_and_shards(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model", variant="fp16", max_shard_size="20KB")
    adapter = DiffusersAdapter(str(tmp_path / "model"))
    adapter.check()
    assert len(list((tmp_path / "model" / "transformer").glob("*.safetensors"))) > 2
    teacher = adapter.load_teacher()
    assert all(torch.isfinite(value).all() for value in teacher.state_dict().values())


# Stable Diffusion 3 without T5


@pytest.mark.parametrize("form", ["null", "null encoder", "missing folders", "missing encoder"])
def test_stable_diffusion_3_works_without_t5(form: str, tmp_path: Path) -> None:
    model = Path(save_family("stable_diffusion_3", tmp_path / "model"))
    names = ["text_encoder_3"] if form.endswith("encoder") else ["text_encoder_3", "tokenizer_3"]
    for name in names:
        shutil.rmtree(model / name)
    if form.startswith("null"):
        edit(model / "model_index.json", **{name: [None, None] for name in names})
        adapter = DiffusersAdapter(str(model))
        adapter.check()
    else:
        adapter = DiffusersAdapter(str(model))
        with pytest.warns(UserWarning, match="lacks the folders text_encoder_3.*; they are left out"):
            adapter.check()
    adapter.load()
    embeds = adapter.encode_prompt(PROMPTS)["prompt_embeds"]
    clip_tokens = adapter.pipeline.tokenizer.model_max_length
    assert embeds.shape == (3, clip_tokens + adapter.sequence_length, 32)
    assert embeds[:, :clip_tokens].abs().sum() > 0
    assert embeds[:, clip_tokens:].abs().sum() == 0
    if "tokenizer_3" in names:
        with pytest.raises(ConfigurationError, match=r"max_sequence_length is 8, but .* has no tokenizer_3 to pad prompts"):
            DiffusersAdapter(str(model), max_sequence_length=8).check()
