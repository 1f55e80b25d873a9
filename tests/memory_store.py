"""A store of scans in memory, which counts what is read: evaluation reads it as it reads packed
scans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tapct.data.digest import label_digest, voxel_digest
from tapct.data.packed.store import StoredScan
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.types import LabelMap


class MemoryStore:
    """Scans in memory.

    Args:
        rows: id, patient, path and has_labels of each scan.
        make: the scan of a row, with its voxels and labels.
    Attributes:
        scans: rows as a packed store has them.
        reads: IDs of the scans whose voxels were read, in order.
        label_reads: the same for labels.
    """

    path = Path("store")

    def __init__(self, rows: Iterable[Any], make: Callable[[Any], LabelledScan]) -> None:
        self.rows = list(rows)
        self.made = [make(row) for row in self.rows]
        self.scans = tuple(map(self.row_of, self.rows, self.made))
        self.reads: list[str] = []
        self.label_reads: list[str] = []

    @staticmethod
    def row_of(row: Any, scan: LabelledScan) -> StoredScan:
        """The row of a packed store."""
        labels = scan.labels if row.has_labels else None
        return StoredScan(
            row.id,
            scan.shape_ZYX,
            scan.spacing_mm,
            row.patient,
            row.path,
            "" if labels is None else label_digest(labels),
            voxel_digest(scan.volume.hu_ZYX),
            () if labels is None else labels.names,
        )

    def manifest(self) -> None:
        """There is no manifest, and no original file."""

    def places(self) -> dict[str, Any]:
        """The places of the scans are unknown."""
        return {}

    def index_of(self, scan_id: str) -> int:
        """Number of a scan."""
        return [row.id for row in self.scans].index(scan_id)

    def read(self, i: int) -> np.ndarray:
        """Voxels of a scan."""
        self.reads.append(self.scans[i].id)
        return self.made[i].volume.hu_ZYX

    def read_labels(self, i: int) -> LabelMap:
        """Labels of a scan."""
        assert self.scans[i].has_labels
        self.label_reads.append(self.scans[i].id)
        return self.made[i].label_map
