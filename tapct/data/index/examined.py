"""The rows of scans that were examined one by one, and what only the archive as a whole decides:
whose scans they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from tapct.data.manifest import Row
from tapct.data.patients.identity import (
    NEAR_COPY,
    SEVERAL_IDS,
    STAND_IN,
    Known,
    PatientRules,
    patients_of,
)
from tapct.data.readers import DICOM
from tapct.data.search.discover import Source
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


def with_patients(
    rows: Sequence[Row],
    examined: Sequence[Examined],
    scans: Sequence[Source],
    rules: PatientRules,
) -> tuple[tuple[Row, ...], list[str]]:
    """The rows of an archive with their patients, and the hash that each scan's own rule gave.

    Args:
        rows: rows as they will be written, but for the patient.
        examined: the same scans, as they were examined.
        scans: the same scans as sources.
        rules: how patients are identified.
    """
    known = [
        Known(scan.path, scan.kind == DICOM.name, row.facts, row.mirror_digest, row.sketch)
        for row, scan in zip(examined, scans)
    ]
    patients = patients_of(known, rules)
    result = []
    for row, patient in zip(rows, patients):
        columns = {field.name: getattr(row, field.name) for field in fields(Row)}
        columns |= {"patient": patient.hash, "patient_from": patient.source}
        marks = [row.marks] if row.marks else []
        marks += [STAND_IN] * patient.has_stand_in + [SEVERAL_IDS] * patient.has_several_ids
        marks += [NEAR_COPY] * patient.has_near_copy
        columns["marks"] = ",".join(marks)
        result.append(Row(**columns))
    return tuple(result), [patient.given for patient in patients]
