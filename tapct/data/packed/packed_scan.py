"""One packed scan on disk, both ways: a chunked, compressed `.b2nd` array of int16 HU.

Every chunk is a few whole slices, or on request a few slices of a square tile. A block is a run of
whole rows of it, so a decoded chunk is a plain C-ordered piece of the scan. The file's metadata
holds the byte range of every chunk. A slab is then read by one `pread` and a few decompressions
straight into the caller's array, both without Python's global lock. Slicing a blosc2 NDArray gives
the same numbers but holds that lock all the way, so two reading threads are no faster than one
(blosc2 4.14).

blosc2 does not notice damaged bytes: most of them decode to other voxels. So every byte of the file
is covered by a checksum (XXH3, 64 bits). The metadata holds one per chunk, which is compared at
every read of that chunk. The footer, which follows blosc2's frame and which blosc2 ignores, holds
one of all bytes outside the chunks, which is compared before blosc2 opens the file. zlib.crc32
would cost 6 % of a read, XXH3 costs 1 %.

Axes: Z Y X depth height width in voxels, C chunks.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import xxhash

from tapct.base.exits import UserError, single_line
from tapct.data.digest import voxel_digest
from tapct.types import Volume

# versions of the metadata in a .b2nd; a file of the first one is read without comparing checksums
NO_CHECKSUMS, WHOLE_SLICES, TILED = 1, 2, 3
META_KEY = "tapct"
ZSTD, LZ4 = "zstd", "lz4"
CODECS = {ZSTD: blosc2.Codec.ZSTD, LZ4: blosc2.Codec.LZ4}
CHUNK_BYTES = 1 << 20  # smaller chunks waste less at a slab's ends, larger ones cost fewer calls
CHUNK_SLICES = 4
TILE_SLICES = 8
BLOCK_BYTES = 1 << 18  # compressed and decoded, a block fits a 1 MiB L2 cache
# magic, first byte of the chunks, byte behind the chunks, length of blosc2's frame; then a checksum
_FOOTER = struct.Struct("<8sQQQ")
_FOOTER_MAGIC = b"tapctsum"
_CHECKSUM = struct.Struct("<Q")
_FOOTER_BYTES = _FOOTER.size + _CHECKSUM.size


class Damaged(UserError):
    """A packed scan that cannot be read, or does not hold what was packed."""


@dataclass(frozen=True)
class PackedMeta:
    """Metadata of a `.b2nd` file.

    Args:
        id, shape_ZYX, spacing_mm, checksum: as in `StoredScan`.
        chunk_ZYX: voxels of a chunk. Height and width are those of the scan where it is not tiled.
        byte_ranges_C2: int64, offset and length of every chunk in the file; offset -1 where the
            file holds no bytes for it (blosc2 keeps a chunk of zeros as a flag).
        checksums_C: uint64, checksum of the bytes of every chunk, 0 where there are none; None in
            files of earlier versions.
    """

    id: str
    shape_ZYX: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    checksum: str
    chunk_ZYX: tuple[int, int, int]
    byte_ranges_C2: np.ndarray
    checksums_C: np.ndarray | None

    @property
    def is_tiled(self) -> bool:
        """Whether a chunk holds a part of its slices."""
        return self.chunk_ZYX[1:] != self.shape_ZYX[1:]

    @property
    def grid_ZYX(self) -> tuple[int, int, int]:
        """Number of chunks along each axis; they are numbered with x fastest."""
        return grid_of(self.shape_ZYX, self.chunk_ZYX)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file's variable-length metadata."""
        assert self.checksums_C is not None, "files without checksums are only read"
        # earlier versions of tapct read files with whole slices
        of_tiles = {"tile": list(self.chunk_ZYX[1:])} if self.is_tiled else {}
        return {
            "schema": TILED if self.is_tiled else WHOLE_SLICES,
            "id": self.id,
            "shape": list(self.shape_ZYX),
            "spacing_mm": list(self.spacing_mm),
            "checksum": self.checksum,
            "chunk_slices": self.chunk_ZYX[0],
            **of_tiles,
            "byte_ranges": self.byte_ranges_C2.astype("<i8").tobytes(),
            "checksums": self.checksums_C.astype("<u8").tobytes(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PackedMeta:
        """Inverse of `to_dict`; KeyError, TypeError or ValueError where tapct did not write it."""
        schema = content["schema"]
        if schema not in (NO_CHECKSUMS, WHOLE_SLICES, TILED):
            raise ValueError(f"schema is {schema}, this tapct reads up to {TILED}")
        z, y, x = content["shape"]
        dz, dy, dx = content["spacing_mm"]
        height, width = content["tile"] if schema == TILED else (y, x)
        chunk_ZYX = (content["chunk_slices"], height, width)
        ranges_C2 = np.frombuffer(content["byte_ranges"], "<i8").reshape(-1, 2).astype(np.int64)
        if len(ranges_C2) != math.prod(grid_of((z, y, x), chunk_ZYX)):
            raise ValueError(f"{len(ranges_C2)} chunks {chunk_ZYX} for a scan {(z, y, x)}")
        checksums_C = None
        if schema != NO_CHECKSUMS:
            checksums_C = np.frombuffer(content["checksums"], "<u8").astype(np.uint64)
            if len(checksums_C) != len(ranges_C2):
                raise ValueError(f"{len(checksums_C)} checksums of {len(ranges_C2)} chunks")
        return cls(
            content["id"],
            (z, y, x),
            (dz, dy, dx),
            content["checksum"],
            chunk_ZYX,
            ranges_C2,
            checksums_C,
        )


def grid_of(
    shape_ZYX: tuple[int, int, int], chunk_ZYX: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Number of chunks along each axis."""
    z, y, x = (-(-size // step) for size, step in zip(shape_ZYX, chunk_ZYX))
    return z, y, x


def compress(
    voxels_ZYX: np.ndarray, level: int, codec: str = ZSTD, tile: int = 0
) -> blosc2.NDArray:
    """Compress a volume in the chunks of a store.

    Args:
        voxels_ZYX: C-contiguous HU or labels.
        level: level of the codec, 1 to 9; higher is smaller and slower to write.
        codec: one of `CODECS`.
        tile: as in `layout`.
    """
    z, y, x = voxels_ZYX.shape
    chunks, blocks = layout((z, y, x), tile)
    return blosc2.asarray(
        voxels_ZYX,
        chunks=chunks,
        blocks=blocks,
        contiguous=True,
        cparams={
            "codec": CODECS[codec],
            "clevel": level,
            "filters": [blosc2.Filter.SHUFFLE],
            "typesize": voxels_ZYX.itemsize,
            "nthreads": 1,
        },
        dparams={"nthreads": 1},
    )


def encode(
    volume: Volume, scan_id: str, level: int, codec: str = ZSTD, tile: int = 0
) -> tuple[bytes, PackedMeta]:
    """Compress one scan.

    Args:
        volume: scan.
        scan_id: name of the scan in the store.
        level, codec, tile: as in `compress`.
    Returns:
        The bytes of its `.b2nd` file, and the metadata in it.
    """
    z, y, x = volume.hu_ZYX.shape
    array = compress(np.ascontiguousarray(volume.hu_ZYX, dtype=np.int16), level, codec, tile)
    chunk_ZYX = (array.chunks[0], array.chunks[1], array.chunks[2])
    frame = array.schunk.to_cframe()
    ranges_C2 = _byte_ranges(array, frame)
    grid_ZYX = grid_of((z, y, x), chunk_ZYX)
    for c in np.flatnonzero(ranges_C2[:, 0] < 0):
        corner = zip(np.unravel_index(c, grid_ZYX), chunk_ZYX)
        if volume.hu_ZYX[tuple(slice(k * step, (k + 1) * step) for k, step in corner)].any():
            raise RuntimeError(f"blosc2 {blosc2.__version__} keeps a chunk with values as a flag")
    dz, dy, dx = (float(mm) for mm in volume.spacing_mm)
    meta = PackedMeta(
        scan_id,
        (z, y, x),
        (dz, dy, dx),
        voxel_digest(volume.hu_ZYX),
        chunk_ZYX,
        ranges_C2,
        _checksums(frame, ranges_C2),
    )
    # metadata lies behind the chunks, so the chunks stay where they are
    array.schunk.vlmeta[META_KEY] = meta.to_dict()
    frame = array.schunk.to_cframe()
    if not np.array_equal(_byte_ranges(array, frame), ranges_C2):
        raise RuntimeError(
            f"blosc2 {blosc2.__version__} moved the chunks of a frame when metadata was added to it"
        )
    return frame + _footer(frame, ranges_C2), meta


def _checksums(frame: bytes, ranges_C2: np.ndarray) -> np.ndarray:
    """uint64 (C,): the checksum of each chunk in a frame, 0 where the frame has no bytes for it."""
    content = memoryview(frame)
    checksums = [
        xxhash.xxh3_64_intdigest(content[offset : offset + length]) if length else 0
        for offset, length in ranges_C2.tolist()
    ]
    return np.asarray(checksums, np.uint64)


def _footer(frame: bytes, ranges_C2: np.ndarray) -> bytes:
    """What follows a frame: where its chunks lie, and a checksum of everything else."""
    begin = int.from_bytes(frame[11:15], "big")
    end = max(begin, int(ranges_C2.sum(axis=1).max()))
    facts = _FOOTER.pack(_FOOTER_MAGIC, begin, end, len(frame))
    return facts + _outside_checksum(frame[:begin], frame[end:], facts)


def _outside_checksum(head: bytes, tail: bytes, facts: bytes) -> bytes:
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head + tail + facts))


def _check_outside(file: Path) -> bool:
    """Compare the checksum of all bytes outside the chunks, before blosc2 trusts them.

    Returns:
        Whether the file has a footer; files of earlier versions have none.
    Raises:
        ValueError: the bytes are damaged, or the file is cut short.
    """
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        num_bytes = os.fstat(fd).st_size - _FOOTER_BYTES
        if num_bytes < 0:
            raise ValueError("the file ends too early")
        footer = _read_exactly(fd, _FOOTER_BYTES, num_bytes)
        facts = footer[: _FOOTER.size]
        magic, begin, end, frame_bytes = _FOOTER.unpack(facts)
        if magic != _FOOTER_MAGIC:
            return False
        if not begin <= end <= frame_bytes == num_bytes:
            raise ValueError("its footer does not fit its length")
        head, tail = _read_exactly(fd, begin, 0), _read_exactly(fd, frame_bytes - end, end)
        if footer[_FOOTER.size :] != _outside_checksum(head, tail, facts):
            raise ValueError("the checksum of its metadata differs")
        return True
    finally:
        os.close(fd)


def layout(
    shape_ZYX: tuple[int, int, int], tile: int = 0
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of chunks and blocks: chunks of whole slices, up to 1 MiB and 4 slices, and blocks of
    whole rows, up to 256 KiB. With tiles, chunks have up to 1 MiB and 8 slices.

    A block never crosses a chunk's row or slice order, so a decoded chunk is C-ordered. A height
    without a fitting divisor gets whole slices as blocks.

    Args:
        shape_ZYX: voxels of the scan.
        tile: rows and columns of a chunk; 0 for whole slices.
    """
    z, y, x = shape_ZYX
    most_slices = CHUNK_SLICES
    if 0 < tile < max(y, x):
        y, x, most_slices = min(tile, y), min(tile, x), TILE_SLICES
    slice_bytes = 2 * y * x
    chunk = min(z, most_slices, max(1, CHUNK_BYTES // slice_bytes))
    if slice_bytes <= BLOCK_BYTES:
        slices = max(n for n in _divisors(chunk) if n * slice_bytes <= BLOCK_BYTES)
        return (chunk, y, x), (slices, y, x)
    rows = max((n for n in _divisors(y) if 2 * n * x <= BLOCK_BYTES), default=y)
    if 2 * rows * x < BLOCK_BYTES // 8:  # a prime height would give blocks of one row
        rows = y
    return (chunk, y, x), (1, rows, x)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _byte_ranges(array: blosc2.NDArray, frame: bytes) -> np.ndarray:
    """Where a frame holds each chunk: int64 (C, 2), offset and length; compared byte by byte."""
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


def open_packed(file: Path) -> tuple[blosc2.NDArray, PackedMeta]:
    """Open one `.b2nd` file and check that it is whole, of our schema, and int16.

    Args:
        file: path of the file.
    Raises:
        Damaged: the file is missing, cut short, or not a packed scan. The voxels are not decoded.
    """
    if not file.is_file():
        raise Damaged(f"{file} does not exist")
    try:
        has_footer = _check_outside(file)
        array = blosc2.open(str(file), mode="r", dparams={"nthreads": 1})
        meta = PackedMeta.from_dict(array.schunk.vlmeta[META_KEY])
        if has_footer != (meta.checksums_C is not None):
            raise ValueError("its footer is missing or damaged")
        expected = (np.int16, meta.shape_ZYX, meta.chunk_ZYX)
        if (array.dtype, tuple(array.shape), tuple(array.chunks)) != expected:
            raise ValueError(
                f"it holds {array.dtype} {tuple(array.shape)} in chunks {tuple(array.chunks)}, "
                f"its metadata lists {meta.shape_ZYX} in chunks {meta.chunk_ZYX}"
            )
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise Damaged(
            f"{file} is not a complete packed scan ({type(error).__name__}: {single_line(error)})"
        ) from error
    return array, meta


class PackedScan:
    """An open `.b2nd` file, from which boxes are read; closed when nobody refers to it.

    Args:
        file: path of the file.
    Attributes:
        meta: metadata of the file.
    Raises:
        Damaged: see `open_packed`.
    """

    def __init__(self, file: Path) -> None:
        _, self.meta = open_packed(file)
        self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read_into(self, start_ZYX: tuple[int, int, int], box_ZYX: np.ndarray) -> None:
        """Read a box of the scan without touching chunks beside it.

        Args:
            start_ZYX: indices of its first voxel.
            box_ZYX: C-contiguous int16 array to fill; it lies inside the scan.
        Raises:
            ValueError, RuntimeError, OSError: the bytes of a chunk are damaged.
        """
        size_ZYX, (_, num_y, num_x) = self.meta.chunk_ZYX, self.meta.grid_ZYX
        stop_ZYX = [start + n for start, n in zip(start_ZYX, box_ZYX.shape)]
        touched = [range(a // n, -(-b // n)) for a, b, n in zip(start_ZYX, stop_ZYX, size_ZYX)]
        places = list(itertools.product(*touched))
        numbers = [(cz * num_y + cy) * num_x + cx for cz, cy, cx in places]
        edge_ZYX: np.ndarray | None = None  # for the chunks that reach beyond the box
        for place, compressed in zip(places, self._compressed_chunks(numbers)):
            in_box, in_chunk = [], []
            for k, n, start, stop in zip(place, size_ZYX, start_ZYX, stop_ZYX):
                begin, end = max(k * n, start), min((k + 1) * n, stop)
                in_box.append(slice(begin - start, end - start))
                in_chunk.append(slice(begin - k * n, end - k * n))
            part_ZYX = box_ZYX[tuple(in_box)]
            if compressed is None:
                part_ZYX[...] = 0
            elif part_ZYX.shape == size_ZYX and part_ZYX.flags.c_contiguous:
                _decode(compressed, part_ZYX)
            else:
                if edge_ZYX is None:
                    edge_ZYX = np.empty(size_ZYX, np.int16)
                _decode(compressed, edge_ZYX)
                part_ZYX[...] = edge_ZYX[tuple(in_chunk)]

    def _compressed_chunks(self, numbers: Sequence[int]) -> list[memoryview | None]:
        """The bytes of some chunks, None for a chunk of zeros. One read without the global lock
        gets all chunks that lie side by side.

        Args:
            numbers: numbers of the chunks, ascending.
        Raises:
            ValueError: a checksum differs.
        """
        ranges = self.meta.byte_ranges_C2[numbers].tolist()
        runs: list[list[int]] = []  # first byte and end of what is read at once
        for offset, length in ranges:
            if offset >= 0 and runs and runs[-1][1] == offset:
                runs[-1][1] += length
            elif offset >= 0:
                runs.append([offset, offset + length])
        contents = [memoryview(_read_exactly(self._fd, b - a, a)) for a, b in runs]
        chunks: list[memoryview | None] = []
        run = 0
        for number, (offset, length) in zip(numbers, ranges):
            if offset < 0:
                chunks.append(None)
                continue
            while offset >= runs[run][1]:
                run += 1
            first = offset - runs[run][0]
            chunk = contents[run][first : first + length]
            self._check(number, chunk)
            chunks.append(chunk)
        return chunks

    def _check(self, number: int, chunk: memoryview) -> None:
        """Compare the checksum of a chunk; ValueError where it differs."""
        if self.meta.checksums_C is None:
            return
        if xxhash.xxh3_64_intdigest(chunk) != int(self.meta.checksums_C[number]):
            _, num_y, num_x = self.meta.grid_ZYX
            low = number // (num_y * num_x) * self.meta.chunk_ZYX[0]
            raise ValueError(f"the checksum of the chunk that begins at slice {low} differs")


def _read_exactly(fd: int, num_bytes: int, offset: int) -> bytes:
    """Read exactly this number of bytes; `pread` itself stops at 2 GiB and may return less."""
    parts: list[bytes] = []
    while num_bytes > 0:
        part = os.pread(fd, min(num_bytes, 1 << 30), offset)
        if not part:
            raise ValueError("the file ends too early")
        parts.append(part)
        num_bytes -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _decode(compressed: memoryview, chunk_ZYX: np.ndarray) -> None:
    """Decompress one chunk into a C-contiguous array, without the global lock."""
    num_bytes, num_compressed, _ = blosc2.get_cbuffer_sizes(compressed)
    if num_bytes != chunk_ZYX.nbytes or num_compressed != len(compressed):
        # decompress2 trusts the header and would write beyond the array
        raise ValueError(
            f"a chunk header promises {num_bytes} bytes, the chunk has {chunk_ZYX.nbytes} bytes"
        )
    blosc2.decompress2(compressed, dst=chunk_ZYX, nthreads=1)
