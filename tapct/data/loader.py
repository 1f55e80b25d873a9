"""Store -> batches: z-slabs in the sampler's order, read ahead by threads or processes.

What a batch holds is a function of (seed, step, micro-batch, rank) alone: the number and kind of
workers and the step at which the loader starts change when it is read, never what. Threads are the
default: reading and decompressing both run without Python's global lock (see store.py), so they
    share the store and write straight into the batch.

Axes: B batch, Z Y X depth height width in voxels.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tapct.base import rng
from tapct.base.exits import UserError
from tapct.config.fields import setting
from tapct.data.batch_share import BatchShare
from tapct.data.packed import Damaged
from tapct.data.sampler import scan_of
from tapct.data.store import Store
from tapct.types import AIR_HU, Batch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """How slabs are read."""

    slab_depth: int = setting(
        24, "slices read per sample; at least the depth of a global crop before resizing", ge=1
    )
    backend: str = setting("thread", "who reads ahead", choices=("thread", "process"))
    workers: int = setting(
        2, "threads or processes per rank; 0 reads in the training loop itself", ge=0
    )
    prefetch: int = setting(2, "steps read ahead; host memory grows with it", ge=1)
    on_error: str = setting(
        "raise",
        "a damaged scan stops the run, or is skipped for another",
        choices=("raise", "skip"),
    )
    max_skips: int = setting(
        10, "different damaged scans that `on_error: skip` accepts before it stops", ge=1
    )


@dataclass(frozen=True)
class Slab:
    """One sample before it is read.

    Args:
        sample: its number in the whole run.
        scan: row of the store.
        start: z index in the scan of its first slice.
        depth: slices, fewer than `slab_depth` where the scan is shorter.
    """

    sample: int
    scan: int
    start: int
    depth: int


@dataclass(frozen=True)
class _Failures:
    """Scans of a micro-batch that could not be read: (row, one line); fatal if the batch could not
    be made.
    """

    scans: tuple[tuple[int, str], ...]
    fatal: bool = False


_Result = tuple[Batch | None, _Failures]


def draw_slab(
    sample: int,
    store: Store,
    seed: int,
    slab_depth: int,
    replacement: int = 0,
    rows: Sequence[int] | None = None,
) -> Slab:
    """Choose scan and slices of a sample: every scan once a pass, every valid start equally likely.

    Args:
        rows: of the store that are drawn from; None for all.
        replacement: 0, or how many scans failed before; the n-th replacement shows the scan of
            sample + n. The sample keeps its number, so all other draws stay its own.
    """
    rows = range(len(store)) if rows is None else rows
    scan = rows[scan_of(sample + replacement, len(rows), seed)]
    depth = store.scans[scan].shape_ZYX[0]
    num_starts = max(1, depth - slab_depth + 1)
    start = (rng.hash_int(seed, "slab", sample) & ((1 << 63) - 1)) % num_starts
    return Slab(sample, scan, start, min(depth, slab_depth))


class _Reader:
    """Makes the micro-batches of one rank; pickled to worker processes."""

    def __init__(
        self, config: Config, store: Store, seed: int, rows: Sequence[int] | None = None
    ) -> None:
        self.config, self.store, self.seed, self.rows = config, store, seed, rows

    def draw(self, sample: int, replacement: int = 0) -> Slab:
        return draw_slab(
            sample, self.store, self.seed, self.config.slab_depth, replacement, self.rows
        )

    def empty(self, slabs: Sequence[Slab], pin: bool) -> Tensor:
        """Uninitialised int16 (B, Z, Y, X), as large as the largest scan in plane."""
        shapes_ZYX = [self.store.scans[slab.scan].shape_ZYX for slab in slabs]
        height, width = max(s[1] for s in shapes_ZYX), max(s[2] for s in shapes_ZYX)
        return torch.empty(
            (len(slabs), self.config.slab_depth, height, width), dtype=torch.int16, pin_memory=pin
        )

    def fill(self, slab: Slab, padded_ZYX: np.ndarray) -> None:
        """Read one slab into its place and surround it with air at the far ends. Raises:
        Damaged.
        """
        _, y, x = self.store.scans[slab.scan].shape_ZYX
        inside_ZYX = padded_ZYX[: slab.depth, :y, :x]
        if inside_ZYX.flags.c_contiguous:
            self.store.read_into(slab.scan, slab.start, inside_ZYX)
        else:
            inside_ZYX[...] = self.store.read_slab(slab.scan, slab.start, slab.start + slab.depth)
        padded_ZYX[slab.depth :] = AIR_HU
        padded_ZYX[: slab.depth, y:] = AIR_HU
        padded_ZYX[: slab.depth, :y, x:] = AIR_HU

    def fill_or_replace(
        self, slab: Slab, padded_ZYX: np.ndarray
    ) -> tuple[Slab, np.ndarray, _Failures]:
        """Read a slab, or by the policy the one that stands in for it.

        Returns:
            The slab that was read, where it lies (`padded_ZYX` unless it was replaced), and what
            failed.
        """
        failed: list[tuple[int, str]] = []
        for replacement in range(
            1, 2 * len(self.store) + 1
        ):  # so many samples in a row hold a whole pass
            try:
                self.fill(slab, padded_ZYX)
                return slab, padded_ZYX, _Failures(tuple(failed))
            except Damaged as error:
                failed.append((slab.scan, str(error)))
            if (
                self.config.on_error == "raise"
                or len({scan for scan, _ in failed}) > self.config.max_skips
            ):
                break
            slab = self.draw(slab.sample, replacement)
            padded_ZYX = self.empty([slab], pin=False)[0].numpy()
        return slab, padded_ZYX, _Failures(tuple(failed), fatal=True)

    def collate(
        self, hu_BZYX: Tensor, parts: Sequence[tuple[Slab, np.ndarray, _Failures]], pin: bool
    ) -> _Result:
        """One batch from read slabs; laid out anew where a replacement has another size than what
        it replaces.
        """
        failures = _Failures(
            tuple(failed for _, _, part in parts for failed in part.scans),
            any(part.fatal for _, _, part in parts),
        )
        if failures.fatal:
            return None, failures
        slabs = [slab for slab, _, _ in parts]
        if failures.scans:
            hu_BZYX = self.empty(slabs, pin).fill_(AIR_HU)
            for b, (slab, padded_ZYX, _) in enumerate(parts):
                _, y, x = self.store.scans[slab.scan].shape_ZYX
                hu_BZYX[b, : slab.depth, :y, :x] = torch.from_numpy(
                    padded_ZYX[: slab.depth, :y, :x]
                )
        scans = [self.store.scans[slab.scan] for slab in slabs]
        whole = partial(torch.tensor, dtype=torch.int64, pin_memory=pin)
        batch = Batch(
            hu_BZYX=hu_BZYX,
            extent_B3=whole(
                [(slab.depth, *scan.shape_ZYX[1:]) for slab, scan in zip(slabs, scans)]
            ),
            spacing_mm_B3=torch.tensor(
                [scan.spacing_mm for scan in scans], dtype=torch.float32, pin_memory=pin
            ),
            sample_B=whole([slab.sample for slab in slabs]),
            scan_B=whole([slab.scan for slab in slabs]),
            slab_start_B=whole([slab.start for slab in slabs]),
        )
        return batch, failures

    def batch(self, samples: range, pin: bool = False) -> _Result:
        """Read a whole micro-batch here and now."""
        slabs = [self.draw(sample) for sample in samples]
        hu_BZYX = self.empty(slabs, pin)
        places_BZYX = hu_BZYX.numpy()
        parts = [self.fill_or_replace(slab, places_BZYX[b]) for b, slab in enumerate(slabs)]
        return self.collate(hu_BZYX, parts, pin)


class _Backend(Protocol):
    """Reads the micro-batches it was given, in their order."""

    def take(self) -> _Result: ...

    def close(self) -> None: ...


class _Inline:
    """Reads when asked."""

    def __init__(self, reader: _Reader, plan: Iterator[range], pin: bool) -> None:
        self.reader, self.plan, self.pin = reader, plan, pin

    def take(self) -> _Result:
        return self.reader.batch(next(self.plan), self.pin)

    def close(self) -> None:
        return None


class _Threads:
    """Reads ahead with threads, one sample a job, straight into the batch."""

    def __init__(
        self, reader: _Reader, plan: Iterator[range], pin: bool, workers: int, ahead: int
    ) -> None:
        self.reader, self.plan, self.pin, self.ahead = reader, plan, pin, ahead
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="tapct-loader")
        self.pending: deque[tuple[Tensor, list[Future[tuple[Slab, np.ndarray, _Failures]]]]] = (
            deque()
        )
        self._submit()

    def _submit(self) -> None:
        while len(self.pending) < self.ahead:
            slabs = [self.reader.draw(sample) for sample in next(self.plan)]
            hu_BZYX = self.reader.empty(slabs, self.pin)
            places_BZYX = hu_BZYX.numpy()
            jobs = [
                self.pool.submit(self.reader.fill_or_replace, slab, places_BZYX[b])
                for b, slab in enumerate(slabs)
            ]
            self.pending.append((hu_BZYX, jobs))

    def take(self) -> _Result:
        hu_BZYX, jobs = self.pending.popleft()
        parts = [job.result() for job in jobs]
        self._submit()
        return self.reader.collate(hu_BZYX, parts, self.pin)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.pending.clear()


class _Samples(Dataset[tuple[tuple[Tensor, ...], _Failures]]):
    """What torch's DataLoader asks: the micro-batch of these samples, as tensors that it can share
    and pin.
    """

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader

    def __getitem__(self, samples: range) -> tuple[tuple[Tensor, ...], _Failures]:
        batch, failures = self.reader.batch(samples)
        return () if batch is None else tuple(
            getattr(batch, f.name) for f in fields(Batch)
        ), failures


def _end_without_teardown(worker: int) -> None:
    """Let a worker process end at once.

    Its queue's daemon thread may still be sending a batch when it is told to end. Python's teardown
    then kills that thread inside C++ code, which aborts the process: half of all closes did (Python
    3.11, torch 2.13).
    """
    atexit.register(os._exit, 0)


def _as_it_is(item: Any) -> Any:
    return item


class _Processes:
    """Reads ahead with the worker processes of torch's DataLoader, one micro-batch a job."""

    def __init__(
        self, reader: _Reader, plan: Iterator[range], pin: bool, workers: int, ahead: int
    ) -> None:
        loader = DataLoader(
            _Samples(reader),
            sampler=_Plan(plan),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=-(-ahead // workers),
            pin_memory=pin,
            worker_init_fn=_end_without_teardown,
            multiprocessing_context="spawn",  # a forked child would inherit CUDA and held locks
            generator=torch.Generator(),  # else the DataLoader draws from the global one
        )
        self.batches: Any = iter(loader)

    def take(self) -> _Result:
        tensors, failures = next(self.batches)
        return (Batch(*tensors) if tensors else None), failures

    def close(self) -> None:
        # or they live as long as an exception's traceback holds the iterator
        self.batches._shutdown_workers()


class _Plan(Sampler[range]):
    """Micro-batches of samples, without end, as torch's DataLoader wants them."""

    def __init__(self, plan: Iterator[range]) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[range]:
        return self.plan


class Loader:
    """The batches of one rank, one tuple of micro-batches per optimizer step, without end.

    Use it as an iterator, and close it (or use it in a `with`): then its threads and processes are
    gone.

    Attributes:
        skipped: row of the store and one line, for every scan that `on_error: skip` replaced so
            far.
    """

    def __init__(self, config: Config, backend: _Backend, accumulation: int) -> None:
        self.skipped: dict[int, str] = {}
        self._config, self._accumulation = config, accumulation
        self._backend: _Backend | None = backend

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[Batch, ...]:
        """The next step's micro-batches. Raises: UserError naming the scan and its file where one
        cannot be read.
        """
        if self._backend is None:
            raise RuntimeError("the loader is closed")
        try:
            return tuple(self._checked(self._backend.take()) for _ in range(self._accumulation))
        except BaseException:  # an interrupt too: no thread or process may outlive the loop
            self.close()
            raise

    def _checked(self, result: _Result) -> Batch:
        batch, failures = result
        if failures.scans and self._config.on_error == "raise":
            raise UserError(failures.scans[0][1])
        for scan, line in failures.scans:
            if scan not in self.skipped:
                self.skipped[scan] = line
                _log.warning("skipped: %s", line)
        if batch is None or len(self.skipped) > self._config.max_skips:
            raise UserError(
                f"{len(self.skipped)} scans cannot be read, data.max_skips accepts "
                f"{self._config.max_skips}; "
                f"the last: {failures.scans[-1][1]}"
            )
        return batch

    def close(self) -> None:
        """End the workers and forget what was read ahead; may be called twice."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build(
    config: Config,
    store: Store,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
    global_batch: int,
    start_step: int = 0,
    pin: bool = False,
    rows: Sequence[int] | None = None,
) -> Loader:
    """Start reading the batches of one rank.

    Args:
        store: at least one scan.
        seed: of the run; with the step it decides all that is read.
        global_batch: samples per optimizer step over all ranks and micro-batches.
        start_step: finished optimizer steps; starting late costs nothing.
        pin: put batches into page-locked memory (needs a GPU).
        rows: of the store that are drawn from, at least one; None for all.
    Returns:
        An iterator over steps from `start_step` on; each item is a tuple of `accumulation` batches.
    Raises:
        UserError: the global batch cannot be shared equally.
    """
    share = BatchShare(global_batch, accumulation, world)  # refuses an unequal one, not in a worker
    plan = (
        share.samples(step, micro, rank)
        for step in count(start_step)
        for micro in range(accumulation)
    )
    reader = _Reader(config, store, seed, rows)
    ahead = config.prefetch * accumulation
    backend: _Backend
    if config.workers == 0:
        backend = _Inline(reader, plan, pin)
    elif config.backend == "thread":
        backend = _Threads(reader, plan, pin, config.workers, ahead)
    else:
        backend = _Processes(reader, plan, pin, config.workers, ahead)
    return Loader(config, backend, accumulation)
