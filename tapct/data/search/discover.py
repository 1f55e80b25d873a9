"""Find the scans in a folder: files by their suffix, DICOM series by their content and headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tapct.base.exits import UserError
from tapct.base.marks import file_name
from tapct.data import formats
from tapct.data.readers import DICOM, dicom_kind, format_of, stem_of
from tapct.data.readers.dicom_frames import read_head
from tapct.data.readers.dicom_head import Head
from tapct.data.search import folder_entries, series
from tapct.data.search import passed_over as passed
from tapct.data.search.folder_entries import Entries
from tapct.data.search.frame_numbers import with_frames, without_frames
from tapct.data.search.seen_folders import SeenFolders
from tapct.data.workers.time_limit import NoAnswer, TimeLimit
from tapct.types import Refused

UNREADABLE = "unreadable"  # kind of a folder that cannot be listed
DICOM_OBJECT = "dicom_object"  # kind of a DICOM file without an image, such as a structured report
DICOMDIR = "DICOMDIR"
LATE = "timed_out"  # reason of a file or folder that does not answer
_MOST_LATE = 3  # files in a row without an answer, after which the others of a folder are not tried


@dataclass(frozen=True)
class Source:
    """One file or DICOM series that may be a scan.

    Args:
        path: path of the file. For a DICOM series it is the folder, or the first file where the
            folder holds several series or the series lies in several folders; see `frame_numbers`
            for a file that holds several scans.
        kind: name of its format in `readers.FORMATS`, `dicom_object` for a DICOM file without an
            image, or `unreadable` for a folder that cannot be listed.
        files: all files of the scan, those of a DICOM series in the order of the slices.
        reason: code of the rule by which its headers alone refuse it; empty for the others.
        detail: one line with the reason.
        mark: code of what its headers alone show to be unusual; empty for most.
        sop_class: SOPClassUID of a DICOM object.
        modality: Modality of a DICOM object.
        frames: numbers of the frames that make the scan, counted from 1 over all of its files;
            empty for all frames.
        stamp: hash of names, sizes, times of the last change and inodes of its files and of the
            files that belong to them, see `index.listing`; empty where they were not asked for.
        contents: bytes of its files that were read before, by path; empty for most.
    """

    path: Path
    kind: str
    files: Sequence[Path]
    reason: str = ""
    detail: str = ""
    mark: str = ""
    sop_class: str = ""
    modality: str = ""
    frames: tuple[int, ...] = ()
    stamp: bytes = field(default=b"", compare=False, repr=False)
    contents: Mapping[Path, bytes] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Args:
        sources: everything that may be a scan or a label map, in a fixed order.
        passed_over: number of files of each kind that are neither, e.g. {".zip": 2}.
    """

    sources: tuple[Source, ...]
    passed_over: Mapping[str, int] = field(default_factory=dict)


@dataclass
class SearchState:
    """What the folders hold, while they are searched."""

    sources: list[Source] = field(default_factory=list)
    heads: list[Head] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    limit: TimeLimit = field(default_factory=TimeLimit)


def find_sources(root: Path | str, seconds: float = math.inf) -> list[Source]:
    """Everything below a folder that may be a scan or a label map, see `search`."""
    return list(search(root, seconds=seconds).sources)


def search(root: Path | str, *, derived: bool = False, seconds: float = math.inf) -> Listing:
    """List everything below a folder that may be a scan, in a fixed order; label maps are listed
    too, and what is neither is counted.

    Hidden files and folders are skipped. Links are followed, and each folder is visited once.
    DICOM is recognised by its content and not by its name; each file is opened once, and series are
    put together over all folders (`series.py`). A file that is named like a scan but cannot be one
    is listed, so that it is refused with a reason.

    A file or folder that does not answer, as on a broken network disk, is refused as `timed_out`
    where it may be a scan; a file with the suffix of another kind is only counted. After three in
    a row the other files of a folder are not tried.

    Args:
        root: folder of the archive.
        derived: True to treat images that were computed from others as plain slices.
        seconds: longest time to wait for the header of a file, or for the names in a folder.
    Raises:
        UserError: `root` is missing or not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        problem = (
            "is a file; give its folder" if root.exists() else "does not exist; check the path"
        )
        raise UserError(f"folder {root} {problem}")
    found = SearchState(limit=TimeLimit(seconds))
    for folder, entries in folders_below(root, found):
        _search_folder(folder, entries, found)
    found.limit.close()
    return _listing(root, found, derived)


def find_source(path: Path, *, derived: bool = False) -> Source:
    """The one scan that a path names: a file, a folder with one DICOM series (in it or in the
    folders below it), or any file of a series.

    For a series that lies in several folders, a file names the part in its own folder.

    Args:
        path: path of the file or folder.
        derived: as in `search`.
    Raises:
        Refused: `unreadable` where there is no scan, `mixed_series` where there are several.
    """
    file, frames = without_frames(str(path))
    if frames and not path.exists() and Path(file).is_file():
        for source in _sources_beside(Path(file), derived):
            if source.path == path:
                return source
    if not path.exists():
        raise Refused("unreadable", f"{file_name(str(path))} does not exist")
    if not (path.is_file() or path.is_dir()):  # opening a FIFO would never return
        raise Refused(
            "unreadable", f"{file_name(str(path))} is neither a regular file nor a folder"
        )
    file_format = None if path.is_dir() else format_of(path)
    if file_format is not None:
        return Source(path, file_format.name, (path,))
    if path.is_dir():
        found = SearchState()
        for folder, entries in folders_below(path, found):
            _search_folder(folder, entries, found, only_dicom=True)
        found.sources = [source for source in found.sources if source.kind != UNREADABLE]
        sources = _listing(path, found, derived).sources
        own = [source for source in sources if any(file.parent == path for file in source.files)]
        return _only_scan(path, own or sources)
    same_file = [source for source in _sources_beside(path, derived) if path in source.files]
    if same_file:
        return _only_scan(path, same_file)
    raise Refused("unreadable", f"{file_name(str(path))} is not a {formats.listed('or')} scan")


def _sources_beside(path: Path, derived: bool) -> Sequence[Source]:
    """The DICOM series in the folder of a file."""
    found = SearchState()
    _search_folder(path.parent, folder_entries.read(path.parent), found, only_dicom=True)
    return _listing(path.parent, found, derived).sources


def _only_scan(folder: Path, sources: Sequence[Source]) -> Source:
    """The one scan among the DICOM files of a folder, or in a file, whatever scouts and damaged
    files lie beside it; where there is none, what makes up most of it, so that it gives the reason.
    """
    scans = [source for source in sources if not source.reason]
    if len(scans) > 1 and all(source.frames for source in scans) and not folder.is_dir():
        raise Refused(
            "mixed_series",
            f"{file_name(folder)} holds {len(scans)} stacks of slices; give one of them, such as "
            f"{file_name(scans[0].path)}",
        )
    if len(scans) > 1:
        raise Refused(
            "mixed_series",
            f"{file_name(str(folder))} holds {len(scans)} DICOM series; give one file of the "
            "series to read",
        )
    if not sources:
        raise Refused(
            "unreadable", f"{file_name(str(folder))} is not a {formats.listed('or')} scan"
        )
    return max(scans or sources, key=lambda source: (len(source.files), len(source.frames)))


def source_of(root: Path, path: str, kind: str, file_paths: Sequence[str]) -> Source:
    """The source of a scan that was found before.

    Args:
        root: folder of the archive.
        path, kind, file_paths: columns of its row in the manifest.
    """
    files = tuple(root / file for file in file_paths) or (root / path,)
    file, frames = without_frames(path)
    # a folder or file may have such a name without holding several scans
    has_frames = kind == DICOM.name and path not in file_paths and file in file_paths
    return Source(root / path, kind, files, frames=frames if has_frames else ())


def folders_below(
    root: Path, found: SearchState, seen: SeenFolders | None = None
) -> Iterator[tuple[Path, Entries]]:
    """`root` and all folders below it that are not hidden, each once, with what they hold.

    Args:
        root: folder to start from.
        found: everything that was found so far; folders that cannot be listed are added.
        seen: folders that were visited before, to which these are added.
    """
    seen = SeenFolders() if seen is None else seen
    # a folder and the names in it that wait: a million paths would need more memory than names
    todo = [(root, [""])]
    while todo:
        parent, waiting = todo[-1]
        if not waiting:
            todo.pop()
            continue
        folder = parent / waiting.pop()
        try:
            entries = found.limit.call(folder_entries.read, folder)
        except NoAnswer as late:
            detail = f"{file_name(str(folder))}: its list of files has {late.problem}"
            found.sources.append(Source(folder, UNREADABLE, (folder,), LATE, detail))
            continue
        except OSError:
            found.sources.append(Source(folder, UNREADABLE, (folder,)))
            continue
        if entries.identity in seen:  # a link to a folder that was visited, or above this one
            continue
        seen.add(entries.identity)
        found.passed_over.update(entries.passed_over)
        todo.append((folder, list(reversed(entries.folders))))
        yield folder, entries


def _search_folder(
    folder: Path, entries: Entries, found: SearchState, *, only_dicom: bool = False
) -> None:
    """Add what one folder holds, without its subfolders.

    Args:
        folder: folder to search.
        entries: what it holds.
        found: everything that was found so far.
        only_dicom: True to leave out the files of other formats.
    """
    sources, others = by_format(folder, entries.files)
    if not only_dicom:
        found.sources += sources
    stems = {stem_of(source.path) for source in ([] if only_dicom else sources)}
    may_be_dicom = passed.not_of_others(others, [source.path.name for source in sources])
    for name in set(others).difference(may_be_dicom):
        if not passed.is_companion(name, stems):
            found.passed_over[passed.kind_of(name)] += 1
    for looked in look_into(folder, may_be_dicom, found.limit):
        path = folder / looked.name
        if looked.late:
            _add_late(path, looked.late, found)
        elif looked.refusal is not None:
            found.sources.append(Source(path, DICOM.name, (path,), *looked.refusal))
        elif looked.head is not None and looked.head.sop_class == dicom_kind.DICOMDIR:
            found.passed_over[DICOMDIR] += 1
        elif looked.head is not None:
            found.heads.append(looked.head)
        elif not passed.is_companion(path.name, stems):
            found.passed_over[passed.kind_of(path.name)] += 1


def by_format(folder: Path, names: Sequence[str]) -> tuple[list[Source], list[str]]:
    """The files of a folder whose names show their format, and the names of the others, any of
    which may be DICOM.
    """
    sources: list[Source] = []
    others: list[str] = []
    for name in names:
        path = folder / name
        file_format = format_of(path)
        if file_format is None:
            others.append(name)
        else:
            sources.append(Source(path, file_format.name, (path,)))
    return sources, others


@dataclass(frozen=True)
class Looked:
    """What a file is that may be DICOM. Nothing is set for a file of another kind.

    Args:
        name: name of the file.
        head: its head.
        refusal: reason and detail where it is named like DICOM, or begins like it, and cannot be
            read.
        late: why there is no answer from the disk, in words.
        may_pass: whether it is the disk that refuses, which may change without the file.
    """

    name: str
    head: Head | None = None
    refusal: tuple[str, str] | None = None
    late: str = ""
    may_pass: bool = False


def look_into(
    folder: Path,
    names: Sequence[str],
    limit: TimeLimit,
    use: Callable[[Head, BinaryIO], None] | None = None,
) -> Iterator[Looked]:
    """Read the heads of files, in their order.

    Args:
        folder: folder of the files.
        names: their names.
        limit: time limit of each file.
        use: as in `head_or_problem`.
    """
    num_late = 0  # in a row
    for name in names:
        if num_late >= _MOST_LATE:
            problem = f"was not opened, since {num_late} files before it gave no answer"
            yield Looked(name, late=problem, may_pass=True)
            continue
        try:
            head, refusal, may_pass = limit.call(head_or_problem, folder / name, use)
        except NoAnswer as late:
            num_late += 1
            yield Looked(name, late=f"has {late.problem}", may_pass=True)
            continue
        num_late = 0
        yield Looked(name, head, refusal, may_pass=may_pass)


def _add_late(path: Path, problem: str, found: SearchState) -> None:
    """Refuse a file that gives no answer where its name allows a DICOM file; else count it."""
    source = late_source(path, problem)
    if source is None:
        found.passed_over[passed.NO_ANSWER] += 1
    else:
        found.sources.append(source)


def late_source(path: Path, problem: str) -> Source | None:
    """The source of a file that gives no answer; None where its name is not one of DICOM."""
    is_named_dicom = path.suffix.lower() in DICOM.suffixes
    if not is_named_dicom and passed.kind_of(path.name) != passed.WITHOUT_SUFFIX:
        return None
    return Source(path, DICOM.name, (path,), LATE, f"{file_name(path)} {problem}")


def head_or_problem(
    path: Path, use: Callable[[Head, BinaryIO], None] | None = None
) -> tuple[Head | None, tuple[str, str] | None, bool]:
    """The head of a DICOM file, or reason and detail of a file that is named like one or begins
    like one and cannot be read, and whether that may pass; the first two are None for other files.

    Args:
        path: path of the file.
        use: function that is called with the head and the open file.
    """
    is_named_dicom = path.suffix.lower() in DICOM.suffixes
    try:
        head = read_head(path) if use is None else read_head(path, use)
    except Refused as error:
        return None, (error.reason, error.marked), False
    except Exception as error:
        # not the text of the error, which may quote the header
        problem = f"the header of {file_name(path)} cannot be read ({type(error).__name__})"
        return None, ("unreadable", problem), isinstance(error, OSError)
    if head is None and is_named_dicom:
        if path.stat().st_size == 0:
            return None, ("empty_file", f"{file_name(path)} has no content"), False
        problem = f"{file_name(path)} is not DICOM, in spite of its name"
        return None, ("unreadable", problem), False
    if head is not None and head.refusal is not None and head.refusal[0] == "corrupt":
        return None, head.refusal, False
    return head, None, False


def _listing(root: Path, found: SearchState, derived: bool) -> Listing:
    """Put the DICOM files together and sort all sources by their paths."""
    sources = list(found.sources)
    slices: list[Head] = []
    for head in found.heads:
        source = object_source(head)
        if source is None:
            slices.append(head)
        else:
            sources.append(source)
    parts = [StackFiles.of(stack) for stack in series.stacks_of(slices, derived=derived)]
    sources += _sources_of_parts(parts)
    return Listing(in_order(root, sources), dict(+found.passed_over))


def in_order(root: Path, sources: Iterable[Source]) -> tuple[Source, ...]:
    """Sources by their paths below the root."""
    return tuple(sorted(sources, key=lambda source: source.path.relative_to(root).as_posix()))


def object_source(head: Head) -> Source | None:
    """The source of a DICOM object without an image; None for an image."""
    title = dicom_kind.object_title(head.sop_class)
    if not title:
        return None
    return Source(
        head.path,
        DICOM_OBJECT,
        (head.path,),
        reason="not_ct",
        detail=f"{file_name(head.path)} is a DICOM {title}, not a CT image",
        sop_class=head.sop_class,
        modality=head.modality,
    )


@dataclass(frozen=True)
class StackFiles:
    """A stack of slices without the heads of its slices, for an archive of many.

    Args:
        files: its files, in the order of the slices; those of frames in the order of their paths.
        folders: folders of its files.
        frames: numbers of its frames, counted over its files; empty for a stack of whole files.
        reason, detail, mark: as in `Source`.
        stamp: as in `Source`.
    """

    files: Sequence[Path]
    folders: frozenset[Path]
    frames: tuple[int, ...]
    reason: str
    detail: str
    mark: str
    stamp: bytes = b""

    @classmethod
    def of(cls, stack: series.Stack) -> StackFiles:
        """The part of a stack."""
        files = tuple(dict.fromkeys(head.path for head in stack.heads))
        frames = _frames_of(stack)
        if frames:
            files = tuple(sorted(files))
        folders = frozenset(file.parent for file in files)
        return cls(files, folders, frames, stack.reason, stack.detail, stack.mark)

    def source(self, num_stacks: int, num_whole: int) -> Source:
        """The source of this stack.

        It is called by its folder where that holds this whole stack alone, or nothing but this one;
        else by its first file.

        Args:
            num_stacks: number of stacks with files in its folder.
            num_whole: number of them that are whole; both count for a stack in one folder alone.
        """
        (home, *more) = self.folders
        if self.frames:
            path = with_frames(self.files[0], self.frames)
        elif not more and (num_stacks == 1 or (not self.reason and num_whole == 1)):
            path = home
        else:
            path = min(self.files)
        return Source(
            *(path, DICOM.name, self.files, self.reason, self.detail, self.mark),
            frames=self.frames,
            stamp=self.stamp,
        )


def _sources_of_parts(parts: Sequence[StackFiles]) -> list[Source]:
    """Sources of the stacks of slices."""
    num_stacks: Counter[Path] = Counter()
    num_whole: Counter[Path] = Counter()
    for part in parts:
        num_stacks.update(part.folders)
        if not part.reason:
            num_whole.update(part.folders)
    homes = [next(iter(part.folders)) for part in parts]
    return [part.source(num_stacks[home], num_whole[home]) for part, home in zip(parts, homes)]


def _frames_of(stack: series.Stack) -> tuple[int, ...]:
    """Numbers of the frames of a stack, counted over its files in the order of their paths; empty
    for a stack of whole files.
    """
    if not all(head.frame for head in stack.heads):
        return ()
    num_before, total = {}, 0
    for path, num_frames in sorted({(head.path, head.num_frames) for head in stack.heads}):
        num_before[path] = total
        total += num_frames
    return tuple(sorted(num_before[head.path] + head.frame for head in stack.heads))
