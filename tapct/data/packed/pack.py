"""Pack the accepted scans of a manifest into a store, in worker processes.

Every file is written under another name, synced and renamed, and `store.parquet` comes last: a
packed scan is complete or absent, and packing resumes where it was stopped. Codec, filter and chunk
shape were chosen by measurement on CT (scripts/bench_store.py): zstd level 1 is within 4 % of the
size of level 5 and packs several times as fast. Bit shuffle, the filter of earlier versions, is
decoded at two thirds of the rate of byte shuffle for a size between 6 % less and 16 % more.

Axes: Z Y X depth height width in voxels.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import (
    NO_SPACE,
    TEMPORARY_SUFFIX,
    check_new_path,
)
from tapct.base.lease import hold
from tapct.data.index.share import WHOLE, Share
from tapct.data.manifest import Manifest, Row
from tapct.data.packed.free_space import SAMPLE, Room, voxel_bytes
from tapct.data.packed.pack_report import PackReport, RefusedScan
from tapct.data.packed.pack_scan import PackOutcome, PackTask, failed_outcome, pack_task
from tapct.data.packed.packed_labels import labels_file
from tapct.data.packed.packed_scan import CODECS, ZSTD
from tapct.data.packed.places import files_in
from tapct.data.packed.store import StoredScan, index_bytes, packed_file
from tapct.data.packed.store_before import StoreBefore
from tapct.data.packed.store_index import write_index
from tapct.data.readers import LIBRARIES
from tapct.data.workers.process_pool import DEFAULT_LIMITS, LOST, ScanLimits, map_unordered

LEASE_NAME = ".lease"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def pack(
    manifest: Manifest,
    out: Path,
    *,
    workers: int = 0,
    level: int = 1,
    codec: str = ZSTD,
    again: Collection[str] = (),
    drop_missing: bool = False,
    replace_store: bool = False,
    limits: ScanLimits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
    share: Share = WHOLE,
    say: Callable[[str], object] | None = None,
) -> PackReport:
    """Pack every accepted scan of a manifest that is not packed yet.

    A scan that cannot be packed keeps its row and its file in a store that has them from before.

    Args:
        manifest: manifest that `tapct index` wrote.
        out: folder of the store; made if absent.
        workers: number of processes; 0 packs in this one, without protection from a file that
            ends, blocks or fills it.
        level: level of the codec, 1 to 9; higher is smaller and slower to write.
        codec: zstd, or lz4, which is larger and faster to read.
        again: ids of packed scans that are damaged, so that they are packed again.
        drop_missing: whether the store no longer lists scans that cannot be packed; their files
            stay.
        replace_store: whether a store of another archive, or with another patient key, is replaced
            by this manifest; files that belong to no scan of it stay.
        limits: time and memory that one scan may take in a worker process.
        progress: function that is called with (finished scans, scans in all).
        share: scans that this process packs, for several that pack at once; their store is listed
            by a last call for the whole, which packs what is left.
        say: function that prints the line about the space on the disk; None prints nothing.
    Raises:
        UserError: there is nothing to pack, nothing could be packed, the disk is too small, another
            `tapct pack` is writing to the folder, or the store is one of another archive.
    """
    if codec not in CODECS:
        raise UserError(f"the codec is {codec!r}; rule: {' or '.join(CODECS)}")
    rows = [row for row in _checked_rows(manifest, level) if share.has(row.id)]
    check_new_path(out)
    started = time.monotonic()
    outcomes: list[PackOutcome | None] = [None] * len(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # a second pack would delete the unfinished files of the first one
        lease_file = out / f"{LEASE_NAME}{share.name}"
        with hold(lease_file, f"the store {out}", console.say) as lease:
            if share == WHOLE:
                _check_no_share_is_packed(out)
            before = StoreBefore.read(out)
            if not replace_store:
                before.check_replaceable_by(manifest)
            with _without_leftovers(out) if share == WHOLE else nullcontext():
                tasks = _tasks(manifest, rows, out, level, codec, again)
                _pack_with_room(tasks, workers, limits, outcomes, progress, say)
                kept = {} if drop_missing else before.of_same_patients(manifest)
                scans, report = _summed_up(out, rows, outcomes, kept, time.monotonic() - started)
                if share != WHOLE:
                    # the last call lists what all shares have packed, and knows what is unlisted
                    return replace(report, unlisted=())
                if len(report.refused) == len(rows):
                    raise _nothing_packed(report, manifest.root.resolve())
                lease.check()
                _write_index(out, manifest, scans)
        return report
    except OSError as error:
        raise _write_error(error, out, rows, outcomes) from error


def _check_no_share_is_packed(out: Path) -> None:
    """Refuse to finish a store while another process packs a share of it, whose unfinished files
    would be removed.
    """
    for lease_file in out.glob(f"{LEASE_NAME}*of*"):
        with hold(lease_file, f"the store {out}", console.say):
            pass  # its process has ended


def _tasks(
    manifest: Manifest,
    rows: Sequence[Row],
    out: Path,
    level: int,
    codec: str,
    again: Collection[str],
) -> list[PackTask]:
    """The work of the worker processes, one scan each; arguments as in `pack`."""
    root = manifest.root.resolve()
    return [
        PackTask(
            row,
            root,
            out,
            level,
            ignore_labels=manifest.ignore_labels,
            again=row.id in again,
            label_names=manifest.label_names,
            codec=codec,
        )
        for row in rows
    ]


def _pack_with_room(
    tasks: Sequence[PackTask],
    workers: int,
    limits: ScanLimits,
    outcomes: list[PackOutcome | None],
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], object] | None,
) -> None:
    """`_pack_all`, once the disk is known to have room; arguments as in `pack`.

    Where the uncompressed scans would not fit, a few scans are packed first, and the size of the
    others is estimated from them.

    Raises:
        UserError: the scans do not fit.
    """
    new = [i for i, task in enumerate(tasks) if not packed_file(task.out, task.row.id).exists()]
    line, begun = "", set[int]()
    if new:
        room = Room.measure(tasks[0].out, [tasks[i].row for i in new])
        line = room.bound_line()
        if not room.is_ample:
            begun = {new[k * (len(new) - 1) // SAMPLE] for k in range(1, SAMPLE)} | {new[0]}
            first = sorted(begun)
            _pack_all(tasks, first, workers, limits, outcomes, progress)
            done = [(tasks[i].row, outcomes[i]) for i in first]
            packed = [(row, one) for row, one in done if one is not None and one.scan is not None]
            if packed:  # without one there is no estimate; a full disk is an error later
                line = room.check_estimate(
                    len(packed),
                    sum(one.stored_bytes for _, one in packed),
                    sum(voxel_bytes(row) for row, _ in packed),
                )
    if say is not None and line:
        say(line)
    rest = [i for i in range(len(tasks)) if i not in begun]
    _pack_all(tasks, rest, workers, limits, outcomes, progress)


def _pack_all(
    tasks: Sequence[PackTask],
    numbers: Sequence[int],
    workers: int,
    limits: ScanLimits,
    outcomes: list[PackOutcome | None],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Keep, pack or refuse scans; arguments as in `pack`.

    Args:
        tasks: work of all scans.
        numbers: tasks that are done now.
        outcomes: list that receives the result of each task.
    Raises:
        OSError: the store cannot be written; `outcomes` has what was done before.
    """
    before = sum(outcome is not None for outcome in outcomes)
    some = [tasks[i] for i in numbers]
    with closing(_outcomes(some, workers, limits)) as results:  # ends the workers at an error
        for done, (k, outcome) in enumerate(results, before + 1):
            if outcome.write_error is not None:
                raise outcome.write_error
            outcomes[numbers[k]] = outcome
            if progress is not None:
                progress(done, len(tasks))


def _outcomes(
    tasks: Sequence[PackTask], workers: int, limits: ScanLimits
) -> Generator[tuple[int, PackOutcome], None, None]:
    """Yield index and outcome of each task, in the order in which they become ready.

    Where a worker process was lost, the labels may be the cause, and they must not refuse their
    scan: it is packed again without them.
    """

    def run(some: Sequence[PackTask]) -> Generator[tuple[int, PackOutcome], None, None]:
        results = map_unordered(
            pack_task,
            some,
            workers,
            failed_outcome,
            num_bytes=lambda task: max(task.row.bytes, voxel_bytes(task.row)),
            limits=limits,
            modules=(__name__, *LIBRARIES),
        )
        with closing(results):  # ends the workers at an error or Ctrl-C
            yield from results

    lost: dict[int, RefusedScan] = {}
    for index, outcome in run(tasks):
        refused = outcome.refused
        if refused is not None and refused.reason in LOST and tasks[index].row.label_path:
            lost[index] = refused
        else:
            yield index, outcome
    again = list(lost)
    alone = [replace(tasks[i], row=replace(tasks[i].row, label_path="")) for i in again]
    for k, outcome in run(alone):
        if outcome.scan is not None:
            row, problem = tasks[again[k]].row, lost[again[k]]
            detail = f"with its labels, {problem.detail}"
            labels_refused = RefusedScan(row.id, row.label_path, problem.reason, detail)
            outcome = replace(outcome, labels_refused=labels_refused)
        yield again[k], outcome


def _write_index(out: Path, manifest: Manifest, scans: Sequence[StoredScan]) -> None:
    """Write the list of a store's scans, which makes them visible."""
    content = index_bytes(
        *(scans, manifest.digest, manifest.summary(), manifest.patient_key),
        manifest_file="" if manifest.file is None else _below(out, manifest.file),
    )
    write_index(out, content)


def _below(out: Path, path: Path) -> str:
    """A path relative to the store, so that the store holds no absolute one."""
    return os.path.relpath(path.resolve(), out.resolve())


@contextmanager
def _without_leftovers(out: Path) -> Iterator[None]:
    """Remove the unfinished files of killed processes, before and after this context."""
    _remove_leftovers(out)
    try:
        yield
    finally:
        _remove_leftovers(out)


def _remove_leftovers(out: Path) -> None:
    for leftover in files_in(out, f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def _nothing_packed(report: PackReport, root: Path) -> UserError:
    """The error of a pack whose scans were all refused."""
    if not root.is_dir():
        return UserError(
            f"the archive {root} is gone, where the manifest expects it; give its folder with "
            "`tapct pack --root FOLDER`"
        )
    first = report.refused[0]
    return UserError(
        f"none of the {len(report.refused)} accepted scans could be packed; the first, "
        f"{first.path}: {first.reason}: {first.detail} Check that {root} is still the archive. If "
        "it changed, run `tapct index` again."
    )


def _checked_rows(manifest: Manifest, level: int) -> Sequence[Row]:
    """The accepted rows, once the request is checked."""
    if not 1 <= level <= 9:
        raise UserError(f"the compression level is {level}; rule: 1 to 9")
    rows = manifest.accepted
    if not rows:
        raise UserError(
            f"the manifest of {manifest.root} has no accepted scan among {len(manifest.rows)}; "
            "its rows give the reasons."
        )
    seen: set[str] = set()
    for row in rows:
        if row.id in seen or not _FILE_NAME.fullmatch(row.id):
            raise UserError(
                f"scan id {row.id!r} of {row.path} occurs twice or is not a file name; run `tapct "
                "index` again."
            )
        seen.add(row.id)
    return rows


def _write_error(
    error: OSError, out: Path, rows: Sequence[Row], outcomes: Sequence[PackOutcome | None]
) -> UserError:
    """The error of a write that failed; for a full disk with the space that is missing."""
    done = [(row, outcome) for row, outcome in zip(rows, outcomes) if outcome is not None]
    if os.path.lexists(out) and not out.is_dir():
        return UserError(f"cannot write the store {out}: it is no folder; choose another --out")
    if error.errno not in NO_SPACE:
        return UserError(
            f"cannot write the store {out}: {error.strerror or error}. Choose a folder that is "
            "writable."
        )
    packed = sum(voxel_bytes(row) for row, outcome in done if outcome.scan is not None)
    ratio = 0.5  # CT usually packs to half its size
    if packed:
        ratio = sum(outcome.stored_bytes for _, outcome in done) / packed
    rest = ratio * sum(voxel_bytes(row) for row, outcome in zip(rows, outcomes) if outcome is None)
    return UserError(
        f"no space left for the store {out} after {len(done)} of {len(rows)} scans: the rest "
        f"needs about {rest / 1e9:.3g} GB, {shutil.disk_usage(out).free / 1e9:.3g} GB are free. "
        "Free some space and run `tapct pack` again; packed scans are kept."
    )


def _summed_up(
    out: Path,
    rows: Sequence[Row],
    outcomes: Sequence[PackOutcome | None],
    before: Mapping[str, StoredScan],
    seconds: float,
) -> tuple[list[StoredScan], PackReport]:
    """The scans that the store lists from now on, and the report of all outcomes.

    Args:
        out: folder of the store.
        rows, outcomes: scans in the order of the manifest, and what was done with each.
        before: scans by id that the store has from before and keeps where they cannot be packed.
        seconds: wall time.
    """
    scans: list[StoredScan] = []
    packed, damaged, held = [], [], []
    stored_bytes = 0
    for row, outcome in zip(rows, outcomes):
        assert outcome is not None, "a scan has no result"
        stored_bytes += outcome.stored_bytes
        file = packed_file(out, row.id)
        if outcome.scan is not None:
            scans.append(outcome.scan)
            if not outcome.kept:
                packed.append(row.id)
            if not outcome.kept and outcome.was_damaged:
                damaged.append(row.id)
        elif row.id in before and file.is_file():
            # the patient may have been identified by another rule since
            scans.append(replace(before[row.id], path=row.path, patient=row.patient))
            held.append(row.id)
            stored_bytes += file.stat().st_size
    finished = [outcome for outcome in outcomes if outcome is not None]
    listed = {packed_file(out, scan.id).name for scan in scans}
    listed |= {labels_file(out, scan.id).name for scan in scans if scan.has_labels}
    names = {file.name for file in files_in(out, "*.b2nd")}
    report = PackReport(
        store=out,
        packed=tuple(packed),
        kept=sum(outcome.kept for outcome in finished),
        damaged=tuple(damaged),
        refused=tuple(outcome.refused for outcome in finished if outcome.refused is not None),
        held=tuple(held),
        unlisted=tuple(sorted(names - listed)),
        voxel_bytes=sum(2 * int(np.prod(scan.shape_ZYX)) for scan in scans),
        stored_bytes=stored_bytes,
        seconds=seconds,
        num_labelled=sum(scan.has_labels for scan in scans),
        labels_refused=tuple(
            outcome.labels_refused for outcome in finished if outcome.labels_refused is not None
        ),
    )
    return scans, report
