"""Write what is true of the phantom's scans as the tables that `tapct eval` reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from tapct.base.files import write_atomically
from tapct.data.phantom.files import CaseFacts
from tapct.data.phantom.truth import TARGETS, Truth

SCAN_LABELS = "scan_labels.csv"
LANDMARKS = "landmarks.csv"


def write_truth(out: Path, cases: Sequence[tuple[CaseFacts, Truth]]) -> int:
    """Write scan_labels.csv and landmarks.csv.

    Args:
        out: folder of the archive.
        cases: facts and truth of each scan, in the order of the archive.
    Returns:
        Number of bytes on disk.
    """
    labels = [
        (facts.path, facts.patient_id, *(_text(truth.targets[name]) for name in TARGETS))
        for facts, truth in cases
    ]
    points = [
        (facts.path, point.name, *(f"{mm:.3f}" for mm in point.zyx_mm))
        for facts, truth in cases
        for point in truth.landmarks
    ]
    num_bytes = 0
    for name, columns, rows in (
        (SCAN_LABELS, ("path", "patient", *TARGETS), labels),
        (LANDMARKS, ("path", "name", "z_mm", "y_mm", "x_mm"), points),
    ):
        content = _table(columns, rows)
        write_atomically(out / name, content)
        num_bytes += len(content)
    return num_bytes


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    """A CSV file."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue().encode()


def _text(value: str | float | None) -> str:
    """A value as text; empty where it is unknown."""
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"
