"""What `tapct pack` did, as counts and as lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tapct.base.counted import counted

_MOST_LINES = 10  # of scans that are named one by one


@dataclass(frozen=True)
class RefusedScan:
    """An accepted scan that could not be packed.

    Args:
        id: name of the scan in the manifest.
        path: path of the scan in the archive.
        reason: reason code, e.g. `vanished`, `changed`.
        detail: one line that names the value and the rule.
    """

    id: str
    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class PackReport:
    """The result of one `pack`.

    Args:
        store: folder of the store.
        packed: ids of the scans that were written.
        kept: number of scans that were packed before.
        damaged: ids among `packed` whose file was there but not readable.
        refused: accepted scans of the manifest that could not be packed.
        held: ids among `refused` of which the store still lists what it had before.
        unlisted: names of packed files that belong to no scan that the store lists; they are kept.
        voxel_bytes: bytes of all scans of the store as int16 in memory.
        stored_bytes: bytes of their files on disk.
        seconds: wall time.
        num_labelled: number of scans of the store with labels.
        labels_refused: scans of the store whose labels could not be packed.
    """

    store: Path
    packed: Sequence[str]
    kept: int
    damaged: tuple[str, ...]
    refused: tuple[RefusedScan, ...]
    held: tuple[str, ...]
    unlisted: tuple[str, ...]
    voxel_bytes: int
    stored_bytes: int
    seconds: float
    num_labelled: int = 0
    labels_refused: tuple[RefusedScan, ...] = ()

    @property
    def num_missing(self) -> int:
        """Number of accepted scans of which this pack has no voxels, or no labels."""
        return len({scan.id for scan in (*self.refused, *self.labels_refused)})

    def lines(self) -> list[str]:
        """What happened: a line of counts, then what is not as it should be."""
        share = self.stored_bytes / max(self.voxel_bytes, 1)
        found = [
            f"{len(self.packed)} packed, {self.kept} kept from before, {len(self.refused)} "
            f"refused; {self.stored_bytes / 1e6:.0f} MB, {share:.0%} of the uncompressed size: "
            f"{self.store}"
        ]
        found += _named(self.refused, "refused {}")
        if self.held:
            scans = counted(len(self.held), "refused scan", "refused scans")
            found.append(
                f"  the store keeps what it had before of {scans}; --drop-missing takes them out"
            )
        if self.num_labelled or self.labels_refused:
            found.append(f"labels of {counted(self.num_labelled, 'scan')} packed")
        found += _named(self.labels_refused, "labels {} not packed")
        if self.damaged:
            found.append(f"  damaged files packed again: {', '.join(self.damaged)}")
        if self.unlisted:
            one = f"file of {self.store} belongs"
            unlisted = counted(len(self.unlisted), one, f"files of {self.store} belong")
            found.append(f"  {unlisted} to no scan that the store lists")
        return found

    def missing_line(self, allowed: int) -> str:
        """The error of a pack in which more scans are missing than allowed; empty for others.

        Args:
            allowed: number of accepted scans that may be missing.
        """
        if self.num_missing <= allowed:
            return ""
        missing = (*self.refused, *self.labels_refused)
        by_reason = Counter(scan.reason for scan in missing).most_common()
        reasons = ", ".join(f"{count} {reason}" for reason, count in by_reason)
        return (
            f"{counted(self.num_missing, 'accepted scan')} of the manifest could not be packed "
            f"({reasons}), e.g. {missing[0].path}; the others are in {self.store}. Run `tapct "
            f"index` again, or accept this with --allow-missing {self.num_missing}"
        )


def _named(scans: Sequence[RefusedScan], what: str) -> list[str]:
    """A line for each of the first scans, and the number of the others.

    Args:
        scans: scans to name.
        what: words of the line, with {} in place of the path.
    """
    lines = [f"  {what.format(s.path)}: {s.reason}: {s.detail}" for s in scans[:_MOST_LINES]]
    if len(scans) > _MOST_LINES:
        lines.append(f"  {what.format(f'{len(scans) - _MOST_LINES} more')}")
    return lines
