"""Slabs of one micro-batch: which slices a sample shows, and reading them into a batch.

Axes: B batch, Z Y X depth height width in voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tapct.base import rng
from tapct.data.loading.mixture import Mixture
from tapct.data.loading.sampler import scan_of
from tapct.data.packed.packed_scan import Damaged
from tapct.data.packed.store_group import AnyStore
from tapct.types import AIR_HU, Batch

# rows of the store that are drawn from, of several archives with the share of each; None for all
Rows: TypeAlias = Sequence[int] | np.ndarray | Mixture | None


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
    store: AnyStore,
    seed: int,
    slab_depth: int,
    replacement: int = 0,
    rows: Rows = None,
    crops: int = 1,
) -> Slab:
    """Choose scan and slices of a sample: every scan once a pass, every valid start equally likely.

    Args:
        sample: number of the sample in the whole run.
        store: packed scans.
        seed: random seed of the run.
        slab_depth: number of slices.
        replacement: number of scans that were damaged before; the n-th replacement shows the scan
            of sample + n. The sample keeps its number, so all its other draws stay the same.
        crops: number of samples in a row that show the same slab.
        rows: rows that are drawn from, see `Rows`.
    """
    number = sample // crops
    if isinstance(rows, Mixture):
        scan = rows.scan_of(number, seed, replacement)
    else:
        rows = range(len(store)) if rows is None else rows
        scan = int(rows[scan_of(number + replacement, len(rows), seed)])
    depth = store.scans.shape_ZYX(scan)[0]
    num_starts = max(1, depth - slab_depth + 1)
    start = (rng.hash_int(seed, "slab", number) & ((1 << 63) - 1)) % num_starts
    return Slab(sample, scan, start, min(depth, slab_depth))


class SlabReader:
    """Reads the micro-batches of one rank.

    Args:
        store: packed scans.
        seed: random seed of the run.
        slab_depth: number of slices per sample.
        max_damaged: number of different damaged scans that one sample may replace; 0 replaces none.
        rows: rows that are drawn from, see `Rows`.
        pin: whether batches lie in page-locked memory (needs a GPU).
        crops: samples in a row that show the same slab.
    """

    def __init__(
        self,
        store: AnyStore,
        seed: int,
        slab_depth: int,
        max_damaged: int,
        rows: Rows = None,
        pin: bool = False,
        crops: int = 1,
    ) -> None:
        self.crops = crops
        self.store, self.seed, self.slab_depth = store, seed, slab_depth
        self.max_damaged, self.rows, self.pin = max_damaged, rows, pin

    def draw(self, sample: int, replacement: int = 0) -> Slab:
        """The slab of a sample, see `draw_slab`."""
        return draw_slab(
            sample, self.store, self.seed, self.slab_depth, replacement, self.rows, self.crops
        )

    def empty(self, slabs: Sequence[Slab], pin: bool) -> Tensor:
        """Uninitialised int16 (B, Z, Y, X), as large as the largest of the scans in plane."""
        shapes_ZYX = [self.store.scans.shape_ZYX(slab.scan) for slab in slabs]
        height, width = max(s[1] for s in shapes_ZYX), max(s[2] for s in shapes_ZYX)
        shape = (len(slabs), self.slab_depth, height, width)
        return torch.empty(shape, dtype=torch.int16, pin_memory=pin)

    def groups(self, slabs: Sequence[Slab]) -> list[slice]:
        """The places of a micro-batch that show the same slab, side by side."""
        starts = [
            b
            for b, slab in enumerate(slabs)
            if b == 0 or slab.sample // self.crops != slabs[b - 1].sample // self.crops
        ]
        return [slice(*ends) for ends in zip(starts, [*starts[1:], len(slabs)], strict=True)]

    def read_group(self, slabs: Sequence[Slab], places_BZYX: np.ndarray) -> list[ReadSlab]:
        """Read the slab that some samples share once, and copy it to the places of the others.

        Args:
            slabs: slab of each sample; they differ in the number of the sample alone.
            places_BZYX: int16 arrays to fill, one per sample.
        """
        first = self.read(slabs[0], places_BZYX[0])
        parts = [first]
        for slab, place_ZYX in zip(slabs[1:], places_BZYX[1:], strict=True):
            shown = replace(first.slab, sample=slab.sample)
            if first.failures.scans:  # a replacement, which may have another size
                parts.append(ReadSlab(shown, first.padded_ZYX, Failures((), first.failures.fatal)))
                continue
            place_ZYX[...] = places_BZYX[0]
            parts.append(ReadSlab(shown, place_ZYX, first.failures))
        return parts

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
        _, y, x = self.store.scans.shape_ZYX(slab.scan)
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
        shapes_ZYX = [self.store.scans.shape_ZYX(slab.scan) for slab in slabs]
        if failures.scans:
            # a replacement may have another size than what it replaces, so all are copied
            hu_BZYX = self.empty(slabs, self.pin).fill_(AIR_HU)
            for b, part in enumerate(parts):
                _, y, x = shapes_ZYX[b]
                inside_ZYX = part.padded_ZYX[: part.slab.depth, :y, :x]
                hu_BZYX[b, : part.slab.depth, :y, :x] = torch.from_numpy(inside_ZYX)
        extents = [(slab.depth, *shape[1:]) for slab, shape in zip(slabs, shapes_ZYX)]
        spacings_mm = [self.store.scans.spacing_mm(slab.scan) for slab in slabs]
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
