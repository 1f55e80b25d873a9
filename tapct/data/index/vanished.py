"""Scans of an archive that an earlier index found and this one did not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.compute as pc

from tapct.data.manifest import REFUSED, Manifest, Row, RowTable
from tapct.data.patients.columns import is_in, number_of

VANISHED = "vanished"


def vanished(
    ids: np.ndarray, tables: Iterable[pyarrow.Table], older: Manifest, patients: Mapping[str, str]
) -> list[Row]:
    """A refused row for every scan of an older manifest that is gone; the row stays until the scan
    is there again.

    Args:
        ids: `columns.number_of` the ids of the scans that are here.
        tables: columns path and file_paths of these scans, some at a time.
        older: manifest of the same archive that is replaced.
        patients: patients of the scans that are gone, by their ids.
    """
    missing = list(_missing(ids, older))
    if not missing:
        return []
    # a series whose slices lie in other folders too has another path, and is not gone
    files = pyarrow.array(sorted({file for row in missing for file in files_of(row)}))
    found: set[str] = set()
    for table in tables:
        is_one_file = pc.equal(pc.list_value_length(table.column("file_paths")), 0)
        of_series = pc.list_flatten(table.column("file_paths"))
        for column in (table.column("path").filter(is_one_file), of_series):
            found.update(column.filter(pc.is_in(column, files)).to_pylist())
    return [
        _vanished(row, patients.get(row.id, row.patient))
        for row in missing
        if not found.intersection(files_of(row))
    ]


def _missing(ids: np.ndarray, older: Manifest) -> Iterator[Row]:
    """The rows of an older manifest whose scans are not here."""
    here = np.sort(ids)
    for table in older.row_table().tables():
        numbers = np.array([number_of(each) for each in table.column("id").to_pylist()], np.uint64)
        is_missing = ~is_in(numbers, here)
        if is_missing.any():
            yield from RowTable(table.filter(is_missing))


def files_of(row: Row) -> tuple[str, ...]:
    """Paths of the files of a scan below the root."""
    return row.file_paths or (row.path,)


def _vanished(row: Row, patient: str) -> Row:
    """The row of a scan that is gone, with what was known of it."""
    return replace(
        row,
        status=REFUSED,
        reason=VANISHED,
        detail="an earlier index of this archive found it: its files are gone, or lie in a folder "
        "that was not given now",
        patient=patient,
        label_path="",
        label_digest="",
        merged_labels=(),
        duplicate_of="",
    )
