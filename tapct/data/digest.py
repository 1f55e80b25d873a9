"""The digest of a scan's voxels: equal for one scan in two formats, in manifest and store."""

from __future__ import annotations

import hashlib

import numpy as np


def voxel_digest(hu_ZYX: np.ndarray) -> str:
    """Hash shape and voxels of a scan.

    Args:
        hu_ZYX: HU that fit int16, any memory order.
    Returns:
        32 hex digits: blake2b over the shape and the little-endian int16 voxels in C order.
    """
    shape = tuple(int(size) for size in hu_ZYX.shape)
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(hu_ZYX, dtype="<i2").data)
    return digest.hexdigest()
