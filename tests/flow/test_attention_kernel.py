"""Adapter of the Triton kernel against blocked attention: with a fake kernel of the same limits, and with the kernel."""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.flow import attention_kernel
from lightning_distill.flow.attention_kernel import kernel_tangent, unsupported_reason
from lightning_distill.flow.derivative import value_and_time_derivative
from lightning_distill.flow.dual_rules import Dual, attention_tangent

HALF = torch.bfloat16


class FakeKernel:
    """Kernel of plain operations; like the real kernel, it returns wrong results for unsupported input."""

    def __init__(self) -> None:
        self.masks: list[Tensor | None] = []

    def __call__(self, *args: Any, verify_attn_mask: bool = True) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v, q_t, k_t, v_t, mask, dropout, causal, scale = args
        self.masks.append(mask)
        n = q.shape[2]
        valid = q.shape == k.shape == v.shape and n % 32 == 0 and dropout == 0.0
        valid &= all(x.is_contiguous() and x.dtype == q.dtype for x in (q, k, v, q_t, k_t, v_t))
        valid &= mask is None or (mask.shape == (*q.shape[:2], n, n) and mask.dtype == torch.bool and not causal)
        if not valid:
            return torch.full_like(q, 7), (torch.full_like(q, 7), q[..., 0])
        scale, dtype = q.shape[-1] ** -0.5 if scale is None else scale, q.dtype
        q, k, v, q_t, k_t, v_t = (x.double() for x in (q, k, v, q_t, k_t, v_t))
        logits, change = q @ k.mT * scale, (q_t @ k.mT + q @ k_t.mT) * scale
        seen = torch.ones(n, n, dtype=torch.bool).tril() if causal else mask
        if seen is not None:
            logits = logits.masked_fill(~seen, float("-inf"))
        p = logits.softmax(-1)
        p_t = p * (change - (p * change).sum(-1, keepdim=True))
        return (p @ v).to(dtype), ((p_t @ v + p @ v_t).to(dtype), logits.logsumexp(-1))


@pytest.fixture
def fake_kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    found = FakeKernel()
    monkeypatch.setattr(attention_kernel, "_kernel", lambda: found)
    return found


def inputs(length: int, width: int = 32) -> tuple[list[Tensor], list[Tensor | None]]:
    torch.manual_seed(0)
    values, tangents = torch.randn(2, 3, 2, length, 2, width, dtype=torch.float64).transpose(3, 4).unbind()
    return list(values), list(tangents)


def blocked_tangent(
    values: list[Tensor], tangents: list[Tensor | None], mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    out = F.scaled_dot_product_attention(*values, attn_mask=mask, is_causal=causal, scale=scale)
    return attention_tangent(*map(Dual, values, tangents), out, mask, causal, scale)


@pytest.mark.parametrize("length", [64, 40, 5])
@pytest.mark.parametrize("option", ["", "causal", "mask", "row", "constant keys"])
def test_kernel_tangent_agrees_with_blocked_attention_tangent(length: int, option: str, fake_kernel: FakeKernel) -> None:
    values, tangents = inputs(length)
    rows = 1 if option == "row" else length
    mask = torch.rand(rows, length) > 0.4 if option in ("mask", "row") else None
    if mask is not None:
        mask[:, 0] = True
        mask[1:2] = False  # a query without keys
    if option == "constant keys":
        tangents[1] = tangents[2] = None
    causal = option == "causal"
    result = kernel_tangent(tuple(values), tuple(tangents), mask, causal, 0.3, torch.float64)
    torch.testing.assert_close(result, blocked_tangent(values, tangents, mask, causal, 0.3))


def test_mask_is_created_only_for_padding(fake_kernel: FakeKernel) -> None:
    for length in (64, 40):
        values, tangents = inputs(length)
        kernel_tangent(tuple(values), tuple(tangents), None, False, None, HALF)
    assert fake_kernel.masks[0] is None
    assert fake_kernel.masks[1] is not None


def test_unsupported_reason_names_each_limit_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 64, 32)
    assert unsupported_reason(q, q, q, None, False, HALF) == "on cpu"
    monkeypatch.setattr(attention_kernel, "DEVICE", "cpu")
    monkeypatch.setattr(attention_kernel, "_installed", lambda: False)
    assert unsupported_reason(q, q, q, None, False, HALF) == "jvp_flash_attention is not installed"
    monkeypatch.setattr(attention_kernel, "_installed", lambda: True)
    assert unsupported_reason(q, q, q, None, False, HALF) is None
    assert unsupported_reason(q, q, q, torch.ones(64, 64, dtype=torch.bool), False, HALF) is None
    assert unsupported_reason(q, q, q, None, False, torch.float32) == "in float32"
    assert "shape" in (unsupported_reason(q[:, :, :32], q, q, None, False, HALF) or "")
    assert "width 24" in (unsupported_reason(q[..., :24], q[..., :24], q[..., :24], None, False, HALF) or "")
    assert "mask" in (unsupported_reason(q, q, q, torch.zeros(64, 64), False, HALF) or "")
    assert "mask" in (unsupported_reason(q, q, q, torch.ones(64, 64, dtype=torch.bool), True, HALF) or "")


def test_attention_uses_the_kernel_if_supported(monkeypatch: pytest.MonkeyPatch, fake_kernel: FakeKernel) -> None:
    def attend(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x * t, x, x * x)

    x, v = torch.randn(2, 1, 2, 40, 32, dtype=HALF)
    times = torch.zeros(1, dtype=HALF), torch.full((1,), 0.7, dtype=HALF)
    _, blocks = value_and_time_derivative(attend, x, *times, v)
    assert not fake_kernel.masks
    monkeypatch.setattr(attention_kernel, "DEVICE", "cpu")
    monkeypatch.setattr(attention_kernel, "_installed", lambda: True)
    _, kernel = value_and_time_derivative(attend, x, *times, v)
    assert len(fake_kernel.masks) == 1
    assert 0 < (kernel - blocks).norm() / blocks.norm() < 0.02


REAL_KERNEL_SCRIPT = """
import torch
from lightning_distill.flow.attention_kernel import kernel_tangent
from lightning_distill.flow.derivative import value_and_time_derivative
from lightning_distill.flow.dual_rules import Dual, attention_tangent
torch.manual_seed(0)
for length, masked, causal in ((64, False, False), (40, False, False), (40, True, False), (40, False, True)):
    values, tangents = torch.randn(2, 3, 1, 2, length, 32).unbind()
    mask = torch.rand(length, length) > 0.4 if masked else None
    if masked:
        mask[:, 0] = True
        mask[1] = False
    out = torch.nn.functional.scaled_dot_product_attention(*values, attn_mask=mask, is_causal=causal)
    blocks = attention_tangent(*map(Dual, values, tangents), out, mask, causal, None)
    found = kernel_tangent(tuple(values), tuple(tangents), mask, causal, None, torch.float32)
    torch.testing.assert_close(found, blocks, atol=1e-4, rtol=1e-4)
print("agreed")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jvp_flash_attention", "triton")),
    reason='needs the kernel: pip install -c constraints.txt -e ".[cuda]"',
)
def test_real_kernel_agrees_with_blocked_attention_tangent() -> None:
    # Triton's interpreter needs no GPU, but must be enabled before the kernel is imported.
    run = subprocess.run(
        [sys.executable, "-c", REAL_KERNEL_SCRIPT],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.stdout.endswith("agreed\n"), run.stderr
