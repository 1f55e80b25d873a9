"""Which scans a run is trained on: its store or stores, the selection, the split and the shares.

Everything is a column or a mask over all scans, so that an archive of 10,000,000 scans needs no
object per scan.

Axes: N scans of all stores.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.data import selection
from tapct.data.loading.mixture import Mixture
from tapct.data.loading.slabs import Rows
from tapct.data.packed.store import Store
from tapct.data.packed.store_group import AnyStore, StoreGroup, archives_of
from tapct.run.data_config import DataConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class TrainingData:
    """The scans of a run.

    Args:
        rows: rows of the store that are trained on, ascending.
        drawn: what the loader draws from: `rows`, or those of each archive with its share.
        digest: digest of the store, and of selection, names and shares where the run has them; a
            run is only resumed with the same one.
        lines: lines about selection and shares, to be printed before the first step.
    """

    rows: np.ndarray
    drawn: Rows
    digest: str
    lines: tuple[str, ...] = ()

    @property
    def mixture(self) -> Mixture | None:
        """Shares of the archives; None for a single store."""
        return self.drawn if isinstance(self.drawn, Mixture) else None


def open_store(data: DataConfig) -> AnyStore:
    """Open the store of a run, or all its stores.

    Raises:
        UserError: a store cannot be read, two have one name, or their patients cannot be joined.
    """
    if not data.stores:
        return Store(data.store, cache=data.cache.open())
    names = [one.name or one.path.name for one in data.stores]
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"data.stores: the name '{name}' has other characters than letters, digits, dots, "
                "_ and -; give the archive a name"
            )
        if names.count(name) > 1:
            raise UserError(
                f"data.stores: {names.count(name)} archives have the name {name}; give each its "
                "own name"
            )
    cache = data.cache.open()  # one for all: the copies have digests and IDs as names
    stores = [Store(one.path, cache=cache) for one in data.stores]
    digests = [store.digest for store in stores]
    for k, digest in enumerate(digests):
        if digests.index(digest) != k:
            raise UserError(
                f"data.stores: {names[digests.index(digest)]} and {names[k]} hold the same scans; "
                "list an archive once and raise its weight"
            )
    keys = {store.patient_key for store in stores}
    if data.join_patients and len(keys) > 1:
        raise UserError(
            f"data.join_patients=true: the {len(stores)} stores of data.stores have "
            f"{len(keys)} patient keys, so their patients cannot be compared; index the archives "
            "with one key file (TAPCT_PATIENT_KEY), or set data.join_patients=false"
        )
    return StoreGroup(stores, names)


def choose(data: DataConfig, store: AnyStore, run_seed: int) -> TrainingData:
    """Choose the scans that a run is trained on.

    Args:
        data: section `data` of the config, with the split version that the run began with.
        store: store from `open_store`.
        run_seed: `seed` of the run.
    Raises:
        UserError: an archive has no scan to train on, or a selection cannot be applied.
    """
    if not len(store):
        raise UserError(f"data.store {store.path} holds no scan; index and pack some")
    lines: list[str] = []
    selected_N = _selected(data, store, lines)
    if not selected_N.any():
        raise UserError(f"data.select leaves no scan: {'; '.join(lines)}")
    held_out_N = data.held_out_mask(store.scans, run_seed)
    trained_N = selected_N & ~held_out_N
    if not trained_N.any():
        problem = data.one_sided(store.scans.column("patient").to_pylist(), run_seed)
        raise UserError(problem or "data.select leaves only scans of held-out patients")
    if not isinstance(store, StoreGroup):
        rows = np.flatnonzero(trained_N)
        return TrainingData(rows, rows, _digest(data, store, selected_N, ()), tuple(lines))
    _leave_out_copies(store, held_out_N, trained_N, lines)
    mixture = _mixture(data, store, trained_N)
    lines += _lines_about_shares(data, store, mixture)
    digest = _digest(data, store, selected_N, mixture.counts)
    return TrainingData(np.flatnonzero(trained_N), mixture, digest, tuple(lines))


def _selected(data: DataConfig, store: AnyStore, lines: list[str]) -> np.ndarray:
    """bool (N,): scans that `data.select` selects; adds the counts to the lines."""
    if not data.select:
        return np.ones(len(store), bool)
    wanted = selection.parse(data.select, "data.select")
    parts = []
    for one, _ in archives_of(store):
        table = one.facts(wanted.columns)
        if table is None:
            raise UserError(
                f"data.select: the columns {', '.join(wanted.columns)} of {one.path} are in the "
                "manifest that was packed, which is gone, has changed or is of an earlier version; "
                "put it back, or index and pack again"
            )
        mask_N, counts = wanted.apply_and_count(table)
        scans = f"{selection.num_true(mask_N)} of {counted(len(table), 'scan')}"
        lines.append(f"data.select: {scans} of {one.path} fulfil {wanted.text}")
        lines += counts
        parts.append(mask_N.to_numpy(zero_copy_only=False))
    return np.concatenate(parts)


def _leave_out_copies(
    store: StoreGroup, held_out_N: np.ndarray, trained_N: np.ndarray, lines: list[str]
) -> None:
    """Take scans out of training whose voxels another archive holds out.

    The keys of two archives may differ, so the hashes of one patient may, too; equal voxels are
    of one patient anyway.
    """
    if not held_out_N.any():
        return
    checksums = store.scans.column("checksum")
    held = checksums.filter(pa.array(held_out_N))
    copies_N = pc.is_in(checksums, value_set=held).to_numpy(zero_copy_only=False) & trained_N
    if copies_N.any():
        trained_N &= ~copies_N
        lines.append(
            f"data.stores: {counted(int(copies_N.sum()), 'scan')} not trained on, because another "
            "archive holds out the same voxels"
        )


def _mixture(data: DataConfig, store: StoreGroup, trained_N: np.ndarray) -> Mixture:
    """The rows of each archive and its share."""
    rows = []
    for k, name in enumerate(store.names):
        numbers = store.range_of(k)
        own = np.flatnonzero(trained_N[numbers.start : numbers.stop]) + numbers.start
        if not len(own):
            raise UserError(
                f"data.stores: no scan of {name} ({store.stores[k].path}) is left for training; "
                "leave the archive out, or change data.select or data.held_out"
            )
        rows.append(own)
    return Mixture(store.names, rows, [one.weight for one in data.stores])


def _lines_about_shares(data: DataConfig, store: StoreGroup, mixture: Mixture) -> list[str]:
    """Scans, patients and share of each archive, one line each."""
    lines = []
    numbers_N = store.scans.patient_numbers()
    patients = [np.unique(numbers_N[rows]) for rows in mixture.rows]
    for k, (name, rows) in enumerate(zip(mixture.names, mixture.rows, strict=True)):
        share = mixture.counts[k] / mixture.block
        lines.append(
            f"data.stores: {name}: {share:.2%} of the samples, {counted(len(rows), 'scan')} of "
            f"{counted(len(patients[k]), 'patient')} ({store.stores[k].path})"
        )
    joined = len(np.unique(np.concatenate(patients)))
    apart = sum(map(len, patients))
    if data.join_patients:
        lines.append(
            f"data.stores: {counted(joined, 'patient')} in all; equal hashes are one patient "
            "(data.join_patients)"
        )
    elif joined < apart:
        lines.append(
            f"data.stores: {counted(apart, 'patient')} in all; {apart - joined} of them share a "
            "hash with a patient of another archive and count as other people "
            "(data.join_patients=true counts them once); both are on the same side of the split"
        )
    return lines


def _digest(
    data: DataConfig, store: AnyStore, selected_N: np.ndarray, counts: tuple[int, ...]
) -> str:
    """Digest of what the samples of the run are drawn from."""
    if not data.select and not counts:
        return store.digest
    digest = hashlib.blake2b(store.digest.encode(), digest_size=16)
    digest.update(repr((data.select.strip(), counts)).encode())
    if isinstance(store, StoreGroup):  # the order of an archive's scans is drawn by its name
        digest.update(repr(store.names).encode())
    digest.update(np.packbits(selected_N).tobytes())
    return digest.hexdigest()


def evaluated_store(store: AnyStore) -> Store:
    """The store that `tapct eval` evaluates: `DataConfig.evaluated`."""
    return store.stores[0] if isinstance(store, StoreGroup) else store
