"""Where a store keeps the files of a scan.

An ID of `tapct index` is 16 hex digits, and its files lie in a folder with the first three of them:
4,096 folders, so that no folder of a store of 10,000,000 scans has more than a few thousand files.
Stores of earlier versions have all files in one folder; they are read, and added to, as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_ID = re.compile(r"[0-9a-f]{16}")
_DIGITS = 3


def file_of(store: Path, scan_id: str, suffix: str) -> Path:
    """Path of a file of a scan.

    Args:
        store: folder of the store.
        scan_id: name of the scan.
        suffix: end of the file's name, such as `.b2nd`.
    """
    flat = store / f"{scan_id}{suffix}"
    if not _ID.fullmatch(scan_id):
        return flat
    fanned = store / scan_id[:_DIGITS] / flat.name
    if not fanned.exists() and flat.exists():
        return flat
    return fanned


def files_in(store: Path, pattern: str) -> Iterator[Path]:
    """The files of a store, in its folder and those of its scans, that match a pattern of names."""
    yield from store.glob(pattern)
    yield from store.glob(f"{'[0-9a-f]' * _DIGITS}/{pattern}")
