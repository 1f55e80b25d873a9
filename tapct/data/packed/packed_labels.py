"""The packed labels of one scan, `<id>.labels.b2nd`: a blosc2 array of uint8 or uint16 values.

It holds what evaluation needs, so that the archive may be gone: values on the grid of the scan,
names, and IGNORE_LABEL where nobody has labelled. Labels are read whole, and compress to about a
hundredth of their scan. The file ends with a digest of all its bytes, which is compared before
blosc2 sees them: blosc2 itself does not notice damage.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from tapct.base.exits import single_line
from tapct.data.digest import label_digest
from tapct.data.packed.packed_scan import Damaged, compress
from tapct.data.packed.places import file_of
from tapct.types import IGNORE_LABEL, LabelMap

_META_KEY = "tapct_labels"
_SCHEMA = 1
_END = b"tapctlbl"  # before the digest; blosc2 ignores what follows its frame
_DIGEST_BYTES = 16


def labels_file(store: Path, scan_id: str) -> Path:
    """Path of the packed labels of a scan.

    Args:
        store: folder of the store.
        scan_id: name of the scan.
    """
    return file_of(store, scan_id, ".labels.b2nd")


def encode_labels(labels: LabelMap, scan_id: str, level: int, digest: str = "") -> bytes:
    """Compress the labels of one scan.

    Args:
        labels: label map on the grid of its scan.
        scan_id: name of the scan in the store.
        level: level of zstd, 1 to 9.
        digest: their `label_digest` where it is known; empty to compute it.
    Returns:
        The bytes of its file.
    """
    dtype = np.uint8 if labels.labels_ZYX.max(initial=0) <= 255 else np.uint16
    array = compress(np.ascontiguousarray(labels.labels_ZYX, dtype=dtype), level)
    array.schunk.vlmeta[_META_KEY] = {
        "schema": _SCHEMA,
        "id": scan_id,
        "spacing_mm": [float(mm) for mm in labels.spacing_mm],
        "digest": digest or label_digest(labels),
        "names": [[int(value), name] for value, name in labels.names],
        "ignore": IGNORE_LABEL,
    }
    frame: bytes = array.schunk.to_cframe()
    return frame + _END + _digest(frame)


def packed_digest(file: Path) -> str:
    """The digest of the labels in a file; empty where the file is missing or damaged."""
    try:
        return str(_open(file)[1]["digest"])
    except Damaged:
        return ""


def read_names(file: Path) -> tuple[tuple[int, str], ...]:
    """Label value and name of every named label in a file. Raises: Damaged."""
    names = _open(file)[1]["names"]
    return tuple((int(value), str(name)) for value, name in names)


def read_packed_labels(file: Path, scan_id: str, digest: str) -> LabelMap:
    """Read the packed labels of one scan.

    Args:
        file: path of the file.
        scan_id: name of the scan.
        digest: digest of the labels, as the index of the store lists it.
    Returns:
        The labels; origin and directions are those of the scan and are not stored.
    Raises:
        Damaged: the file is missing or damaged, or holds other labels.
    """
    array, meta = _open(file)
    try:
        dz, dy, dx = meta["spacing_mm"]
        names = tuple((int(value), str(name)) for value, name in meta["names"])
        values_ZYX = np.asarray(array[:]).astype(np.uint16)
        labels = LabelMap(values_ZYX, (dz, dy, dx), names=names)
        found = (meta["id"], meta["ignore"], label_digest(labels))
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{file}: {type(error).__name__}: {single_line(error)}") from error
    if found != (scan_id, IGNORE_LABEL, digest):
        raise Damaged(f"{file} holds other labels than the index of the store lists")
    return labels


def _open(file: Path) -> tuple[blosc2.NDArray, dict[str, Any]]:
    """The array of a file and its metadata, once the digest of all bytes is compared."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise Damaged(f"{file}: {error.strerror}") from error
    frame = content[: -len(_END) - _DIGEST_BYTES]
    if content[len(frame) :] != _END + _digest(frame):
        raise Damaged(f"{file} is cut short or damaged")
    try:
        array = blosc2.ndarray_from_cframe(frame)
        meta = dict(array.schunk.vlmeta[_META_KEY])
        if meta["schema"] != _SCHEMA or "digest" not in meta:
            raise ValueError(f"schema is {meta['schema']}, this tapct reads {_SCHEMA}")
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(
            f"{file} holds no packed labels ({type(error).__name__}: {single_line(error)})"
        ) from error
    return array, meta


def _digest(frame: bytes) -> bytes:
    return hashlib.blake2b(frame, digest_size=_DIGEST_BYTES).digest()
