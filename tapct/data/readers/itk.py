"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd): our own look at the header, voxels by SimpleITK.

Detached headers may name one data file in their own folder; lists and patterns of files are not
read.
SimpleITK is loaded with the first file: every rank of a training run imports this one, and reads
    none.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapct.data.readers.raw import Header, Image, check_shape, check_size, inflate
from tapct.types import Refused

SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
_HEADER_LIMIT = 4 << 20  # a Slicer segmentation with many segments stays far below
_NRRD_BYTES = {
    **dict.fromkeys(
        ("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1
    ),
    **dict.fromkeys(
        ("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2
    ),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(
        (
            "int",
            "signed int",
            "int32",
            "int32_t",
            "uint",
            "unsigned int",
            "uint32",
            "uint32_t",
            "float",
        ),
        4,
    ),
    **dict.fromkeys(
        ("longlong", "long long", "int64", "int64_t", "uint64", "uint64_t", "ulonglong", "double"),
        8,
    ),
}
_META_BYTES = {
    "CHAR": 1,
    "UCHAR": 1,
    "SHORT": 2,
    "USHORT": 2,
    "INT": 4,
    "UINT": 4,
    "LONG": 4,
    "ULONG": 4,
}
_META_BYTES |= {"LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
_TO_LPS = {
    **dict.fromkeys(("left-posterior-superior", "LPS"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("right-anterior-superior", "RAS"), (-1.0, -1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "LAS"), (1.0, -1.0, 1.0)),
}
_SEGMENT = re.compile(r"Segment(\d+)_(LabelValue|Name)$")


@dataclass(frozen=True)
class _Head:
    """A checked header: sizes I J K, bytes a voxel, LPS affine, where the voxels lie and how they
    are packed.
    """

    shape: tuple[int, ...]
    itemsize: int
    affine: np.ndarray
    data_file: Path
    offset: int  # -1: the last bytes of the file
    compressed: bool
    modality: str = ""
    names: tuple[tuple[int, str], ...] = ()


def read(path: Path) -> Image:
    """Read one NRRD or MetaImage file.

    Rules: three spatial axes with one value a voxel; NRRD must name its space (a MetaImage without
    TransformMatrix is LPS by its own standard); spacing comes from the directions.

    Args:
        path: the file, or the detached header.
    Returns:
        The voxels with their affine in LPS.
    Raises:
        Refused: truncated, corrupt, not_3d, not_scalar, bad_affine, bad_spacing, no_orientation,
            unsupported.
    """
    head = _nrrd(path) if path.suffix.lower() in (".nrrd", ".nhdr") else _meta(path)
    expected = head.itemsize * math.prod(head.shape)
    if head.compressed:
        inflate(head.data_file, head.offset, expected)  # SimpleITK does not verify the checksum
    else:
        check_size(head.data_file, head.data_file.stat().st_size - max(head.offset, 0), expected)
    import SimpleITK

    image = SimpleITK.ReadImage(str(path))
    voxels_KJI = SimpleITK.GetArrayFromImage(image)
    if voxels_KJI.shape[::-1] != head.shape:
        raise Refused(
            "corrupt",
            f"the header claims {head.shape} voxels, the reader found {voxels_KJI.shape[::-1]}",
        )
    return Image(
        voxels_KJI.transpose(), head.affine, header=Header(modality=head.modality), names=head.names
    )


def _numbers(text: str, count: int, what: str, reason: str) -> list[float]:
    """Exactly `count` finite numbers from a header field."""
    try:
        values = [float(word) for word in re.split(r"[\s,()]+", text.strip()) if word]
    except ValueError as error:
        raise Refused(reason, f"{what} is '{text.strip()}'; rule: {count} numbers") from error
    if len(values) != count or not np.isfinite(values).all():
        raise Refused(reason, f"{what} is '{text.strip()}'; rule: {count} finite numbers")
    return values


def _build_affine(columns: np.ndarray, origin: list[float]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns, origin
    return affine


def _beside(path: Path, name: str) -> Path:
    """The detached data file: one plain file in the header's folder."""
    data_file = path.parent / name
    if (
        name.upper().startswith("LIST")
        or "%" in name
        or data_file.resolve().parent != path.parent.resolve()
    ):
        raise Refused(
            "unsupported",
            f"data file '{name}'; rule: one file beside its header; write a single file",
        )
    if not data_file.is_file():
        raise Refused("truncated", f"the data file '{name}' is not beside its header")
    return data_file


def _nrrd_fields(path: Path) -> tuple[dict[str, str], int]:
    """Fields of a NRRD header (key:=value pairs keep their ':='), and the byte after the blank
    line.
    """
    with path.open("rb") as file:
        text = file.read(_HEADER_LIMIT)
    if not text.startswith(b"NRRD000"):
        raise Refused("corrupt", f"{path.name} does not start with NRRD000")
    blank = re.search(rb"\r?\n\r?\n", text)
    if blank is None and path.suffix.lower() == ".nrrd":
        raise Refused("truncated", f"{path.name} ends inside its header")
    end = len(text) if blank is None else blank.end()
    fields = {}
    for line in text[:end].decode("utf-8", "replace").splitlines()[1:]:
        key, found, value = line.partition(":")
        if found and not line.startswith("#"):
            fields[key.strip() + ":=" if value.startswith("=") else key.strip().lower()] = (
                value.lstrip("=").strip()
            )
    return fields, end


def _nrrd(path: Path) -> _Head:
    fields, end = _nrrd_fields(path)
    missing = [key for key in ("type", "dimension", "sizes", "encoding") if key not in fields]
    if missing:
        raise Refused("corrupt", f"the NRRD header lacks '{missing[0]}'")
    kinds = fields.get("kinds", "").split()
    directions = fields.get("space directions", "")
    if fields["dimension"] != "3":
        vector = [
            kind for kind in kinds if kind not in ("domain", "space", "time", "list", "none", "???")
        ]
        if vector:
            raise Refused(
                "not_scalar", f"an axis is of kind '{vector[0]}'; a scan has one value a voxel"
            )
        raise Refused(
            "not_3d",
            f"the file has {fields['dimension']} axes ({fields['sizes']}); a scan has three",
        )
    if "none" in directions or fields["type"] not in _NRRD_BYTES:
        raise Refused(
            "not_scalar",
            f"type '{fields['type']}', kinds '{' '.join(kinds)}'; rule: one real value a voxel",
        )
    if fields["encoding"] not in ("raw", "gzip", "gz"):
        raise Refused(
            "unsupported", f"encoding '{fields['encoding']}'; rule: raw or gzip; write it again"
        )
    if int(fields.get("line skip", "0")) or int(fields.get("byte skip", "0")) > 0:
        raise Refused("unsupported", "line skip or byte skip; write the file again without")
    space = fields.get("space", "")
    if space not in _TO_LPS or not directions or "space origin" not in fields:
        raise Refused(
            "no_orientation",
            f"space '{space}'; rule: a named space (LPS, RAS or LAS), directions and origin",
        )
    shape = tuple(int(size) for size in _numbers(fields["sizes"], 3, "sizes", "corrupt"))
    check_shape(shape)
    columns = np.asarray(_numbers(directions, 9, "space directions", "bad_affine")).reshape(3, 3).T
    origin = _numbers(fields["space origin"], 3, "space origin", "bad_affine")
    named = fields.get("data file", fields.get("datafile", ""))
    skip = int(fields.get("byte skip", "0"))
    return _Head(
        shape=shape,
        itemsize=_NRRD_BYTES[fields["type"]],
        affine=np.diag([*_TO_LPS[space], 1.0]) @ _build_affine(columns, origin),
        data_file=_beside(path, named) if named else path,
        offset=skip if named or skip < 0 else end,
        compressed=fields["encoding"] != "raw",
        names=_segment_names(fields),
    )


def _segment_names(fields: dict[str, str]) -> tuple[tuple[int, str], ...]:
    """Label values and names of a 3D Slicer segmentation."""
    values: dict[str, int] = {}
    names: dict[str, str] = {}
    for key, value in fields.items():
        match = _SEGMENT.match(key.removesuffix(":="))
        if match and match[2] == "Name":
            names[match[1]] = value
        elif match and value.isdigit():
            values[match[1]] = int(value)
    return tuple(sorted((values[number], names[number]) for number in values if number in names))


def _meta_fields(path: Path) -> tuple[dict[str, str], int]:
    """Fields of a MetaImage header and the byte after the line of ElementDataFile."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(1 << 16), b""):
            key, found, value = line.decode("utf-8", "replace").partition("=")
            if not found or file.tell() > _HEADER_LIMIT:
                break
            fields[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":
                return fields, file.tell()
    raise Refused(
        "truncated" if "NDims" in fields else "corrupt",
        f"{path.name} has no whole MetaImage header",
    )


def _meta(path: Path) -> _Head:
    fields, end = _meta_fields(path)
    missing = [key for key in ("NDims", "DimSize", "ElementType") if key not in fields]
    if missing:
        raise Refused("corrupt", f"the MetaImage header lacks '{missing[0]}'")
    if fields["NDims"] != "3":
        raise Refused(
            "not_3d", f"the file has {fields['NDims']} axes ({fields['DimSize']}); a scan has three"
        )
    element = fields["ElementType"].removeprefix("MET_")
    if element not in _META_BYTES or fields.get("ElementNumberOfChannels", "1") != "1":
        raise Refused("not_scalar", f"elements are {element}; rule: one real value a voxel")
    if (
        fields.get("BinaryData", "True").lower() == "false"
        or int(fields.get("HeaderSize", "0")) > 0
    ):
        raise Refused(
            "unsupported", "text voxels or a HeaderSize; write the file again as plain binary"
        )
    spacing = fields.get("ElementSpacing", fields.get("ElementSize"))
    if spacing is None:
        raise Refused("bad_spacing", "the MetaImage header has no ElementSpacing")
    matrix = next(
        (fields[key] for key in ("TransformMatrix", "Rotation", "Orientation") if key in fields),
        None,
    )
    origin = next(
        (fields[key] for key in ("Offset", "Position", "Origin") if key in fields), "0 0 0"
    )
    columns = (
        np.asarray(_numbers(matrix or "1 0 0 0 1 0 0 0 1", 9, "TransformMatrix", "bad_affine"))
        .reshape(3, 3)
        .T
    )
    shape = tuple(int(size) for size in _numbers(fields["DimSize"], 3, "DimSize", "corrupt"))
    check_shape(shape)
    local = fields["ElementDataFile"].upper() == "LOCAL"
    modality = fields.get("Modality", "").removeprefix("MET_MOD_")
    return _Head(
        shape=shape,
        itemsize=_META_BYTES[element],
        affine=_build_affine(
            columns * np.asarray(_numbers(spacing, 3, "ElementSpacing", "bad_spacing")),
            _numbers(origin, 3, "Offset", "bad_affine"),
        ),
        data_file=path if local else _beside(path, fields["ElementDataFile"]),
        offset=end if local else max(0, int(fields.get("HeaderSize", "0"))),
        compressed=fields.get("CompressedData", "False").lower() == "true",
        modality="" if modality in ("UNKNOWN", "OTHER") else modality,
    )
