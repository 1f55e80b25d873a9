"""Slabs of one micro-batch: which slices a sample shows, and reading them into a batch.

Axes: B batch, Z Y X depth height width in voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tapct.base import rng
from tapct.data.loading.sampler import scan_of
from tapct.data.packed.packed_scan import Damaged
from tapct.data.packed.store import Store
from tapct.types import AIR_HU, Batch


@dataclass(frozen=True)
class Slab:
    """One sample before it is read.

    Args:
        sample: number of the sample in the whole run.
        scan: row of the store.
        start: z index in the scan of its first slice.
        depth: number of slices, fewer than `slab_depth` where the scan is shorter.
    """

    sample: int
    scan: int
    start: int
    depth: int


@dataclass(frozen=True)
class Failures:
    """Scans of a micro-batch that could not be read.

    Args:
        scans: row of the store and error line of each.
        fatal: whether the batch could not be made.
    """

    scans: tuple[tuple[int, str], ...]
    fatal: bool = False


@dataclass(frozen=True)
class ReadSlab:
    """One sample after it is read.

    Args:
        slab: slab that was read; another scan's than drawn where that one was damaged.
        padded_ZYX: int16 array that holds it, with padding at the far ends.
        failures: damaged scans in its place.
    """

    slab: Slab
    padded_ZYX: np.ndarray
    failures: Failures


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
        sample: number of the sample in the whole run.
        store: packed scans.
        seed: random seed of the run.
        slab_depth: number of slices.
        replacement: number of scans that were damaged before; the n-th replacement shows the scan
            of sample + n. The sample keeps its number, so all its other draws stay the same.
        rows: rows of the store that are drawn from; None for all.
    """
    rows = range(len(store)) if rows is None else rows
    scan = rows[scan_of(sample + replacement, len(rows), seed)]
    depth = store.scans[scan].shape_ZYX[0]
    num_starts = max(1, depth - slab_depth + 1)
    start = (rng.hash_int(seed, "slab", sample) & ((1 << 63) - 1)) % num_starts
    return Slab(sample, scan, start, min(depth, slab_depth))


class SlabReader:
    """Reads the micro-batches of one rank.

    Args:
        store: packed scans.
        seed: random seed of the run.
        slab_depth: number of slices per sample.
        max_damaged: number of different damaged scans that one sample may replace; 0 replaces none.
        rows: rows of the store that are drawn from; None for all.
        pin: whether batches lie in page-locked memory (needs a GPU).
    """

    def __init__(
        self,
        store: Store,
        seed: int,
        slab_depth: int,
        max_damaged: int,
        rows: Sequence[int] | None = None,
        pin: bool = False,
    ) -> None:
        self.store, self.seed, self.slab_depth = store, seed, slab_depth
        self.max_damaged, self.rows, self.pin = max_damaged, rows, pin

    def draw(self, sample: int, replacement: int = 0) -> Slab:
        """The slab of a sample, see `draw_slab`."""
        return draw_slab(sample, self.store, self.seed, self.slab_depth, replacement, self.rows)

    def empty(self, slabs: Sequence[Slab], pin: bool) -> Tensor:
        """Uninitialised int16 (B, Z, Y, X), as large as the largest of the scans in plane."""
        shapes_ZYX = [self.store.scans[slab.scan].shape_ZYX for slab in slabs]
        height, width = max(s[1] for s in shapes_ZYX), max(s[2] for s in shapes_ZYX)
        shape = (len(slabs), self.slab_depth, height, width)
        return torch.empty(shape, dtype=torch.int16, pin_memory=pin)

    def read(self, slab: Slab, padded_ZYX: np.ndarray) -> ReadSlab:
        """Read a slab, or the one that replaces it where its scan is damaged.

        Args:
            slab: slab to read.
            padded_ZYX: int16 array to fill; a replacement gets an array of its own.
        """
        damaged: list[tuple[int, str]] = []
        # twice as many samples in a row as there are scans hold a whole pass
        for replacement in range(1, 2 * len(self.store) + 1):
            try:
                self._fill(slab, padded_ZYX)
                return ReadSlab(slab, padded_ZYX, Failures(tuple(damaged)))
            except Damaged as error:
                damaged.append((slab.scan, str(error)))
            if len({scan for scan, _ in damaged}) > self.max_damaged:
                break
            slab = self.draw(slab.sample, replacement)
            padded_ZYX = self.empty([slab], pin=False)[0].numpy()
        return ReadSlab(slab, padded_ZYX, Failures(tuple(damaged), fatal=True))

    def _fill(self, slab: Slab, padded_ZYX: np.ndarray) -> None:
        """Read one slab to the near end of an array and fill the far ends with air.

        Raises:
            Damaged: the scan cannot be read.
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

    def collate(self, hu_BZYX: Tensor, parts: Sequence[ReadSlab]) -> tuple[Batch | None, Failures]:
        """One batch from the read slabs of a micro-batch.

        Args:
            hu_BZYX: int16 tensor in which the slabs lie that were not replaced.
            parts: read slabs in the order of the batch.
        Returns:
            The batch, or None where it could not be made, and the damaged scans.
        """
        failures = Failures(
            tuple(scan for part in parts for scan in part.failures.scans),
            any(part.failures.fatal for part in parts),
        )
        if failures.fatal:
            return None, failures
        slabs = [part.slab for part in parts]
        scans = [self.store.scans[slab.scan] for slab in slabs]
        if failures.scans:
            # a replacement may have another size than what it replaces, so all are copied
            hu_BZYX = self.empty(slabs, self.pin).fill_(AIR_HU)
            for b, part in enumerate(parts):
                _, y, x = scans[b].shape_ZYX
                inside_ZYX = part.padded_ZYX[: part.slab.depth, :y, :x]
                hu_BZYX[b, : part.slab.depth, :y, :x] = torch.from_numpy(inside_ZYX)
        extents = [(slab.depth, *scan.shape_ZYX[1:]) for slab, scan in zip(slabs, scans)]
        spacings_mm = [scan.spacing_mm for scan in scans]
        batch = Batch(
            hu_BZYX=hu_BZYX,
            extent_B3=self._int64(extents),
            spacing_mm_B3=torch.tensor(spacings_mm, dtype=torch.float32, pin_memory=self.pin),
            sample_B=self._int64([slab.sample for slab in slabs]),
            scan_B=self._int64([slab.scan for slab in slabs]),
            slab_start_B=self._int64([slab.start for slab in slabs]),
        )
        return batch, failures

    def _int64(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, pin_memory=self.pin)
