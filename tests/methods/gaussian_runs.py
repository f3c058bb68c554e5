"""Short runs of any method on pictures of the Gaussian teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.methods import TeacherStudentBase
from lightning_distill.methods.networks import GuidedCondition
from tests.methods.gaussian_adapter import GAUSSIAN
from tests.methods.test_meanflow import loader, trainer


def built(module: TeacherStudentBase) -> Any:
    """With its networks."""
    module.setup("fit")
    module.configure_model()
    return module


def nothing_said(batch: int) -> GuidedCondition:
    """The condition of the empty caption, without guidance."""
    null = {"caption": torch.zeros(batch)}
    return GuidedCondition(null, null, torch.ones(batch))


def adam(lr: float) -> Any:
    """Without a memory of gradients, for what is judged by a network that moves."""
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.99))


class ScaledStudent(nn.Module):
    """One that goes to data of any mean and standard deviation; it starts with the wrong ones."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.std = nn.Parameter(torch.tensor(std))

    def forward(self, x: Tensor, r: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        """The average velocity that leads from x at t = 1 to `mean + std x` at 0."""
        return x - (self.mean + self.std * x)


def moments(module: Any) -> tuple[float, float]:
    """Mean and standard deviation of samples of one step."""
    noise = torch.randn(1024, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x0 = module.sample_latents(noise, {"caption": torch.zeros(1024)}, 1, "student")
    return x0.mean().item(), x0.std().item()


def assert_it_learns_the_data(module: Any, path: Path, steps: int) -> None:
    """A one-step student that starts with the wrong mean and standard deviation takes on the data's."""
    module.student = ScaledStudent(mean=0.0, std=0.9)
    trainer(path, max_steps=steps, max_epochs=-1, limit_val_batches=0).fit(module, loader())
    mean, std = moments(module)
    assert abs(mean - GAUSSIAN.mean) < 0.12, (mean, std)
    assert abs(std - GAUSSIAN.std) < 0.12, (mean, std)


def assert_restores(make: Callable[[], TeacherStudentBase], side: set[str], path: Path) -> None:
    """A checkpoint brings the networks of the side back, and what their optimizers remember."""
    torch.manual_seed(0)
    first = built(make())
    run = trainer(path, max_steps=2, limit_val_batches=0)
    run.fit(first, loader())
    run.save_checkpoint(path / "last.ckpt")
    torch.manual_seed(5)
    second = built(make())
    trainer(path, max_steps=2, limit_val_batches=0).fit(second, loader(), ckpt_path=path / "last.ckpt")
    assert set(second.auxiliary_trainings()) == side
    for name, network in ((name, second.get_submodule(name)) for name in ("student", *side)):
        for one, other in zip(network.parameters(), first.get_submodule(name).parameters(), strict=True):
            assert torch.equal(one, other), name
    for name, one in second.auxiliary_optimizers(spread=False).items():
        state, other = one.optimizer.state_dict()["state"], first.auxiliary_optimizers(spread=False)[name].optimizer
        assert len(state) > 0
        for place, values in other.state_dict()["state"].items():
            assert all(torch.equal(value, state[place][key]) for key, value in values.items()), name
