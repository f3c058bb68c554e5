import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.flow.derivative import time_derivative
from lightning_distill.flow.path import flow_step
from lightning_distill.flow.solvers import integrate
from tests.gaussian import GaussianTeacher

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class TinyTransformer(nn.Module):
    """One attention block on 4 x 4 tokens, modulated by (r, t), with every kind of operation of a FLUX block."""

    def __init__(self, channels: int = 3, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(channels, width)
        self.time = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, channels)

    def forward(self, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.embed(x.flatten(2).transpose(1, 2))
        time = torch.stack([torch.sin(3 * t), torch.cos(3 * t), torch.sin(2 * (t - r)), torch.cos(2 * (t - r))], -1)
        shift, scale = self.time(time)[:, None].chunk(2, -1)
        qkv = self.qkv(self.norm(h) * (1 + scale) + shift)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        h = h + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(h + self.mlp(h)).transpose(1, 2).reshape(batch, channels, height, width)


@pytest.fixture
def network() -> TinyTransformer:
    torch.manual_seed(0)
    return TinyTransformer()


@pytest.fixture
def batch() -> Batch:
    x, tangent = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.0, 0.2, 0.6]), torch.tensor([1.0, 0.5, 0.6]), tangent


def central_difference(network: nn.Module, batch: Batch, eps: float = 1e-5) -> Tensor:
    exact = copy.deepcopy(network).double()
    x, r, t, tangent = (part.double() for part in batch)
    with torch.no_grad():
        return (exact(x + eps * tangent, r, t + eps) - exact(x - eps * tangent, r, t - eps)) / (2 * eps)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def test_float32_derivative_matches_float64_central_difference(network, batch):
    _, dudt = time_derivative(network, *batch)
    assert relative_error(dudt, central_difference(network, batch)) < 1e-5


def test_float64_derivative_matches_central_difference_within_its_error(network, batch):
    double = copy.deepcopy(network).double()
    _, dudt = time_derivative(double, *(part.double() for part in batch))
    assert relative_error(dudt, central_difference(network, batch)) < 1e-8


def test_value_equals_the_network_output(network, batch):
    x, r, t, tangent = batch
    u, _ = time_derivative(network, x, r, t, tangent)
    torch.testing.assert_close(u, network(x, r, t))


def test_time_derivative_has_no_graph_and_leaves_autograd_intact(network, batch):
    x, r, t, tangent = batch
    x.requires_grad_()
    tangent.requires_grad_()
    u, dudt = time_derivative(network, x, r, t, tangent)
    assert not u.requires_grad
    assert not dudt.requires_grad
    assert torch.is_grad_enabled()
    network(x, r, t).sum().backward()
    assert x.grad is not None


def test_r_is_constant_even_if_it_is_the_same_tensor_as_t(batch):
    x, _, t, tangent = batch
    _, dudt = time_derivative(lambda x, r, t: x * (t**2 * r)[:, None, None, None], x, t, t, tangent)
    t_ = t[:, None, None, None]
    torch.testing.assert_close(dudt, tangent * t_**3 + x * 2 * t_ * t_)


def test_times_stay_float32_with_bfloat16_states(batch):
    x, r, t, tangent = batch
    seen: dict[str, torch.dtype] = {}

    def fn(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        seen.update(x=x.dtype, r=r.dtype, t=t.dtype)
        return x * t.to(x.dtype)[:, None, None, None]

    _, dudt = time_derivative(fn, x.bfloat16(), r, t, tangent)
    assert seen == {"x": torch.bfloat16, "r": torch.float32, "t": torch.float32}
    expected = tangent * t[:, None, None, None] + x
    assert ((dudt.float() - expected).norm() / expected.norm()).item() < 0.01


def test_module_hooks_run_within_the_derivative(network, batch):
    calls: list[str] = []
    network.mlp.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    network.mlp.register_forward_hook(lambda module, inputs, output: calls.append("after"))
    time_derivative(network, *batch)
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    "lossy",
    [
        lambda x, r, t: x.detach() * 2,
        lambda x, r, t: torch.from_numpy(x.detach().numpy()) + 1,
        lambda x, r, t: torch.zeros_like(x),
    ],
)
def test_lost_tangent_raises(batch, lossy):
    with pytest.raises(RuntimeError, match="lost its tangent"):
        time_derivative(lossy, *batch)


def test_compiled_module_runs_eagerly_and_preserves_the_tangent(network, batch):
    ran: list[bool] = []

    def lossy_backend(graph, inputs):
        def run(*args):
            ran.append(True)
            return tuple(out.detach() for out in graph(*args))

        return run

    compiled = torch.compile(network, backend=lossy_backend)
    with torch.no_grad():
        compiled(*batch[:3])
    assert ran, "the backend must have been in use"
    ran.clear()
    _, dudt = time_derivative(compiled, *batch)
    assert not ran
    assert relative_error(dudt, central_difference(network, batch)) < 1e-5


def test_compiled_caller_gives_the_same_derivative(network, batch):
    graphs: list[torch.fx.GraphModule] = []

    def recording_backend(graph, inputs):
        graphs.append(graph)
        return graph

    def correction(x: Tensor, r: Tensor, t: Tensor, tangent: Tensor) -> Tensor:
        _, dudt = time_derivative(network, x.sin(), r, t, tangent)
        return dudt.cos()

    result = torch.compile(correction, backend=recording_backend)(*batch)
    assert graphs, "the backend must have been in use"
    torch.testing.assert_close(result, correction(*batch))


@pytest.fixture
def gaussian() -> tuple[GaussianTeacher, Tensor, Tensor, Tensor]:
    x_t = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.7], dtype=torch.float64)
    r = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.69], dtype=torch.float64)
    return GaussianTeacher(mean=0.7, std=0.4), x_t, r, t


def test_closed_form_average_velocity_matches_the_flow_map(gaussian):
    teacher, x_t, r, t = gaussian
    u = teacher.average_velocity(x_t, r, t)
    torch.testing.assert_close(flow_step(x_t, u, r, t), teacher.flow_map(x_t, t, r))
    torch.testing.assert_close(teacher.average_velocity(x_t, t, t), teacher.velocity(x_t, t))
    torch.testing.assert_close(integrate(teacher.velocity, x_t, t, r, 400, "heun"), flow_step(x_t, u, r, t), rtol=0, atol=1e-4)


def test_closed_form_average_velocity_satisfies_the_meanflow_identity(gaussian):
    teacher, x_t, r, t = gaussian
    v = teacher.velocity(x_t, t)
    u, dudt = time_derivative(teacher.average_velocity, x_t, r, t, v)
    torch.testing.assert_close(v - (t - r)[:, None, None, None] * dudt, u, rtol=1e-10, atol=1e-10)
    assert (dudt.abs().amax((1, 2, 3)) > 0.1).all(), "the identity would hold trivially"


def test_meanflow_identity_fails_without_the_velocity_as_tangent(gaussian):
    teacher, x_t, r, t = gaussian
    v = teacher.velocity(x_t, t)
    u, dudt = time_derivative(teacher.average_velocity, x_t, r, t, torch.zeros_like(v))
    assert ((v - (t - r)[:, None, None, None] * dudt - u).abs().amax((1, 2, 3))[r < t - 0.1] > 0.1).all()
