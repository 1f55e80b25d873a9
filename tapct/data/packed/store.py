"""The packed archive: a folder of packed scans and its index, read slab by slab.

A store is a folder: `store.parquet` (one row per scan, see `store_index`) beside one `<id>.b2nd`
per scan (see `packed_scan` and `places`), and one `<id>.labels.b2nd` per scan with labels (see
`packed_labels`). A z-slab is read without touching the rest of the scan.

Axes: Z Y X depth height width in voxels.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tapct.base.exits import UserError, single_line
from tapct.base.files import expand_path
from tapct.data.digest import voxel_digest
from tapct.data.manifest import Manifest, columns_in_order, read_column, read_columns
from tapct.data.packed.local_cache import LocalCache
from tapct.data.packed.packed_labels import labels_file, read_packed_labels
from tapct.data.packed.packed_scan import Damaged, PackedScan
from tapct.data.packed.places import file_of
from tapct.data.packed.scan_list import ScanList
from tapct.data.packed.scan_list import StoredScan as StoredScan
from tapct.data.packed.scan_list import labels_digest as labels_digest
from tapct.data.packed.store_index import INDEX_NAME as INDEX_NAME
from tapct.data.packed.store_index import index_bytes as index_bytes
from tapct.data.packed.store_index import read_index as read_index
from tapct.types import LabelMap


@dataclass(frozen=True, slots=True)
class ScanPlace:
    """Where a scan lies in the frame of its patient.

    Args:
        origin_mm: LPS position (x, y, z) of voxel (0, 0, 0).
        directions: unit vectors in LPS along which the indices x, y and z grow, one after the
            other: 9 numbers.
    """

    origin_mm: tuple[float, ...]
    directions: tuple[float, ...]

    def in_scan(self, point_xyz_mm: Sequence[float]) -> tuple[float, float, float]:
        """A point of the patient's frame in the frame of the scan.

        Args:
            point_xyz_mm: LPS position (x, y, z).
        Returns:
            Distances in mm from the centre of voxel (0, 0, 0) along the scan's axes z, y, x.
        """
        axes_33 = np.asarray(self.directions).reshape(3, 3)
        offset = np.asarray(point_xyz_mm, np.float64) - np.asarray(self.origin_mm)
        # the axes of a file are orthogonal within its rounding only, so that the system is solved
        x, y, z = np.linalg.solve(axes_33.T, offset)
        return float(z), float(y), float(x)


class Store:
    """Packed scans, readable from any number of threads and, by pickling or forking, processes.

    Args:
        path: folder that `tapct pack` wrote.
        max_open: number of files kept open; the least recently used one is closed first.
        cache: copies of packed scans on a disk of the node; None reads from the store.
    Attributes:
        scans: one row per scan, in the order of the manifest, as objects on demand.
        digest: hash of the voxels of the whole store, whatever the compression.
        manifest_digest: digest of the manifest that was packed.
        patient_key: name of the key of the patient hashes; of a store whose key is unknown, a name
            that only stores of the same manifest share.
        summary: how many scans that manifest accepted, and refused by reason.
    Raises:
        UserError: there is no store, or its index is not readable.
    """

    def __init__(
        self, path: Path | str, max_open: int = 16, cache: LocalCache | None = None
    ) -> None:
        self.path = expand_path(path)
        self.max_open, self.cache = max_open, cache
        self.scans: ScanList
        self.scans, info = read_index(self.path)
        self.digest: str = info["digest"]
        self.manifest_digest: str = info["manifest_digest"]
        self.patient_key: str = info.get("patient_key") or f"manifest {self.manifest_digest}"
        self.summary: dict[str, int] = info.get("summary", {})
        self._manifest_file: str = info.get("manifest_file", "")
        self._number_of: dict[str, int] | None = None  # made when it is first needed
        self._start_process()

    def _start_process(self) -> None:
        """What a process must not share with the one that it was forked from."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, PackedScan] = OrderedDict()
        self._not_cached: set[int] = set()  # scans whose copy was damaged
        blosc2.set_releasegil(True)  # process-wide: decompress2 lets other threads run

    def __len__(self) -> int:
        return len(self.scans)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "max_open": self.max_open,
            "cache": self.cache,
            "digest": self.digest,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["max_open"], state["cache"])  # type: ignore[misc]
        if self.digest != state["digest"]:
            raise UserError(
                f"the store {self.path} was packed again while it was in use; start again"
            )

    def file(self, i: int) -> Path:
        """Path of the file of scan i."""
        return packed_file(self.path, self.scans.id(i))

    def index_of(self, scan_id: str) -> int:
        """Number of the scan with this name; KeyError where there is none."""
        if self._number_of is None:
            names = self.scans.column("id").to_pylist()
            self._number_of = {name: i for i, name in enumerate(names)}
        return self._number_of[scan_id]

    def places(self) -> dict[str, ScanPlace]:
        """Where the scans lie in their patients' frames, by scan ID; empty where the manifest that
        was packed is gone, has changed or is of an earlier version.
        """
        if not self._manifest_file:
            return {}
        file = self.path / self._manifest_file
        origins = read_column(file, self.manifest_digest, "origin_mm")
        directions = read_column(file, self.manifest_digest, "directions")
        return {
            scan_id: ScanPlace(tuple(origin), tuple(directions[scan_id]))
            for scan_id, origin in origins.items()
            if origin and directions.get(scan_id)
        }

    def manifest(self) -> Manifest | None:
        """The manifest that was packed; None where it is gone, has changed or cannot be read."""
        if not self._manifest_file:
            return None
        try:
            found = Manifest.read(self.path / self._manifest_file)
        except UserError:
            return None
        return found if found.digest == self.manifest_digest else None

    def facts(self, names: Sequence[str]) -> pa.Table | None:
        """Columns of the manifest, one row per scan of the store; a scan that the manifest lacks
        has nulls.

        Args:
            names: names of columns of the manifest.
        Returns:
            The columns; None where the store itself does not hold them and the manifest that was
            packed is gone, has changed or is of an earlier version.
        """
        own = self.scans.own_columns
        columns = {name: self.scans.column(name) for name in names if name in own}
        others = [name for name in names if name not in own]
        if others:
            if not self._manifest_file:
                return None
            file = self.path / self._manifest_file
            found = columns_in_order(file, self.manifest_digest, others, self.scans.column("id"))
            if found is None:
                return None
            columns |= {name: found.column(name) for name in others}
        return pa.table({name: columns[name] for name in names})

    def num_guessed_patients(self) -> int:
        """Number of scans whose patient `tapct index` guessed from file names; 0 where the manifest
        that was packed is gone, so that it is not known.
        """
        if not self._manifest_file:
            return 0
        file = self.path / self._manifest_file
        table = read_columns(file, self.manifest_digest, ("id", "patient_from"))
        if table is None:
            return 0
        guessed = table.column("id").filter(pc.equal(table.column("patient_from"), "guess"))
        ids = self.scans.column("id").cast(guessed.type)
        return int(pc.sum(pc.is_in(ids, value_set=guessed)).as_py() or 0)

    def read_labels(self, i: int) -> LabelMap:
        """The labels of scan i, on its grid.

        Raises:
            Damaged: the packed labels are missing or damaged.
        """
        scan = self.scans[i]
        assert scan.has_labels, f"scan {scan.id} has no labels"
        try:
            return read_packed_labels(labels_file(self.path, scan.id), scan.id, scan.label_digest)
        except Damaged as error:
            raise Damaged(
                f"the labels of scan {scan.id} are damaged: {error}. Run `tapct pack` again."
            ) from error

    def read(self, i: int) -> np.ndarray:
        """The whole scan i: int16 HU, (Z, Y, X). Raises: Damaged."""
        return self.read_slab(i, 0, self.scans.shape_ZYX(i)[0])

    def read_slab(self, i: int, z0: int, z1: int) -> np.ndarray:
        """Slices z0..z1-1 of scan i.

        Returns:
            int16 HU, (z1 - z0, Y, X), without padding.
        Raises:
            IndexError: not 0 <= z0 < z1 <= Z.
            Damaged: the scan cannot be read; the error names it.
        """
        _, y, x = self.scans.shape_ZYX(i)
        slab_ZYX = np.empty((max(z1 - z0, 0), y, x), np.int16)
        self.read_into(i, z0, slab_ZYX)
        return slab_ZYX

    def read_into(self, i: int, z0: int, slab_ZYX: np.ndarray) -> None:
        """Like `read_slab`, into a C-contiguous int16 array of the slab's shape."""
        depth, *plane_YX = self.scans.shape_ZYX(i)
        z1 = z0 + len(slab_ZYX)
        if not 0 <= z0 < z1 <= depth:
            raise IndexError(
                f"scan {self.scans.id(i)} has slices 0..{depth - 1}; asked for {z0}..{z1 - 1}"
            )
        assert list(slab_ZYX.shape[1:]) == plane_YX and slab_ZYX.dtype == np.int16
        assert slab_ZYX.flags.c_contiguous
        self._fill(i, (z0, 0, 0), slab_ZYX)

    def read_box(
        self, i: int, start_ZYX: tuple[int, int, int], shape_ZYX: tuple[int, int, int]
    ) -> np.ndarray:
        """A box of scan i. Only the chunks that it touches are read and decompressed: in a scan
        that was packed with tiles, a part of its slices.

        Args:
            i: number of the scan.
            start_ZYX: indices of the first voxel.
            shape_ZYX: voxels of the box.
        Returns:
            int16 HU, without padding.
        Raises:
            IndexError: the box is empty, or reaches beyond the scan.
            Damaged: the scan cannot be read; the error names it.
        """
        whole_ZYX = self.scans.shape_ZYX(i)
        for start, size, whole in zip(start_ZYX, shape_ZYX, whole_ZYX, strict=True):
            if not 0 <= start < start + size <= whole:
                raise IndexError(
                    f"scan {self.scans.id(i)} has {whole_ZYX} voxels (z, y, x); asked for a box of "
                    f"{tuple(shape_ZYX)} from {tuple(start_ZYX)}"
                )
        box_ZYX = np.empty(shape_ZYX, np.int16)
        self._fill(i, start_ZYX, box_ZYX)
        return box_ZYX

    def _fill(self, i: int, start_ZYX: tuple[int, int, int], box_ZYX: np.ndarray) -> None:
        """Read a box of scan i into an array."""
        if self.cache is not None:
            try:
                self._opened(i).read_into(start_ZYX, box_ZYX)
                return
            except (Damaged, OSError, ValueError, RuntimeError):
                self._forget_copy(i)  # the copy may be damaged, or just deleted: read the store
        try:
            self._opened(i).read_into(start_ZYX, box_ZYX)
        except (Damaged, OSError, ValueError, RuntimeError) as error:
            raise self._damaged(i, single_line(error)) from error

    def verify(self, i: int) -> None:
        """Decode the whole scan i and its labels, and compare their digests with those taken before
        packing.

        Raises:
            Damaged: the scan or its labels cannot be read, or hold other voxels.
        """
        if self.scans[i].has_labels:
            self.read_labels(i)
        digest, packed = voxel_digest(self.read(i)), self.scans.checksum(i)
        if digest != packed:
            raise self._damaged(i, f"its voxels have digest {digest}, packed were {packed}")

    def _damaged(self, i: int, problem: str) -> Damaged:
        return Damaged(
            f"scan {self.scans.id(i)} is damaged: {self.file(i)}: {problem}. Run `tapct pack` with "
            "--verify --repair to pack it again."
        )

    def _forget_copy(self, i: int) -> None:
        """Read scan i from the store from now on, and delete its copy."""
        assert self.cache is not None
        self.cache.drop(self.file(i), self.scans.checksum(i))
        with self._lock:
            self._not_cached.add(i)
            self._open.pop(i, None)

    def _opened(self, i: int) -> PackedScan:
        """Scan i, open; from the files kept open where it is among them."""
        if self._pid != os.getpid():  # forked: the lock may be held by a thread that is not here
            self._start_process()
        with self._lock:
            if i in self._open:
                self._open.move_to_end(i)
                return self._open[i]
        file = self.file(i)
        if self.cache is not None and i not in self._not_cached:
            file = self.cache.local(file, self.scans.checksum(i))
        opened = PackedScan(file)
        meta, scans = opened.meta, self.scans
        listed = (scans.id(i), scans.shape_ZYX(i), scans.checksum(i))
        if (meta.id, meta.shape_ZYX, meta.checksum) != listed:
            raise Damaged(
                f"it holds scan {meta.id} {meta.shape_ZYX} {meta.checksum}, which is not what "
                f"{INDEX_NAME} lists"
            )
        with self._lock:
            self._open[i] = opened
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
        return opened


def packed_file(folder: Path, scan_id: str) -> Path:
    """Path of the packed voxels of a scan.

    Args:
        folder: folder of the store.
        scan_id: name of the scan.
    """
    return file_of(folder, scan_id, ".b2nd")
