"""Load batches from a store: slabs in the sampler's order, read ahead by threads.

What a batch holds is a function of (seed, step, micro-batch, rank) alone: the number of threads and
the step at which the loader starts change when it is read, never its content. Threads suffice,
because reading and decompressing both run without Python's global lock (see `packed_scan`); they
share the store and write straight into the batch.

Axes: B batch, Z Y X depth height width in voxels.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Protocol

from torch import Tensor

from tapct.base.exits import UserError
from tapct.config.fields import setting
from tapct.data.loading.batch_share import BatchShare
from tapct.data.loading.slabs import Failures, ReadSlab, Rows, SlabReader
from tapct.data.packed.store_group import AnyStore
from tapct.types import Batch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """How slabs are read."""

    renamed: ClassVar[Mapping[str, str]] = {
        "backend": "is a key of earlier versions: threads read all batches now; remove the key"
    }

    slab_depth: int = setting(
        24,
        "slices read per sample; at least the larger depth of views.global_window and "
        "views.local_window, multiplied by the larger value of views.z_zoom",
        ge=1,
    )
    workers: int = setting(
        2,
        "number of threads per rank that read scans; 0: the training loop reads the scans itself",
        ge=0,
    )
    prefetch: int = setting(
        2,
        "number of steps that are loaded in advance; a larger number needs more host memory",
        ge=1,
    )
    crops_per_slab: int = setting(
        1,
        "number of consecutive samples that use the same slab; the slab is read once, and each "
        "sample has its own views. A larger number reads less from the disk, but a batch then "
        "holds fewer different scans",
        ge=1,
        le=1024,
    )
    on_error: str = setting(
        "raise",
        "when a scan is damaged: raise stops the run, skip uses another scan instead",
        choices=("raise", "skip"),
    )
    max_skips: int = setting(
        10,
        "with on_error=skip: the run stops if more than this number of different scans are damaged",
        ge=1,
    )


def without_backend(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run without `data.loader.backend`, a key of earlier versions.

    It chose threads or processes, which read the same batches.

    Args:
        tree: whole config of a run; a newer one is returned unchanged.
    """
    data = tree.get("data")
    section = data.get("loader") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(section, Mapping):
        return dict(tree)
    kept = {key: value for key, value in section.items() if key != "backend"}
    return {**tree, "data": {**data, "loader": kept}}


class Loader:
    """The batches of one rank, one tuple of micro-batches per optimizer step, without end.

    Use it as an iterator, and close it (or use it in a `with`) to end its threads.

    Attributes:
        skipped: row of the store and error line of every scan that `on_error: skip` has replaced.
    """

    def __init__(self, config: Config, backend: _Backend, accumulation: int) -> None:
        self.skipped: dict[int, str] = {}
        self._config, self._accumulation = config, accumulation
        self._backend: _Backend | None = backend

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[Batch, ...]:
        """The next step's micro-batches.

        Raises:
            UserError: a scan cannot be read; the error names it and its file.
        """
        if self._backend is None:
            raise RuntimeError("the loader is closed")
        try:
            return tuple(self._checked(*self._backend.take()) for _ in range(self._accumulation))
        except BaseException:  # an interrupt too: no thread may outlive the loop
            self.close()
            raise

    def _checked(self, batch: Batch | None, failures: Failures) -> Batch:
        """The batch, once its damaged scans are reported and accepted by the config."""
        if failures.scans and self._config.on_error == "raise":
            raise UserError(failures.scans[0][1])
        for scan, line in failures.scans:
            if scan not in self.skipped:
                self.skipped[scan] = line
                _log.warning("skipped: %s", line)
        if batch is None or len(self.skipped) > self._config.max_skips:
            raise UserError(
                f"{len(self.skipped)} scans cannot be read, data.loader.max_skips accepts "
                f"{self._config.max_skips}; the last: {failures.scans[-1][1]}"
            )
        return batch

    def close(self) -> None:
        """End the threads and drop what was read ahead; may be called twice."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build(
    config: Config,
    store: AnyStore,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
    global_batch: int,
    start_step: int = 0,
    pin: bool = False,
    rows: Rows = None,
) -> Loader:
    """Start reading the batches of one rank.

    Args:
        config: how slabs are read.
        store: packed scans, at least one.
        seed: random seed of the run; with the step it decides what is read.
        rank: number of this rank, 0..world-1.
        world: number of ranks.
        accumulation: number of micro-batches per optimizer step.
        global_batch: samples per optimizer step over all ranks and micro-batches.
        start_step: number of finished optimizer steps; a late start costs nothing.
        pin: whether batches lie in page-locked memory (needs a GPU).
        rows: rows that are drawn from, at least one, see `slabs.Rows`.
    Returns:
        An iterator over steps from `start_step` on; each item is a tuple of `accumulation` batches.
    Raises:
        UserError: the global batch cannot be shared equally.
    """
    # an unequal share is refused here, not in a thread
    share = BatchShare(global_batch, accumulation, world)
    plan = (
        share.samples(step, micro, rank)
        for step in count(start_step)
        for micro in range(accumulation)
    )
    max_damaged = config.max_skips if config.on_error == "skip" else 0
    reader = SlabReader(
        store, seed, config.slab_depth, max_damaged, rows, pin, config.crops_per_slab
    )
    backend: _Backend
    if config.workers == 0:
        backend = _Inline(reader, plan)
    else:
        backend = _Threads(reader, plan, config.workers, config.prefetch * accumulation)
    return Loader(config, backend, accumulation)


class _Backend(Protocol):
    """Reads micro-batches in the order of a plan."""

    def take(self) -> tuple[Batch | None, Failures]:
        """The next micro-batch, or None where it could not be made, and its damaged scans."""

    def close(self) -> None:
        """End the threads."""


class _Inline:
    """Reads a micro-batch when it is taken."""

    def __init__(self, reader: SlabReader, plan: Iterator[range]) -> None:
        self.reader, self.plan = reader, plan

    def take(self) -> tuple[Batch | None, Failures]:
        slabs = [self.reader.draw(sample) for sample in next(self.plan)]
        hu_BZYX = self.reader.empty(slabs, self.reader.pin)
        places_BZYX = hu_BZYX.numpy()
        parts: list[ReadSlab] = []
        for group in self.reader.groups(slabs):
            parts += self.reader.read_group(slabs[group], places_BZYX[group])
        return self.reader.collate(hu_BZYX, parts)

    def close(self) -> None:
        return None


class _Threads:
    """Reads micro-batches ahead with threads; each job reads one slab straight into the batch."""

    def __init__(
        self, reader: SlabReader, plan: Iterator[range], workers: int, num_ahead: int
    ) -> None:
        self.reader, self.plan, self.num_ahead = reader, plan, num_ahead
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="tapct-loader")
        self.pending: deque[tuple[Tensor, list[Future[list[ReadSlab]]]]] = deque()
        self._submit()

    def _submit(self) -> None:
        while len(self.pending) < self.num_ahead:
            slabs = [self.reader.draw(sample) for sample in next(self.plan)]
            hu_BZYX = self.reader.empty(slabs, self.reader.pin)
            places_BZYX = hu_BZYX.numpy()
            jobs = [
                self.pool.submit(self.reader.read_group, slabs[group], places_BZYX[group])
                for group in self.reader.groups(slabs)
            ]
            self.pending.append((hu_BZYX, jobs))

    def take(self) -> tuple[Batch | None, Failures]:
        hu_BZYX, jobs = self.pending.popleft()
        parts = [part for job in jobs for part in job.result()]
        self._submit()
        return self.reader.collate(hu_BZYX, parts)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.pending.clear()
