"""Verify a store: decode every packed scan and compare it with the digest taken before packing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tapct.data.packed import Damaged
from tapct.data.store import Store


def damaged_scans(
    store: Store, *, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[Damaged]:
    """Read the whole store and collect the scans that are damaged.

    Threads suffice: reading, decompressing and hashing all run without Python's global lock.

    Args:
        store: packed scans.
        workers: number of threads; 0 counts as 1. Each holds one whole scan in memory.
        progress: function that is called with (scans done, scans in all).
    Returns:
        One error per damaged scan, which names its file, in the order of the store.
    """

    def check(i: int) -> Damaged | None:
        try:
            store.verify(i)
        except Damaged as error:
            return error
        return None

    damaged: list[Damaged] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for done, error in enumerate(pool.map(check, range(len(store))), 1):
            if error is not None:
                damaged.append(error)
            if progress is not None:
                progress(done, len(store))
    return damaged
