"""The packed archive: a folder of packed scans and its index, read slab by slab.

A store is a folder: `store.parquet` (one row per scan) beside one `<id>.b2nd` per scan (see
`packed_scan`), and one `<id>.labels.b2nd` per scan with labels (see `packed_labels`). A z-slab is
read without touching the rest of the scan.

Axes: Z Y X depth height width in voxels.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tapct.base.exits import UserError, single_line
from tapct.base.files import expand_path
from tapct.data.digest import table_digest, voxel_digest
from tapct.data.manifest import Manifest, read_column, read_paths
from tapct.data.packed.packed_labels import labels_file, read_packed_labels
from tapct.data.packed.packed_scan import Damaged, PackedScan
from tapct.types import LabelMap

INDEX_NAME = "store.parquet"
# version of store.parquet; version 1 listed the label files of the archive and had no digest of its
# own content
SCHEMA = 2
_INDEX_KEY = b"tapct.store"
_COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        *((name, pa.int32()) for name in ("depth", "height", "width")),
        *((name, pa.float64()) for name in ("spacing_z_mm", "spacing_y_mm", "spacing_x_mm")),
        *((name, pa.string()) for name in ("patient", "label_digest", "label_names", "checksum")),
    ]
)
# the last column, which stores of earlier versions lack
_PATIENT_FROM = pa.field("patient_from", pa.string())


@dataclass(frozen=True, slots=True)
class StoredScan:
    """One row of the store.

    Args:
        id: name of the scan, and of its file without `.b2nd`.
        shape_ZYX: number of voxels.
        spacing_mm: distance of voxel centres along (z, y, x).
        patient: keyed hash; scans of one patient share it.
        path: path of the source below the archive's root. The store does not hold it: it comes from
            the manifest that was packed, and is empty where that is gone.
        label_digest: digest of its packed labels, the manifest's `label_digest`; empty where it has
            none.
        checksum: digest of the decoded voxels, the manifest's `digest`.
        label_names: label value and name; empty where it has no labels or they have no names.
        patient_from: rule that identified the patient, as in the manifest; empty where unknown.
    """

    id: str
    shape_ZYX: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    patient: str
    path: str
    label_digest: str
    checksum: str
    label_names: tuple[tuple[int, str], ...] = ()
    patient_from: str = ""

    @property
    def has_labels(self) -> bool:
        """Whether the store holds labels of the scan."""
        return bool(self.label_digest)


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
    Attributes:
        scans: one per scan, in the order of the manifest.
        digest: hash of the voxels of the whole store, whatever the compression.
        manifest_digest: digest of the manifest that was packed.
        patient_key: name of the key of the patient hashes; of a store whose key is unknown, a name
            that only stores of the same manifest share.
        summary: how many scans that manifest accepted, and refused by reason.
    Raises:
        UserError: there is no store, or its index is not readable.
    """

    def __init__(self, path: Path | str, max_open: int = 16) -> None:
        self.path = expand_path(path)
        self.max_open = max_open
        self.scans, info = read_index(self.path)
        self.digest: str = info["digest"]
        self.manifest_digest: str = info["manifest_digest"]
        self.patient_key: str = info.get("patient_key") or f"manifest {self.manifest_digest}"
        self.summary: dict[str, int] = info.get("summary", {})
        self._manifest_file: str = info.get("manifest_file", "")
        self._number_of = {scan.id: i for i, scan in enumerate(self.scans)}
        self._start_process()

    def _start_process(self) -> None:
        """What a process must not share with the one that it was forked from."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, PackedScan] = OrderedDict()
        blosc2.set_releasegil(True)  # process-wide: decompress2 lets other threads run

    def __len__(self) -> int:
        return len(self.scans)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "max_open": self.max_open, "digest": self.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["max_open"])  # type: ignore[misc]
        if self.digest != state["digest"]:
            raise UserError(
                f"the store {self.path} was packed again while it was in use; start again"
            )

    def file(self, i: int) -> Path:
        """Path of the file of scan i."""
        return packed_file(self.path, self.scans[i].id)

    def index_of(self, scan_id: str) -> int:
        """Number of the scan with this name; KeyError where there is none."""
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

    def num_guessed_patients(self) -> int:
        """Number of scans whose patient `tapct index` guessed from file names; 0 where the manifest
        that was packed is gone, so that it is not known.
        """
        if not self._manifest_file:
            return 0
        sources = read_column(self.path / self._manifest_file, self.manifest_digest, "patient_from")
        return sum(sources.get(scan.id) == "guess" for scan in self.scans)

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
        return self.read_slab(i, 0, self.scans[i].shape_ZYX[0])

    def read_slab(self, i: int, z0: int, z1: int) -> np.ndarray:
        """Slices z0..z1-1 of scan i.

        Returns:
            int16 HU, (z1 - z0, Y, X), without padding.
        Raises:
            IndexError: not 0 <= z0 < z1 <= Z.
            Damaged: the scan cannot be read; the error names it.
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
            self._opened(i).read_into(z0, slab_ZYX)
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
        digest = voxel_digest(self.read(i))
        if digest != self.scans[i].checksum:
            raise self._damaged(
                i, f"its voxels have digest {digest}, packed were {self.scans[i].checksum}"
            )

    def _damaged(self, i: int, problem: str) -> Damaged:
        return Damaged(
            f"scan {self.scans[i].id} is damaged: {self.file(i)}: {problem}. Run `tapct pack` with "
            "--verify --repair to pack it again."
        )

    def _opened(self, i: int) -> PackedScan:
        """Scan i, open; from the files kept open where it is among them."""
        if self._pid != os.getpid():  # forked: the lock may be held by a thread that is not here
            self._start_process()
        with self._lock:
            if i in self._open:
                self._open.move_to_end(i)
                return self._open[i]
        opened = PackedScan(self.file(i))
        scan, meta = self.scans[i], opened.meta
        if (meta.id, meta.shape_ZYX, meta.checksum) != (scan.id, scan.shape_ZYX, scan.checksum):
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
    return folder / f"{scan_id}.b2nd"


def store_digest(scans: Iterable[StoredScan]) -> str:
    """Hash voxels, grids and order of all scans, whatever their compression: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for scan in scans:
        digest.update(repr((scan.id, scan.shape_ZYX, scan.spacing_mm, scan.checksum)).encode())
    return digest.hexdigest()


def labels_digest(scans: Iterable[StoredScan]) -> str:
    """Hash the labels and label names of all scans: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for scan in scans:
        digest.update(repr((scan.id, scan.label_digest, scan.label_names)).encode())
    return digest.hexdigest()


def index_bytes(
    scans: Iterable[StoredScan],
    manifest_digest: str,
    summary: Mapping[str, int] | None = None,
    patient_key: str = "",
    manifest_file: str = "",
) -> bytes:
    """The content of `store.parquet`.

    Args:
        scans: all scans of the store, in the order of the manifest.
        manifest_digest: digest of the manifest.
        summary: number of rows of the manifest by reason, as `Manifest.summary` counts them.
        patient_key: name of the key of the patient hashes; empty where unknown.
        manifest_file: file of the manifest, relative to the store; empty where there is none.
    """
    scans = tuple(scans)
    rows = [
        (
            *(s.id, *s.shape_ZYX, *s.spacing_mm, s.patient),
            *(s.label_digest, json.dumps(s.label_names), s.checksum, s.patient_from),
        )
        for s in scans
    ]
    columns = _COLUMNS.append(_PATIENT_FROM)
    arrays = [pa.array([row[k] for row in rows], column.type) for k, column in enumerate(columns)]
    info: dict[str, Any] = {
        "schema": SCHEMA,
        "manifest_digest": manifest_digest,
        "manifest_file": manifest_file,
        "digest": store_digest(scans),
        "summary": dict(summary or {}),
        "patient_key": patient_key,
    }
    info["content"] = table_digest([array.to_pylist() for array in arrays], info)
    schema = columns.with_metadata({_INDEX_KEY: json.dumps(info).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink)
    return sink.getvalue().to_pybytes()


def read_index(folder: Path) -> tuple[tuple[StoredScan, ...], dict[str, Any]]:
    """Read `store.parquet`.

    Args:
        folder: folder of the store.
    Returns:
        The scans, and the index's `manifest_digest`, `digest` and `summary`.
    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    file = folder / INDEX_NAME
    if not file.is_file():
        raise UserError(
            f"{folder} holds no {INDEX_NAME}, so it is not a packed archive; make one with `tapct "
            "pack`."
        )
    try:
        table = pq.read_table(file, partitioning=None)
        info = json.loads((table.schema.metadata or {})[_INDEX_KEY])
        if info["schema"] != SCHEMA:
            age = "an older" if info["schema"] < SCHEMA else "a newer"
            raise ValueError(f"it was packed by {age} version of tapct")
        # column by column: a dictionary per row takes four times as long
        has_rule = _PATIENT_FROM.name in table.column_names
        fields = [*_COLUMNS, _PATIENT_FROM] if has_rule else list(_COLUMNS)
        columns = [table.column(field.name).cast(field.type).to_pylist() for field in fields]
        facts = {key: value for key, value in info.items() if key != "content"}
        if info["content"] != table_digest(columns, facts):
            raise ValueError("its content differs from its digest, so it is damaged")
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is not readable ({single_line(error)}); run `tapct pack` again, it keeps "
            "the scans that it can."
        ) from error
    manifest_file = info.get("manifest_file", "")
    paths = read_paths(folder / manifest_file, info["manifest_digest"]) if manifest_file else {}
    if not has_rule:
        columns.append([""] * table.num_rows)
    scans = []
    for row in zip(*columns, strict=True):
        scan_id, z, y, x, dz, dy, dx, patient, label_digest, names, checksum, rule = row
        path = paths.get(scan_id, "")
        label_names = tuple((int(value), str(name)) for value, name in json.loads(names))
        scans.append(
            StoredScan(
                *(scan_id, (z, y, x), (dz, dy, dx), patient, path, label_digest, checksum),
                label_names,
                rule,
            )
        )
    return tuple(scans), info
