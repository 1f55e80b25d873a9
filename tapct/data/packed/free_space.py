"""Whether the disk has room for a store, before it is packed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.data.manifest import Row, RowTable
from tapct.data.packed.scan_list import SHAPE

SAMPLE = 4  # scans from whose packed size the others' is estimated
_MARGIN = 1.05  # the sample may compress a little better than the rest


def voxel_bytes(row: Row) -> int:
    """Bytes of a scan as int16."""
    return 2 * row.depth * row.height * row.width


def voxel_bytes_of(rows: RowTable) -> np.ndarray:
    """Bytes of each scan as int16, int64 (N,)."""
    sizes = [rows.table.column(name).to_numpy().astype(np.int64) for name in SHAPE]
    num_bytes: np.ndarray = 2 * sizes[0] * sizes[1] * sizes[2]
    return num_bytes


@dataclass(frozen=True)
class Room:
    """Need and free space of a store.

    Args:
        out: folder of the store.
        scans: number of scans that are not packed yet.
        voxels: bytes of their voxels as int16.
        labels: bytes of their labels as uint8.
        free: bytes that are free.
        parts: number of parts into which the scans are divided; they are packed on one disk.
    """

    out: Path
    scans: int
    voxels: int
    labels: int
    free: int
    parts: int = 1

    @classmethod
    def measure(cls, out: Path, rows: RowTable, parts: int = 1) -> Room:
        """The need of these scans.

        Args:
            out: folder of the store, which exists.
            rows: scans that are not packed yet, those of all parts.
            parts: as in the class.
        """
        voxels = voxel_bytes_of(rows)
        is_labelled = pc.not_equal(rows.table.column("label_path"), "").to_numpy()
        labels = int(voxels[is_labelled].sum()) // 2
        free = shutil.disk_usage(out).free
        return cls(out, len(rows), int(voxels.sum()), labels, free, parts)

    @property
    def _of_parts(self) -> str:
        """Words about the parts."""
        return f" in all {self.parts} parts" if self.parts > 1 else ""

    @property
    def is_ample(self) -> bool:
        """Whether the scans fit even if nothing could be compressed."""
        return self.voxels + self.labels <= self.free

    def bound_line(self) -> str:
        """The line about a need that is no larger than the free space."""
        need = (self.voxels + self.labels) / 1e9
        return (
            f"space: {counted(self.scans, 'scan')} to pack{self._of_parts}, {need:.3g} GB "
            f"uncompressed; {self.free / 1e9:.3g} GB are free"
        )

    def check_estimate(self, packed: int, stored: int, of: int) -> str:
        """Compare the free space with an estimate from the scans that were packed first.

        Args:
            packed: number of those scans.
            stored: bytes of their files.
            of: bytes of their voxels.
        Returns:
            The line about it.
        Raises:
            UserError: the scans do not fit.
        """
        share = stored / max(of, 1)
        need = max(share * self.voxels - stored, 0) * _MARGIN
        line = (
            f"{counted(self.scans - packed, 'scan')} more to pack{self._of_parts}, about "
            f"{need / 1e9:.3g} GB "
            f"({share:.0%} of the voxels, as of {counted(packed, 'scan')} packed first); "
            f"{(self.free - stored) / 1e9:.3g} GB are free"
        )
        if need > self.free - stored:
            raise UserError(
                f"no space for the store {self.out}: {line}. Free some space, choose another --out "
                "or a higher --level; scans that are packed are kept"
            )
        return f"space: {line}"
