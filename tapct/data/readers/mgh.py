"""FreeSurfer's MGH (.mgh, .mgz). The content decides whether it is gzip, not the name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tapct.base.marks import file_name
from tapct.data.readers.raw import (
    Image,
    check_shape,
    check_size,
    inflate,
    is_gzip,
    other_format,
    read_head,
)
from tapct.types import Refused

_MAX_FOOTER = 1 << 16  # bytes; acquisition parameters and tags follow the voxels
_HEADER_BYTES = 284
_DTYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}


def read(files: Sequence[Path]) -> Image:
    """Read one MGH file.

    Rules: one frame. The header must mark its directions as valid (goodRASFlag).

    Args:
        files: path of the file, alone.
    Returns:
        The voxels with their affine, turned from RAS to LPS.
    Raises:
        Refused: truncated, corrupt, unsupported, not_3d, not_scalar, bad_affine, bad_spacing,
            no_orientation, bad_shape.
    """
    (path,) = files
    with path.open("rb") as file:
        return _read(path, file)


def _read(path: Path, file: BinaryIO) -> Image:
    """Read one file that is open, see `read`."""
    from nibabel.freesurfer.mghformat import MGHHeader

    head = read_head(path, _HEADER_BYTES, file)
    if len(head) < _HEADER_BYTES:
        raise Refused(
            "truncated",
            f"{file_name(path)} holds {len(head)} bytes; an MGH header has {_HEADER_BYTES}",
        )
    version, *sizes, code, _ = np.frombuffer(head, ">i4", 7).tolist()
    if version != 1:
        raise other_format(path, head, "MGH")
    if sizes[3] > 1:
        raise Refused("not_3d", f"the file holds {sizes[3]} volumes; split it, one file per scan")
    if code not in _DTYPES:
        raise Refused("not_scalar", f"voxels have type {code}; rule: one of {sorted(_DTYPES)}")
    shape = tuple(sizes[:3])
    check_shape(shape)
    affine = _affine(head, MGHHeader(head, check=False))
    dtype = np.dtype(_DTYPES[code])
    expected = _HEADER_BYTES + dtype.itemsize * math.prod(shape)
    if is_gzip(path, file):
        data = inflate(path, 0, expected, _MAX_FOOTER, file)
    else:
        check_size(path, path.stat().st_size, expected, _MAX_FOOTER)
        file.seek(0)
        data = file.read()
    values = np.frombuffer(data, dtype, math.prod(shape), _HEADER_BYTES)
    return Image(values.reshape(shape, order="F"), affine)


def _affine(head: bytes, header: object) -> np.ndarray:
    """The affine in LPS millimetres, checked.

    Args:
        head: bytes of the header.
        header: the same, as nibabel's MGHHeader.
    """
    if int.from_bytes(head[28:30], "big") == 0:
        raise Refused(
            "no_orientation",
            "goodRASFlag is 0, so left and right are unknown; write them with mri_convert",
        )
    spacing = np.frombuffer(head, ">f4", 3, 30).astype(np.float64)
    if not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise Refused("bad_spacing", f"spacing is {spacing.tolist()}; rule: three numbers > 0")
    affine = np.asarray(header.get_affine(), dtype=np.float64)  # type: ignore[attr-defined]
    if not np.isfinite(affine).all():
        raise Refused("bad_affine", "the directions or the centre hold NaN or infinity")
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
