"""Mixtures of experts with frozen routing, against the mixture of the stand-in model."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_distill.flow.derivative import value_and_time_derivative
from lightning_distill.students.expert_routing import RoutedExperts, Routing, checkpointed
from tests.teachers.hunyuan_image3.stand_in.backbone import HunyuanMoE
from tests.teachers.hunyuan_image3.stand_in.configuration_hunyuan_image_3 import HunyuanImage3Config
from tests.teachers.hunyuan_image3.tiny_pipeline import randomize_weights


def mixture(**options: object) -> HunyuanMoE:
    stock = HunyuanMoE(HunyuanImage3Config(**options))
    randomize_weights(stock)
    return stock


def record_expert_tokens(experts: RoutedExperts) -> list[Tensor]:
    """Return a list to which each call of an expert appends its tokens."""
    seen: list[Tensor] = []
    for expert in experts.experts:
        expert.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    return seen


@pytest.mark.parametrize("shared", [False, True])
def test_routed_experts_match_the_published_mixture(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = mixture(use_mixed_mlp_moe=shared, num_experts=5, moe_topk=3)
    experts = RoutedExperts(copy.deepcopy(stock))
    assert experts.state_dict().keys() == stock.state_dict().keys()
    with pytest.raises((AssertionError, RuntimeError, ValueError)):  # the stand-in needs a GPU here, like the published code
        stock(torch.randn(1, 2, 32))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    hidden = torch.randn(2, 7, 32, requires_grad=True)
    hidden_copy = hidden.detach().clone().requires_grad_()
    expected, found = stock(hidden), experts(hidden_copy)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(hidden_copy.grad, hidden.grad)
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in experts.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_experts_without_tokens_run_and_get_gradients() -> None:
    experts = RoutedExperts(mixture(num_experts=8, moe_topk=1))
    seen = record_expert_tokens(experts)
    experts(torch.randn(1, 2, 32)).sum().backward()
    assert len(seen) == 8
    assert min(len(each) for each in seen) == 0
    assert all(parameter.grad is not None for parameter in experts.parameters())


def test_later_pass_uses_the_routing_of_the_first() -> None:
    experts = RoutedExperts(mixture())
    first, second = torch.randn(2, 1, 16, 32)
    free = experts(second)
    with Routing() as routing:
        assert torch.equal(experts(first), experts(first))
        frozen = experts(second)
    assert (frozen - free).abs().max() > 1e-3
    with routing:
        assert torch.equal(experts(second), frozen)
    assert torch.equal(experts(second), free)
    with routing, pytest.raises(RuntimeError, match="the frozen routing has 16 tokens, and this pass has 32"):
        experts(torch.randn(2, 16, 32))


def test_inner_routing_uses_the_choices_of_the_outer_routing() -> None:
    experts = RoutedExperts(mixture())
    first, second = torch.randn(2, 1, 16, 32)
    with Routing() as outer:
        experts(first)
        frozen = experts(second)
    with Routing(outer=outer):
        assert torch.equal(experts(second), frozen)


def test_recomputed_block_uses_the_same_routing() -> None:
    experts = RoutedExperts(mixture())
    seen = record_expert_tokens(experts)
    (result,) = checkpointed(lambda x: (experts(x),), torch.randn(1, 16, 32, requires_grad=True))
    loss = result.square().sum()
    first = [*seen]
    seen.clear()
    with torch.no_grad():
        experts.gate.wg.weight.data.neg_()  # simulates rounding: without frozen routing, the choice would change
    loss.backward()
    for before, after in zip(first, seen, strict=True):
        assert torch.equal(before, after)


def test_recomputation_runs_completely_before_any_backward_pass() -> None:
    """ZeRO-3 needs this order, because it releases a module's weights when its forward pass ends."""
    layer, events = nn.Linear(4, 4), []
    layer.register_forward_pre_hook(lambda *_: events.append("start"))
    layer.register_forward_hook(lambda *_: events.append("end"))
    layer.register_full_backward_pre_hook(lambda *_: events.append("backward"))
    (result,) = checkpointed(lambda x: (layer(x),), torch.randn(2, 4, requires_grad=True))
    result.sum().backward()
    assert events == ["start", "end", "start", "end", "backward"]


@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "recomputed"])
def test_derivative_is_that_under_frozen_routing(recomputed: bool) -> None:
    experts = RoutedExperts(mixture()).double()
    inner = nn.Linear(32, 32).double()

    def network(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        hidden = inner(x) * (1 + t - r)[:, None, None]
        return checkpointed(lambda x: (experts(x),), hidden)[0] if recomputed else experts(hidden)

    x, tangent = torch.randn(2, 2, 64, 32, dtype=torch.float64)
    r, t = torch.tensor([0.1, 0.2]).double(), torch.tensor([0.5, 0.9]).double()
    u, dudt = value_and_time_derivative(network, x, r, t, tangent)
    assert u.requires_grad
    assert not dudt.requires_grad

    def difference(step: float) -> Tensor:
        return (network(x + step * tangent, r, t + step) - network(x - step * tangent, r, t - step)) / (2 * step)

    with torch.no_grad():
        with Routing():
            network(x, r, t)
            frozen = difference(1e-4)
        across = difference(1e-2)
    assert (dudt - frozen).norm() / frozen.norm() < 1e-6
    assert (dudt - across).norm() / frozen.norm() > 0.1, "no token changed its experts, so the test is void"

    # The gradient of u must equal that of a plain pass.
    u.square().sum().backward()
    found = [parameter.grad.clone() for parameter in experts.parameters()]
    experts.zero_grad()
    experts(inner(x) * (1 + t - r)[:, None, None]).square().sum().backward()
    for gradient, parameter in zip(found, experts.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
