"""Lines that `tapct index` prints about the patients of an archive."""

from __future__ import annotations

from collections.abc import Sequence

from tapct.base.counted import counted
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
        of_all = f"{stand_ins} of {counted(len(accepted), 'scan')}"
        lines.append(
            f"{of_all} {'has' if stand_ins == 1 else 'have'} a PatientID that identifies nobody (a "
            "stand-in such as REMOVED, or the same in all studies); it is not used. If one ID "
            "for all studies is right, give --patient-from header"
        )
    several = sum(SEVERAL_IDS in row.marks.split(",") for row in accepted)
    if several:
        verb = "has" if several == 1 else "have"
        lines.append(
            f"{counted(several, 'scan')} {verb} one StudyInstanceUID and several PatientIDs; they "
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
        f"patients guessed from file names: {counted(len(guessed), 'scan')} as "
        f"{counted(len(first_of), 'patient')}{example}; {CHECK}"
    )
