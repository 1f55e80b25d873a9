"""Resized positions against torch's own interpolation and a loop over scalars."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tapct.nn.posembed import axis_matrix, resize_positions

CPU = torch.device("cpu")


def positions(grid: tuple[int, int, int], channels: int = 5) -> torch.Tensor:
    return torch.randn(
        grid[0] * grid[1] * grid[2], channels, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("grid", [(3, 28, 28), (1, 14, 14), (3, 5, 7), (7, 5, 3), (1, 1, 6)])
def test_positions_are_untouched_at_native_size(grid: tuple[int, int, int]) -> None:
    pos = positions(grid)
    assert torch.equal(resize_positions(pos, grid, grid), pos)


@pytest.mark.parametrize(
    ("native", "grid"),
    [((1, 5, 7), (1, 7, 5)), ((1, 28, 28), (1, 12, 12)), ((1, 4, 9), (1, 11, 3))],
)
def test_cubic_positions_are_torchs_bicubic_in_plane(
    native: tuple[int, int, int], grid: tuple[int, int, int]
) -> None:
    pos = positions(native)
    image = pos.view(native[1], native[2], -1).permute(2, 0, 1)[None]
    want = (
        F.interpolate(image, size=grid[1:], mode="bicubic", align_corners=False)[0]
        .permute(1, 2, 0)
        .reshape(-1, 5)
    )
    torch.testing.assert_close(resize_positions(pos, native, grid), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("native", "grid"), [((3, 5, 7), (2, 7, 5)), ((2, 8, 8), (5, 4, 4)), ((3, 28, 28), (3, 12, 12))]
)
def test_linear_positions_are_torchs_trilinear(
    native: tuple[int, int, int], grid: tuple[int, int, int]
) -> None:
    pos = positions(native)
    volume = pos.view(*native, -1).permute(3, 0, 1, 2)[None]
    want = (
        F.interpolate(volume, size=grid, mode="trilinear", align_corners=False)[0]
        .permute(1, 2, 3, 0)
        .reshape(-1, 5)
    )
    torch.testing.assert_close(
        resize_positions(pos, native, grid, "linear"), want, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("grid", [(3, 28, 28), (5, 28, 28), (3, 12, 12), (6, 32, 20), (1, 7, 40)])
def test_linear_positions_of_published_weights_equal_trilinear_to_a_millionth(
    grid: tuple[int, int, int],
) -> None:
    native = (3, 28, 28)
    pos = 0.02 * positions(native, 64)
    volume = pos.view(*native, -1).permute(3, 0, 1, 2)[None]
    want = F.interpolate(volume, size=grid, mode="trilinear", align_corners=False)[0]
    got = resize_positions(pos, native, grid, "linear")
    assert float((got - want.permute(1, 2, 3, 0).reshape(-1, 64)).abs().max()) < 1e-6


@pytest.mark.parametrize("grid", [(1, 16, 16), (1, 16, 37), (1, 12, 50), (1, 37, 37)])
def test_with_an_offset_they_are_dinov2s_bicubic_by_scale_factor(
    grid: tuple[int, int, int],
) -> None:
    """DINOv2 leaves a square of the native size alone, and resizes all else by a factor."""
    native = (1, 37, 37)
    pos = positions(native)
    maps = pos.double().T.reshape(1, -1, 37, 37)
    if grid != native:
        scale = ((grid[1] + 0.1) / 37, (grid[2] + 0.1) / 37)
        maps = F.interpolate(maps, scale_factor=scale, mode="bicubic")
    got = resize_positions(pos.double(), native, grid, "cubic", 0.1)
    torch.testing.assert_close(got, maps.flatten(2)[0].T)
    assert tuple(maps.shape[2:]) == grid[1:]


def test_with_an_offset_a_plane_of_the_native_size_keeps_its_values_at_any_depth() -> None:
    pos = positions((1, 4, 5)).repeat(3, 1)
    assert torch.allclose(
        resize_positions(pos, (3, 4, 5), (2, 4, 5), "cubic", 0.1), pos[:40], atol=1e-6
    )


def test_height_and_width_are_not_swapped() -> None:
    """A field that only depends on y must still only depend on y in a crop with other
    proportions.
    """
    y = torch.linspace(0, 1, 6)[None, :, None].expand(2, 6, 4).reshape(-1, 1)
    resized = resize_positions(y, (2, 6, 4), (3, 4, 9)).view(3, 4, 9)
    assert resized.std(1).min() > 0.1
    torch.testing.assert_close(resized, resized[:1, :, :1].expand(3, 4, 9))


@pytest.mark.parametrize("mode", ["cubic", "linear"])
def test_each_axis_is_resized_by_itself(mode: str) -> None:
    """The outer product of three axis signals stays the outer product of the three resized ones."""
    signals = [
        torch.randn(n, generator=torch.Generator().manual_seed(n)).double() for n in (3, 5, 7)
    ]
    product = torch.einsum("z,y,x->zyx", *signals).reshape(-1, 1)
    resized = [
        axis_matrix(len(s), n, mode, CPU, torch.float64) @ s
        for s, n in zip(signals, (4, 3, 9), strict=True)
    ]
    want = torch.einsum("z,y,x->zyx", *resized).reshape(-1, 1)
    torch.testing.assert_close(resize_positions(product, (3, 5, 7), (4, 3, 9), mode), want)


@pytest.mark.parametrize("mode", ["cubic", "linear"])
@pytest.mark.parametrize(("n_in", "n_out"), [(28, 12), (3, 7), (1, 4), (9, 9), (2, 1)])
def test_a_constant_stays_constant(mode: str, n_in: int, n_out: int) -> None:
    matrix = axis_matrix(n_in, n_out, mode, CPU, torch.float64)
    torch.testing.assert_close(matrix.sum(1), torch.ones(n_out, dtype=torch.float64))


def test_positions_are_resized_in_float32_even_when_they_are_bf16() -> None:
    pos = positions((3, 6, 6)).bfloat16()
    resized = resize_positions(pos, (3, 6, 6), (3, 4, 4))
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resized, resize_positions(pos.float(), (3, 6, 6), (3, 4, 4)))
    assert resize_positions(pos.double(), (3, 6, 6), (3, 4, 4)).dtype == torch.float64


def test_positions_get_the_gradient_of_the_resize() -> None:
    pos = positions((2, 3, 4), 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: resize_positions(p, (2, 3, 4), (3, 2, 5)), (pos,))
