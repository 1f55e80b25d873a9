"""Several stores as one list of scans, for a run that is trained on several archives.

The scans of all stores are numbered through: those of the first store, then those of the second
one. IDs may occur twice, because two archives may have the same paths, so a scan is named by its
number here.

Axes: N scans; Z Y X depth height width in voxels.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from tapct.data.lazy_rows import LazyRows
from tapct.data.packed.scan_list import ScanList, StoredScan
from tapct.data.packed.store import Store


class GroupScans(LazyRows[StoredScan]):
    """The scans of several stores, numbered through; methods as in `ScanList`.

    Args:
        tables: scans of each store.
    """

    def __init__(self, tables: Sequence[ScanList]) -> None:
        self.tables = tuple(tables)
        self.ends = list(accumulate(map(len, tables)))

    def find(self, i: int) -> tuple[int, int]:
        """The store of scan i, and its row there."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)} scans")
        k = bisect_right(self.ends, i)
        return k, int(i) - (self.ends[k] - len(self.tables[k]))

    def __len__(self) -> int:
        return self.ends[-1]

    def row(self, i: int) -> StoredScan:
        """Scan i as an object."""
        k, row = self.find(i)
        return self.tables[k][row]

    def __iter__(self) -> Iterator[StoredScan]:
        for table in self.tables:
            yield from table

    def id(self, i: int) -> str:
        """ID of scan i."""
        k, row = self.find(i)
        return self.tables[k].id(row)

    def shape_ZYX(self, i: int) -> tuple[int, int, int]:
        """Number of voxels of scan i."""
        k, row = self.find(i)
        return self.tables[k].shape_ZYX(row)

    def spacing_mm(self, i: int) -> tuple[float, float, float]:
        """Distance of voxel centres of scan i along (z, y, x)."""
        k, row = self.find(i)
        return self.tables[k].spacing_mm(row)

    def column(self, name: str) -> pa.Array:
        """A column of all scans as text."""
        return pa.concat_arrays(
            [table.column(name).cast(pa.large_string()) for table in self.tables]
        )

    def depths(self) -> np.ndarray:
        """Number of slices of each scan, int (N,)."""
        return np.concatenate([table.depths() for table in self.tables])

    def patient_numbers(self) -> np.ndarray:
        """A number of each scan's patient, uint64 (N,)."""
        return np.concatenate([table.patient_numbers() for table in self.tables])

    def labelled(self) -> tuple[StoredScan, ...]:
        """The scans with labels."""
        return tuple(scan for table in self.tables for scan in table.labelled())


class StoreGroup:
    """Several stores that a run is trained on; attributes and methods as in `Store`.

    Args:
        stores: stores.
        names: name of each.
    """

    def __init__(self, stores: Sequence[Store], names: Sequence[str]) -> None:
        self.stores, self.names = tuple(stores), tuple(names)
        self.scans = GroupScans([store.scans for store in stores])
        self.path = Path(" + ".join(str(store.path) for store in stores))
        digest = hashlib.blake2b(digest_size=16)
        for name, store in zip(names, stores, strict=True):
            digest.update(f"{name} {store.digest}\n".encode())
        self.digest = digest.hexdigest()
        total: Counter[str] = Counter()
        for store in stores:
            total.update(store.summary)
        self.summary = dict(total)

    def __len__(self) -> int:
        return len(self.scans)

    def range_of(self, archive: int) -> range:
        """The numbers of one store's scans."""
        end = self.scans.ends[archive]
        return range(end - len(self.stores[archive]), end)

    def num_guessed_patients(self) -> int:
        """Number of scans whose patient `tapct index` guessed from file names."""
        return sum(store.num_guessed_patients() for store in self.stores)

    def read_slab(self, i: int, z0: int, z1: int) -> np.ndarray:
        """Slices z0..z1-1 of scan i, as `Store.read_slab`."""
        k, row = self.scans.find(i)
        return self.stores[k].read_slab(row, z0, z1)

    def read_into(self, i: int, z0: int, slab_ZYX: np.ndarray) -> None:
        """Like `read_slab`, into an array, as `Store.read_into`."""
        k, row = self.scans.find(i)
        self.stores[k].read_into(row, z0, slab_ZYX)

    def read_box(
        self, i: int, start_ZYX: tuple[int, int, int], shape_ZYX: tuple[int, int, int]
    ) -> np.ndarray:
        """A box of scan i, as `Store.read_box`."""
        k, row = self.scans.find(i)
        return self.stores[k].read_box(row, start_ZYX, shape_ZYX)


AnyStore: TypeAlias = Store | StoreGroup


def archives_of(store: AnyStore) -> list[tuple[Store, range]]:
    """Each store of a group and the numbers of its scans; a store alone is a group of one."""
    if isinstance(store, StoreGroup):
        return [(one, store.range_of(k)) for k, one in enumerate(store.stores)]
    return [(store, range(len(store)))]
