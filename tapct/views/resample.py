"""Crop, resize, anti-alias and blur by three small matrices per crop, in float32.

Plain form of one crop, of which tests/views/test_resample.py computes every factor by loops:

    above[z, y, x]   = clip(slab[z, y, x]) - air
    view[z', y', x'] = air + sum_z sum_y sum_x Mz[z', z] My[y', y] Mx[x', x] above[z, y, x]
    M                = G R

R resizes by a triangle filter, which is widened where the crop shrinks, so that nothing aliases. G
blurs on the grid of the view. Rows sum to 1 over the endless line: voxels outside the slab have
weight too, and count as air. The sums are three matrix products, one axis after the other. Each R
holds only the columns of the voxels that a crop can reach, so that a product is as small as the
crop.

Axes: B batch, V views of one kind, n pixels of the view along one axis, S columns of the matrix
along this axis, Z Y X depth height width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tapct.types import AIR_HU, HUContract
from tapct.views.boxes import Boxes

_HOST = "cpu"
# Width of the Gaussian in sigmas to each side. Weights beyond are below 2e-8 of the peak, less than
# float32's rounding of it.
_TAILS = 6


@dataclass(frozen=True)
class AxisMap:
    """The matrices of one axis, for all crops of one kind.

    Args:
        matrix_VBnS: float32; column j belongs to voxel first_VB + j. All crops have the same number
            of columns.
        first_VB: int64 >= 0, voxel of the first column.
        begin_VB: int64, first voxel of those with weight, which are a part of the columns.
        end_VB: int64, voxel after the last of these.
    """

    matrix_VBnS: Tensor
    first_VB: Tensor
    begin_VB: Tensor
    end_VB: Tensor


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in true float32: TF32 keeps 10 bits, which is 1 HU, and autocast fewer."""
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    backends = (torch.backends.cuda.matmul, mkldnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def matrices(
    boxes: Boxes,
    window: tuple[int, int, int],
    slab_ZYX: tuple[int, int, int],
    max_length: tuple[float, float, float],
    sigma_VB: Tensor | None = None,
    max_sigma: float = 0.0,
) -> tuple[AxisMap, AxisMap, AxisMap]:
    """The matrices of all crops of one kind along z, y and x.

    Args:
        boxes: crops from `boxes.draw`.
        window: pixels of the views (z, y, x).
        slab_ZYX: size of the slab array.
        max_length: bound on `boxes.length_VB3` in voxels, known to the host, so that shapes are
            static.
        sigma_VB: float32, width of the Gaussian blur in pixels of the view, the same along all
            axes; 0: no blur.
        max_sigma: bound on `sigma_VB`, known to the host.
    """
    maps, blurs = [], {}
    if sigma_VB is not None and max_sigma > 0:
        # axes of equal size share their matrix
        blurs = {n: blur_matrix(sigma_VB, n, max_sigma) for n in sorted(set(window))}
    for axis, num_out in enumerate(window):
        start, length, flip = (
            t[..., axis] for t in (boxes.start_VB3, boxes.length_VB3, boxes.flip_VB3)
        )
        one = resize_map(start, length, flip, num_out, slab_ZYX[axis], max_length[axis])
        if blurs:
            one = replace(one, matrix_VBnS=blurs[num_out] @ one.matrix_VBnS)
        maps.append(one)
    return maps[0], maps[1], maps[2]


def resize_map(
    start: Tensor, length: Tensor, flip: Tensor, num_out: int, num_in: int, max_length: float
) -> AxisMap:
    """R of one axis: pixel i of the view is the triangle-weighted mean of the voxels around its
    centre.

    Args:
        start: float32 (V, B), first edges of the boxes in voxels.
        length: float32 (V, B), edge lengths in voxels.
        flip: bool (V, B), True where pixels run against the voxels.
        num_out: pixels of the view.
        num_in: voxels of the slab array.
        max_length: bound on `length`, in voxels.
    """
    support = max(max_length / num_out, 1.0)
    # + 2: the box may begin and end inside of a voxel
    num_columns = min(num_in, math.ceil(max_length + 2 * support) + 2)
    scale = length / num_out
    # below 1 the view is finer than the scan: plain linear interpolation
    radius = scale.clamp(min=1.0)
    begin = (start - radius).floor().clamp(min=0)
    end = (start + length + radius).ceil().clamp(max=num_in)
    first = begin.clamp(max=num_in - num_columns)
    pixel = torch.arange(num_out, device=start.device) + 0.5
    pixel = torch.where(flip[..., None], num_out - pixel, pixel)
    # centres relative to the first column: small numbers keep float32 exact to 1e-5 voxel
    centre = (start - first)[..., None] + pixel * scale[..., None] - 0.5
    column = torch.arange(num_columns, device=start.device)
    distance = (column - centre[..., None]).abs_()
    matrix = distance.div_(radius[..., None, None]).neg_().add_(1.0).clamp_(min=0.0)
    matrix = matrix.div_(_line_sum(centre, radius[..., None])[..., None])
    return AxisMap(matrix, first.to(torch.int64), begin.to(torch.int64), end.to(torch.int64))


def _line_sum(centre: Tensor, radius: Tensor) -> Tensor:
    """Sum of max(0, 1 - |k - centre| / radius) over all integers k.

    To each side of the centre the terms are an arithmetic series: `count` integers at distances
    nearest, nearest + 1, ...
    """
    total = torch.zeros_like(centre)
    below = centre - centre.floor()
    for nearest in (below, 1.0 - below):
        count = (radius - nearest).ceil().clamp(min=0)
        total = total + count - (count * nearest + count * (count - 1) / 2) / radius
    return total


def blur_matrix(sigma: Tensor, num: int, max_sigma: float) -> Tensor:
    """G of one axis: Gaussian weights, reflected at both borders (the edge pixel twice), rows sum
    to 1.

    The Gaussian ends at 6 sigma; beyond, its weights are exactly 0. Without the cut, some would be
    denormal floats (below 1.2e-38), and CPUs multiply those many times as slowly as other numbers.

    Args:
        sigma: float32, any shape, in pixels; 0 gives the identity.
        num: pixels.
        max_sigma: bound on sigma, so that the number of reflections is known to the host.
    Returns:
        (*sigma.shape, num, num) float32.
    """
    mirrors = math.ceil((_TAILS * max_sigma + num) / (2 * num))
    shift = torch.arange(-mirrors, mirrors + 1, device=sigma.device)[:, None] * (2 * num)
    distance = (torch.arange(2 * num, device=sigma.device) + shift).to(torch.float32)
    width = sigma.clamp(min=1e-3)[..., None, None]  # at 1e-3 every neighbour is in the tails
    sigmas = (distance / width).abs()
    sigmas = sigmas.masked_fill(sigmas > _TAILS, math.inf)
    # reflecting twice comes back after 2 num pixels
    ring = torch.exp(-0.5 * sigmas**2).sum(-2)  # (..., 2 num), by distance modulo 2 num
    ring = ring / ring.sum(-1, keepdim=True)
    # pixel j itself and its mirror image beyond the border
    i = torch.arange(num, device=sigma.device)
    here, mirrored = (i[:, None] - i) % (2 * num), (i[:, None] + i + 1) % (2 * num)
    return ring[..., here] + ring[..., mirrored]


def apply(
    hu_BZYX: Tensor,
    maps: tuple[AxisMap, AxisMap, AxisMap],
    view: int,
    contract: HUContract,
    out_BZYX: Tensor,
) -> None:
    """Make one view of every slab; only the voxels under a crop are converted and read.

    Args:
        hu_BZYX: int16 HU.
        maps: matrices along z, y, x, from `matrices`.
        view: number of the view among the V of its kind.
        contract: HU window, to which the slab is clipped first.
        out_BZYX: float32, receives HU in [clip_low, clip_high].
    """
    if hu_BZYX.device.type == _HOST:
        # there is no device to wait for: the host knows every box and cuts it exactly
        bounds = [
            torch.stack([m.first_VB[view], m.begin_VB[view], m.end_VB[view]], dim=1).tolist()
            for m in maps
        ]
        for sample, axes in enumerate(zip(*bounds, strict=True)):
            one, cuts, matrices_1nS = slice(sample, sample + 1), [], []
            for m, (first, begin, end) in zip(maps, axes, strict=True):
                cut = slice(begin, max(end, begin))
                cuts.append(cut)
                columns = slice(cut.start - first, cut.stop - first)
                matrices_1nS.append(m.matrix_VBnS[view, one, :, columns])
            box = (one, *cuts)
            crop_1YZX = _above_air(hu_BZYX[box].transpose(1, 2), contract)
            view_1ZYX = _contract(crop_1YZX, *matrices_1nS)
            torch.add(view_1ZYX, contract.clip_low, out=out_BZYX[one])
        return
    # on a GPU the boxes are not known to the host, so crops of one static size are gathered
    index_z, index_y, index_x = (
        m.first_VB[view][:, None] + torch.arange(m.matrix_VBnS.shape[-1], device=hu_BZYX.device)
        for m in maps
    )
    sample_B111 = torch.arange(hu_BZYX.shape[0], device=hu_BZYX.device)[:, None, None, None]
    crop_BYZX = hu_BZYX[
        sample_B111, index_z[:, None, :, None], index_y[:, :, None, None], index_x[:, None, None, :]
    ]
    view_BZYX = _contract(_above_air(crop_BYZX, contract), *(m.matrix_VBnS[view] for m in maps))
    torch.add(view_BZYX, contract.clip_low, out=out_BZYX)


def _above_air(hu: Tensor, contract: HUContract) -> Tensor:
    """int16 HU -> float32 in [0, window width], contiguous; air becomes 0."""
    above = torch.empty(hu.shape, dtype=torch.float32, device=hu.device).copy_(hu)
    return above.clamp_(contract.clip_low, contract.clip_high).sub_(contract.clip_low)


def _contract(crop_BYZX: Tensor, z_Bnz: Tensor, y_Bny: Tensor, x_Bnx: Tensor) -> Tensor:
    """Apply three matrices to a contiguous crop: (B, Y, Z, X) -> (B, n, n, n) along (z, y, x).

    y is the crop's first axis, so that each of the two large products is one plain GEMM: y over
    rows of depth * width numbers, x over the last axis. z comes last, on the smallest array.
    """
    batch, _, depth, width = crop_BYZX.shape
    rows, columns = y_Bny.shape[1], x_Bnx.shape[1]
    rows_first = torch.bmm(y_Bny, crop_BYZX.reshape(batch, -1, depth * width))
    small = torch.bmm(rows_first.view(batch, rows * depth, width), x_Bnx.transpose(1, 2))
    view_ByZx = torch.matmul(z_Bnz[:, None], small.view(batch, rows, depth, columns))
    return view_ByZx.transpose(1, 2)


def resize_volume(hu_ZYX: Tensor, size_zyx: tuple[int, int, int], air_hu: float = AIR_HU) -> Tensor:
    """Resize a whole scan, anti-aliased, with the matrices that make the training views.

    Args:
        hu_ZYX: float32 HU, clipped already, since training resamples clipped scans.
        size_zyx: voxels (z, y, x) of the result; an axis that keeps its size is not resampled.
        air_hu: HU outside the scan, which is the lower clip where the scan was clipped.
    Returns:
        float32 HU of that size.
    """
    volume = hu_ZYX.to(torch.float32) - air_hu
    with full_precision(volume.device):
        for axis in (2, 1, 0):
            num_in, num_out = volume.shape[axis], size_zyx[axis]
            if num_in == num_out:
                continue
            whole = torch.full((1, 1), float(num_in), device=volume.device)
            start, flip = torch.zeros_like(whole), torch.zeros_like(whole, dtype=torch.bool)
            matrix_nS = resize_map(start, whole, flip, num_out, num_in, num_in).matrix_VBnS[0, 0]
            volume = _along_band(matrix_nS, volume, axis)
    return volume.add_(air_hu)


def _along_band(matrix_nS: Tensor, volume: Tensor, axis: int, rows: int = 32) -> Tensor:
    """Apply the matrix of a whole axis, `rows` rows at a time.

    The matrix is a band, so a block of rows is multiplied with the voxels under it alone.
    """
    num_out, num_in = matrix_nS.shape
    shape = list(volume.shape)
    shape[axis] = num_out
    out = volume.new_empty(shape)
    scale = num_in / num_out
    for first in range(0, num_out, rows):
        last = min(first + rows, num_out)
        begin = max(math.floor(first * scale - max(scale, 1.0)), 0)
        end = min(math.ceil(last * scale + max(scale, 1.0)), num_in)
        block, part = matrix_nS[first:last, begin:end], volume.narrow(axis, begin, end - begin)
        # one plain product per axis, without moving the axis in memory
        if axis == 2:
            product = part @ block.T
        elif axis == 1:
            product = torch.bmm(block.expand(len(volume), -1, -1), part)
        else:
            product = (block @ part.flatten(1)).unflatten(1, part.shape[1:])
        out.narrow(axis, first, last - first).copy_(product)
    return out
