"""The rough body of a scan: thick tissue, and what it encloses.

Axes: Z Y X voxels, axial slices first.
"""

from __future__ import annotations

import numpy as np

TISSUE_ABOVE_HU = -300.0
_SLAB_VOXELS = 1 << 21  # of one step, so that a large scan needs little memory


def thick_tissue(tissue_ZYX: np.ndarray) -> np.ndarray:
    """Whether more than half of a square around each voxel is tissue: bool, slice by slice.

    A table is thin and a patient is not. The square is about 1/32 of the width of the slice, and
    what lies outside the slice is no tissue. Its side is odd, so exactly half never occurs.

    Args:
        tissue_ZYX: bool.
    """
    depth, height, width = tissue_ZYX.shape
    side = 2 * (width // 64) + 1
    half, majority = side // 2, side * side // 2
    thick = np.empty(tissue_ZYX.shape, dtype=bool)
    step = max(1, _SLAB_VOXELS // max(1, height * width))
    for start in range(0, depth, step):
        slab = tissue_ZYX[start : start + step].astype(np.uint8)
        padded = np.pad(slab, ((0, 0), (half, half), (half, half)))
        # Plain form: the sum of each square. It is a sum along y of sums along x, and shifted
        # copies that are added are much faster than a pooling layer. The count is an integer.
        rows = padded[:, :height].astype(np.uint8 if side < 256 else np.uint32)
        for shift in range(1, side):
            rows += padded[:, shift : shift + height]
        count = rows[:, :, :width].astype(np.uint16 if side < 256 else np.uint32)
        for shift in range(1, side):
            count += rows[:, :, shift : shift + width]
        np.greater(count, majority, out=thick[start : start + step])
    return thick


def body_mask(hu_ZYX: np.ndarray) -> np.ndarray:
    """Rough body: per slice, what thick tissue encloses from left to right and from front to
    back.
    """
    tissue = thick_tissue(hu_ZYX > TISSUE_ABOVE_HU)
    enclosed = np.ones_like(tissue)
    for axis in (1, 2):
        length = tissue.shape[axis]
        place = np.arange(length).reshape((length, 1) if axis == 1 else (1, length))
        first = tissue.argmax(axis=axis, keepdims=True)
        last = length - 1 - np.flip(tissue, axis).argmax(axis=axis, keepdims=True)
        # without tissue on a line, `first` is 0 and `last` the end
        enclosed &= (place >= first) & (place <= last) & tissue.any(axis=axis, keepdims=True)
    return enclosed
