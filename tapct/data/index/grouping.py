"""Put DICOM files together from their heads in the journal, some series at a time."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc

from tapct.data.index import head_table
from tapct.data.index.journal import Journal, Keys, first_of_each, key_of
from tapct.data.readers import DICOM
from tapct.data.readers.dicom_head import Head
from tapct.data.readers.dicom_kind import DICOMDIR as DIRECTORY_CLASS
from tapct.data.search.discover import (
    DICOMDIR,
    Source,
    StackFiles,
    object_source,
    sources_of_parts,
)
from tapct.data.search.file_list import compact
from tapct.data.search.series import stacks_of

_HEADS_AT_ONCE = 16_384  # that are objects, of several kB each
_ROWS_AT_ONCE = 50_000  # that are divided into groups


def grouped(
    root: Path, journal: Journal, current: bytes, *, derived: bool
) -> tuple[list[Source], Counter[str]]:
    """The DICOM series and objects of an archive, and the other files by kind.

    Args:
        root: folder of the archive.
        journal: journal with the heads.
        current: keys of the files that are in the archive now, one after the other.
        derived: as in `search`.
    """
    keys = Keys(current)
    parts: list[StackFiles] = []
    sources: list[Source] = []
    passed_over: Counter[str] = Counter()
    num_groups = 1
    while num_groups * _HEADS_AT_ONCE < len(keys):
        num_groups *= 2
    for table in _tables_of_groups(journal, keys, num_groups):
        slices: list[Head] = []
        key_of_path: dict[Path, bytes] = {}
        for key, state, head in head_table.heads_in(table, root):
            key_of_path[head.path] = key
            special = object_source(head)
            if state == head_table.REFUSAL:
                assert head.refusal is not None
                source = Source(head.path, DICOM.name, (head.path,), *head.refusal)
                sources.append(replace(source, stamp=key))
            elif head.sop_class == DIRECTORY_CLASS:
                passed_over[DICOMDIR] += 1
            elif special is not None:
                sources.append(replace(special, stamp=key))
            else:
                slices.append(head)
        for stack in stacks_of(slices, derived=derived):
            part = StackFiles.of(stack)
            stamp = key_of(*(key_of_path[file] for file in part.files))
            parts.append(replace(part, files=compact(part.files), stamp=stamp))
    return sources + sources_of_parts(parts), passed_over


def _tables_of_groups(journal: Journal, keys: Keys, num_groups: int) -> Iterator[pyarrow.Table]:
    """The heads with some keys, each once, in groups of whole series.

    Several groups are written to a temporary folder first, in one pass over the journal, so that
    memory holds one group at a time.
    """
    if num_groups == 1:
        table = journal.read(head_table.HEADS)
        yield table.take(first_of_each(table, keys))
        return
    with tempfile.TemporaryDirectory(prefix="groups", dir=journal.folder) as place:
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
                table = _read_group(file)
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
            rows = table.slice(start, stop - start)
            with (
                (folder / f"{group}.arrows").open("ab") as file,
                pyarrow.ipc.new_stream(file, rows.schema) as writer,
            ):
                writer.write_table(rows)


def _read_group(file: Path) -> pyarrow.Table:
    """The rows of one group: streams of Arrow, one after the other."""
    tables = []
    size = file.stat().st_size
    with file.open("rb") as content:
        while content.tell() < size:
            with pyarrow.ipc.open_stream(content) as reader:
                tables.append(reader.read_all())
    return pyarrow.concat_tables(tables)
