"""Data, trainers and checks for short runs of any method on Gaussian data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_distill.flow.path import interpolate
from lightning_distill.methods import MeanFlow, Objective, TeacherStudentBase, ValidationOptions
from lightning_distill.methods.networks import GuidedCondition
from tests.methods.gaussian_adapter import GAUSSIAN, GaussianAdapter

VALIDATION = ValidationOptions(nfe=(1, 2), height=4, width=4, samples=8)


class GaussianImages(Dataset[dict[str, Any]]):
    """Gaussian images with the empty caption, so that the exact teacher generates them."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(i))
        return {"prompt": "", "image": image, "index": i}


class Captions(LightningDataModule):
    """Empty captions without images."""

    has_images = False

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader([{"prompt": "", "index": i} for i in range(64)], batch_size=8)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.train_dataloader()


def loader() -> DataLoader[dict[str, Any]]:
    """Batches of 8 images."""
    return DataLoader(GaussianImages(), batch_size=8)


def trainer(path: Path, **settings: Any) -> Trainer:
    """A trainer of four steps on the CPU, without output."""
    defaults: dict[str, Any] = {"max_steps": 4, "accelerator": "cpu", "logger": False, "log_every_n_steps": 1}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(default_root_dir=path, **(defaults | settings))


def build(module: TeacherStudentBase) -> Any:
    """The method after set-up, with its networks."""
    module.setup("fit")
    module.configure_model()
    return module


def meanflow(student: str = "exact", **settings: Any) -> MeanFlow:
    """MeanFlow with its networks, for tests of what all methods share as well."""
    module: MeanFlow = build(MeanFlow(GaussianAdapter(student), validation=VALIDATION, **settings))
    return module


def data_samples(count: int) -> Tensor:
    """Samples (B, 3, 4, 4) of the data."""
    return GAUSSIAN.mean + GAUSSIAN.std * torch.randn(count, 3, 4, 4)


def path_states(start: float = 0.2) -> tuple[Tensor, Tensor]:
    """16 states x_t (B, 3, 4, 4) of the path, at times t (B,) from `start` to 1."""
    t = torch.linspace(start, 1.0, 16)
    return interpolate(data_samples(16), torch.randn(16, 3, 4, 4), t), t


def empty_captions(count: int) -> dict[str, Tensor]:
    """Conditions of B empty captions."""
    return {"caption": torch.zeros(count)}


def unguided(count: int) -> GuidedCondition:
    """Condition of B empty captions at guidance scale 1."""
    return GuidedCondition(empty_captions(count), empty_captions(count), torch.ones(count))


def evaluate_with_steps_of(networks: set[str], module: TeacherStudentBase, x0: Tensor) -> Objective:
    """The objective of images with empty captions; of the auxiliary networks, only those at the given paths train."""
    steps = module.objective(x0, empty_captions(len(x0)))
    assert not isinstance(steps, Objective)
    while True:
        try:
            auxiliary = next(steps)
        except StopIteration as finished:
            objective: Objective = finished.value
            return objective
        if auxiliary.network in networks:
            module.auxiliary.step(auxiliary)


def adam(lr: float) -> Any:
    """Adam without momentum, for losses whose target moves with the networks."""
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.99))


class ScaledStudent(nn.Module):
    """A student whose one-step samples have a trainable mean and standard deviation."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.std = nn.Parameter(torch.tensor(std))

    def forward(self, x: Tensor, r: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        """The average velocity from x at t = 1 to `mean + std x` at 0."""
        return x - (self.mean + self.std * x)


def moments(module: Any) -> tuple[float, float]:
    """Mean and standard deviation of one-step samples of the student."""
    noise = torch.randn(1024, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x0 = module.evaluator.sample_latents(noise, empty_captions(1024), 1, "student")
    return x0.mean().item(), x0.std().item()


def assert_learns_moments_of_the_data(module: Any, path: Path, steps: int) -> None:
    """Training corrects a one-step student whose samples have a wrong mean and standard deviation."""
    module.networks.student = ScaledStudent(mean=0.0, std=0.9)
    trainer(path, max_steps=steps, max_epochs=-1, limit_val_batches=0).fit(module, loader())
    mean, std = moments(module)
    assert abs(mean - GAUSSIAN.mean) < 0.12, (mean, std)
    assert abs(std - GAUSSIAN.std) < 0.12, (mean, std)


def assert_restores_auxiliary_networks(make: Callable[[], TeacherStudentBase], paths: set[str], directory: Path) -> None:
    """A checkpoint restores the auxiliary networks and the states of their optimizers."""
    torch.manual_seed(0)
    first = build(make())
    run = trainer(directory, max_steps=2, limit_val_batches=0)
    run.fit(first, loader())
    run.save_checkpoint(directory / "last.ckpt")
    torch.manual_seed(5)
    second = build(make())
    trainer(directory, max_steps=2, limit_val_batches=0).fit(second, loader(), ckpt_path=directory / "last.ckpt")
    assert set(second.auxiliary.paths) == paths
    for path in ("networks.student", *paths):
        for one, other in zip(second.get_submodule(path).parameters(), first.get_submodule(path).parameters(), strict=True):
            assert torch.equal(one, other), path
    for path, auxiliary in second.auxiliary_optimizers().items():
        state, expected = auxiliary.optimizer.state_dict()["state"], first.auxiliary_optimizers()[path].optimizer.state_dict()
        assert len(state) > 0
        for index, values in expected["state"].items():
            assert all(torch.equal(value, state[index][name]) for name, value in values.items()), path
