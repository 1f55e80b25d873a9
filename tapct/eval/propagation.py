"""A moving scan and its labels, brought onto a fixed scan by a map.

Axes: Z Y X voxels of a small copy of a scan; a last axis of 3 is (z, y, x) in mm from the centre of
a scan's first voxel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tapct.eval.thumbnail import Thumbnail
from tapct.eval.transform import Transform, translation
from tapct.types import AIR_HU, IGNORE_LABEL


@dataclass(frozen=True)
class Warped:
    """A moving scan on the grid of the small copy of the fixed scan.

    Args:
        hu_ZYX: HU; air outside the moving scan.
        labels_ZYX: numbers of organs; 0 outside the moving scan. None without labels.
    """

    hu_ZYX: np.ndarray
    labels_ZYX: np.ndarray | None


def centre_alignment(moving: Thumbnail, fixed: Thumbnail) -> Transform:
    """The map that moves the centre of the body of the fixed scan onto that of the moving scan."""
    return translation(moving.body_centre_mm() - fixed.body_centre_mm())


def warp(transform: Transform, moving: Thumbnail, fixed: Thumbnail) -> Warped:
    """Move HU and labels to the grid of the fixed scan, by the nearest voxel."""
    shape = fixed.hu_ZYX.shape
    hu_ZYX = np.full(shape, AIR_HU, dtype=np.int16)
    labels_ZYX = None if moving.labels_ZYX is None else np.zeros(shape, dtype=np.uint16)
    limit = np.array(moving.hu_ZYX.shape)
    for z, moved_YX3 in transform.on_lattice(shape, fixed.spacing_mm):
        index = np.rint(moved_YX3 / moving.spacing_mm).astype(np.int64)
        inside = ((index >= 0) & (index < limit)).all(axis=-1)
        at = tuple(index[inside].T)
        hu_ZYX[z][inside] = moving.hu_ZYX[at]
        if labels_ZYX is not None and moving.labels_ZYX is not None:
            labels_ZYX[z][inside] = moving.labels_ZYX[at]
    return Warped(hu_ZYX, labels_ZYX)


def dice_of_labels(
    warped_ZYX: np.ndarray, moving_ZYX: np.ndarray, fixed_ZYX: np.ndarray, num_organs: int
) -> dict[int, float]:
    """Number of an organ -> Dice of the moved labels, for organs that both scans have.

    Voxels that nobody has labelled in the fixed scan, or in the moving scan at their place, do not
    count. A voxel of the fixed scan that lies outside the moving scan has no label there.

    Args:
        warped_ZYX: labels of the moving scan on the grid of the fixed scan.
        moving_ZYX: labels of the moving scan.
        fixed_ZYX: labels of the fixed scan.
        num_organs: number of organs; they are numbered from 1.
    """
    counts = (warped_ZYX != IGNORE_LABEL) & (fixed_ZYX != IGNORE_LABEL)
    size = num_organs + 1
    moved, true = warped_ZYX[counts], fixed_ZYX[counts]
    in_moved, in_true = np.bincount(moved, minlength=size), np.bincount(true, minlength=size)
    in_both = np.bincount(moved[moved == true], minlength=size)
    in_moving = np.bincount(moving_ZYX[moving_ZYX != IGNORE_LABEL], minlength=size)
    return {
        organ: float(2 * in_both[organ] / (in_moved[organ] + in_true[organ]))
        for organ in range(1, size)
        if in_true[organ] and in_moving[organ]
    }
