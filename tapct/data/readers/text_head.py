"""What NRRD and MetaImage have in common: a text header, and voxels that follow it or lie in a file
beside it. The voxels are read by numpy.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tapct.base.marks import quoted
from tapct.data.readers.raw import Header, Image, check_size, inflate, opened, slack_of
from tapct.types import Refused

HEADER_LIMIT = 4 << 20  # bytes; the header of a Slicer segmentation with many segments is smaller


@dataclass(frozen=True)
class TextHead:
    """A checked header.

    Args:
        header_file: path of the file that holds the header.
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

    header_file: Path
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


def read_voxels(head: TextHead, file: BinaryIO) -> Image:
    """The voxels of a file whose header is checked; arguments as in `read_array`."""
    return Image(
        read_array(head, file).transpose(),
        head.affine,
        header=Header(modality=head.modality),
        names=head.names,
    )


def read_array(head: TextHead, file: BinaryIO) -> np.ndarray:
    """The array of a file whose header is checked: (K, J, I), or (K, J, I, layer).

    Args:
        head: header.
        file: the file of the header, which is open; most often it holds the voxels too.
    """
    layers = (head.num_layers,) if head.num_layers > 1 else ()
    shape = (*head.shape[::-1], *layers)
    count = math.prod(shape)
    expected = head.dtype.itemsize * count
    slack = slack_of(head.shape, head.dtype.itemsize * head.num_layers)
    # not by SimpleITK: where its parser differs from ours, or its zlib fails, it returns other
    # voxels without an error, and where it reports an error in a long line, it ends the process
    is_same = head.data_file == head.header_file
    with opened(head.data_file, file if is_same else None) as voxel_file:
        if head.is_compressed:
            content = inflate(head.data_file, head.offset, expected, slack, voxel_file)
            return np.frombuffer(content, head.dtype).reshape(shape)
        num_bytes = os.fstat(voxel_file.fileno()).st_size
        offset = head.offset if head.offset >= 0 else num_bytes - expected
        # where the voxels are the last bytes of a file with a header, nothing may lie between them
        first = head.header_end if head.header_end >= 0 else offset
        check_size(head.data_file, num_bytes - max(first, 0), expected, slack)
        voxel_file.seek(offset)
        return np.fromfile(voxel_file, head.dtype, count).reshape(shape)


def numbers(text: str, count: int, what: str, reason: str) -> list[float]:
    """Exactly `count` finite numbers from a header field."""
    try:
        values = [float(part) for part in re.split(r"[\s,()]+", text.strip()) if part]
    except ValueError as error:
        raise Refused(reason, f"{what} is {quoted(text.strip())}; rule: {count} numbers") from error
    if len(values) != count or not np.isfinite(values).all():
        raise Refused(reason, f"{what} is {quoted(text.strip())}; rule: {count} finite numbers")
    return values


def build_affine(columns: np.ndarray, origin: list[float]) -> np.ndarray:
    """A 4x4 matrix from the steps along the three axes (columns) and the first voxel in mm."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns, origin
    return affine


def beside(path: Path, name: str) -> Path:
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
