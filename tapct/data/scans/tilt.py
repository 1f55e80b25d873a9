"""Gantry tilt: slices that are shifted against each other are moved onto a grid with right angles.

A gantry that is tilted by 20 degrees gives slices whose first pixels do not lie above each other
along the slice normal. The slices stay as they are here; each is shifted in its own plane, by
linear interpolation between its pixels, until they do.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tapct.data.readers.raw import Image, check_shape
from tapct.data.scans.geometry import MAX_SHEAR
from tapct.types import AIR_HU, Refused

MARK = "tilt_resampled"
_MAX_TILT = math.sin(math.radians(45))  # gantries tilt by 30 degrees at most


def is_tilted(affine: np.ndarray) -> bool:
    """Whether the slices have right angles in their plane, and their stack has not.

    Args:
        affine: 4x4 matrix, (i, j, k, 1) -> LPS mm.
    """
    if not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (lengths <= 0).any():
        return False
    i, j, k = (affine[:3, :3] / lengths).T
    in_plane = abs(float(i @ j))
    lean = max(abs(float(i @ k)), abs(float(j @ k)))
    return in_plane <= MAX_SHEAR < lean <= _MAX_TILT


def upright(image: Image) -> Image:
    """Shift the slices of a tilted image in their planes, so that they lie above each other.

    Args:
        image: image for which `is_tilted`; slices along K.
    Returns:
        The image in HU on a grid with right angles, which is larger in the plane by the shift of
        the last slice against the first. What no slice covers is air.
    Raises:
        Refused: bad_shape, not_finite.
    """
    step = image.affine[:3, 2]
    row, column = image.affine[:3, 0], image.affine[:3, 1]
    # pixels (I, J) by which a slice is shifted against the one before it
    shift = np.array([step @ row / (row @ row), step @ column / (column @ column)])
    sizes = image.voxels_IJK.shape
    total = shift * (sizes[2] - 1)
    low = np.floor(np.minimum(total, 0)).astype(int)
    high = np.ceil(np.maximum(total, 0)).astype(int)
    shape = (sizes[0] + int(high[0] - low[0]), sizes[1] + int(high[1] - low[1]), sizes[2])
    check_shape(shape)
    hu_IJK = np.full(shape, AIR_HU, dtype=np.float32)
    for k in range(sizes[2]):
        plane = image.voxels_IJK[:, :, k].astype(np.float32)
        plane = plane * np.float32(image.slope) + np.float32(image.intercept)
        if not np.isfinite(plane).all():
            raise Refused("not_finite", f"slice {k} holds NaN or infinity; write air there")
        hu_IJK[:, :, k] = _shifted(np.maximum(plane, AIR_HU), shift * k - low, shape[:2])
    affine = image.affine.copy()
    affine[:3, 2] = step - shift[0] * row - shift[1] * column
    affine[:3, 3] += low[0] * row + low[1] * column
    return replace(image, voxels_IJK=np.rint(hu_IJK), affine=affine, slope=1.0, intercept=0.0)


def _shifted(plane_IJ: np.ndarray, shift: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A slice moved by a shift of zero or more pixels (I, J) in a larger slice of air."""
    for axis in (0, 1):
        whole = int(math.floor(shift[axis]))
        part = np.float32(shift[axis] - whole)
        sizes = list(plane_IJ.shape)
        sizes[axis] = shape[axis] + 1
        padded = np.full(sizes, AIR_HU, dtype=np.float32)
        there = [slice(None)] * 2
        there[axis] = slice(whole + 1, whole + 1 + plane_IJ.shape[axis])
        padded[tuple(there)] = plane_IJ
        before = padded.take(range(shape[axis]), axis=axis)
        after = padded.take(range(1, shape[axis] + 1), axis=axis)
        plane_IJ = part * before + (1 - part) * after
    return plane_IJ
