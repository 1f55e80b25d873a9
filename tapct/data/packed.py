"""One packed scan on disk: a chunked, compressed `.b2nd` array of int16 HU that says what it is;
both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from tapct.base.exits import UserError
from tapct.data.digest import voxel_digest
from tapct.types import Volume

CHUNK_BYTES = 1 << 20  # smaller chunks waste less at a slab's ends, larger ones cost fewer calls
CHUNK_SLICES = 4
BLOCK_BYTES = 1 << 18  # in and out of a block fit a 1 MiB L2 cache


def layout(shape_ZYX: tuple[int, int, int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Chunks of whole slices, up to 1 MiB and 4 slices, and blocks of whole rows, up to 256 KiB.

    A block never crosses a chunk's row or slice order, so a decoded chunk is C-ordered. A height
    without a fitting divisor gets whole slices as blocks.
    """
    z, y, x = shape_ZYX
    slice_bytes = 2 * y * x
    chunk = min(z, CHUNK_SLICES, max(1, CHUNK_BYTES // slice_bytes))
    if slice_bytes <= BLOCK_BYTES:
        return (chunk, y, x), (
            max(n for n in _divisors(chunk) if n * slice_bytes <= BLOCK_BYTES),
            y,
            x,
        )
    rows = max((n for n in _divisors(y) if 2 * n * x <= BLOCK_BYTES), default=y)
    if 2 * rows * x < BLOCK_BYTES // 8:
        rows = y
    return (chunk, y, x), (1, rows, x)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def encode(volume: Volume, scan_id: str, level: int) -> tuple[bytes, PackedMeta]:
    """Compress one scan.

    Returns:
        The bytes of its `.b2nd` file, and what they say of themselves.
    """
    z, y, x = volume.hu_ZYX.shape
    chunks, blocks = layout((z, y, x))
    codec, shuffle = (
        (blosc2.Codec.ZSTD, blosc2.Filter.BITSHUFFLE)
        if level
        else (blosc2.Codec.LZ4, blosc2.Filter.SHUFFLE)
    )
    array = blosc2.asarray(
        np.ascontiguousarray(volume.hu_ZYX, dtype=np.int16),
        chunks=chunks,
        blocks=blocks,
        contiguous=True,
        cparams={
            "codec": codec,
            "clevel": level or 1,
            "filters": [shuffle],
            "typesize": 2,
            "nthreads": 1,
        },
        dparams={"nthreads": 1},
    )
    ranges_C2 = byte_ranges(array, array.schunk.to_cframe())
    spacing_mm = (
        float(volume.spacing_mm[0]),
        float(volume.spacing_mm[1]),
        float(volume.spacing_mm[2]),
    )
    meta = PackedMeta(
        scan_id, (z, y, x), spacing_mm, voxel_digest(volume.hu_ZYX), chunks[0], ranges_C2
    )
    array.schunk.vlmeta[META_KEY] = (
        meta.to_dict()
    )  # lies behind the chunks, so they stay where they are
    frame = array.schunk.to_cframe()
    if not np.array_equal(byte_ranges(array, frame), ranges_C2):
        raise RuntimeError(
            f"blosc2 {blosc2.__version__} moved the chunks of a frame when metadata was added to it"
        )
    return frame, meta


def byte_ranges(array: blosc2.NDArray, frame: bytes) -> np.ndarray:
    """Where a frame holds each chunk: int64 (C, 2), offset and length; checked byte by byte."""
    offset = int.from_bytes(frame[11:15], "big")  # the header's length; the chunks follow in order
    ranges: list[tuple[int, int]] = []
    for c in range(array.schunk.nchunks):
        chunk = array.schunk.get_chunk(c)
        if frame.startswith(chunk, offset):
            ranges.append((offset, len(chunk)))
            offset += len(chunk)
        elif len(chunk) <= 64:  # a chunk of zeros is only a flag
            ranges.append((-1, 0))
        else:
            raise RuntimeError(
                f"blosc2 {blosc2.__version__} does not write the chunks of a frame in order"
            )
    return np.asarray(ranges, np.int64).reshape(-1, 2)


SCHEMA = 1  # of store.parquet and of the metadata in every .b2nd
META_KEY = "tapct"


class Damaged(UserError):
    """A packed scan that cannot be read, or does not hold what was packed."""


@dataclass(frozen=True)
class PackedMeta:
    """What a `.b2nd` says of itself.

    Args:
        id, shape_ZYX, spacing_mm, checksum: as in `StoredScan`.
        chunk_slices: slices per chunk.
        byte_ranges_C2: int64, offset and length of every chunk in the file; offset -1 where the
            file holds no bytes for it (blosc2 keeps a chunk of zeros as a flag).
    """

    id: str
    shape_ZYX: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    checksum: str
    chunk_slices: int
    byte_ranges_C2: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """As it lies in the file's variable-length metadata."""
        return {
            "schema": SCHEMA,
            "id": self.id,
            "shape": list(self.shape_ZYX),
            "spacing_mm": list(self.spacing_mm),
            "checksum": self.checksum,
            "chunk_slices": self.chunk_slices,
            "byte_ranges": self.byte_ranges_C2.astype("<i8").tobytes(),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> PackedMeta:
        """Inverse of `to_dict`; KeyError, TypeError or ValueError where it is not ours."""
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema is {found['schema']}, this tapct reads {SCHEMA}")
        z, y, x = found["shape"]
        dz, dy, dx = found["spacing_mm"]
        ranges_C2 = np.frombuffer(found["byte_ranges"], "<i8").reshape(-1, 2).astype(np.int64)
        if len(ranges_C2) != -(-z // found["chunk_slices"]):
            raise ValueError(
                f"{len(ranges_C2)} chunks of {found['chunk_slices']} slices for {z} slices"
            )
        return cls(
            found["id"],
            (z, y, x),
            (dz, dy, dx),
            found["checksum"],
            found["chunk_slices"],
            ranges_C2,
        )


def open_packed(file: Path) -> tuple[blosc2.NDArray, PackedMeta]:
    """Open one `.b2nd` and check its outside: it is whole, of our schema, and int16.

    Raises:
        Damaged: it is missing, cut short, or not a packed scan; the voxels themselves are not
            looked at.
    """
    if not file.is_file():
        raise Damaged(f"{file} is missing")
    try:
        array = blosc2.open(str(file), mode="r", dparams={"nthreads": 1})
        meta = PackedMeta.from_dict(array.schunk.vlmeta[META_KEY])
        if (
            array.dtype != np.int16
            or tuple(array.shape) != meta.shape_ZYX
            or array.chunks[0] != meta.chunk_slices
        ):
            raise ValueError(
                f"holds {array.dtype} {tuple(array.shape)}, its metadata says {meta.shape_ZYX}"
            )
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise Damaged(
            f"{file} is no whole packed scan ({type(error).__name__}: {one_line(error)})"
        ) from error
    return array, meta


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())
