"""Whether the disk has room for a store, before it is packed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.data.manifest import Row

SAMPLE = 4  # scans from whose packed size the others' is estimated
_MARGIN = 1.05  # the sample may compress a little better than the rest


def voxel_bytes(row: Row) -> int:
    """Bytes of a scan as int16."""
    return 2 * row.depth * row.height * row.width


@dataclass(frozen=True)
class Room:
    """Need and free space of a store.

    Args:
        out: folder of the store.
        scans: number of scans that are not packed yet.
        voxels: bytes of their voxels as int16.
        labels: bytes of their labels as uint8.
        free: bytes that are free.
    """

    out: Path
    scans: int
    voxels: int
    labels: int
    free: int

    @classmethod
    def measure(cls, out: Path, rows: Sequence[Row]) -> Room:
        """The need of these scans.

        Args:
            out: folder of the store, which exists.
            rows: scans that are not packed yet.
        """
        labelled = [row for row in rows if row.label_path]
        return cls(
            out,
            len(rows),
            sum(map(voxel_bytes, rows)),
            sum(map(voxel_bytes, labelled)) // 2,
            shutil.disk_usage(out).free,
        )

    @property
    def is_ample(self) -> bool:
        """Whether the scans fit even if nothing could be compressed."""
        return self.voxels + self.labels <= self.free

    def bound_line(self) -> str:
        """The line about a need that is no larger than the free space."""
        need = (self.voxels + self.labels) / 1e9
        return (
            f"space: {counted(self.scans, 'scan')} to pack, {need:.3g} GB uncompressed; "
            f"{self.free / 1e9:.3g} GB are free"
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
            f"{counted(self.scans - packed, 'scan')} more to pack, about {need / 1e9:.3g} GB "
            f"({share:.0%} of the voxels, as of {counted(packed, 'scan')} packed first); "
            f"{(self.free - stored) / 1e9:.3g} GB are free"
        )
        if need > self.free - stored:
            raise UserError(
                f"no space for the store {self.out}: {line}. Free some space, choose another --out "
                "or a higher --level; scans that are packed are kept"
            )
        return f"space: {line}"
