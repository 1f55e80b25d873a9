"""Manifest -> store: every accepted scan becomes one compressed array that is read slab by slab.

Files are written aside, synced and renamed, and `store.parquet` comes last: a packed scan is whole
or absent, and a run that was stopped at any point goes on where it was. Codec, filter and chunk
shape were chosen by measurement on CT
(scripts/bench_loader.py): zstd level 1 with bit shuffle is within 2 % of the size of level 5 and
packs three times as fast, and byte shuffle is larger; level 0 means LZ4, which reads in 40 % of the
time at a fifth more space.

Axes: Z Y X depth height width in voxels.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import re
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapct.base.exits import UserError
from tapct.base.files import NO_SPACE, TEMPORARY_SUFFIX, write_atomically
from tapct.data.ingest import read_volume
from tapct.data.manifest import Manifest, Row
from tapct.data.packed import (
    Damaged,
    PackedMeta,
    encode,
    open_packed,
)
from tapct.data.store import INDEX_NAME, StoredScan, index_bytes
from tapct.data.workers import map_unordered
from tapct.types import Refused, Volume

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RefusedScan:
    """An accepted scan that could not be packed: its id, its path in the archive, a reason code and
    one line.
    """

    id: str
    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class PackReport:
    """What one `pack` did.

    Args:
        store: the folder.
        packed: ids of the scans written now.
        kept: how many were there already and whole.
        damaged: those of `packed` whose file was there but not readable.
        refused: scans of the manifest that are not in the store.
        unlisted: files of the folder that belong to no scan of this manifest; they are left alone.
        voxel_bytes, stored_bytes: of all scans in the store, int16 in memory and compressed on
            disk.
        seconds: wall time.
    """

    store: Path
    packed: tuple[str, ...]
    kept: int
    damaged: tuple[str, ...]
    refused: tuple[RefusedScan, ...]
    unlisted: tuple[str, ...]
    voxel_bytes: int
    stored_bytes: int
    seconds: float


@dataclass(frozen=True)
class _Task:
    row: Row
    root: Path
    out: Path
    level: int


@dataclass(frozen=True)
class _Outcome:
    """One of `scan`, `refused` and `write_error` is set."""

    scan: StoredScan | None = None
    refused: RefusedScan | None = None
    write_error: OSError | None = None
    kept: bool = False
    was_damaged: bool = False
    stored_bytes: int = 0


def pack(
    manifest: Manifest,
    out: Path,
    *,
    workers: int = 0,
    level: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Pack every accepted scan of a manifest that is not packed yet.

    Args:
        manifest: what `tapct index` wrote.
        out: folder of the store; made if absent.
        workers: processes; 0 or 1 packs in this one.
        level: 0 is LZ4; 1..9 is zstd, smaller and slower to write.
        progress: called with (finished scans, scans).
    Raises:
        UserError: nothing to pack, nothing could be packed, the disk is full, or another pack is
            writing there.
    """
    rows = _checked_rows(manifest, level)
    started = time.monotonic()
    root = manifest.root.resolve()
    outcomes: list[_Outcome | None] = [None] * len(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _only_one(out):
            for leftover in out.glob(f".*{TEMPORARY_SUFFIX}"):
                leftover.unlink()
            tasks = [_Task(row, root, out, level) for row in rows]
            with closing(
                _run(tasks, workers)
            ) as results:  # closing lets the running scans finish, and no more
                for done, (i, outcome) in enumerate(results, 1):
                    if outcome.write_error is not None:
                        raise outcome.write_error
                    outcomes[i] = outcome
                    if progress is not None:
                        progress(done, len(rows))
            finished = [outcome for outcome in outcomes if outcome is not None]
            scans = [outcome.scan for outcome in finished if outcome.scan is not None]
            report = _report(out, finished, scans, time.monotonic() - started)
            if not scans:
                raise _nothing_packed(report, root)
            write_atomically(
                out / INDEX_NAME, index_bytes(scans, root, manifest.digest, manifest.summary())
            )
            return report
    except OSError as error:
        raise _write_error(error, out, rows, outcomes) from error


def _nothing_packed(report: PackReport, root: Path) -> UserError:
    first = report.refused[0]
    return UserError(
        f"none of the {len(report.refused)} accepted scans could be packed; the first, "
        f"{first.path}: {first.reason}: "
        f"{first.detail} Is {root} still the archive? If it changed, run `tapct index` again."
    )


def _checked_rows(manifest: Manifest, level: int) -> Sequence[Row]:
    if not 0 <= level <= 9:
        raise UserError(
            f"the compression level is {level}; it goes from 0 (LZ4, fastest) over 1 (zstd) to 9."
        )
    rows = manifest.accepted
    if not rows:
        raise UserError(
            f"the manifest of {manifest.root} has no accepted scan among {len(manifest.rows)}; "
            "see its reasons."
        )
    seen: set[str] = set()
    for row in rows:
        if row.id in seen or not _FILE_NAME.fullmatch(row.id):
            raise UserError(
                f"scan id {row.id!r} of {row.path} is taken twice or no file name; run `tapct "
                "index` again."
            )
        seen.add(row.id)
    return rows


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Hold the folder's lock, so that nobody takes another pack's files for leftovers."""
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another `tapct pack` is writing to {out}; wait for it or choose another folder."
            ) from None
        yield


def _run(tasks: Sequence[_Task], workers: int) -> Generator[tuple[int, _Outcome], None, None]:
    yield from map_unordered(_work, tasks, workers, _crashed)


def _crashed(task: _Task) -> _Outcome:
    detail = "packing it ended the process (a crash of a reader library, or out of memory)"
    return _Outcome(refused=RefusedScan(task.row.id, task.row.path, "crashed", detail))


def _work(task: _Task) -> _Outcome:
    """`pack_scan` for `map_unordered`: nothing is raised, and Ctrl-C is the parent's business."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return pack_scan(task)
    except OSError as error:
        return _Outcome(write_error=error)


def pack_scan(task: _Task) -> _Outcome:
    """Keep, pack or refuse one scan. Raises: OSError where the store cannot be written."""
    row, file = task.row, task.out / f"{task.row.id}.b2nd"
    was_damaged = False
    if file.exists():
        try:
            _, meta = open_packed(file)
        except Damaged:
            was_damaged = True
        else:
            if (meta.id, meta.checksum) == (row.id, row.digest) and not _differences(
                row, meta.shape_ZYX, meta.spacing_mm
            ):
                return _Outcome(_stored(row, meta), kept=True, stored_bytes=file.stat().st_size)
    try:
        frame, meta = encode(_read_as_indexed(row, task.root), row.id, task.level)
        if meta.checksum != row.digest:
            detail = (
                f"{task.root / row.path} has other voxels than the manifest says; run `tapct "
                "index` again."
            )
            raise Refused("changed", detail)
    except Refused as refusal:
        return _Outcome(
            refused=RefusedScan(row.id, row.path, refusal.reason, refusal.detail),
            was_damaged=was_damaged,
        )
    write_atomically(file, frame)
    return _Outcome(_stored(row, meta), was_damaged=was_damaged, stored_bytes=len(frame))


def _stored(row: Row, meta: PackedMeta) -> StoredScan:
    return StoredScan(
        row.id,
        meta.shape_ZYX,
        meta.spacing_mm,
        row.patient,
        row.path,
        row.label_path,
        meta.checksum,
    )


def _read_as_indexed(row: Row, root: Path) -> Volume:
    """Read the source. Raises: Refused where it is not what the manifest says."""
    path = root / row.path
    if not path.exists():
        raise Refused(
            "vanished", f"{path} was there when the manifest was made; run `tapct index` again."
        )
    try:
        volume = read_volume(path)
    except OSError as error:
        raise Refused("unreadable", f"{path}: {error.strerror or error}") from error
    z, y, x = volume.hu_ZYX.shape
    difference = _differences(row, (z, y, x), volume.spacing_mm)
    if difference:
        raise Refused("changed", f"{path} {difference}; run `tapct index` again.")
    return volume


def _differences(
    row: Row, shape_ZYX: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> str:
    """In words, what of a grid is not as the manifest says; empty if all is."""
    if shape_ZYX != (row.depth, row.height, row.width):
        return f"has shape {shape_ZYX}, the manifest says {(row.depth, row.height, row.width)}"
    indexed_mm = (row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm)
    if not np.allclose(
        spacing_mm, indexed_mm, rtol=1e-5, atol=0.0
    ):  # the manifest may hold float32
        return f"has spacing {spacing_mm} mm, the manifest says {indexed_mm}"
    return ""


def _write_error(
    error: OSError, out: Path, rows: Sequence[Row], outcomes: Sequence[_Outcome | None]
) -> UserError:
    """Say what is missing, where, and that nothing is lost."""
    done = [(row, outcome) for row, outcome in zip(rows, outcomes) if outcome is not None]
    if error.errno not in NO_SPACE:
        return UserError(
            f"cannot write the store {out}: {error.strerror or error}. Choose a folder that you "
            "may write to."
        )
    voxel_bytes = sum(_voxel_bytes(row) for row, outcome in done if outcome.scan is not None)
    ratio = (
        sum(outcome.stored_bytes for _, outcome in done) / voxel_bytes if voxel_bytes else 0.5
    )  # as CT usually packs
    rest = ratio * sum(_voxel_bytes(row) for row, outcome in zip(rows, outcomes) if outcome is None)
    return UserError(
        f"no space left for the store {out} after {len(done)} of {len(rows)} scans: the rest "
        "needs about "
        f"{rest / 1e9:.3g} GB, {shutil.disk_usage(out).free / 1e9:.3g} GB is free. Make room and "
        "run `tapct pack` "
        f"again; what is packed stays."
    )


def _voxel_bytes(row: Row) -> int:
    return 2 * row.depth * row.height * row.width


def _report(
    out: Path, outcomes: Sequence[_Outcome], scans: Sequence[StoredScan], seconds: float
) -> PackReport:
    written = [outcome for outcome in outcomes if outcome.scan is not None and not outcome.kept]
    listed = {f"{scan.id}.b2nd" for scan in scans}
    return PackReport(
        store=out,
        packed=tuple(outcome.scan.id for outcome in written if outcome.scan is not None),
        kept=sum(outcome.kept for outcome in outcomes),
        damaged=tuple(
            outcome.scan.id
            for outcome in written
            if outcome.scan is not None and outcome.was_damaged
        ),
        refused=tuple(outcome.refused for outcome in outcomes if outcome.refused is not None),
        unlisted=tuple(sorted(file.name for file in out.glob("*.b2nd") if file.name not in listed)),
        voxel_bytes=sum(2 * int(np.prod(scan.shape_ZYX)) for scan in scans),
        stored_bytes=sum(outcome.stored_bytes for outcome in outcomes),
        seconds=seconds,
    )
