"""Measure how fast this machine reads random slabs from a store."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tapct.base.exits import UserError
from tapct.data.store import Store

READ_SECONDS = 1.5


@dataclass(frozen=True)
class ReadRate:
    """What was measured.

    Args:
        scans: number of scans in the store.
        slabs_per_s: slabs per second, all threads together.
        bytes_per_s: bytes of decoded int16 voxels per second.
        threads: number of threads that read at once.
    """

    scans: int
    slabs_per_s: float
    bytes_per_s: float
    threads: int


def measure(path: str | Path, depth: int, workers: int) -> ReadRate:
    """Read random slabs as the loader does, for `READ_SECONDS`.

    Args:
        path: store folder.
        depth: slices per slab.
        workers: number of threads; 0 counts as 1.
    Raises:
        UserError: the store holds no scan, or a scan cannot be read.
    """
    store, threads = Store(Path(path)), max(1, workers)
    if not store.scans:
        raise UserError(f"{path} holds no scan; pack an archive that has some")
    draw = (
        random.Random()
    )  # another place each time, so that the disk is asked and not only the page cache
    end = time.perf_counter() + READ_SECONDS

    def read(seed: float) -> tuple[int, int]:
        own, slabs, size = random.Random(seed), 0, 0
        while slabs == 0 or time.perf_counter() < end:
            scan = own.randrange(len(store))
            deep = store.scans[scan].shape_ZYX[0]
            start = own.randrange(max(1, deep - depth + 1))
            size += store.read_slab(scan, start, min(deep, start + depth)).nbytes
            slabs += 1
        return slabs, size

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(read, [draw.random() for _ in range(threads)]))
    seconds = time.perf_counter() - begin
    slabs, size = (sum(column) for column in zip(*found, strict=True))
    return ReadRate(len(store), slabs / seconds, size / seconds, threads)
