"""Rotary positions against complex multiplication in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tapct.nn import rope
from tapct.nn.rope import Config, Rotation

CPU = torch.device("cpu")
PLAIN = Config()
PATCH = (4, 8, 16)
GRID = (2, 3, 5)  # H != W, and neither is the depth
SPACING = ((5.0, 0.8, 0.7), (1.0, 0.5, 0.9))
SHORTEST = {"normalised": 1.0, "voxel": 16.0, "mm": 32.0}


def rotation(
    config: Config = PLAIN,
    head_dim: int = 64,
    grid: tuple[int, int, int] = GRID,
    spacing: tuple[tuple[float, ...], ...] = SPACING,
    num_prefix: int = 3,
    scale_B3: Tensor | None = None,
) -> Rotation:
    return rope.group_rotation(
        config,
        head_dim,
        grid=grid,
        patch=PATCH,
        num_crops=len(spacing),
        num_prefix=num_prefix,
        spacing_mm_B3=torch.tensor(spacing),
        scale_B3=scale_B3,
        device=CPU,
    )


def place(kind: str, index: int, n: int, side: int, mm: float) -> float:
    """Where the centre of a patch lies, as the config defines it; the centre of the crop is 0."""
    if kind == "normalised":
        return 2 * (index + 0.5) / n - 1
    voxel = (index + 0.5) * side - n * side / 2
    return voxel if kind == "voxel" else voxel * mm


def turn_slowly(
    x_THC: Tensor, kind: str, head_dim: int, num_prefix: int, base: float = 100.0
) -> np.ndarray:
    """Each token and each pair by itself, as a complex number times exp(i angle)."""
    out = x_THC.double().numpy().copy()
    num_pairs = head_dim // 6
    row = 0
    for spacing in SPACING:
        row += num_prefix
        for index in itertools.product(*map(range, GRID)):
            for axis, pair in itertools.product(range(3), range(num_pairs)):
                where = place(kind, index[axis], GRID[axis], PATCH[axis], spacing[axis])
                angle = 2 * math.pi * where / (SHORTEST[kind] * base ** (pair / num_pairs))
                first = axis * num_pairs + pair
                second = first + 3 * num_pairs
                turned = (out[row, :, first] + 1j * out[row, :, second]) * np.exp(1j * angle)
                out[row, :, first], out[row, :, second] = turned.real, turned.imag
            row += 1
    assert row == len(out)
    return out


def heads(head_dim: int, num_prefix: int = 3) -> Tensor:
    rows = len(SPACING) * (num_prefix + math.prod(GRID))
    return torch.randn(rows, 2, head_dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", SHORTEST)
@pytest.mark.parametrize("head_dim", [64, 6, 8, 32, 80])
def test_turning_is_complex_multiplication(kind: str, head_dim: int) -> None:
    x_THC = heads(head_dim)
    got = rotation(Config(coordinates=kind), head_dim).turn(x_THC)
    np.testing.assert_allclose(got.numpy(), turn_slowly(x_THC, kind, head_dim, 3), atol=2e-5)


def test_a_head_of_64_has_10_pairs_per_axis_and_4_channels_that_stay() -> None:
    turn = rotation()
    assert turn.cos_TR.shape == (2 * 33, 30)
    x_THC = heads(64)
    moved = (turn.turn(x_THC) != x_THC).any(0).any(0)
    assert moved.nonzero().flatten().tolist() == list(range(60))


def test_prefix_tokens_stay_to_the_bit() -> None:
    x_THC = heads(64).unflatten(0, (2, 33))
    got = rotation().turn(x_THC.flatten(0, 1)).unflatten(0, (2, 33))
    assert torch.equal(got[:, :3], x_THC[:, :3])
    assert (got[:, 3:] != x_THC[:, 3:]).flatten(2).any(2).all()


def test_lengths_of_queries_and_keys_are_kept() -> None:
    x_THC = heads(64).double()
    torch.testing.assert_close(
        rotation().turn(x_THC).norm(dim=2), x_THC.norm(dim=2), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", SHORTEST)
def test_scores_depend_on_differences_of_places_alone(kind: str) -> None:
    """One query and one key everywhere: equal steps between two patches give equal scores."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 1, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    turn = rotation(Config(coordinates=kind), spacing=SPACING[:1], num_prefix=0)
    num = math.prod(GRID)
    scores = turn.turn(q.expand(num, -1, -1))[:, 0] @ turn.turn(k.expand(num, -1, -1))[:, 0].T
    places = list(itertools.product(*map(range, GRID)))
    by_step: dict[tuple[int, ...], list[float]] = {}
    for (i, a), (j, b) in itertools.product(enumerate(places), enumerate(places)):
        by_step.setdefault(tuple(p - r for p, r in zip(a, b, strict=True)), []).append(
            float(scores[i, j])
        )
    assert len(by_step) == 3 * 5 * 9
    assert all(max(each) - min(each) < 1e-4 for each in by_step.values())
    means = [each[0] for each in by_step.values()]
    assert float(np.std(means)) > 0.1


def test_the_same_places_in_mm_at_two_spacings_turn_alike() -> None:
    """The same body at a third of the spacing: every third patch has the centre of a coarse one,
    and turns like it.
    """
    config = Config(coordinates="mm")
    coarse = rope.coordinates(config, (3, 3, 3), PATCH, torch.tensor([[2.0, 1.0, 0.5]]), CPU)
    fine = rope.coordinates(config, (9, 9, 9), PATCH, torch.tensor([[2.0, 1.0, 0.5]]) / 3, CPU)
    for few, many in zip(coarse, fine, strict=True):
        torch.testing.assert_close(few, many[:, 1::3])
    one, two = (rotation(config, grid=grid, spacing=(mm,), num_prefix=0) for grid, mm in (
        ((3, 3, 3), (2.0, 1.0, 0.5)), ((9, 9, 9), (2 / 3, 1 / 3, 0.5 / 3))
    ))  # fmt: skip
    same = two.cos_TR.unflatten(0, (9, 9, 9))[1::3, 1::3, 1::3].flatten(0, 2)
    torch.testing.assert_close(one.cos_TR, same, rtol=0, atol=1e-5)
    other = rotation(config, grid=(3, 3, 3), spacing=((2.0, 1.0, 0.6),), num_prefix=0)
    assert not torch.allclose(one.cos_TR, other.cos_TR, atol=1e-3)


def test_axes_are_not_mistaken_for_each_other() -> None:
    turn = rotation(spacing=SPACING[:1], num_prefix=0).sin_TR.unflatten(0, GRID)
    for axis in range(3):
        own = turn[..., 10 * axis : 10 * (axis + 1)].movedim(axis, 0)
        assert (own == own[:, :1, :1]).all()
        assert (own[0] != own[-1]).any()


def test_periods_are_those_of_dinov3() -> None:
    got = rope.periods(Config(), 64, CPU).double()
    torch.testing.assert_close(got, 100 ** (torch.arange(10) / 10).double(), rtol=1e-6, atol=0)


def test_drawn_scales_are_log_uniform_within_their_limits_and_keyed() -> None:
    def draw(config: Config, seed: int = 0, step: int = 0, num: int = 4000) -> Tensor:
        scales = rope.draw_scales(config, num, seed=seed, counters=(step, 0, 0, 0), device=CPU)
        assert scales is not None
        return scales

    assert rope.draw_scales(Config(), 4, seed=0, counters=(0,), device=CPU) is None
    jitter, rescale = draw(Config(jitter=1.5)).log(), draw(Config(rescale=2.0)).log()
    for logs, most in ((jitter, math.log(1.5)), (rescale, math.log(2.0))):
        assert logs.abs().max() <= most and abs(float(logs.mean())) < 0.03 * most * 3
        assert float(logs.std()) == pytest.approx(most / math.sqrt(3), rel=0.03)
    assert (rescale == rescale[:, :1]).all() and abs(np.corrcoef(jitter.T.numpy())[0, 1]) < 0.05
    assert torch.equal(draw(Config(jitter=1.5)), draw(Config(jitter=1.5)))
    assert not torch.equal(draw(Config(jitter=1.5)), draw(Config(jitter=1.5), step=1))
    assert not torch.equal(draw(Config(jitter=1.5)), draw(Config(jitter=1.5), seed=1))
    assert torch.equal(draw(Config(jitter=1.5))[:3], draw(Config(jitter=1.5), num=3))


def test_a_drawn_scale_stretches_its_own_crop_and_axis() -> None:
    scale_B3 = torch.ones(2, 3)
    scale_B3[1, 2] = 1.3
    plain, stretched = rotation(num_prefix=0), rotation(num_prefix=0, scale_B3=scale_B3)
    moved = (plain.sin_TR - stretched.sin_TR).abs().amax(0) > 1e-3
    assert moved.nonzero().flatten().tolist() == list(range(20, 30))
    assert torch.equal(
        plain.sin_TR[: len(plain.sin_TR) // 2], stretched.sin_TR[: len(plain.sin_TR) // 2]
    )


CHANGES = {
    "coordinates": "voxel", "axes": "yx", "base": 50.0, "shortest": 2.0, "jitter": 1.5,
    "rescale": 1.5,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_every_field_changes_the_rotation(name: str) -> None:
    def table(config: Config) -> Tensor:
        scale_B3 = rope.draw_scales(config, 2, seed=0, counters=(0,), device=CPU)
        return rotation(config, scale_B3=scale_B3).sin_TR

    changed = dataclasses.replace(Config(), **{name: CHANGES[name]})  # type: ignore[arg-type]
    before, after = table(Config()), table(changed)
    assert before.shape != after.shape or not torch.allclose(before, after)


def test_with_axes_yx_layers_have_equal_positions_and_a_head_has_more_periods() -> None:
    turned = rotation(dataclasses.replace(PLAIN, axes="yx"), num_prefix=0)
    assert turned.cos_TR.shape == (2 * 30, 32)  # 64 channels: 16 pairs for each of y and x
    lower, upper = turned.sin_TR[:30].split(15)
    assert torch.equal(lower, upper)
    y_equal = turned.sin_TR[:5, :16]
    assert torch.equal(y_equal, y_equal[:1].expand(5, -1))


def test_bf16_queries_are_turned_in_float32() -> None:
    x_THC = heads(64).bfloat16()
    got = rotation().turn(x_THC)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, rotation().turn(x_THC.float()), rtol=0, atol=0)
