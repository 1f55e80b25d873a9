"""Rows of an index on disk while it runs: they are written in any order and read in the order of
their places, some at a time, so that memory does not grow with the number of scans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc

from tapct.base.exits import UserError
from tapct.base.files import first_cause

PLACE = "place"  # column with the place of a row
ROWS_AT_ONCE = 1024  # that are read at once; a DICOM series may have a list of 1000 files
_MOST_BYTES = 1 << 23  # of rows that wait in memory


class PlacedRows:
    """Rows with a place each, from 0. Few rows stay in memory, and no file is made.

    Args:
        folder: folder for the files, made with the first one; others must not write in it.
        schema: columns beside the place.
    """

    def __init__(self, folder: Path, schema: pyarrow.Schema) -> None:
        self.folder = folder
        self.schema = schema.append(pyarrow.field(PLACE, pyarrow.int64()))
        self._num_places = 0
        self._rows: list[Mapping[str, Any]] = []
        self._tables: list[pyarrow.Table] = []

    def __len__(self) -> int:
        """Number of places: the largest one and 1."""
        return self._num_places

    def append(self, row: Mapping[str, Any], place: int | None = None) -> None:
        """Add a row.

        Args:
            row: value of each column.
            place: its place; None for the one after the largest.
        """
        place = self._num_places if place is None else place
        self._rows.append({**row, PLACE: place})
        self._num_places = max(self._num_places, place + 1)
        if len(self._rows) >= ROWS_AT_ONCE:
            self._pack()

    def add(self, table: pyarrow.Table, places: np.ndarray | Sequence[int]) -> None:
        """Add rows with their places."""
        if len(table):
            column = pyarrow.array(places, pyarrow.int64())
            self._num_places = max(self._num_places, int(np.max(places)) + 1)
            self._keep(table.append_column(PLACE, column))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pyarrow.Table]:
        """The rows in the order of their places, at most `ROWS_AT_ONCE` at a time.

        Args:
            columns: names of the columns beside the place; None for all.
        """
        self._pack()
        is_on_disk = self.folder.is_dir()
        if is_on_disk:
            self._spill()
        chosen = self.schema.names if columns is None else [*columns, PLACE]
        waiting = pyarrow.concat_tables(self._tables) if self._tables else None
        for start in range(0, self._num_places, ROWS_AT_ONCE):
            if is_on_disk:
                table = self._read(start // ROWS_AT_ONCE, chosen)
            else:
                assert waiting is not None
                places = waiting.column(PLACE).to_numpy()
                inside = (places >= start) & (places < start + ROWS_AT_ONCE)
                table = waiting.select(chosen).take(np.flatnonzero(inside))
            if len(table):
                yield table.take(np.argsort(table.column(PLACE).to_numpy(), kind="stable"))

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows in the order of their places; arguments as in `tables`."""
        for table in self.tables(columns):
            yield from table.to_pylist()

    def remove(self) -> None:
        """Remove all rows and their files."""
        self._rows, self._tables, self._num_places = [], [], 0
        if self.folder.is_dir():
            for file in self.folder.iterdir():
                file.unlink()
            self.folder.rmdir()

    def _pack(self) -> None:
        """Make a table of the rows that were appended."""
        rows, self._rows = self._rows, []
        if rows:
            columns = {name: [row[name] for row in rows] for name in self.schema.names}
            self._keep(pyarrow.table(columns, schema=self.schema))

    def _keep(self, table: pyarrow.Table) -> None:
        self._tables.append(table)
        if sum(each.nbytes for each in self._tables) > _MOST_BYTES:
            self._spill()

    def _spill(self) -> None:
        """Write the rows that wait, some neighbouring places to one file."""
        tables, self._tables = self._tables, []
        if not tables:
            return
        self.folder.mkdir(exist_ok=True)
        table = pyarrow.concat_tables(tables)
        groups = table.column(PLACE).to_numpy() // ROWS_AT_ONCE
        order = np.argsort(groups, kind="stable")
        names, starts = np.unique(groups[order], return_index=True)
        table = table.take(order)
        for group, start, stop in zip(names.tolist(), starts, [*starts[1:], len(table)]):
            append_stream(self._file(group), table.slice(start, stop - start))

    def _file(self, group: int) -> Path:
        return self.folder / f"{group}.arrows"

    def _read(self, group: int, columns: Sequence[str]) -> pyarrow.Table:
        file = self._file(group)
        if not file.exists():
            return self.schema.empty_table().select(columns)
        return read_streams(file, self.schema, columns)


def append_stream(file: Path, table: pyarrow.Table) -> None:
    """Append rows to a file, which holds streams of Arrow one after the other.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    try:
        with file.open("ab") as content, pyarrow.ipc.new_stream(content, table.schema) as writer:
            writer.write_table(table)
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {first_cause(error)}; nothing was changed, and what was read "
            "before is kept"
        ) from error


def read_streams(
    file: Path, schema: pyarrow.Schema, columns: Sequence[str] | None = None
) -> pyarrow.Table:
    """The rows of a file that `append_stream` wrote.

    Args:
        file: path of the file.
        schema: columns of the file.
        columns: names of the columns that are wanted; None for all.
    """
    fields = [schema.get_field_index(name) for name in columns or schema.names]
    options = pyarrow.ipc.IpcReadOptions(included_fields=sorted(fields))
    tables = []
    size = file.stat().st_size
    with file.open("rb") as content:
        while content.tell() < size:
            with pyarrow.ipc.open_stream(content, options=options) as reader:
                tables.append(reader.read_all())
    return pyarrow.concat_tables(tables).select(columns or schema.names)
