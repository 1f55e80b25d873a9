"""Verify a store: decode every packed scan and compare it with the digest taken before packing.

A damaged scan is repaired by `pack` with its id in `again`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow.compute as pc

from tapct.base.counted import counted
from tapct.base.exits import Incomplete
from tapct.data.manifest import Manifest, RowTable, rows_as_table
from tapct.data.packed.packed_scan import Damaged
from tapct.data.packed.store import Store
from tapct.data.packed.store_before import StoreBefore


def check_complete(store: Store, manifest: Manifest, allow_missing: int = 0) -> None:
    """Compare the list of a store with the manifest that should have been packed.

    Args:
        store: packed scans.
        manifest: manifest.
        allow_missing: number of accepted scans that may be missing.
    Raises:
        UserError: the store is one of another archive.
        Incomplete: the store lacks more accepted scans of the manifest, or has other voxels of
            them.
    """
    StoreBefore.read(store.path).check_replaceable_by(manifest)
    accepted = manifest.accepted
    rows = (accepted if isinstance(accepted, RowTable) else RowTable(rows_as_table(accepted))).table
    ids = store.scans.column("id")
    places = pc.index_in(rows.column("id").cast(ids.type), value_set=ids)
    is_missing = pc.is_null(places)
    stored = store.scans.column("checksum").take(places.combine_chunks())
    is_other = pc.not_equal(stored, rows.column("digest").cast(stored.type).combine_chunks())
    lacking = [
        *rows.column("path").filter(is_missing).to_pylist(),
        *rows.column("path").filter(pc.fill_null(is_other, False)).to_pylist(),
    ]
    if len(lacking) > allow_missing:
        raise Incomplete(
            f"the store {store.path} lacks {counted(len(lacking), 'accepted scan')} of the "
            f"manifest, or has other voxels of them, e.g. {lacking[0]}; run `tapct pack` without "
            "--verify"
        )


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
