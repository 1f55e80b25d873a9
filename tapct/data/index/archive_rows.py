"""The rows of an archive as a whole: what only all examined scans together decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc

from tapct.base.exits import UserError
from tapct.base.files import first_cause
from tapct.data.index import duplicates
from tapct.data.index.duplicates import Copies
from tapct.data.index.examining import Examination
from tapct.data.index.kept_patients import (
    RULES,
    KeepRules,
    Older,
    ScanPatients,
    kept_patients,
)
from tapct.data.index.label_counts import LabelCounts
from tapct.data.index.placed_rows import PlacedRows
from tapct.data.index.scan_table import facts_of_text
from tapct.data.index.vanished import vanished
from tapct.data.manifest import REFUSED, Manifest, Row, RowFile, rows_as_table, write_rows
from tapct.data.patients.columns import number_of
from tapct.data.patients.identity import (
    NEAR_COPY,
    NO_SOURCE,
    SEVERAL_IDS,
    STAND_IN,
    Known,
    PatientRules,
    Patients,
    patients_of,
)
from tapct.data.patients.key import key_name
from tapct.data.readers import DICOM

_NAMES = [field.name for field in dataclasses.fields(Row)]


@dataclass(frozen=True)
class ExaminedScans:
    """The examined scans of an archive, for `patients_of`, some of which are in memory at a time.

    Args:
        rows: rows of the scans, see `scan_table`.
        root: folder of the archive.
    """

    rows: PlacedRows
    root: Path

    def __iter__(self) -> Iterator[Known]:
        for row in self.rows.rows(("path", "kind", "facts", "mirror_digest", "sketch")):
            facts, is_series = facts_of_text(row["facts"]), row["kind"] == DICOM.name
            path = self.root / row["path"]
            yield Known(path, is_series, facts, row["mirror_digest"], row["sketch"])


def manifest_of(
    examination: Examination,
    patients: PatientRules,
    older: Older,
    keep: KeepRules,
    scratch: Path,
    *,
    with_vanished: bool,
) -> Manifest:
    """The manifest of an archive whose scans were examined; its rows are in a file in `scratch`.

    Args:
        examination: all scans, examined.
        patients: how patients are identified.
        older: manifest whose patients are kept.
        keep: which patients are kept.
        scratch: folder for temporary files.
        with_vanished: whether scans of the older manifest that are gone have rows.
    """
    found, rules, rows = examination.found, examination.rules, examination.rows
    root = found.inputs.root
    people = patients_of(ExaminedScans(rows, root), patients, scratch)
    by_rules = _scan_patients(rows, people)
    assert len(np.unique(by_rules.ids)) == len(rows), "64-bit ids of two paths collide"
    kept, memory, changes = kept_patients(by_rules, people.given, root.resolve(), older, keep)
    gone: list[Row] = []
    if with_vanished and older.manifest is not None and older.manifest.root == root.resolve():
        patient_of = {scan.id: scan.patient for scan in memory.gone}
        paths = rows.tables(("path", "file_paths"))
        gone = vanished(kept.ids, paths, older.manifest, patient_of)
    finished = _Finished(examination, people, kept)
    file = scratch / "rows.parquet"
    try:
        write_rows(_with_gone(finished, rows, gone, scratch), file)
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {first_cause(error)}; nothing was changed, and what was read "
            "before is kept"
        ) from error
    return Manifest(
        RowFile(file),
        root.resolve(),
        key_name(rules.key),
        passed_over=dict(found.passed_over),
        ignore_labels=rules.ignore_labels,
        label_names=rules.label_names,
        label_report=finished.labels.report(examination.contradiction),
        memory=memory,
        patient_changes=changes,
    )


def _scan_patients(rows: PlacedRows, people: Patients) -> ScanPatients:
    """The patients of scans by today's rules."""
    ids, digests = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for table in rows.tables(("id", "digest")):
        for numbers, name in ((ids, "id"), (digests, "digest")):
            texts = table.column(name).to_pylist()
            numbers.append(np.array([number_of(text) for text in texts], np.uint64))
    number_of_rule = np.zeros(NO_SOURCE + 1, np.uint8)  # RULES begins with the one of no patient
    number_of_rule[: len(RULES) - 2] = np.arange(1, len(RULES) - 1)
    sources = number_of_rule[people.sources]
    return ScanPatients(np.concatenate(ids), np.concatenate(digests), people.hashes, sources)


class _Finished:
    """The rows of the scans as they are written.

    Args:
        examination: all scans, examined.
        people: patients by today's rules.
        kept: patients with those of the older manifest.
    Attributes:
        labels: counts of the labels of the rows that were iterated over.
    """

    def __init__(self, examination: Examination, people: Patients, kept: ScanPatients) -> None:
        self._found, self._rows = examination.found, examination.rows
        self._people, self._kept = people, kept
        self._copies = Copies(lambda: self._rows.tables(duplicates.COLUMNS))
        self.labels = LabelCounts(self._found.unpaired, self._found.inputs.root)

    def __iter__(self) -> Iterator[pyarrow.Table]:
        found = self._found.labels()
        start = 0
        for table in self._rows.tables():
            columns = self._changed(table, start)
            for number, name in enumerate(_NAMES):
                if name in columns:
                    values = pyarrow.array(columns[name], table.schema.field(name).type)
                    table = table.set_column(number, table.schema.field(name), values)
            start += len(table)
            table = table.select(_NAMES)
            for row in table.select(("path", "status", "detail", "label_path")).to_pylist():
                self.labels.add(next(found), row)
            yield table

    def _changed(self, table: pyarrow.Table, start: int) -> Mapping[str, list[Any]]:
        """The columns of some rows that depend on the archive as a whole.

        Args:
            table: rows as they were examined.
            start: number of the first one.
        """
        part = slice(start, start + len(table))
        names = ("status", "reason", "detail", "duplicate_of", "marks")
        columns = {name: table.column(name).to_pylist() for name in names}
        for number, refusal in self._copies.refusals(part.start, part.stop):
            columns["status"][number - start] = REFUSED
            for name in ("reason", "detail", "duplicate_of"):
                columns[name][number - start] = getattr(refusal, name)
        people = self._people
        flags = (people.has_stand_in, people.has_several_ids, people.has_near_copy)
        for mark, has_mark in zip((STAND_IN, SEVERAL_IDS, NEAR_COPY), flags):
            for number in np.flatnonzero(has_mark[part]).tolist():
                marks = columns["marks"][number]
                columns["marks"][number] = f"{marks},{mark}" if marks else mark
        columns["patient"] = [patient.decode() for patient in self._kept.patients[part].tolist()]
        columns["patient_from"] = [RULES[rule] for rule in self._kept.sources[part].tolist()]
        return columns


def _with_gone(
    finished: _Finished, rows: PlacedRows, gone: list[Row], scratch: Path
) -> Iterator[pyarrow.Table]:
    """The rows of an archive, and those of scans that are gone, in the order of their paths.

    Args:
        finished: rows of the scans.
        rows: the same scans, as they were examined.
        gone: rows of scans that are gone.
        scratch: folder for temporary files.
    """
    if not gone:
        yield from finished
        return
    paths = [table.column("path").combine_chunks() for table in rows.tables(("path",))]
    all_paths = pyarrow.chunked_array([*paths, [row.path for row in gone]], pyarrow.string())
    order = pc.sort_indices(all_paths).to_numpy()
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    table = rows_as_table(gone)
    together = PlacedRows(scratch / "together", table.schema)
    start = 0
    for part in finished:
        together.add(part, places[start : start + len(part)])
        start += len(part)
    together.add(table, places[start:])
    for part in together.tables():
        yield part.select(_NAMES)
    together.remove()
