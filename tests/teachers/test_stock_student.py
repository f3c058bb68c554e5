"""Students of every family as stock pipelines for a fixed number of steps."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from torch import Tensor, nn

from lightning_distill.export.card import ModelCard
from lightning_distill.export.formats import PlannedExport
from lightning_distill.export.mark import ExportMark
from lightning_distill.export.students import export_student
from lightning_distill.flow.path import flow_step
from lightning_distill.flow.times import step_grid
from lightning_distill.students.few_step import pack_latents
from lightning_distill.students.lora_student import LORA_WEIGHTS
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.teachers import DiffusersAdapter
from lightning_distill.teachers.families import FAMILIES as KNOWN
from lightning_distill.teachers.stock_student import StepGrid, save_stock_student, set_steps, stock_scheduler, time_updates
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.export.stock_transformers import without_warnings
from tests.teachers.tiny_families import FAMILIES, save_family
from tests.tiny import PROMPTS, load_adapter, noise, perturb_weights

SIZE = 32
SCALE = 3.5
STEPS = (1, 2, 4)


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_family(request.param, tmp_path_factory.mktemp("family") / request.param)


@pytest.fixture
def adapter(directory: str) -> DiffusersAdapter:
    return load_adapter(directory)


def build(adapter: DiffusersAdapter, **options: Any) -> TwoTimeModel:
    """A student none of whose weights is at its start."""
    student = perturb_weights(adapter.build_student(adapter.load_teacher(), StudentOptions(**options))[0]).eval()
    assert isinstance(student, TwoTimeModel)
    return student


def any_step_images(
    adapter: DiffusersAdapter, student: nn.Module, grid: StepGrid, latents_dtype: torch.dtype = torch.float32
) -> Tensor:
    condition, x = adapter.encode_prompt(PROMPTS), noise(3, shape=adapter.latent_shape(SIZE, SIZE))
    with torch.no_grad():
        x = x.to(latents_dtype).float()
        for (t, r), end in zip(pairwise(step_grid(grid.nfe, grid.shift)), grid.intervals()[1], strict=True):
            u = adapter.average_velocity(student, x, end.expand(3), t.expand(3), condition, SCALE)
            x = flow_step(x, u, r.expand(3), t.expand(3)).to(latents_dtype).float()
        return (adapter.decode_latents(x) / 2 + 0.5).clamp(0, 1)


def stock_images(adapter: DiffusersAdapter, directory: Path, nfe: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return sampled(adapter, DiffusionPipeline.from_pretrained(directory, torch_dtype=dtype), nfe)


def sampled(adapter: DiffusersAdapter, pipeline: DiffusionPipeline, nfe: int) -> Tensor:
    """Images of a stock pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    options = adapter.stock_arguments(SCALE if adapter.embeds_guidance else 1.0)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    size = {"height": SIZE, "width": SIZE, "num_inference_steps": nfe, "output_type": "pt"}
    images: Tensor = pipeline(prompt=[*PROMPTS], generator=generators, **size, **options).images
    return images.float()


@pytest.mark.parametrize("nfe", STEPS)
def test_stock_pipeline_samples_equal_the_student(adapter: DiffusersAdapter, nfe: int, tmp_path: Path) -> None:
    student = build(adapter)
    source = adapter.stock_source(student, SIZE, SIZE)
    updates = time_updates(source, nfe)
    save_stock_student(source, nfe, updates, tmp_path / "stock")
    assert not list((tmp_path / "stock").rglob("*.py"))
    expected = any_step_images(adapter, student, source.grid(nfe))
    torch.testing.assert_close(stock_images(adapter, tmp_path / "stock", nfe), expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3
    assert len(updates) == len(student.timestep_embedders)
    assert max(update.residual for update in updates) < 1e-5


def build_lora(adapter: DiffusersAdapter) -> nn.Module:
    """A LoRA student none of whose trainable weights is at its start."""
    student = adapter.build_student(adapter.load_teacher(), StudentOptions(lora=LoraOptions(rank=2)))[0].eval()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return student


def lora_images(
    adapter: DiffusersAdapter, student: nn.Module, nfe: int, directory: Path, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Images of the base with the LoRA file of a student and its scheduler."""
    card = ModelCard("MeanFlow", str(adapter.pretrained), STEPS, SIZE, SIZE, guidance_scale=SCALE)
    export_student(adapter, student, directory, card, [PlannedExport("lora", nfe)])
    scheduler = ExportMark.read(directory).scheduler
    assert scheduler is not None
    pipeline = DiffusionPipeline.from_pretrained(adapter.pretrained, torch_dtype=dtype)
    with without_warnings():
        if isinstance(pipeline, HunyuanImagePipeline):  # diffusers has no loader of LoRA for it
            pipeline.transformer.load_lora_adapter(directory, prefix="transformer", weight_name=LORA_WEIGHTS)
        else:
            pipeline.load_lora_weights(directory, weight_name=LORA_WEIGHTS)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler.from_config(scheduler["config"]))
    return sampled(adapter, pipeline, nfe)


@pytest.mark.parametrize("nfe", STEPS)
def test_lora_file_on_the_base_samples_equal_the_student(adapter: DiffusersAdapter, nfe: int, tmp_path: Path) -> None:
    student = build_lora(adapter)
    expected = any_step_images(adapter, student, adapter.stock_source(student, SIZE, SIZE).grid(nfe))
    torch.testing.assert_close(lora_images(adapter, student, nfe, tmp_path / "lora"), expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize(("form", "nfe"), [("stock", 1), ("stock", 4), ("lora", 4)])
def test_exports_in_bfloat16_are_as_accurate_as_the_student(
    adapter: DiffusersAdapter, form: str, nfe: int, tmp_path: Path
) -> None:
    """Compared with the student whose network, encoders, autoencoder and latents are in bfloat16 as well."""
    student = build(adapter) if form == "stock" else build_lora(adapter)
    source = adapter.stock_source(student, SIZE, SIZE)
    if form == "stock":
        save_stock_student(source, nfe, time_updates(source, nfe), tmp_path / form)
        images = stock_images(adapter, tmp_path / form, nfe, torch.bfloat16)
    else:
        images = lora_images(adapter, student, nfe, tmp_path / form, torch.bfloat16)
    expected = any_step_images(adapter, student, source.grid(nfe))
    half = load_adapter(str(adapter.pretrained), torch_dtype="bfloat16")
    rounded = any_step_images(half, copy.deepcopy(student).bfloat16(), source.grid(nfe), torch.bfloat16)
    error, own_error = ((each - expected).abs().mean().item() for each in (images, rounded))
    assert 0 < error <= 1.5 * own_error


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("family", ["FluxPipeline", "SanaPipeline"])
def test_stock_scheduler_has_the_grid_of_the_student(family: str, nfe: int, shift: float) -> None:
    scheduler = stock_scheduler(KNOWN[family], StepGrid(nfe, shift))
    set_steps(scheduler, KNOWN[family], nfe)
    torch.testing.assert_close(scheduler.sigmas, step_grid(nfe, shift), rtol=0, atol=2e-7)
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("family", ["flux", "sana"])
def test_students_that_renoise(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network receives r = 0; FLUX draws its noise in the layout of tokens."""
    adapter = load_adapter(save_family(family, tmp_path / family))
    adapter.stochastic_sampling = True
    student = build(adapter)
    source = adapter.stock_source(student, SIZE, SIZE)
    save_stock_student(source, 2, time_updates(source, 2), tmp_path / "stock")
    shape = adapter.latent_shape(SIZE, SIZE)
    fresh = noise(3, 10, shape)
    layout = pack_latents if family == "flux" else lambda latents: latents
    monkeypatch.setattr(scheduling_flow_match_euler_discrete, "randn_tensor", lambda *_, **__: layout(fresh))
    condition, x = adapter.encode_prompt(PROMPTS), noise(3, shape=shape)
    grid = source.grid(2)
    with torch.no_grad():
        for t, r in pairwise(step_grid(2, grid.shift)):
            u = adapter.average_velocity(student, x, torch.zeros(3), t.expand(3), condition, SCALE)
            x = (1 - r) * (x - t * u) + r * fresh
        expected = (adapter.decode_latents(x) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(stock_images(adapter, tmp_path / "stock", 2), expected, rtol=0, atol=1e-5)


def test_students_of_one_time_need_no_update(tmp_path: Path) -> None:
    adapter = load_adapter(save_family("flux", tmp_path / "flux"))
    student = build(adapter, interval_embedding="none", time_embedding="original")
    source = adapter.stock_source(student, SIZE, SIZE)
    assert time_updates(source, 4) == []
    save_stock_student(source, 4, (), tmp_path / "stock")
    expected = any_step_images(adapter, student, source.grid(3))
    torch.testing.assert_close(stock_images(adapter, tmp_path / "stock", 3), expected, rtol=0, atol=1e-5)
