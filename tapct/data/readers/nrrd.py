"""NRRD (.nrrd, .nhdr): the header is parsed and checked here.

A detached header may name one data file in its own folder; lists and patterns of files are not
read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tapct.base.marks import file_name, quoted
from tapct.data.readers.raw import Image, Segment, check_shape, other_format
from tapct.data.readers.text_head import (
    HEADER_LIMIT,
    TextHead,
    beside,
    build_affine,
    numbers,
    read_array,
    read_voxels,
)
from tapct.types import Refused

_MAX_LINES = 20_000
_MAX_FIELD = 400  # characters of a field of a NRRD header; free text may be longer
_TYPES = {  # numpy's names; the byte order is a field of its own
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(
        ("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"
    ),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "uint64", "uint64_t"), "u8"),
    **{"float": "f4", "double": "f8"},
}
_TO_LPS = {
    **dict.fromkeys(("left-posterior-superior", "LPS"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("right-anterior-superior", "RAS"), (-1.0, -1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "LAS"), (1.0, -1.0, 1.0)),
}
# all fields of the NRRD format, which is a closed list, without blanks
_FIELDS = {
    *("content", "number", "type", "blocksize", "dimension", "space", "spacedimension", "sizes"),
    *("spacings", "thicknesses", "axismins", "axismaxs", "centers", "centerings", "labels"),
    *("units", "spaceunits", "min", "max", "oldmin", "oldmax", "datafile", "endian", "encoding"),
    *("lineskip", "byteskip", "kinds", "spaceorigin", "spacedirections", "measurementframe"),
    "sampleunits",
}
_SPATIAL_KINDS = ("domain", "space", "none", "???")
_SEGMENT = re.compile(r"Segment(\d{1,6})_(LabelValue|Name|Layer)$")


@dataclass(frozen=True)
class Slicer:
    """A label file.

    Args:
        layers: one image per layer.
        segments: the segments that it lists; empty where 3D Slicer did not write it.
    """

    layers: tuple[Image, ...]
    segments: tuple[Segment, ...] = ()


def read(files: Sequence[Path]) -> Image:
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
    with path.open("rb") as file:
        fields, end = _fields(path, file)
        return read_voxels(_head(path, fields, end), file)


def read_slicer(path: Path) -> Slicer:
    """Read a label file, which may be a segmentation of 3D Slicer.

    Rules: as in `read`; in a segmentation there may be a first axis of kind `list`, over layers.

    Raises:
        Refused: as `read`.
    """
    with path.open("rb") as file:
        fields, end = _fields(path, file)
        segments = _segments(fields)
        head = _head(path, fields, end, with_layers=bool(segments))
        if head.num_layers == 1:
            return Slicer((read_voxels(head, file),), segments)
        voxels = read_array(head, file)  # (K, J, I, layer)
    layers = [
        Image(voxels[..., layer].transpose(), head.affine, names=head.names)
        for layer in range(head.num_layers)
    ]
    return Slicer(tuple(layers), segments)


def _segments(fields: dict[str, str]) -> tuple[Segment, ...]:
    """The segments that a header lists, in their order; empty for a file that 3D Slicer did not
    write as a segmentation.
    """
    segments = []
    for _, entry in sorted(_segment_table(fields).items()):
        value, layer = entry.get("LabelValue", ""), entry.get("Layer", "0")
        if value.isdigit() and layer.isdigit():
            segments.append(Segment(int(layer), int(value), entry.get("Name", "")))
    return tuple(segments)


def _fields(path: Path, file: BinaryIO) -> tuple[dict[str, str], int]:
    """Fields of a NRRD header (key:=value pairs keep their ':='), and the byte after the blank
    line.

    Args:
        path: path of the file.
        file: the file, which is open.
    """
    text = file.read(HEADER_LIMIT)
    if not text.startswith(b"NRRD000"):
        raise other_format(path, text, "NRRD")
    blank = re.search(rb"\r?\n\r?\n", text)
    if blank is None and path.suffix.lower() == ".nrrd":
        raise Refused("truncated", f"{file_name(path)} ends inside its header")
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
                f"line {quoted(line[:20] + '...')} of the NRRD header has {len(line)} "
                "characters; rule: at "
                f"most {_MAX_FIELD}",
            )
        if line.startswith("#") or not line.strip():
            continue
        is_pair = value.startswith("=")
        name = key.strip() + ":=" if is_pair else key.strip().lower()
        if not is_pair and (not colon or name.replace(" ", "") not in _FIELDS):
            raise Refused(
                "corrupt", f"line {quoted(line[:40])} of the NRRD header is no field of NRRD"
            )
        if name in fields and not is_pair:
            raise Refused("corrupt", f"the NRRD header has the field {quoted(name)} twice")
        fields[name] = value.lstrip("=").strip()
        if name.replace(" ", "") == "datafile" and fields[name].upper().startswith("LIST"):
            break  # the names of the files follow
    return fields, end


def _head(path: Path, fields: dict[str, str], end: int, *, with_layers: bool = False) -> TextHead:
    """Check a NRRD header.

    Args:
        path: path of the file.
        fields, end: fields of the header, and the byte after it, see `_fields`.
        with_layers: whether there may be a first axis over layers.
    """
    missing = [key for key in ("type", "dimension", "sizes", "encoding") if key not in fields]
    if missing:
        raise Refused("corrupt", f"the NRRD header lacks {quoted(missing[0])}")
    num_layers = _take_layer_axis(fields) if with_layers else 1
    _check_axes(fields)
    _check_encoding(fields)
    shape = tuple(int(size) for size in numbers(fields["sizes"], 3, "sizes", "corrupt"))
    check_shape(shape)
    detached = fields.get("data file", fields.get("datafile", ""))
    skip = int(fields.get("byte skip", "0"))
    return TextHead(
        header_file=path,
        shape=shape,
        dtype=_dtype(fields),
        affine=_affine(fields),
        data_file=beside(path, detached) if detached else path,
        offset=skip if detached or skip < 0 else end,
        header_end=end if not detached else (0 if skip == 0 else -1),
        is_compressed=fields["encoding"] != "raw",
        names=_segment_names(fields),
        num_layers=num_layers,
    )


def _check_axes(fields: dict[str, str]) -> None:
    """Refuse a header without three spatial axes, or with more than one real value per voxel."""
    kinds = fields.get("kinds", "").split()
    if fields["dimension"] != "3":
        spatial = ("domain", "space", "time", "list", "none", "???")
        vector = [kind for kind in kinds if kind not in spatial]
        if vector:
            raise Refused(
                "not_scalar", f"an axis is of kind {quoted(vector[0])}; rule: one value per voxel"
            )
        raise Refused(
            "not_3d",
            f"the file has {quoted(fields['dimension'])} axes, {quoted(fields['sizes'])}; "
            "rule: three",
        )
    odd = [kind for kind in kinds if kind not in _SPATIAL_KINDS]
    if odd or (kinds and len(kinds) != 3):
        raise Refused(
            "corrupt", f"kinds are {quoted(' '.join(kinds))}; rule: three times domain or space"
        )
    if "none" in fields.get("space directions", "") or fields["type"] not in _TYPES:
        raise Refused(
            "not_scalar",
            f"type {quoted(fields['type'])}, kinds {quoted(' '.join(kinds))}; rule: one real "
            "value per voxel",
        )


def _check_encoding(fields: dict[str, str]) -> None:
    """Refuse voxels that are stored in a way that tapct does not read."""
    if fields["encoding"] not in ("raw", "gzip", "gz"):
        raise Refused(
            "unsupported",
            f"encoding {quoted(fields['encoding'])}; rule: raw or gzip; write the file again",
        )
    if int(fields.get("line skip", "0")) or int(fields.get("byte skip", "0")) > 0:
        raise Refused(
            "unsupported", "the header has a line skip or byte skip; write the file without them"
        )


def _affine(fields: dict[str, str]) -> np.ndarray:
    """The affine in LPS millimetres, checked."""
    space, directions = fields.get("space", ""), fields.get("space directions", "")
    if space not in _TO_LPS or not directions or "space origin" not in fields:
        raise Refused(
            "no_orientation",
            f"space {quoted(space)}; rule: a named space (LPS, RAS or LAS), directions and origin",
        )
    columns = np.asarray(numbers(directions, 9, "space directions", "bad_affine")).reshape(3, 3).T
    origin = numbers(fields["space origin"], 3, "space origin", "bad_affine")
    _check_spacing(fields, columns)
    affine: np.ndarray = np.diag([*_TO_LPS[space], 1.0]) @ build_affine(columns, origin)
    return affine


def _dtype(fields: dict[str, str]) -> np.dtype:
    """The type of a voxel; the byte order must be given where a voxel has several bytes."""
    name, endian = _TYPES[fields["type"]], fields.get("endian", "")
    if endian not in ("little", "big") and not name.endswith("1"):
        raise Refused("corrupt", f"endian is {quoted(endian)}; rule: little or big")
    return np.dtype((">" if endian == "big" else "<") + name)


def _take_layer_axis(fields: dict[str, str]) -> int:
    """Remove a first axis over layers from the fields of a header.

    Returns:
        The number of layers; 1 where there is no such axis.
    """
    kinds, sizes = fields.get("kinds", "").split(), fields["sizes"].split()
    directions = fields.get("space directions", "")
    is_layered = fields["dimension"] == "4" and kinds[:1] in (["list"], ["vector"])
    if not is_layered or len(sizes) != 4 or not directions.startswith("none") or sizes[0] == "0":
        return 1
    fields["dimension"], fields["kinds"] = "3", " ".join(kinds[1:])
    fields["sizes"] = " ".join(sizes[1:])
    fields["space directions"] = directions.removeprefix("none")
    return int(sizes[0]) if sizes[0].isdigit() else 1


def _segment_table(fields: dict[str, str]) -> dict[int, dict[str, str]]:
    """Number of a segment of 3D Slicer -> its fields LabelValue, Name and Layer."""
    table: dict[int, dict[str, str]] = {}
    for key, value in fields.items():
        match = _SEGMENT.match(key.removesuffix(":="))
        if match:
            table.setdefault(int(match[1]), {})[match[2]] = value
    return table


def _check_spacing(fields: dict[str, str], columns: np.ndarray) -> None:
    """Refuse other units than mm, and spacings that contradict the space directions."""
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
    if not units <= {"mm", "millimeter", "millimeters", "millimetre", "millimetres", ""}:
        raise Refused(
            "bad_spacing", f"space units are {sorted(units)}; rule: mm; write the file again in mm"
        )
    if "spacings" in fields:
        spacings = np.asarray(numbers(fields["spacings"], 3, "spacings", "bad_spacing"))
        norms = np.linalg.norm(columns, axis=0)
        if (np.abs(norms - spacings) > 0.05 * norms).any():
            raise Refused(
                "header_mismatch",
                f"spacings {spacings.tolist()} and space directions {norms.round(4).tolist()} "
                "differ by over 5 %",
            )


def _segment_names(fields: dict[str, str]) -> tuple[tuple[int, str], ...]:
    """Label values and names of a 3D Slicer segmentation."""
    return tuple(
        sorted(
            (int(segment["LabelValue"]), segment["Name"])
            for segment in _segment_table(fields).values()
            if segment.get("LabelValue", "").isdigit() and "Name" in segment
        )
    )
