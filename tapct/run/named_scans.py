"""The scans that `tapct embed` turns into one vector each, named by the case IDs of the user."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapct.base.exits import UserError
from tapct.data.index.share import WHOLE, Share
from tapct.data.labels.pairing import LabelPairs, pair_labels
from tapct.data.readers import load_libraries, stem_of
from tapct.data.search.discover import DICOM_OBJECT, Source, search
from tapct.data.tables import ScanNames, Table, read_table

KEY_COLUMNS = ("case_id", "id", "path")
_SUFFIXES = (".nii.gz", ".nii", ".h5")  # the challenge's tables name cases with them or without


@dataclass(frozen=True)
class NamedScan:
    """One scan and its mask.

    Args:
        id: case ID, the name of its vector.
        source: files of the scan.
        mask: label file or folder of masks; None without one.
    """

    id: str
    source: Source
    mask: Path | None = None

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


def find_cases(given: Path, root: Path | None, masks: Path | None) -> NamedScans:
    """Find the scans to embed.

    Args:
        given: folder of scans, whose names are the case IDs, or a CSV file with case IDs.
        root: folder of the scans that the table names; None for the folder of the table.
        masks: folder with label maps that have the names of the scans.
    Raises:
        UserError: a path is missing, there is no scan, or two cases have one ID.
    """
    is_table = given.suffix.lower() in (".csv", ".tsv")
    if not given.exists():
        raise UserError(f"{given} does not exist; give a folder of scans or a CSV file of case IDs")
    if is_table == given.is_dir():
        raise UserError(
            f"{given} is neither a folder of scans nor a CSV file of case IDs; a single scan is "
            "written with --format npz"
        )
    if root is not None and not is_table:
        raise UserError(f"--root {root} is the folder of the scans of a CSV file; {given} is none")
    if masks is not None and not masks.is_dir():
        raise UserError(f"--masks {masks} is not a folder; give the folder of the label maps")
    folder = (root or given.parent) if is_table else given
    if not folder.is_dir():
        raise UserError(f"--root {folder} is not a folder; give the folder of the scans")
    scans = _scans_in(folder, masks)
    return (
        _named_by(read_table(given, "the table of cases"), folder, scans)
        if is_table
        else (_named_by_files(scans))
    )


def _scans_in(folder: Path, masks: Path | None) -> list[NamedScan]:
    """All scans of a folder with their masks; their IDs are the file names."""
    load_libraries()
    sources = search(folder).sources
    pairs = pair_labels(sources, folder, masks)
    scans = []
    for source in sources:
        if source.path not in pairs.label_files and source.kind != DICOM_OBJECT:
            name = stem_of(source.path) if source.path != folder else folder.resolve().name
            scans.append(NamedScan(name, source, _mask_of(source, pairs, masks)))
    if not scans:
        raise UserError(f"{folder} holds no scans; check the path")
    return scans


def _mask_of(source: Source, pairs: LabelPairs, masks: Path | None) -> Path | None:
    """The label map of a scan in the folder of the masks."""
    found = pairs.label_of.get(source.path)
    if masks is None or found is None or masks.resolve() not in found.resolve().parents:
        return None
    return found


def _named_by_files(scans: Sequence[NamedScan]) -> NamedScans:
    """The scans of a folder, each under its file name.

    Raises:
        UserError: two scans have one file name.
    """
    first: dict[str, NamedScan] = {}
    for case in scans:
        other = first.setdefault(case.id, case)
        if other is not case:
            raise UserError(
                f"{other.source.path} and {case.source.path} have the same case ID {case.id}, and "
                "its vector can be only one of them; rename one, or name the scans in a CSV file"
            )
    return NamedScans(tuple(first.values()))


def _named_by(table: Table, folder: Path, scans: Sequence[NamedScan]) -> NamedScans:
    """The scans that a table names, each under the ID in the table.

    Raises:
        UserError: no column names cases, an ID cannot be a file name, or means several scans.
    """
    by_lower = {name.lower(): name for name in reversed(table.columns)}
    keys = [by_lower[name] for name in KEY_COLUMNS if name in by_lower]
    if not keys:
        raise UserError(
            f"{table.file} has no column that names the cases; rule: one of "
            f"{', '.join(KEY_COLUMNS)}; its columns are {', '.join(table.columns) or 'none'}"
        )
    by_path = {case.source.path.relative_to(folder).as_posix(): case for case in scans}
    names = ScanNames(by_path)
    found: dict[str, NamedScan] = {}
    missing: list[str] = []
    for line, row in zip(table.numbers, table.rows):
        text = row[keys[0]]
        case_id = _without_suffix(text.rpartition("/")[2] if keys[0].lower() == "path" else text)
        if not case_id or "/" in case_id or case_id.startswith("."):
            raise UserError(
                f"line {line} of {table.file}: {keys[0]} {text!r} cannot be the name of a file"
            )
        paths = names.paths_of(text) or names.paths_of(_without_suffix(text))
        if len(paths) > 1:
            raise UserError(
                f"line {line} of {table.file}: several scans are called {text!r}, e.g. "
                f"{' and '.join(sorted(paths)[:2])}; name them by their paths in a column `path`"
            )
        for path in paths:
            case = replace(by_path[path], id=case_id)
            if found.setdefault(case_id, case).source != case.source:
                raise UserError(
                    f"line {line} of {table.file}: case ID {case_id} already means another scan"
                )
        if not paths and case_id not in missing:
            missing.append(case_id)
    if not found:
        raise UserError(
            f"none of the {len(table.rows)} rows of {table.file} names one of the "
            f"{len(scans)} scans in {folder}; give their folder with --root"
        )
    return NamedScans(tuple(found.values()), tuple(missing))


def _without_suffix(name: str) -> str:
    """A case ID without the suffix of a file."""
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name
