"""Put DICOM files together from their heads in the journal, some series at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute as pc

from tapct.data.index import head_table
from tapct.data.index.journal import Journal, Keys, first_of_each, key_of
from tapct.data.index.placed_rows import PlacedRows, append_stream, read_streams
from tapct.data.index.source_table import PART_SCHEMA, part_of_row, row_of_part
from tapct.data.readers import DICOM
from tapct.data.readers.dicom_head import Head
from tapct.data.readers.dicom_kind import DICOMDIR as DIRECTORY_CLASS
from tapct.data.search.discover import (
    DICOMDIR,
    Source,
    StackFiles,
    object_source,
)
from tapct.data.search.series import stacks_of

_HEADS_AT_ONCE = 16_384  # that are objects, of several kB each
_ROWS_AT_ONCE = 50_000  # that are divided into groups


def grouped(
    root: Path, journal: Journal, current: bytes, scratch: Path, *, derived: bool
) -> Iterator[tuple[Source | None, str]]:
    """The DICOM series and objects of an archive, and the kind of each other file.

    Args:
        root: folder of the archive.
        journal: journal with the heads.
        current: keys of the files that are in the archive now, one after the other.
        scratch: folder for rows that wait.
        derived: as in `search`.
    """
    keys = Keys(current)
    parts = PlacedRows(scratch / "parts", PART_SCHEMA)
    num_groups = 1
    while num_groups * _HEADS_AT_ONCE < len(keys):
        num_groups *= 2
    for table in _tables_of_groups(journal, keys, num_groups, scratch):
        slices: list[Head] = []
        key_of_path: dict[Path, bytes] = {}
        for key, state, head in head_table.heads_in(table, root):
            key_of_path[head.path] = key
            special = object_source(head)
            if state == head_table.REFUSAL:
                assert head.refusal is not None
                source = Source(head.path, DICOM.name, (head.path,), *head.refusal)
                yield replace(source, stamp=key), ""
            elif head.sop_class == DIRECTORY_CLASS:
                yield None, DICOMDIR
            elif special is not None:
                yield replace(special, stamp=key), ""
            else:
                slices.append(head)
        for stack in stacks_of(slices, derived=derived):
            part = StackFiles.of(stack)
            stamp = key_of(*(key_of_path[file] for file in part.files))
            parts.append(row_of_part(replace(part, stamp=stamp)))
    yield from ((source, "") for source in _sources_of_parts(parts))
    parts.remove()


def _sources_of_parts(parts: PlacedRows) -> Iterator[Source]:
    """Sources of the stacks of slices, whose names depend on what else their folders hold."""
    stacks, whole = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for table in parts.tables(["reason", "folders"]):
        is_whole = pc.equal(table.column("reason"), b"")
        for chosen, column in ((stacks, table), (whole, table.filter(is_whole))):
            chosen.append(pc.list_flatten(column.column("folders")).to_numpy())
    all_stacks, all_whole = np.sort(np.concatenate(stacks)), np.sort(np.concatenate(whole))
    for row in parts.rows():
        first = np.uint64(row["folders"][0])
        yield part_of_row(row).source(_count(all_stacks, first), _count(all_whole, first))


def _count(ascending: np.ndarray, value: np.uint64) -> int:
    """How often a sorted array has a value."""
    first, end = (
        np.searchsorted(ascending, value, "left"),
        np.searchsorted(ascending, value, "right"),
    )
    return int(end - first)


def _tables_of_groups(
    journal: Journal, keys: Keys, num_groups: int, scratch: Path
) -> Iterator[pyarrow.Table]:
    """The heads with some keys, each once, in groups of whole series.

    Several groups are written to a temporary folder first, in one pass over the journal, so that
    memory holds one group at a time.
    """
    if num_groups == 1:
        table = journal.read(head_table.HEADS)
        yield table.take(first_of_each(table, keys))
        return
    with tempfile.TemporaryDirectory(prefix="groups", dir=scratch) as place:
        folder = Path(place)
        waiting: list[pyarrow.Table] = []
        for part in journal.parts(head_table.HEADS):
            table = journal.read_part(part, head_table.HEADS)
            waiting.append(table.take(first_of_each(table, keys)))
            if sum(map(len, waiting)) > _ROWS_AT_ONCE:
                _write_groups(waiting, num_groups, folder)
                waiting = []
        _write_groups(waiting, num_groups, folder)
        for group in range(num_groups):
            file = folder / f"{group}.arrows"
            if file.exists():
                table = read_streams(file, journal.schema(head_table.HEADS))
                yield table.take(first_of_each(table, keys))


def _write_groups(tables: Sequence[pyarrow.Table], num_groups: int, folder: Path) -> None:
    """Write heads by groups of series.

    Args:
        tables: heads.
        num_groups: number of groups, a power of two.
        folder: folder of the files GROUP.arrows, to which they are appended.
    """
    if not tables:
        return
    table = pyarrow.concat_tables(tables)
    groups = table.column("series").to_numpy() & np.uint64(num_groups - 1)
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(num_groups + 1, dtype=np.uint64))
    table = table.take(order)
    for group, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist())):
        if stop > start:
            append_stream(folder / f"{group}.arrows", table.slice(start, stop - start))
