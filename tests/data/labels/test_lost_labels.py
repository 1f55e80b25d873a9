"""Labels that end, block or fill their worker process, or cannot be read, refuse no scan."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scan_files import noise_ct, save_labels, save_scan

from tapct.data.index import examining, scan_row
from tapct.data.index.build import build_manifest
from tapct.data.manifest import Row
from tapct.data.scans.ingest import OUT_OF_MEMORY
from tapct.data.workers.process_pool import Failure, ScanLimits
from tapct.types import Refused


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two scans, one of them with labels."""
    save_scan(tmp_path / "a" / "c1.nii.gz", noise_ct(1))
    save_scan(tmp_path / "a" / "c2.nii.gz", noise_ct(2))
    save_labels(tmp_path / "a" / "c1_seg.nii.gz")
    return tmp_path / "a"


def rows_of(archive: Path, **options: Any) -> tuple[Row, Row]:
    built = build_manifest(archive, archive.parent / "m.parquet", **options)
    first, second = built.rows
    assert (second.status, second.detail) == ("accepted", "")
    assert built.label_report is not None
    assert built.label_report.num_labelled == 0
    assert sum(count for _, count in built.label_report.unusable) == 1
    return first, second


@pytest.mark.parametrize("reason", ["timed_out", "crashed", "out_of_memory"])
def test_a_worker_that_is_lost_with_the_labels(
    archive: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def pool(
        function: Callable[[Any], Any],
        inputs: Sequence[Any],
        workers: int,
        on_failure: Callable[[Any, Failure], Any],
        **options: object,
    ) -> Iterator[tuple[int, Any]]:
        for i, task in enumerate(inputs):
            is_lost = task.labels is not None and not task.label_problem
            yield i, on_failure(task, Failure(reason, "no answer")) if is_lost else function(task)

    monkeypatch.setattr(examining, "map_unordered", pool)
    row, _ = rows_of(archive)
    assert (row.status, row.label_path, row.label_digest) == ("accepted", "", "")
    assert row.detail == f"its labels are not used: {reason}: with its labels, no answer"


def test_a_scan_that_is_lost_without_its_labels_too_stays_refused(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(source: Any, *_: object) -> Any:
        if source.path.name.startswith("c1"):
            raise Refused(OUT_OF_MEMORY, "no memory")
        return read_source(source)

    read_source = scan_row.read_source
    monkeypatch.setattr(scan_row, "read_source", read)
    built = build_manifest(archive, archive.parent / "m.parquet")
    assert [row.reason for row in built.rows] == ["out_of_memory", ""]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("bad_alloc"), OSError(5, "I/O")])
def test_labels_that_cannot_be_read_in_this_process(
    archive: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("tapct.data.labels.reading._read_file", fail)
    row, _ = rows_of(archive)
    reason = "unreadable" if isinstance(error, OSError) else "out_of_memory"
    assert row.status == "accepted"
    assert row.detail.startswith(f"its labels are not used: {reason}: ")


def test_a_folder_of_masks_that_cannot_be_listed(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tapct.data.labels.reading._files_of", fail)
    row, _ = rows_of(archive)
    assert row.status == "accepted"
    assert "unreadable: the file cannot be read: Permission denied" in row.detail


def test_labels_that_inflate_beyond_the_memory_of_a_worker(archive: Path) -> None:
    whole = (archive / "c1_seg.nii.gz").read_bytes()
    header = bytearray(gzip.decompress(whole)[:352])
    header[42:48] = np.array([400, 400, 400], "<i2").tobytes()
    header[70:74] = np.array([2, 8], "<i2").tobytes()
    with gzip.open(archive / "c1_seg.nii.gz", "wb", compresslevel=1) as file:
        file.write(bytes(header) + bytes(400**3))
    limits = ScanLimits(memory_bytes=48 << 20)
    row, _ = rows_of(archive, workers=1, limits=limits)
    assert row.status == "accepted"
    assert row.detail.startswith("its labels are not used: out_of_memory: with its labels, ")
