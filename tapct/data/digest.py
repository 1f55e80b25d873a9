"""The digest that names the voxels of a scan, in the manifest and in the store alike.

`tapct pack` compares the two, so they must come from one function.
"""

from __future__ import annotations

import hashlib

import numpy as np


def voxel_digest(hu_ZYX: np.ndarray) -> str:
    """Hash the shape and the voxels of a scan.

    Args:
        hu_ZYX: HU as int16, of any memory layout.
    Returns:
        32 hex digits: blake2b over "(Z, Y, X)" in ASCII and the voxels as little-endian int16 in
        C order. Equal for one scan in two file formats.
    """
    shape = tuple(map(int, hu_ZYX.shape))
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(hu_ZYX, dtype="<i2").data)
    return digest.hexdigest()
