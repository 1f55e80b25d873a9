"""Patients from a table: `--patient-column FILE.csv:COLUMN`."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tapct.base.exits import UserError
from tapct.base.files import expand_path
from tapct.data.readers import stem_of
from tapct.data.tables import read_table, scan_name

# columns that name the scan, in lower case; without one of them the first column does
_SCAN_COLUMNS = ("path", "file", "filename", "file_name", "scan", "image", "name", "id")


def patients_from_table(option: str, scans: Iterable[Path]) -> dict[str, str]:
    """Read a table and find the patient of each scan.

    A row names a scan by its path below the archive, with or without its suffix, or by a folder
    that contains it. A file name alone is enough where no other scan has it.

    Args:
        option: `FILE.csv:COLUMN`; values are separated by comma, semicolon or tab.
        scans: paths of the scans below the archive.
    Returns:
        Identifier by path of the scan below the archive, for scans in the table.
    Raises:
        UserError: the table cannot be read, has no such column, or names no scan.
    """
    file, _, column = option.rpartition(":")
    if not file or not column:
        raise UserError(f"--patient-column {option}: rule: FILE.csv:COLUMN")
    given = _read(expand_path(file), column)
    paths = [path.as_posix() for path in scans]
    names = Counter(name for path in paths for name in _file_names(Path(path)))
    found = {path: _patient_of(Path(path), given, names) for path in paths}
    found = {path: patient for path, patient in found.items() if patient}
    if not found:
        raise UserError(
            f"--patient-column {option}: none of the {len(given)} rows names one of the "
            f"{len(paths)} scans; name them by their path below the archive"
        )
    return found


def _read(file: Path, column: str) -> dict[str, str]:
    """Patient by name of the scan, as the table has it."""
    table = read_table(file, "--patient-column")
    columns = table.columns
    if column not in columns:
        near = difflib.get_close_matches(column, columns, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(columns) or 'no rows'}"
        raise UserError(f"--patient-column: {file} has no column '{column}'; {hint}")
    by_lower = {name.lower(): name for name in columns if name != column}
    if not by_lower:
        raise UserError(
            f"--patient-column: {file} has no column that names the scans beside '{column}'"
        )
    known = [by_lower[name] for name in _SCAN_COLUMNS if name in by_lower]
    scan_column = known[0] if known else next(iter(by_lower.values()))
    patients: dict[str, str] = {}
    for row in table.rows:
        scan, patient = scan_name(row[scan_column]), row[column]
        if scan and patient and patients.setdefault(scan, patient) != patient:
            raise UserError(f"--patient-column: {file} gives {scan} to two patients; keep one row")
    return patients


def _patient_of(path: Path, given: Mapping[str, str], names: Counter[str]) -> str:
    """The patient of one scan, or empty."""
    whole = [path.as_posix(), (path.parent / stem_of(path)).as_posix()]
    alone = [name for name in _file_names(path) if names[name] == 1]
    folders = [folder.as_posix() for folder in path.parents if folder != Path()]
    for name in (*whole, *alone, *folders):
        if name in given:
            return given[name]
    return ""


def _file_names(path: Path) -> set[str]:
    """File name of a scan, with and without its suffix."""
    return {path.name, stem_of(path)}
