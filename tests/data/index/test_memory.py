"""The memory of an index does not grow with the number of scans, but for some bytes of each."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from tapct.data import manifest as manifests
from tapct.data.index import journal, placed_rows, scan_row
from tapct.data.index.build import build_manifest
from tapct.data.index.report import lines_about
from tapct.data.manifest import Manifest
from tapct.data.patients import near_copies
from tapct.data.search import seen_folders
from tapct.types import PatientClues, ScanFacts, Volume

MOST_BYTES = 600  # of a scan; an index with objects for every scan needed 6000 and more
FEW, MANY = 80, 240
POOLS: list[pyarrow.MemoryPool] = []  # what was allocated in a pool must not outlive it


def stand_in(source: object, *_: object) -> Volume:
    """A scan that no file has to hold; every one has another patient."""
    number = int(source.path.name.split(".")[0])  # type: ignore[attr-defined]
    if number % 50 == 0:
        gc.collect()  # objects of numpy that refer to each other
    draw = np.random.default_rng(number)
    hu_ZYX = draw.integers(-1000, 1000, (12, 5, 5)).astype(np.int16)
    study, series = (f"{number * factor % 2**64:016x}" for factor in (7919, 104729))
    facts = ScanFacts(f"{number:016x}", clues=PatientClues("header", study, series))
    return Volume(hu_ZYX, (2.0, 1.0, 1.0), facts=facts)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory at a time is small beside what all scans would need."""
    monkeypatch.setattr(placed_rows, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(placed_rows, "_MOST_BYTES", 1 << 15)
    monkeypatch.setattr(journal, "_FLUSH_ROWS", 64)
    monkeypatch.setattr(journal, "_PART_BYTES", 1 << 16)
    monkeypatch.setattr(manifests, "_ROWS_AT_ONCE", 16)
    monkeypatch.setattr(manifests, "_GROUP_BYTES", 1 << 15)
    monkeypatch.setattr(near_copies, "_HASHES_AT_ONCE", 256)
    monkeypatch.setattr(seen_folders, "_MOST_RECENT", 4)
    monkeypatch.setattr(scan_row, "read_source", stand_in)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of many small parts


def peaks(folder: Path, num_scans: int) -> Iterator[int]:
    """The largest memory in bytes of a first index of an archive, and of a second one."""
    for number in range(num_scans):
        home = folder / "scans" / f"{number // 20}"
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number}.nii").write_bytes(b"x")
    before = pyarrow.default_memory_pool()
    for _ in range(2):
        pool = pyarrow.proxy_memory_pool(before)
        POOLS.append(pool)
        pyarrow.set_memory_pool(pool)
        gc.collect()
        tracemalloc.start()
        try:
            built = build_manifest(folder / "scans", folder / "archive")
            assert len(list(lines_about(built, folder, 2))) > 0
            assert built.summary() == {"accepted": num_scans}
            yield tracemalloc.get_traced_memory()[1] + pool.max_memory()
        finally:
            tracemalloc.stop()
            pyarrow.set_memory_pool(before)


def test_the_memory_of_an_index_grows_by_some_bytes_per_scan(tmp_path: Path) -> None:
    list(peaks(tmp_path / "first", 20))  # modules and caches
    few, many = (list(peaks(tmp_path / str(number), number)) for number in (FEW, MANY))
    growth = [(after - before) / (MANY - FEW) for before, after in zip(few, many)]
    print(f"bytes per scan, first and second index: {growth}; at {FEW} scans: {few}")
    assert max(growth) < MOST_BYTES, growth
    rows = Manifest.read(tmp_path / str(MANY) / "archive").rows
    assert len({row.patient for row in rows}) == len(rows) == MANY
