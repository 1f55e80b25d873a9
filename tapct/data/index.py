"""Index an archive: examine every scan of a folder in worker processes and write the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tapct.base.exits import UserError, single_line
from tapct.base.files import first_cause
from tapct.base.locks import Lock, hold
from tapct.data import formats
from tapct.data import passed_over as passed
from tapct.data.ct_check import BODY_ABOVE, subsample
from tapct.data.digest import voxel_digest
from tapct.data.discover import DICOM_OBJECT, Listing, Source, search
from tapct.data.geometry import check_same_grid
from tapct.data.ingest import OUT_OF_MEMORY, read_labels, read_source
from tapct.data.labels.pairing import pair_labels
from tapct.data.manifest import ACCEPTED, REFUSED, UNKNOWN, Manifest, Row, write_table
from tapct.data.patients import PatientRules, check_regex, key_name, patient_key
from tapct.data.process_pool import DEFAULT_LIMITS, Failure, ScanLimits, map_unordered
from tapct.data.read_rules import MIN_DEPTH, PLAIN, ReadRules
from tapct.data.readers import LIBRARIES, load_libraries
from tapct.data.readers.dicom_kind import object_title
from tapct.data.readers.raw import MAX_TEXT
from tapct.types import Refused, Volume

_MODULES = (__name__, *LIBRARIES)  # what a worker needs


@dataclass(frozen=True)
class ExamineTask:
    """One scan for a worker process.

    Args:
        source: files of the scan.
        root: folder of the archive.
        labels: path of its label map, or None.
        patients: how its patient is identified.
        min_depth: fewest slices of an accepted scan.
        accept: what is accepted beyond plain scans.
    """

    source: Source
    root: Path
    labels: Path | None
    patients: PatientRules
    min_depth: int
    accept: ReadRules = PLAIN


def build_manifest(
    root: Path,
    out: Path,
    *,
    labels: Path | None = None,
    patient_regex: str | None = None,
    min_depth: int = MIN_DEPTH,
    accept: ReadRules = PLAIN,
    workers: int = 0,
    limits: ScanLimits = DEFAULT_LIMITS,
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
        accept: what is accepted beyond plain scans.
        workers: number of processes; 0 reads in this process, without protection from a file that
            ends, blocks or fills it.
        limits: time and memory that one scan may take in a worker process.
        progress: function that is called with (scans done, scans in all).
    Returns:
        The manifest as written, with the number of files of each kind that were passed over.
    Raises:
        UserError: the folder is missing or holds no scan, the regex is bad, or `out` cannot be
            written.
    """
    root, out = Path(root), Path(out)
    check_regex(patient_regex)
    _check_out(out)
    listing = _search(root, workers, accept.derived)
    sources = listing.sources
    if labels is not None and not labels.is_dir():
        raise UserError(f"labels folder {labels} does not exist or is not a folder; check the path")
    pairs = pair_labels(sources, root, labels)
    scans = []
    passed_over = Counter(listing.passed_over)
    for source in sources:
        if source.path in pairs.label_files:
            continue
        if source.kind == DICOM_OBJECT:
            passed_over[f"DICOM {object_title(source.sop_class)}"] += 1
        else:
            scans.append(source)
    if not scans:
        raise _no_scans(root, passed_over)
    patients = PatientRules(root, patient_key(out.parent), patient_regex)
    tasks = [
        ExamineTask(scan, root, pairs.label_of.get(scan.path), patients, min_depth, accept)
        for scan in scans
    ]
    with _only_writer(out) as lock:
        rows: dict[int, Row] = {}
        results = map_unordered(
            examine,
            tasks,
            workers,
            failed_row,
            num_bytes=bytes_of,
            limits=limits,
            modules=_MODULES,
        )
        with contextlib.closing(results):  # ends the workers at an error or Ctrl-C
            for index, row in results:
                rows[index] = row
                if progress is not None:
                    progress(len(rows), len(tasks))
        in_order = [rows[index] for index in range(len(tasks))]
        manifest = Manifest(
            refuse_duplicates(in_order), root.resolve(), key_name(patients.key), dict(passed_over)
        )
        lock.check()
        write_table(manifest, out)
    return manifest


def _search(root: Path, workers: int, derived: bool) -> Listing:
    """Find the scans of an archive in a worker process, which reads the headers of DICOM files.

    It also loads the reader libraries, since a broken one would refuse every scan. The process of
    the command does not need them; loading them costs it 0.7 s.
    """
    if workers == 0:
        load_libraries()
        return search(root, derived=derived)
    ((_, found),) = map_unordered(
        _listing_or_error,
        [(root, derived)],
        1,
        lambda _, failure: UserError(f"{root} cannot be searched: {failure.detail}"),
        limits=ScanLimits(seconds=math.inf),  # it takes as long as the archive is large
        modules=_MODULES,
    )
    if isinstance(found, UserError):
        raise found
    return found


def _listing_or_error(request: tuple[Path, bool]) -> Listing | UserError:
    """What `search` finds below a folder, or the error that a person can mend."""
    root, derived = request
    try:
        load_libraries()
        return search(root, derived=derived)
    except ImportError as error:
        return UserError(f"a library that reads scans cannot be loaded ({error}); install it again")
    except UserError as error:
        return error


def _check_out(out: Path) -> None:
    """Refuse a place that is no file of a manifest, before anything is read."""
    if out.is_dir():
        raise UserError(
            f"{out} is a folder; give the file to write, such as {out / 'manifest.parquet'}"
        )
    if out.suffix != ".parquet":
        raise UserError(
            f"the manifest is a Parquet file, and {out} does not end in .parquet; give a name such "
            f"as {out.with_suffix('.parquet')}"
        )


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[Lock]:
    """Hold the lock of a manifest; a place that cannot be written to is refused here, before the
    archive is read.
    """
    taken = f"another `tapct index` is writing {out}"
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(hold(out.with_name(f".{out.name}.lock"), taken))
        except OSError as error:
            raise UserError(
                f"cannot write manifest {out}: {first_cause(error)}; nothing was changed"
            ) from error
        yield lock


def _no_scans(root: Path, counts: Counter[str]) -> UserError:
    """The error of a folder without anything to examine."""
    others = passed.summary(counts)
    beside = f", but {others}" if others else ""
    return UserError(f"{root} holds no {formats.listed('or')} scans{beside}; check the path")


def check_usable(manifest: Manifest, labels: Path | None) -> None:
    """Refuse a manifest from which nothing can be packed, or in which no label map was used.

    Args:
        manifest: manifest as written.
        labels: folder that was given for label maps, or None.
    Raises:
        UserError: no scan is accepted, or labels were given and none belongs to an accepted scan.
    """
    if not manifest.accepted:
        (_, (reason, count), *_) = [*manifest.summary().items(), ("", 0)]
        raise UserError(
            f"none of the {len(manifest.rows)} scans in {manifest.root} is accepted, {count} are "
            f"refused as {reason}; the manifest lists the reasons, docs/ingest.md explains them"
        )
    if labels is not None and not any(row.label_path for row in manifest.accepted):
        raise UserError(
            f"no label map in {labels} belongs to an accepted scan; label maps must have the names "
            "of the scans, see docs/data.md, and lie on their grid"
        )


def examine(task: ExamineTask) -> Row:
    """Read one scan and its labels; any failure becomes the reason in its row."""
    row = bare_row(task)  # refused, until all checks have passed
    try:
        row = replace(row, bytes=bytes_of(task))
        if not has_utf8_name(task):
            raise Refused("bad_name", "the path holds bytes that are not UTF-8; rename it")
        volume = read_source(task.source, task.patients.key, task.accept)
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
        if error.reason == OUT_OF_MEMORY:
            raise MemoryError(error.detail) from error  # the pool tries it again with more
        return replace(row, reason=error.reason, detail=error.detail)
    except MemoryError:
        raise
    except Exception as error:  # one scan must not end the index of a whole archive
        detail = single_line(f"{type(error).__name__}: {error}", MAX_TEXT)
        return replace(row, reason="unreadable", detail=detail)


def bytes_of(task: ExamineTask) -> int:
    """Bytes of the files of a scan; a file that is gone counts as empty."""
    num_bytes = 0
    for path in task.source.files:
        with contextlib.suppress(OSError):
            num_bytes += path.stat().st_size
    return num_bytes


def failed_row(task: ExamineTask, failure: Failure) -> Row:
    """The row of a scan whose worker process has no result."""
    detail = failure.detail.replace(f"{task.root}{os.sep}", "")
    return replace(bare_row(task), bytes=bytes_of(task), reason=failure.reason, detail=detail)


def bare_row(task: ExamineTask) -> Row:
    """The row of a scan that has not been read: its path and kind; its status is refused."""
    # Parquet holds text, so bytes of a path that are not UTF-8 are written as escapes
    path = _escaped(task, task.source.path)
    scan_id = hashlib.blake2b(path.encode(), digest_size=8).hexdigest()
    files = task.source.files
    file_paths = () if files == (task.source.path,) else tuple(_escaped(task, f) for f in files)
    return Row(id=scan_id, path=path, kind=task.source.kind, status=REFUSED, file_paths=file_paths)


def _escaped(task: ExamineTask, file: Path) -> str:
    """Path of a file below the root, as text that Parquet can hold."""
    relative = file.relative_to(task.root).as_posix()
    return os.fsencode(relative).decode("utf-8", "backslashreplace")


def has_utf8_name(task: ExamineTask) -> bool:
    """Whether the paths of a scan are UTF-8, so that the manifest can hold them as they are."""
    try:
        for file in (task.source.path, *task.source.files):
            os.fsencode(file.relative_to(task.root)).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


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
        lossy_ratio=volume.facts.lossy_ratio,
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
