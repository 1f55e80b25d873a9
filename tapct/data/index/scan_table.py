"""Examined scans and their labels as rows of the journal, and the keys by which they are found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow

from tapct.data.index.examined import Examined
from tapct.data.index.journal import key_of
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
_UNTIL_ALL_ARE_READ = [
    ("facts", pyarrow.string()),
    ("mirror_digest", pyarrow.string()),
    ("sketch", pyarrow.binary()),
]
SCAN_SCHEMA = pyarrow.schema(
    [*((field.name, arrow_type(field)) for field in _OF_SCAN), *_UNTIL_ALL_ARE_READ]
)
# of scans while the archive is not examined as a whole
EXAMINED_SCHEMA = pyarrow.schema(
    [*((field.name, arrow_type(field)) for field in dataclasses.fields(Row)), *_UNTIL_ALL_ARE_READ]
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
    facts = _facts_text(scan)
    return row | {"facts": facts, "mirror_digest": scan.mirror_digest, "sketch": scan.sketch}


def _facts_text(scan: Examined) -> str:
    """The facts of a scan that identify its patient, which are hashed; the rest may be free text.
    Empty where it has none.
    """
    if scan.facts is None:
        return ""
    return json.dumps([scan.facts.patient, dataclasses.astuple(scan.facts.clues)])


def facts_of_text(text: str) -> ScanFacts | None:
    """The facts that the column `facts` holds."""
    if not text:
        return None
    patient, clues = json.loads(text)
    return ScanFacts(patient, clues=PatientClues(*clues))


def scan_of_row(row: Mapping[str, Any]) -> Examined:
    """The scan of a row, which has neither path nor labels."""
    fields: dict[str, Any] = {
        field.name: tuple(row[field.name]) if "tuple" in str(field.type) else row[field.name]
        for field in _OF_SCAN
    }
    facts, digest, sketch = facts_of_text(row["facts"]), row["mirror_digest"], row["sketch"]
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


def row_of_examined(scan: Examined) -> dict[str, Any]:
    """The row of a scan with all that `examined` needs."""
    facts = {"facts": _facts_text(scan), "mirror_digest": scan.mirror_digest, "sketch": scan.sketch}
    return {field.name: getattr(scan, field.name) for field in dataclasses.fields(Row)} | facts
