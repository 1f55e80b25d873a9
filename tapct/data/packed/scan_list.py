"""The list of a store's scans: columns in Arrow, and one row as an object on demand.

A store of 10,000,000 scans would need 10 GB as objects. So the columns stay as they were read, from
memory-mapped pages where the store has them (`store_index`), and `ScanList` makes a `StoredScan`
only for the row that is asked for.

Axes: N scans; Z Y X depth height width in voxels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tapct.base.hashing import purpose_id
from tapct.data.lazy_rows import LazyRows
from tapct.data.patients.split import patient_number_name

SHAPE = ("depth", "height", "width")
SPACING = ("spacing_z_mm", "spacing_y_mm", "spacing_x_mm")
NO_NAMES = "[]"  # the label names of a scan without any, as the index stores them
_ROWS_AT_ONCE = 4096  # rows that are decoded at once where all are wanted
_FEW = 5000  # rows of which all objects are kept, once one is asked for


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


class ScanList(LazyRows[StoredScan]):
    """The scans of a store in the order of its index.

    Args:
        columns: columns of the index by name, of equal length, without nulls; label_names as JSON.
        paths: function that returns the paths of these IDs, empty where unknown; it is called when
            a path is first needed.
    """

    def __init__(
        self,
        columns: dict[str, pa.Array],
        paths: Callable[[pa.Array], pa.Array],
        at: np.ndarray | None = None,
    ) -> None:
        self._columns, self._find_paths, self._at = columns, paths, at
        self._paths: pa.Array | None = None
        self._kept: tuple[StoredScan, ...] = ()
        self._shapes = [columns[name].to_numpy() for name in SHAPE]
        self._spacings = [columns[name].to_numpy() for name in SPACING]

    def __len__(self) -> int:
        return len(self._columns["id"]) if self._at is None else len(self._at)

    def row(self, i: int) -> StoredScan:
        """Scan i as an object; those of a short list are made once."""
        if len(self) > _FEW:
            return next(self._rows(np.asarray([i])))
        if not self._kept:
            self._kept = tuple(self._rows(np.arange(len(self))))
        return self._kept[i]

    def __iter__(self) -> Iterator[StoredScan]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self._rows(np.arange(start, min(start + _ROWS_AT_ONCE, len(self))))

    def _place(self, i: int) -> int:
        """Row of the columns that holds scan i."""
        return i if self._at is None else int(self._at[i])

    def _rows(self, numbers: np.ndarray) -> Iterator[StoredScan]:
        """The scans with these numbers as objects."""
        at = pa.array(numbers if self._at is None else self._at[numbers])
        if self._paths is None:
            self._paths = self._find_paths(self._columns["id"])
        wanted = [name for name in self._columns if name != "patient_number"]
        values = {name: self._columns[name].take(at).to_pylist() for name in wanted}
        shapes = zip(*(values[name] for name in SHAPE))
        spacings = zip(*(values[name] for name in SPACING))
        names = [_label_names(text) for text in values["label_names"]]
        others = ("patient", "path", "label_digest", "checksum")
        values["path"] = self._paths.take(at).to_pylist()
        columns = [values[name] for name in others]
        rules = values["patient_from"]
        return map(StoredScan, values["id"], shapes, spacings, *columns, names, rules)

    def id(self, i: int) -> str:
        """ID of scan i; like the next ones, it makes no row object and needs no path."""
        return str(self._columns["id"][self._place(i)].as_py())

    def checksum(self, i: int) -> str:
        """Digest of the voxels of scan i."""
        return str(self._columns["checksum"][self._place(i)].as_py())

    def shape_ZYX(self, i: int) -> tuple[int, int, int]:
        """Number of voxels of scan i."""
        at = self._place(i)
        z, y, x = (int(sizes[at]) for sizes in self._shapes)
        return z, y, x

    def spacing_mm(self, i: int) -> tuple[float, float, float]:
        """Distance of voxel centres of scan i along (z, y, x)."""
        at = self._place(i)
        z, y, x = (float(values[at]) for values in self._spacings)
        return z, y, x

    @property
    def own_columns(self) -> set[str]:
        """Names of the columns that manifest and index have in common, with the same meaning."""
        return {"id", *SHAPE, *SPACING, "patient", "label_digest"}

    def column(self, name: str) -> pa.Array:
        """A column of the index."""
        column = self._columns[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return column if self._at is None else column.take(pa.array(self._at))

    def depths(self) -> np.ndarray:
        """Number of slices of each scan, int (N,)."""
        return self._shapes[0] if self._at is None else self._shapes[0][self._at]

    def patient_numbers(self) -> np.ndarray:
        """A number of each scan's patient, uint64 (N,), from which every split is computed; see
        `split.positions`.
        """
        if "patient_number" not in self._columns:
            self._columns["patient_number"] = patient_numbers(self._columns["patient"])
        numbers = self._columns["patient_number"].to_numpy()
        return numbers if self._at is None else numbers[self._at]

    def where(self, chosen: np.ndarray) -> ScanList:
        """The scans at which a mask, bool (N,), is true; they share the columns of this table."""
        at = np.flatnonzero(chosen)
        return ScanList(self._columns, self._find_paths, at if self._at is None else self._at[at])

    def labelled(self) -> ScanList:
        """The scans with labels."""
        return self.where(pc.not_equal(self.column("label_digest"), "").to_numpy(False))


def no_paths(ids: pa.Array) -> pa.Array:
    """The paths of scans whose manifest is gone."""
    return pa.array([""], pa.string()).take(pa.array(np.zeros(len(ids), np.int64)))


def patient_numbers(patients: pa.Array) -> pa.Array:
    """A number of each patient, uint64; see `split.positions`."""
    coded = patients.dictionary_encode()
    names = coded.dictionary.to_pylist()
    numbers = np.fromiter(
        (purpose_id(patient_number_name(name)) for name in names), np.uint64, len(names)
    )
    return pa.array(numbers[coded.indices.to_numpy()])


def _label_names(text: str) -> tuple[tuple[int, str], ...]:
    """Label values and names as the index stores them."""
    if text == NO_NAMES:
        return ()
    return tuple((int(value), str(name)) for value, name in json.loads(text))


def columns_of(scans: Iterable[StoredScan]) -> dict[str, list[Any]]:
    """The values of all scans by column of the index."""
    scans = tuple(scans)
    columns: dict[str, list[Any]] = {"id": [scan.id for scan in scans]}
    for axis, name in enumerate(SHAPE):
        columns[name] = [scan.shape_ZYX[axis] for scan in scans]
    for axis, name in enumerate(SPACING):
        columns[name] = [scan.spacing_mm[axis] for scan in scans]
    columns["patient"] = [scan.patient for scan in scans]
    columns["label_digest"] = [scan.label_digest for scan in scans]
    columns["label_names"] = [json.dumps(scan.label_names) for scan in scans]
    columns["checksum"] = [scan.checksum for scan in scans]
    columns["patient_from"] = [scan.patient_from for scan in scans]
    return columns


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
