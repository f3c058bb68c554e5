import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import flow_step
from lightning_distill.students.few_step import pack_latents, unpack_latents
from lightning_distill.students.two_time_flux import image_ids
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.tiny import FLUX_DEV_SHIFT, PROMPTS, load_adapter, noise, save_tiny_pipeline

LENGTH = 8


def stock(directory: str) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Tokens


def test_packing_equals_the_stock_pipeline_and_unpacking_inverts_it() -> None:
    latents = torch.randn(2, 16, 6, 10)
    tokens = pack_latents(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack_latents(tokens, 6, 10), latents)
    assert torch.equal(unpack_latents(tokens, 6, 10), FluxPipeline._unpack_latents(tokens, 48, 80, vae_scale_factor=8))


def test_image_ids_equal_the_stock_pipeline() -> None:
    device = torch.device("cpu")
    assert torch.equal(image_ids(3, 5, device), FluxPipeline._prepare_latent_image_ids(1, 3, 5, device, torch.float32))


# Comparison with the stock pipeline


@pytest.mark.parametrize("fixture", ["teacher_directory", "guided_directory"])
def test_velocity_equals_the_stock_transformer(fixture: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(fixture)
    adapter, pipeline = load_adapter(directory), stock(directory)
    teacher = adapter.load_teacher()
    x, t, guidance = noise(3), torch.tensor([0.2, 0.7, 1.0]), torch.tensor([1.0, 3.5, 5.0])
    with torch.no_grad():
        v = adapter.velocity(teacher, x, t, adapter.encode_prompt(PROMPTS), guidance)
        embeds, pooled, text_ids = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=LENGTH)
        expected = pipeline.transformer(
            hidden_states=pack_latents(x),
            timestep=t,
            guidance=guidance if adapter.embeds_guidance else None,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids(4, 4, x.device),
            return_dict=False,
        )[0]
    assert torch.equal(v, unpack_latents(expected, 8, 8))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("fixture", ["teacher_directory", "guided_directory"])
def test_euler_steps_of_the_teacher_equal_the_stock_pipeline(
    fixture: str, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(fixture)
    adapter = load_adapter(directory)
    teacher = adapter.load_teacher()
    condition, null = adapter.encode_prompt(PROMPTS), adapter.encode_prompt([""] * 3)
    x = noise(3)
    grid = adapter.time_grid(4, (16, 8, 8))
    with torch.no_grad():
        for t, r in zip(grid[:-1].unbind(), grid[1:].unbind(), strict=True):
            v = adapter.guided_velocity(teacher, x, t.expand(3), condition, null, guidance_scale)
            x = flow_step(x, v, r.expand(3), t.expand(3))
        images = (adapter.decode_latents(x) / 2 + 0.5).clamp(0, 1)

    guidance = {"guidance_scale": guidance_scale}
    if not adapter.embeds_guidance:
        guidance = {"true_cfg_scale": guidance_scale, "negative_prompt": [""] * 3}
    expected = stock(directory)(
        PROMPTS,
        latents=pack_latents(noise(3)),
        height=32,
        width=32,
        num_inference_steps=4,
        max_sequence_length=LENGTH,
        output_type="pt",
        **guidance,
    ).images
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
    assert images.std() > 1e-3


def test_embedded_guidance_needs_one_branch_and_other_guidance_two(
    adapter: DiffusersAdapter, guided_adapter: DiffusersAdapter
) -> None:
    for tested, batch in ((adapter, 6), (guided_adapter, 3)):
        teacher = tested.load_teacher()
        batches: list[int] = []
        teacher.x_embedder.register_forward_hook(lambda module, args, output, batches=batches: batches.append(len(output)))
        condition, null = tested.encode_prompt(PROMPTS), tested.encode_prompt([""] * 3)
        with torch.no_grad():
            tested.guided_velocity(teacher, noise(3), torch.full((3,), 0.5), condition, null, 3.0)
        assert batches == [batch]


def test_guidance_applies_only_inside_its_interval(adapter: DiffusersAdapter) -> None:
    teacher = adapter.load_teacher()
    condition, null, t = adapter.encode_prompt(PROMPTS), adapter.encode_prompt([""] * 3), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        guided = adapter.guided_velocity(teacher, noise(3), t, condition, null, 3.0, (0.3, 0.8))
        plain = adapter.velocity(teacher, noise(3), t, condition)
    close = [torch.allclose(a, b, atol=1e-5) for a, b in zip(guided, plain, strict=True)]
    assert close == [True, False, True]


def test_embedded_guidance_needs_a_scale(guided_adapter: DiffusersAdapter) -> None:
    teacher = guided_adapter.load_teacher()
    with pytest.raises(ConfigurationError, match="embeds the guidance scale"):
        guided_adapter.velocity(teacher, noise(1), torch.ones(1), guided_adapter.encode_prompt(["a circle"]))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_dynamic_shift_equals_flux_dev(guided_adapter: DiffusersAdapter, size: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX_DEV_SHIFT)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).tolist(), mu=calculate_shift(size * size // 4))
    torch.testing.assert_close(guided_adapter.time_grid(6, (16, size, size)), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_fixed_shift_equals_the_scheduler(adapter: DiffusersAdapter) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).tolist())
    torch.testing.assert_close(adapter.time_grid(6, (16, 8, 8)), scheduler.sigmas, rtol=1e-6, atol=1e-7)


# Prompts, images and latents


def test_prompts_are_padded_to_the_tokenizer_length_or_to_max_sequence_length(teacher_directory: str) -> None:
    condition = load_adapter(teacher_directory).encode_prompt(PROMPTS)
    assert condition["prompt_embeds"].shape == (3, LENGTH, 16)
    assert condition["pooled_prompt_embeds"].shape == (3, 16)
    assert load_adapter(teacher_directory, max_sequence_length=6).encode_prompt([""])["prompt_embeds"].shape == (1, 6, 16)


def test_latents_are_shifted_and_scaled_means(adapter: DiffusersAdapter) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = adapter.encode_images(images)
    vae = adapter.pipeline.vae
    with torch.no_grad():
        torch.testing.assert_close(latents / 0.5 + 0.1, vae.encode(images).latent_dist.mean)
        torch.testing.assert_close(adapter.decode_latents(latents), vae.decode(latents / 0.5 + 0.1).sample)
    assert latents.shape == (2, *adapter.latent_shape(32, 32))


def test_unsupported_image_size_raises(adapter: DiffusersAdapter) -> None:
    assert adapter.latent_shape(32, 64) == (16, 8, 16)
    with pytest.raises(ConfigurationError, match="multiples of 8 pixels"):
        adapter.latent_shape(36, 32)


def test_only_the_student_is_trainable_and_it_shares_no_weights(adapter: DiffusersAdapter) -> None:
    teacher = adapter.load_teacher()
    student, _ = adapter.build_student(teacher, StudentOptions())
    assert not any(parameter.requires_grad for parameter in (*adapter.parameters(), *teacher.parameters()))
    assert not any(module.training for module in (*adapter.text_encoders().values(), adapter.vae, teacher))
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.training
    for parameter in student.parameters():
        parameter.data.zero_()
    assert all(parameter.abs().sum() > 0 for name, parameter in teacher.named_parameters() if name.endswith("weight"))


# Without encoders


def load_without_encoders(directory: str) -> DiffusersAdapter:
    adapter = DiffusersAdapter(directory)
    adapter.check()
    adapter.load(encoders=False)
    return adapter


def test_without_encoders_only_the_autoencoder_moves_to_the_gpu(
    teacher_directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, with_encoders = load_without_encoders(teacher_directory), load_adapter(teacher_directory)
    assert not list(adapter.parameters())
    assert not adapter.text_encoders()
    moves: list[str] = []
    vae = adapter.pipeline.vae
    monkeypatch.setattr(vae, "to", lambda device: moves.append(str(device)))
    monkeypatch.setattr(vae, "cpu", lambda: moves.append("back"))
    latents = noise(2)
    assert torch.equal(adapter.decode_latents(latents), with_encoders.decode_latents(latents))
    assert moves == ["cpu", "back"]


# Encoding settings


def test_encoding_settings_depend_on_the_encoders_and_not_on_the_path(tmp_path: Path) -> None:
    settings = DiffusersAdapter(save_tiny_pipeline(tmp_path / "first")).encoding_settings()
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    moved = DiffusersAdapter(str(tmp_path / "elsewhere"))
    assert moved.encoding_settings() == settings
    (weights,) = (tmp_path / "elsewhere" / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[::-1])
    assert moved.encoding_settings() == settings
    other = save_tiny_pipeline(tmp_path / "other")  # same shapes, different random numbers
    assert DiffusersAdapter(other).encoding_settings()["pretrained"] != settings["pretrained"]


@pytest.mark.parametrize("change", [{"torch_dtype": "bfloat16"}, {"max_sequence_length": 6}, {"revision": "x"}])
def test_encoding_settings_include_the_adapter_options(change: dict[str, Any], teacher_directory: str) -> None:
    settings = DiffusersAdapter(teacher_directory).encoding_settings()
    assert DiffusersAdapter(teacher_directory, **change).encoding_settings() == settings | change


# Settings


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("no/such/directory", "neither a pipeline directory nor a hub id"),
        ("./nothing", "neither a pipeline directory nor a hub id"),
        ("nothing", "neither a pipeline directory nor a hub id"),
    ],
)
def test_missing_directory_raises_one_line(pretrained: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        DiffusersAdapter(pretrained).check()
    assert "\n" not in str(caught.value)
    assert repr(pretrained) in str(caught.value)


def test_directory_without_a_pipeline_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no model_index\.json"):
        DiffusersAdapter(str(tmp_path)).check()


def test_student_as_teacher_raises() -> None:
    with pytest.raises(ConfigurationError, match=r"adapter\.pretrained is 'shapes-student', a TwoTimeFluxPipeline; set it"):
        DiffusersAdapter("shapes-student").check()


def test_unknown_hub_id_raises_within_seconds_without_network() -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigurationError, match="cannot be fetched from the hub") as caught:
        DiffusersAdapter("black-forest-labs/FLUX.0-none").check()
    assert time.perf_counter() - start < 5
    assert "\n" not in str(caught.value)


def test_unknown_dtype_raises(teacher_directory: str) -> None:
    with pytest.raises(ConfigurationError, match=r"adapter\.torch_dtype is 'float8'; choose one of float32, bfloat16"):
        DiffusersAdapter(teacher_directory, torch_dtype="float8").check()


def test_encoding_before_load_raises(teacher_directory: str) -> None:
    with pytest.raises(RuntimeError, match="call load"):
        DiffusersAdapter(teacher_directory).encode_prompt(["a circle"])


# The attention backend


def test_attention_backend_applies_to_teacher_and_student(teacher_directory: str) -> None:
    adapter = DiffusersAdapter(teacher_directory, attention_backend="_native_math")
    adapter.check()
    adapter.load()
    teacher = adapter.load_teacher()
    student, _ = adapter.build_student(teacher, StudentOptions())
    for network in (teacher, student):
        processors = [module.processor for module in network.modules() if hasattr(module, "processor")]
        assert processors
        assert {processor._attention_backend.value for processor in processors} == {"_native_math"}
    x, t = torch.randn(1, *adapter.latent_shape(32, 32)), torch.tensor([0.5])
    condition = adapter.encode_prompt(["a circle"])
    default = DiffusersAdapter(teacher_directory)
    default.check()
    default.load()
    torch.testing.assert_close(
        adapter.velocity(teacher, x, t, condition), default.velocity(default.load_teacher(), x, t, condition)
    )


def test_attention_backend_does_not_change_the_global_default(teacher_directory: str) -> None:
    before = _AttentionBackendRegistry.get_active_backend()
    adapter = DiffusersAdapter(teacher_directory, attention_backend="_native_math")
    adapter.load()
    adapter.build_student(adapter.load_teacher(), StudentOptions())
    assert _AttentionBackendRegistry.get_active_backend() == before


def test_unknown_attention_backend_raises(teacher_directory: str) -> None:
    with pytest.raises(ConfigurationError, match=r"adapter\.attention_backend"):
        DiffusersAdapter(teacher_directory, attention_backend="fast").check()
