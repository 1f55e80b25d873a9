"""Examined scans and their labels as rows of the journal, and the keys by which they are found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow

from tapct.data.index.examined import Examined
from tapct.data.index.journal import Journal, Keys, key_of, keys_in
from tapct.data.index.label_files import LabelStamps
from tapct.data.index.scan_row import ExamineTask, label_paths
from tapct.data.manifest import ACCEPTED, Row, arrow_type
from tapct.data.scans.plain_facts import CANNOT_BE_READ
from tapct.data.workers.process_pool import LOST
from tapct.types import PatientClues, ScanFacts

SCANS, LABELS = "scans", "labels"  # kinds of rows in the journal
# what the task gives, the labels, or the archive as a whole
_NOT_OF_SCAN = (
    *("id", "path", "kind", "file_paths", "label_path", "label_digest", "merged_labels"),
    *("duplicate_of", "patient", "patient_from", "split"),
)
_OF_SCAN = [field for field in dataclasses.fields(Row) if field.name not in _NOT_OF_SCAN]
SCAN_SCHEMA = pyarrow.schema(
    [
        *((field.name, arrow_type(field)) for field in _OF_SCAN),
        ("facts", pyarrow.string()),
        ("mirror_digest", pyarrow.string()),
        ("sketch", pyarrow.binary()),
    ]
)
LABEL_SCHEMA = pyarrow.schema([("label_digest", pyarrow.string()), ("detail", pyarrow.string())])


def scan_key(task: ExamineTask) -> bytes:
    """What the row of a scan depends on, without its labels; empty where it cannot be known."""
    source, rules = task.source, task.rules
    if not source.stamp:
        return b""
    of_rules = (rules.min_depth, rules.accept, rules.study_dates)
    of_source = (source.kind, source.reason, source.detail, source.mark, source.frames)
    return key_of(source.stamp, repr(of_rules), repr(of_source))


def label_key(task: ExamineTask, scan: Examined, stamps: LabelStamps) -> bytes:
    """What the labels of a scan depend on: their files, and the grid of the scan."""
    assert task.labels is not None
    rules = task.rules
    grid = (scan.depth, scan.height, scan.width, scan.spacing_z_mm, scan.spacing_y_mm)
    more = (scan.spacing_x_mm, scan.origin_mm, scan.directions)
    of_rules = (rules.ignore_labels, rules.label_names, task.num_other_labels)
    return key_of(stamps.of((task.labels, *task.more_labels)), repr((grid, more, of_rules)))


def row_of_scan(scan: Examined) -> dict[str, Any]:
    """The row of a scan, without its labels."""
    row = {field.name: getattr(scan, field.name) for field in _OF_SCAN}
    if scan.status == ACCEPTED:
        row["detail"] = ""  # of the labels
    facts = ""
    if scan.facts is not None:
        # only what identifies the patient, which is hashed; the rest may be free text
        facts = json.dumps([scan.facts.patient, dataclasses.astuple(scan.facts.clues)])
    return row | {"facts": facts, "mirror_digest": scan.mirror_digest, "sketch": scan.sketch}


def scan_of_row(row: Mapping[str, Any]) -> Examined:
    """The scan of a row, which has neither path nor labels."""
    fields: dict[str, Any] = {
        field.name: tuple(row[field.name]) if "tuple" in str(field.type) else row[field.name]
        for field in _OF_SCAN
    }
    facts = None
    if row["facts"]:
        patient, clues = json.loads(row["facts"])
        facts = ScanFacts(patient, clues=PatientClues(*clues))
    digest, sketch = row["mirror_digest"], row["sketch"]
    return Examined(
        id="", path="", kind="", **fields, facts=facts, mirror_digest=digest, sketch=sketch
    )


def row_of_labels(scan: Examined) -> dict[str, Any]:
    """The row of the labels of a scan."""
    return {"label_digest": scan.label_digest, "detail": scan.detail}


def with_known_labels(scan: Examined, task: ExamineTask, row: Mapping[str, Any]) -> Examined:
    """A scan with the labels of a row."""
    scan = replace(scan, detail=row["detail"])
    if not row["label_digest"]:
        return scan
    first, *more = label_paths(task)
    return replace(
        scan, label_path=first, merged_labels=tuple(more), label_digest=row["label_digest"]
    )


def may_change(reason: str, detail: str) -> bool:
    """Whether a refusal may be one of the machine or its disk, so that it is tried again."""
    return reason in LOST or CANNOT_BE_READ in detail


class JournalRows:
    """Rows of one kind that the journal has, found by their keys.

    Args:
        journal: journal of the index.
        kind: kind of the rows.
    """

    def __init__(self, journal: Journal, kind: str) -> None:
        self._table = journal.read(kind)
        self._keys = Keys(keys_in(self._table))

    def get(self, key: bytes) -> dict[str, Any] | None:
        """The row with a key; None where there is none."""
        if not key:
            return None
        place = int(self._keys.find(key)[0])
        if place < 0:
            return None
        (row,) = self._table.slice(place, 1).to_pylist()
        return dict(row)
