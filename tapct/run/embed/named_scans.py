"""The scans that `tapct embed` computes features of, under the case IDs of the user.

The ID is a column of the table, or else the file name without suffix. Where two scans have one file
name, as in `P1/ct.nii.gz` and `P2/ct.nii.gz`, all IDs are made of the whole path: `P1_ct`. Only
files for a challenge must keep the names of the cases, so that two equal ones are an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapct.base.exits import UserError
from tapct.base.paths import near_path
from tapct.data.index.share import WHOLE, Share
from tapct.data.labels.pairing import LabelPairs, pair_labels
from tapct.data.readers import load_libraries, stem_of
from tapct.data.scans.ingest import refusing
from tapct.data.search.discover import DICOM_OBJECT, UNREADABLE, Source, find_source, search
from tapct.data.tables import ScanNames, Table, read_table
from tapct.types import Refused

ID_COLUMNS, PATH, LABEL = ("case_id", "id"), "path", "label"
KEY_COLUMNS = (*ID_COLUMNS, PATH)
TABLES = (".csv", ".tsv")
_SUFFIXES = (".nii.gz", ".nii", ".h5")  # the challenge's tables name cases with them or without


@dataclass(frozen=True)
class NamedScan:
    """One scan and its mask.

    Args:
        id: case ID, the name of its result.
        source: files of the scan.
        mask: label file or folder of masks; None without one.
        path: path below the folder of the scans, or as the table has it.
        label: column `label` of the table; None without one.
    """

    id: str
    source: Source
    mask: Path | None = None
    path: str = ""
    label: str | None = None

    def stamp(self) -> str:
        """Hash of size and time of change of its files, without reading them: 16 hex digits."""
        files = list(self.source.files)
        if self.mask is not None:
            files += sorted(self.mask.iterdir()) if self.mask.is_dir() else [self.mask]
        facts = []
        for file in files:
            try:
                facts.append((file.stat().st_size, file.stat().st_mtime_ns))
            except OSError:  # a file that is gone is reported when it is read
                facts.append((-1, -1))
        return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class NamedScans:
    """The cases of a folder or table.

    Args:
        found: cases, in the order of the folder or table.
        missing: case IDs of a table of which no scan has the name.
    """

    found: tuple[NamedScan, ...]
    missing: tuple[str, ...] = ()

    def of_share(self, share: Share) -> NamedScans:
        """The scans of one share of the work; only the whole has those that are missing."""
        if share == WHOLE:
            return self
        return NamedScans(tuple(case for case in self.found if share.has(case.id)), ())


def check_given(given: Path, root: Path | None, masks: Path | None) -> None:
    """Check the paths of the command line, before a model is loaded.

    Args:
        given: scan, folder of scans, or CSV file.
        root: option --root.
        masks: option --masks.
    Raises:
        UserError: a path is missing or of another kind.
    """
    is_table = _is_table(given)
    if not given.exists():
        raise UserError(
            f"{given} does not exist{near_path(given)}; give a scan, a folder of scans, or a CSV "
            f"file with a column {PATH}"
        )
    if is_table and given.is_dir():
        raise UserError(f"{given} is a folder with the name of a table; rename it")
    if root is not None and not is_table:
        raise UserError(f"--root {root} is only used with a CSV file, and {given} is not one")
    if masks is not None and not masks.is_dir():
        raise UserError(f"--masks {masks} is not a folder; give the folder of the label maps")
    if root is not None and not root.is_dir():
        raise UserError(f"--root {root} is not a folder; give the folder of the scans")


def is_single(given: Path) -> bool:
    """Whether a path names one scan in a file; a folder may hold one or more."""
    return not _is_table(given) and not given.is_dir()


def find_cases(
    given: Path, root: Path | None, masks: Path | None, *, keep_names: bool = False
) -> NamedScans:
    """Find the scans to embed.

    Args:
        given: scan, folder of scans, or CSV file; `check_given` has passed.
        root: folder of the scans that the table names; None for the folder of the table.
        masks: folder with label maps that have the names of the scans.
        keep_names: whether two scans with one file name are an error.
    Raises:
        UserError: there is no scan, or two cases have one ID.
    """
    if _is_table(given):
        folder = root or given.parent
        return _named_by(read_table(given, "the table of cases"), folder, masks, keep_names)
    if given.is_dir():
        return _named_by_files(_scans_in(given, masks), keep_names)
    load_libraries()
    source = _source_at(given)
    mask = None
    if masks is not None:
        mask = _mask_of(source, pair_labels([source], given.parent, masks), masks)
    return NamedScans((NamedScan(stem_of(given), source, mask, given.name),))


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLES


def _source_at(path: Path) -> Source:
    """The scan that a path names; one that is refused keeps the reason."""
    try:
        with refusing():
            return find_source(path)
    except Refused as error:
        return Source(path, UNREADABLE, (path,), error.reason, error.marked)


def _scans_in(folder: Path, masks: Path | None) -> list[NamedScan]:
    """All scans of a folder with their masks; their IDs are the file names."""
    load_libraries()
    sources = search(folder).sources
    pairs = pair_labels(sources, folder, masks)
    scans = []
    for source in sources:
        if source.path not in pairs.label_files and source.kind != DICOM_OBJECT:
            name = stem_of(source.path) if source.path != folder else folder.resolve().name
            path = source.path.relative_to(folder).as_posix()
            scans.append(NamedScan(name, source, _mask_of(source, pairs, masks), path))
    if not scans:
        raise UserError(f"{folder} holds no scans; check the path")
    return scans


def _mask_of(source: Source, pairs: LabelPairs, masks: Path | None) -> Path | None:
    """The label map of a scan in the folder of the masks."""
    found = pairs.label_of.get(source.path)
    if masks is None or found is None or masks.resolve() not in found.resolve().parents:
        return None
    return found


def _named_by_files(scans: Sequence[NamedScan], keep_names: bool) -> NamedScans:
    """The scans of a folder, each under its file name or, where two are equal, under its path.

    Raises:
        UserError: two scans have one name.
    """
    try:
        return NamedScans(tuple(_by_id(scans).values()))
    except _SameName:
        if keep_names:
            raise
    return NamedScans(tuple(_by_id([replace(case, id=_path_id(case)) for case in scans]).values()))


class _SameName(UserError):
    """Two scans have one ID."""


def _by_id(scans: Sequence[NamedScan]) -> dict[str, NamedScan]:
    first: dict[str, NamedScan] = {}
    for case in scans:
        other = first.setdefault(case.id, case)
        if other.source != case.source:
            raise _SameName(
                f"{other.source.path} and {case.source.path} have the same case ID {case.id}, and "
                "its result can be of only one of them; rename one, or name the scans in a CSV "
                f"file with the columns {PATH} and id"
            )
    return first


def _path_id(case: NamedScan) -> str:
    """The ID of a scan by its whole path: `P1_ct` for `P1/ct.nii.gz`."""
    path = Path(case.path)
    parts = [part for part in (*path.parent.parts, stem_of(path)) if part not in ("/", "..", ".")]
    return "_".join(parts) or case.id


def _named_by(table: Table, folder: Path, masks: Path | None, keep_names: bool) -> NamedScans:
    """The scans that a table names, each under the ID in the table.

    A path that exists is read as it is. What remains are names, for which the folder is searched.

    Raises:
        UserError: no column names cases, an ID cannot be a file name, or means several scans.
    """
    by_lower = {name.lower(): name for name in reversed(table.columns)}
    ids = [by_lower[name] for name in ID_COLUMNS if name in by_lower]
    if not ids and PATH not in by_lower:
        raise UserError(
            f"{table.file} has no column that names the cases; rule: one of "
            f"{', '.join(KEY_COLUMNS)}; its columns are {', '.join(table.columns) or 'none'}"
        )
    load_libraries()
    rows = [_row(table, number, ids, by_lower) for number in range(len(table.rows))]
    at_path: dict[str, Source] = {}
    for row in rows:
        # a mask belongs to a scan by the names in both folders, which are searched then
        if masks is None and row.path and (folder / row.path).exists():
            at_path[row.path] = _source_at(folder / row.path)
    names = _Searched(table, folder, masks)
    found: list[NamedScan] = []
    missing: list[str] = []
    for row in rows:
        if row.path in at_path:
            found.append(NamedScan(row.id, at_path[row.path], None, row.path, row.label))
            continue
        case = names.case_of(row)
        if case is None:
            missing.append(row.id)
        else:
            found.append(replace(case, id=row.id, label=row.label))
    if not found:
        raise UserError(
            f"none of the {len(table.rows)} rows of {table.file} names a scan in {folder}; give "
            "the folder of the scans with --root"
        )
    by_names = _named_by_files(found, keep_names or bool(ids))
    return NamedScans(by_names.found, tuple(dict.fromkeys(missing)))


@dataclass(frozen=True)
class _Row:
    """One row of a table: line in the file, case ID, path or name of the scan, label."""

    line: int
    id: str
    path: str
    name: str
    label: str | None


def _row(table: Table, number: int, ids: Sequence[str], by_lower: dict[str, str]) -> _Row:
    """One row of a table.

    Raises:
        UserError: its ID cannot be the name of a file.
    """
    line, row = table.numbers[number], table.rows[number]
    path = row[by_lower[PATH]] if PATH in by_lower else ""
    text = row[ids[0]] if ids else path
    column = ids[0] if ids else by_lower[PATH]
    case_id = _without_suffix(text if ids else Path(path).name)
    if not case_id or "/" in case_id or case_id.startswith("."):
        raise UserError(
            f"line {line} of {table.file}: {column} {text!r} cannot be the name of a file"
        )
    label = row[by_lower[LABEL]] if LABEL in by_lower else None
    return _Row(line, case_id, path, path or text, label)


class _Searched:
    """The scans of a folder by their names; the folder is searched for the first name.

    Args:
        table: table, for error lines.
        folder: folder of the scans.
        masks: folder of the label maps.
    """

    def __init__(self, table: Table, folder: Path, masks: Path | None) -> None:
        self.table, self.folder, self.masks = table, folder, masks
        self.by_path: dict[str, NamedScan] | None = None

    def case_of(self, row: _Row) -> NamedScan | None:
        """The scan of a row; None where no scan has its name.

        Raises:
            UserError: several scans have it.
        """
        if self.by_path is None:
            try:
                scans = _scans_in(self.folder, self.masks)
            except UserError:  # no scan at all, which is reported with the rows that name none
                scans = []
            self.by_path = {case.path: case for case in scans}
            self.names = ScanNames(self.by_path)
        paths = self.names.paths_of(row.name) or self.names.paths_of(_without_suffix(row.name))
        if len(paths) > 1:
            raise UserError(
                f"line {row.line} of {self.table.file}: several scans are called {row.name!r}, "
                f"e.g. {' and '.join(sorted(paths)[:2])}; name them by their paths in a column "
                f"`{PATH}`"
            )
        return self.by_path[next(iter(paths))] if paths else None


def _without_suffix(name: str) -> str:
    """A case ID without the suffix of a file."""
    stem = stem_of(Path(name)) if "/" not in name else name
    if stem != name and stem:
        return stem
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name
