"""List the files of an archive, and read the heads of those that may be DICOM: once, in worker
processes, while the folders are being listed.

A file whose size, time of change and inode are those of the journal is not opened. What remains in
memory of a file is its key of 16 bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tapct.base.marks import file_name
from tapct.data.index import head_table
from tapct.data.index.head_units import (
    FIRST_FILES,
    MOST_BYTES,
    MOST_FILES,
    MOST_GATHERED_BYTES,
    MOST_GATHERED_FILES,
    MOST_LATE_FOLDERS,
    FolderFiles,
    HeadUnit,
    ReadUnit,
    lost_unit,
    read_unit,
)
from tapct.data.index.inputs import IndexInputs
from tapct.data.index.journal import Journal, Keys, key_of, keys_in
from tapct.data.index.placed_rows import PlacedRows
from tapct.data.index.scan_row import ScanRules
from tapct.data.index.scan_table import SCANS
from tapct.data.index.share import WHOLE, Share
from tapct.data.index.source_table import SOURCE_SCHEMA, row_of_source
from tapct.data.patients.key import KEY_FILE
from tapct.data.readers import DICOM, stem_of
from tapct.data.search import folder_entries
from tapct.data.search import passed_over as passed
from tapct.data.search.discover import (
    LATE,
    UNREADABLE,
    Looked,
    SearchState,
    Source,
    by_format,
    folders_below,
    late_source,
)
from tapct.data.search.file_count import FileCount
from tapct.data.search.folder_entries import Entries, Stamp
from tapct.data.search.seen_folders import SeenFolders
from tapct.data.workers.process_pool import ScanLimits, map_unordered
from tapct.data.workers.time_limit import LEAST_SECONDS, NoAnswer, TimeLimit

# formats whose voxels may lie in any other file of the folder
_DETACHED = (".nhdr", ".mhd", ".hdr")
_LATE_CALLS = 4.0  # the limits of late files of one folder, which fall, sum up to less
_LATE_FILES = 3  # of each further folder, after which its others are not opened


@dataclass
class Listed:
    """What lies in an archive.

    Args:
        sources: rows of scans and label maps of single files, of folders that cannot be listed, and
            of files that cannot be read, see `source_table`.
        passed_over: number of other files by kind.
        current: keys of the DICOM files, one after the other; the journal has their heads.
        others: keys of the other files that were opened.
        num_files: number of files.
        is_whole: whether the heads of all DICOM files are in the journal; False where other
            processes have not read their shares yet.
    """

    sources: PlacedRows
    passed_over: Counter[str] = field(default_factory=Counter)
    current: bytes = b""
    others: bytes = b""
    num_files: int = 0
    is_whole: bool = True


def list_files(
    inputs: IndexInputs,
    journal: Journal,
    rules: ScanRules,
    scratch: Path,
    *,
    check: Callable[[], None],
    workers: int,
    limits: ScanLimits,
    modules: Sequence[str],
    share: Share = WHOLE,
    listed: Callable[[int, int, bool], None] = lambda done, total, is_all: None,
) -> Listed:
    """List all files, and read the heads that the journal does not have.

    Args:
        inputs: what is indexed.
        journal: journal of the index, which gets the heads.
        rules: what holds for all scans; scans are examined where their files are in memory.
        scratch: folder for the rows of sources.
        check: function that is called before the first file is read; it may raise.
        workers: number of processes; 0 reads in this one.
        limits: time and memory of a file in a worker process.
        modules: modules that a worker process needs.
        share: files whose heads this process reads.
        listed: function that is called with the number of files that are done, the number of files
            that were found so far, and whether these are all.
    """
    sources = PlacedRows(scratch / "listed", SOURCE_SCHEMA)
    walk = _Walk(inputs, journal, rules, sources, limits.seconds, share, listed)
    # a file that does not answer is waited for in the worker; its process may take longer
    of_unit = replace(limits, seconds=_LATE_CALLS * limits.seconds)
    of_folder = _LATE_FILES * min(limits.seconds, LEAST_SECONDS) * limits.mb_per_second * 1e6

    def bytes_of(unit: HeadUnit) -> int:
        """Size of a unit with that of the late files of some folders, for the time limit. Where
        more files are late, the worker is ended, and each file is read alone.
        """
        num_late = min(len(unit.folders) - 1, MOST_LATE_FOLDERS)
        return unit.num_bytes + round(of_folder * num_late)

    def read(units: Iterator[HeadUnit]) -> None:
        results = map_unordered(
            *(read_unit, units, workers, lost_unit),
            num_bytes=bytes_of,
            limits=of_unit,
            modules=modules,
        )
        with contextlib.closing(results):  # ends the workers at an error or Ctrl-C
            for _, result in results:
                walk.take(result)

    try:
        units = walk.units()
        first = next(units, None)  # lists the first folders, so that something can be reported
        check()
        if first is not None:
            read(itertools.chain([first], units))
        lost, walk.lost = walk.lost, []
        if lost:
            alone = itertools.chain.from_iterable(unit.single_files() for unit in lost)
            read(iter(alone))
    finally:
        journal.flush()
        walk.found.limit.close()
        walk.count.close()
    return walk.result()


@dataclass(frozen=True)
class _Chunk:
    """Files of one folder, any of which may be DICOM.

    Args:
        folder: path of the folder.
        number: number of the chunk in its folder.
        names, keys, sizes: names of the files, their keys in the journal, and their bytes.
        stems, named: as in `FolderFiles`.
    """

    folder: Path
    number: int
    names: tuple[str, ...]
    keys: tuple[bytes, ...]
    sizes: tuple[int, ...]
    stems: frozenset[str]
    named: frozenset[str] | None


@dataclass
class _Gathered:
    """Chunks that follow each other and become one unit, so that a series in several folders is
    read at once. They do not depend on the journal, so that all processes divide an archive alike.

    Args:
        number: number of the unit. The first units are small, so that all workers have work.
    """

    number: int = 0
    chunks: list[_Chunk] = field(default_factory=list)
    num_files: int = 0
    num_bytes: int = 0

    def add(self, chunk: _Chunk) -> None:
        """Add a chunk."""
        self.chunks.append(chunk)
        self.num_files += len(chunk.names)
        self.num_bytes += sum(chunk.sizes)

    def ends_before(self, chunk: _Chunk) -> bool:
        """Whether a chunk belongs to the next unit: this one is full, or it is half full and the
        folders of another parent begin.
        """
        if not self.chunks:
            return False
        files = self.num_files / min(MOST_GATHERED_FILES, FIRST_FILES << self.number)
        size = self.num_bytes / MOST_GATHERED_BYTES
        is_elsewhere = chunk.folder.parent != self.chunks[-1].folder.parent
        if is_elsewhere and max(files, size) >= 0.5:
            return True
        grown = files * (1 + len(chunk.names) / max(self.num_files, 1))
        return max(grown, size + sum(chunk.sizes) / MOST_GATHERED_BYTES) > 1


class _Walk:
    """The listing while it runs; arguments as in `list_files`."""

    def __init__(
        self,
        inputs: IndexInputs,
        journal: Journal,
        rules: ScanRules,
        sources: PlacedRows,
        seconds: float,
        share: Share,
        listed: Callable[[int, int, bool], None],
    ) -> None:
        self.inputs, self.journal, self.rules, self.share = inputs, journal, rules, share
        self.sources = sources
        self.seconds = seconds
        self.listed = listed
        self.count = FileCount(inputs.folders, sum(map(len, inputs.files.values())))
        self.found = SearchState(limit=TimeLimit(seconds))
        self.lost: list[HeadUnit] = []
        self.num_files = self.num_done = 0
        self.is_whole = True
        self._current, self._others = bytearray(), bytearray()
        status = os.stat(journal.folder.parent)
        self._own_folder = (status.st_dev, status.st_ino)
        known = journal.read(head_table.HEADS, ["key", "state"])
        self._known = Keys(keys_in(known))
        self._states = known.column("state").to_numpy()

    def show(self) -> None:
        """Report how far the listing is."""
        total = max(self.num_files, self.count.num_files)
        # beside a named slice, the whole folder is listed, and the count does not know it
        is_all = self.count.is_complete and self.num_files <= self.count.num_files
        self.listed(self.num_done, total, is_all)

    def result(self) -> Listed:
        """What was found."""
        self._write_sources()
        counts = Counter(+self.found.passed_over)
        return Listed(
            *(self.sources, counts, bytes(self._current), bytes(self._others)),
            num_files=self.num_files,
            is_whole=self.is_whole,
        )

    def units(self) -> Iterator[HeadUnit]:
        """List the folders; the files whose heads must be read."""
        gathered = _Gathered()
        for folder, entries, whole in self._folders():
            for chunk in self._chunks_of(folder, entries, whole):
                if gathered.ends_before(chunk):
                    yield from self._unit_of(gathered)
                    gathered = _Gathered(gathered.number + 1)
                gathered.add(chunk)
            self._write_sources()
            self.show()
        yield from self._unit_of(gathered)

    def _write_sources(self) -> None:
        """Write the sources that were found since the last call to disk."""
        for source in self.found.sources:
            self.sources.append(row_of_source(source))
        self.found.sources.clear()

    def _unit_of(self, gathered: _Gathered) -> Iterator[HeadUnit]:
        """The unit of some chunks, without the files that the journal has; none where it has all,
        or where another process reads them.
        """
        if not gathered.chunks:
            return
        folders = tuple(filter(None, map(self._unknown, gathered.chunks)))
        if not folders:
            return
        first = gathered.chunks[0]
        if not self.share.has(self._place(first.folder) + b"\0%d" % first.number):
            self.is_whole = False
            self.num_done += sum(len(files.names) for files in folders)
            return
        yield HeadUnit(self.inputs.root, folders, self.seconds, self.rules.key, self.rules)

    def _place(self, folder: Path) -> bytes:
        """Path of a folder below the root."""
        return os.fsencode(folder.relative_to(self.inputs.root).as_posix())

    def _chunks_of(self, folder: Path, entries: Entries, whole: Entries) -> Iterator[_Chunk]:
        """Take in one folder; those of its files that may be DICOM.

        Args:
            folder: path of the folder.
            entries: what is indexed of it.
            whole: all that it holds.
        """
        self.num_files += len(entries.files)
        if entries.identity == self._own_folder:
            self._forget_own_files(folder)
        sources, others = by_format(folder, entries.files)
        place = self._place(folder)
        # a scan that was named may have files that were not: its side-car, or its voxels
        of_all = dict(zip(whole.files, whole.stamps))
        self.found.sources += _with_stamps(sources, place, of_all)
        stems = frozenset(stem_of(source.path) for source in sources)
        may_be_dicom = passed.not_of_others(others, [source.path.name for source in sources])
        for name in set(others).difference(may_be_dicom):
            self._pass_over(name, stems)
        self.num_done += len(entries.files) - len(may_be_dicom)
        stamps = dict(zip(entries.files, entries.stamps))
        named = None if entries is whole else self.inputs.files[folder]
        for number, names in enumerate(_divided(may_be_dicom, stamps)):
            keys = tuple(_file_key(place, name, stamps[name]) for name in names)
            sizes = tuple(max(0, stamps[name][0]) for name in names)
            yield _Chunk(folder, number, tuple(names), keys, sizes, stems, named)

    def _folders(self) -> Iterator[tuple[Path, Entries, Entries]]:
        """Each folder with its entries: those that are indexed, and all."""
        seen = SeenFolders()
        with contextlib.suppress(OSError):
            status = os.stat(self.journal.folder)
            seen.add((status.st_dev, status.st_ino))
        for folder in self.inputs.folders:
            for below, entries in folders_below(folder, self.found, seen):
                yield below, entries, entries
        for folder, names in self.inputs.files.items():
            try:
                entries = self.found.limit.call(folder_entries.read, folder)
            except (NoAnswer, OSError) as error:
                reason = LATE if isinstance(error, NoAnswer) else ""
                line = f"{file_name(str(folder))} cannot be listed" if reason else ""
                self.found.sources.append(Source(folder, UNREADABLE, (folder,), reason, line))
                continue
            if entries.identity not in seen:
                yield folder, _named(entries, folder, names), entries

    def _forget_own_files(self, folder: Path) -> None:
        """Do not count the hidden files that the index itself has in the archive."""
        own: Counter[str] = Counter()
        for name in os.listdir(folder):
            if name == self.journal.folder.name and name.startswith("."):
                own[passed.HIDDEN_FOLDER] += 1
            elif name == KEY_FILE or (name.startswith(".") and ".lease" in name):
                own[passed.HIDDEN_FILE] += 1
        self.found.passed_over.subtract(own)

    def _unknown(self, chunk: _Chunk) -> FolderFiles | None:
        """The files of a chunk that the journal does not have; the others are taken in."""
        places = self._known.find(b"".join(chunk.keys)).tolist()
        names, keys, num_bytes = [], [], 0
        for name, key, size, place in zip(chunk.names, chunk.keys, chunk.sizes, places):
            if place < 0:
                names.append(name)
                keys.append(key)
                num_bytes += size
            elif self._states[place] == head_table.NO_DICOM:
                self._pass_over(name, chunk.stems)
                self._others += key
            else:
                self._current += key
        self.num_done += len(chunk.names) - len(names)
        if not names:
            return None
        return FolderFiles(
            *(chunk.folder, tuple(names), tuple(keys), num_bytes), chunk.stems, chunk.named
        )

    def _pass_over(self, name: str, stems: frozenset[str]) -> None:
        """Count a file that is not DICOM."""
        if not passed.is_companion(name, stems):
            self.found.passed_over[passed.kind_of(name)] += 1

    def take(self, result: ReadUnit) -> None:
        """Take in what a worker has read."""
        unit = result.unit
        if result.failure is not None:
            if unit.num_files > 1:
                self.lost.append(unit)
            else:
                self._add_lost(unit, result)
            return
        for key, row in result.scans:
            self.journal.append(SCANS, key, row)
        for files, looked in zip(unit.folders, result.looked, strict=True):
            self._take_folder(files, looked)
        self.num_done += unit.num_files
        self.show()

    def _take_folder(self, files: FolderFiles, found: Sequence[Looked]) -> None:
        """Take in what the files of one folder are."""
        place = self._place(files.folder)
        for looked, key in zip(found, files.keys, strict=True):
            path = files.folder / looked.name
            if looked.late:
                source = late_source(path, looked.late)
                if source is None:
                    self.found.passed_over[passed.NO_ANSWER] += 1
                else:
                    self.found.sources.append(source)
            elif looked.may_pass and looked.refusal is not None:
                source = Source(path, DICOM.name, (path,), *looked.refusal)
                self.found.sources.append(source)
            else:
                self.journal.append(head_table.HEADS, key, head_table.row_of(looked, place))
                if looked.head is None and looked.refusal is None:
                    self._pass_over(looked.name, files.stems)
                    self._others += key
                else:
                    self._current += key

    def _add_lost(self, unit: HeadUnit, result: ReadUnit) -> None:
        """Refuse the file that ended the process that read it."""
        assert result.failure is not None
        self.num_done += 1
        (files,) = unit.folders
        path = files.folder / files.names[0]
        source = late_source(path, "")
        if source is None:
            self.found.passed_over[passed.NO_ANSWER] += 1
            return
        reason, line = result.failure.reason, result.failure.detail
        self.found.sources.append(replace(source, reason=reason, detail=line))


def _named(entries: Entries, folder: Path, names: frozenset[str]) -> Entries:
    """The files of a folder that were named. Where one of them may be DICOM, the others that may be
    stay too, since they may be of its series.
    """
    _, others = by_format(folder, entries.files)
    chosen = set(names)
    if chosen & set(others):
        chosen |= set(others)
    kept = [(n, s) for n, s in zip(entries.files, entries.stamps) if n in chosen]
    files, stamps = tuple(name for name, _ in kept), tuple(stamp for _, stamp in kept)
    return replace(entries, files=files, stamps=stamps, passed_over=Counter())


def _file_key(place: bytes, name: str, stamp: Stamp) -> bytes:
    """The key of one file: where it lies, and whether it was changed."""
    return key_of(place, name, struct.pack("<qqQ", stamp[0], stamp[1], stamp[2]))


def _divided(names: Sequence[str], stamps: dict[str, Stamp]) -> Iterator[list[str]]:
    """Names of a folder in groups of limited number and size, equal for every process."""
    chunk: list[str] = []
    num_bytes = 0
    for name in names:
        if chunk and (len(chunk) >= MOST_FILES or num_bytes > MOST_BYTES):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(name)
        num_bytes += max(0, stamps[name][0])
    if chunk:
        yield chunk


def _with_stamps(sources: Sequence[Source], place: bytes, stamps: dict[str, Stamp]) -> list[Source]:
    """Sources of single files with their stamps, which hold the files that belong to them too.

    Args:
        sources: sources of one folder.
        place: the folder below the root.
        stamps: stamp of every file in it.
    """
    companions: dict[str, list[str]] = defaultdict(list)
    for name in stamps if sources else ():
        for suffix in passed.COMPANIONS:
            if name.lower().endswith(suffix):
                companions[name[: -len(suffix)]].append(name)
    result = []
    for source in sources:
        name = source.path.name
        names = [name, *companions[stem_of(source.path)]]
        if name.lower().endswith(_DETACHED):
            names = [name, *stamps]
        keys = [_file_key(place, each, stamps[each]) for each in names]
        result.append(replace(source, stamp=key_of(*keys)))
    return result
