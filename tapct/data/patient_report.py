"""Lines that `tapct index` prints about the patients of an archive."""

from __future__ import annotations

from collections.abc import Sequence

from tapct.data.manifest import ACCEPTED, Row
from tapct.data.patients import SEVERAL_IDS, STAND_IN

CHECK = "check, or give --patient-regex / --patient-column"


def lines_about_patients(rows: Sequence[Row]) -> list[str]:
    """How many patients were guessed, with an example, how many PatientIDs identify nobody, and how
    many scans of one study have several.

    Args:
        rows: all rows of a manifest.
    """
    accepted = [row for row in rows if row.status == ACCEPTED]
    stand_ins = sum(STAND_IN in row.marks.split(",") for row in accepted)
    lines = []
    if stand_ins:
        lines.append(
            f"{stand_ins} of {len(accepted)} scans have a PatientID that identifies nobody (a "
            "stand-in such as REMOVED, or the same in all studies); it is not used. If one ID "
            "for all studies is right, give --patient-from header"
        )
    several = sum(SEVERAL_IDS in row.marks.split(",") for row in accepted)
    if several:
        verb = "has" if several == 1 else "have"
        lines.append(
            f"{_counted(several, 'scan')} {verb} one StudyInstanceUID and several PatientIDs; they "
            "count as one patient. If the PatientIDs are right, give --patient-from header"
        )
    guessed = [row for row in accepted if row.patient_from == "guess"]
    if guessed:
        lines.append(_guess_line(guessed))
    return lines


def _guess_line(guessed: Sequence[Row]) -> str:
    """The line about scans whose patients were guessed."""
    first_of: dict[str, Row] = {}
    example = ""
    for row in guessed:
        first = first_of.setdefault(row.patient, row)
        if first is not row and not example:
            example = f", e.g. {first.path} and {row.path} as one"
    return (
        f"patients guessed from file names: {_counted(len(guessed), 'scan')} as "
        f"{_counted(len(first_of), 'patient')}{example}; {CHECK}"
    )


def _counted(num: int, noun: str) -> str:
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"
