"""The backward pass of attention in blocks against attention written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tapct.nn import attention_blocks, backends
from tapct.nn.attention_blocks import RowBlocks
from tapct.nn.backends import BACKENDS, Span

B, H, C = 2, 3, 5


def draw(num_tokens: int, dtype: torch.dtype, size: float = 1.0) -> list[Tensor]:
    """Queries, keys, values and the gradient of the result: (B, H, N, C), packed as in a model."""
    generator = torch.Generator().manual_seed(num_tokens)
    packed = torch.randn(B, num_tokens, 4, H, C, generator=generator, dtype=torch.float64)
    packed[:, :, :2] *= size
    return list(packed.to(dtype).transpose(1, 3).unbind(2))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Result, and the log-sum-exp of each query."""
    scores = q @ k.mT / math.sqrt(C)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """Gradients of queries, keys and values, from result and norms in float64."""
    out, norms = written_out(q.double(), k.double(), v.double())
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    attention_blocks.differentiate(dout, q, k, v, out.to(q.dtype), norms.to(wide), (dq, dk, dv))
    return [dq, dk, dv]


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    return list(torch.autograd.grad(written_out(*leaves)[0], leaves, dout.double()))


@pytest.mark.parametrize("num_tokens", [1, 7, 70, 129])
@pytest.mark.parametrize("block_bytes", [1, 8 * 40 * 70, 1 << 23])
def test_blocks_have_the_gradients_of_attention_written_out(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, block_bytes: int
) -> None:
    monkeypatch.setattr(attention_blocks, "BLOCK_BYTES", block_bytes)
    inputs = draw(num_tokens, torch.float64)
    for found, wanted in zip(in_blocks(*inputs), exact(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_plan_does_not_depend_on_the_cpu_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "has_avx512_bf16", lambda: True)
    real = torch.zeros(1, 2, backends.LONG_CROP, 8, dtype=torch.bfloat16)
    assert backends._fits_blocks(real)
    with FakeTensorMode() as mode:
        assert not backends._fits_blocks(mode.from_tensor(real))


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("size", [0.3, 3.0], ids=["even shares", "uneven shares"])
def test_in_bf16_the_error_is_of_the_size_of_that_of_torchs_kernel(
    monkeypatch: pytest.MonkeyPatch, size: float, amx: bool
) -> None:
    monkeypatch.setattr(attention_blocks, "has_amx", lambda: amx)  # which decides the padding
    q, k, v, dout = inputs = draw(333, torch.bfloat16, size)
    wanted = exact(*inputs)
    out, norms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    torchs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, norms, 0.0, False
    )
    for name, ours, theirs, right in zip("qkv", in_blocks(*inputs), torchs, wanted, strict=True):
        error, limit = ((x.double() - right).norm() / right.norm() for x in (ours, theirs))
        assert error < 2.5 * limit + 1e-3, f"d{name}: {error:.1e}, torch's kernel {limit:.1e}"


def test_blocks_cover_every_row_once_and_their_size_is_bounded() -> None:
    for num_tokens in (1, 300, 1760, 2368, 9000):
        blocks = RowBlocks(12, num_tokens, torch.bfloat16)
        rows = [row for r in blocks.rows() for row in range(r.start, r.stop)]
        assert rows == list(range(num_tokens))
        assert 2 * blocks.num_rows * num_tokens <= attention_blocks.BLOCK_BYTES + 64 * num_tokens
        assert [s.start for s in blocks.sequences()] == list(range(0, 12, blocks.at_once))


@pytest.mark.parametrize("kind", ["has_amx", "has_avx512_bf16"])
def test_long_crops_in_bf16_take_the_blocks_on_cpus_with_bf16_products_and_no_others(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    calls: list[int] = []
    plain = attention_blocks.differentiate

    def noted(dout: Tensor, q: Tensor, *rest: Any) -> None:
        calls.append(q.shape[2])
        plain(dout, q, *rest)

    monkeypatch.setattr(attention_blocks, "differentiate", noted)
    spans = (Span(1, 310), Span(2, 20))
    for name in ("has_amx", "has_avx512_bf16"):
        monkeypatch.setattr(attention_blocks, name, lambda: False)
    for has in (False, True):
        monkeypatch.setattr(attention_blocks, kind, lambda has=has: has)
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(350, 2, 8).to(dtype).requires_grad_() for _ in range(3))
            gradients = [
                torch.autograd.grad(BACKENDS["sdpa"](q, k, v, spans).float().sum(), (q, k, v))
                for _ in range(2)
            ]
            for first, second in zip(*gradients, strict=True):
                assert torch.equal(first, second)
    assert calls == [310, 310]
    assert backends.LONG_CROP < 310
