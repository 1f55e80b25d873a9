"""Measure how fast this machine reads random slabs from a store."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tapct.base.exits import UserError
from tapct.data.packed.store import Store

READ_SECONDS = 1.5


@dataclass(frozen=True)
class ReadRate:
    """Measured rate of reading.

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
        path: folder of the store.
        depth: slices per slab.
        workers: number of threads; 0 counts as 1.
    Raises:
        UserError: the store holds no scan, or a scan cannot be read.
    """
    store, threads = Store(Path(path)), max(1, workers)
    if not store.scans:
        raise UserError(f"{path} holds no scan; pack an archive that has accepted scans")
    # unseeded: other slabs in every call, so that not all of them come from the page cache
    draw = random.Random()
    end = time.perf_counter() + READ_SECONDS

    def read(seed: float) -> tuple[int, int]:
        """Read until the time is over; returns number of slabs and bytes."""
        own, slabs, num_bytes = random.Random(seed), 0, 0
        while slabs == 0 or time.perf_counter() < end:
            scan = own.randrange(len(store))
            num_slices = store.scans[scan].shape_ZYX[0]
            start = own.randrange(max(1, num_slices - depth + 1))
            num_bytes += store.read_slab(scan, start, min(num_slices, start + depth)).nbytes
            slabs += 1
        return slabs, num_bytes

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        totals = list(pool.map(read, [draw.random() for _ in range(threads)]))
    seconds = time.perf_counter() - begin
    slabs, num_bytes = (sum(column) for column in zip(*totals, strict=True))
    return ReadRate(len(store), slabs / seconds, num_bytes / seconds, threads)
