from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from tapct.types import Batch, HUContract
from tapct.views import resample
from tapct.views.boxes import Boxes

CONTRACT = HUContract()
RANGE = CONTRACT.clip_high - CONTRACT.clip_low


def slow_axis(start: float, length: float, num_out: int, num_in: int) -> np.ndarray:
    """(num_out, num_in) float64: triangle weights over the endless line, outside columns left away
    (they are air).
    """
    scale = length / num_out
    radius = max(scale, 1.0)
    matrix = np.zeros((num_out, num_in))
    for i in range(num_out):
        centre = start + (i + 0.5) * scale
        weights = {}
        for k in range(int(centre - radius) - 3, int(centre + radius) + 4):
            weights[k] = max(0.0, 1.0 - abs(k + 0.5 - centre) / radius)
        for k, weight in weights.items():
            if 0 <= k < num_in:
                matrix[i, k] = weight / sum(weights.values())
    return matrix


def slow_view(
    hu: np.ndarray, crop: Boxes, b: int, window: tuple[int, int, int], sigma: float
) -> np.ndarray:
    """One view in float64: dense sums, then scipy's Gaussian on the finished view."""
    view = np.clip(hu.astype(np.float64), CONTRACT.clip_low, CONTRACT.clip_high) - CONTRACT.clip_low
    for axis in range(3):
        start, length = (float(t[0, b, axis]) for t in (crop.start_VB3, crop.length_VB3))
        matrix = slow_axis(start, length, window[axis], hu.shape[axis])
        view = np.moveaxis(np.tensordot(matrix, view, (1, axis)), 0, axis)
        if crop.flip_VB3[0, b, axis]:
            view = np.flip(view, axis)
    if sigma:
        view = ndimage.gaussian_filter(view, sigma, mode="reflect", truncate=8)
    return view + CONTRACT.clip_low


def boxes_of(rows: list[tuple[list[float], list[float], list[bool]]]) -> Boxes:
    start, length, flip = ([row[i] for row in rows] for i in range(3))
    return Boxes(torch.tensor([start]), torch.tensor([length]), torch.tensor([flip]))


def fast_views(
    hu: torch.Tensor,
    crops: Boxes,
    window: tuple[int, int, int],
    sigma: list[float],
    slack: float = 1.0,
) -> torch.Tensor:
    slab = (hu.shape[1], hu.shape[2], hu.shape[3])
    longest_z, longest_y, longest_x = (crops.length_VB3.amax((0, 1)) * slack).tolist()
    bound = (longest_z, longest_y, longest_x)
    maps = resample.matrices(crops, window, slab, bound, torch.tensor([sigma]), max(sigma))
    out = torch.full((len(hu), *window), float("nan"))
    resample.apply(hu, maps, 0, CONTRACT, out)
    return out


CASES = [
    ([2.0, 5.3, 7.9], [6.0, 30.0, 21.7], [False, False, False]),  # in the middle
    ([0.0, 0.0, 0.0], [6.0, 48.0, 56.0], [False, True, False]),  # the whole plane, mirrored
    (
        [11.0, 31.5, 40.2],
        [6.0, 16.5, 15.8],
        [True, False, True],
    ),  # in the far corner, beyond the last slice
    ([3.0, 10.0, 10.0], [6.0, 9.0, 7.5], [False, False, False]),  # enlarged
    ([1.25, 4.0, 0.5], [11.7, 44.0, 50.0], [False, False, False]),  # z resized too
]


@pytest.mark.parametrize("slack", [1.0, 1.6])
@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.7, 2.0])
def test_views_equal_dense_float64_sums(
    make_batch: Callable[..., Batch], sigma: float, slack: float
) -> None:
    hu = make_batch(list(range(len(CASES)))).hu_BZYX
    hu[0, :, ::7, ::5] = 3000  # above the window: the clip comes before the resampling
    hu[1, :, :9] = -2000
    window = (6, 18, 14)
    crops = boxes_of(CASES)
    got = fast_views(hu, crops, window, [sigma] * len(CASES), slack)
    for b in range(len(CASES)):
        want = slow_view(hu[b].numpy(), crops, b, window, sigma)
        assert np.abs(got[b].numpy() - want).max() < 1e-4 * RANGE


def test_the_device_path_equals_the_host_path(
    make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    hu = make_batch(list(range(len(CASES)))).hu_BZYX
    crops, sigma = boxes_of(CASES), [0.0, 2.0, 0.3, 1.0, 0.5]
    host = fast_views(hu, crops, (6, 18, 14), sigma)
    monkeypatch.setattr(resample, "_HOST", "nothing")
    contract = mock.Mock(wraps=resample._contract)
    monkeypatch.setattr(resample, "_contract", contract)
    device = fast_views(hu, crops, (6, 18, 14), sigma)
    assert contract.call_count == 1  # the whole batch at once
    assert (host - device).abs().max() < 2e-6 * RANGE


@pytest.mark.parametrize(
    ("num_in", "num_out", "length"), [(90, 30, 90.0), (90, 30, 40.0), (33, 40, 17.3), (50, 7, 50.0)]
)
def test_rows_sum_to_one_where_the_filter_stays_in_the_slab(
    num_in: int, num_out: int, length: float
) -> None:
    start = torch.tensor([[0.0, (num_in - length) / 2, num_in - length]])
    flip = torch.zeros_like(start, dtype=torch.bool)
    one = resample.resize_map(start, torch.full_like(start, length), flip, num_out, num_in, length)
    total = one.matrix_VBnS.sum(-1)
    assert (one.matrix_VBnS >= 0).all() and (total <= 1 + 1e-5).all()
    if length < num_in:
        assert torch.allclose(total[0, 1], torch.ones(num_out), atol=1e-5)
    else:
        assert total[0, 0, 0] < 0.95  # the first pixel reaches over the border, where there is air


def test_blur_rows_sum_to_one_and_zero_is_the_identity() -> None:
    blur = resample.blur_matrix(torch.tensor([0.0, 0.1, 1.0, 2.0, 9.0]), 7, 9.0)
    assert torch.allclose(blur.sum(-1), torch.ones(5, 7), atol=1e-6)
    assert torch.allclose(blur, blur.mT, atol=1e-7)
    assert torch.equal(blur[0], torch.eye(7)) and torch.allclose(
        blur[1], torch.eye(7), rtol=0, atol=1e-20
    )
    impulse = np.eye(7)
    for sigma, matrix in zip([1.0, 2.0, 9.0], blur[2:], strict=True):
        want = ndimage.gaussian_filter1d(impulse, sigma, axis=0, mode="reflect", truncate=10)
        assert np.abs(matrix.numpy() - want).max() < 1e-6


def num_denormal(t: torch.Tensor) -> int:
    """How many float32 numbers are denormal, by their bits: a CPU that flushes would count none."""
    bits = t.contiguous().view(torch.int32)
    return int((((bits & 0x7F800000) == 0) & ((bits & 0x007FFFFF) != 0)).sum())


def test_denormals_are_counted_whether_they_are_flushed_or_not() -> None:
    numbers = torch.tensor([0.0, -0.0, 1e-37, -1e-39, 1e-45, 1.0, math.inf])
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        assert num_denormal(numbers) == 2


@pytest.mark.parametrize("num", [1, 2, 8, 33, 96])
def test_the_blur_has_no_denormals_and_is_the_whole_gaussian_to_1e_6(num: int) -> None:
    """The summed error of a row bounds the relative error of a view, a weighted mean by it."""
    sigmas = [0.0, 1e-3, *torch.linspace(0.01, 9.0, 60).tolist()]
    for max_sigma in (max(sigmas), 40.0):  # a larger bound adds reflections
        blur = resample.blur_matrix(torch.tensor(sigmas), num, max_sigma)
        assert num_denormal(blur) == 0
        assert (blur.double().sum(-1) - 1).abs().max() < 1e-6
        assert (blur - whole_gaussian(sigmas, num)).abs().sum(-1).max() < 1e-6


def whole_gaussian(sigmas: list[float], num: int) -> torch.Tensor:
    """(len(sigmas), num, num) float64: the Gaussian without a cut, mirrored beyond 30 sigma."""
    mirrors = math.ceil(30 * max(sigmas) / (2 * num)) + 1
    i = torch.arange(num, dtype=torch.float64)
    width = torch.tensor(sigmas, dtype=torch.float64).clamp(min=1e-3)[:, None, None]
    total = torch.zeros(len(sigmas), num, num, dtype=torch.float64)
    for mirror in range(-mirrors, mirrors + 1):
        for source in (i + 2 * num * mirror, 2 * num * mirror - 1 - i):
            total += torch.exp(-0.5 * ((source - i[:, None]) / width) ** 2)
    return total / total.sum(-1, keepdim=True)


# slab voxels per pixel, least and most
ZOOMS = {"one size": (1, 1), "resized": (1, 2), "enlarged": (0.2, 1), "beyond the slab": (2, 3)}


@pytest.mark.parametrize("kind", ZOOMS)
def test_the_matrices_of_views_have_no_denormals(kind: str) -> None:
    """Random places, sizes, flips and blur widths; nor do the products on the way to a view."""
    window, slab, crops = (6, 40, 32), (16, 90, 100), 64
    low, high = ZOOMS[kind]
    draw = torch.Generator().manual_seed(0)
    uniform = torch.rand(3, 1, crops, 3, generator=draw)
    size = torch.tensor(slab, dtype=torch.float32)
    length = torch.tensor(window) * (low + (high - low) * uniform[0])
    start = (size - length).clamp(min=0) * uniform[1]
    boxes = Boxes(start, length, uniform[2] < 0.5)
    sigma = torch.linspace(0.0, 3.0, crops)[None]
    longest_z, longest_y, longest_x = length.amax((0, 1)).tolist()
    maps = resample.matrices(boxes, window, slab, (longest_z, longest_y, longest_x), sigma, 3.0)
    assert [num_denormal(one.matrix_VBnS) for one in maps] == [0, 0, 0]
    hu = torch.full((crops, *slab), -1024, dtype=torch.int16)
    hu[:, 5, 40, 50] = 1000  # a single voxel meets every tail
    above = resample._above_air(hu.transpose(1, 2), CONTRACT)
    products = [above]
    for one, axis in zip(maps, (2, 1, 3), strict=True):
        columns = one.first_VB[0][:, None] + torch.arange(one.matrix_VBnS.shape[-1])
        dense = torch.zeros(crops, one.matrix_VBnS.shape[-2], above.shape[axis])
        dense.scatter_(2, columns[:, None].expand_as(one.matrix_VBnS[0]), one.matrix_VBnS[0])
        along = torch.einsum("bns,bs...->bn...", dense, products[-1].transpose(1, axis))
        products.append(along.transpose(1, axis))
    assert [num_denormal(product) for product in products] == [0, 0, 0, 0]


def test_a_constant_scan_stays_constant_and_air_stays_air() -> None:
    crops = boxes_of([([4.0, 10.0, 10.0], [6.0, 30.0, 30.0], [False, False, False])] * 2)
    hu = torch.full((2, 16, 60, 60), 55, dtype=torch.int16)
    hu[1] = -1024
    got = fast_views(hu, crops, (6, 16, 16), [0.0, 2.0])
    assert (got[0] - 55).abs().max() < 1e-3
    assert (got[1] == CONTRACT.clip_low).all()


def test_outside_the_scan_is_air_never_zero() -> None:
    hu = torch.full((1, 4, 40, 40), 55, dtype=torch.int16)
    crops = boxes_of(
        [([0.0, 0.0, 0.0], [8.0, 40.0, 40.0], [False, False, False])]
    )  # deeper than the slab
    got = fast_views(hu, crops, (8, 20, 20), [0.0])
    assert (got[0, 4:] == CONTRACT.clip_low).all()
    assert (got[0, :4, 1:-1, 1:-1] - 55).abs().max() < 1e-3
    assert (got[0, :4, 0] < 0).all()  # its filter reaches over the border


def test_a_crop_in_the_middle_carries_no_rim() -> None:
    """Real neighbours feed the border: the view of a straight ramp is a straight ramp up to its
    edge.
    """
    ramp = torch.arange(90) * 8 - 300
    hu = (ramp[:, None] + 2 * torch.arange(90)).to(torch.int16).expand(1, 16, 90, 90)
    got = fast_views(
        hu, boxes_of([([4.0, 20.0, 21.5], [8.0, 48.0, 40.0], [False] * 3)]), (8, 16, 16), [0.0]
    )
    step_y, step_x = got.diff(dim=2), got.diff(dim=3)
    assert (step_y - 8 * 3).abs().max() < 0.1 and (step_x - 2 * 2.5).abs().max() < 0.1
    assert (got.diff(dim=1).abs() < 1e-3).all()


def test_stripes_finer_than_the_view_average_out() -> None:
    """At 3x reduction a pattern of period 2 aliases to full contrast without a stretched filter."""
    stripes = torch.where(torch.arange(96) % 2 == 0, 400, -400).to(torch.int16)
    hu = stripes.expand(1, 8, 96, 96).clone()
    got = fast_views(
        hu, boxes_of([([0.0, 3.0, 3.0], [8.0, 90.0, 90.0], [False] * 3)]), (8, 30, 30), [0.0]
    )
    assert got.abs().max() < 50
    sampled = F.interpolate(hu[:, :, 3:93, 3:93].float(), size=(30, 30), mode="bilinear")
    assert sampled.abs().max() > 350


@pytest.mark.parametrize("size", [(16, 24), (20, 56), (70, 80)])
def test_interior_equals_torch_antialiased_resize(
    make_batch: Callable[..., Batch], size: tuple[int, int]
) -> None:
    hu = make_batch([3]).hu_BZYX.float().clamp(CONTRACT.clip_low, CONTRACT.clip_high)
    got = resample.resize_volume(hu[0], (16, *size), CONTRACT.clip_low)
    want = F.interpolate(hu, size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    inner = (slice(None), slice(2, -2), slice(2, -2))
    assert (got[inner] - want[inner]).abs().max() < 1e-4 * RANGE


def test_resize_volume_equals_dense_float64_sums_and_keeps_equal_axes(
    make_batch: Callable[..., Batch],
) -> None:
    hu = make_batch([3]).hu_BZYX[0].float()
    assert torch.equal(resample.resize_volume(hu, (16, 48, 56)), hu)
    for sizes in ((7, 20, 70), (80, 47, 33)):
        check_against_dense(hu, sizes)


def check_against_dense(hu: torch.Tensor, sizes: tuple[int, int, int]) -> None:
    before = hu.clone()
    got = resample.resize_volume(hu, sizes)
    assert torch.equal(hu, before)
    want = hu.double().numpy() + 1024
    for axis, size in enumerate(sizes):
        matrix = slow_axis(0.0, hu.shape[axis], size, hu.shape[axis])
        want = np.moveaxis(np.tensordot(matrix, want, (1, axis)), 0, axis)
    assert np.abs(got.numpy() - (want - 1024)).max() < 1e-4 * RANGE


def test_resize_volume_equals_the_view_of_the_whole_scan(make_batch: Callable[..., Batch]) -> None:
    hu = make_batch([3]).hu_BZYX
    view = fast_views(
        hu, boxes_of([([0.0, 0.0, 0.0], [16.0, 48.0, 56.0], [False] * 3)]), (16, 24, 24), [0.0]
    )
    clipped = hu[0].float().clamp(CONTRACT.clip_low, CONTRACT.clip_high)
    assert (
        resample.resize_volume(clipped, (16, 24, 24), CONTRACT.clip_low) - view[0]
    ).abs().max() < 1e-3


def test_full_precision_holds_inside_and_restores_outside() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        a = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
        exact = a.double() @ a.double()
        with torch.autocast("cpu", dtype=torch.bfloat16), resample.full_precision(a.device):
            inside = a @ a
            # few CPUs round float32 products, so the switch itself is looked at too
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert inside.dtype == torch.float32 and (inside - exact).abs().max() < 1e-3
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
