"""Norms, feed-forwards and stochastic depth."""

from __future__ import annotations

import math

import pytest
import torch

from tapct.nn.backends import Span
from tapct.nn.layers import (
    DropKey,
    LayerScale,
    Mlp,
    Subset,
    SwiGLU,
    draw_subsets,
    kept_crops,
    swiglu_hidden,
)
from tapct.nn.norm import LayerNorm

CPU = torch.device("cpu")
SPANS = (Span(4, 3), Span(6, 2))


def draw(
    spans: tuple[Span, ...], drop: float, step: int, *, branches: int = 1, **key: int
) -> list[Subset | None]:
    drop_key = DropKey(key.pop("seed", 7), step, **key)
    return draw_subsets(
        spans, branches=branches, drop=drop, rounding="stochastic", key=drop_key, device=CPU
    )


def test_layer_norm_is_the_formula_in_float64() -> None:
    norm = LayerNorm(16, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(9, 16) * 3 + 100
    wide = x.double()
    variance = ((wide - wide.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True)
    want = (wide - wide.mean(1, keepdim=True)) / (
        variance + 1e-6
    ).sqrt() * norm.weight.double() + norm.bias.double()
    torch.testing.assert_close(norm(x).double(), want, rtol=1e-4, atol=1e-4)


def test_layer_norm_of_bf16_tokens_is_computed_in_float32() -> None:
    norm = LayerNorm(64)
    x = (torch.randn(50, 64) + 30).bfloat16()
    assert norm(x).dtype == torch.float32
    torch.testing.assert_close(norm(x), norm(x.float()), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(x), norm(x.float()), rtol=0, atol=0)
    assert norm.bfloat16()(x).dtype == torch.bfloat16


def test_layer_scale_multiplies_each_channel() -> None:
    scale = LayerScale(3)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([0.0, 1.0, -2.0]))
    assert scale(torch.tensor([[5.0, 6.0, 7.0]])).tolist() == [[0.0, 6.0, -14.0]]


def test_mlp_uses_the_exact_gelu() -> None:
    mlp = Mlp(4, 8).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    active = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(mlp(x), active @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_swiglu_is_gate_times_value() -> None:
    ffn = SwiGLU(6, 24).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    width = ffn.w3.in_features
    gate = x @ ffn.w12.weight[:width].T + ffn.w12.bias[:width]
    value = x @ ffn.w12.weight[width:].T + ffn.w12.bias[width:]
    torch.testing.assert_close(
        ffn(x), (gate / (1 + (-gate).exp()) * value) @ ffn.w3.weight.T + ffn.w3.bias
    )


@pytest.mark.parametrize(
    ("hidden", "width"), [(1536, 1024), (3072, 2048), (4096, 2736), (6144, 4096), (24, 16)]
)
def test_swiglu_takes_two_thirds_rounded_up_to_eight(hidden: int, width: int) -> None:
    """4096 -> 2736 and 6144 -> 4096 are the widths of DINOv2's ViT-L and ViT-g."""
    assert swiglu_hidden(hidden) == width == SwiGLU(8, hidden).w3.in_features


def test_dinov2_rounding_drops_half_of_two_crops_and_stochastic_rounding_a_tenth() -> None:
    assert kept_crops(2, 0.1, "dinov2", 0.0) == 1
    draws = [kept_crops(2, 0.1, "stochastic", i / 1000) for i in range(1000)]
    assert sum(draws) / 1000 == pytest.approx(1.8)
    assert [kept_crops(b, 0.1, "dinov2", 0.99) for b in (1, 9, 10, 16, 20)] == [1, 8, 9, 14, 18]
    assert [kept_crops(b, 0.1, "stochastic", 0.99) for b in (1, 9, 10, 16, 20)] == [1, 8, 9, 14, 18]


@pytest.mark.parametrize("rounding", ["stochastic", "dinov2"])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.999])
def test_at_least_one_crop_is_kept(rounding: str, uniform: float) -> None:
    assert all(
        1 <= kept_crops(b, drop, rounding, uniform) <= b
        for b in range(1, 6)
        for drop in (0.0, 0.1, 0.5, 0.99)
    )


@pytest.mark.parametrize("spans", [SPANS, (Span(2, 1),), (Span(5, 1), Span(2, 3))])
@pytest.mark.parametrize("drop", [0.1, 0.3, 0.5])
def test_each_crop_is_kept_as_often_as_declared(spans: tuple[Span, ...], drop: float) -> None:
    subsets = draw(spans, drop, step=0, branches=2000)
    rows = sum(span.rows for span in spans)
    counts = torch.zeros(rows)
    for subset in subsets:
        counts += 1.0 if subset is None else torch.zeros(rows).index_fill(0, subset.row_S, 1.0)
    # a share of 2000 draws has a standard deviation below 0.0112
    torch.testing.assert_close(counts / 2000, torch.full((rows,), 1 - drop), rtol=0, atol=0.05)


def test_the_residual_is_unbiased() -> None:
    """The mean over draws of the scaled residual is the residual of all crops."""
    x, residual = torch.zeros(24, 2), torch.randn(24, 2)
    mean = torch.zeros(24, 2)
    for subset in draw(SPANS, 0.4, step=3, branches=4000):
        mean += residual if subset is None else subset.add(x, subset.take(residual))
    torch.testing.assert_close(mean / 4000, residual, rtol=0.08, atol=0.01)


def test_subsets_hold_whole_crops_in_order() -> None:
    for subset in draw(SPANS, 0.5, step=1, branches=20):
        assert subset is not None
        assert subset.spans == (Span(2, 3), Span(3, 2))
        assert subset.row_S.tolist() == sorted(subset.row_S.tolist())
        first, second = subset.row_S[:6].view(2, 3), subset.row_S[6:].view(3, 2)
        assert (first[:, 0] % 3 == 0).all() and (first - first[:, :1] == torch.arange(3)).all()
        assert ((second[:, 0] - 12) % 2 == 0).all() and (
            second - second[:, :1] == torch.arange(2)
        ).all()
        assert first.max() < 12 <= second.min()
        assert subset.scales == (2.0, 2.0)


def test_groups_are_scaled_by_their_own_counts() -> None:
    subset = Subset(torch.tensor([1, 2, 4]), (Span(2, 1), Span(1, 1)), (1.5, 2.0))
    x, residual = torch.ones(5, 2), torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    want = [[1, 1], [16, 31], [46, 61], [1, 1], [101, 121]]
    assert subset.add(x, residual).tolist() == want
    assert x.tolist() == [[1.0, 1.0]] * 5
    assert subset.take(torch.arange(5.0)[:, None]).flatten().tolist() == [1, 2, 4]


def test_equal_keys_draw_equal_subsets_and_every_part_of_the_key_counts() -> None:
    def rows(step: int = 1, **key: int) -> list[list[int]]:
        return [
            subset.row_S.tolist()
            for subset in draw((Span(16, 1),), 0.5, step, branches=4, **key)
            if subset
        ]

    base = rows(micro=0, rank=0)
    assert rows(micro=0, rank=0) == base
    others = [rows(step=2), rows(micro=1), rows(rank=1), rows(seed=8)]
    assert all(other != base for other in others)
    assert (
        len({tuple(branch) for branch in base}) == 4
    )  # attention and feed-forward of every block draw their own


def test_groups_of_equal_shape_draw_their_own_subsets() -> None:
    (subset,) = draw((Span(16, 1), Span(16, 1)), 0.5, step=1)
    assert subset is not None
    assert (subset.row_S[:8] != subset.row_S[8:] - 16).any()
