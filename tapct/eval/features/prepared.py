"""A scan that is prepared for sliding windows: resized, clipped, normalised and padded.

Axes: Z Y X depth height width in voxels.
Padding: the scan stands at the origin and air follows at the far end of each axis, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tapct.base.geometry import Size3
from tapct.eval.features.dense import PatchGrid
from tapct.eval.features.preprocess import RESIZES, Preprocess
from tapct.types import AIR_HU, HUContract
from tapct.views.resample import resize_volume

_SLAB_BYTES = 16 << 20  # of the slices that are resized at a time


@dataclass(frozen=True)
class Prepared:
    """A scan ready for windows: resized, clipped, normalised, padded; the same for all models.

    Args:
        input_ZYX: float32 after `HUContract.normalise`, padded with air to whole patches and to one
            window at least.
        grid: of the patches that touch the scan.
        spacing_mm: mm of the resized voxels along (z, y, x); None if it was not given.
    """

    input_ZYX: Tensor
    grid: PatchGrid
    spacing_mm: tuple[float, float, float] | None = None


def prepare(
    hu_ZYX: np.ndarray,
    contract: HUContract,
    preprocess: Preprocess,
    patch: Size3,
    device: torch.device | str = "cpu",
    spacing_mm: Sequence[float] | None = None,
) -> Prepared:
    """Resize, clip, normalise and pad a scan.

    By default the clip comes before the resize, as in training: metal and padding values must not
    ring into tissue.

    Args:
        hu_ZYX: int16 HU of the whole scan.
        spacing_mm: mm of the scan's own voxels along (z, y, x); only a backbone that works in mm,
            or `Preprocess.spacing_mm`, needs it.
    Raises:
        UserError: window or stride off the patch grid, or no spacing where it is needed.
    """
    depth, height, width = hu_ZYX.shape
    grid = PatchGrid.of_scan(hu_ZYX.shape, preprocess, patch, spacing_mm)
    resized = grid.resized
    padded = [
        max(-(-size // side) * side, window)
        for size, side, window in zip(resized, patch, preprocess.window, strict=True)
    ]
    air = float(contract.normalise(torch.tensor(float(AIR_HU))))
    if preprocess.pad == "raw":
        air = (AIR_HU - contract.mean) / contract.std
    input_ZYX = torch.full(padded, air, device=device)
    planes_ZYX = None  # slices that have their size, where they are resampled along z too
    if resized[0] != depth:
        planes_ZYX = torch.empty((depth, *resized[1:]), device=device)
    step = max(1, _SLAB_BYTES // (4 * height * width))
    for start in range(0, depth, step):  # in their plane, slabs of slices are independent
        slab = torch.from_numpy(np.ascontiguousarray(hu_ZYX[start : start + step])).to(
            device, torch.float32
        )
        if preprocess.clip == "before_resize":
            slab = slab.clamp(contract.clip_low, contract.clip_high)
        if resized[1:] != (height, width):
            slab = resized_slab(slab, resized[1:], preprocess, contract)
        if planes_ZYX is not None:
            planes_ZYX[start : start + len(slab)] = slab
            continue
        input_ZYX[start : start + len(slab), : resized[1], : resized[2]] = contract.normalise(slab)
    if planes_ZYX is not None:
        whole_ZYX = resize_volume(planes_ZYX, resized, _air_hu(preprocess, contract))
        input_ZYX[: resized[0], : resized[1], : resized[2]] = contract.normalise(whole_ZYX)
    if spacing_mm is None:
        return Prepared(input_ZYX, grid)
    z, y, x = (mm / side for mm, side in zip(grid.spacing_mm(spacing_mm), grid.patch, strict=True))
    return Prepared(input_ZYX, grid, (z, y, x))


def resized_slab(
    hu_ZYX: Tensor, size_yx: tuple[int, int], preprocess: Preprocess, contract: HUContract
) -> Tensor:
    """Slices resized in their plane, by `Preprocess.resize`.

    Args:
        hu_ZYX: float32 HU of some slices.
        size_yx: voxels of a slice afterwards.
        preprocess: mode, and whether the slices are clipped already.
        contract: HU window.
    """
    if preprocess.resize == "antialias":
        air = _air_hu(preprocess, contract)
        return resize_volume(hu_ZYX, (len(hu_ZYX), *size_yx), air)
    return F.interpolate(hu_ZYX[:, None], size=size_yx, mode=RESIZES[preprocess.resize])[:, 0]


def _air_hu(preprocess: Preprocess, contract: HUContract) -> float:
    """HU outside of the scan during the resize."""
    return contract.clip_low if preprocess.clip == "before_resize" else float(AIR_HU)
