"""The packed archive: one compressed array per scan, from which a z-slab is read without touching
the rest.

A store is a folder: `store.parquet` (one row per scan) beside `<id>.b2nd` (blosc2 NDArray, int16
HU, axes Z Y X). Every chunk is a few whole slices and every block a run of whole rows, so a decoded
chunk is a plain C-ordered piece of the scan. The packer writes the byte range of every chunk into
the file's metadata; a read is then one `pread` and a few decompressions straight into the caller's
array, both without Python's global lock. Slicing a blosc2 NDArray gives the same numbers but holds
that lock all the way, so two reading threads are no faster than one (blosc2 4.14).

Axes: Z Y X depth height width in voxels, C chunks.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tapct.base.exits import UserError
from tapct.data.digest import voxel_digest
from tapct.data.packed import SCHEMA, Damaged, one_line, open_packed

INDEX_NAME = "store.parquet"
_INDEX_KEY = b"tapct.store"


@dataclass(frozen=True, slots=True)
class StoredScan:
    """One row of the store.

    Args:
        id: name of the scan, and of its file without `.b2nd`.
        shape_ZYX: voxels.
        spacing_mm: distance of voxel centres along (z, y, x).
        patient: keyed hash; scans of one patient share it.
        path: of the source, relative to the archive's root.
        label_path: absolute path of the scan's label map, empty where there is none.
        checksum: of the decoded voxels, the manifest's `digest`.
    """

    id: str
    shape_ZYX: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    patient: str
    path: str
    label_path: str
    checksum: str


class _OpenScan:
    """A file descriptor, closed when the last reader has let go, and where the chunks lie."""

    def __init__(self, file: Path) -> None:
        array, self.meta = open_packed(file)
        if len(array.chunks) != 3 or array.chunks[1:] != array.shape[1:]:
            raise Damaged(
                f"{file} has chunks {array.chunks}; a packed scan has chunks of whole slices"
            )
        ranges_C2 = self.meta.byte_ranges_C2
        # chunks of zeros have no bytes in the file; blosc2 makes up their few header bytes
        self.made_up = {
            int(c): bytes(array.schunk.get_chunk(int(c)))
            for c in np.flatnonzero(ranges_C2[:, 0] < 0)
        }
        self.fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def compressed(self, first: int, last: int) -> list[memoryview]:
        """The bytes of chunks first..last-1, which lie side by side: one read, without the global
        lock.
        """
        ranges_C2 = self.meta.byte_ranges_C2[first:last]
        stored_C2 = ranges_C2[ranges_C2[:, 0] >= 0]
        if not len(stored_C2):
            return [memoryview(self.made_up[c]) for c in range(first, last)]
        start, stop = int(stored_C2[:, 0].min()), int(stored_C2.sum(axis=1).max())
        found = memoryview(_pread(self.fd, stop - start, start))
        return [
            memoryview(self.made_up[c])
            if offset < 0
            else found[offset - start : offset - start + length]
            for c, (offset, length) in enumerate(ranges_C2.tolist(), first)
        ]


def _pread(fd: int, num_bytes: int, offset: int) -> bytes:
    """Read exactly so many bytes; `pread` itself stops at 2 GiB and may return less."""
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
        # decompress2 trusts the header and would write past the array
        raise ValueError(f"a chunk header says {num_bytes} bytes where {chunk_ZYX.nbytes} belong")
    blosc2.decompress2(compressed, dst=chunk_ZYX, nthreads=1)


class Store:
    """Packed scans, readable from any number of threads and, by pickling or forking, processes.

    Args:
        path: folder that `tapct pack` wrote.
        max_open: files kept open; the least recently used is let go.
    Attributes:
        scans: one per scan, in the order of the manifest.
        digest: names the voxels of the whole store, whatever the compression.
        root: of the archive that was packed.
        manifest_digest: of the manifest that was packed.
        summary: how many scans that manifest accepted, and refused by reason.
    Raises:
        UserError: there is no store, or its index is not readable.
    """

    def __init__(self, path: Path | str, max_open: int = 16) -> None:
        self.path = Path(path)
        self.max_open = max_open
        self.scans, info = read_index(self.path)
        self.digest, self.root, self.manifest_digest = (
            info["digest"],
            Path(info["root"]),
            info["manifest_digest"],
        )
        self.summary: dict[str, int] = info.get("summary", {})
        self._start_process()

    def _start_process(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenScan] = OrderedDict()
        blosc2.set_releasegil(True)  # process-wide: decompress2 lets other threads run

    def __len__(self) -> int:
        return len(self.scans)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "max_open": self.max_open, "digest": self.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["max_open"])  # type: ignore[misc]
        if self.digest != state["digest"]:
            raise UserError(
                f"the store {self.path} was packed anew while it was in use; start again"
            )

    def file(self, i: int) -> Path:
        """Where scan i lies."""
        return self.path / f"{self.scans[i].id}.b2nd"

    def read(self, i: int) -> np.ndarray:
        """The whole scan i: int16 HU, (Z, Y, X). Raises: Damaged."""
        return self.read_slab(i, 0, self.scans[i].shape_ZYX[0])

    def read_slab(self, i: int, z0: int, z1: int) -> np.ndarray:
        """Slices z0..z1-1 of scan i.

        Returns:
            int16 HU, (z1 - z0, Y, X), without padding.
        Raises:
            IndexError: not 0 <= z0 < z1 <= Z.
            Damaged: the scan cannot be read; names it.
        """
        _, y, x = self.scans[i].shape_ZYX
        slab_ZYX = np.empty((max(z1 - z0, 0), y, x), np.int16)
        self.read_into(i, z0, slab_ZYX)
        return slab_ZYX

    def read_into(self, i: int, z0: int, slab_ZYX: np.ndarray) -> None:
        """Like `read_slab`, into a C-contiguous int16 array of the slab's shape."""
        scan = self.scans[i]
        z1 = z0 + len(slab_ZYX)
        if not 0 <= z0 < z1 <= scan.shape_ZYX[0]:
            raise IndexError(
                f"scan {scan.id} has slices 0..{scan.shape_ZYX[0] - 1}; asked for {z0}..{z1 - 1}"
            )
        assert slab_ZYX.shape[1:] == scan.shape_ZYX[1:] and slab_ZYX.dtype == np.int16
        assert slab_ZYX.flags.c_contiguous
        try:
            opened = self._opened(i)
            step = opened.meta.chunk_slices
            first, last = z0 // step, -(-z1 // step)
            edge_ZYX: np.ndarray | None = None  # for the chunks that reach beyond the slab
            for c, compressed in enumerate(opened.compressed(first, last), first):
                low, high = c * step, (c + 1) * step
                if z0 <= low and high <= z1:
                    _decode(compressed, slab_ZYX[low - z0 : high - z0])
                    continue
                edge_ZYX = (
                    np.empty((step, *slab_ZYX.shape[1:]), np.int16)
                    if edge_ZYX is None
                    else edge_ZYX
                )
                _decode(compressed, edge_ZYX)
                begin, end = max(low, z0), min(high, z1)
                slab_ZYX[begin - z0 : end - z0] = edge_ZYX[begin - low : end - low]
        except (Damaged, OSError, ValueError, RuntimeError) as error:
            raise self._damaged(i, one_line(error)) from error

    def verify(self, i: int) -> None:
        """Decode the whole scan i and compare it with the checksum taken before packing. Raises:
        Damaged.
        """
        found = voxel_digest(self.read(i))
        if found != self.scans[i].checksum:
            raise self._damaged(
                i, f"its voxels have checksum {found}, packed were {self.scans[i].checksum}"
            )

    def _damaged(self, i: int, why: str) -> Damaged:
        file = self.file(i)
        return Damaged(
            f"scan {self.scans[i].id} is damaged: {file}: {why}. Delete that file and run `tapct "
            "pack` again."
        )

    def _opened(self, i: int) -> _OpenScan:
        if self._pid != os.getpid():  # forked: the lock may be held by a thread that is not here
            self._start_process()
        with self._lock:
            if i in self._open:
                self._open.move_to_end(i)
                return self._open[i]
        opened = _OpenScan(self.file(i))
        scan, meta = self.scans[i], opened.meta
        if (meta.id, meta.shape_ZYX, meta.checksum) != (scan.id, scan.shape_ZYX, scan.checksum):
            raise Damaged(
                f"it holds scan {meta.id} {meta.shape_ZYX} {meta.checksum}, which {INDEX_NAME} "
                "does not say"
            )
        with self._lock:
            self._open[i] = opened
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
        return opened


def store_digest(scans: Iterable[StoredScan]) -> str:
    """Name the voxels, grids and order of all scans, whatever their compression: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for scan in scans:
        digest.update(repr((scan.id, scan.shape_ZYX, scan.spacing_mm, scan.checksum)).encode())
    return digest.hexdigest()


_COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        *((name, pa.int32()) for name in ("depth", "height", "width")),
        *((name, pa.float64()) for name in ("spacing_z_mm", "spacing_y_mm", "spacing_x_mm")),
        *((name, pa.string()) for name in ("patient", "path", "label_path", "checksum")),
    ]
)


def index_bytes(
    scans: Iterable[StoredScan],
    root: Path,
    manifest_digest: str,
    summary: Mapping[str, int] | None = None,
) -> bytes:
    """The content of `store.parquet`.

    Args:
        summary: rows of the manifest by reason, as `Manifest.summary` counts them.
    """
    scans = tuple(scans)
    rows = [
        (s.id, *s.shape_ZYX, *s.spacing_mm, s.patient, s.path, s.label_path, s.checksum)
        for s in scans
    ]
    arrays = [pa.array([row[k] for row in rows], column.type) for k, column in enumerate(_COLUMNS)]
    info: dict[str, Any] = {
        "schema": SCHEMA,
        "root": str(root),
        "manifest_digest": manifest_digest,
        "digest": store_digest(scans),
        "summary": dict(summary or {}),
    }
    table = pa.Table.from_arrays(
        arrays, schema=_COLUMNS.with_metadata({_INDEX_KEY: json.dumps(info).encode()})
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def read_index(folder: Path) -> tuple[tuple[StoredScan, ...], dict[str, Any]]:
    """Read `store.parquet`.

    Returns:
        The scans, with absolute label paths, and what the index says of the whole: `root`,
        `manifest_digest`, `digest`.
    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    file = folder / INDEX_NAME
    if not file.is_file():
        raise UserError(
            f"{folder} holds no {INDEX_NAME}, so it is no packed archive; make one with `tapct "
            "pack`."
        )
    try:
        table = pq.read_table(file, partitioning=None)
        info = json.loads((table.schema.metadata or {})[_INDEX_KEY])
        if info["schema"] != SCHEMA:
            raise ValueError(f"schema is {info['schema']}, this tapct reads {SCHEMA}")
        columns = [
            table.column(name).cast(kind).to_pylist()
            for name, kind in zip(_COLUMNS.names, _COLUMNS.types)
        ]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is not readable ({one_line(error)}); run `tapct pack` again, it keeps the "
            "scans."
        ) from error
    root = Path(info["root"])
    scans = tuple(
        StoredScan(
            name, (z, y, x), (dz, dy, dx), patient, path, str(root / label) if label else "", named
        )
        for name, z, y, x, dz, dy, dx, patient, path, label, named in zip(*columns)
    )
    return scans, info
