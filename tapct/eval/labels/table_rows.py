"""Finds the scans that the rows of a table are about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tapct.base.exits import UserError
from tapct.data.tables import ScanNames, Table
from tapct.eval.scans.usable import ScanRow

# columns that name the scan, in the order in which they are looked for
KEY_COLUMNS = ("path", "case_id", "id")
MOST_NAMES_IN_LINE = 5


@dataclass
class MatchedRows:
    """The rows of a table with their scans.

    Args:
        table: table whose rows they are.
        key: column that names the scans.
        found: pairs of scan ID and row.
        unmatched: names of which no scan has one.
        ambiguous: names that several scans have.
    """

    table: Table
    key: str
    found: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """What a person must know about rows that are not used."""
        for what, names in (
            ("unmatched rows", self.unmatched),
            ("rows that several scans match", self.ambiguous),
        ):
            if names:
                yield f"{what}: {len(names)} ({_some(names)})"


def match_rows(table: Table, rows: Sequence[ScanRow], option: str) -> MatchedRows:
    """Find the scan of each row of a table.

    A name is looked for among the scan IDs of the manifest, then as `data.tables.ScanNames` does.

    Args:
        table: table with one of KEY_COLUMNS, in any letter case.
        rows: accepted scans.
        option: setting that names the table, for error lines.
    Raises:
        UserError: no such column, the manifest with the paths is gone, or no row names a scan.
    """
    by_lower = {name.lower(): name for name in reversed(table.columns)}
    keys = [by_lower[name] for name in KEY_COLUMNS if name in by_lower]
    if not keys:
        columns = ", ".join(table.columns) or "none, since the file is empty"
        raise UserError(
            f"{option}: {table.file} has no column that names the scans; rule: one of "
            f"{', '.join(KEY_COLUMNS)}; its columns are {columns}"
        )
    matched = MatchedRows(table, keys[0])
    id_of_path = {row.path: row.id for row in rows if row.path}
    ids, names = {row.id for row in rows}, ScanNames(id_of_path)
    for line, row in zip(table.numbers, table.rows):
        name = row[matched.key]
        if not name:
            raise UserError(
                f"{option}: line {line} of {table.file} has no {matched.key}, so it names no scan; "
                "complete or remove the line"
            )
        paths = names.paths_of(name)
        if name in ids:
            matched.found.append((name, row))
        elif len(paths) == 1:
            matched.found.extend((id_of_path[path], row) for path in paths)
        else:
            (matched.ambiguous if paths else matched.unmatched).append(name)
    if not matched.found:
        raise UserError(_nothing_found(matched, rows, bool(id_of_path), option))
    return matched


def _nothing_found(
    matched: MatchedRows, rows: Sequence[ScanRow], has_paths: bool, option: str
) -> str:
    """The error line for a table of which no row names a scan."""
    if not has_paths:
        return (
            f"{option} needs the paths of the scans, which only the manifest holds; the manifest "
            "that was packed is gone or has changed: put it back, or run `tapct pack` with the new "
            "one"
        )
    table = matched.table
    lines = "; ".join(matched.lines()) or "it has no rows"
    return (
        f"{option}: none of the {len(table.rows)} rows of {table.file} names one of the "
        f"{len(rows)} scans ({lines}); a scan is named by its path below the archive, e.g. "
        f"{rows[0].path}, or by its file name without the suffix"
    )


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many there are beside them."""
    more = len(names) - MOST_NAMES_IN_LINE
    return ", ".join(names[:MOST_NAMES_IN_LINE]) + (f" and {more} more" if more > 0 else "")
