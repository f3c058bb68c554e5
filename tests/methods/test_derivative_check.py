"""The check of the student's derivative before the first step."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill.callbacks import SwitchSolution
from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import MeanFlow, ValidationOptions
from lightning_distill.methods.derivative_check import DerivativeReport, check_derivative
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.model_adapter import ModelAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.methods.gaussian_adapter import GaussianAdapter, SmallNetwork
from tests.methods.gaussian_runs import build, unguided
from tests.tiny import save_tiny_pipeline

SAMPLE = {"image": torch.zeros(3, 4, 4), "prompt": "", "index": 0}


def loader() -> DataLoader[dict[str, Any]]:
    return DataLoader([SAMPLE] * 4, batch_size=4)  # type: ignore[arg-type]


def method(network: nn.Module | None = None, adapter: ModelAdapter | None = None, **settings: Any) -> MeanFlow:
    settings = {"solution": "differential", "equal_fraction": 0.0} | settings
    validation = ValidationOptions(nfe=(1,), height=4, width=4, average_velocity=False)
    module: MeanFlow = build(MeanFlow(adapter or GaussianAdapter("small"), validation=validation, **settings))
    if network is not None:
        module.networks.student = network
    return module


def fit(path: Path, module: MeanFlow, **settings: Any) -> None:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    limits = {"max_steps": 1, "limit_val_batches": 0, "accelerator": "cpu", "log_every_n_steps": 1}
    Trainer(default_root_dir=path, **(quiet | limits | settings)).fit(module, loader())


def check(module: MeanFlow) -> DerivativeReport:
    context = module.trainer.precision_plugin.forward_context
    return check_derivative(module.derivative, module.networks, (3, 4, 4), module.device, context)


class Student(SmallNetwork):
    """A small network with an operation on t that subclasses replace."""

    def operation(self, t: Tensor) -> Tensor:
        return t

    def forward(self, x: Tensor, r: Tensor | None, t: Tensor, caption: Tensor) -> Tensor:
        return super().forward(x, r, self.operation(t), caption)


class DetachedStudent(Student):
    """A student without a derivative in x and t."""

    def operation(self, t: Tensor) -> Tensor:
        return t.detach()

    def forward(self, x: Tensor, r: Tensor | None, t: Tensor, caption: Tensor) -> Tensor:
        return super().forward(x.detach(), r, t, caption)


class WrongForwardMode(torch.autograd.Function):
    """The identity, with three times the right forward-mode derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * tangent


class WrongStudent(Student):
    """A student with a wrong derivative in t."""

    def operation(self, t: Tensor) -> Tensor:
        return WrongForwardMode.apply(t)


def test_derivative_of_a_flux_student_is_exact_with_fused_attention(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = DiffusersAdapter(save_tiny_pipeline(tmp_path / "teacher"))
    settings = {"solution": "differential", "validation": ValidationOptions(nfe=(1,), average_velocity=False)}
    module = MeanFlow(adapter, student=StudentOptions(gradient_checkpointing=True), **settings)
    logger = TensorBoardLogger(tmp_path)
    data = DataLoader([SAMPLE | {"image": torch.rand(3, 32, 32), "prompt": "a circle"}] * 2, batch_size=2)  # type: ignore[arg-type]
    trainer = Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", logger=logger, enable_checkpointing=False)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    (line,) = [message for message in caplog.messages if message.startswith("Derivative: ")]
    assert "exact, in float32, 2 calls of attention, fused, derived in blocks (on cpu)" in line
    events = EventAccumulator(logger.log_dir).Reload()
    assert 0 < events.Scalars("derivative/difference")[0].value < 0.01


def test_derivative_is_checked_only_if_the_differential_solution_may_come(tmp_path: Path) -> None:
    fit(tmp_path, method(DetachedStudent(), solution="discrete"))
    switch = SwitchSolution(latest_step=100)
    with pytest.raises(ConfigurationError, match=r"no exact derivative.*model\.derivative to finite_difference"):
        fit(tmp_path, method(DetachedStudent(), solution="discrete"), callbacks=[switch])


def test_wrong_derivative_is_an_error_and_finite_differences_replace_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"differs from float32 differences.*finite_difference"):
        fit(tmp_path, method(WrongStudent()))
    fit(tmp_path, method(WrongStudent(), derivative="finite_difference"))


def test_wrong_derivative_is_a_warning_when_a_run_resumes(tmp_path: Path) -> None:
    module = method(WrongStudent(), derivative="finite_difference")
    quiet = {"limit_val_batches": 0, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(default_root_dir=tmp_path, max_steps=1, **quiet)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Trainer(default_root_dir=tmp_path, max_steps=2, **quiet)
    with pytest.warns(UserWarning, match="derivative differs from float32 differences"):
        resumed.fit(method(WrongStudent()), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 2


class RoughStudent(Student):
    """A student whose velocities change too fast in t for differences with the usual step."""

    def operation(self, t: Tensor) -> Tensor:
        return t + 0.02 * torch.sin(400 * t)


def test_tolerance_follows_the_resolution_of_differences(tmp_path: Path) -> None:
    module = method(RoughStudent())
    fit(tmp_path, module)
    report = check(module)
    assert report.difference is not None
    assert report.resolution is not None
    assert 0.05 < report.difference < report.resolution
    smooth = method()
    fit(tmp_path, smooth)
    assert (check(smooth).resolution or 1.0) < 0.01


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_targets_of_finite_differences_are_close_to_exact_ones(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SmallNetwork()
    targets = []
    for derivative in ("exact", "finite_difference"):
        module = method(network, derivative=derivative)
        fit(tmp_path / derivative, module, precision=precision, max_steps=0)
        x, t = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.linspace(0.2, 1, 8)
        with module.trainer.precision_plugin.forward_context():
            u, target, logs = module.regression(x, 0.3 * t, t, unguided(8))
        assert u.requires_grad
        assert not target.requires_grad
        targets.append(target)
        assert logs["dudt_norm"] > 0
    difference = (targets[0] - targets[1]).norm() / targets[0].norm()
    assert 0 < difference < {"32-true": 1e-3, "bf16-mixed": 0.1}[precision]


def test_finite_differences_of_fast_time_features_in_16_bits_are_an_error(tmp_path: Path) -> None:
    options = {"derivative": "finite_difference", "student": StudentOptions(time_embedding="original")}
    with pytest.raises(ConfigurationError, match=r"1000 rad.*student\.time_embedding to smooth"):
        fit(tmp_path, method(**options), precision="bf16-mixed")


def test_check_leaves_random_state_and_training_mode_unchanged(tmp_path: Path) -> None:
    module = method()
    fit(tmp_path, module, max_steps=0)
    module.student.train()
    state = torch.get_rng_state()
    report = check(module)
    assert torch.equal(state, torch.get_rng_state())
    assert module.student.training
    assert report.compiled == ()
    assert not report.sharded


def test_report_names_compiled_modules(tmp_path: Path) -> None:
    module = method()
    module.student.layers[0] = torch.compile(module.student.layers[0], backend="eager")
    fit(tmp_path, module, max_steps=0)
    report = check(module)
    assert report.compiled == ("layers.0",)
    assert "1 compiled modules run eagerly within it (layers.0)" in str(report)


def test_unknown_derivative_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"model\.derivative is 'numerical'"):
        method(derivative="numerical")


class RoutingAdapter(GaussianAdapter):
    """Records the number of the context of frozen routing around each pass of the student, or None outside of one."""

    def __init__(self) -> None:
        super().__init__("small")
        self.contexts = 0
        self.recorded: list[int | None] = []
        self._current: int | None = None

    @contextmanager
    def frozen_routing(self) -> Iterator[None]:
        self.contexts += 1
        self._current = self.contexts
        yield
        self._current = None

    def average_velocity(self, *args: Any, **kwargs: Any) -> Tensor:
        self.recorded.append(self._current)
        return super().average_velocity(*args, **kwargs)


@pytest.mark.parametrize(("derivative", "passes"), [("exact", 1), ("finite_difference", 3)])
def test_passes_of_one_derivative_have_the_same_frozen_routing(derivative: str, passes: int, tmp_path: Path) -> None:
    adapter = RoutingAdapter()
    fit(tmp_path, method(adapter=adapter, derivative=derivative))
    # The check: a derivative and the two differences that it is compared with. Then the passes of one training step.
    checked = {"exact": 5, "finite_difference": 6}[derivative]
    assert adapter.recorded == [1] * checked + [2] * passes
