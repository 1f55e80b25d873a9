"""The row of a scan that was examined, with what is needed until all scans were."""

from __future__ import annotations

from dataclasses import dataclass

from tapct.data.manifest import Row
from tapct.types import ScanFacts


@dataclass(frozen=True, slots=True)
class Examined(Row):
    """The row of an examined scan, with what is needed until the whole archive has been examined.

    Args:
        facts: facts of its header and side-car; None where it could not be read.
        mirror_digest: see `duplicates.mirror_digest`; empty where it could not be read.
        sketch: see `near_copies.sketch`; empty where it could not be read.
        contradiction: how the label files of this scan contradict each other, with their names;
            empty for most.
    """

    facts: ScanFacts | None = None
    mirror_digest: str = ""
    sketch: bytes = b""
    contradiction: str = ""
