"""The row of one scan: read it and its labels, and describe them. This runs in a worker process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tapct.data.checks.ct_check import BODY_ABOVE, subsample
from tapct.data.digest import label_digest, voxel_digest
from tapct.data.index.duplicates import mirror_digest
from tapct.data.index.examined import Examined
from tapct.data.index.label_counts import not_used, path_from
from tapct.data.labels.merging import CONTRADICTORY
from tapct.data.labels.reading import read_labels_of
from tapct.data.manifest import ACCEPTED, REFUSED, UNKNOWN
from tapct.data.patients import near_copies
from tapct.data.patients.key import keyed_hash
from tapct.data.scans.ingest import OUT_OF_MEMORY, read_source
from tapct.data.scans.plain_facts import failure as failure_line
from tapct.data.scans.plain_facts import kernel, maker, without_names
from tapct.data.scans.read_rules import PLAIN, ReadRules
from tapct.data.search.discover import LATE, Source
from tapct.data.workers.process_pool import Failure
from tapct.types import Refused, Volume

AIR_BELOW = -900  # HU: air, and no lung


@dataclass(frozen=True)
class ScanRules:
    """What holds for all scans of an archive while they are examined.

    Args:
        root: folder of the archive.
        key: secret of the keyed hashes of scans and patients.
        min_depth: fewest slices of an accepted scan.
        accept: what is accepted beyond plain scans.
        study_dates: whether the row has the whole date of the study, and not its year alone.
        ignore_labels: label values of voxels that nobody has labelled.
        label_names: label names of a data set, which replace those of the files.
    """

    root: Path
    key: bytes
    min_depth: int
    accept: ReadRules = PLAIN
    study_dates: bool = False
    ignore_labels: tuple[int, ...] = ()
    label_names: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class ExamineTask:
    """One scan for a worker process.

    Args:
        source: files of the scan.
        rules: what holds for all scans.
        labels: path of its label file or folder of masks, or None.
        more_labels: paths of the DICOM objects that are merged with `labels`.
        num_other_labels: number of further label maps that fit the scan and are not used.
        split: part of the data set that a list gives, see `Row`.
        label_problem: reason for which the labels cannot be used although nobody has read them;
            empty for most.
        known: row of the scan without its labels, from the journal, so that only the labels are
            read; None to read the scan.
    """

    source: Source
    rules: ScanRules
    labels: Path | None
    more_labels: tuple[Path, ...] = ()
    num_other_labels: int = 0
    split: str = ""
    label_problem: str = ""
    known: Examined | None = None


def examine(task: ExamineTask) -> Examined:
    """Read one scan and its labels; any failure becomes the reason in its row."""
    row = bare_row(task)  # refused, until all checks have passed
    try:
        if task.known is not None:
            row = with_path(task.known, task)
            row = with_labels(row, task, grid_of(row))
            return replace(row, detail=nameless(row.detail, task))
        row = replace(row, bytes=bytes_of(task))
        if not all(map(is_utf8, _paths_below(task))):
            raise Refused("bad_name", "the path holds bytes that are not UTF-8; rename it")
        volume = read_source(task.source, task.rules.key, task.rules.accept)
        row = with_facts(row, volume, task)
        if row.depth < task.rules.min_depth:
            raise Refused(
                "too_few_slices",
                f"{row.depth} slices; rule: at least {task.rules.min_depth} (--min-depth)",
            )
        row = with_labels(replace(row, status=ACCEPTED), task, volume)
        return replace(row, detail=nameless(row.detail, task))
    except Refused as error:
        if error.reason == OUT_OF_MEMORY:
            raise MemoryError(error.detail) from error  # the pool tries it again with more
        return replace(row, reason=error.reason, detail=nameless(error.marked, task))
    except MemoryError:
        raise
    except Exception as error:  # one scan must not end the index of a whole archive
        return replace(row, reason="unreadable", detail=failure_line(error))


def with_path(known: Examined, task: ExamineTask) -> Examined:
    """A row of the journal with what the task gives: its id, path, kind, files and split."""
    bare = bare_row(task)
    of_task = {name: getattr(bare, name) for name in ("id", "path", "kind", "file_paths", "split")}
    return replace(known, **of_task)


def grid_of(row: Examined) -> Volume:
    """The grid of a scan as a volume of air without memory: reading labels needs no more."""
    x, y, z = (row.directions[start : start + 3] for start in (0, 3, 6))
    return Volume(
        np.broadcast_to(np.int16(0), (row.depth, row.height, row.width)),
        (row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm),
        origin_mm=(row.origin_mm[0], row.origin_mm[1], row.origin_mm[2]),
        directions=((x[0], x[1], x[2]), (y[0], y[1], y[2]), (z[0], z[1], z[2])),
    )


def label_paths(task: ExamineTask) -> list[str]:
    """Paths of the labels of a scan relative to the archive; empty without labels."""
    if task.labels is None:
        return []
    return [path_from(task.rules.root, labels) for labels in (task.labels, *task.more_labels)]


def nameless(detail: str, task: ExamineTask) -> str:
    """A line about a scan without the names of its files: the columns of paths have them."""
    if not detail:
        return detail  # a series may have thousands of names
    labels = () if task.labels is None else (task.labels, *task.more_labels)
    return without_names(detail, task.rules.root, (task.source.path, *task.source.files, *labels))


def bytes_of(task: ExamineTask) -> int:
    """Bytes of the files of a scan; a file that is gone counts as empty."""
    num_bytes = 0
    if task.source.reason == LATE:
        return num_bytes  # asking for its size may never return, and this process would wait
    for path in task.source.files:
        with contextlib.suppress(OSError):
            num_bytes += path.stat().st_size
    return num_bytes


def bytes_to_read(task: ExamineTask) -> int:
    """Bytes of the files of a scan and of its labels, for the time that reading them may take."""
    num_bytes = bytes_of(task) if task.known is None else 0
    if task.labels is not None and not task.label_problem:
        with contextlib.suppress(OSError):
            files = (*task.labels.iterdir(),) if task.labels.is_dir() else (task.labels,)
            files += task.more_labels
            num_bytes += sum(file.stat().st_size for file in files)
    return num_bytes


def failed_row(task: ExamineTask, failure: Failure) -> Examined:
    """The row of a scan whose worker process has no result."""
    detail = nameless(failure.detail, task)
    return replace(bare_row(task), bytes=bytes_of(task), reason=failure.reason, detail=detail)


def bare_row(task: ExamineTask) -> Examined:
    """The row of a scan that has not been read: its path and kind; its status is refused."""
    # Parquet holds text, so bytes of a path that are not UTF-8 are written as escapes
    path = _escaped(task, task.source.path)
    # keyed: nobody without the key can test whether a known path is in a manifest or a store
    scan_id = keyed_hash(task.rules.key, f"scan {path}")
    files = task.source.files
    file_paths = () if files == (task.source.path,) else tuple(_escaped(task, f) for f in files)
    return Examined(
        *(scan_id, path, task.source.kind, REFUSED), file_paths=file_paths, split=task.split
    )


def _escaped(task: ExamineTask, file: Path) -> str:
    """Path of a file below the root, as text that Parquet can hold."""
    relative = file.relative_to(task.rules.root).as_posix()
    return os.fsencode(relative).decode("utf-8", "backslashreplace")


def _paths_below(task: ExamineTask) -> list[Path]:
    """The paths of a scan below the root: its own, and those of its files."""
    return [path.relative_to(task.rules.root) for path in (task.source.path, *task.source.files)]


def is_utf8(path: Path | str) -> bool:
    """Whether a path is UTF-8, so that the manifest can hold it as it is."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def with_labels(row: Examined, task: ExamineTask, volume: Volume) -> Examined:
    """A row with path and digest of the scan's labels.

    Labels that cannot be used do not refuse the scan: its row gives the reason in `detail`.
    """
    if task.labels is None:
        return row
    paths = label_paths(task)
    num_found = task.num_other_labels + 1
    choice = f"its labels: the first of {num_found} label maps is used" if num_found > 1 else ""
    if task.label_problem:
        line = not_used(task.label_problem)
        return replace(row, detail="; ".join(filter(None, (line, choice))))
    try:
        if not all(map(is_utf8, paths)):
            raise Refused("bad_name", "their path holds bytes that are not UTF-8; rename it")
        found = read_labels_of(
            volume, task.labels, task.rules.ignore_labels, task.more_labels, task.rules.label_names
        )
    except Refused as error:
        if error.reason == OUT_OF_MEMORY:
            raise
        line = not_used(f"{error.reason}: {error.marked}")
        contradiction = error.detail if error.reason == CONTRADICTORY else ""
        # the reason comes first, where `label_report` counts it
        detail = "; ".join(filter(None, (line, choice)))
        return replace(row, detail=detail, contradiction=contradiction)
    notes = "".join(f"its labels: {note}" for note in found.notes[:1])
    return replace(
        row,
        label_path=paths[0],
        merged_labels=tuple(paths[1:]),
        label_digest=label_digest(found.label_map),
        detail="; ".join(filter(None, (notes, *found.notes[1:], choice))),
    )


def with_facts(row: Examined, volume: Volume, task: ExamineTask) -> Examined:
    """A row with the grid, HU statistics, digest and header facts of its scan."""
    depth, height, width = volume.hu_ZYX.shape
    values = subsample(volume.hu_ZYX)
    body = values[values > BODY_ABOVE]
    p005 = p50 = p995 = UNKNOWN
    if body.size:
        p005, p50, p995 = np.percentile(body, (0.5, 50, 99.5))
    return replace(
        row,
        depth=depth,
        height=height,
        width=width,
        spacing_z_mm=volume.spacing_mm[0],
        spacing_y_mm=volume.spacing_mm[1],
        spacing_x_mm=volume.spacing_mm[2],
        origin_mm=tuple(map(float, volume.origin_mm)),
        directions=tuple(float(part) for axis in volume.directions for part in axis),
        study_date=volume.facts.study_date[: None if task.rules.study_dates else 4],
        manufacturer=maker(volume.facts.manufacturer),
        kernel=kernel(volume.facts.kernel),
        sex=volume.facts.sex,
        age_years=volume.facts.age_years,
        hu_p005=float(p005),
        hu_p50=float(p50),
        hu_p995=float(p995),
        body_share=body.size / values.size,
        digest=voxel_digest(volume.hu_ZYX),
        marks=",".join(volume.marks),
        lossy_ratio=volume.facts.lossy_ratio,
        uid=volume.facts.clues.series,
        hu_min=float(volume.hu_ZYX.min()),
        hu_max=float(volume.hu_ZYX.max()),
        air_share=float(np.mean(values < AIR_BELOW)),
        **dataclasses.asdict(volume.facts.technique),
        facts=volume.facts,
        mirror_digest=mirror_digest(volume.hu_ZYX),
        sketch=near_copies.sketch(volume.hu_ZYX),
    )
