"""Index an archive: examine every scan of a folder in worker processes and write the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from tapct.base.exits import UserError
from tapct.data import formats
from tapct.data.ct_check import BODY_ABOVE, subsample
from tapct.data.digest import label_digest, voxel_digest
from tapct.data.discover import Source, find_sources
from tapct.data.duplicates import mirror_digest, refuse_duplicates
from tapct.data.ingest import read_source
from tapct.data.labels.counting import label_report, not_used
from tapct.data.labels.pairing import pair_labels
from tapct.data.labels.reading import read_labels_of
from tapct.data.manifest import ACCEPTED, REFUSED, UNKNOWN, Manifest, Row, write_table
from tapct.data.patient_table import patients_from_table
from tapct.data.patients import (
    STAND_IN,
    Known,
    PatientRules,
    check_regex,
    keyed_hash,
    parse_patient_from,
    patient_key,
    patients_of,
)
from tapct.data.plain_facts import failure, kernel, maker, without_names
from tapct.data.process_pool import map_unordered
from tapct.data.readers import DICOM, load_libraries
from tapct.types import Refused, ScanFacts, Volume


@dataclass(frozen=True)
class Examined(Row):
    """The row of an examined scan, with what is needed until the whole archive has been examined.

    Args:
        facts: facts of its header and side-car; None where it could not be read.
        mirror_digest: see `duplicates.mirror_digest`; empty where it could not be read.
    """

    facts: ScanFacts | None = None
    mirror_digest: str = ""


@dataclass(frozen=True)
class ExamineTask:
    """One scan for a worker process.

    Args:
        source: files of the scan.
        root: folder of the archive.
        labels: path of its label file or folder of masks, or None.
        key: secret of the keyed hashes of scans and patients.
        min_depth: fewest slices of an accepted scan.
        study_dates: whether the row has the whole date of the study, and not its year alone.
        ignore_labels: label values of voxels that nobody has labelled.
    """

    source: Source
    root: Path
    labels: Path | None
    key: bytes
    min_depth: int
    study_dates: bool = False
    ignore_labels: tuple[int, ...] = ()


def build_manifest(
    root: Path,
    out: Path,
    *,
    labels: Path | None = None,
    ignore_labels: Sequence[int] = (),
    patient_regex: str | None = None,
    patient_column: str | None = None,
    patient_from: str | None = None,
    study_dates: bool = False,
    min_depth: int = 1,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Index an archive and write the manifest.

    Every scan is read completely, and once. A scan that fails becomes a refused row. Of scans with
    the same voxels one is accepted, see `tapct.data.duplicates`. How a patient is identified: see
    `tapct.data.patients`.

    Args:
        root: folder of the archive.
        out: .parquet file to write; replaced in one step, so that there is never half a manifest.
        labels: folder with label maps; label maps in other places are found by name, see
            `tapct.data.labels.pairing`.
        ignore_labels: label values of voxels that nobody has labelled, e.g. -1; losses and metrics
            leave these voxels out.
        patient_regex: regular expression; group 1, searched in the path below the root, is the
            patient's identifier where the header holds none.
        patient_column: `FILE.csv:COLUMN`, a table with the patients; see `patient_table`.
        patient_from: `folder:N`, the N-th folder below the root is the patient; or `header`, a
            PatientID counts also where all studies have the same one.
        study_dates: whether the manifest has the whole date of a study, and not its year alone.
        min_depth: fewest slices of an accepted scan; others are refused as `too_few_slices`.
        workers: number of processes; 0 or 1 reads in this process.
        progress: function that is called with (scans done, scans in all).
    Returns:
        The manifest as written, with the counts of its labels.
    Raises:
        UserError: the folder is missing or holds no scan, an option about patients is wrong, or
            `out` cannot be written.
    """
    root, out = Path(root), Path(out)
    load_libraries()
    check_regex(patient_regex)
    folder, trusts_header = parse_patient_from(patient_from)
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
    column = {}
    if patient_column is not None:
        column = patients_from_table(
            patient_column, [scan.path.relative_to(root) for scan in scans]
        )
    key = patient_key(out.parent)
    patients = PatientRules(root, key, patient_regex, folder, trusts_header, column)
    ignore = tuple(ignore_labels)
    tasks = [
        ExamineTask(scan, root, pairs.label_of.get(scan.path), key, min_depth, study_dates, ignore)
        for scan in scans
    ]
    rows: dict[int, Examined] = {}
    for index, row in map_unordered(examine, tasks, workers, crashed_row):
        rows[index] = row
        if progress is not None:
            progress(len(rows), len(tasks))
    in_order = [rows[index] for index in range(len(tasks))]
    checked = refuse_duplicates(in_order, {row.id: row.mirror_digest for row in in_order})
    manifest = Manifest(
        with_patients(checked, in_order, scans, patients),
        root.resolve(),
        ignore_labels=ignore,
        label_report=label_report(pairs, checked, root),
        file=out,
    )
    write_table(manifest, out)
    return manifest


def with_patients(
    rows: Sequence[Row],
    examined: Sequence[Examined],
    scans: Sequence[Source],
    rules: PatientRules,
) -> tuple[Row, ...]:
    """The rows of an archive with their patients, which depend on the archive as a whole.

    Args:
        rows: rows as they will be written, but for the patient.
        examined: the same scans, as they were examined.
        scans: the same scans as sources.
        rules: how patients are identified.
    """
    known = [
        Known(scan.path, scan.kind == DICOM.name, row.facts, row.mirror_digest)
        for row, scan in zip(examined, scans)
    ]
    result = []
    for row, patient in zip(rows, patients_of(known, rules)):
        columns = {field.name: getattr(row, field.name) for field in fields(Row)}
        columns |= {"patient": patient.hash, "patient_from": patient.source}
        if patient.has_stand_in:
            columns["marks"] = ",".join(filter(None, (row.marks, STAND_IN)))
        result.append(Row(**columns))
    return tuple(result)


def examine(task: ExamineTask) -> Examined:
    """Read one scan and its labels; any failure becomes the reason in its row."""
    row = bare_row(task)  # refused, until all checks have passed
    try:
        num_bytes = sum(path.stat().st_size for path in task.source.files)
        row = replace(row, bytes=num_bytes)
        if not has_utf8_name(task):
            raise Refused("bad_name", "the path holds bytes that are not UTF-8; rename it")
        volume = read_source(task.source, task.key)
        row = with_facts(row, volume, task)
        if row.depth < task.min_depth:
            raise Refused(
                "too_few_slices",
                f"{row.depth} slices; rule: at least {task.min_depth} (--min-depth)",
            )
        row = with_labels(replace(row, status=ACCEPTED), task, volume)
        return replace(row, detail=nameless(row.detail, task))
    except Refused as error:
        return replace(row, reason=error.reason, detail=nameless(error.detail, task))
    except Exception as error:  # one scan must not end the index of a whole archive
        return replace(row, reason="unreadable", detail=failure(error))


def nameless(detail: str, task: ExamineTask) -> str:
    """A line about a scan without the names of its files: the columns of paths have them."""
    labels = () if task.labels is None else (task.labels,)
    return without_names(detail, task.root, (task.source.path, *task.source.files, *labels))


def crashed_row(task: ExamineTask) -> Examined:
    """The row of a scan that ended its worker process."""
    detail = "reading it ended the process (a reader library crashed, or memory ran out)"
    return replace(bare_row(task), reason="crashed", detail=detail)


def bare_row(task: ExamineTask) -> Examined:
    """The row of a scan that has not been read: its path and kind; its status is refused."""
    # Parquet holds text, so bytes of a path that are not UTF-8 are written as escapes
    path = os.fsencode(_relative_path(task)).decode("utf-8", "backslashreplace")
    # keyed: nobody without the key can test whether a known path is in a manifest or a store
    scan_id = keyed_hash(task.key, f"scan {path}")
    return Examined(id=scan_id, path=path, kind=task.source.kind, status=REFUSED)


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


def with_labels(row: Examined, task: ExamineTask, volume: Volume) -> Examined:
    """A row with path and digest of the scan's labels.

    Labels that cannot be used do not refuse the scan: its row gives the reason in `detail`.
    """
    if task.labels is None:
        return row
    try:
        found = read_labels_of(volume, task.labels, task.ignore_labels)
    except Refused as error:
        return replace(row, detail=not_used(task.labels.name, str(error)))
    path = os.path.relpath(task.labels.resolve(), task.root.resolve())
    if task.labels.is_relative_to(task.root):
        path = task.labels.relative_to(task.root).as_posix()
    notes = "".join(f"labels {task.labels.name}: {note}" for note in found.notes[:1])
    return replace(
        row,
        label_path=Path(path).as_posix(),
        label_digest=label_digest(found.label_map),
        detail="; ".join([notes, *found.notes[1:]]) if notes else "",
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
        study_date=volume.facts.study_date[: None if task.study_dates else 4],
        manufacturer=maker(volume.facts.manufacturer),
        kernel=kernel(volume.facts.kernel),
        sex=volume.facts.sex,
        age_years=volume.facts.age_years,
        hu_p005=float(p005),
        hu_p50=float(p50),
        hu_p995=float(p995),
        body_share=body.size / values.size,
        digest=voxel_digest(volume.hu_ZYX),
        facts=volume.facts,
        mirror_digest=mirror_digest(volume.hu_ZYX),
    )
