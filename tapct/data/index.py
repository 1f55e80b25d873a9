"""Index an archive: examine every scan of a folder in worker processes and write the manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tapct.base.exits import UserError, single_line
from tapct.data import formats
from tapct.data.check_rules import DEFAULT_RULES, CheckRules
from tapct.data.ct_check import BODY_ABOVE, subsample
from tapct.data.digest import voxel_digest
from tapct.data.discover import Source, find_sources
from tapct.data.geometry import check_same_grid
from tapct.data.ingest import read_labels, read_source
from tapct.data.labels.pairing import pair_labels
from tapct.data.manifest import ACCEPTED, REFUSED, UNKNOWN, Manifest, Row, write_table
from tapct.data.patients import PatientRules, check_regex, patient_key
from tapct.data.process_pool import map_unordered
from tapct.data.readers import load_libraries
from tapct.data.readers.raw import MAX_TEXT
from tapct.types import Refused, Volume


@dataclass(frozen=True)
class ExamineTask:
    """One scan for a worker process.

    Args:
        source: files of the scan.
        root: folder of the archive.
        labels: path of its label map, or None.
        patients: how its patient is identified.
        min_depth: fewest slices of an accepted scan.
        rules: thresholds of the checks of values.
    """

    source: Source
    root: Path
    labels: Path | None
    patients: PatientRules
    min_depth: int
    rules: CheckRules = DEFAULT_RULES


def build_manifest(
    root: Path,
    out: Path,
    *,
    labels: Path | None = None,
    patient_regex: str | None = None,
    min_depth: int = 1,
    rules: CheckRules = DEFAULT_RULES,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Index an archive and write the manifest.

    Every scan is read completely, and once. A scan that fails becomes a refused row. Of scans with
    the same voxels the first in the order of paths is accepted, and the others are refused as
    `duplicate`. How a patient is identified: see `tapct.data.patients`.

    Args:
        root: folder of the archive.
        out: .parquet file to write; replaced in one step, so that there is never half a manifest.
        labels: folder with label maps; label maps in other places are found by name, see
            `tapct.data.labels.pairing`.
        patient_regex: regular expression; group 1, searched in the path below the root, is the
            patient's identifier where the header holds none.
        min_depth: fewest slices of an accepted scan; others are refused as `too_few_slices`.
        rules: thresholds of the checks of values, see docs/ingest.md.
        workers: number of processes; 0 or 1 reads in this process.
        progress: function that is called with (scans done, scans in all).
    Returns:
        The manifest as written.
    Raises:
        UserError: the folder is missing or holds no scan, the regex is bad, or `out` cannot be
            written.
    """
    root, out = Path(root), Path(out)
    load_libraries()
    check_regex(patient_regex)
    if out.is_dir():
        raise UserError(
            f"{out} is a folder; give the file to write, such as {out / 'manifest.parquet'}"
        )
    sources = find_sources(root)
    if labels is not None and not labels.is_dir():
        raise UserError(f"labels folder {labels} does not exist or is not a folder; check the path")
    pairs = pair_labels(sources, root, labels)
    scans = [source for source in sources if source.path not in pairs.label_files]
    if not scans:
        raise UserError(f"{root} holds no {formats.listed('or')} scans; check the path")
    patients = PatientRules(root, patient_key(out.parent), patient_regex)
    tasks = [
        ExamineTask(scan, root, pairs.label_of.get(scan.path), patients, min_depth, rules)
        for scan in scans
    ]
    rows: dict[int, Row] = {}
    for index, row in map_unordered(examine, tasks, workers, crashed_row):
        rows[index] = row
        if progress is not None:
            progress(len(rows), len(tasks))
    in_order = [rows[index] for index in range(len(tasks))]
    manifest = Manifest(refuse_duplicates(in_order), root.resolve())
    write_table(manifest, out)
    return manifest


def examine(task: ExamineTask) -> Row:
    """Read one scan and its labels; any failure becomes the reason in its row."""
    row = bare_row(task)  # refused, until all checks have passed
    try:
        num_bytes = sum(path.stat().st_size for path in task.source.files)
        row = replace(row, bytes=num_bytes)
        if not has_utf8_name(task):
            raise Refused("bad_name", "the path holds bytes that are not UTF-8; rename it")
        volume = read_source(task.source, task.patients.key, task.rules)
        row = with_facts(
            row, volume, task.patients.patient_of(task.source.path, volume.facts.patient)
        )
        if row.depth < task.min_depth:
            raise Refused(
                "too_few_slices",
                f"{row.depth} slices; rule: at least {task.min_depth} (--min-depth)",
            )
        label_path, problem = checked_labels(task, volume)
        # labels that cannot be used do not refuse the scan; its row says why it has none
        return replace(row, status=ACCEPTED, label_path=label_path, detail=problem)
    except Refused as error:
        return replace(row, reason=error.reason, detail=error.detail)
    except Exception as error:  # one scan must not end the index of a whole archive
        detail = single_line(f"{type(error).__name__}: {error}", MAX_TEXT)
        return replace(row, reason="unreadable", detail=detail)


def crashed_row(task: ExamineTask) -> Row:
    """The row of a scan that ended its worker process."""
    detail = "reading it ended the process (a reader library crashed, or memory ran out)"
    return replace(bare_row(task), reason="crashed", detail=detail)


def bare_row(task: ExamineTask) -> Row:
    """The row of a scan that has not been read: its path and kind; its status is refused."""
    # Parquet holds text, so bytes of a path that are not UTF-8 are written as escapes
    path = os.fsencode(_relative_path(task)).decode("utf-8", "backslashreplace")
    scan_id = hashlib.blake2b(path.encode(), digest_size=8).hexdigest()
    return Row(id=scan_id, path=path, kind=task.source.kind, status=REFUSED)


def has_utf8_name(task: ExamineTask) -> bool:
    """Whether the path of a scan is UTF-8, so that the manifest can hold it as it is."""
    try:
        os.fsencode(_relative_path(task)).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _relative_path(task: ExamineTask) -> str:
    """Path of the scan below the root, with /."""
    return task.source.path.relative_to(task.root).as_posix()


def checked_labels(task: ExamineTask, volume: Volume) -> tuple[str, str]:
    """Path of the scan's label map, and why it cannot be used.

    One of the two is empty: the reason where the label map can be used, else the path. Both are
    empty where the scan has no label map.
    """
    if task.labels is None:
        return "", ""
    try:
        check_same_grid(volume, read_labels(task.labels))
    except Refused as error:
        return "", f"labels {task.labels.name} not used: {error}"
    if task.labels.is_relative_to(task.root):
        return task.labels.relative_to(task.root).as_posix(), ""
    return str(task.labels.resolve()), ""


def with_facts(row: Row, volume: Volume, patient: str) -> Row:
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
        patient=patient,
        study_date=volume.facts.study_date,
        manufacturer=volume.facts.manufacturer,
        kernel=volume.facts.kernel,
        sex=volume.facts.sex,
        age_years=volume.facts.age_years,
        hu_p005=float(p005),
        hu_p50=float(p50),
        hu_p995=float(p995),
        body_share=body.size / values.size,
        digest=voxel_digest(volume.hu_ZYX),
        marks=",".join(volume.marks),
    )


def refuse_duplicates(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Refuse accepted scans whose voxels equal those of an earlier one."""
    first_with: dict[str, Row] = {}  # digest of the voxels -> first scan with it
    checked = []
    for row in rows:
        if row.status == ACCEPTED:
            first = first_with.setdefault(row.digest, row)
            if first is not row:
                detail = f"the same voxels as {first.id} ({first.path})"
                row = replace(row, status=REFUSED, reason="duplicate", detail=detail)
        checked.append(row)
    assert len({row.id for row in checked}) == len(checked), "64-bit ids of two paths collide"
    return tuple(checked)
