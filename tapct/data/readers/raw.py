"""What every reader returns, and the checks of integrity that readers share.

Axes: I J K are the file's own axes, fastest first; positions are LPS millimetres as in DICOM.
"""

from __future__ import annotations

import contextlib
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tapct.base.marks import file_name
from tapct.types import Refused

# a header that claims more is broken: 65k slices of 256 x 256, or 16k of 512 x 512
MAX_VOXELS = 2**32
MAX_TEXT = 200  # characters that the manifest keeps of a header field or of a library's message
_CHUNK = 1 << 20
_MAX_SLACK = 4096  # bytes; some tools pad files to whole blocks
_INFLATED = 1 << 24  # bytes that are inflated at once
_SURPLUS = 1 << 26  # bytes that may follow the voxels, whatever their number
# what reader libraries write where an allocation failed; ITK raises RuntimeError
_NO_MEMORY = re.compile("bad_alloc|bad allocation|failed to allocate|not enough memory", re.I)


@dataclass(frozen=True)
class Header:
    """Facts about a scan from its header, as text; empty where the header has none.

    `headers` cleans it, and `patients` hashes the identifiers, which are never stored as they are.

    Args:
        patient_id: PatientID.
        study_uid: StudyInstanceUID.
        series_uid: SeriesInstanceUID.
        study_date, modality, manufacturer, kernel, sex, age: text of the elements of these names.
        model, kvp, thickness, contrast, body_part: text of ManufacturerModelName, KVP,
            SliceThickness, ContrastBolusAgent and BodyPartExamined.
    """

    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    study_date: str = ""
    modality: str = ""
    manufacturer: str = ""
    kernel: str = ""
    sex: str = ""
    age: str = ""
    model: str = ""
    kvp: str = ""
    thickness: str = ""
    contrast: str = ""
    body_part: str = ""


@dataclass(frozen=True)
class Image:
    """Voxels as the file stores them, and how they become HU at a place in space.

    Args:
        voxels_IJK: voxels of any real dtype; their HU are voxels * slope + intercept.
        affine: float64 4x4 matrix, (i, j, k, 1) -> LPS mm.
        slope: factor to HU, unitless.
        intercept: offset in HU.
        header: facts about the scan from the header.
        names: label value and name, where the file holds a table of labels.
        is_lossy: whether the voxels were compressed with loss, now or at any time before.
        lossy_ratio: ratio of that compression; NaN where it is unknown or there was none.
        derived: in a few words how the image was computed from others, such as a projection; empty
            for plain slices.
        stored_type: type of the values in the file, where `voxels_IJK` has another one.
        rescaling: slope and intercept of the first slice, where they have been applied.
        steps_mm: smallest and largest distance of neighbouring slices, where each has its own
            place.
    """

    voxels_IJK: np.ndarray
    affine: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    header: Header = field(default_factory=Header)
    names: tuple[tuple[int, str], ...] = ()
    is_lossy: bool = False
    lossy_ratio: float = math.nan
    derived: str = ""
    stored_type: str = ""
    rescaling: tuple[float, float] | None = None
    steps_mm: tuple[float, float] | None = None


@dataclass(frozen=True)
class Segment:
    """One segment of a segmentation of 3D Slicer.

    Args:
        layer: number of the layer that holds it, from 0.
        value: its value in that layer.
        name: its name as the file holds it; empty where it has none.
    """

    layer: int
    value: int
    name: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of a reader library means that an allocation failed."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def other_format(path: Path, head: bytes, expected: str) -> Refused:
    """The refusal of a file that does not begin like the format of its name.

    Args:
        path: path of the file.
        head: its first 132 bytes or more, after decompression.
        expected: format that its name means.
    """
    found = ""
    if head[128:132] == b"DICM":
        found, suffix = "DICOM", ".dcm"
    elif head.startswith(b"NRRD000"):
        found, suffix = "NRRD", ".nrrd"
    elif head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2"):
        found, suffix = "NIfTI", ".nii"
    elif head.startswith((b"ObjectType", b"NDims")):
        found, suffix = "MetaImage", ".mha"
    if found and found != expected:
        return Refused(
            "corrupt",
            f"{file_name(path)} holds {found} in spite of its name; give it the suffix {suffix}",
        )
    return Refused("corrupt", f"{file_name(path)} does not start with {expected}")


@contextlib.contextmanager
def opened(path: Path, file: BinaryIO | None = None, offset: int = 0) -> Iterator[BinaryIO]:
    """A file at one of its bytes.

    Args:
        path: path of the file.
        file: the file where it is open, so that it is opened once; it stays open.
        offset: number of the byte.
    """
    with contextlib.ExitStack() as stack:
        if file is None:
            file = stack.enter_context(path.open("rb"))
        file.seek(offset)
        yield file


def is_gzip(path: Path, file: BinaryIO | None = None) -> bool:
    """Whether the content, not the name, is a gzip stream; arguments as in `opened`."""
    with opened(path, file) as content:
        return content.read(2) == b"\x1f\x8b"


def read_head(path: Path, num_bytes: int, file: BinaryIO | None = None) -> bytes:
    """The first bytes of a file after decompression; fewer where the file is shorter.

    Args:
        path, file: as in `opened`.
        num_bytes: number of bytes.
    Raises:
        Refused: the gzip stream is damaged in its first bytes.
    """
    with opened(path, file) as content:
        start = content.read(64 * 1024)
    if start[:2] != b"\x1f\x8b":
        return start[:num_bytes]
    try:
        return zlib.decompressobj(31).decompress(start, num_bytes)
    except zlib.error as error:
        raise Refused(
            "corrupt", f"{file_name(path)} is not a readable gzip stream; copy it again"
        ) from error


def inflate(
    path: Path, offset: int, expected: int, slack: int = 0, file: BinaryIO | None = None
) -> bytes:
    """Decompress the gzip or zlib streams at `offset` to their end, so that checksum and length are
    verified.

    Args:
        path, file: as in `opened`.
        offset: byte at which the compressed data starts.
        expected: number of bytes that the header promises; what follows them is checked but not
            kept.
        slack: number of bytes that may follow them.
    Returns:
        The first `expected` bytes.
    Raises:
        Refused: `truncated` when the stream ends early, `corrupt` when its checksum is wrong,
            `header_mismatch` when it holds more.
    """
    kept = bytearray()
    num_bytes, limit = 0, 2 * expected + _SURPLUS
    whole = False
    # 47: zlib recognises a gzip or zlib header by itself and verifies the trailer
    stream = zlib.decompressobj(47)
    with opened(path, file, offset) as content:
        chunk = content.read(_CHUNK)
        while chunk:
            try:
                # a limit, because 1 MB can inflate to 1 GB
                data = stream.decompress(chunk, _INFLATED)
            except zlib.error as error:
                if whole and len(kept) >= expected:
                    break  # padding after the last stream
                raise Refused(
                    "corrupt",
                    f"{file_name(path)} is damaged: its compressed content or the checksum of it "
                    "is wrong; copy it again",
                ) from error
            kept += data[: max(0, expected - len(kept))]
            num_bytes += len(data)
            if num_bytes > limit:
                raise Refused(
                    "corrupt",
                    f"{file_name(path)} inflates to more than {limit} bytes, its header promises "
                    f"{expected}",
                )
            whole = stream.eof
            chunk = stream.unused_data if stream.eof else stream.unconsumed_tail
            if stream.eof:
                stream = zlib.decompressobj(47)  # gzip files may hold several members (bgzip)
            chunk = chunk or content.read(_CHUNK)
    if not whole or len(kept) < expected:
        raise Refused(
            "truncated",
            f"{file_name(path)} ends after {len(kept)} of {expected} bytes of header and "
            "voxels; copy "
            "it again",
        )
    check_size(path, num_bytes, expected, slack)
    return bytes(kept)


def slack_of(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes that may follow the voxels: less than any face of the volume, so that no slice is left
    over, and no more than a page.

    Args:
        shape: number of voxels along I, J, K.
        itemsize: bytes per voxel.
    """
    return min(_MAX_SLACK, itemsize * math.prod(shape) // max(shape) - 1)


def check_size(path: Path, num_bytes: int, expected: int, slack: int) -> None:
    """Refuse a file whose size does not fit its header.

    Args:
        path: path of the file.
        num_bytes: number of bytes that it holds, after decompression.
        expected: number of bytes that the header promises.
        slack: number of bytes that may follow them, see `slack_of`.
    Raises:
        Refused: truncated, header_mismatch.
    """
    if num_bytes < expected:
        raise Refused(
            "truncated", f"{file_name(path)} holds {num_bytes} of {expected} bytes; copy it again"
        )
    if num_bytes > expected + slack:
        raise Refused(
            "header_mismatch",
            f"{file_name(path)} holds {num_bytes} bytes, but its header describes "
            f"{expected}: it claims "
            "fewer or smaller voxels; write the file again",
        )


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse sizes that no scan has.

    Args:
        shape: number of voxels along I, J, K.
    """
    if any(size < 1 for size in shape) or math.prod(shape) > MAX_VOXELS:
        raise Refused(
            "bad_shape",
            f"the header claims {'x'.join(map(str, shape))} voxels; rule: 1 to {MAX_VOXELS}",
        )
