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
import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import (
    NO_SPACE,
    TEMPORARY_SUFFIX,
    check_new_path,
)
from tapct.base.lease import hold
from tapct.data.index.share import WHOLE, Share
from tapct.data.manifest import Manifest, TextColumn
from tapct.data.packed.free_space import SAMPLE, Room, voxel_bytes, voxel_bytes_of
from tapct.data.packed.pack_report import PackReport, RefusedScan
from tapct.data.packed.pack_scan import (
    Compression,
    PackOutcome,
    PackTask,
    failed_outcome,
    pack_task,
)
from tapct.data.packed.pack_table import (
    PackTable,
    are_present,
    unlisted_files,
)
from tapct.data.packed.packed_scan import CODECS, ZSTD
from tapct.data.packed.places import files_in
from tapct.data.packed.store_before import StoreBefore
from tapct.data.packed.store_index import about_store, index_of_columns, write_index
from tapct.data.readers import LIBRARIES
from tapct.data.workers.process_pool import DEFAULT_LIMITS, LOST, ScanLimits, map_unordered

LEASE_NAME = ".lease"
# rows and columns; smaller chunks cost more bytes of checksums and calls than voxels
LEAST_TILE = 16


def pack(
    manifest: Manifest,
    out: Path,
    *,
    workers: int = 0,
    level: int = 1,
    codec: str = ZSTD,
    tile: int = 0,
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
        tile: rows and columns of a chunk, at least 16; 0 for chunks of whole slices.
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
    if not 1 <= level <= 9:
        raise UserError(f"the compression level is {level}; rule: 1 to 9")
    if tile and tile < LEAST_TILE:
        raise UserError(f"--tile is {tile}; rule: 0 for whole slices, or at least {LEAST_TILE}")
    table = PackTable.of(manifest, share)
    check_new_path(out)
    started = time.monotonic()
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
                work = _Work(
                    table, manifest, out, Compression(level, codec, tile), again, limits, workers
                )
                _pack_with_room(work, share, progress, say)
                if not drop_missing:
                    ids = [one.id for one in table.refused.values()]
                    table.hold(before.of_same_patients(manifest, ids), out)
                if share != WHOLE:
                    # the last call lists what all shares have packed, and knows what is unlisted
                    return _report(out, table, time.monotonic() - started)
                if len(table.refused) == len(table):
                    raise _nothing_packed(table, manifest.root.resolve())
                columns = table.store_columns()
                unlisted = unlisted_files(out, columns)
                report = _report(out, table, time.monotonic() - started, unlisted)
                lease.check()
                _write_index(out, manifest, columns)
        return report
    except OSError as error:
        raise _write_error(error, out, table) from error


def _check_no_share_is_packed(out: Path) -> None:
    """Refuse to finish a store while another process packs a share of it, whose unfinished files
    would be removed.
    """
    for lease_file in out.glob(f"{LEASE_NAME}*of*"):
        with hold(lease_file, f"the store {out}", console.say):
            pass  # its process has ended


@dataclass(frozen=True)
class _Work:
    """What one call packs, and how.

    Args:
        table: its scans.
        manifest: manifest that lists them.
        out: folder of the store.
        compression: how they are compressed.
        again: ids of packed scans that are packed again.
        limits, workers: as in `pack`.
    """

    table: PackTable
    manifest: Manifest
    out: Path
    compression: Compression
    again: Collection[str]
    limits: ScanLimits
    workers: int

    def tasks(self, numbers: Sequence[int] | np.ndarray) -> Iterator[PackTask]:
        """The work of the worker processes for some scans, made when it is needed."""
        root = self.manifest.root.resolve()
        for row in self.table.some(numbers):
            yield PackTask(
                row,
                root,
                self.out,
                self.compression,
                ignore_labels=self.manifest.ignore_labels,
                again=row.id in self.again,
                label_names=self.manifest.label_names,
            )


def _pack_with_room(
    work: _Work,
    share: Share,
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], object] | None,
) -> None:
    """`_pack_some`, once the disk is known to have room; arguments as in `pack`.

    Where the uncompressed scans would not fit, a few scans are packed first, and the size of the
    others is estimated from them. The scans of other shares, which are packed on the same disk,
    count too.

    Raises:
        UserError: the scans do not fit.
    """
    table = work.table
    is_missing = ~are_present(work.out, table.whole)
    new = np.flatnonzero(is_missing[table.of_share])
    line, begun = "", np.zeros(0, np.int64)
    if len(new):
        room = Room.measure(work.out, table.whole.where(pa.array(is_missing)), share.total)
        line = room.bound_line()
        if not room.is_ample:
            begun = np.unique(new[np.arange(SAMPLE) * (len(new) - 1) // SAMPLE])
            _pack_some(work, begun, progress)
            packed = begun[table.is_stored[begun]]
            if len(packed):  # without one there is no estimate; a full disk is an error later
                line = room.check_estimate(
                    len(packed),
                    int(table.stored_bytes[packed].sum()),
                    int(voxel_bytes_of(table.rows)[packed].sum()),
                )
    if say is not None and line:
        say(line)
    _pack_some(work, np.setdiff1d(np.arange(len(table)), begun), progress)


def _pack_some(
    work: _Work, numbers: np.ndarray, progress: Callable[[int, int], None] | None
) -> None:
    """Keep, pack or refuse scans.

    Args:
        work: what is packed; its table receives what becomes of each scan.
        numbers: scans that are done now.
        progress: as in `pack`.
    Raises:
        OSError: the store cannot be written; the table has what was done before.
    """
    table = work.table
    done = int(table.is_done.sum())
    with closing(_outcomes(work, numbers)) as results:  # ends the workers at an error
        for i, outcome in results:
            if outcome.write_error is not None:
                raise outcome.write_error
            table.take(i, outcome)
            done += 1
            if progress is not None:
                progress(done, len(table))


def _outcomes(work: _Work, numbers: np.ndarray) -> Generator[tuple[int, PackOutcome], None, None]:
    """Yield number and outcome of each scan, in the order in which they become ready.

    Where a worker process was lost, the labels may be the cause, and they must not refuse their
    scan: it is packed again without them.
    """

    def run(some: Iterable[PackTask], num: int) -> Generator[tuple[int, PackOutcome], None, None]:
        results = map_unordered(
            pack_task,
            some,
            min(work.workers, num),
            failed_outcome,
            num_bytes=lambda task: max(task.row.bytes, voxel_bytes(task.row)),
            limits=work.limits,
            modules=(__name__, *LIBRARIES),
        )
        with closing(results):  # ends the workers at an error or Ctrl-C
            yield from results

    lost: dict[int, RefusedScan] = {}
    labels = work.table.column("label_path")
    for k, outcome in run(work.tasks(numbers), len(numbers)):
        refused, i = outcome.refused, int(numbers[k])
        if refused is not None and refused.reason in LOST and labels[i].as_py():
            lost[i] = refused
        else:
            yield i, outcome
    again = sorted(lost)
    alone = [replace(one, row=replace(one.row, label_path="")) for one in work.tasks(again)]
    for k, outcome in run(alone, len(alone)):
        if outcome.scan is not None:
            problem = lost[again[k]]
            detail = f"with its labels, {problem.detail}"
            label_path = str(labels[again[k]].as_py())
            labels_refused = RefusedScan(outcome.scan.id, label_path, problem.reason, detail)
            outcome = replace(outcome, labels_refused=labels_refused)
        yield again[k], outcome


def _write_index(out: Path, manifest: Manifest, columns: dict[str, pa.Array]) -> None:
    """Write the list of a store's scans, which makes them visible."""
    about = about_store(
        *(columns, manifest.digest, manifest.summary(), manifest.patient_key),
        manifest_file="" if manifest.file is None else _below(out, manifest.file),
    )
    write_index(out, index_of_columns(columns, about))


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


def _nothing_packed(table: PackTable, root: Path) -> UserError:
    """The error of a pack whose scans were all refused."""
    if not root.is_dir():
        return UserError(
            f"the archive {root} is gone, where the manifest expects it; give its folder with "
            "`tapct pack --root FOLDER`"
        )
    first = table.refused[0]
    return UserError(
        f"none of the {len(table.refused)} accepted scans could be packed; the first, "
        f"{first.path}: {first.reason}: {first.detail} Check that {root} is still the archive. If "
        "it changed, run `tapct index` again."
    )


def _write_error(error: OSError, out: Path, table: PackTable) -> UserError:
    """The error of a write that failed; for a full disk with the space that is missing."""
    if os.path.lexists(out) and not out.is_dir():
        return UserError(f"cannot write the store {out}: it is no folder; choose another --out")
    if error.errno not in NO_SPACE:
        return UserError(
            f"cannot write the store {out}: {error.strerror or error}. Choose a folder that is "
            "writable."
        )
    voxels = voxel_bytes_of(table.rows)
    packed = int(voxels[table.is_stored].sum())
    ratio = 0.5  # CT usually packs to half its size
    if packed:
        ratio = int(table.stored_bytes.sum()) / packed
    rest = ratio * int(voxels[~table.is_done].sum())
    return UserError(
        f"no space left for the store {out} after {int(table.is_done.sum())} of {len(table)} "
        f"scans: the rest needs about {rest / 1e9:.3g} GB, "
        f"{shutil.disk_usage(out).free / 1e9:.3g} GB are free. "
        "Free some space and run `tapct pack` again; packed scans are kept."
    )


def _report(
    out: Path, table: PackTable, seconds: float, unlisted: tuple[str, ...] = ()
) -> PackReport:
    """The report of all outcomes.

    Args:
        out: folder of the store.
        table: scans, and what became of them.
        seconds: wall time.
        unlisted: names of packed files that the store does not list.
    """
    ids = table.column("id")
    is_packed = table.is_stored & ~table.is_kept
    listed = table.is_listed
    return PackReport(
        store=out,
        packed=TextColumn(ids.filter(pa.array(is_packed))),
        kept=int((table.is_stored & table.is_kept).sum()),
        damaged=tuple(ids.filter(pa.array(is_packed & table.was_damaged)).to_pylist()),
        refused=tuple(table.refused[i] for i in sorted(table.refused)),
        held=tuple(table.held[i].id for i in sorted(table.held)),
        unlisted=unlisted,
        voxel_bytes=int(voxel_bytes_of(table.rows)[listed].sum()),
        stored_bytes=int(table.stored_bytes.sum()),
        seconds=seconds,
        num_labelled=int((table.is_labelled & listed).sum()),
        labels_refused=tuple(table.labels_refused[i] for i in sorted(table.labels_refused)),
    )
