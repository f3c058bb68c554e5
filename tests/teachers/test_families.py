"""Tests that every teacher family must pass, on tiny pipelines of the real classes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanImagePipeline
from lightning import Trainer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from lightning_distill.errors import ConfigurationError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.formats import FormatOptions
from lightning_distill.export.students import export_student, export_teacher
from lightning_distill.flow.derivative import time_derivative
from lightning_distill.flow.path import flow_step
from lightning_distill.methods import MeanFlow
from lightning_distill.methods.guidance import Guidance
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.students.two_time import TwoTimeEmbedding, TwoTimeModel
from lightning_distill.teachers import DiffusersAdapter, load_lora_student
from lightning_distill.teachers.families import FAMILIES as KNOWN
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.preloaded import with_diffusers
from tests.teachers.tiny_families import FAMILIES, load_family, make_adapter, save_family
from tests.tiny import PROMPTS, load_adapter, noise, perturb_weights, sample_images

LORA = LoraOptions(rank=2)
SIZE = 32
SCALE = 3.5
SAMPLE_CODE = """
import pathlib, sys, torch
from diffusers import DiffusionPipeline
from transformers import AutoModelForCausalLM
generators = [torch.Generator().manual_seed(i) for i in range(3)]
settings = {"guidance_scale": 3.5, "generator": generators, "height": 32, "width": 32, "output_type": "pt"}
if pathlib.Path(sys.argv[1], "model_index.json").is_file():
    pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
    images = pipeline(sys.argv[3:], **settings).images
else:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    model.load_tokenizer(sys.argv[1])
    images = model.sample_images(sys.argv[3:], **settings)
torch.save(images, sys.argv[2])
assert not any(name.startswith("lightning") for name in sys.modules), "the export imports this package"
"""


@pytest.fixture(scope="module", params=FAMILIES)
def pipeline_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_family(request.param, tmp_path_factory.mktemp("family") / request.param)


# Most versions of HunyuanImage 3.0 are slow tests; `hunyuan_image3/test_adapter.py` tests their differences.
FORMS = ["newer_distilled", *(pytest.param(form, marks=pytest.mark.slow) for form in ("older", "newer", "newer_guided"))]


@pytest.fixture(scope="module", params=[*FAMILIES, *FORMS])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_family(request.param, tmp_path_factory.mktemp("family") / request.param)


@pytest.fixture
def adapter(directory: str) -> ModelAdapter:
    return load_family(directory)


@pytest.fixture
def pipeline_adapter(pipeline_directory: str) -> DiffusersAdapter:
    return load_adapter(pipeline_directory)


def build(adapter: ModelAdapter, **options: Any) -> tuple[nn.Module, nn.Module]:
    teacher = adapter.load_teacher()
    return teacher, adapter.build_student(teacher, StudentOptions(**options))[0]


def perturb_trainable_weights(student: TwoTimeModel) -> TwoTimeModel:
    """Add noise to the trainable weights."""
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return student


def states(adapter: ModelAdapter, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Condition]:
    """Latents, times and conditions of the same batch size."""
    x = torch.randn(len(PROMPTS), *adapter.latent_shape(SIZE, SIZE), dtype=dtype)
    condition = adapter.encode_prompt(PROMPTS)
    t = torch.tensor([0.9, 0.6, 0.3], dtype=dtype)
    return x, t, {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}


def test_every_family_has_a_tiny_pipeline() -> None:
    assert {type(build()).__name__ for build in FAMILIES.values()} == set(KNOWN)


def test_teacher_has_the_stock_configuration_and_weights(pipeline_adapter: DiffusersAdapter) -> None:
    stock = DiffusionPipeline.from_pretrained(pipeline_adapter.pretrained).transformer
    network = pipeline_adapter.load_teacher()
    assert {name: network.config[name] for name in stock.config if not name.startswith("_")} == {
        name: value for name, value in stock.config.items() if not name.startswith("_")
    }
    assert network.state_dict().keys() == stock.state_dict().keys()
    assert network.timestep_embedders


def test_teacher_samples_equal_the_stock_pipeline(pipeline_adapter: DiffusersAdapter) -> None:
    """Without guidance and with two branches, or with embedded guidance."""
    adapter = pipeline_adapter
    stock = DiffusionPipeline.from_pretrained(adapter.pretrained)
    stock.set_progress_bar_config(disable=True)
    # The guidance of HunyuanImage is a component whose result depends on previous steps.
    branches = [1.0] if type(stock) is HunyuanImagePipeline else [1.0, SCALE]
    for scale in [SCALE] if adapter.embeds_guidance else branches:
        assert_samples_equal(adapter, stock, scale)


def test_embeddings_have_the_names_that_the_pipeline_takes(pipeline_adapter: DiffusersAdapter) -> None:
    assert tuple(pipeline_adapter.encode_prompt(["a red circle"])) == pipeline_adapter.family.condition_names


def assert_samples_equal(adapter: DiffusersAdapter, stock: DiffusionPipeline, scale: float) -> None:
    options = adapter.stock_arguments(scale)
    # The default grid of some schedulers ends slightly above 0.
    options["sigmas"] = [1.0, 0.75, 0.5, 0.25]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    if "negative_prompt" in options:
        options["negative_prompt"] = [""] * 3
    expected = stock(
        prompt=[*PROMPTS],
        height=SIZE,
        width=SIZE,
        num_inference_steps=4,
        generator=generators,
        output_type="pt",
        **options,
    ).images
    teacher, condition, null = adapter.load_teacher(), adapter.encode_prompt(PROMPTS), adapter.encode_prompt([""] * 3)
    shape = adapter.latent_shape(SIZE, SIZE)
    x = noise(3, shape=shape)
    with torch.no_grad():
        for t, r in pairwise(adapter.time_grid(4, shape)):
            start, end = t.expand(3), r.expand(3)
            if adapter.embeds_guidance:
                u = adapter.average_velocity(teacher, x, end, start, condition, scale)
            else:
                u = adapter.guided_velocity(teacher, x, start, condition, null, scale)
            x = flow_step(x, u, end, start)
        images = (adapter.decode_latents(x) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert images.std() > 1e-3
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_new_student_equals_the_teacher_for_every_interval(adapter: ModelAdapter) -> None:
    x, t, condition = states(adapter)
    teacher, student = build(adapter, time_embedding="original")
    with torch.no_grad():
        v = adapter.velocity(teacher, x, t, condition, SCALE)
        assert torch.equal(adapter.average_velocity(student, x, t, t, condition, SCALE), v)
        for r in (torch.zeros(3), 0.4 * t):
            u = adapter.average_velocity(student, x, r, t, condition, SCALE)
            assert torch.equal(u, adapter.average_velocity(teacher, x, r, t, condition, SCALE))
            assert torch.equal(u, v) or teacher.config.use_meanflow  # this teacher has an input for r
        perturb_weights(student)
        assert not torch.allclose(adapter.average_velocity(student, x, 0 * t, t, condition, SCALE), u, rtol=1e-3)


def test_smooth_time_changes_velocities_by_less_than_the_fit_error(adapter: ModelAdapter) -> None:
    x, t, condition = states(adapter)
    teacher = adapter.load_teacher()
    student, report = adapter.build_student(teacher, StudentOptions())
    assert report is not None
    assert report.derivative_after < report.derivative_before
    with torch.no_grad():
        v = adapter.average_velocity(teacher, x, 0.4 * t, t, condition, SCALE)
        u = adapter.average_velocity(student, x, 0.4 * t, t, condition, SCALE)
    assert 0 < (u - v).norm() / v.norm() < report.fit_error


@pytest.mark.parametrize("lora", [None, LORA])
def test_time_derivative_equals_finite_differences(adapter: ModelAdapter, lora: LoraOptions | None) -> None:
    if lora is not None and not isinstance(adapter, DiffusersAdapter):
        with pytest.raises(ConfigurationError, match=r"student\.lora is set, but HunyuanImage3Adapter does not"):
            adapter.check_student(StudentOptions(lora=lora))
        return
    _, student = build(adapter, lora=lora)
    perturb_weights(student).double()
    x, t, condition = states(adapter, torch.float64)
    v, r = torch.randn_like(x), 0.4 * t

    def average_velocity(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return adapter.average_velocity(student, x, r, t, condition, SCALE)

    def difference(v: Tensor, step: float) -> Tensor:
        with torch.no_grad(), adapter.frozen_routing():
            average_velocity(x, r, t)
            ahead, behind = (average_velocity(x + each * v, r, t + each) for each in (step, -step))
        return (ahead - behind) / (2 * step)

    u, dudt = time_derivative(average_velocity, x, r, t, v)
    torch.testing.assert_close(u, average_velocity(x, r, t).detach())
    # The larger step suits models that round to float32 internally, the smaller step models with kinks (Sana).
    errors = [((dudt - difference(v, step)).norm() / dudt.norm()).item() for step in (5e-4, 1e-5)]
    assert min(errors) < 1e-3
    assert difference(0 * v, 5e-4).norm() / dudt.norm() > 1e-3  # the output depends on t itself
    if not isinstance(adapter, DiffusersAdapter):  # torch has no forward-mode rule for a group norm of tokens
        return
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        dual = average_velocity(forward_ad.make_dual(x, v), r, forward_ad.make_dual(t, torch.ones_like(t)))
        exact = forward_ad.unpack_dual(dual).tangent
    assert (dudt - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("lora", [None, LORA])
def test_exactly_the_trainable_weights_get_gradients(pipeline_adapter: DiffusersAdapter, lora: LoraOptions | None) -> None:
    """DDP waits for the gradient of every trainable weight. Unused modules get none even if they are trainable."""
    _, student = build(pipeline_adapter, lora=lora)
    assert isinstance(student, TwoTimeModel)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    if lora is None:
        student.requires_grad_(True)
    x, t, condition = states(pipeline_adapter)
    pipeline_adapter.average_velocity(student, x, 0 * t, t, condition, SCALE).square().mean().backward()
    assert {name for name, parameter in student.named_parameters() if parameter.grad is not None} == trained


def test_lora_student_shares_the_weights_and_equals_the_teacher_at_first(pipeline_adapter: DiffusersAdapter) -> None:
    adapter = pipeline_adapter
    x, t, condition = states(adapter)
    options = StudentOptions(time_embedding="original", lora=LORA)
    adapter.check_student(options)
    teacher = adapter.load_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student, _ = adapter.build_student(teacher, options)
    base = {id(parameter) for parameter in teacher.parameters()}
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in student.named_parameters() if id(parameter) not in base}
    times = tuple(f"{name}." for name, part in student.named_modules() if isinstance(part, TwoTimeEmbedding))
    assert all("lora_" in name or name.startswith(times) for name in trained)
    for target in type(teacher).lora_targets:
        assert any(name.endswith(f".{target}.lora_A.default.weight") for name in trained), target
    with torch.no_grad():
        for r in (t, torch.zeros(3), 0.4 * t):
            u = adapter.average_velocity(student, x, r, t, condition, SCALE)
            assert torch.equal(u, adapter.average_velocity(teacher, x, r, t, condition, SCALE))
        perturb_trainable_weights(student)
        assert not torch.allclose(adapter.average_velocity(student, x, 0 * t, t, condition, SCALE), u, rtol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("lora", [None, LORA])
def test_student_without_an_interval_input_keeps_the_time_of_its_teacher(
    pipeline_adapter: DiffusersAdapter, lora: LoraOptions | None
) -> None:
    """The end of a step has no effect, and all trainable weights get gradients."""
    adapter = pipeline_adapter
    options = StudentOptions(interval_embedding="none", time_embedding="original", lora=lora)
    teacher = adapter.load_teacher()
    if teacher.config.get("use_meanflow"):
        with pytest.raises(ConfigurationError, match="has two times itself"):
            adapter.check_student(options)
        return
    adapter.check_student(options)
    student, report = adapter.build_student(teacher, options)
    assert report is None
    assert isinstance(student, TwoTimeModel)
    assert student.is_stock
    embedders = {id(parameter) for embedder in student.timestep_embedders for parameter in embedder.parameters()}
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    assert trained
    assert not trained & embedders
    assert lora is None or embedders == {id(p) for each in teacher.timestep_embedders for p in each.parameters()}
    x, t, condition = states(adapter)
    with torch.no_grad():
        v = adapter.velocity(teacher, x, t, condition, SCALE)
        assert all(torch.equal(adapter.average_velocity(student, x, r, t, condition, SCALE), v) for r in (0 * t, 0.4 * t))
    adapter.average_velocity(student, x, 0 * t, t, condition, SCALE).square().mean().backward()
    assert {id(parameter) for parameter in student.parameters() if parameter.grad is not None} == trained


def test_lora_student_samples_equal_merged_and_on_its_base(pipeline_adapter: DiffusersAdapter, tmp_path: Path) -> None:
    adapter = pipeline_adapter
    _, student = build(adapter, lora=LORA)
    perturb_trainable_weights(student).eval()
    card = ModelCard("MeanFlow", "tiny", (4,), SIZE, SIZE, SCALE)
    export_student(adapter, student, tmp_path / "student", card, options=FormatOptions(lora="unmerged"))
    pipeline = load_lora_student(DiffusionPipeline.from_pretrained(adapter.pretrained), tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    size = {"height": SIZE, "width": SIZE, "output_type": "pt"}
    images = sample_images(adapter, student, PROMPTS, 2, SCALE)
    exported = pipeline(PROMPTS, num_inference_steps=2, guidance_scale=SCALE, generator=generators, **size).images
    assert torch.equal(exported, images)
    merged = adapter.merge_lora(student)
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    assert merged.state_dict().keys() == build(adapter)[1].state_dict().keys()
    torch.testing.assert_close(sample_images(adapter, merged, PROMPTS, 2, SCALE), images, rtol=0, atol=1e-4)


def test_time_embedders_are_float32_with_bfloat16_weights(directory: str) -> None:
    adapter = load_family(directory, torch_dtype="bfloat16")
    exact = load_family(directory)
    x, t, condition = states(exact)
    teacher = adapter.load_teacher()
    with torch.no_grad():
        v = adapter.velocity(teacher, x, t, condition, SCALE)
        expected = exact.velocity(exact.load_teacher(), x, t, condition, SCALE)
    assert v.dtype == torch.float32
    assert (v - expected).norm() / expected.norm() < 0.1
    assert teacher.dtype == torch.bfloat16
    for embedder in teacher.timestep_embedders:
        assert embedder.layers[0].weight.dtype == torch.float32


def test_training_resumes_and_its_export_samples_equally_in_another_process(directory: str, tmp_path: Path) -> None:
    def method() -> MeanFlow:
        options = ValidationOptions(nfe=(4,), height=SIZE, width=SIZE, average_velocity=False)
        guidance = Guidance("embedded" if adapter.embeds_guidance else "two_branch", SCALE)
        return MeanFlow(
            make_adapter(directory),
            guidance=guidance,
            solution="differential",
            student=StudentOptions(gradient_checkpointing=True, max_drift=1.0),
            validation=options,
        )

    def fit(module: MeanFlow, steps: int, **options: Any) -> MeanFlow:
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        data = [{"image": torch.rand(3, SIZE, SIZE) * 2 - 1, "prompt": prompt, "index": i} for i, prompt in enumerate(PROMPTS)]
        trainer.fit(module, DataLoader(data, batch_size=3), **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    adapter = load_family(directory)
    first = fit(method(), 1)
    before = {name: value.clone() for name, value in first.student.state_dict().items()}
    second = fit(method(), 2, ckpt_path=tmp_path / "last.ckpt")
    moved = [name for name, value in second.student.state_dict().items() if not torch.equal(value, before[name])]
    assert moved

    student = second.student.eval()
    export_student(adapter, student, tmp_path / "student", ModelCard("MeanFlow", "tiny", (4,), SIZE, SIZE, SCALE))
    (tmp_path / "sample.py").write_text(SAMPLE_CODE)
    with_diffusers().run(["sample.py", "student", "images.pt", *PROMPTS], tmp_path)
    assert torch.equal(torch.load(tmp_path / "images.pt"), sample_images(adapter, student, PROMPTS, 4, SCALE))


def test_exported_teacher_has_equal_velocities(adapter: ModelAdapter, tmp_path: Path) -> None:
    network = perturb_weights(adapter.load_teacher())
    out = export_teacher(adapter, network, tmp_path / "teacher", ModelCard("FlowMatching", "tiny", (32,), SIZE, SIZE))
    exported = load_family(str(out))
    x, t, condition = states(adapter)
    with torch.no_grad():
        before = adapter.velocity(network, x, t, condition, SCALE)
        assert torch.equal(exported.velocity(exported.load_teacher(), x, t, condition, SCALE), before)


def test_precomputed_conditions_need_no_encoders(directory: str, adapter: ModelAdapter, tmp_path: Path) -> None:
    without = make_adapter(directory)
    without.check()
    without.load(encoders=False)
    assert not list(without.parameters())
    x, t, condition = states(adapter)
    teacher, student = build(without)
    with torch.no_grad():
        v = without.velocity(teacher, x, t, condition, SCALE)
        assert torch.equal(v, adapter.velocity(adapter.load_teacher(), x, t, condition, SCALE))
        assert torch.equal(without.decode_latents(x), adapter.decode_latents(x))
    assert without.latent_shape(SIZE, SIZE) == adapter.latent_shape(SIZE, SIZE)
    # A tokenizer stores the last padding, so use an adapter that has not encoded prompts.
    for each, name in ((load_family(directory), "with"), (without, "without")):
        each.save_student(student, tmp_path / name)
    files = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("with", "without")
    ]
    assert files[0].keys() == files[1].keys()
    assert not [name for name in files[0] if files[0][name] != files[1][name]]


def test_encoded_images_decode_to_the_same_shape(adapter: ModelAdapter) -> None:
    images = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    latents = adapter.encode_images(images)
    assert latents.shape == (2, *adapter.latent_shape(SIZE, SIZE))
    assert latents.dtype == torch.float32
    assert adapter.decode_latents(latents).shape == images.shape


def test_rescaled_time_embedding_equals_the_original_at_a_thousandth_of_t(adapter: ModelAdapter) -> None:
    options = StudentOptions(time_embedding="rescaled")
    if not isinstance(adapter, DiffusersAdapter):
        with pytest.raises(ConfigurationError, match="time_embedding is rescaled, which HunyuanImage3Adapter does not support"):
            adapter.check_student(options)
        return
    adapter.check_student(options)
    teacher = adapter.load_teacher()
    student, report = adapter.build_student(teacher, options)
    assert report is None
    t = torch.tensor([0.9, 0.6, 0.3])
    pairs = list(zip(teacher.timestep_embedders, student.timestep_embedders, strict=True))
    assert pairs
    with torch.no_grad():
        for original, rescaled in pairs:
            torch.testing.assert_close(rescaled.embed_times(t, 0.4 * t), original.embed_times(t / 1000, 0.4 * t / 1000))
            assert not torch.allclose(rescaled.embed_times(t, 0.4 * t), original.embed_times(t, 0.4 * t), rtol=1e-2)


def test_image_sizes_are_checked_before_loading(pipeline_directory: str) -> None:
    """The autoencoder without weights supports the sizes that the loaded pipeline supports."""
    unloaded = make_adapter(pipeline_directory)
    loaded = load_adapter(pipeline_directory)
    for size in (16, 20, 24, 32, 36, 64):
        try:
            loaded.latent_shape(size, size)
        except ConfigurationError as error:
            with pytest.raises(ConfigurationError, match=str(error)):
                unloaded.check_image_size(size, size)
        else:
            unloaded.check_image_size(size, size)
