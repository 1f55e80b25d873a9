"""One scan of an evaluation with its labels; its voxels are read at the first use.

Axes: Z Y X depth height width in voxels of the scan as it was read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from tapct.data.digest import voxel_digest
from tapct.data.packed.store import Store
from tapct.eval.scans.usable import ScanRow
from tapct.types import IGNORE_LABEL, LabelMap, Volume

# truth of a statement, a number, or a category
ScanValue: TypeAlias = bool | float | str
Point: TypeAlias = tuple[float, float, float]  # mm (z, y, x)


@dataclass(frozen=True)
class StoredVolume:
    """The voxels of a scan in a store, which are read when they are needed.

    Args:
        store: packed scans.
        number: number of the scan in the store.
    """

    store: Store
    number: int

    @property
    def shape_ZYX(self) -> tuple[int, int, int]:
        """Number of voxels."""
        return self.store.scans[self.number].shape_ZYX

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of voxel centres along (z, y, x)."""
        return self.store.scans[self.number].spacing_mm

    @property
    def digest(self) -> str:
        """Digest of the voxels."""
        return self.store.scans[self.number].checksum

    def read(self) -> Volume:
        """The voxels. Raises: Damaged."""
        return Volume(self.store.read(self.number), self.spacing_mm)


@dataclass(frozen=True)
class LabelledScan:
    """One scan with its labels. Its voxels are read at the first use of `volume`.

    Args:
        id: scan ID.
        source: voxels in HU, in memory or in a store.
        labels: label map on the scan's grid; None where the scan has none or no task needs it.
        patient: keyed hash of the patient ID; empty where unknown.
        scan_labels: target -> value for the scan as a whole, without unknown values; may be empty.
            All values of a target have one type, see `labels/scan_values.py`.
        landmarks_mm: name -> position (z, y, x) in mm from the centre of voxel (0, 0, 0), along the
            axes of the scan: the index of a voxel times the spacing. May be empty. The scans of one
            patient share the names of the points that they have in common.
        official_side: `train`, `val` or `test` where the table of `eval.scan_labels` gives an
            official split; empty where it gives none.
    """

    id: str
    source: Volume | StoredVolume
    labels: LabelMap | None = None
    patient: str = ""
    scan_labels: Mapping[str, ScanValue] = field(default_factory=dict)
    landmarks_mm: Mapping[str, Point] = field(default_factory=dict)
    official_side: str = ""

    @functools.cached_property
    def volume(self) -> Volume:
        """Voxels in HU. A task that does without them spares an evaluation the reading, where the
        features are in the cache.

        Raises:
            Damaged: the packed scan is damaged.
        """
        return self.source.read() if isinstance(self.source, StoredVolume) else self.source

    @property
    def shape_ZYX(self) -> tuple[int, int, int]:
        """Number of voxels; they are not read."""
        if isinstance(self.source, StoredVolume):
            return self.source.shape_ZYX
        z, y, x = self.source.hu_ZYX.shape
        return z, y, x

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of voxel centres along (z, y, x); the voxels are not read."""
        return self.source.spacing_mm

    @property
    def digest(self) -> str:
        """Digest of the voxels; voxels in a store are not read."""
        if isinstance(self.source, StoredVolume):
            return self.source.digest
        return voxel_digest(self.source.hu_ZYX)

    @property
    def label_map(self) -> LabelMap:
        """The label map of a scan that a task with voxel labels was given."""
        assert self.labels is not None, f"scan {self.id} was read without its label map"
        return self.labels


ScanLabels: TypeAlias = Mapping[str, Mapping[str, ScanValue]]  # scan ID -> target -> value
Landmarks: TypeAlias = Mapping[str, Mapping[str, Point]]  # scan ID -> name -> position


@dataclass(frozen=True)
class TableLabels:
    """Labels that come from tables and not from the store, by scan ID.

    Args:
        scan_labels: values for scans as a whole.
        landmarks: positions of named points, as in `LabelledScan.landmarks_mm`.
        sides: official split: `train`, `val` or `test`; scans without a side are missing. Empty
            where there is no official split.
        digest: hash of all of this; empty without a table.
    """

    scan_labels: ScanLabels = field(default_factory=dict)
    landmarks: Landmarks = field(default_factory=dict)
    sides: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""

    def added_to(self, scan: LabelledScan) -> LabelledScan:
        """A scan as it was read, with its landmarks and its side of the official split."""
        return replace(
            scan,
            landmarks_mm=self.landmarks.get(scan.id, {}),
            official_side=self.sides.get(scan.id, ""),
        )


def labels_of(row: ScanRow, store: Store) -> dict[int, str]:
    """The labels of a scan: value -> name, empty where it has none; without the background.

    Args:
        row: scan with labels.
        store: packed scans and labels.
    """
    labels = store.read_labels(store.index_of(row.id))
    names = dict(labels.names)
    present = np.flatnonzero(np.bincount(labels.labels_ZYX.reshape(-1)))
    values = {*present.tolist(), *names} - {0, IGNORE_LABEL}
    return {value: names.get(value, "") for value in sorted(values)}


def read_scan(
    row: ScanRow,
    store: Store,
    *,
    with_labels: bool,
    scan_labels: Mapping[str, ScanValue] | None = None,
) -> LabelledScan:
    """A scan of the store, whose voxels are read later, and, where a task needs them, its labels.

    Args:
        row: scan to read.
        store: packed scans.
        with_labels: True to read the labels too.
        scan_labels: values for the scan as a whole.
    Raises:
        Damaged: its labels are damaged.
    """
    i = store.index_of(row.id)
    labels = store.read_labels(i) if with_labels else None
    return LabelledScan(row.id, StoredVolume(store, i), labels, row.patient, scan_labels or {})
