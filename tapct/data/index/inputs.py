"""What `tapct index` is given: folders, files, patterns of files, and lists of scans."""

from __future__ import annotations

import difflib
import functools
import glob
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import expand_path
from tapct.base.paths import near_path
from tapct.data.readers import stem_of
from tapct.data.search.discover import Source
from tapct.data.search.frame_numbers import without_frames
from tapct.data.tables import read_table

_LISTS = (".csv", ".tsv", ".json")
COLUMNS = ("path", "label", "patient", "split")  # of a list


@dataclass(frozen=True)
class Entry:
    """One scan of a list.

    Args:
        path: path of the file, of the folder of a DICOM series, or of one of its files.
        label: path of its label map; None where the list has none.
        patient: identifier of its patient; empty where the list has none.
        split: name of its part of the data set, such as `train`; empty where the list has none.
        named_in: the row and list that name it, for error lines; empty for a word of the command.
    """

    path: Path
    label: Path | None = None
    patient: str = ""
    split: str = ""
    named_in: str = field(default="", compare=False)


@dataclass(frozen=True)
class IndexInputs:
    """What is indexed.

    Args:
        root: folder below which everything lies; paths of the manifest are relative to it.
        folders: folders that are searched, with all folders in them.
        files: single files that were named, by their folder.
        entries: scans of a list.
    """

    root: Path
    folders: tuple[Path, ...]
    files: Mapping[Path, frozenset[str]] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()

    @property
    def is_one_folder(self) -> bool:
        """Whether one folder was given, and nothing else."""
        return self.folders == (self.root,) and not self.files

    def has_named(self, source: Source) -> bool:
        """Whether a source lies in a folder that was given, or is a file that was named, or a
        series with such a file.
        """
        if self.is_one_folder or self._is_in_folder(source.path):
            return True
        return any(file.name in self.files.get(file.parent, ()) for file in source.files)

    def _is_in_folder(self, path: Path) -> bool:
        """Whether a path is, or lies in, a folder that was given."""
        return any(each in self._folders for each in (path, *path.parents))

    @functools.cached_property
    def _folders(self) -> frozenset[Path]:
        return frozenset(self.folders)

    def below(self, folder: Path | None) -> IndexInputs:
        """The same inputs with paths that start at a folder above them; unchanged for a folder that
        does not contain all of them, and for None.

        Args:
            folder: path without links.
        """
        own = Path(os.path.abspath(self.root))
        root = next((each for each in own.parents if each.resolve() == folder), None)
        if root is None:
            return self
        folders = tuple(Path(os.path.abspath(each)) for each in self.folders)
        return replace(self, root=root, folders=folders)

    def at(self, folder: Path) -> IndexInputs:
        """The same inputs with paths that start at a folder of the user's choice.

        Args:
            folder: folder that contains all of them.
        Raises:
            UserError: it is no folder, or something that was given lies outside of it.
        """
        if not folder.is_dir():
            state = "is a file" if folder.exists() else f"does not exist{near_path(folder)}"
            raise UserError(f"--root {folder} {state}; give a folder that contains all scans")
        resolved = folder.resolve()
        for path in (*self.folders, *self.files):
            place = Path(os.path.abspath(path))
            # a folder may be a link to another disk: what counts is its name
            if not any(each.resolve() == resolved for each in (place, *place.parents)):
                files = sorted(self.files.get(path, ()))
                outside = path / files[0] if files else path
                raise UserError(
                    f"--root {folder} does not contain {outside}; give a folder that contains all "
                    "scans, or leave the option out"
                )
        found = self if self.root.resolve() == resolved else self.below(resolved)
        if found.root.resolve() != resolved:  # one name of the folder is a link
            raise UserError(
                f"the scans are given by several names of the folder {folder}, one of which is a "
                "link; write all paths with the same name of it"
            )
        return found

    def entry_of(self, sources: Iterable[Source], *, strict: bool = True) -> dict[Path, Entry]:
        """The entry of each source that a list names, by the path of the source.

        Args:
            sources: scans that were found.
            strict: whether each entry must name one of them.
        Raises:
            UserError: an entry names no scan, or one with a label map names several.
        """
        by_path = {entry.path: entry for entry in self.entries}
        found: dict[Path, Entry] = {}
        scans: dict[Path, int] = {}
        for source in sources if by_path else ():
            names = [source.path, *source.files, *source.path.parents]
            name = next((name for name in names if name in by_path), None)
            if name is not None:
                found[source.path] = by_path[name]
                scans[name] = scans.get(name, 0) + 1
        for path, entry in by_path.items() if strict else ():
            if path not in scans:
                raise UserError(f"the list names {path}, which is no scan; correct its path")
            if entry.label is not None and scans[path] > 1:
                raise UserError(
                    f"the list gives the label map {entry.label} to {path}, which holds "
                    f"{scans[path]} scans; name one of them"
                )
        return found


def inputs_of(given: Path | Sequence[Path]) -> IndexInputs:
    """What the arguments of `tapct index` name.

    Args:
        given: folders, files of scans, patterns such as `scans/*/ct.nii.gz`, or lists (.csv, .tsv,
            .json) with the columns path, label, patient and split, of which only path is needed.
    Raises:
        UserError: something is missing, or a list cannot be read.
    """
    paths = [given] if isinstance(given, (str, Path)) else list(given)
    expanded = [path for word in paths for path in _matches(Path(word))]
    if len(expanded) == 1 and expanded[0].is_dir():
        return IndexInputs(expanded[0], (expanded[0],))
    entries: list[Entry] = []
    stems = {(path.parent, stem_of(path)) for path in expanded if not _is_list(path)}
    for path in expanded:
        is_list = _is_list(path)
        if is_list and (path.parent, path.stem) in stems and _is_object(path):
            continue  # the side-car of a scan that is given too, as by the pattern `scans/*`
        entries += _entries_of(path) if is_list else [Entry(path)]
    unique: dict[Path, Entry] = {}
    for entry in entries:
        path = Path(os.path.abspath(entry.path))
        entry = replace(entry, path=path)
        unique[path] = _joined(unique[path], entry) if path in unique else entry
    return _in_common_folder(list(unique.values()))


def _joined(first: Entry, second: Entry) -> Entry:
    """One entry for a scan that is given twice, with the values of both.

    Raises:
        UserError: a value differs.
    """
    for name in COLUMNS[1:]:
        one, other = getattr(first, name), getattr(second, name)
        if one and other and one != other:
            raise UserError(
                f"{first.path} is given twice, with different values of {name}: {one} and {other}; "
                "keep one of them"
            )
    return Entry(
        first.path,
        first.label or second.label,
        first.patient or second.patient,
        first.split or second.split,
        first.named_in or second.named_in,
    )


def _is_list(path: Path) -> bool:
    """Whether a path is named like a list of scans."""
    return path.is_file() and path.name.lower().endswith(_LISTS)


def _is_object(path: Path) -> bool:
    """Whether a file is JSON with an object, as side-cars are, and no list."""
    try:
        with path.open(encoding="utf-8") as file:
            start = file.read(4096).lstrip("\ufeff \t\r\n")
    except (OSError, UnicodeDecodeError):
        return False
    return path.suffix.lower() == ".json" and start.startswith("{")


def _in_common_folder(entries: Sequence[Entry]) -> IndexInputs:
    """Inputs below the nearest folder that holds all of them."""
    folders, homes = [], []
    files: dict[Path, set[str]] = {}
    for entry in entries:
        path = entry.path
        if path.is_dir():
            folders.append(path)
            homes.append(path)
            continue
        if not path.exists() and without_frames(str(path))[1]:
            path = Path(without_frames(str(path))[0])
        if not path.is_file():
            raise UserError(
                f"{entry.named_in}{path} does not exist{near_path(path)}; check the path"
            )
        files.setdefault(path.parent, set()).add(path.name)
        homes.append(path.parent)
    # a folder within another one is searched with it
    known = set(folders)
    outer = [folder for folder in folders if not known & {*folder.parents}]
    root = Path(os.path.commonpath(homes))
    listed = {folder: frozenset(names) for folder, names in files.items()}
    named = [entry for entry in entries if entry.label or entry.patient or entry.split]
    return IndexInputs(root, tuple(sorted(set(outer))), listed, tuple(named))


def _matches(path: Path) -> Iterator[Path]:
    """The paths that a word of the command line names: itself, or what a pattern matches."""
    if path.exists():
        yield path
        return
    if any(sign in str(path) for sign in "*?["):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise UserError(f"no file or folder matches {path}; check the pattern")
        matched = [Path(name) for name in found]
        if not path.name.lower().endswith(_LISTS):  # tables that lie beside scans
            matched = [each for each in matched if not _is_list(each)]
        if not matched:
            raise UserError(
                f"{path} matches only tables and JSON files, such as {found[0]}; a pattern of "
                f"lists of scans ends in {', '.join(_LISTS[:-1])} or {_LISTS[-1]}"
            )
        yield from matched
        return
    if without_frames(str(path))[1]:
        yield path
        return
    raise UserError(f"folder {path} does not exist{near_path(path)}; check the path")


def _entries_of(file: Path) -> list[Entry]:
    """The scans of a list; relative paths start at its folder."""
    rows = _rows_of_json(file) if file.suffix.lower() == ".json" else _rows_of_table(file)
    if not rows:
        raise UserError(f"the list {file} has no rows")
    unknown = sorted({name for row in rows for name in row if name} - set(COLUMNS))
    if unknown and not any("path" in row for row in rows):
        raise UserError(
            f"the list {file} has no column path; it has {', '.join(unknown)}. Rule: path, and "
            "where they are known label, patient and split"
        )
    _check_columns(file, unknown, {name for row in rows for name in row})
    entries = []
    for number, row in enumerate(rows, 1):
        if not row.get("path"):
            raise UserError(f"row {number} of the list {file} has no path; fill it or remove it")
        label = row.get("label")
        entries.append(
            Entry(
                _beside(file, row["path"]),
                _beside(file, label) if label else None,
                row.get("patient", ""),
                row.get("split", ""),
                f"row {number} of the list {file}: ",
            )
        )
    for entry in entries:
        if entry.label is not None and not entry.label.exists():
            raise UserError(f"the list {file} names the label map {entry.label}, which is missing")
    return entries


def _check_columns(file: Path, unknown: Sequence[str], present: Collection[str]) -> None:
    """Refuse a column whose name is nearly that of a column that is read and missing, so that no
    labels or patients are lost by a typing error; print a line about other columns.
    """
    for name in unknown:
        near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.75)
        if near and near[0] not in present:
            raise UserError(
                f"the list {file} has the column {name}, which is not read; rename it to {near[0]} "
                "if it is that, or remove it"
            )
    if unknown:
        console.warn(f"the list {file} has columns that are not read: {', '.join(unknown)}")


def _beside(file: Path, text: str) -> Path:
    """A path in a list: relative ones start at the folder of the list."""
    return Path(os.path.abspath(file.absolute().parent / expand_path(text)))


def _rows_of_table(file: Path) -> list[dict[str, str]]:
    table = read_table(file, "the list of scans")
    names = _lower_case(file, table.columns)
    return [{names[column]: value for column, value in row.items()} for row in table.rows]


def _lower_case(file: Path, columns: Iterable[str]) -> dict[str, str]:
    """Names of columns as they are compared.

    Raises:
        UserError: two of them differ in upper and lower case alone.
    """
    names = {column: column.strip().lower() for column in columns}
    taken: dict[str, str] = {}
    for column, name in names.items():
        if taken.setdefault(name, column) != column:
            raise UserError(
                f"the list {file} has the columns {taken[name]} and {column}, which are one but "
                "for upper and lower case; remove one of them"
            )
    return names


def _rows_of_json(file: Path) -> list[dict[str, str]]:
    """The rows of a JSON list: objects, or paths alone."""
    problem = f"the list {file} is no JSON list of objects with the key path; correct it"
    advice = ", or leave it out, if it is no list of scans"
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(problem + advice) from error
    if not isinstance(content, list):
        raise UserError(problem + advice)
    rows = []
    for number, item in enumerate(content, 1):
        if isinstance(item, str):
            item = {"path": item}
        if not isinstance(item, dict):
            raise UserError(problem)
        row = {}
        for key, name in _lower_case(file, item).items():
            is_read = name in COLUMNS
            row[name] = _as_text(item[key], f"{key} in row {number} of {file}") if is_read else ""
        rows.append(row)
    return rows


def _as_text(value: object, of: str) -> str:
    """A value of a JSON list as text; null and NaN are empty.

    Args:
        value: text, a number or null.
        of: what it is, for the error line.
    Raises:
        UserError: it is something else.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{of} is {json.dumps(value)[:80]}; rule: text or a number")
    return str(value).strip()
