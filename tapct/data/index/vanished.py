"""Scans of an archive that an earlier index found and this one did not."""

from __future__ import annotations

from dataclasses import replace

from tapct.data.manifest import REFUSED, Manifest, Row

VANISHED = "vanished"


def with_vanished(manifest: Manifest, older: Manifest | None) -> Manifest:
    """A manifest with a refused row for every scan of an older one that is gone; the row stays
    until the scan is there again.

    Args:
        manifest: manifest of the archive now.
        older: manifest that it replaces; None where there is none.
    """
    if older is None or older.root != manifest.root:
        return manifest
    here = {row.id for row in manifest.rows}
    missing = [row for row in older.rows if row.id not in here]
    # a series whose slices lie in other folders too has another path, and is not gone
    files = {file for row in missing for file in files_of(row)}
    found = {file for row in manifest.rows for file in files_of(row) if file in files}
    patients = {scan.id: scan.patient for scan in manifest.memory.gone}
    gone = [
        _vanished(row, patients.get(row.id, row.patient))
        for row in missing
        if not found.intersection(files_of(row))
    ]
    if not gone:
        return manifest
    rows = sorted([*manifest.rows, *gone], key=lambda row: row.path)
    return replace(manifest, rows=tuple(rows))


def files_of(row: Row) -> tuple[str, ...]:
    """Paths of the files of a scan below the root."""
    return row.file_paths or (row.path,)


def _vanished(row: Row, patient: str) -> Row:
    """The row of a scan that is gone, with what was known of it."""
    return replace(
        row,
        status=REFUSED,
        reason=VANISHED,
        detail="an earlier index of this archive found it: its files are gone, or lie in a folder "
        "that was not given now",
        patient=patient,
        label_path="",
        label_digest="",
        merged_labels=(),
        duplicate_of="",
    )
