"""A folder becomes a table: one row per series, accepted with facts or refused with the reason (Parquet).

The manifest holds no patient identifier, only hashes keyed with a secret that stays beside it (`.patient_key`, mode
0600, or the environment's TAPCT_PATIENT_KEY). Paths are kept as they are: an archive that names its files after
patients is not made anonymous by this.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from tapct.data import ingest
from tapct.data.judge import BODY_ABOVE, sample
from tapct.data.pairing import pair_labels
from tapct.data.readers import load_libraries
from tapct.data.readers.raw import one_line
from tapct.data.workers import map_unordered
from tapct.types import Refused, UserError, Volume

SCHEMA = "1"
KEY_FILE = ".patient_key"
KEY_VARIABLE = "TAPCT_PATIENT_KEY"
ACCEPTED, REFUSED = "accepted", "refused"
_NAN = float("nan")
_ARROW = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64()}


@dataclass(frozen=True)
class Row:
    """One series of the archive.

    Args:
        id: 16 hex digits from the path below the root; unchanged when the archive moves.
        path: file or DICOM folder below the root (the first file of a series that shares its folder with others).
        kind: nifti, nrrd, meta, dicom.
        status: accepted or refused.
        reason: code of the rule that refused it, else empty.
        detail: one line: why it was refused, or why its labels are not used.
        depth, height, width: voxels along Z, Y, X; 0 where unknown.
        spacing_z_mm, spacing_y_mm, spacing_x_mm: mm; NaN where unknown.
        patient: keyed hash.
        study_date: YYYYMMDD or empty.
        manufacturer, kernel: as the header says.
        sex: M, F, O or empty.
        age_years: years, NaN where unknown.
        label_path: below the root, or absolute where it lies elsewhere; empty where there is none on the scan's grid.
        hu_p005, hu_p50, hu_p995: 0.5, 50 and 99.5 percentile in HU of the body (voxels above -500 HU).
        body_share: share of voxels above -500 HU; like the percentiles from a strided subsample.
        bytes: size on disk.
        digest: of shape and voxels after reading; equal for one scan in two formats.
    """

    id: str
    path: str
    kind: str
    status: str = REFUSED
    reason: str = ""
    detail: str = ""
    depth: int = 0
    height: int = 0
    width: int = 0
    spacing_z_mm: float = _NAN
    spacing_y_mm: float = _NAN
    spacing_x_mm: float = _NAN
    patient: str = ""
    study_date: str = ""
    manufacturer: str = ""
    kernel: str = ""
    sex: str = ""
    age_years: float = _NAN
    label_path: str = ""
    hu_p005: float = _NAN
    hu_p50: float = _NAN
    hu_p995: float = _NAN
    body_share: float = _NAN
    bytes: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Manifest:
    """All rows of an archive, in the order of their paths."""

    rows: tuple[Row, ...]
    root: Path

    @property
    def accepted(self) -> tuple[Row, ...]:
        """Rows that tapct trains on."""
        return tuple(row for row in self.rows if row.status == ACCEPTED)

    @functools.cached_property
    def digest(self) -> str:
        """Hash over id and voxels of the accepted rows; it does not change when the archive moves."""
        lines = sorted(f"{row.id} {row.digest}\n" for row in self.accepted)
        return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()

    def summary(self) -> dict[str, int]:
        """Number of rows by reason, `accepted` first, then the commonest reason."""
        reasons = Counter(row.reason for row in self.rows if row.status == REFUSED)
        return {ACCEPTED: len(self.accepted), **dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))}

    @classmethod
    def read(cls, path: Path | str, root: Path | None = None) -> Manifest:
        """Read a manifest.

        Args:
            path: the .parquet file.
            root: where the archive lies now; without it where it lay, or where it lay relative to the manifest.
        Raises:
            UserError: no manifest, or one of another version, or changed since it was written.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"manifest {path} does not exist; make one with `tapct index`")
        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a Parquet file: {one_line(error)}") from error
        told = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        names = [field.name for field in dataclasses.fields(Row)]
        if told.get("tapct.schema") != SCHEMA or table.column_names != names:
            raise UserError(f"{path} is no tapct manifest of version {SCHEMA}; make it again with `tapct index`")
        rows = tuple(Row(**row) for row in table.to_pylist())
        if root is None:
            root, beside = Path(told["tapct.root"]), path.parent / told["tapct.root_relative"]
            root = beside.resolve() if not root.is_dir() and beside.is_dir() else root
        manifest = cls(rows, root)
        if manifest.digest != told["tapct.digest"]:
            raise UserError(f"{path} does not match its own digest; it was changed or damaged: index again")
        return manifest


@dataclass(frozen=True)
class _Job:
    """One source for a worker."""

    source: ingest.Source
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

    Every scan is read once and whole. A scan that fails becomes a refused row. Of scans with the same voxels the first
    in the order of paths is kept, the others are refused as `duplicate`. A patient is known by PatientID, else by
    `patient_regex`, else by the stem of the file or DICOM folder; a stem without a digit (`s0001/ct.nii.gz`) is no
    name of a patient, so the nearest folder with a digit is taken, else the whole path.

    Args:
        root: folder of the archive.
        out: .parquet file to write; replaced in one step, so that there is never half a manifest.
        labels: folder with label maps; other places are found by rule (`tapct.data.pairing`).
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
    _check_regex(patient_regex)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the file to write, such as {out / 'manifest.parquet'}")
    sources = ingest.find_sources(root)
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
    manifest = Manifest(_refuse_duplicates([rows[index] for index in range(len(jobs))]), root.resolve())
    _write(manifest, out)
    return manifest


def patient_key(folder: Path) -> bytes:
    """The secret of this archive's hashes: from the environment, else the folder's `.patient_key`, made when missing.

    Raises:
        UserError: the key cannot be read or written.
    """
    told = os.environ.get(KEY_VARIABLE, "")
    if told:
        return hashlib.blake2b(told.encode(), digest_size=32).digest()
    path = folder / KEY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_bytes()
        else:
            key = secrets.token_bytes(16)
            with os.fdopen(descriptor, "wb") as file:
                file.write(key)
    except OSError as error:
        raise UserError(f"patient key {path}: {error.strerror}; set {KEY_VARIABLE} or choose another folder") from error
    if len(key) < 16:
        raise UserError(f"patient key {path} holds {len(key)} bytes, rule: 16; remove it (all patient hashes change)")
    return key


def _check_regex(patient_regex: str | None) -> None:
    if patient_regex is None:
        return
    try:
        num_groups = re.compile(patient_regex).groups
    except re.error as error:
        raise UserError(f"patient regex '{patient_regex}' is not valid: {error}") from error
    if num_groups < 1:
        raise UserError(f"patient regex '{patient_regex}' has no group; put the patient's part into (parentheses)")


def _relative(job: _Job) -> str:
    """Path below the root with /; bytes that are no UTF-8 are written as escapes, since Parquet holds text."""
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
            raise Refused("too_few_slices", f"{row.depth} slices; rule: at least {job.min_depth} (--min-depth)")
        label_path, complaint = _labels(job, volume)
        return replace(row, status=ACCEPTED, label_path=label_path, detail=complaint)
    except Refused as error:
        return replace(row, reason=error.reason, detail=error.detail)
    except Exception as error:  # one scan must not end an index of many; the row tells what happened
        return replace(row, reason="unreadable", detail=one_line(f"{type(error).__name__}: {error}"))


def _labels(job: _Job, volume: Volume) -> tuple[str, str]:
    """Path of the scan's labels, or an empty one and why they are not used."""
    if job.labels is None:
        return "", ""
    try:
        ingest.check_same_grid(volume, ingest.read_labels(job.labels))
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
    digest = hashlib.blake2b(repr(volume.hu_ZYX.shape).encode(), digest_size=16)
    digest.update(volume.hu_ZYX.data)
    return replace(
        row,
        depth=depth,
        height=height,
        width=width,
        spacing_z_mm=volume.spacing_mm[0],
        spacing_y_mm=volume.spacing_mm[1],
        spacing_x_mm=volume.spacing_mm[2],
        patient=facts.patient or ingest.keyed_hash(job.key, _name_of_patient(job)),
        study_date=facts.study_date,
        manufacturer=facts.manufacturer,
        kernel=facts.kernel,
        sex=facts.sex,
        age_years=facts.age_years,
        hu_p005=float(p005),
        hu_p50=float(p50),
        hu_p995=float(p995),
        body_share=body.size / values.size,
        digest=digest.hexdigest(),
    )


def _name_of_patient(job: _Job) -> str:
    """What tells patients apart where no header does."""
    path = job.source.path
    relative = path.relative_to(job.root)
    if job.patient_regex is not None:
        match = re.search(job.patient_regex, relative.as_posix())
        if match and match[1]:
            return match[1]
    names = [ingest.stem_of(relative) or job.root.resolve().name, *(folder.name for folder in relative.parents)]
    return next((name for name in names if re.search(r"\d", name)), (relative.parent / names[0]).as_posix())


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


def _write(manifest: Manifest, out: Path) -> None:
    """Write aside, flush to disk, rename.

    Raises:
        UserError: the disk is full or the place is not writable.
    """
    fields = dataclasses.fields(Row)
    columns: dict[str, list[Any]] = {f.name: [getattr(row, f.name) for row in manifest.rows] for f in fields}
    told = {
        "tapct.schema": SCHEMA,
        "tapct.root": str(manifest.root),
        "tapct.root_relative": os.path.relpath(manifest.root, out.parent.resolve()),
        "tapct.digest": manifest.digest,
    }
    schema = pyarrow.schema([(f.name, _ARROW[str(f.type)]) for f in fields], metadata=told)
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, out)
        folder = os.open(out.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write manifest {out}: {error.strerror or error}; nothing was changed") from error
