"""Index an archive: examine every scan of a folder in worker processes and write the manifest."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import check_new_path, first_cause
from tapct.base.lease import Lease, hold
from tapct.data import formats
from tapct.data.index.duplicates import refuse_duplicates
from tapct.data.index.examined import Examined, with_patients
from tapct.data.index.kept_patients import KEEP_ALL, KeepRules, read_older, with_kept_patients
from tapct.data.index.label_counts import label_report
from tapct.data.index.scan_row import ExamineTask, ScanRules, bytes_to_read, examine, failed_row
from tapct.data.labels.pairing import LabelPairs, pair_labels
from tapct.data.manifest import Manifest, write_table
from tapct.data.patients.identity import PatientRules, check_regex, parse_patient_from
from tapct.data.patients.key import key_name, patient_key
from tapct.data.patients.table import patients_from_table
from tapct.data.readers import LIBRARIES, load_libraries
from tapct.data.readers.dicom_kind import object_title
from tapct.data.scans.read_rules import MIN_DEPTH, PLAIN, ReadRules
from tapct.data.search import passed_over as passed
from tapct.data.search.discover import DICOM_OBJECT, Listing, Source, search
from tapct.data.workers.process_pool import DEFAULT_LIMITS, LOST, ScanLimits, map_unordered
from tapct.data.workers.time_limit import NoAnswer, TimeLimit

_PAIRING_SECONDS = 1.0  # per scan or label map, beside the limit of one file
_MODULES = (__name__, *LIBRARIES)  # what a worker needs


def build_manifest(
    root: Path,
    out: Path,
    *,
    labels: Path | None = None,
    only: Sequence[str] = (),
    ignore_labels: Sequence[int] = (),
    label_names: Sequence[tuple[int, str]] = (),
    patient_regex: str | None = None,
    patient_column: str | None = None,
    patient_from: str | None = None,
    study_dates: bool = False,
    min_depth: int = MIN_DEPTH,
    accept: ReadRules = PLAIN,
    workers: int = 0,
    limits: ScanLimits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
    keep: KeepRules = KEEP_ALL,
) -> Manifest:
    """Index an archive and write the manifest.

    Every scan is read completely, and once. A scan that fails becomes a refused row. Of scans with
    the same voxels one is accepted, see `duplicates`. How a patient is identified: see
    `patients.identity`. Scans that an older manifest at `out` lists keep their patients, see
    `kept_patients`.

    Args:
        root: folder of the archive.
        out: .parquet file to write; replaced in one step, so that there is never half a manifest.
        labels: folder with label maps; label maps in other places are found by name, see
            `labels.pairing`.
        only: patterns of the paths below the root, one of which a scan must match as a whole;
            others are left out; empty for all.
        ignore_labels: label values of voxels that nobody has labelled, e.g. -1; losses and metrics
            leave these voxels out.
        label_names: label values and names of a data set, which replace those of the files.
        patient_regex: regular expression; group 1, searched in the path below the root, is the
            patient's identifier where the header holds none.
        patient_column: `FILE.csv:COLUMN`, a table with the patients; see `patients.table`.
        patient_from: `folder:N`, the N-th folder below the root is the patient; or `header`, a
            PatientID counts also where all studies have the same one.
        study_dates: whether the manifest has the whole date of a study, and not its year alone.
        min_depth: fewest slices of an accepted scan; others are refused as `too_few_slices`.
        accept: what is accepted beyond plain scans.
        workers: number of processes; 0 reads in this process, without protection from a file that
            ends, blocks or fills it.
        limits: time and memory that one scan may take in a worker process.
        progress: function that is called with (scans done, scans in all).
        keep: which patients of an older manifest are kept.
    Returns:
        The manifest as written, with the numbers of files of each kind that are no scans, and
        the counts of its labels.
    Raises:
        UserError: the folder is missing or holds no scan, an option about patients is wrong, or
            `out` cannot be written.
    """
    root, out = Path(root), Path(out)
    check_regex(patient_regex)
    folder, trusts_header = parse_patient_from(patient_from)
    _check_out(out)
    listing, pairs = _search(root, labels, workers, accept.derived, limits.seconds)
    scans, passed_over = _scans_of(listing, pairs, root, only)
    if not scans:
        raise _no_scans(root, passed_over)
    column = _patient_column(patient_column, scans, root)
    key = patient_key(out.parent)
    patients = PatientRules(root, key, patient_regex, folder, trusts_header, column)
    rules = ScanRules(
        root,
        key,
        min_depth,
        accept,
        study_dates=study_dates,
        ignore_labels=tuple(ignore_labels),
        label_names=tuple(label_names),
    )
    with _only_writer(out) as lease:
        older = read_older(out, keep, key_name(key))
        examined = _examine_all(_tasks(scans, pairs, rules), workers, limits, progress)
        rows = refuse_duplicates(examined, {row.id: row.mirror_digest for row in examined})
        identified, given = with_patients(rows, examined, scans, patients)
        manifest = Manifest(
            identified,
            root.resolve(),
            key_name(key),
            passed_over=dict(passed_over),
            ignore_labels=rules.ignore_labels,
            label_names=rules.label_names,
            label_report=label_report(pairs, rows, root, [row.contradiction for row in examined]),
            file=out,
        )
        manifest = with_kept_patients(manifest, given, older, keep)
        lease.check()
        write_table(manifest, out)
    return manifest


def _patient_column(
    patient_column: str | None, scans: Sequence[Source], root: Path
) -> Mapping[str, str]:
    """The patients of the table that `build_manifest` was given; empty without one."""
    if patient_column is None:
        return {}
    return patients_from_table(patient_column, [scan.path.relative_to(root) for scan in scans])


def _tasks(scans: Sequence[Source], pairs: LabelPairs, rules: ScanRules) -> list[ExamineTask]:
    """The work of the worker processes: each scan with its label maps."""
    return [
        ExamineTask(
            scan,
            rules,
            labels=pairs.label_of.get(scan.path),
            more_labels=pairs.more_of.get(scan.path, ()),
            num_other_labels=len(pairs.others_of.get(scan.path, ())),
        )
        for scan in scans
    ]


def _scans_of(
    listing: Listing, pairs: LabelPairs, root: Path, only: Sequence[str]
) -> tuple[list[Source], Counter[str]]:
    """The sources to examine as scans, and the other files, counted by kind."""
    scans: list[Source] = []
    passed_over = Counter(listing.passed_over) + Counter(pairs.passed_over)
    for source in listing.sources:
        if source.path in pairs.label_files:
            continue
        if source.kind == DICOM_OBJECT:
            passed_over[f"DICOM {object_title(source.sop_class)}"] += 1
        elif only and not matches_any(source.path.relative_to(root).as_posix(), only):
            passed_over["not part of the data set"] += 1
        else:
            scans.append(source)
    return scans, passed_over


def matches_any(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path matches one of some patterns as a whole; `*` matches folders too."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _examine_all(
    tasks: Sequence[ExamineTask],
    workers: int,
    limits: ScanLimits,
    progress: Callable[[int, int], None] | None,
) -> list[Examined]:
    """The rows of all scans, in their order; arguments as in `build_manifest`.

    Where a worker process was lost, the labels may be the cause, and they must not refuse their
    scan: it is read again without them.
    """
    rows: dict[int, Examined] = {}
    for index, row in _examined(tasks, workers, limits):
        rows[index] = row
        if progress is not None:
            progress(len(rows), len(tasks))
    again = [i for i, row in rows.items() if row.reason in LOST and tasks[i].labels is not None]
    problems = [f"{rows[i].reason}: with its labels, {rows[i].detail}" for i in again]
    alone = [replace(tasks[i], label_problem=text) for i, text in zip(again, problems)]
    for index, row in _examined(alone, workers, limits):
        rows[again[index]] = row
    return [rows[index] for index in range(len(tasks))]


def _examined(
    tasks: Sequence[ExamineTask], workers: int, limits: ScanLimits
) -> Iterator[tuple[int, Examined]]:
    """Yield index and row of each task, in the order in which they become ready."""
    results = map_unordered(
        examine,
        tasks,
        workers,
        failed_row,
        num_bytes=bytes_to_read,
        limits=limits,
        modules=_MODULES,
    )
    with contextlib.closing(results):  # ends the workers at an error or Ctrl-C
        yield from results


def _search(
    root: Path, labels: Path | None, workers: int, derived: bool, seconds: float
) -> tuple[Listing, LabelPairs]:
    """Find the scans of an archive and their label maps in a worker process, since this reads
    headers; each file may take `seconds`.

    It also loads the reader libraries, since a broken one would refuse every scan. The process of
    the command does not need them; loading them costs it 0.7 s.
    """
    request = (root, labels, derived, seconds)
    if workers == 0:
        return _found(request)
    ((_, found),) = map_unordered(
        _found_or_error,
        [request],
        1,
        lambda _, failure: UserError(f"{root} cannot be searched: {failure.detail}"),
        limits=ScanLimits(seconds=math.inf),  # it takes as long as the archive is large
        modules=_MODULES,
    )
    if isinstance(found, UserError):
        raise found
    return found


def _found(request: tuple[Path, Path | None, bool, float]) -> tuple[Listing, LabelPairs]:
    """What lies below a folder, and which label map belongs to which scan."""
    root, labels, derived, seconds = request
    load_libraries()
    listing = search(root, derived=derived, seconds=seconds)
    if labels is not None and not labels.is_dir():
        raise UserError(f"labels folder {labels} does not exist or is not a folder; check the path")
    # side-cars, tables of labels and the headers of DICOM objects are read again
    limit = TimeLimit(seconds + _PAIRING_SECONDS * len(listing.sources))
    try:
        return listing, limit.call(pair_labels, listing.sources, root, labels, seconds)
    except NoAnswer as error:
        raise UserError(
            f"the files of {root} were listed, but reading side-cars and tables of labels had "
            f"{error}; check the disk"
        ) from error
    finally:
        limit.close()


def _found_or_error(
    request: tuple[Path, Path | None, bool, float],
) -> tuple[Listing, LabelPairs] | UserError:
    """`_found`, or the error that a person can mend."""
    try:
        return _found(request)
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
    check_new_path(out)


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[Lease]:
    """Hold the lease of a manifest; a place that cannot be written to is refused here, before the
    archive is read.
    """
    lease_file = out.with_name(f".{out.name}.lease")
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            lease = stack.enter_context(hold(lease_file, f"manifest {out}", console.say))
        except OSError as error:
            raise UserError(
                f"cannot write manifest {out}: {first_cause(error)}; nothing was changed"
            ) from error
        yield lease


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
            f"no scan in {manifest.root} is accepted: {count} of {len(manifest.rows)} refused as "
            f"{reason}; the manifest lists the reasons, docs/ingest.md explains them"
        )
    if labels is not None and not any(row.label_path for row in manifest.accepted):
        raise UserError(
            f"no label map in {labels} belongs to an accepted scan; label maps must have the names "
            "of the scans, see docs/data.md, and lie on their grid"
        )
