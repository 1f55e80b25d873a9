"""Index an archive: examine every scan of a folder in worker processes and write the manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tapct.base.exits import UserError
from tapct.data import discover, geometry, ingest, patients
from tapct.data.ct_check import BODY_ABOVE, sample
from tapct.data.digest import voxel_digest
from tapct.data.labels.pairing import pair_labels
from tapct.data.manifest import _NAN, ACCEPTED, REFUSED, Manifest, Row, write_table
from tapct.data.patients import check_regex, name_of_patient, patient_key
from tapct.data.readers import load_libraries
from tapct.data.readers.raw import one_line
from tapct.data.workers import map_unordered
from tapct.types import Refused, Volume


@dataclass(frozen=True)
class _Job:
    """One source for a worker."""

    source: discover.Source
    root: Path
    labels: Path | None
    key: bytes
    patient_regex: str | None
    min_depth: int


def build(
    root: Path,
    out: Path,
    *,
    labels: Path | None = None,
    patient_regex: str | None = None,
    min_depth: int = 1,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Index an archive and write the manifest.

    Every scan is read once and whole. A scan that fails becomes a refused row. Of scans with the
    same voxels the first in the order of paths is kept, the others are refused as `duplicate`. A
    patient is known by PatientID, else by `patient_regex`, else by the stem of the file or DICOM
    folder; a stem without a digit (`s0001/ct.nii.gz`) is no name of a patient, so the nearest
    folder with a digit is taken, else the whole path.

    Args:
        root: folder of the archive.
        out: .parquet file to write; replaced in one step, so that there is never half a manifest.
        labels: folder with label maps; other places are found by rule
            (`tapct.data.labels.pairing`).
        patient_regex: its first group, searched in the path below the root, names the patient.
        min_depth: scans with fewer slices are refused as `too_few_slices`.
        workers: processes; 0 or 1 reads in this process.
        progress: called with (scans done, scans in all).
    Returns:
        The manifest as written.
    Raises:
        UserError: no such folder, nothing in it, a bad regex, or `out` cannot be written.
    """
    root, out = Path(root), Path(out)
    load_libraries()
    check_regex(patient_regex)
    if out.is_dir():
        raise UserError(
            f"{out} is a folder; give the file to write, such as {out / 'manifest.parquet'}"
        )
    sources = discover.find_sources(root)
    if labels is not None and not Path(labels).is_dir():
        raise UserError(f"labels folder {labels} does not exist or is no folder; check the path")
    label_of, are_labels = pair_labels(sources, root, None if labels is None else Path(labels))
    sources = [source for source in sources if source.path not in are_labels]
    if not sources:
        raise UserError(f"{root} holds no NIfTI, NRRD, MetaImage or DICOM scans; check the path")
    key = patient_key(out.parent)
    jobs = [_Job(s, root, label_of.get(s.path), key, patient_regex, min_depth) for s in sources]
    rows: dict[int, Row] = {}
    for index, row in map_unordered(_examine, jobs, workers, _crashed):
        rows[index] = row
        if progress is not None:
            progress(len(rows), len(jobs))
    manifest = Manifest(
        _refuse_duplicates([rows[index] for index in range(len(jobs))]), root.resolve()
    )
    write_table(manifest, out)
    return manifest


def _relative(job: _Job) -> str:
    """Path below the root with /; bytes that are no UTF-8 are written as escapes, since Parquet
    holds text.
    """
    relative = job.source.path.relative_to(job.root).as_posix()
    return os.fsencode(relative).decode("utf-8", "backslashreplace")


def _bare_row(job: _Job) -> Row:
    relative = _relative(job)
    identity = hashlib.blake2b(relative.encode(), digest_size=8).hexdigest()
    return Row(id=identity, path=relative, kind=job.source.kind)


def _crashed(job: _Job) -> Row:
    """The row of a scan that ended its worker."""
    detail = "reading it ended the process (crash of a reader library, or out of memory)"
    return replace(_bare_row(job), reason="crashed", detail=detail)


def _examine(job: _Job) -> Row:
    """Read one scan and its labels; whatever goes wrong becomes the row's reason."""
    row = _bare_row(job)
    try:
        row = replace(row, bytes=sum(path.stat().st_size for path in job.source.files))
        if os.fsencode(job.source.path.relative_to(job.root).as_posix()) != row.path.encode():
            raise Refused("bad_name", "the path holds bytes that are no UTF-8; rename it")
        volume = ingest.read_source(job.source, job.key)
        row = _with_facts(row, volume, job)
        if row.depth < job.min_depth:
            raise Refused(
                "too_few_slices",
                f"{row.depth} slices; rule: at least {job.min_depth} (--min-depth)",
            )
        label_path, complaint = _labels(job, volume)
        return replace(row, status=ACCEPTED, label_path=label_path, detail=complaint)
    except Refused as error:
        return replace(row, reason=error.reason, detail=error.detail)
    except (
        Exception
    ) as error:  # one scan must not end an index of many; the row tells what happened
        return replace(
            row, reason="unreadable", detail=one_line(f"{type(error).__name__}: {error}")
        )


def _labels(job: _Job, volume: Volume) -> tuple[str, str]:
    """Path of the scan's labels, or an empty one and why they are not used."""
    if job.labels is None:
        return "", ""
    try:
        geometry.check_same_grid(volume, ingest.read_labels(job.labels))
    except Refused as error:
        return "", f"labels {job.labels.name} not used: {error}"
    if job.labels.is_relative_to(job.root):
        return job.labels.relative_to(job.root).as_posix(), ""
    return str(job.labels.resolve()), ""


def _with_facts(row: Row, volume: Volume, job: _Job) -> Row:
    depth, height, width = volume.hu_ZYX.shape
    values = sample(volume.hu_ZYX)
    body = values[values > BODY_ABOVE]
    p005, p50, p995 = np.percentile(body, (0.5, 50, 99.5)) if body.size else (_NAN, _NAN, _NAN)
    facts = volume.facts
    return replace(
        row,
        depth=depth,
        height=height,
        width=width,
        spacing_z_mm=volume.spacing_mm[0],
        spacing_y_mm=volume.spacing_mm[1],
        spacing_x_mm=volume.spacing_mm[2],
        patient=facts.patient
        or patients.keyed_hash(
            job.key, name_of_patient(job.source.path, job.root, job.patient_regex)
        ),
        study_date=facts.study_date,
        manufacturer=facts.manufacturer,
        kernel=facts.kernel,
        sex=facts.sex,
        age_years=facts.age_years,
        hu_p005=float(p005),
        hu_p50=float(p50),
        hu_p995=float(p995),
        body_share=body.size / values.size,
        digest=voxel_digest(volume.hu_ZYX),
    )


def _refuse_duplicates(rows: list[Row]) -> tuple[Row, ...]:
    """Keep the first of scans with equal voxels."""
    first: dict[str, Row] = {}
    kept = []
    for row in rows:
        known = first.setdefault(row.digest, row) if row.status == ACCEPTED else row
        if known is not row:
            detail = f"the same voxels as {known.id} ({known.path})"
            row = replace(row, status=REFUSED, reason="duplicate", detail=detail)
        kept.append(row)
    assert len({row.id for row in kept}) == len(kept), "64-bit ids of two paths collide"
    return tuple(kept)
