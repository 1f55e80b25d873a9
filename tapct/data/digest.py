"""The digests of a scan's voxels and labels: equal in manifest and store, and for two formats; and
the digest of a whole table, so that damage to a manifest or to the index of a store is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tapct.types import LabelMap


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


def label_digest(labels: LabelMap) -> str:
    """Hash shape, values and names of a label map on the grid of its scan.

    Args:
        labels: label map.
    Returns:
        32 hex digits: blake2b over the shape, the names and the values in C order, as uint8 where
        all are below 256, else as little-endian uint16.
    """
    shape = tuple(int(size) for size in labels.labels_ZYX.shape)
    dtype = "u1" if labels.labels_ZYX.max(initial=0) < 256 else "<u2"
    digest = hashlib.blake2b(repr((shape, dtype, labels.names)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(labels.labels_ZYX, dtype=dtype).data)
    return digest.hexdigest()


def table_digest(columns: Iterable[Sequence[Any]], facts: Mapping[str, Any]) -> str:
    """Hash all values of a table, and facts about it.

    Args:
        columns: values of each column: text, numbers, or lists of text or numbers.
        facts: facts about the whole table that JSON can hold.
    Returns:
        32 hex digits.
    """
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for values in columns:
        if any(isinstance(value, (list, tuple)) for value in values[:1]):
            values = ["\1".join(map(str, value)) for value in values]
        if any(isinstance(value, str) for value in values[:1]):
            content = "\0".join(values).encode()
        else:
            content = np.asarray(values, np.float64).tobytes()
        digest.update(f"{len(values)} {len(content)} ".encode() + content)
    return digest.hexdigest()
