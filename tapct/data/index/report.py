"""What `tapct index` found, as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc

from tapct.base.counted import counted
from tapct.data.index.patient_report import lines_about_changes, lines_about_patients
from tapct.data.manifest import ACCEPTED, REFUSED, Manifest
from tapct.data.search.passed_over import advice, summary

MOST_LINES = 200  # about single scans; an archive may refuse a million


def lines_about(manifest: Manifest, out: Path, min_depth: int) -> Iterator[str]:
    """What was accepted, refused and skipped, and what was found about patients and labels.

    Args:
        manifest: manifest as written.
        out: its file.
        min_depth: fewest slices of an accepted scan.
    """
    counts = ", ".join(f"{count} {reason}" for reason, count in manifest.summary().items())
    yield f"{counts}: {out}"
    yield from lines_about_patients(manifest.row_table())
    yield from lines_about_changes(manifest.patient_changes)
    if manifest.label_report is not None:
        yield from manifest.label_report.lines()
    yield from _lines_about_rows(manifest)
    others = summary(manifest.passed_over)
    if others:
        yield f"passed over: {others}"
        if advice(manifest.passed_over):
            yield advice(manifest.passed_over)
    num_short = manifest.summary().get("too_few_slices", 0)
    if num_short:
        short = counted(num_short, "scan has", "scans have")
        yield f"{short} fewer than {min_depth} slices; --min-depth 1 accepts them"


def _lines_about_rows(manifest: Manifest) -> Iterator[str]:
    """A line for each scan that is refused or marked, or whose labels are not used, up to
    `MOST_LINES`.
    """
    num_left = 0
    for number, line in enumerate(_all_lines_about_rows(manifest)):
        if number < MOST_LINES:
            yield line
        else:
            num_left += 1
    if num_left:
        more = counted(num_left, "more line")
        yield f"  and {more}; the columns reason, detail and marks have all"


def _all_lines_about_rows(manifest: Manifest) -> Iterator[str]:
    columns = ("path", "status", "reason", "marks", "detail")
    for table in manifest.row_table().tables(columns):
        has_line = (pc.not_equal(table.column(name), "") for name in ("marks", "detail"))
        for row in table.filter(pc.or_(*has_line)).to_pylist():
            if row["marks"] and row["status"] == ACCEPTED:
                yield f"  accepted {row['path']}, marked {row['marks']}"
            if row["detail"]:
                is_refused = row["status"] == REFUSED
                refused = f"refused {row['path']}: {row['reason']}"
                yield f"  {refused if is_refused else row['path']}: {row['detail']}"
