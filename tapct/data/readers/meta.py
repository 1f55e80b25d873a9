"""MetaImage (.mha, .mhd): the header is parsed and checked here.

A detached header may name one data file in its own folder; lists and patterns of files are not
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tapct.base.marks import file_name, quoted
from tapct.data.readers.raw import Image, check_shape, other_format, read_head
from tapct.data.readers.text_head import (
    HEADER_LIMIT,
    TextHead,
    beside,
    build_affine,
    numbers,
    read_voxels,
)
from tapct.types import Refused

_MAX_LINE = 1 << 16
_START = 540  # bytes that show what a file is
_TYPES = {
    **{"CHAR": "i1", "UCHAR": "u1", "SHORT": "i2", "USHORT": "u2", "INT": "i4", "UINT": "u4"},
    **{"LONG": "i4", "ULONG": "u4", "LONG_LONG": "i8", "ULONG_LONG": "u8"},
    **{"FLOAT": "f4", "DOUBLE": "f8"},
}
_IDENTITY = "1 0 0 0 1 0 0 0 1"


def read(files: Sequence[Path]) -> Image:
    """Read one MetaImage file.

    Rules: three spatial axes with one value per voxel. A MetaImage without TransformMatrix is LPS
    by its own standard.

    Args:
        files: path of the file or of the detached header, alone.
    Returns:
        The voxels with their affine in LPS.
    Raises:
        Refused: truncated, corrupt, not_3d, not_scalar, bad_affine, bad_spacing, header_mismatch,
            unsupported.
    """
    (path,) = files
    with path.open("rb") as file:
        return read_voxels(_head(path, file), file)


def _fields(path: Path, file: BinaryIO) -> tuple[dict[str, str], int]:
    """Fields of a MetaImage header and the byte after the line of ElementDataFile; arguments as in
    `_head`.
    """
    fields: dict[str, str] = {}
    for line in iter(lambda: file.readline(_MAX_LINE), b""):
        if len(line) == _MAX_LINE:
            raise Refused("corrupt", f"a line of the header has over {_MAX_LINE} characters")
        key, equals, value = line.decode("utf-8", "replace").partition("=")
        if not equals or file.tell() > HEADER_LIMIT:
            break
        if fields.setdefault(key.strip(), value.strip()) != value.strip():
            raise Refused("corrupt", f"the header has two values of {quoted(key.strip())}")
        if key.strip() == "ElementDataFile":
            return fields, file.tell()
    if not fields.keys() & {"ObjectType", "NDims", "DimSize"}:
        raise other_format(path, read_head(path, _START, file), "MetaImage")
    raise Refused("truncated", f"{file_name(path)} has no complete MetaImage header")


def _head(path: Path, file: BinaryIO) -> TextHead:
    """Parse and check a MetaImage header.

    Args:
        path: path of the file.
        file: the file, which is open.
    """
    fields, end = _fields(path, file)
    missing = [key for key in ("NDims", "DimSize", "ElementType") if key not in fields]
    if missing:
        raise Refused("corrupt", f"the MetaImage header lacks {quoted(missing[0])}")
    element = fields["ElementType"].removeprefix("MET_")
    _check_values(fields, element)
    shape = tuple(int(size) for size in numbers(fields["DimSize"], 3, "DimSize", "corrupt"))
    check_shape(shape)
    is_big = _is_true(_first(fields, ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"), ""))
    local = fields["ElementDataFile"].upper() == "LOCAL"
    modality = fields.get("Modality", "").removeprefix("MET_MOD_")
    return TextHead(
        header_file=path,
        shape=shape,
        dtype=np.dtype((">" if is_big else "<") + _TYPES[element]),
        affine=_affine(fields),
        data_file=path if local else beside(path, fields["ElementDataFile"]),
        offset=end if local else int(fields.get("HeaderSize", "0")),
        header_end=end if local else min(0, int(fields.get("HeaderSize", "0"))),
        is_compressed=_is_true(fields.get("CompressedData", "")),
        modality="" if modality in ("UNKNOWN", "OTHER") else modality,
    )


def _check_values(fields: dict[str, str], element: str) -> None:
    """Refuse a header without three axes and one real value per voxel, stored as it is.

    Args:
        fields: fields of the header.
        element: type of a voxel, without MET_.
    """
    if fields["NDims"] != "3":
        raise Refused(
            "not_3d",
            f"the file has {quoted(fields['NDims'])} axes, {quoted(fields['DimSize'])}; "
            "rule: three",
        )
    if element not in _TYPES or fields.get("ElementNumberOfChannels", "1") != "1":
        raise Refused(
            "not_scalar", f"elements are {quoted(element)}; rule: one real value per voxel"
        )
    if not _is_true(fields.get("BinaryData", "True")) or int(fields.get("HeaderSize", "0")) > 0:
        raise Refused(
            "unsupported",
            "voxels are text or have a HeaderSize; write the file again as plain binary",
        )
    scaling = [_first(fields, (f"ElementToIntensityFunction{k}",), "") for k in ("Slope", "Offset")]
    if any(text and float(text) != plain for text, plain in zip(scaling, (1.0, 0.0))):
        raise Refused(
            "unsupported",
            f"ElementToIntensityFunctionSlope and -Offset are {scaling}; write the file with HU",
        )


def _affine(fields: dict[str, str]) -> np.ndarray:
    """The affine in LPS millimetres, checked."""
    spacing = fields.get("ElementSpacing", fields.get("ElementSize"))
    if spacing is None:
        raise Refused("bad_spacing", "the MetaImage header has no ElementSpacing")
    matrix = _first(fields, ("TransformMatrix", "Rotation", "Orientation"), "") or _IDENTITY
    origin = _first(fields, ("Offset", "Position", "Origin"), "0 0 0")
    directions = np.asarray(numbers(matrix, 9, "TransformMatrix", "bad_affine")).reshape(3, 3)
    spacings = np.asarray(numbers(spacing, 3, "ElementSpacing", "bad_spacing"))
    if (spacings <= 0).any():
        raise Refused("bad_spacing", f"ElementSpacing is {spacings.tolist()}; rule: numbers > 0")
    lengths = np.linalg.norm(directions, axis=1)
    if (np.abs(lengths - 1.0) > 0.05).any():
        raise Refused(
            "header_mismatch",
            f"the rows of TransformMatrix have lengths {lengths.round(3).tolist()}; rule: 1, the "
            "spacing stands in ElementSpacing",
        )
    return build_affine(directions.T * spacings, numbers(origin, 3, "Offset", "bad_affine"))


def _is_true(text: str) -> bool:
    """Whether a field is true by the rule of the MetaImage library, which reads one letter."""
    return text[:1] in ("T", "t", "1")


def _first(fields: dict[str, str], keys: Sequence[str], default: str) -> str:
    """The first of these fields that the header has; MetaImage has several names for one thing."""
    for key in keys:
        if key in fields:
            return fields[key]
    return default
