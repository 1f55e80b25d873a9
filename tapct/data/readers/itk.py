"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd): the header is parsed and checked here, the voxels
are read by SimpleITK.

A detached header may name one data file in its own folder; lists and patterns of files are not
read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapct.data.readers.raw import Header, Image, check_shape, check_size, inflate, slack_of
from tapct.types import Refused

_HEADER_LIMIT = 4 << 20  # bytes; the header of a Slicer segmentation with many segments is smaller
_MAX_LINES = 20_000
# SimpleITK 2.5 ends the process where it reports an error in a longer line
_MAX_FIELD = 400  # characters of a field of a NRRD header; free text may be longer
_MAX_META_LINE = 1 << 16
_ONE_BYTE = ("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t")
_TWO_BYTES = (
    *("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    *("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
)
_FOUR_BYTES = (
    *("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t"),
    "float",
)
_EIGHT_BYTES = (
    *("longlong", "long long", "int64", "int64_t", "uint64", "uint64_t", "ulonglong"),
    "double",
)
_NRRD_BYTES = {
    **dict.fromkeys(_ONE_BYTE, 1),
    **dict.fromkeys(_TWO_BYTES, 2),
    **dict.fromkeys(_FOUR_BYTES, 4),
    **dict.fromkeys(_EIGHT_BYTES, 8),
}
_META_BYTES = {
    **dict.fromkeys(("CHAR", "UCHAR"), 1),
    **dict.fromkeys(("SHORT", "USHORT"), 2),
    **dict.fromkeys(("INT", "UINT", "LONG", "ULONG", "FLOAT"), 4),
    **dict.fromkeys(("LONG_LONG", "ULONG_LONG", "DOUBLE"), 8),
}
_TO_LPS = {
    **dict.fromkeys(("left-posterior-superior", "LPS"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("right-anterior-superior", "RAS"), (-1.0, -1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "LAS"), (1.0, -1.0, 1.0)),
}
_IDENTITY = "1 0 0 0 1 0 0 0 1"
_SEGMENT = re.compile(r"Segment(\d+)_(LabelValue|Name)$")


@dataclass(frozen=True)
class _Head:
    """A checked header.

    Args:
        shape: number of voxels along I, J, K.
        itemsize: bytes per voxel.
        affine: 4x4 matrix to LPS mm.
        data_file: path of the file that holds the voxels.
        offset: byte at which they start; -1 where they are the last bytes of the file.
        header_end: byte after the header in the file that holds the voxels; -1 where it is unknown.
        is_compressed: whether they are a gzip or zlib stream.
        modality: modality as the header names it, or empty.
        names: label value and name.
    """

    shape: tuple[int, ...]
    itemsize: int
    affine: np.ndarray
    data_file: Path
    offset: int
    header_end: int
    is_compressed: bool
    modality: str = ""
    names: tuple[tuple[int, str], ...] = ()


def read_nrrd(files: Sequence[Path]) -> Image:
    """Read one NRRD file.

    Rules: three spatial axes with one value per voxel. The header must name its space. The spacing
    comes from the space directions.

    Args:
        files: path of the file or of the detached header, alone.
    Returns:
        The voxels with their affine in LPS.
    Raises:
        Refused: truncated, corrupt, not_3d, not_scalar, bad_affine, bad_spacing, no_orientation,
            header_mismatch, unsupported.
    """
    (path,) = files
    return _read_voxels(path, _nrrd_head(path))


def read_meta(files: Sequence[Path]) -> Image:
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
    return _read_voxels(path, _meta_head(path))


def _read_voxels(path: Path, head: _Head) -> Image:
    """The voxels of a file whose header is checked."""
    expected = head.itemsize * math.prod(head.shape)
    slack = slack_of(head.shape, head.itemsize)
    if head.is_compressed:
        # SimpleITK does not verify the checksum
        inflate(head.data_file, head.offset, expected, slack)
    else:
        num_bytes = head.data_file.stat().st_size
        if head.header_end >= 0:
            check_size(head.data_file, num_bytes - head.header_end, expected, slack)
        else:  # the header says that other bytes come first
            check_size(head.data_file, num_bytes, expected, num_bytes)
    import SimpleITK

    image = SimpleITK.ReadImage(str(path))
    voxels_KJI = SimpleITK.GetArrayFromImage(image)
    if voxels_KJI.shape[::-1] != head.shape:
        raise Refused(
            "corrupt",
            f"the header claims {head.shape} voxels, SimpleITK reads {voxels_KJI.shape[::-1]}",
        )
    return Image(
        voxels_KJI.transpose(), head.affine, header=Header(modality=head.modality), names=head.names
    )


def _numbers(text: str, count: int, what: str, reason: str) -> list[float]:
    """Exactly `count` finite numbers from a header field."""
    try:
        values = [float(part) for part in re.split(r"[\s,()]+", text.strip()) if part]
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
    """The detached data file, which must be one plain file in the header's folder."""
    data_file = path.parent / name
    if (
        name.upper().startswith("LIST")
        or "%" in name
        or data_file.resolve().parent != path.parent.resolve()
    ):
        raise Refused(
            "unsupported",
            f"data file '{name}'; rule: one file beside its header; write scan and header into one "
            "file",
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
    lines = text[:end].decode("utf-8", "replace").splitlines()[1:]
    if len(lines) > _MAX_LINES:
        raise Refused("corrupt", f"the NRRD header has {len(lines)} lines; rule: {_MAX_LINES}")
    for line in lines:
        key, colon, value = line.partition(":")
        is_free_text = line.startswith("#") or value.startswith("=") or key == "content"
        if len(line) > _MAX_FIELD and not is_free_text:
            raise Refused(
                "corrupt",
                f"line '{line[:20]}...' of the NRRD header has {len(line)} characters; rule: at "
                f"most {_MAX_FIELD}",
            )
        if not colon or line.startswith("#"):
            continue
        is_pair = value.startswith("=")
        name = key.strip() + ":=" if is_pair else key.strip().lower()
        fields[name] = value.lstrip("=").strip()
    return fields, end


def _nrrd_head(path: Path) -> _Head:
    """Parse and check a NRRD header."""
    fields, end = _nrrd_fields(path)
    missing = [key for key in ("type", "dimension", "sizes", "encoding") if key not in fields]
    if missing:
        raise Refused("corrupt", f"the NRRD header lacks '{missing[0]}'")
    kinds = fields.get("kinds", "").split()
    directions = fields.get("space directions", "")
    if fields["dimension"] != "3":
        spatial = ("domain", "space", "time", "list", "none", "???")
        vector = [kind for kind in kinds if kind not in spatial]
        if vector:
            raise Refused(
                "not_scalar", f"an axis is of kind '{vector[0]}'; rule: one value per voxel"
            )
        raise Refused(
            "not_3d", f"the file has {fields['dimension']} axes ({fields['sizes']}); rule: three"
        )
    if "none" in directions or fields["type"] not in _NRRD_BYTES:
        raise Refused(
            "not_scalar",
            f"type '{fields['type']}', kinds '{' '.join(kinds)}'; rule: one real value per voxel",
        )
    if fields["encoding"] not in ("raw", "gzip", "gz"):
        raise Refused(
            "unsupported",
            f"encoding '{fields['encoding']}'; rule: raw or gzip; write the file again",
        )
    if int(fields.get("line skip", "0")) or int(fields.get("byte skip", "0")) > 0:
        raise Refused(
            "unsupported", "the header has a line skip or byte skip; write the file without them"
        )
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
    _check_nrrd_spacing(fields, columns)
    detached = fields.get("data file", fields.get("datafile", ""))
    skip = int(fields.get("byte skip", "0"))
    return _Head(
        shape=shape,
        itemsize=_NRRD_BYTES[fields["type"]],
        affine=np.diag([*_TO_LPS[space], 1.0]) @ _build_affine(columns, origin),
        data_file=_beside(path, detached) if detached else path,
        offset=skip if detached or skip < 0 else end,
        header_end=end if not detached else (0 if skip == 0 else -1),
        is_compressed=fields["encoding"] != "raw",
        names=_segment_names(fields),
    )


def _check_nrrd_spacing(fields: dict[str, str], columns: np.ndarray) -> None:
    """Refuse other units than mm, and spacings that contradict the space directions."""
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
    if not units <= {"mm", "millimeter", "millimeters", "millimetre", "millimetres", ""}:
        raise Refused(
            "bad_spacing", f"space units are {sorted(units)}; rule: mm; write the file again in mm"
        )
    if "spacings" in fields:
        spacings = np.asarray(_numbers(fields["spacings"], 3, "spacings", "bad_spacing"))
        norms = np.linalg.norm(columns, axis=0)
        if (np.abs(norms - spacings) > 0.05 * norms).any():
            raise Refused(
                "header_mismatch",
                f"spacings {spacings.tolist()} and space directions {norms.round(4).tolist()} "
                "differ by over 5 %",
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
        for line in iter(lambda: file.readline(_MAX_META_LINE), b""):
            if len(line) == _MAX_META_LINE:
                raise Refused(
                    "corrupt", f"a line of the header has over {_MAX_META_LINE} characters"
                )
            key, equals, value = line.decode("utf-8", "replace").partition("=")
            if not equals or file.tell() > _HEADER_LIMIT:
                break
            fields[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":
                return fields, file.tell()
    raise Refused(
        "truncated" if "NDims" in fields else "corrupt",
        f"{path.name} has no complete MetaImage header",
    )


def _meta_head(path: Path) -> _Head:
    """Parse and check a MetaImage header."""
    fields, end = _meta_fields(path)
    missing = [key for key in ("NDims", "DimSize", "ElementType") if key not in fields]
    if missing:
        raise Refused("corrupt", f"the MetaImage header lacks '{missing[0]}'")
    if fields["NDims"] != "3":
        raise Refused(
            "not_3d", f"the file has {fields['NDims']} axes ({fields['DimSize']}); rule: three"
        )
    element = fields["ElementType"].removeprefix("MET_")
    if element not in _META_BYTES or fields.get("ElementNumberOfChannels", "1") != "1":
        raise Refused("not_scalar", f"elements are {element}; rule: one real value per voxel")
    if (
        fields.get("BinaryData", "True").lower() == "false"
        or int(fields.get("HeaderSize", "0")) > 0
    ):
        raise Refused(
            "unsupported",
            "voxels are text or have a HeaderSize; write the file again as plain binary",
        )
    spacing = fields.get("ElementSpacing", fields.get("ElementSize"))
    if spacing is None:
        raise Refused("bad_spacing", "the MetaImage header has no ElementSpacing")
    matrix = _first(fields, ("TransformMatrix", "Rotation", "Orientation"), "") or _IDENTITY
    origin = _first(fields, ("Offset", "Position", "Origin"), "0 0 0")
    directions = np.asarray(_numbers(matrix, 9, "TransformMatrix", "bad_affine")).reshape(3, 3)
    shape = tuple(int(size) for size in _numbers(fields["DimSize"], 3, "DimSize", "corrupt"))
    check_shape(shape)
    spacings = np.asarray(_numbers(spacing, 3, "ElementSpacing", "bad_spacing"))
    if (spacings <= 0).any():
        raise Refused("bad_spacing", f"ElementSpacing is {spacings.tolist()}; rule: numbers > 0")
    lengths = np.linalg.norm(directions, axis=1)
    if (np.abs(lengths - 1.0) > 0.05).any():
        raise Refused(
            "header_mismatch",
            f"the rows of TransformMatrix have lengths {lengths.round(3).tolist()}; rule: 1, the "
            "spacing stands in ElementSpacing",
        )
    local = fields["ElementDataFile"].upper() == "LOCAL"
    modality = fields.get("Modality", "").removeprefix("MET_MOD_")
    return _Head(
        shape=shape,
        itemsize=_META_BYTES[element],
        affine=_build_affine(directions.T * spacings, _numbers(origin, 3, "Offset", "bad_affine")),
        data_file=path if local else _beside(path, fields["ElementDataFile"]),
        offset=end if local else max(0, int(fields.get("HeaderSize", "0"))),
        header_end=end if local else min(0, int(fields.get("HeaderSize", "0"))),
        is_compressed=fields.get("CompressedData", "False").lower() == "true",
        modality="" if modality in ("UNKNOWN", "OTHER") else modality,
    )


def _first(fields: dict[str, str], keys: Sequence[str], default: str) -> str:
    """The first of these fields that the header has; MetaImage has several names for one thing."""
    for key in keys:
        if key in fields:
            return fields[key]
    return default
