"""A moving scan and its labels, brought onto a fixed scan by a map.

Axes: Z Y X voxels of a small copy of a scan; a last axis of 3 is (z, y, x) in mm from the centre of
a scan's first voxel.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from tapct.eval.pairs.thumbnail import Thumbnail
from tapct.eval.pairs.transform import Transform, translation
from tapct.types import IGNORE_LABEL


def centre_alignment(moving: Thumbnail, fixed: Thumbnail) -> Transform:
    """The map that moves the centre of the body of the fixed scan onto that of the moving scan."""
    return translation(moving.body_centre_mm() - fixed.body_centre_mm())


def warp(
    values_ZYX: np.ndarray, outside: int, transform: Transform, moving: Thumbnail, fixed: Thumbnail
) -> np.ndarray:
    """Move HU or labels to the grid of the fixed scan, by the nearest voxel.

    Args:
        values_ZYX: HU or labels of the moving scan.
        outside: value of the voxels that lie outside the moving scan.
        transform: the map from the fixed scan to the moving one.
        moving: moving scan.
        fixed: fixed scan.
    Returns:
        (Z, Y, X) of the fixed scan, of the type of `values_ZYX`.
    """
    _, height, width = values_ZYX.shape
    spacing_311 = np.array(moving.spacing_mm)[:, None, None]
    limit_311 = np.array(values_ZYX.shape, dtype=np.uint32)[:, None, None]
    # a last value, to which all places outside the moving scan point
    values_N = np.append(values_ZYX.reshape(-1), values_ZYX.dtype.type(outside))
    warped_ZYX = np.empty(fixed.hu_ZYX.shape, dtype=values_ZYX.dtype)
    for z, moved_3YX in transform.on_lattice(fixed.hu_ZYX.shape, fixed.spacing_mm):
        moved_3YX /= spacing_311
        index_3YX = np.rint(moved_3YX, out=moved_3YX).astype(np.int32)
        # as unsigned numbers, negative indices are larger than every limit
        is_inside_YX = (index_3YX.view(np.uint32) < limit_311).all(0)
        at_YX = (index_3YX[0] * height + index_3YX[1]) * width + index_3YX[2]
        at_YX[~is_inside_YX] = len(values_N) - 1
        warped_ZYX[z] = values_N.take(at_YX)
    return warped_ZYX


def dice_of_labels(
    warped_ZYX: np.ndarray, fixed_ZYX: np.ndarray, organs: Collection[int]
) -> dict[int, float]:
    """Number of an organ -> Dice of the moved labels, for organs that both scans have.

    Voxels that nobody has labelled in the fixed scan, or in the moving scan at their place, do not
    count. A voxel of the fixed scan that lies outside the moving scan has no label there.

    Args:
        warped_ZYX: labels of the moving scan on the grid of the fixed scan; organs are numbered
            from 1.
        fixed_ZYX: labels of the fixed scan.
        organs: numbers of the organs that the moving scan has.
    """
    # voxels without an organ in both scans change no number, and most voxels are of this kind
    in_any = np.flatnonzero((warped_ZYX != 0) | (fixed_ZYX != 0))
    moved, true = warped_ZYX.reshape(-1)[in_any], fixed_ZYX.reshape(-1)[in_any]
    counts = (moved != IGNORE_LABEL) & (true != IGNORE_LABEL)
    moved, true = moved[counts], true[counts]
    size = max(organs, default=0) + 1
    in_moved, in_true, in_both = (
        np.bincount(labels, minlength=size) for labels in (moved, true, moved[moved == true])
    )
    return {
        organ: float(2 * in_both[organ] / (in_moved[organ] + in_true[organ]))
        for organ in sorted(organs)
        if in_true[organ]
    }
