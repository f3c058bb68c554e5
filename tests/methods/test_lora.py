"""Distillation by LoRA: teacher, student, critic and EMA share their base weights."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.callbacks.switch import SwitchSolution
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import FlowMatching, Guidance, MeanFlow, TrajectoryAlignment, ValidationOptions
from lightning_distill.methods.evaluation import Evaluator
from lightning_distill.optimizers import MuonWithAdamW
from lightning_distill.sharding.strategies import ZeRO3Strategy
from lightning_distill.teachers import DiffusersAdapter, LoraOptions, StudentOptions
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.tiny import PROMPTS, save_tiny_pipeline

OPTIONS = ValidationOptions(nfe=(2,), height=32, width=32, samples=3, solver_steps=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "teacher", guidance_embeds=True)


def method(
    teacher: str,
    kind: type[MeanFlow] = MeanFlow,
    lora: LoraOptions | None = LoraOptions(rank=2),
    checkpointing: bool = False,
    alignment: dict[str, Any] | None = None,
    torch_dtype: str = "float32",
    **settings: Any,
) -> MeanFlow:
    """MeanFlow with LoRA and an alignment; its random weights have the seed 0."""
    module = kind(
        DiffusersAdapter(teacher, torch_dtype=torch_dtype),
        student=StudentOptions(lora=lora, gradient_checkpointing=checkpointing, max_drift=10.0),
        guidance=Guidance("embedded", 3.5),
        validation=OPTIONS,
        alignment=TrajectoryAlignment(**({"critic_lr": 1e-2} | (alignment or {}))),
        **({"ema_decay": 0.5, "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-2)} | settings),
    )
    module.setup("fit")
    torch.manual_seed(0)
    module.configure_model()
    return module


def fit(module: MeanFlow, path: Path, steps: int, *callbacks: Any, validate: bool = False, **options: Any) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=path,
        callbacks=[RandomState(), *callbacks],
        num_sanity_val_steps=0,
        val_check_interval=1,
    )
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = [
        {"image": image, "prompt": prompt, "index": i} for i, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True))
    ]
    torch.manual_seed(1)
    # All batches are equal, so that a resumed run continues with the same data.
    loaders = [DataLoader(data * 4, batch_size=3), *([DataLoader(data, batch_size=3)] if validate else [])]
    trainer.fit(module, *loaders, **options)
    return trainer


def trained_parameters(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def networks(module: MeanFlow) -> dict[str, nn.Module]:
    assert module.alignment is not None
    assert module.ema is not None
    return {"student": module.student, "critic": module.alignment.critic, "ema": module.ema.module}


class SeparateNetworks(MeanFlow):
    """MeanFlow with LoRA networks that share no weights."""

    def build_networks(self) -> None:
        super().build_networks()
        assert self.alignment is not None
        self.networks.student, self.alignment.critic = copy.deepcopy(self.student), copy.deepcopy(self.alignment.critic)

    def on_fit_start(self) -> None:
        pass


def test_networks_share_the_memory_of_the_base_weights(teacher: str) -> None:
    module = method(teacher)
    base = {parameter.data_ptr() for parameter in module.teacher.parameters()}
    names = trained_parameters(module.student).keys()
    for name, network in networks(module).items():
        own = [each for each, parameter in network.named_parameters() if parameter.data_ptr() not in base]
        assert len(own) == len(trained_parameters(module.alignment.critic if name == "critic" else module.student)), name
        assert not [each for each in own if "lora_" not in each and "timestep_embedder" not in each and "interval" not in each]
    # The bytes of the four networks, counted once: the teacher, and the trained weights of the others.
    sizes = {
        parameter.data_ptr(): parameter.nbytes
        for network in (module.teacher, *networks(module).values())
        for parameter in network.parameters()
    }
    own_bytes = [sum(p.nbytes for p in trained_parameters(each).values()) for each in (module.student, module.alignment.critic)]
    assert sum(sizes.values()) == sum(p.nbytes for p in module.teacher.parameters()) + 2 * own_bytes[0] + own_bytes[1]
    optimizer = module.configure_optimizers()
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in trained_parameters(module.student).values()}
    assert {id(p) for p in trained_parameters(module.alignment.critic).values()} == {
        id(p) for group in module.auxiliary_optimizers()["alignment.critic"].optimizer.param_groups for p in group["params"]
    }
    assert names


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("solution", ["discrete", "differential"])
def test_training_on_shared_weights_equals_training_of_separate_networks(
    teacher: str, solution: Any, checkpointing: bool, tmp_path: Path
) -> None:
    both = []
    for kind in (MeanFlow, SeparateNetworks):
        module = method(teacher, kind, checkpointing=checkpointing, solution=solution)
        start = {name: value.clone() for name, value in module.teacher.state_dict().items()}
        before = [value.clone() for network in networks(module).values() for value in network.parameters()]
        fit(module, tmp_path, 3)
        assert all(torch.equal(value, start[name]) for name, value in module.teacher.state_dict().items())
        after = [value for network in networks(module).values() for value in network.parameters()]
        moved = sum(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert moved > 0.9 * (2 * len(trained_parameters(module.student)) + len(trained_parameters(module.alignment.critic)))
        both.append(networks(module))
    for name, network in both[0].items():
        other = dict(both[1][name].named_parameters())
        assert all(torch.equal(parameter, other[each]) for each, parameter in network.named_parameters()), name
    pointers = [{p.data_ptr() for network in each.values() for p in network.parameters()} for each in both]
    assert len(pointers[1]) > len(pointers[0])  # otherwise both cases would share weights


def test_muon_optimizes_the_lora_matrices(teacher: str, tmp_path: Path) -> None:
    module = method(teacher, optimizer=lambda groups: MuonWithAdamW(groups, lr=1e-2))
    fit(module, tmp_path, 1)
    (muon, _) = module.trainer.optimizers[0].param_groups
    lora = [parameter for name, parameter in trained_parameters(module.student).items() if "lora_" in name]
    assert {id(parameter) for parameter in muon["params"]} == {id(parameter) for parameter in lora}


def test_checkpoints_hold_trained_weights_only_and_resume_exactly(teacher: str, tmp_path: Path) -> None:
    uninterrupted = method(teacher)
    fit(uninterrupted, tmp_path, 2)
    first = method(teacher)
    trainer = fit(first, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    student, critic = (
        sum(p.nbytes for p in trained_parameters(each).values()) for each in (first.student, first.alignment.critic)
    )
    assert sum(value.nbytes for value in state.values()) == 2 * student + critic + first.ema.n_averaged.nbytes
    resumed = method(teacher)
    fit(resumed, tmp_path, 2, ckpt_path=tmp_path / "x.ckpt")
    for name, network in networks(uninterrupted).items():
        other = dict(networks(resumed)[name].named_parameters())
        assert all(torch.equal(parameter, other[each]) for each, parameter in network.named_parameters()), name
    for other in (None, LoraOptions(rank=2, targets=("to_q",)), LoraOptions(rank=2, targets=("to_q", "norm.linear"))):
        with pytest.raises(
            ConfigurationError, match=r"use the model settings it was trained with|student\.lora\.rank is 2, and"
        ):
            fit(method(teacher, lora=other), tmp_path, 2, ckpt_path=tmp_path / "x.ckpt")


def test_rollback_snapshot_holds_trained_weights_only(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([0.1, 9.0])
    monkeypatch.setattr(Evaluator, "average_velocity_error", lambda self, batch: torch.tensor(next(errors)))
    module, switch, recorded = method(teacher), SwitchSolution(threshold=0.5), {}

    class Recorder(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            if switch.state.returned_at is None:
                recorded["snapshot"] = {path: dict(weights) for path, weights in (switch._weights or {}).items()}
                recorded["teacher"] = {name: value.clone() for name, value in pl_module.teacher.state_dict().items()}

    fit(module, tmp_path, 2, switch, Recorder(), validate=True)
    assert switch.state.returned_at == 2
    snapshot, parameters = recorded["snapshot"], trained_parameters(module.student)
    assert snapshot.keys() == {"networks.student", "networks.ema"}
    assert snapshot["networks.student"].keys() == parameters.keys()
    assert all(torch.equal(value, snapshot["networks.student"][name]) for name, value in parameters.items())
    assert all(torch.equal(value, recorded["teacher"][name]) for name, value in module.teacher.state_dict().items())


@pytest.mark.parametrize(
    ("student", "setting", "critic"),
    [
        (LoraOptions(rank=2), "student", LoraOptions(rank=2)),
        (LoraOptions(rank=2), LoraOptions(rank=3), LoraOptions(rank=3)),
        (LoraOptions(rank=2), None, None),
        (None, "student", None),
        (None, LoraOptions(rank=3), LoraOptions(rank=3)),
    ],
)
def test_critic_has_the_lora_options_of_the_student_or_separate_ones(
    student: LoraOptions | None, setting: Any, critic: LoraOptions | None
) -> None:
    options = StudentOptions(lora=student, gradient_checkpointing=True)
    critic_options = TrajectoryAlignment(critic_lora=setting).critic_options(options)
    assert critic_options == StudentOptions(time_embedding="original", gradient_checkpointing=True, lora=critic)


def test_lora_critic_beside_a_student_without_lora_saves_its_trained_weights(teacher: str, tmp_path: Path) -> None:
    module = method(teacher, lora=None, alignment={"critic_lora": LoraOptions(rank=2)})
    trainer = fit(module, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    critic = {f"alignment.critic.{name}" for name in trained_parameters(module.alignment.critic)}
    assert {name for name in state if name.startswith("alignment.")} == critic
    assert {name for name in state if name.startswith("networks.student.")} == {
        f"networks.student.{name}" for name in module.student.state_dict()
    }


def test_trained_weights_are_float32_on_a_bfloat16_base(teacher: str, tmp_path: Path) -> None:
    module = method(teacher, torch_dtype="bfloat16", solution="differential", checkpointing=True)
    base = {id(parameter) for parameter in module.teacher.parameters()}
    assert module.teacher.dtype == module.student.dtype == torch.bfloat16
    for network in networks(module).values():
        own = [parameter for parameter in network.parameters() if id(parameter) not in base]
        assert {parameter.dtype for parameter in own} == {torch.float32}
    fit(module, tmp_path, 1)
    moved = [parameter for parameter in trained_parameters(module.student).values() if parameter.grad is not None]
    assert {parameter.grad.dtype for parameter in moved} == {torch.float32}


def test_copied_base_weights_are_an_error(teacher: str, tmp_path: Path) -> None:
    module = method(teacher)
    module.student.proj_out.weight = copy.deepcopy(module.student.proj_out.weight)
    with pytest.raises(ConfigurationError, match=r"proj_out.weight' of the weights.*trainer.strategy"):
        fit(module, tmp_path, 1)
    module = method(teacher)
    module.to(torch.float64)  # moves and casts preserve the sharing
    for network in networks(module).values():
        assert network.proj_out.weight is module.teacher.proj_out.weight


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: LoraOptions(rank=0), "lora.rank is 0"),
        (lambda: LoraOptions(alpha=0.0), "lora.alpha is 0.0"),
        (lambda: LoraOptions(targets=()), "lora.targets is empty"),
        (lambda: TrajectoryAlignment(critic_lora="teacher"), "alignment.critic_lora is 'teacher'"),  # type: ignore[arg-type]
        (
            lambda: FlowMatching(GaussianAdapter(), student=StudentOptions(lora=LoraOptions())),
            "student.lora is set, and FlowMatching trains all weights",
        ),
        (
            lambda: MeanFlow(GaussianAdapter(), student=StudentOptions(lora=LoraOptions())).setup("fit"),
            "GaussianAdapter does not support LoRA",
        ),
        (
            lambda: MeanFlow(GaussianAdapter(), alignment=TrajectoryAlignment(critic_lora=LoraOptions())).setup("fit"),
            "GaussianAdapter does not support LoRA",
        ),
    ],
)
def test_error_for_invalid_settings_names_the_setting(make: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        make()


def test_zero3_with_lora_is_an_error_before_loading(teacher: str, tmp_path: Path) -> None:
    settings = {"guidance": Guidance("embedded", 3.5), "validation": OPTIONS}
    student = MeanFlow(DiffusersAdapter(teacher), student=StudentOptions(lora=LoraOptions()), **settings)
    critic = MeanFlow(DiffusersAdapter(teacher), alignment=TrajectoryAlignment(critic_lora=LoraOptions()), **settings)
    for module in (student, critic):
        module._trainer = SimpleNamespace(strategy=ZeRO3Strategy(), callbacks=[], datamodule=None)
        with pytest.raises(ConfigurationError, match=r"ZeRO3Strategy does not support .* set trainer.strategy to fsdp2 or ddp"):
            module.setup("fit")
        assert not module.networks.built


def test_unknown_lora_targets_are_an_error_before_loading(teacher: str) -> None:
    options = StudentOptions(lora=LoraOptions(targets=("to_q", "to_z")))
    module = MeanFlow(DiffusersAdapter(teacher), student=options, guidance=Guidance("embedded", 3.5))
    with pytest.raises(ConfigurationError, match=r"lora.targets does not fit.*'to_z'; the defaults .* are to_q, to_k"):
        module.setup("fit")
    assert not module.networks.built
