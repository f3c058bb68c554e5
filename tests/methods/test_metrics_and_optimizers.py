"""Metrics of validation images, checks of optimizers, and resets between runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods import MeanFlow
from lightning_distill.methods.validation import AverageVelocityReference
from lightning_distill.optimizers import MuonWithAdamW, WarmupCosine
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, loader, trainer


class Brightness(Metric):
    """Mean of all images, under the given names if there are any."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.names = names
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, prompts: list[str]) -> None:
        self.values.append(images.flatten(1).mean(1))

    def compute(self) -> Tensor | dict[str, Tensor]:
        mean = torch.cat(self.values).mean()
        return dict.fromkeys(self.names, mean) if self.names else mean


def method(**settings: Any) -> MeanFlow:
    return MeanFlow(GaussianAdapter("small"), validation=VALIDATION, **settings)


def test_metric_with_one_value_is_logged_for_each_nfe(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.validate(method(metric=Brightness()), loader(), verbose=False)
    assert {name for name in run.callback_metrics if "brightness" in name} == {f"val/brightness/nfe_{n}" for n in (1, 2)}
    assert 0 <= run.callback_metrics["val/brightness/nfe_1"] <= 1


def test_metric_with_several_values_is_logged_by_their_names(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.validate(method(metric=Brightness(("overall", "red"))), loader(), verbose=False)
    names = {f"val/brightness/nfe_{n}{suffix}" for n in (1, 2) for suffix in ("", "/red")}
    assert {name for name in run.callback_metrics if "brightness" in name} == names


def test_metric_with_several_values_but_no_overall_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.metric is Brightness, which computes red, blue; let it compute one"):
        trainer(tmp_path).validate(method(metric=Brightness(("red", "blue"))), loader(), verbose=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": lambda p: torch.optim.AdamW(p, weight_decay=-1)}, r"model\.optimizer .*weight_decay.*correct its init"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, betas=(2.0, 0.9))}, r"model\.optimizer does not accept its settings"),
        ({"optimizer": lambda p: MuonWithAdamW(p, adamw_lr=-1)}, r"optimizer\.adamw_lr is -1; set it to 0 or more"),
        (
            {"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
            r"model\.lr_scheduler is ReduceLROnPlateau, which needs",
        ),
        ({"lr_scheduler": lambda o: WarmupCosine(o, -1)}, r"lr_scheduler\.total_steps is -1; .* or trainer\.max_steps"),
        (
            {"lr_scheduler": lambda o: WarmupCosine(o, 10, 10)},
            r"lr_scheduler\.warmup_steps is 10; set .* below total_steps, which is 10",
        ),
        ({"lr_scheduler": lambda o: WarmupCosine(o, 10, -1)}, r"lr_scheduler\.warmup_steps is -1; set them to 0 or more"),
        (
            {"lr_scheduler": lambda o: WarmupCosine(o, 10, 5, hold_steps=5)},
            r"lr_scheduler\.warmup_steps is 5 and lr_scheduler\.hold_steps 5; set .* below total_steps",
        ),
        ({"lr_scheduler": lambda o: WarmupCosine(o, 10, last_fraction=2)}, r"lr_scheduler\.last_fraction is 2"),
        (
            {"lr_scheduler": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2, mode="up")},
            r"model\.lr_scheduler does not accept its settings \(mode is invalid",
        ),
    ],
)
def test_optimizers_are_checked_before_loading(settings: Any, message: str) -> None:
    module = method(**settings)
    with pytest.raises(ConfigurationError, match=message):
        module.setup("fit")
    assert not module.networks.built


def test_warmup_cosine_holds_then_warms_up_then_follows_a_cosine() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, 11, 4, last_fraction=0.1, hold_steps=3)
    rates = []
    for _ in range(13):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:8] == [0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[9] == pytest.approx(2 * (0.1 + 0.9 / 2))  # half of the way from the warm-up's end to the last step
    assert rates[11:] == pytest.approx([0.2, 0.2])


def test_second_run_measures_and_encodes_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, events, counts = method(cache_latents=True), [], []
    measure = AverageVelocityReference.measure
    monkeypatch.setattr(AverageVelocityReference, "measure", lambda *args: events.append("measured") or measure(*args))
    monkeypatch.setattr(module.adapter, "encode_images", lambda images: events.append("encoded") or images)
    for _ in range(2):
        trainer(tmp_path, max_steps=1, max_epochs=1).fit(module, loader(), loader())
        counts.append((events.count("measured"), events.count("encoded")))
    assert counts[0] == (1, 2)  # images of the first step, and of validation
    assert counts[1] == (2, 4)
