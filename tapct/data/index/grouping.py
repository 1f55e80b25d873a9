"""Put DICOM files together from their heads in the journal, some series at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.compute

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

_HEADS_AT_ONCE = 250_000


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
    for group in range(num_groups):
        slices: list[Head] = []
        key_of_path: dict[Path, bytes] = {}
        for key, state, head in _heads_of(root, journal, keys, group, num_groups):
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


def _heads_of(
    root: Path, journal: Journal, keys: Keys, group: int, num_groups: int
) -> list[tuple[bytes, int, Head]]:
    """The heads of one group of series, those with some keys."""
    wanted = None
    if num_groups > 1:
        series = pyarrow.compute.field("series")
        last_bits = pyarrow.compute.bit_wise_and(series, pyarrow.scalar(num_groups - 1, "uint64"))
        wanted = last_bits == pyarrow.scalar(group, "uint64")
    table = journal.read(head_table.HEADS, wanted=wanted)
    table = table.take(first_of_each(table, keys))
    return list(head_table.heads_in(table, root))
