"""From the folder of a public data set to a store: index, pack, official split and targets.

    WORK/NAME/manifest.parquet    every scan of the data set, accepted or refused
    WORK/NAME/store/              the packed scans and labels
    WORK/NAME/scan_labels.csv     side of the official split and targets by scan, if there are any
    WORK/NAME/prepared.json       what these files were made from

Nothing is written into the folder of the data. A second call reads no scan again as long as no file
of the data set and no fact about it has changed.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import PRIVATE, write_atomically
from tapct.data.datasets.dataset import TEST, TRAIN, DataSet
from tapct.data.index.build import build_manifest, check_usable
from tapct.data.index.finding import matches_any
from tapct.data.index.report import lines_about
from tapct.data.labels.reading import UNNAMED
from tapct.data.manifest import Manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.store import Store
from tapct.data.scans.read_rules import MIN_DEPTH
from tapct.data.tables import ScanNames, read_table
from tapct.data.workers.process_pool import DEFAULT_LIMITS, ScanLimits

PATH_COLUMN, SIDE_COLUMN = "path", "split"
_MOST_FOLDERS_ABOVE = 3  # folders between --root and the data set, in which it is searched


@dataclass(frozen=True)
class PackedDataSet:
    """A data set that is ready to be evaluated.

    Args:
        store: folder of the store.
        scan_labels: CSV file with the official split and the targets; None without either.
    """

    store: Path
    scan_labels: Path | None


@dataclass(frozen=True)
class WorkFolder:
    """Paths in the work folder of one data set; nothing is read or made.

    Args:
        path: the folder, WORK/NAME.
    """

    path: Path

    @property
    def manifest(self) -> Path:
        """Every scan of the data set."""
        return self.path / "manifest.parquet"

    @property
    def store(self) -> Path:
        """The packed scans."""
        return self.path / "store"

    @property
    def scan_labels(self) -> Path:
        """Official split and targets."""
        return self.path / "scan_labels.csv"

    @property
    def prepared(self) -> Path:
        """What the other files were made from."""
        return self.path / "prepared.json"


@dataclass
class _Facts:
    """What tables say of the scans, by path.

    Args:
        sides: side of the official split.
        targets: target -> value.
        unused: number of rows that name no scan.
    """

    sides: dict[str, str] = field(default_factory=dict)
    targets: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    unused: int = 0


def prepare(
    dataset: DataSet,
    root: Path,
    work: Path,
    *,
    with_split: bool = True,
    workers: int = 0,
    limits: ScanLimits = DEFAULT_LIMITS,
    min_depth: int = MIN_DEPTH,
) -> PackedDataSet:
    """Index and pack a data set, and write down its official split and targets.

    Args:
        dataset: data set.
        root: folder of its files.
        work: parent of the work folders.
        with_split: whether the official split is needed.
        workers: number of processes; 0 reads in this process.
        limits: time and memory that one scan may take in a worker process.
        min_depth: fewest slices of an accepted scan.
    Raises:
        UserError: files of the data set are missing, no scan is accepted, or no label map belongs
            to one.
    """
    files = files_below(root) if root.is_dir() else {}
    check_layout(dataset, root, list(files), with_split=with_split)
    folder = WorkFolder(work / dataset.name)
    if root.resolve() in (work.resolve(), *work.resolve().parents):
        raise UserError(
            f"--work {work} lies in the folder of the data, into which nothing is written; give "
            "another folder"
        )
    digest = _digest(dataset, files, min_depth)
    manifest = _manifest_of(folder, digest, root)
    if manifest is None:
        manifest = _index(dataset, root, folder, workers, limits, min_depth)
        content = {"dataset": dataset.name, "files": digest}
        write_atomically(folder.prepared, json.dumps(content).encode(), mode=PRIVATE)
    _check_labelled(dataset, manifest)
    _pack(manifest, folder, workers, limits)
    facts = _facts_of(dataset, root, list(files), manifest, with_split=with_split)
    return PackedDataSet(folder.store, _write_scan_labels(folder, manifest, facts))


def files_below(root: Path) -> dict[str, tuple[int, int]]:
    """Path below a folder -> size and time of change, of all files in it except hidden ones."""
    found: dict[str, tuple[int, int]] = {}
    for parent, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            try:
                facts = path.stat()
            except OSError:  # a broken link
                continue
            if not name.startswith("."):
                found[path.relative_to(root).as_posix()] = (facts.st_size, facts.st_mtime_ns)
    return found


def check_layout(
    dataset: DataSet, root: Path, paths: Sequence[str], *, with_split: bool = True
) -> None:
    """Compare a folder with the layout of a data set, before anything is read.

    Args:
        dataset: data set.
        root: folder.
        paths: paths of all files below it.
        with_split: whether the official split is needed.
    Raises:
        UserError: scans, label maps, tables or a side of the official split are missing; one line
            with what was expected and where to ask for the data.
    """
    facts = dataset.facts
    if not root.is_dir():
        raise UserError(
            f"--root {root} is not a folder; {dataset.name} needs a folder with "
            f"{_listed(facts.scans)}; {dataset.where_to_ask()}"
        )
    needed = [
        ("scans", facts.scans),
        ("label maps", facts.masks),
        ("table with the official split", (facts.split.table,) if with_split else ()),
        ("table with labels of the scans", (facts.targets.table,)),
    ]
    if with_split:
        for side, patterns in facts.split.sides.items():
            if side in (TRAIN, TEST):
                needed.append((f"scans of the official {side} side", patterns))
    for what, patterns in needed:
        wanted = [pattern for pattern in patterns if pattern]
        if wanted and not any(matches_any(path, wanted) for path in paths):
            raise UserError(
                f"--root {root} has no {what} of {dataset.name}; expected {_listed(wanted)}"
                f"{_nearer_root(root, paths, wanted)}; {dataset.where_to_ask()}"
            )


def _listed(patterns: Sequence[str]) -> str:
    return " or ".join(patterns)


def _nearer_root(root: Path, paths: Sequence[str], patterns: Sequence[str]) -> str:
    """A folder below the root that has the layout, as a part of an error line; else empty."""
    for path in paths:
        parts = path.split("/")
        for depth in range(1, min(_MOST_FOLDERS_ABOVE, len(parts) - 1) + 1):
            if matches_any("/".join(parts[depth:]), patterns):
                return f" (did you mean --root {root.joinpath(*parts[:depth])}?)"
    return ""


def _digest(dataset: DataSet, files: Mapping[str, tuple[int, int]], min_depth: int) -> str:
    """Hash of all that manifest and store depend on: 32 hex digits."""
    facts = dataclasses.asdict(dataset.facts)
    content = json.dumps([facts, dataset.label_names, sorted(files.items()), min_depth])
    return hashlib.blake2b(content.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _manifest_of(folder: WorkFolder, digest: str, root: Path) -> Manifest | None:
    """The manifest of an earlier call; None where there is none, or files have changed since."""
    try:
        content = json.loads(folder.prepared.read_text(encoding="utf-8"))
        if content["files"] != digest:
            return None
        manifest = Manifest.read(folder.manifest, root)
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: it is made again
        return None
    console.say(f"{folder.manifest}: no file has changed since it was indexed")
    return manifest


def _index(
    dataset: DataSet,
    root: Path,
    folder: WorkFolder,
    workers: int,
    limits: ScanLimits,
    min_depth: int,
) -> Manifest:
    """Index the scans of a data set; arguments as in `prepare`."""
    facts = dataset.facts
    with console.progress_bar("index") as progress:
        manifest = build_manifest(
            root,
            folder.manifest,
            labels=root / facts.mask_folder if facts.mask_folder else None,
            only=facts.scans,
            label_names=dataset.label_names,
            patient_regex=facts.patient,
            min_depth=min_depth,
            workers=workers,
            limits=limits,
            progress=progress,
        )
    for line in lines_about(manifest, folder.manifest, min_depth):
        console.say_line(line)
    return manifest


def _check_labelled(dataset: DataSet, manifest: Manifest) -> None:
    """Refuse a data set without accepted scans, or without the label maps that it should have."""
    check_usable(manifest, None)
    if dataset.facts.masks and not any(row.label_path for row in manifest.accepted):
        raise UserError(
            f"no label map of {dataset.name} belongs to an accepted scan; expected "
            f"{_listed(dataset.facts.masks)}, with the names of the scans and on their grid; "
            f"{dataset.where_to_ask()}"
        )
    unnamed = [row for row in manifest.accepted if UNNAMED in row.detail]
    if unnamed:
        console.say(
            f"label maps with values that are no label of {dataset.name}: {len(unnamed)}; these "
            "values are called by their number; check that the files are of this data set; the "
            f"first one: {unnamed[0].label_path}: {unnamed[0].detail}"
        )


def _pack(manifest: Manifest, folder: WorkFolder, workers: int, limits: ScanLimits) -> None:
    """Pack the accepted scans that are not packed yet."""
    with console.progress_bar("pack") as progress:
        # the work folder belongs to this data set alone, so a changed archive replaces its store
        report = pack(
            manifest,
            folder.store,
            workers=workers,
            limits=limits,
            replace_store=True,
            progress=progress,
        )
    for line in report.lines():
        console.say_line(line)
    Store(folder.store)  # an index that cannot be read is reported here


def _facts_of(
    dataset: DataSet, root: Path, paths: Sequence[str], manifest: Manifest, *, with_split: bool
) -> _Facts:
    """Official split and targets of the accepted scans.

    Raises:
        UserError: a table lacks a column, or contradicts itself or another table.
    """
    scans = [row.path for row in manifest.accepted]
    facts, names = _Facts(), ScanNames(scans)
    split, targets = dataset.facts.split, dataset.facts.targets
    if with_split and split.table:
        _read_column(facts, _tables(root, paths, split.table), split.key, names, split.column)
    elif with_split:
        for scan in scans:
            for side, patterns in split.sides.items():
                if matches_any(scan, patterns):
                    facts.sides.setdefault(scan, side)
    if targets.table:
        _read_targets(facts, dataset, _tables(root, paths, targets.table), names)
    if targets.presence:
        for scan in scans:
            facts.targets[scan].setdefault(targets.presence, "0")
    if facts.unused:
        console.say(f"rows of tables of {dataset.name} without an accepted scan: {facts.unused}")
    return facts


def _tables(root: Path, paths: Sequence[str], pattern: str) -> list[Path]:
    return [root / path for path in paths if matches_any(path, [pattern])]


def _read_column(
    facts: _Facts, tables: Sequence[Path], key: str, names: ScanNames, column: str
) -> None:
    """Read the side of each scan from tables; arguments as in `_rows_of`.

    Raises:
        UserError: two rows give one scan different sides.
    """
    first_table: dict[str, Path] = {}
    for file in tables:
        for scan, row in _rows_of(facts, file, key, names, [column]):
            side = row[column].lower()
            if not side:
                continue
            if facts.sides.setdefault(scan, side) != side:
                raise UserError(
                    f"{first_table[scan].name} and {file.name} have {scan} on different sides of "
                    f"their splits ({facts.sides[scan]} and {side}); evaluate with one of these "
                    f"tables: eval.scan_labels={file}"
                )
            first_table.setdefault(scan, file)


def _read_targets(
    facts: _Facts, dataset: DataSet, tables: Sequence[Path], names: ScanNames
) -> None:
    """Read the targets of each scan from tables.

    Raises:
        UserError: no table has a target, or two rows give one scan different values.
    """
    rule, used = dataset.facts.targets, set()
    for file in tables:
        columns = read_table(file, "--root").columns
        wanted = rule.columns or [
            name for name in columns if name not in (rule.key, dataset.facts.split.column)
        ]
        for scan, row in _rows_of(facts, file, rule.key, names, []):
            if rule.presence:
                facts.targets[scan][rule.presence] = "1"
                used.add(rule.presence)
                continue
            for name in wanted:
                value = row.get(name, "")
                if value and facts.targets[scan].setdefault(name, value) != value:
                    raise UserError(
                        f"{file} gives {scan} a second value of {name}: {value!r} after "
                        f"{facts.targets[scan][name]!r}; keep one row per scan"
                    )
                used.update([name] if value else [])
    if not used and not rule.presence:
        raise UserError(
            f"no table {rule.table} of {dataset.name} has a value of {', '.join(rule.columns)} for "
            "an accepted scan; check that scans and tables are of the same release"
        )


def _rows_of(
    facts: _Facts, file: Path, key: str, names: ScanNames, columns: Sequence[str]
) -> list[tuple[str, dict[str, str]]]:
    """The rows of a table with the path of their scan; rows of other scans are counted.

    Args:
        facts: object that counts them.
        file: CSV file.
        key: column that names the scan.
        names: names of the accepted scans.
        columns: columns that the table must have.
    Raises:
        UserError: a column is missing, or several scans have the name of a row.
    """
    table = read_table(file, "--root")
    for name in (key, *columns):
        if name not in table.columns:
            raise UserError(
                f"{file} has no column {name}; its columns are {', '.join(table.columns) or 'none'}"
            )
    found: list[tuple[str, dict[str, str]]] = []
    for line, row in zip(table.numbers, table.rows):
        paths = names.paths_of(row[key])
        if len(paths) > 1:
            raise UserError(
                f"line {line} of {file} names {row[key]!r}, which several scans are called, e.g. "
                f"{' and '.join(sorted(paths)[:2])}; the data set has another layout than expected"
            )
        found.extend((path, row) for path in paths)
        facts.unused += not paths
    return found


def _write_scan_labels(folder: WorkFolder, manifest: Manifest, facts: _Facts) -> Path | None:
    """Write official split and targets as a table that `eval.scan_labels` reads."""
    targets = sorted({name for values in facts.targets.values() for name in values})
    if not targets and not facts.sides:
        folder.scan_labels.unlink(missing_ok=True)
        return None
    text = io.StringIO(newline="")
    sides = [SIDE_COLUMN] if facts.sides else []
    writer = csv.writer(text)
    writer.writerow([PATH_COLUMN, *sides, *targets])
    for row in manifest.accepted:
        values = facts.targets.get(row.path, {})
        side = [facts.sides.get(row.path, "")] if sides else []
        writer.writerow([row.path, *side, *(values.get(name, "") for name in targets)])
    write_atomically(folder.scan_labels, text.getvalue().encode(), mode=PRIVATE)
    return folder.scan_labels
