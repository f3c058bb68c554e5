"""What a run finds out about its derivative before the first step."""

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
from lightning_distill.methods.derivative_check import check_derivative
from lightning_distill.methods.meanflow import MeanFlow
from lightning_distill.methods.networks import GuidedCondition
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.student_options import StudentOptions
from tests.methods.gaussian_adapter import GaussianAdapter, SmallNetwork
from tests.tiny import save_tiny_pipeline

BATCH = {"image": torch.zeros(3, 4, 4), "prompt": "", "index": 0}


def loader() -> DataLoader[dict[str, Any]]:
    return DataLoader([BATCH] * 4, batch_size=4)  # type: ignore[arg-type]


def method(network: nn.Module | None = None, **settings: Any) -> MeanFlow:
    settings = {"solution": "differential", "equal_fraction": 0.0} | settings
    validation = ValidationOptions(nfe=(1,), height=4, width=4, average_velocity=False)
    module = MeanFlow(GaussianAdapter("small"), validation=validation, **settings)
    module.setup("fit")
    module.configure_model()
    if network is not None:
        module.student = network
    return module


def fit(path: Path, module: MeanFlow, **settings: Any) -> None:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    limits = {"max_steps": 1, "limit_val_batches": 0, "accelerator": "cpu", "log_every_n_steps": 1}
    Trainer(default_root_dir=path, **(quiet | limits | settings)).fit(module, loader())


class Student(SmallNetwork):
    """A small network whose hidden layer passes through `between`."""

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor, r: Tensor | None, t: Tensor, caption: Tensor) -> Tensor:
        return super().forward(x, r, self.between(t), caption)


class Detached(Student):
    def between(self, h: Tensor) -> Tensor:
        return h.detach()

    def forward(self, x: Tensor, r: Tensor | None, t: Tensor, caption: Tensor) -> Tensor:
        return super().forward(x.detach(), r, t, caption)


class WronglyDerived(torch.autograd.Function):
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


class Wrong(Student):
    def between(self, h: Tensor) -> Tensor:
        return WronglyDerived.apply(h)


def test_a_flux_student_is_found_exact_and_its_attention_fused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = DiffusersAdapter(save_tiny_pipeline(tmp_path / "teacher"))
    settings = {"solution": "differential", "validation": ValidationOptions(nfe=(1,), average_velocity=False)}
    module = MeanFlow(adapter, student=StudentOptions(gradient_checkpointing=True), **settings)
    logger = TensorBoardLogger(tmp_path)
    data = DataLoader([BATCH | {"image": torch.rand(3, 32, 32), "prompt": "a circle"}] * 2, batch_size=2)  # type: ignore[arg-type]
    trainer = Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", logger=logger, enable_checkpointing=False)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    (line,) = [message for message in caplog.messages if message.startswith("Derivative: ")]
    assert "exact, in float32, 2 calls of attention, fused, derived in blocks (on cpu)" in line
    events = EventAccumulator(logger.log_dir).Reload()
    assert 0 < events.Scalars("derivative/difference")[0].value < 0.01


def test_nothing_is_checked_where_the_solution_has_no_derivative(tmp_path: Path) -> None:
    fit(tmp_path, method(Detached(), solution="discrete"))
    switch = SwitchSolution(latest_step=100)
    with pytest.raises(ConfigurationError, match=r"no exact derivative.*model\.derivative to finite_difference"):
        fit(tmp_path, method(Detached(), solution="discrete"), callbacks=[switch])


def test_a_wrong_derivative_is_refused_and_differences_take_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"away from differences in float32.*finite_difference"):
        fit(tmp_path, method(Wrong()))
    fit(tmp_path, method(Wrong(), derivative="finite_difference"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_differences_take_the_place_of_the_derivative(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SmallNetwork()
    targets = []
    for derivative in ("exact", "finite_difference"):
        module = method(network, derivative=derivative)
        fit(tmp_path / derivative, module, precision=precision, max_steps=0)
        x, t = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.linspace(0.2, 1, 8)
        condition = {"caption": torch.zeros(8)}
        with module.trainer.precision_plugin.forward_context():
            u, target, logs = module.regression(x, 0.3 * t, t, GuidedCondition(condition, condition, torch.ones(8)))
        assert u.requires_grad
        assert not target.requires_grad
        targets.append(target)
        assert logs["dudt_norm"] > 0
    difference = (targets[0] - targets[1]).norm() / targets[0].norm()
    assert 0 < difference < {"32-true": 1e-3, "bf16-mixed": 0.1}[precision]


def test_differences_of_rough_time_in_low_precision_are_refused(tmp_path: Path) -> None:
    options = {"derivative": "finite_difference", "student": StudentOptions(time_embedding="original")}
    with pytest.raises(ConfigurationError, match=r"1000 rad.*student\.time_embedding to smooth"):
        fit(tmp_path, method(**options), precision="bf16-mixed")


def test_the_check_draws_nothing_and_leaves_the_student_in_training(tmp_path: Path) -> None:
    module = method()
    fit(tmp_path, module, max_steps=0)
    module.student.train()
    state = torch.get_rng_state()
    report = check_derivative(module)
    assert torch.equal(state, torch.get_rng_state())
    assert module.student.training
    assert report.compiled == ()
    assert not report.sharded


def test_compiled_modules_are_named(tmp_path: Path) -> None:
    module = method()
    module.student.layers[0] = torch.compile(module.student.layers[0], backend="eager")
    fit(tmp_path, module, max_steps=0)
    report = check_derivative(module)
    assert report.compiled == ("layers.0",)
    assert "1 compiled modules run eagerly within it (layers.0)" in str(report)


def test_an_unknown_derivative_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"model\.derivative is 'numerical'"):
        method(derivative="numerical")


class Choosing(GaussianAdapter):
    """Of a network that chooses, as mixtures of experts do; notes whether its choice was held in each of a student's passes."""

    def __init__(self) -> None:
        super().__init__("small")
        self.contexts = 0
        self.held: list[int | None] = []
        self._now: int | None = None

    @contextmanager
    def frozen_routing(self) -> Iterator[None]:
        self.contexts += 1
        self._now = self.contexts
        yield
        self._now = None

    def average_velocity(self, *args: Any, **kwargs: Any) -> Tensor:
        self.held.append(self._now)
        return super().average_velocity(*args, **kwargs)


@pytest.mark.parametrize(("derivative", "passes"), [("exact", 1), ("finite_difference", 3)])
def test_passes_that_are_compared_choose_alike(derivative: str, passes: int, tmp_path: Path) -> None:
    module = method(derivative=derivative)
    module.adapter = adapter = Choosing()
    fit(tmp_path, module)
    # A derivative and the differences that it is compared with; then the passes of one training step.
    checked = {"exact": 3, "finite_difference": 4}[derivative]
    assert adapter.held == [1] * checked + [2] * passes
