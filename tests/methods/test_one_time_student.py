"""Students without an interval input: methods that evaluate them at r = 0 only, and their frozen time embedders."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.errors import ConfigurationError
from lightning_distill.export.card import ModelCard
from lightning_distill.export.formats import FormatOptions
from lightning_distill.export.students import export_student
from lightning_distill.methods import (
    DMD2,
    LADD,
    SCM,
    TDM,
    ConsistencyDistillation,
    Guidance,
    MeanFlow,
    TeacherStudentBase,
    ValidationOptions,
)
from lightning_distill.students.lora_student import load_lora_student, time_weights
from lightning_distill.students.two_time import TwoTimeModel
from lightning_distill.teachers import DiffusersAdapter, LoraOptions, StudentOptions
from lightning_distill.teachers.families import two_time
from lightning_distill.teachers.pipeline_directory import save_stock_pipeline
from tests.teachers.tiny_families import save_family
from tests.tiny import PROMPTS, load_adapter, save_tiny_pipeline

METHODS: dict[str, Callable[..., TeacherStudentBase]] = {
    "DMD2": partial(DMD2, nfe=(1, 2), critic_updates=1, critic_lr=1e-3),
    "LADD": partial(LADD, nfe=2, step_weights=(0.5, 0.5), warmup_steps=0, teacher_steps=2, hidden=8),
    "ConsistencyDistillation": ConsistencyDistillation,
    "SCM": SCM,
    "SCM by finite differences": partial(SCM, derivative="finite_difference", trajectory_fraction=0.5),
}
LORA = LoraOptions(rank=2)


def options(**settings: Any) -> StudentOptions:
    return StudentOptions(interval_embedding="none", time_embedding="original", **settings)


def build(name: str, adapter: DiffusersAdapter, student: StudentOptions, **settings: Any) -> TeacherStudentBase:
    module = METHODS[name](
        adapter,
        student=student,
        guidance=Guidance("two_branch", 2.0),
        validation=ValidationOptions(nfe=(2,), average_velocity=False),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        **settings,
    )
    torch.manual_seed(0)
    return module


def fit(module: TeacherStudentBase, directory: Path, steps: int, **settings: Any) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = [{"image": image, "prompt": PROMPTS[i], "index": i} for i, image in enumerate(images)] * steps
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[AtomicCheckpoint(str(directory), every_n_train_steps=1)],
    )
    trainer.fit(module, DataLoader(data, batch_size=2), **settings)


def trained_names(network: nn.Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def time_state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items() if "timestep_embedder" in name}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_method_trains_everything_but_time(name: str, lora: LoraOptions | None, tmp_path: Path) -> None:
    module = build(name, DiffusersAdapter("shapes-teacher"), options(lora=lora))
    fit(module, tmp_path, 2)
    student = module.student
    time = time_state(module.teacher)
    assert time
    assert all(torch.equal(value, time[each]) for each, value in time_state(student).items())
    trained = trained_names(student)
    assert trained
    assert not [each for each in trained if "timestep_embedder" in each or "interval" in each]
    assert lora is None or all("lora_" in each for each in trained)
    before = {} if lora is not None else module.teacher.state_dict()
    state = student.state_dict()
    # B of LoRA starts as zeros.
    moved = [each for each in trained if (state[each].any() if lora else not torch.equal(state[each], before[each]))]
    assert len(moved) > 0.9 * len(trained)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "teacher", scheduler={"shift": 2.0})


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_resumed_run_equals_an_uninterrupted_one(lora: LoraOptions | None, tiny: str, tmp_path: Path) -> None:
    class Repeatable(ConsistencyDistillation):
        def objective(self, *args: Any) -> Any:
            torch.manual_seed(100 + self.global_step)
            return super().objective(*args)

    def run(directory: Path, steps: int, **settings: Any) -> TeacherStudentBase:
        METHODS["repeatable"] = Repeatable
        module = build("repeatable", DiffusersAdapter(tiny), options(lora=lora), ema_decay=0.9)
        fit(module, directory, steps, **settings)
        return module

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "part", 1)
    resumed = run(tmp_path / "part", 2, ckpt_path=str(tmp_path / "part" / "last.ckpt"))
    for first, second in ((whole.student, resumed.student), (whole.ema, resumed.ema)):
        expected = second.state_dict()
        assert all(torch.equal(value, expected[each]) for each, value in first.state_dict().items())
    saved = torch.load(tmp_path / "part" / "last.ckpt", weights_only=False)["state_dict"]
    assert lora is None or not [each for each in saved if "timestep_embedder" in each]


def trained(adapter: DiffusersAdapter, **settings: Any) -> TwoTimeModel:
    """A student without an interval input whose trainable weights have moved."""
    student, report = adapter.build_student(adapter.load_teacher(), options(**settings))
    assert report is None
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return two_time(student).eval()


def images(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    result: Tensor = pipeline(PROMPTS, num_inference_steps=1, generator=generators, output_type="pt", height=32, width=32)[0]
    return result


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_exports_sample_as_the_student(lora: LoraOptions | None, tiny: str, tmp_path: Path) -> None:
    """The directory with code, the unmerged one, and the stock pipeline, in one step."""
    adapter = load_adapter(tiny)
    adapter.stochastic_sampling = True
    student = trained(adapter, lora=lora)
    card = ModelCard("DMD2", "teacher", (1,), 32, 32)
    export_student(adapter, student, tmp_path / "any_step", card)
    expected = images(DiffusionPipeline.from_pretrained(tmp_path / "any_step", trust_remote_code=True))
    if lora is not None:
        assert not time_weights(student)
        export_student(adapter, student, tmp_path / "unmerged", card, options=FormatOptions(lora="unmerged"))
        base = DiffusionPipeline.from_pretrained(tiny)
        loaded = load_lora_student(base, tmp_path / "unmerged")
        torch.testing.assert_close(images(loaded), expected, atol=1e-5, rtol=0)
    save_stock_pipeline(adapter.pipeline, two_time(adapter.merge_lora(student)), tmp_path / "stock")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    arguments = {"guidance_scale": 1.0, "max_sequence_length": adapter.sequence_length, "sigmas": [1.0]}
    stock.set_progress_bar_config(disable=True)
    found = stock(PROMPTS, generator=generators, output_type="pt", height=32, width=32, num_inference_steps=1, **arguments)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_time_of_an_unmerged_student_stays_float32_on_a_bfloat16_base(tiny: str, tmp_path: Path) -> None:
    adapter = load_adapter(tiny, torch_dtype="bfloat16")
    adapter.save_lora(trained(adapter, lora=LORA), tmp_path / "student")
    base = DiffusionPipeline.from_pretrained(tiny, torch_dtype=torch.bfloat16)
    loaded = load_lora_student(base, tmp_path / "student").transformer
    assert {value.dtype for value in time_state(loaded).values()} == {torch.float32}
    assert {value.dtype for value in time_state(base.transformer).values()} == {torch.bfloat16}
    assert loaded.transformer_blocks[0].norm1.linear.weight is base.transformer.transformer_blocks[0].norm1.linear.weight


@pytest.mark.parametrize("stock", [False, True])
def test_a_stage_starts_from_an_exported_student(stock: bool, tiny: str, tmp_path: Path) -> None:
    adapter = load_adapter(tiny)
    student = trained(adapter)
    if stock:
        save_stock_pipeline(adapter.pipeline, student, tmp_path / "student")
    else:
        adapter.save_student(student, tmp_path / "student")
    again = options(pretrained=str(tmp_path / "student"))
    adapter.check_student(again)
    continued, _ = adapter.build_student(adapter.load_teacher(), again)
    expected = student.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in continued.state_dict().items())
    assert not [name for name in trained_names(continued) if "timestep_embedder" in name]
    with pytest.raises(ConfigurationError, match="has one time input, so it is a teacher"):
        adapter.check_student(StudentOptions(pretrained=str(tmp_path / "student"), time_embedding="original"))


@pytest.mark.parametrize("method", [MeanFlow, TDM])
def test_methods_with_other_ends_are_refused(method: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^student.interval_embedding is none, but {method.__name__} trains"):
        method(DiffusersAdapter("shapes-teacher"), student=options())


@pytest.mark.parametrize("time", ["smooth", "rescaled"])
def test_modified_time_is_refused(time: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"interval_embedding is none, but student.time_embedding is {time}; set it"):
        StudentOptions(interval_embedding="none", time_embedding=time)


def test_policies_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"interval_embedding is none, but student.policy_points is 2"):
        options(policy_points=2)


def test_transformers_with_two_times_are_refused(tmp_path: Path) -> None:
    adapter = DiffusersAdapter(save_family("hunyuan_image_distilled", tmp_path / "teacher"))
    adapter.check()
    with pytest.raises(ConfigurationError, match=r"interval_embedding is none, but the transformer of adapter.pretrained"):
        adapter.check_student(options())
