"""Lines that `tapct index` prints about the patients of an archive."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.compute as pc

from tapct.base.counted import counted
from tapct.data.manifest import ACCEPTED, RowTable
from tapct.data.patients.columns import HASH, hashes
from tapct.data.patients.identity import NEAR_COPY, SEVERAL_IDS, STAND_IN
from tapct.data.patients.memory import PatientChanges

CHECK = "check, or give --patient-regex / --patient-column"


def lines_about_patients(rows: RowTable) -> list[str]:
    """How many patients were guessed, with an example, how many PatientIDs identify nobody, and how
    many scans have slices of another one or are of a study with several PatientIDs.

    Args:
        rows: all rows of a manifest.
    """
    num_accepted = 0
    marked: Counter[str] = Counter()
    for table in rows.tables(("status", "marks")):
        accepted = table.filter(pc.equal(table.column("status"), ACCEPTED))
        num_accepted += len(accepted)
        for marks in filter(None, accepted.column("marks").to_pylist()):
            marked.update(set(marks.split(",")))
    lines = []
    stand_ins = marked[STAND_IN]
    if stand_ins:
        of_all = f"{stand_ins} of {counted(num_accepted, 'scan')}"
        lines.append(
            f"{of_all} {'has' if stand_ins == 1 else 'have'} a PatientID that identifies nobody (a "
            "stand-in such as REMOVED, or the same in all studies); it is not used. If one ID "
            "for all studies is right, give --patient-from header"
        )
    several = marked[SEVERAL_IDS]
    if several:
        verb = "has" if several == 1 else "have"
        lines.append(
            f"{counted(several, 'scan')} {verb} one StudyInstanceUID and several PatientIDs; they "
            "count as one patient. If the PatientIDs are right, give --patient-from header"
        )
    near = marked[NEAR_COPY]
    if near:
        verb = "has" if near == 1 else "have"
        lines.append(
            f"{counted(near, 'scan')} {verb} slices of another scan, as a cropped copy has; such "
            "scans count as one patient unless --patient-column or --patient-from separates them"
        )
    return lines + _lines_about_guesses(rows)


def _lines_about_guesses(rows: RowTable) -> list[str]:
    """The line about accepted scans whose patients were guessed; none without them."""
    places, patients = [np.empty(0, np.int64)], [np.empty(0, HASH)]
    start = 0
    for table in rows.tables(("status", "patient_from", "patient")):
        is_accepted = pc.equal(table.column("status"), ACCEPTED)
        is_guess = pc.and_(is_accepted, pc.equal(table.column("patient_from"), "guess"))
        places.append(np.flatnonzero(is_guess.to_numpy()) + start)
        patients.append(hashes(table.filter(is_guess).column("patient").to_pylist()))
        start += len(table)
    place, patient = np.concatenate(places), np.concatenate(patients)
    if not len(place):
        return []
    _, first, of_patient = np.unique(patient, return_index=True, return_inverse=True)
    is_repeated = np.ones(len(place), bool)
    is_repeated[first] = False
    example = ""
    if is_repeated.any():
        second = int(np.argmax(is_repeated))
        pair = (int(place[first[of_patient[second]]]), int(place[second]))
        one, other = (_path_at(rows, each) for each in pair)
        example = f", e.g. {one} and {other} as one"
    return [
        f"patients guessed from file names: {counted(len(place), 'scan')} as "
        f"{counted(len(first), 'patient')}{example}; {CHECK}"
    ]


def _path_at(rows: RowTable, number: int) -> str:
    """The path of one row."""
    for table in rows.tables(("path",)):
        if number < len(table):
            return str(table.column("path")[number].as_py())
        number -= len(table)
    raise IndexError(number)


def lines_about_changes(changes: PatientChanges | None) -> list[str]:
    """What became of the patients of an older manifest, one line per kind of change.

    Args:
        changes: what changed; None where there was no older manifest.
    """
    if changes is None:
        return []
    if changes.problem:
        return [
            f"the patients of the older manifest cannot be kept: {changes.problem}. Patients may "
            "have other hashes now, so scans that a run was trained on can be on the test side; "
            "`tapct eval` counts the test scans whose voxels were trained on"
        ]
    lines = []
    if changes.num_scans:
        lines.append(_line_of_changed(changes))
    if changes.num_kept:
        has = "has" if changes.num_kept == 1 else "have"
        lines.append(
            f"{counted(changes.num_kept, 'scan')} {has} the patient of the older manifest "
            "(patient_from: kept), where the rules give another hash; --fresh forgets the older "
            "patients"
        )
    if changes.num_undivided:
        is_one = "patient" if changes.num_undivided == 1 else "patients"
        lines.append(
            f"{changes.num_undivided} {is_one} of the older manifest would be divided by the rules "
            "and stay undivided, since a run may have been trained on some of the scans; if there "
            "is no such run, give --fresh"
        )
    return lines


def _line_of_changed(changes: PatientChanges) -> str:
    """The line about scans that have another patient than in the older manifest."""
    line = (
        f"{counted(changes.num_scans, 'scan')} of {counted(changes.num_patients, 'patient')} "
        "changed patient since the older manifest: "
    )
    if changes.forgotten:
        return (
            f"{line}--fresh was given; trained runs: scans that they were trained on can be on the "
            "test side now; `tapct eval` counts the ones with the same voxels"
        )
    return (
        f"{line}they turned out to be of the same person as another patient. For runs with "
        f"data.split_seed={changes.split_seed} (--split-seed), no training scan became a test "
        "scan; a held-out scan may be a training scan now"
    )
