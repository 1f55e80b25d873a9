"""Read the heads of DICOM files in worker processes: some files of neighbouring folders at a time.

A file is opened once: the slices of a CT stay in memory, and the stacks that lie in the unit as a
whole are examined from there. Where a stack turns out to have slices elsewhere, its row is of no
use, since its key is another one, and the stack is examined again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from tapct.data.index.head_table import without_identifiers
from tapct.data.index.journal import key_of
from tapct.data.index.scan_row import ExamineTask, ScanRules, examine
from tapct.data.index.scan_table import may_change, row_of_scan, scan_key
from tapct.data.readers import DICOM
from tapct.data.readers.dicom_head import Head
from tapct.data.search.discover import Looked, Source, StackFiles, look_into
from tapct.data.search.series import stacks_of
from tapct.data.workers.process_pool import Failure
from tapct.data.workers.time_limit import TimeLimit

MOST_FILES = 2048  # of one unit with files of one folder
FIRST_FILES = 128  # of the first unit with files of several folders; each next one may have twice
MOST_BYTES = 1 << 30  # of one unit with files of one folder
MOST_GATHERED_FILES = 1024  # of one unit with files of several folders
MOST_GATHERED_BYTES = 1 << 29
MOST_LATE_FOLDERS = 4  # in a row, after which the other files of a unit are not opened


@dataclass(frozen=True)
class FolderFiles:
    """Files of one folder, any of which may be DICOM.

    Args:
        folder: folder of the files.
        names: their names.
        keys: their keys in the journal.
        num_bytes: size of all files.
        stems: names, without suffix, of the scans of other formats in the folder.
        named: names of those whose series are indexed; None for all.
    """

    folder: Path
    names: tuple[str, ...]
    keys: tuple[bytes, ...]
    num_bytes: int
    stems: frozenset[str] = frozenset()
    named: frozenset[str] | None = None


@dataclass(frozen=True)
class HeadUnit:
    """Files that one worker reads at a time.

    Args:
        root: folder of the archive.
        folders: files by their folder.
        seconds: longest time to wait for one file.
        key: secret of the hashes that replace identifiers.
        rules: rules of the archive, to examine the stacks in this unit; None to read heads alone.
    """

    root: Path
    folders: tuple[FolderFiles, ...]
    seconds: float
    key: bytes
    rules: ScanRules | None = None

    @property
    def num_files(self) -> int:
        """Number of its files."""
        return sum(len(files.names) for files in self.folders)

    @property
    def num_bytes(self) -> int:
        """Size of its files."""
        return sum(files.num_bytes for files in self.folders)

    def single_files(self) -> list[HeadUnit]:
        """A unit for each of its files, whose head alone is read."""
        return [
            replace(self, folders=(replace(files, names=(name,), keys=(key,)),), rules=None)
            for files in self.folders
            for name, key in zip(files.names, files.keys)
        ]


@dataclass(frozen=True)
class ReadUnit:
    """What a unit holds.

    Args:
        unit: the unit.
        looked: what each file is, without identifiers, by folder; empty where the process was lost.
        scans: key and row of each stack that was examined.
        failure: why the process was lost; None where it was not.
    """

    unit: HeadUnit
    looked: Sequence[Sequence[Looked]]
    scans: Sequence[tuple[bytes, dict[str, Any]]] = ()
    failure: Failure | None = None


def read_unit(unit: HeadUnit) -> ReadUnit:
    """Read the heads of the files of a unit, and examine the stacks that lie in it."""
    limit = TimeLimit(unit.seconds)
    contents: dict[Path, bytes] = {}
    rules = unit.rules

    def keep(head: Head, file: BinaryIO) -> None:
        assert rules is not None
        if is_slice(head, derived=rules.accept.derived):
            file.seek(0)
            contents[head.path] = file.read()

    use = None if rules is None else keep
    found = list(_looked_into(unit, limit, use))
    limit.close()
    scans: list[tuple[bytes, dict[str, Any]]] = []
    if rules is not None and contents:
        scans = _examined(unit, rules, found, contents)
    plain = [[_without_identifiers(looked, unit) for looked in some] for some in found]
    return ReadUnit(unit, plain, scans)


def _looked_into(
    unit: HeadUnit, limit: TimeLimit, use: Callable[[Head, BinaryIO], None] | None
) -> Iterator[list[Looked]]:
    """What the files of a unit are, by folder; arguments as in `look_into`.

    A disk that does not answer is waited for in a few folders, and not in each of a thousand. So
    the time limit of the worker, by which a decoder that never returns is ended, can be short.
    """
    num_late = 0  # in a row
    for each in unit.folders:
        if num_late < MOST_LATE_FOLDERS:
            found = list(look_into(each.folder, each.names, limit, use))
        else:
            problem = "was not opened, since the files of the folders before it gave no answer"
            found = [Looked(name, late=problem, may_pass=True) for name in each.names]
        num_late = num_late + 1 if all(looked.late for looked in found) else 0
        yield found


def is_slice(head: Head, *, derived: bool) -> bool:
    """Whether a file can be a slice of a scan that is accepted."""
    return head.refusal is None and head.misplaced is None and (derived or not head.derived)


def _without_identifiers(looked: Looked, unit: HeadUnit) -> Looked:
    if looked.head is None:
        return looked
    return replace(looked, head=without_identifiers(looked.head, unit.root, unit.key))


def _examined(
    unit: HeadUnit,
    rules: ScanRules,
    found: Sequence[Sequence[Looked]],
    contents: Mapping[Path, bytes],
) -> list[tuple[bytes, dict[str, Any]]]:
    """Key and row of every whole stack of a unit.

    Args:
        unit: the unit.
        rules: what holds for all scans.
        found: what its files are, by folder.
        contents: bytes of its slices.
    """
    key_of_path: dict[Path, bytes] = {}
    indexed: set[Path] = set()
    for files in unit.folders:
        key_of_path |= {files.folder / n: key for n, key in zip(files.names, files.keys)}
        chosen = files.names if files.named is None else files.named
        indexed |= {files.folder / name for name in chosen}
    heads = [looked.head for some in found for looked in some if looked.head is not None]
    rows = []
    for stack in stacks_of([h for h in heads if h.path in contents], derived=rules.accept.derived):
        part = StackFiles.of(stack)
        if part.reason or indexed.isdisjoint(part.files):
            continue
        source = Source(
            *(part.files[0], DICOM.name, part.files, "", part.detail, part.mark),
            frames=part.frames,
            stamp=key_of(*(key_of_path[file] for file in part.files)),
            contents={file: contents[file] for file in part.files},
        )
        task = ExamineTask(source, rules, None)
        try:
            row = examine(task)
        except MemoryError:
            continue  # it is examined alone later, with more memory
        if not may_change(row.reason, row.detail):
            rows.append((scan_key(task), row_of_scan(row)))
    return rows


def lost_unit(unit: HeadUnit, failure: Failure) -> ReadUnit:
    """The result of a unit whose process was lost."""
    return ReadUnit(unit, (), failure=failure)
