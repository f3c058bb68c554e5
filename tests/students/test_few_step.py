import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from lightning_distill.students.average_velocity_scheduler import AverageVelocityScheduler
from lightning_distill.students.two_time_flux import TwoTimeFluxPipeline
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.tiny import FLUX_DEV_SHIFT, PROMPTS, noise, perturb_weights, sample_images


def build_pipeline(adapter: DiffusersAdapter, **scheduler: object) -> TwoTimeFluxPipeline:
    student, _ = adapter.build_student(adapter.load_teacher(), StudentOptions())
    parts = {"transformer": perturb_weights(student).eval(), "scheduler": AverageVelocityScheduler(**scheduler)}
    pipeline = TwoTimeFluxPipeline(**{**adapter.pipeline.components, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(adapter: DiffusersAdapter) -> TwoTimeFluxPipeline:
    return build_pipeline(adapter, shift=2.0)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize("nfe", [1, 2, 4, 5])
def test_pipeline_images_equal_those_of_training(adapter: DiffusersAdapter, pipeline: TwoTimeFluxPipeline, nfe: int) -> None:
    images = pipeline(PROMPTS, num_inference_steps=nfe, generator=generators(3), output_type="pt").images
    assert torch.equal(images, sample_images(adapter, pipeline.transformer, PROMPTS, nfe))
    assert images.std() > 1e-3


def test_embedded_guidance_and_dynamic_shift_match_training(guided_adapter: DiffusersAdapter) -> None:
    pipeline = build_pipeline(guided_adapter, **FLUX_DEV_SHIFT)
    images = pipeline(PROMPTS, guidance_scale=4.5, generator=generators(3), output_type="pt").images
    assert torch.equal(images, sample_images(guided_adapter, pipeline.transformer, PROMPTS, 4, 4.5))
    assert not torch.equal(images, sample_images(guided_adapter, pipeline.transformer, PROMPTS, 4, 1.0))


def test_one_step_is_one_forward_pass(pipeline: TwoTimeFluxPipeline) -> None:
    seen: list[int] = []
    pipeline.transformer.x_embedder.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    pipeline(PROMPTS, num_inference_steps=3, generator=generators(3), output_type="latent")
    assert seen == [3, 3, 3]


def test_noise_from_a_generator_equals_the_same_latents(pipeline: TwoTimeFluxPipeline) -> None:
    given = pipeline(PROMPTS, latents=noise(3), output_type="latent").images
    assert torch.equal(given, pipeline(PROMPTS, generator=generators(3), output_type="latent").images)
    one = [pipeline(PROMPTS, generator=torch.Generator().manual_seed(5), output_type="latent").images for _ in range(2)]
    assert torch.equal(*one)
    assert not torch.equal(one[0], given)


def test_prompt_embeddings_give_the_same_images(pipeline: TwoTimeFluxPipeline) -> None:
    embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=8)
    for count in (1, 2):
        settings = {"num_images_per_prompt": count, "output_type": "latent"}
        expected = pipeline(PROMPTS, generator=generators(3 * count), **settings).images
        images = pipeline(prompt_embeds=embeds, pooled_prompt_embeds=pooled, generator=generators(3 * count), **settings).images
        assert len(images) == 3 * count
        assert torch.equal(images, expected)


def test_output_types_and_sizes(pipeline: TwoTimeFluxPipeline) -> None:
    (image,) = pipeline("a circle", generator=generators(1)).images
    assert image.size == (32, 32)
    (images,) = pipeline("a circle", generator=generators(1), output_type="np", return_dict=False)
    assert images.shape == (1, 32, 32, 3)
    assert np.array_equal((images[0] * 255).round().astype("uint8"), np.asarray(image))
    assert pipeline("a circle", height=16, width=40, output_type="pt").images.shape == (1, 3, 16, 40)


def test_prompts_are_padded_to_the_tokenizer_length(pipeline: TwoTimeFluxPipeline) -> None:
    images = [
        pipeline("a circle", generator=generators(1), max_sequence_length=length, output_type="pt").images
        for length in (None, 8, 5)
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_invalid_arguments_raise(pipeline: TwoTimeFluxPipeline) -> None:
    with pytest.raises(ValueError, match="use multiples of 8 pixels"):
        pipeline("a circle", height=36)
    with pytest.raises(ValueError, match="set it to at least 1"):
        pipeline("a circle", num_inference_steps=0)
    with pytest.raises(ValueError, match="either a prompt or embeddings"):
        pipeline()


@pytest.mark.parametrize(
    "arguments", [{"negative_prompt": "blur"}, {"sigmas": [1.0]}, {"negative_prompt_embeds": torch.zeros(1, 8, 16)}]
)
def test_unknown_arguments_raise_with_the_known_ones(arguments: dict[str, Any], pipeline: TwoTimeFluxPipeline) -> None:
    (name,) = arguments
    with pytest.raises(TypeError, match=f"has no argument '{name}'.*arguments are prompt, .*, pooled_prompt_embeds") as caught:
        pipeline("a circle", **arguments)
    assert "\n" not in str(caught.value)


def test_incomplete_embeddings_raise(pipeline: TwoTimeFluxPipeline) -> None:
    with pytest.raises(ValueError, match="pooled_prompt_embeds is missing; pass all of prompt_embeds, pooled_prompt_embeds"):
        pipeline(prompt_embeds=torch.zeros(1, 8, 16))


def test_a_guidance_scale_without_effect_warns_once(
    pipeline: TwoTimeFluxPipeline, guided_adapter: DiffusersAdapter, recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("default")
    for _ in range(2):
        pipeline("a circle", guidance_scale=4.5, num_inference_steps=1, output_type="latent")
    pipeline("a circle", num_inference_steps=1, output_type="latent")
    build_pipeline(guided_adapter)("a circle", guidance_scale=4.5, num_inference_steps=1, output_type="latent")
    told = [str(each.message) for each in recwarn if "guidance_scale" in str(each.message)]
    assert told == ["guidance_scale 4.5 has no effect: the guidance of this student is built in; leave it out"]


def test_a_callback_sees_and_changes_each_step(pipeline: TwoTimeFluxPipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    seen: list[tuple[int, float, set[str]]] = []

    def watch(pipe: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert pipe is pipeline
        seen.append((step, t.item(), set(tensors)))
        return tensors

    def restart(pipe: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])}

    def stop(pipe: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pipe._interrupt = step == 1
        return tensors

    expected = pipeline("a circle", latents=noise(1), **settings).images
    names = ["latents", "prompt_embeds"]
    watched = pipeline(
        "a circle",
        latents=noise(1),
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=names,
        **settings,
    ).images
    assert torch.equal(watched, expected)
    assert [(step, tensors) for step, _, tensors in seen] == [(step, set(names)) for step in range(3)]
    assert seen[0][1] == 1
    assert pipeline("a circle", latents=noise(1), callback_on_step_end=restart, **settings).images.abs().max() == 0
    assert not torch.equal(pipeline("a circle", latents=noise(1), callback_on_step_end=stop, **settings).images, expected)
    with pytest.raises(ValueError, match="has 'image'; choose from latents, prompt_embeds"):
        pipeline("a circle", callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["image"], **settings)


def test_pipeline_is_a_flux_pipeline(pipeline: TwoTimeFluxPipeline) -> None:
    assert isinstance(pipeline, FluxPipeline)
