"""Histogram of a scan's HU after clamping, without the values that pad it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tapct.types import AIR_HU

TOP_HU = 3071  # largest value of 12 bits; all values above it share the last bin
PADDING_BELOW = -900  # HU; exact values that repeat below it pad with air, as they should
_MIN_SPIKE = 0.005  # share of voxels
_SPIKE_REACH = 20  # HU
_SPIKE_RATIO = 5.0  # times as many voxels as any other value within its reach


@dataclass(frozen=True)
class Fill:
    """One exact value that many voxels have and their neighbours in the histogram do not.

    Args:
        hu: the value.
        share: share of all voxels.
    """

    hu: int
    share: float


class HuHistogram:
    """Counts of HU from -1024 to 3071.

    Args:
        hu: int16 values, clamped to AIR_HU from below, any shape.
    """

    def __init__(self, hu: np.ndarray) -> None:
        bins = np.minimum(hu.ravel(), TOP_HU).astype(np.intp) - AIR_HU
        self.counts = np.bincount(bins, minlength=TOP_HU - AIR_HU + 1).astype(np.float64)
        self.num_voxels = int(hu.size)
        present = np.flatnonzero(self.counts)
        self.low, self.high = int(present[0]) + AIR_HU, int(present[-1]) + AIR_HU

    @property
    def clamped(self) -> float:
        """Share of voxels at AIR_HU, where clamping puts all lower values."""
        return float(self.counts[0] / self.num_voxels)

    @cached_property
    def fills(self) -> tuple[Fill, ...]:
        """Values that stick out of the histogram, the commonest first."""
        found = []
        for index in np.argsort(-self.counts)[:8]:
            count = self.counts[index]
            if count < _MIN_SPIKE * self.num_voxels:
                break
            first = max(0, index - _SPIKE_REACH)
            beside = np.delete(self.counts[first : index + _SPIKE_REACH + 1], index - first)
            if count > _SPIKE_RATIO * max(1.0, float(beside.max())):
                found.append(Fill(int(index) + AIR_HU, float(count / self.num_voxels)))
        return tuple(found)

    @cached_property
    def measured(self) -> np.ndarray:
        """Share of each HU among the voxels that no padding explains; sums to 1, or is all 0."""
        counts = self.counts.copy()
        counts[0] = 0.0
        for fill in self.fills:
            counts[fill.hu - AIR_HU] = 0.0
        total = counts.sum()
        return counts / total if total else counts

    def share(self, low: int, high: int) -> float:
        """Share of the measured voxels from `low` to below `high` HU."""
        return float(self.measured[low - AIR_HU : high - AIR_HU].sum())

    def total(self, low: int, high: int) -> float:
        """Share of all voxels, padding too, from `low` to below `high` HU."""
        return float(self.counts[low - AIR_HU : high - AIR_HU].sum()) / self.num_voxels

    @cached_property
    def step(self) -> int:
        """Greatest common divisor of the distances of the values that occur, in HU."""
        present = np.flatnonzero(self.counts[1:-1])
        return int(np.gcd.reduce(np.diff(present))) if len(present) > 2 else 1

    def density(self, width: int) -> np.ndarray:
        """Mean share per HU in a window of `width` HU about each HU."""
        return np.convolve(self.measured, np.full(width, 1.0 / width), "same")

    def peak(self, width: int, low: int, high: int) -> float:
        """Largest density of a window of `width` HU whose centre lies from `low` to `high` HU."""
        return float(self.density(width)[low - AIR_HU : high + 1 - AIR_HU].max())
