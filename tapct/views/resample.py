"""Crop, resize, anti-alias and blur as three small matrices per crop, in float32.

    view[z', y', x'] = air + sum over z, y, x of  Mz[z', z] * My[y', y] * Mx[x', x] * (slab[z, y, x]
    - air)

Axes: B batch, V views of one kind, n pixels of the view along one axis, S voxels of the slab along
    it, Z Y X all three.
M = G R: R resizes (triangle filter, stretched where it shrinks, so that nothing aliases), G blurs
on the view's own grid. Rows sum to 1 over the endless line; what lies outside the slab has weight
too, and counts as air.
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
_TAILS = 6  # sigmas; weights beyond are below 2e-8 of the peak, less than float32's rounding of it


@dataclass(frozen=True)
class AxisMap:
    """The matrices of one axis, for all crops of one kind.

    Args:
        matrix_VBnS: float32; column j belongs to voxel first_VB + j. The number of columns is the
            same for all.
        first_VB: int64 >= 0.
        begin_VB, end_VB: int64, the voxels that really weigh lie in [begin, end), a part of the
            columns.
    """

    matrix_VBnS: Tensor
    first_VB: Tensor
    begin_VB: Tensor
    end_VB: Tensor


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in true float32: TF32 keeps 10 bits, which is 1 HU, and autocast fewer."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
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
        boxes: from `boxes.draw`.
        window: pixels of the views (z, y, x).
        slab_ZYX: size of the slab array.
        max_length: bound on `boxes.length_VB3` in voxels, known to the host: it makes the shapes
            static.
        sigma_VB: float32 width of the Gaussian blur in pixels of the view, the same along all axes;
            0 is none.
        max_sigma: bound on `sigma_VB`, known to the host.
    """
    maps, blurs = [], {}
    if sigma_VB is not None and max_sigma > 0:
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
        start, length: float32 (V, B), the boxes in voxels.
        flip: bool (V, B), pixels run against the voxels.
        num_out: pixels of the view.
        num_in: voxels of the slab array.
        max_length: bound on `length`, in voxels.
    """
    support = max(max_length / num_out, 1.0)
    num_columns = min(num_in, math.ceil(max_length + 2 * support) + 2)
    scale = length / num_out
    radius = scale.clamp(
        min=1.0
    )  # below 1 the view is finer than the scan: plain linear interpolation
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
    """Sum of max(0, 1 - |k - centre| / radius) over all integers k: two arithmetic series."""
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
    ring = torch.exp(-0.5 * sigmas**2).sum(-2)
    ring = ring / ring.sum(-1, keepdim=True)
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
        maps: from `matrices`, along z, y, x.
        view: which of the V views.
        contract: the clip to its window comes first.
        out_BZYX: float32, receives HU in [clip_low, clip_high].
    """
    if (
        hu_BZYX.device.type == _HOST
    ):  # no device to wait for: the host knows each box and cuts it exactly
        bounds = torch.stack(
            [t[view] for m in maps for t in (m.begin_VB, m.end_VB, m.first_VB)], dim=1
        ).tolist()
        for b, row in enumerate(bounds):
            cuts = [
                (begin, max(end, begin), first)
                for begin, end, first in zip(row[::3], row[1::3], row[2::3])
            ]
            (z0, z1, _), (y0, y1, _), (x0, x1, _) = cuts
            parts = [
                m.matrix_VBnS[view, b : b + 1, :, s - f : e - f] for m, (s, e, f) in zip(maps, cuts)
            ]
            crop_1YZX = _above_air(
                hu_BZYX[b : b + 1, z0:z1, y0:y1, x0:x1].transpose(1, 2), contract
            )
            torch.add(_contract(crop_1YZX, *parts), contract.clip_low, out=out_BZYX[b : b + 1])
        return
    index_z, index_y, index_x = (
        m.first_VB[view][:, None] + torch.arange(m.matrix_VBnS.shape[-1], device=hu_BZYX.device)
        for m in maps
    )
    sample = torch.arange(hu_BZYX.shape[0], device=hu_BZYX.device)[:, None, None, None]
    crop_BYZX = hu_BZYX[
        sample, index_z[:, None, :, None], index_y[:, :, None, None], index_x[:, None, None, :]
    ]
    view_BZYX = _contract(_above_air(crop_BYZX, contract), *(m.matrix_VBnS[view] for m in maps))
    torch.add(view_BZYX, contract.clip_low, out=out_BZYX)


def _above_air(hu: Tensor, contract: HUContract) -> Tensor:
    """int16 HU -> float32 in [0, window width], contiguous; air becomes 0."""
    above = torch.empty(hu.shape, dtype=torch.float32, device=hu.device).copy_(hu)
    return above.clamp_(contract.clip_low, contract.clip_high).sub_(contract.clip_low)


def _contract(crop_BYZX: Tensor, z_Bnz: Tensor, y_Bny: Tensor, x_Bnx: Tensor) -> Tensor:
    """Apply three matrices to a contiguous crop; y is its first axis, so that each big product is
    one plain GEMM.
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
        hu_ZYX: float32 HU (clip first: resampling a clipped scan is what training does).
        size_zyx: voxels afterwards; an axis that keeps its size is left exactly as it is.
        air_hu: HU of what lies outside the scan; give the lower clip where the scan was clipped.
    Returns:
        float32 of that size.
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
    """Apply the matrix of a whole axis, a few rows at a time: each block only meets the voxels
    under it.
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
        if axis == 2:
            product = part @ block.T
        elif axis == 1:
            product = torch.bmm(block.expand(len(volume), -1, -1), part)
        else:
            product = (block @ part.flatten(1)).unflatten(1, part.shape[1:])
        out.narrow(axis, first, last - first).copy_(product)
    return out
