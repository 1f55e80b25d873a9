"""Verify a store: decode every packed scan and compare it with the digest taken before packing.

A damaged scan is repaired by `pack` with its id in `again`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tapct.data.packed import Damaged
from tapct.data.store import Store


def damaged_scans(
    store: Store, *, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> dict[int, Damaged]:
    """Read the whole store and collect the scans that are damaged.

    Threads suffice: reading, decompressing and hashing all run without Python's global lock.

    Args:
        store: packed scans.
        workers: number of threads; 0 counts as 1. Each holds one whole scan in memory.
        progress: function that is called with (scans done, scans in all).
    Returns:
        Number of each damaged scan and its error, which names the file, in the order of the store.
    """

    def check(i: int) -> Damaged | None:
        try:
            store.verify(i)
        except Damaged as error:
            return error
        return None

    damaged: dict[int, Damaged] = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for i, error in enumerate(pool.map(check, range(len(store)))):
            if error is not None:
                damaged[i] = error
            if progress is not None:
                progress(i + 1, len(store))
    return damaged
