"""Pack one scan and its labels, or keep or refuse them. This runs in a worker process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tapct.base.files import PRIVATE, write_atomically
from tapct.data.digest import label_digest
from tapct.data.labels.reading import read_labels_of
from tapct.data.manifest import Row
from tapct.data.packed.pack_report import RefusedScan
from tapct.data.packed.packed_labels import encode_labels, labels_file, packed_digest, read_names
from tapct.data.packed.packed_scan import ZSTD, Damaged, PackedMeta, encode, open_packed
from tapct.data.packed.store import StoredScan, packed_file
from tapct.data.scans.ingest import OUT_OF_MEMORY, read_source
from tapct.data.scans.read_rules import AS_INDEXED
from tapct.data.search.discover import source_of
from tapct.data.workers.process_pool import Failure
from tapct.types import Refused, Volume


@dataclass(frozen=True)
class Compression:
    """How scans are compressed.

    Args:
        level: level of the codec, 1 to 9.
        codec: zstd or lz4.
        tile: rows and columns of a chunk; 0 for whole slices.
    """

    level: int = 1
    codec: str = ZSTD
    tile: int = 0


@dataclass(frozen=True)
class PackTask:
    """One scan for a worker process; `again` to pack it even though its file can be opened."""

    row: Row
    root: Path
    out: Path
    compression: Compression = Compression()
    ignore_labels: tuple[int, ...] = ()
    again: bool = False
    label_names: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class PackOutcome:
    """The result of one task; one of `scan`, `refused` and `write_error` is set."""

    scan: StoredScan | None = None
    refused: RefusedScan | None = None
    write_error: OSError | None = None
    kept: bool = False
    was_damaged: bool = False
    stored_bytes: int = 0
    labels_refused: RefusedScan | None = None


def failed_outcome(task: PackTask, failure: Failure) -> PackOutcome:
    """The result of a scan whose worker process has none."""
    detail = failure.detail.replace(f"{task.root}/", "")
    return PackOutcome(refused=RefusedScan(task.row.id, task.row.path, failure.reason, detail))


def pack_task(task: PackTask) -> PackOutcome:
    """`pack_scan` as the pool calls it: an error of the store is a result, and not a refusal."""
    try:
        return pack_scan(task)
    except OSError as error:
        return PackOutcome(write_error=error)


def pack_scan(task: PackTask) -> PackOutcome:
    """Keep, pack or refuse one scan. Raises: OSError where the store cannot be written."""
    row, file = task.row, packed_file(task.out, task.row.id)
    was_damaged = task.again
    if file.exists() and not task.again:
        try:
            _, meta = open_packed(file)
        except Damaged:
            was_damaged = True
        else:
            is_current = meta.checksums_C is not None  # files of earlier versions are packed again
            if (
                is_current
                and (meta.id, meta.checksum) == (row.id, row.digest)
                and not _differences(row, meta.shape_ZYX, meta.spacing_mm)
            ):
                size = file.stat().st_size
                return _with_labels(
                    task, PackOutcome(_stored(row, meta), kept=True, stored_bytes=size)
                )
    try:
        volume = _read_as_indexed(row, task.root)
        frame, meta = encode(
            volume, row.id, task.compression.level, task.compression.codec, task.compression.tile
        )
        if meta.checksum != row.digest:
            detail = f"{task.root / row.path} has other voxels than at `tapct index`; run it again."
            raise Refused("changed", detail)
    except Refused as refusal:
        if refusal.reason == OUT_OF_MEMORY:
            raise MemoryError(refusal.detail) from refusal  # the pool tries it again with more
        return PackOutcome(
            refused=RefusedScan(row.id, row.path, refusal.reason, refusal.detail),
            was_damaged=was_damaged,
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, frame, mode=PRIVATE)
    outcome = PackOutcome(_stored(row, meta), was_damaged=was_damaged, stored_bytes=len(frame))
    return _with_labels(task, outcome, volume)


def _with_labels(task: PackTask, outcome: PackOutcome, volume: Volume | None = None) -> PackOutcome:
    """Keep or pack the labels of a packed scan; labels that cannot be packed do not refuse it.

    Args:
        task: the scan.
        outcome: result for its voxels.
        volume: the scan; None to read it if its labels must be read.
    """
    row, scan = task.row, outcome.scan
    if scan is None or not row.label_path:
        return outcome
    file = labels_file(task.out, row.id)
    try:
        if packed_digest(file) == row.label_digest:
            names = read_names(file)
        else:
            if volume is None:
                volume = _read_as_indexed(row, task.root)
            found = read_labels_of(
                volume,
                task.root / row.label_path,
                task.ignore_labels,
                [task.root / path for path in row.merged_labels],
                task.label_names,
            )
            if label_digest(found.label_map) != row.label_digest:
                raise Refused("changed", "they differ from `tapct index`; run it again.")
            names = found.label_map.names
            frame = encode_labels(found.label_map, row.id, task.compression.level, row.label_digest)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, frame, mode=PRIVATE)
    except Refused as refusal:
        if refusal.reason == OUT_OF_MEMORY:
            raise MemoryError(refusal.detail) from refusal  # the pool tries it again with more
        problem = RefusedScan(row.id, row.label_path, refusal.reason, refusal.detail)
        return replace(outcome, labels_refused=problem)
    return replace(outcome, scan=replace(scan, label_digest=row.label_digest, label_names=names))


def _stored(row: Row, meta: PackedMeta) -> StoredScan:
    """The row of the store for a packed scan."""
    return StoredScan(
        id=row.id,
        shape_ZYX=meta.shape_ZYX,
        spacing_mm=meta.spacing_mm,
        patient=row.patient,
        path=row.path,
        label_digest="",  # set once its labels are packed
        checksum=meta.checksum,
        patient_from=row.patient_from,
    )


def _read_as_indexed(row: Row, root: Path) -> Volume:
    """Read the scan of a row.

    Raises:
        Refused: the scan is gone, unreadable or another one than at `tapct index`.
    """
    source = source_of(root, row.path, row.kind, row.file_paths)
    path = source.path
    for file in source.files:
        if not file.is_file():  # opening what is now a FIFO would never return
            raise Refused(
                "vanished", f"{file} is gone since the manifest was made; run `tapct index` again."
            )
    try:
        volume = read_source(source, accept=AS_INDEXED)
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
    """How a grid differs from the one in the manifest; empty where it does not."""
    if shape_ZYX != (row.depth, row.height, row.width):
        return f"has shape {shape_ZYX}, in the manifest {(row.depth, row.height, row.width)}"
    indexed_mm = (row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm)
    # 1e-5: the manifest may hold float32
    if not np.allclose(spacing_mm, indexed_mm, rtol=1e-5, atol=0.0):
        return f"has spacing {spacing_mm} mm, in the manifest {indexed_mm}"
    return ""
