import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distill.methods.divergence import DivergenceWeight


def test_forward_kl_weight_is_the_normalised_density_ratio() -> None:
    torch.manual_seed(0)
    weight, tau = DivergenceWeight("forward_kl"), torch.full((4096,), 0.5)
    for _ in range(500):
        scores = 0.5 * torch.randn(4096, 3)
        found = weight(scores, tau)
    assert found.mean().item() == pytest.approx(1, abs=0.02)
    expected = scores.mean(1).exp()
    torch.testing.assert_close(found, expected / expected.mean(), rtol=0.02, atol=0.02)


def test_constant_score_errors_of_a_noise_level_are_corrected() -> None:
    """Scores that are too high by a constant at a noise level have the weights of right scores, in batches of one as well."""
    weight = DivergenceWeight("jensen_shannon")
    for _ in range(1200):
        low, high = weight(torch.zeros(1, 2), torch.tensor([0.15])), weight(torch.full((1, 2), 3.0), torch.tensor([0.95]))
    assert low.item() == pytest.approx(1, abs=0.02)
    assert high.item() == pytest.approx(1, abs=0.02)
    assert weight(torch.full((1, 2), 1.0), torch.tensor([0.15])).item() > 1.3


def test_checkpoint_restores_the_running_means() -> None:
    weight = DivergenceWeight("jeffreys")
    weight(torch.randn(8, 2), torch.rand(8))
    other = DivergenceWeight("jeffreys")
    other.load_state_dict(copy.deepcopy(weight.state_dict()))
    scores, tau = torch.randn(8, 2), torch.rand(8)
    assert torch.equal(other(scores, tau), weight(scores, tau))


def test_running_means_include_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, one, another = (DivergenceWeight("forward_kl") for _ in range(3))
    first, second = torch.randn(2, 8, 3)
    tau, sent = torch.rand(8), list[Tensor]()
    alone(torch.cat([first, second]), torch.cat([tau, tau]))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda found: sent.append(found.clone()))
    another(second, tau)
    monkeypatch.setattr(dist, "all_reduce", lambda found: found.add_(sent.pop(0)))
    one(first, tau)
    torch.testing.assert_close(one.mean_ratio, alone.mean_ratio)
    assert not sent
