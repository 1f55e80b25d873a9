"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd): the header is parsed and checked here, the voxels
are read by numpy.

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

from tapct.base.marks import file_name, quoted
from tapct.data.readers.raw import (
    Header,
    Image,
    Segment,
    check_shape,
    check_size,
    inflate,
    other_format,
    read_head,
    slack_of,
)
from tapct.types import Refused

_HEADER_LIMIT = 4 << 20  # bytes; the header of a Slicer segmentation with many segments is smaller
_MAX_LINES = 20_000
_MAX_FIELD = 400  # characters of a field of a NRRD header; free text may be longer
_MAX_META_LINE = 1 << 16
_START = 540  # bytes that show what a file is
_NRRD_TYPES = {  # numpy's names; the byte order is a field of its own
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
_META_TYPES = {
    **{"CHAR": "i1", "UCHAR": "u1", "SHORT": "i2", "USHORT": "u2", "INT": "i4", "UINT": "u4"},
    **{"LONG": "i4", "ULONG": "u4", "LONG_LONG": "i8", "ULONG_LONG": "u8"},
    **{"FLOAT": "f4", "DOUBLE": "f8"},
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
_IDENTITY = "1 0 0 0 1 0 0 0 1"
_SEGMENT = re.compile(r"Segment(\d{1,6})_(LabelValue|Name|Layer)$")


@dataclass(frozen=True)
class _Head:
    """A checked header.

    Args:
        shape: number of voxels along I, J, K.
        dtype: type of a voxel, in the byte order of the file.
        affine: 4x4 matrix to LPS mm.
        data_file: path of the file that holds the voxels.
        offset: byte at which they start; -1 where they are the last bytes of the file.
        header_end: byte after the header in the file that holds the voxels; -1 where it is unknown.
        is_compressed: whether they are a gzip or zlib stream.
        modality: modality as the header names it, or empty.
        names: label value and name.
        num_layers: number of values per voxel, which lie one after the other; more than 1 only
            in a segmentation of 3D Slicer with overlapping segments.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray
    data_file: Path
    offset: int
    header_end: int
    is_compressed: bool
    modality: str = ""
    names: tuple[tuple[int, str], ...] = ()
    num_layers: int = 1


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
    return _read_voxels(_nrrd_head(path))


def read_slicer(path: Path) -> tuple[Image, ...]:
    """Read the layers of a segmentation of 3D Slicer, one image per layer.

    Rules: as in `read_nrrd`, but there may be a first axis of kind `list`, over layers.

    Raises:
        Refused: as `read_nrrd`.
    """
    head = _nrrd_head(path, with_layers=True)
    if head.num_layers == 1:
        return (_read_voxels(head),)
    voxels = _read_array(head)  # (K, J, I, layer)
    return tuple(
        Image(voxels[..., layer].transpose(), head.affine, names=head.names)
        for layer in range(head.num_layers)
    )


def segments_of(path: Path) -> tuple[Segment, ...]:
    """The segments that a file lists, in their order; empty for a file that 3D Slicer did not write
    as a segmentation.
    """
    if path.suffix.lower() not in (".nrrd", ".nhdr"):
        return ()
    table = _segment_table(_nrrd_fields(path)[0])
    segments = []
    for _, fields in sorted(table.items()):
        value, layer = fields.get("LabelValue", ""), fields.get("Layer", "0")
        if value.isdigit() and layer.isdigit():
            segments.append(Segment(int(layer), int(value), fields.get("Name", "")))
    return tuple(segments)


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
    return _read_voxels(_meta_head(path))


def _read_voxels(head: _Head) -> Image:
    """The voxels of a file whose header is checked."""
    return Image(
        _read_array(head).transpose(),
        head.affine,
        header=Header(modality=head.modality),
        names=head.names,
    )


def _read_array(head: _Head) -> np.ndarray:
    """The array of a file whose header is checked: (K, J, I), or (K, J, I, layer)."""
    layers = (head.num_layers,) if head.num_layers > 1 else ()
    shape = (*head.shape[::-1], *layers)
    count = math.prod(shape)
    expected = head.dtype.itemsize * count
    slack = slack_of(head.shape, head.dtype.itemsize * head.num_layers)
    # not by SimpleITK: where its parser differs from ours, or its zlib fails, it returns other
    # voxels without an error, and where it reports an error in a long line, it ends the process
    if head.is_compressed:
        content = inflate(head.data_file, head.offset, expected, slack)
        return np.frombuffer(content, head.dtype).reshape(shape)
    num_bytes = head.data_file.stat().st_size
    offset = head.offset if head.offset >= 0 else num_bytes - expected
    # where the voxels are the last bytes of a file with a header, nothing may lie between the two
    first = head.header_end if head.header_end >= 0 else offset
    check_size(head.data_file, num_bytes - max(first, 0), expected, slack)
    return np.fromfile(head.data_file, head.dtype, count, offset=offset).reshape(shape)


def _numbers(text: str, count: int, what: str, reason: str) -> list[float]:
    """Exactly `count` finite numbers from a header field."""
    try:
        values = [float(part) for part in re.split(r"[\s,()]+", text.strip()) if part]
    except ValueError as error:
        raise Refused(reason, f"{what} is {quoted(text.strip())}; rule: {count} numbers") from error
    if len(values) != count or not np.isfinite(values).all():
        raise Refused(reason, f"{what} is {quoted(text.strip())}; rule: {count} finite numbers")
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
            f"data file {quoted(name)} is a list or pattern of files, or lies in another folder; "
            "rule: one file beside its header; write scan and header into one file",
        )
    if not data_file.is_file():
        raise Refused("truncated", f"the data file {quoted(name)} is not beside its header")
    return data_file


def _nrrd_fields(path: Path) -> tuple[dict[str, str], int]:
    """Fields of a NRRD header (key:=value pairs keep their ':='), and the byte after the blank
    line.
    """
    with path.open("rb") as file:
        text = file.read(_HEADER_LIMIT)
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


def _nrrd_head(path: Path, *, with_layers: bool = False) -> _Head:
    """Parse and check a NRRD header; a first axis over layers is an error unless `with_layers`."""
    fields, end = _nrrd_fields(path)
    missing = [key for key in ("type", "dimension", "sizes", "encoding") if key not in fields]
    if missing:
        raise Refused("corrupt", f"the NRRD header lacks {quoted(missing[0])}")
    num_layers = _take_layer_axis(fields) if with_layers else 1
    kinds = fields.get("kinds", "").split()
    directions = fields.get("space directions", "")
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
    if "none" in directions or fields["type"] not in _NRRD_TYPES:
        raise Refused(
            "not_scalar",
            f"type {quoted(fields['type'])}, kinds {quoted(' '.join(kinds))}; rule: one real "
            "value per voxel",
        )
    if fields["encoding"] not in ("raw", "gzip", "gz"):
        raise Refused(
            "unsupported",
            f"encoding {quoted(fields['encoding'])}; rule: raw or gzip; write the file again",
        )
    if int(fields.get("line skip", "0")) or int(fields.get("byte skip", "0")) > 0:
        raise Refused(
            "unsupported", "the header has a line skip or byte skip; write the file without them"
        )
    space = fields.get("space", "")
    if space not in _TO_LPS or not directions or "space origin" not in fields:
        raise Refused(
            "no_orientation",
            f"space {quoted(space)}; rule: a named space (LPS, RAS or LAS), directions and origin",
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
        dtype=_nrrd_dtype(fields),
        affine=np.diag([*_TO_LPS[space], 1.0]) @ _build_affine(columns, origin),
        data_file=_beside(path, detached) if detached else path,
        offset=skip if detached or skip < 0 else end,
        header_end=end if not detached else (0 if skip == 0 else -1),
        is_compressed=fields["encoding"] != "raw",
        names=_segment_names(fields),
        num_layers=num_layers,
    )


def _nrrd_dtype(fields: dict[str, str]) -> np.dtype:
    """The type of a voxel; the byte order must be given where a voxel has several bytes."""
    name, endian = _NRRD_TYPES[fields["type"]], fields.get("endian", "")
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
    return tuple(
        sorted(
            (int(segment["LabelValue"]), segment["Name"])
            for segment in _segment_table(fields).values()
            if segment.get("LabelValue", "").isdigit() and "Name" in segment
        )
    )


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
            if fields.setdefault(key.strip(), value.strip()) != value.strip():
                raise Refused("corrupt", f"the header has two values of {quoted(key.strip())}")
            if key.strip() == "ElementDataFile":
                return fields, file.tell()
    if not fields.keys() & {"ObjectType", "NDims", "DimSize"}:
        raise other_format(path, read_head(path, _START), "MetaImage")
    raise Refused("truncated", f"{file_name(path)} has no complete MetaImage header")


def _meta_head(path: Path) -> _Head:
    """Parse and check a MetaImage header."""
    fields, end = _meta_fields(path)
    missing = [key for key in ("NDims", "DimSize", "ElementType") if key not in fields]
    if missing:
        raise Refused("corrupt", f"the MetaImage header lacks {quoted(missing[0])}")
    if fields["NDims"] != "3":
        raise Refused(
            "not_3d",
            f"the file has {quoted(fields['NDims'])} axes, {quoted(fields['DimSize'])}; "
            "rule: three",
        )
    element = fields["ElementType"].removeprefix("MET_")
    if element not in _META_TYPES or fields.get("ElementNumberOfChannels", "1") != "1":
        raise Refused(
            "not_scalar", f"elements are {quoted(element)}; rule: one real value per voxel"
        )
    if not _is_true(fields.get("BinaryData", "True")) or int(fields.get("HeaderSize", "0")) > 0:
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
    scaling = [_first(fields, (f"ElementToIntensityFunction{k}",), "") for k in ("Slope", "Offset")]
    if any(text and float(text) != plain for text, plain in zip(scaling, (1.0, 0.0))):
        raise Refused(
            "unsupported",
            f"ElementToIntensityFunctionSlope and -Offset are {scaling}; write the file with HU",
        )
    is_big = _is_true(_first(fields, ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"), ""))
    order = ">" if is_big else "<"
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
        dtype=np.dtype(order + _META_TYPES[element]),
        affine=_build_affine(directions.T * spacings, _numbers(origin, 3, "Offset", "bad_affine")),
        data_file=path if local else _beside(path, fields["ElementDataFile"]),
        offset=end if local else int(fields.get("HeaderSize", "0")),
        header_end=end if local else min(0, int(fields.get("HeaderSize", "0"))),
        is_compressed=_is_true(fields.get("CompressedData", "")),
        modality="" if modality in ("UNKNOWN", "OTHER") else modality,
    )


def _is_true(text: str) -> bool:
    """Whether a field is true by the rule of the MetaImage library, which reads one letter."""
    return text[:1] in ("T", "t", "1")


def _first(fields: dict[str, str], keys: Sequence[str], default: str) -> str:
    """The first of these fields that the header has; MetaImage has several names for one thing."""
    for key in keys:
        if key in fields:
            return fields[key]
    return default
