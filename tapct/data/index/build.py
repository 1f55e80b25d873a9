"""Index an archive: examine every scan of a folder in worker processes and write the manifest."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc

from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import first_cause
from tapct.base.lease import Lease, hold
from tapct.data.index.archive_rows import manifest_of
from tapct.data.index.examining import Examination
from tapct.data.index.finding import Machine, NoScans, ScansFound, find
from tapct.data.index.inputs import IndexInputs, inputs_of
from tapct.data.index.kept_patients import KEEP_ALL, KeepRules, read_older
from tapct.data.index.place import IndexPlace, open_journal, rooted
from tapct.data.index.scan_row import ExamineTask, ScanRules
from tapct.data.index.share import Share
from tapct.data.manifest import ACCEPTED, Manifest, RowFile, write_table
from tapct.data.patients.identity import PatientRules, check_regex, parse_patient_from
from tapct.data.patients.key import KEY_FILE, key_name, patient_key
from tapct.data.patients.table import patients_from_table
from tapct.data.readers import DICOM
from tapct.data.scans.read_rules import MIN_DEPTH, PLAIN, ReadRules
from tapct.data.workers.process_pool import DEFAULT_LIMITS, ScanLimits


def build_manifest(
    root: Path | Sequence[Path],
    out: Path,
    *,
    start_at: Path | None = None,
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
    listed: Callable[[int, int, bool], None] = lambda done, total, is_all: None,
    keep: KeepRules = KEEP_ALL,
) -> Manifest:
    """Index an archive and write the manifest.

    Every scan is read completely, and once. A scan that fails becomes a refused row. Of scans with
    the same voxels one is accepted, see `duplicates`. How a patient is identified: see
    `patients.identity`. Scans that an older manifest at `out` lists keep their patients, see
    `kept_patients`.

    What was read is kept in a journal, see `journal`: a killed index resumes. In an archive folder
    the journal stays, so that a later index reads only the files that are new or changed.

    Args:
        root: folder of the archive, or several folders, files, patterns and lists, see `inputs`.
        out: .parquet file to write; replaced in one step, so that there is never half a manifest.
            Or a folder, in which the manifest and its journal are kept.
        start_at: folder at which the paths of the manifest start; None for that of an archive
            folder which exists, or else the nearest folder that contains all of `root`.
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
        listed: function that is called with the number of files that are done, the number of files
            that were found so far, and whether these are all.
        keep: which patients of an older manifest are kept.
    Returns:
        The manifest as written, with the numbers of files of each kind that are no scans, and
        the counts of its labels.
    Raises:
        UserError: the folder is missing or holds no scan, an option about patients is wrong, or
            `out` cannot be written.
    """
    check_regex(patient_regex)
    folder, trusts_header = parse_patient_from(patient_from)
    place = IndexPlace.of(Path(out))
    inputs = rooted(inputs_of(root), place, start_at)
    _check_labels(labels)
    _check_apart(place, inputs)
    with _only_writer(place.file) as lease, _nothing_left_without_scans(place):
        key = patient_key(place.file.parent)
        rules = ScanRules(
            inputs.root,
            key,
            min_depth,
            accept,
            study_dates=study_dates,
            ignore_labels=tuple(ignore_labels),
            label_names=tuple(label_names),
        )
        journal = open_journal(place, key)
        with journal.scratch() as scratch:
            machine = Machine(workers, limits, listed)
            found = find(inputs, labels, rules, journal, machine, scratch, only)
            column = _patient_column(patient_column, found)
            patients = PatientRules(inputs.root, key, patient_regex, folder, trusts_header, column)
            older = read_older(place.file, keep, key_name(key))
            examination = Examination(found, rules, journal, scratch, workers, limits, progress)
            examination.run()
            is_kept = place.is_archive and not keep.fresh
            manifest = manifest_of(
                *(examination, patients, older, keep, scratch), with_vanished=is_kept
            )
            lease.check()
            write_table(manifest, place.file)
        if place.is_archive:
            examination.keep_used()
        else:
            journal.remove()
    return replace(manifest, rows=RowFile(place.file), file=place.file)


def examine_share(
    root: Path | Sequence[Path],
    out: Path,
    share: Share,
    *,
    start_at: Path | None = None,
    labels: Path | None = None,
    ignore_labels: Sequence[int] = (),
    label_names: Sequence[tuple[int, str]] = (),
    study_dates: bool = False,
    min_depth: int = MIN_DEPTH,
    accept: ReadRules = PLAIN,
    workers: int = 0,
    limits: ScanLimits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
    listed: Callable[[int, int, bool], None] = lambda done, total, is_all: None,
) -> None:
    """Do one share of an index, for several processes at once; `build_manifest` does what is left
    and writes the manifest.

    A share may be done twice, or not at all, or at the same time as others. DICOM series whose
    files lie in several folders are examined once the heads of all shares are there: by a share
    that starts then, or by `build_manifest`.

    Args:
        share: the share.
        root, out, start_at, labels, ignore_labels, label_names, study_dates, min_depth, accept,
            workers, limits, progress, listed: as in `build_manifest`, which must be given the same.
    Raises:
        UserError: as in `build_manifest`, or a process does this share now.
    """
    place = IndexPlace.of(Path(out))
    inputs = rooted(inputs_of(root), place, start_at)
    _check_labels(labels)
    _check_apart(place, inputs)
    with _only_writer(place.file, share.name):
        key = patient_key(place.file.parent)
        rules = ScanRules(
            inputs.root,
            key,
            min_depth,
            accept,
            study_dates=study_dates,
            ignore_labels=tuple(ignore_labels),
            label_names=tuple(label_names),
        )
        journal = open_journal(place, key, share.name)
        machine = Machine(workers, limits, listed, share)
        with journal.scratch() as scratch:
            found = find(inputs, labels, rules, journal, machine, scratch)
            Examination(
                *(found, rules, journal, scratch, workers, limits, progress),
                is_chosen=lambda task: _is_in_share(task, found, share),
            ).run()


def _is_in_share(task: ExamineTask, found: ScansFound, share: Share) -> bool:
    """Whether a share examines a scan. While heads are missing, a DICOM series may lack slices."""
    if task.source.kind == DICOM.name and not found.listed.is_whole:
        return False
    return share.has(task.source.path.relative_to(found.inputs.root).as_posix())


def _patient_column(patient_column: str | None, found: ScansFound) -> dict[str, str]:
    """The patients of the table that `build_manifest` was given, and of a list of scans."""
    root = found.inputs.root
    column = {
        path.relative_to(root).as_posix(): entry.patient
        for path, entry in found.entries.items()
        if entry.patient
    }
    if patient_column is not None:
        paths = [source.path.relative_to(root) for source in found.sources()]
        column |= patients_from_table(patient_column, paths)
    return column


def _check_labels(labels: Path | None) -> None:
    """Refuse a folder of label maps that is none."""
    if labels is not None and not labels.is_dir():
        raise UserError(f"labels folder {labels} does not exist or is not a folder; check the path")


def _check_apart(place: IndexPlace, inputs: IndexInputs) -> None:
    """Refuse an archive folder that is one of the folders of scans."""
    folder = place.file.parent
    if place.is_archive and folder.resolve() in {each.resolve() for each in inputs.folders}:
        raise UserError(
            f"{folder} is a folder; give the file to write, such as {place.file}, or a folder that "
            "is not searched for scans"
        )


@contextlib.contextmanager
def _only_writer(out: Path, share: str = "") -> Iterator[Lease]:
    """Hold the lease of a manifest, or of one share of it; a place that cannot be written to is
    refused here, before the archive is read.
    """
    name = ".".join(filter(None, (out.name, share)))
    lease_file = out.with_name(f".{name}.lease")
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            lease = stack.enter_context(hold(lease_file, f"manifest {out}", console.say))
        except OSError as error:
            raise UserError(
                f"cannot write manifest {out}: {first_cause(error)}; nothing was changed"
            ) from error
        yield lease


@contextlib.contextmanager
def _nothing_left_without_scans(place: IndexPlace) -> Iterator[None]:
    """Where the folders hold no scan, remove the journal and the patient key that this call made.

    After any other error the journal stays, so that the next call need not begin again.
    """
    key_file = place.file.parent / KEY_FILE
    had_key, had_journal = os.path.lexists(key_file), place.journal.is_dir()
    try:
        yield
    except NoScans:
        if not had_journal:
            shutil.rmtree(place.journal, ignore_errors=True)
            if not had_key:
                key_file.unlink(missing_ok=True)
        raise


def check_usable(manifest: Manifest, labels: Path | None) -> None:
    """Refuse a manifest from which nothing can be packed, or in which no label map was used.

    Args:
        manifest: manifest as written.
        labels: folder that was given for label maps, or None.
    Raises:
        UserError: no scan is accepted, or labels were given and none belongs to an accepted scan.
    """
    summary = manifest.summary()
    if not summary[ACCEPTED]:
        (_, (reason, count), *_) = [*summary.items(), ("", 0)]
        raise UserError(
            f"no scan in {manifest.root} is accepted: {count} of {len(manifest.rows)} refused as "
            f"{reason}; the manifest lists the reasons, docs/ingest.md explains them"
        )
    if labels is not None and not _has_labels(manifest):
        raise UserError(
            f"no label map in {labels} belongs to an accepted scan; label maps must have the names "
            "of the scans, see docs/data.md, and lie on their grid"
        )


def _has_labels(manifest: Manifest) -> bool:
    """Whether an accepted scan has labels."""
    for table in manifest.row_table().tables(("status", "label_path")):
        is_accepted = pc.equal(table.column("status"), ACCEPTED)
        if pc.any(pc.and_(is_accepted, pc.not_equal(table.column("label_path"), ""))).as_py():
            return True
    return False
