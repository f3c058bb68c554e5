"""Tests specific to HunyuanImage 3.0, with the stand-in model; `test_families.py` has the tests of all families."""

import copy
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_distill.commands import generation
from lightning_distill.commands import sample as sampling
from lightning_distill.commands.pipelines import load_pipeline
from lightning_distill.digests import MANIFEST
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.mark import MARK
from lightning_distill.export.students import export_student, export_teacher
from lightning_distill.flow.derivative import value_and_time_derivative
from lightning_distill.flow.path import flow_step
from lightning_distill.students.few_step_hunyuan_image3 import load_tokenizer
from lightning_distill.teachers import HunyuanImage3Adapter, StudentOptions
from tests.teachers.hunyuan_image3.tiny_pipeline import FORMS, QUICK, save_stand_in
from tests.teachers.tiny_families import load_family
from tests.tiny import PROMPTS, noise, perturb_weights, sample_images

SIZE = (32, 32)
SHAPE = (4, 8, 8)
CARD = ModelCard("MeanFlow", "tiny", (1, 4), *SIZE, guidance_scale=3.5)


OTHERS = [pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form not in QUICK]


@pytest.fixture(scope="module", params=[*QUICK, *OTHERS])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_stand_in(request.param, tmp_path_factory.mktemp("published") / request.param)


@pytest.fixture(scope="module")
def newer_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_stand_in("newer", tmp_path_factory.mktemp("published") / "newer")


@pytest.fixture(scope="module")
def guided_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_stand_in("newer_guided", tmp_path_factory.mktemp("published") / "newer_guided")


def build_student(adapter: HunyuanImage3Adapter, **options: Any) -> Any:
    return adapter.build_student(adapter.load_teacher(), StudentOptions(**options))[0]


# The published sampler


@torch.no_grad()
def sample_with_published_code(
    directory: str, prompts: list[str], size: tuple[int, int], scale: float, system_prompt: str | None, x: Tensor, grid: Tensor
) -> Tensor:
    """Latents from Euler steps with the inputs and forward of the published model, with embedded or two-branch guidance."""
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    load_tokenizer(model, type(model), directory)
    model.post_token_len = None
    inputs = model.prepare_model_inputs(prompts, size, system_prompt)
    rows = len(inputs["input_ids"]) // len(prompts)
    for t, r in pairwise(grid):
        times = {"timestep" if "custom_pos_emb" in inputs else "timesteps": (1000 * t).repeat(rows * len(prompts))}
        if model.config.cfg_distilled:
            times["guidance"] = torch.tensor([1000 * scale], dtype=torch.bfloat16).repeat(len(prompts))
        if model.config.use_meanflow:
            times["timesteps_r"] = (1000 * r).repeat(len(prompts))
        pred = model(**inputs, **times, images=torch.cat([x] * rows), first_step=True).diffusion_prediction
        if rows == 2:
            cond, null = pred.chunk(2)
            pred = null + scale * (cond - null)
        x = x + (r - t) * pred
    return x


@pytest.mark.parametrize("size", [SIZE, (16, 64)], ids=["square", "wide"])
def test_sampling_equals_the_published_code(directory: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    adapter = load_family(directory, system_prompt="draw a square")
    shape = adapter.latent_shape(*size)
    x, grid = noise(3, shape=shape), adapter.time_grid(4, shape)
    assert grid[1] == 0.9  # a shift of 3
    expected = sample_with_published_code(directory, PROMPTS, size, 3.5, "draw a square", x, grid)
    teacher, condition = adapter.load_teacher(), adapter.encode_prompt(PROMPTS)
    with torch.no_grad():
        for t, r in pairwise(grid):
            start, end = t.expand(3), r.expand(3)
            if adapter.embeds_guidance:
                u = adapter.average_velocity(teacher, x, end, start, condition, 3.5)
            else:
                u = adapter.guided_velocity(teacher, x, start, condition, adapter.encode_prompt([""] * 3), 3.5)
            x = flow_step(x, u, end, start)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    assert (x[0] - x[1]).abs().max() > 1e-2


def test_token_layout_equals_the_published_code(tmp_path: Path) -> None:
    adapter = load_family(save_stand_in("newer_distilled", tmp_path / "instruct", sequence_template="instruct"))
    tokenizer = adapter.layout.tokenizer
    condition = adapter.encode_prompt(["a red circle", ""])
    sequence = adapter.layout.sequence(condition, *SIZE)
    image = "<boi> <img_size_32> <img_ratio_1> <timestep> <guidance> <timestep_r>" + 64 * " <img>" + " <eoi>"
    rows = [
        f"<bos> User : a red circle Assistant : <answer> {image}",
        f"<bos> User : <cfg> Assistant : <answer> {image}",
    ]
    for i, row in enumerate(rows):
        tokens = [token for token in tokenizer.convert_ids_to_tokens(sequence.input_ids[i]) if token != "<pad>"]
        assert " ".join(tokens) == row
        # The positions of times, guidance and image.
        names = {
            "<timestep>": sequence.timestep_index,
            "<guidance>": sequence.guidance_index,
            "<timestep_r>": sequence.timestep_r_index,
        }
        for name, index in names.items():
            assert tokens[index[i, 0]] == name
        assert {tokens[position] for position in sequence.image_mask[i].nonzero()[:, 0]} == {"<img>"}
        ((image_slice, shape),) = sequence.rope_image_info[i]
        assert tokens[image_slice] == ["<img>"] * 64
        assert shape == (8, 8)
    null = tokenizer.convert_ids_to_tokens(adapter.null_condition_for(condition, condition)["prompt_ids"][0])
    assert " ".join(null[:9]) == "<bos> User : <cfg> <cfg> <cfg> Assistant : <answer>"


def test_text_attention_is_causal_and_image_attention_bidirectional(newer_directory: str) -> None:
    adapter = load_family(newer_directory)
    sequence = adapter.layout.sequence(adapter.encode_prompt(PROMPTS), *SIZE)
    length = sequence.input_ids.shape[1]
    for row, image in zip(sequence.attention_mask[:, 0], sequence.image_mask, strict=True):
        for i in range(length):
            for j in range(length):
                assert row[i, j] == (j <= i or bool(image[i] and image[j]))


def test_velocity_does_not_depend_on_padding_and_other_rows(newer_directory: str) -> None:
    adapter = load_family(newer_directory)
    longer = load_family(newer_directory, max_sequence_length=40)
    teacher, x, t = adapter.load_teacher(), noise(3, shape=SHAPE), torch.tensor([0.3, 0.6, 0.9])
    with torch.no_grad():
        together = adapter.velocity(teacher, x, t, adapter.encode_prompt(PROMPTS))
        padded = longer.velocity(teacher, x, t, longer.encode_prompt(PROMPTS))
        alone = adapter.velocity(teacher, x[1:2], t[1:2], adapter.encode_prompt(PROMPTS[1:2]))
    torch.testing.assert_close(padded, together)
    torch.testing.assert_close(alone, together[1:2])


def test_long_prompts_are_truncated_inside_the_template(tmp_path: Path) -> None:
    directory = save_stand_in("newer", tmp_path / "instruct", sequence_template="instruct")
    adapter = load_family(directory, max_sequence_length=9)
    ids = adapter.encode_prompt(["a red circle a green square"])["prompt_ids"][0]
    assert " ".join(adapter.layout.tokenizer.convert_ids_to_tokens(ids)) == "<bos> User : a red circle Assistant : <answer>"
    short = load_family(directory, max_sequence_length=4)
    with pytest.raises(ConfigurationError, match=r"^adapter\.max_sequence_length is 4.* alone have 6 tokens"):
        short.encode_prompt(["a circle"])


# The derivative


def test_finite_differences_are_correct_only_with_frozen_routing(directory: str) -> None:
    adapter = load_family(directory)
    student = perturb_weights(build_student(adapter, gradient_checkpointing=True)).double()
    condition = adapter.encode_prompt(PROMPTS)
    x, v = torch.randn(2, 3, *SHAPE, dtype=torch.float64)
    t = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)

    def average_velocity(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return adapter.average_velocity(student, x, r, t, condition, 3.5)

    def difference(step: float) -> Tensor:
        ahead, behind = (average_velocity(x + each * v, 0.4 * t, t + each) for each in (step, -step))
        return (ahead - behind) / (2 * step)

    u, dudt = value_and_time_derivative(average_velocity, x, 0.4 * t, t, v)
    u.square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    with torch.no_grad():
        free = difference(5e-3)
        with adapter.frozen_routing():
            average_velocity(x, 0.4 * t, t)
            frozen, frozen_small_step = difference(5e-3), difference(5e-4)
    assert (dudt - frozen_small_step).norm() / dudt.norm() < 1e-3
    assert (frozen - frozen_small_step).norm() / dudt.norm() < 0.05
    assert (free - frozen).norm() / dudt.norm() > 0.1, "no token changed its experts, so the test has no effect"


def test_deepcopy_of_a_student_uses_its_own_blocks(newer_directory: str) -> None:
    adapter = load_family(newer_directory)
    student = build_student(adapter, gradient_checkpointing=True)
    clone = copy.deepcopy(student)
    x, t, condition = noise(3, shape=SHAPE), torch.tensor([0.3, 0.6, 0.9]), adapter.encode_prompt(PROMPTS)
    before = adapter.average_velocity(clone, x, 0 * t, t, condition)
    perturb_weights(student.blocks)
    assert torch.equal(adapter.average_velocity(clone, x, 0 * t, t, condition), before)
    assert not torch.equal(adapter.average_velocity(student, x, 0 * t, t, condition), before)


def test_autocast_supports_a_float32_token_sequence(directory: str) -> None:
    adapter = load_family(directory)
    student = build_student(adapter, gradient_checkpointing=True)
    x, t, condition = noise(3, shape=SHAPE), torch.tensor([0.3, 0.6, 0.9]), adapter.encode_prompt(PROMPTS)
    exact = adapter.average_velocity(student, x, 0.4 * t, t, condition, 3.5)
    with torch.autocast("cpu", torch.bfloat16), adapter.frozen_routing():
        u = adapter.average_velocity(student, x, 0.4 * t, t, condition, 3.5)
    assert u.dtype == torch.float32
    assert 0 < (u - exact).norm() / exact.norm() < 0.1
    u.sum().backward()


# Attributes for sharding and LoRA


def test_network_has_block_names_and_lora_targets(newer_directory: str) -> None:
    adapter = load_family(newer_directory)
    student = build_student(adapter)
    (block,) = student._repeated_blocks
    assert [type(layer).__name__ for layer in student.blocks] == [block] * 2
    assert set(student._no_split_modules) == {block}
    for target in student.lora_targets:
        found = [part for name, part in student.named_modules() if name.endswith(f".{target}")]
        assert len(found) == 2
        assert all(isinstance(part, torch.nn.Linear) for part in found)
    assert not any(name.startswith(("vae", "vision", "lm_head", "model.ln_f")) for name in student.state_dict())
    with pytest.raises(RuntimeError, match="no times are set"):
        student.timestep_emb(torch.ones(1))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trust_remote_code": False},
            "contains model code; review its Python files, and set adapter.trust_remote_code to true",
        ),
        ({"torch_dtype": "int8"}, "adapter.torch_dtype is 'int8'; choose one of float32, bfloat16, float16"),
        ({"max_sequence_length": 0}, "adapter.max_sequence_length is 0; set it to the length of the longest prompts"),
        ({"pretrained": "no/such/place"}, "which is neither a directory nor a hub id"),
        ({"pretrained": "tencent/NotThere-3.0"}, "which is not in the local cache and cannot be fetched from the hub"),
        ({"pretrained": "."}, "which is not HunyuanImage 3.0 with its code"),
    ],
)
def test_invalid_settings_raise_one_line(settings: dict[str, Any], message: str, newer_directory: str) -> None:
    adapter = HunyuanImage3Adapter(**{"pretrained": newer_directory, "trust_remote_code": True, **settings})
    for step in (adapter.check, adapter.load, adapter.load_teacher):
        with pytest.raises(ConfigurationError) as caught:
            step()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_checkpoint_code_does_not_run_without_trust_remote_code(tmp_path: Path) -> None:
    directory = save_stand_in("older", tmp_path / "published")
    (tmp_path / "published" / "hunyuan.py").write_text("raise SystemExit('the code ran')")
    adapter = HunyuanImage3Adapter(directory)
    for step in (adapter.check, adapter.load, adapter.load_teacher):
        with pytest.raises(ConfigurationError, match="trust_remote_code"):
            step()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "model-00002-of-00005.safetensors"])
def test_incomplete_download_raises_before_loading(name: str, newer_directory: str, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(newer_directory, tmp_path / "broken"))
    (broken / name).unlink()
    with pytest.raises(ConfigurationError, match=f"which lacks {name}; download the complete checkpoint"):
        HunyuanImage3Adapter(str(broken), trust_remote_code=True).check()
    for file in broken.glob("model*safetensors*"):
        file.unlink()
    with pytest.raises(ConfigurationError, match=r"lacks .*model\.safetensors"):
        HunyuanImage3Adapter(str(broken), trust_remote_code=True).check()


def test_damaged_weights_and_configs_raise_before_loading(newer_directory: str, tmp_path: Path) -> None:
    def check(name: str, file: str, content: bytes, message: str) -> None:
        broken = Path(shutil.copytree(newer_directory, tmp_path / name))
        (broken / file).write_bytes(content)
        with pytest.raises(ConfigurationError, match=message) as caught:
            HunyuanImage3Adapter(str(broken), trust_remote_code=True).check()
        assert "\n" not in str(caught.value)

    weights = next(Path(newer_directory).glob("model*.safetensors"))
    check("cut", weights.name, weights.read_bytes()[:-9], f"whose model has an incomplete or damaged {weights.name}")
    check("empty", weights.name, b"", f"whose model has an empty {weights.name}")
    check("config", "config.json", b"{", "config.json is not JSON")
    check("tokenizer", "generation_config.json", b"", "whose model has an empty generation_config.json")


def test_latent_shape_supports_only_sizes_of_the_checkpoint(newer_directory: str) -> None:
    adapter = load_family(newer_directory)
    assert adapter.latent_shape(64, 16) == (4, 16, 4)
    with pytest.raises(ConfigurationError, match="24 x 24 do not fit; the nearest size of this checkpoint is 32 x 32"):
        adapter.latent_shape(24, 24)


def test_embedded_guidance_needs_a_scale(guided_directory: str) -> None:
    adapter = load_family(guided_directory)
    assert adapter.embeds_guidance
    teacher, x, t, condition = adapter.load_teacher(), noise(3, shape=SHAPE), torch.ones(3), adapter.encode_prompt(PROMPTS)
    with torch.no_grad():
        low, high = (adapter.velocity(teacher, x, t, condition, scale) for scale in (1.0, 2.5))
        assert (low - high).abs().max() > 1e-3
        with pytest.raises(ConfigurationError, match=r"guidance\.scale is not set.*set it \(2\.5 is usual"):
            adapter.velocity(teacher, x, t, condition)


def test_every_process_decodes_images(newer_directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = load_family(newer_directory)
    latents = noise(2, shape=SHAPE)
    expected = adapter.decode_latents(latents)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert torch.equal(adapter.decode_latents(latents), expected)


@pytest.mark.parametrize("revision", [None, "first"])
def test_hub_id_is_read_from_the_cache(
    revision: str | None, newer_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, commit in (("main", "a" * 40), ("first", "b" * 40)):
        shutil.copytree(newer_directory, tmp_path / "models--some--model" / "snapshots" / commit)
        reference = tmp_path / "models--some--model" / "refs" / name
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    adapter = HunyuanImage3Adapter("some/model", trust_remote_code=True, revision=revision)
    adapter.check()
    assert adapter.directory.name == ("a" if revision is None else "b") * 40
    adapter.load()
    assert adapter.latent_shape(*SIZE) == SHAPE


# Exports


def test_exported_student_has_the_published_layout_and_its_code(directory: str, tmp_path: Path) -> None:
    adapter = load_family(directory)
    student = perturb_weights(build_student(adapter)).eval()
    # In one process, transformers treats directories with the same name as the same model.
    out = export_student(adapter, student, tmp_path / "out" / f"student_of_{Path(directory).name}", CARD)
    files = {path.name for path in out.iterdir()}
    published = {path.name for path in Path(directory).iterdir() if not path.name.startswith(("model.", "model-"))}
    own = {"average_velocity_scheduler", "expert_routing", "few_step", "few_step_hunyuan_image3", "hunyuan_image3_layout"}
    own |= {"hunyuan_image3_student", "two_time", "two_time_hunyuan_image3"}
    assert files == published | {f"{name}.py" for name in own} | {"model.safetensors", "README.md", MANIFEST, MARK}
    for path in out.glob("*.json"):
        assert str(tmp_path) not in path.read_text(), f"{path} contains a local path"
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "hunyuan_image3_student.FewStepHunyuanImage3ForCausalMM"
    with pytest.raises(ConfigurationError, match="an exported student; set it to the checkpoint of its teacher"):
        HunyuanImage3Adapter(str(out), trust_remote_code=True).check()

    # The code snippet of the model card, and the `sample` command.
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "library_name: transformers" in (out / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(code.replace("this/directory", str(out)).replace("a prompt", "a circle"), names)
    assert names["image"].size == SIZE
    scale = ["--guidance_scale", "3.5"] if adapter.embeds_guidance else []
    command = ["--pipeline", str(out), "--prompt", "a red circle", "--out", str(tmp_path / "x.png"), *scale]
    with pytest.raises(ConfigurationError, match=r"brings code of its own \(.*py\); read it"):
        sampling.main(command)
    sampling.main([*command, "--trust_remote_code"])
    images = generation.sample(load_pipeline(str(out), True), PROMPTS, nfe=4, guidance_scale=3.5 if scale else None)
    assert torch.equal(images, sample_images(adapter, student, PROMPTS, 4, 3.5))


def test_unsupported_arguments_of_the_sample_command_raise(newer_directory: str, tmp_path: Path) -> None:
    adapter = load_family(newer_directory)
    out = export_student(adapter, build_student(adapter), tmp_path / "student", CARD)
    student = load_pipeline(str(out), True)
    with pytest.raises(ConfigurationError, match="--height 24 and --width 24: images of 24 x 24 do not fit"):
        generation.sample(student, ["a circle"], nfe=1, height=24, width=24)
    with pytest.raises(ConfigurationError, match="this student has its guidance built in"):
        generation.sample(student, ["a circle"], nfe=1, guidance_scale=2.0)
    with pytest.raises(ConfigurationError, match=r"HunyuanImage 3\.0 itself; sample by its generate_image"):
        load_pipeline(newer_directory, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_teacher_is_the_published_model(dtype: str, newer_directory: str, tmp_path: Path) -> None:
    adapter = load_family(newer_directory, torch_dtype=dtype)
    network = adapter.load_teacher()
    out = export_teacher(adapter, network, tmp_path / "teacher", CARD)
    assert {path.name for path in out.glob("*.py")} == {path.name for path in Path(newer_directory).glob("*.py")}
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    dtypes = {part.weight.dtype for part in (model.timestep_emb.mlp[0], model.vae.decoder, model.lm_head, model.model.wte)}
    assert dtypes == {getattr(torch, dtype)}
    exported = load_family(str(out), torch_dtype=dtype)
    x, t, condition = noise(3, shape=SHAPE), torch.tensor([0.3, 0.6, 0.9]), adapter.encode_prompt(PROMPTS)
    with torch.no_grad():
        before = adapter.velocity(network, x, t, condition)
        after = exported.velocity(exported.load_teacher(), x, t, condition)
    # This checkpoint is float32, so a bfloat16 export rounds the time embeddings.
    assert (after - before).norm() / before.norm() < (1e-6 if dtype == "float32" else 0.05)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert "model.generation_config.diff_guidance_scale = 3.5" in code
    assert 'image_size="32x32"' in code
    with pytest.raises(ValueError, match="save it as a student"):
        export_teacher(adapter, build_student(adapter), tmp_path / "student", CARD)


def test_exported_student_loads_its_tokenizer_and_samples(newer_directory: str, tmp_path: Path) -> None:
    adapter = load_family(newer_directory)
    out = export_student(adapter, build_student(adapter), tmp_path / "student", CARD)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    with pytest.raises(ValueError, match="has not been initialized yet"):
        model.sample_images("a circle")
    model.load_tokenizer(str(out))
    assert model.sample_images("a circle", num_inference_steps=1)[0].size == SIZE
    assert sys.modules[type(model).__module__].__name__.startswith("transformers_modules.")
