"""Attention back-ends against attention written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tapct.nn.attention import BACKENDS, Attention, Span, Spans
from tapct.types import UserError

SPANS = (Span(3, 7), Span(2, 5), Span(1, 1))


def attend_slowly(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, spans: Spans) -> Tensor:
    """One crop, one head, one query at a time, in float64."""
    out = torch.zeros_like(v_THC, dtype=torch.float64)
    start = 0
    for span in spans:
        for _ in range(span.crops):
            rows = range(start, start + span.tokens)
            for head in range(q_THC.shape[1]):
                for i in rows:
                    scores = torch.stack([q_THC[i, head].double() @ k_THC[j, head].double() for j in rows])
                    weights = (scores / math.sqrt(q_THC.shape[2])).exp()
                    out[i, head] = sum(w * v_THC[j, head].double() for w, j in zip(weights, rows)) / weights.sum()
            start += span.tokens
    return out


def packed_qkv(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = sum(span.rows for span in SPANS)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, 3, 2, 8, generator=generator, dtype=torch.float64).to(dtype)
    q, k, v = qkv.unbind(1)
    return q, k, v


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_every_backend_agrees_with_attention_written_out(name: str, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = packed_qkv(dtype)
    torch.testing.assert_close(
        BACKENDS[name](q, k, v, SPANS).double(), attend_slowly(q, k, v, SPANS), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_the_gradients_of_attention_written_out(name: str) -> None:
    q, k, v = leaves = [part.clone().requires_grad_() for part in packed_qkv(torch.float64)]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = torch.autograd.grad((BACKENDS[name](q, k, v, SPANS) * weight).sum(), leaves)

    tokens = torch.tensor([span.tokens for span in SPANS for _ in range(span.crops)])
    crop = torch.repeat_interleave(torch.arange(6), tokens)
    scores = torch.einsum("ihc,jhc->hij", q, k) / math.sqrt(8)
    shares = scores.masked_fill(crop[:, None] != crop[None, :], -math.inf).softmax(-1)
    slow = torch.autograd.grad((torch.einsum("hij,jhc->ihc", shares, v) * weight).sum(), leaves)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_of_one_crop_never_reach_another(name: str) -> None:
    q, k, v = packed_qkv(torch.float32)
    before = BACKENDS[name](q, k, v, SPANS)
    changed = v.clone()
    changed[7:14] += 1.0  # the second crop of the first group
    after = BACKENDS[name](q, k, changed, SPANS)
    moved = (before - after).abs().amax((1, 2)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(7, 14))


@pytest.mark.parametrize("name", BACKENDS)
def test_no_backend_keeps_a_matrix_of_tokens_by_tokens(name: str) -> None:
    q, k, v = (torch.randn(600, 1, 8, requires_grad=True) for _ in range(3))
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        BACKENDS[name](q, k, v, (Span(1, 600),))
    assert 0 < max(kept) <= 600 * 8


def test_the_projection_is_laid_out_as_in_dinov2() -> None:
    """qkv's rows are (q, k, v) x heads x channels, so that published weights load by name."""
    attention = Attention(16, heads=2).double()
    x = torch.randn(SPANS[0].rows, 16, dtype=torch.float64)
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    q, k, v = (qkv[:, 16 * i : 16 * (i + 1)].reshape(-1, 2, 8) for i in range(3))
    want = attend_slowly(q, k, v, SPANS[:1]).flatten(1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x, SPANS[:1]), want)


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="'flash'.*sdpa"):
        Attention(16, heads=2, backend="flash")
    with pytest.raises(UserError, match="dim 16 is no multiple of heads 3"):
        Attention(16, heads=3)
