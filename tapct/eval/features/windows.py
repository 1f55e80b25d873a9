"""The windows that slide over a scan: where each begins, and the weights of its tokens.

Axes: Z Y X patches of a window, or of the padded scan.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tapct.base.geometry import Size3, patch_grid
from tapct.eval.features.dense import PatchGrid
from tapct.eval.features.prepared import Prepared
from tapct.eval.features.preprocess import Preprocess


@dataclass(frozen=True)
class Windows:
    """Where the windows of a scan lie, and how their tokens are weighted.

    Args:
        grid: patches, or the cells that patches are divided into, which touch the scan; padding
            has none.
        padded: cells of the scan with its padding.
        size: patches of a window.
        refine: cells of a patch.
        starts: first voxels of the windows along (z, y, x), ascending.
        weights: float32 weight of a window's patches along each axis.
    """

    grid: PatchGrid
    padded: Size3
    size: Size3
    refine: Size3
    starts: tuple[list[int], list[int], list[int]]
    weights: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, prepared: Prepared, preprocess: Preprocess) -> Windows:
        """The windows of a prepared scan."""
        cell, input_ZYX = prepared.grid.patch, prepared.input_ZYX
        sides = zip(input_ZYX.shape, preprocess.window, preprocess.stride, strict=True)
        z, y, x = (window_starts(*side) for side in sides)
        cells = patch_grid(preprocess.window, cell, "preprocess.window")
        size = patch_grid(cells, preprocess.refine, "preprocess.window")
        wz, wy, wx = (axis_weight(n, preprocess.border_weight).to(input_ZYX.device) for n in size)
        padded = patch_grid(input_ZYX.shape, cell, "the padded scan")
        return cls(prepared.grid, padded, size, preprocess.refine, (z, y, x), (wz, wy, wx))

    @property
    def rows(self) -> int:
        """Cells of a window along z."""
        return self.size[0] * self.refine[0]

    def corners(self) -> Iterator[Size3]:
        """First voxel (z, y, x) of every window; z ascends."""
        return itertools.product(*self.starts)

    def taper_ZYX1(self) -> Tensor:
        """Weight of every patch of a window."""
        z, y, x = self.weights
        return (z[:, None, None] * y[:, None] * x)[..., None]

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the weights of all windows at every patch of the padded scan, along each axis: the
        windows form a full grid, so the sum over windows is a product of three vectors.
        """
        totals = []
        for axis in range(3):
            weight = self.weights[axis].repeat_interleave(self.refine[axis])
            cell = self.grid.patch[axis]
            total = torch.zeros(self.padded[axis], device=weight.device)
            for start in self.starts[axis]:
                total[start // cell : start // cell + len(weight)] += weight
            totals.append(total)
        z, y, x = totals
        return z, y, x


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """First voxels of the windows that cover `size` voxels; the last one is moved back to end at
    the border.
    """
    starts = list(range(0, max(size - window, 0) + 1, stride))
    if starts[-1] + window < size:
        starts.append(size - window)
    return starts


def axis_weight(num_patches: int, border_weight: float) -> Tensor:
    """Weight of a window's tokens along one axis: 1 at the centre, falling linearly to
    `border_weight` at both ends.

    A token at the border sees context on one side only; with overlap another window sees it whole.
    """
    position = torch.arange(num_patches, dtype=torch.float32)
    from_centre = (2 * position - (num_patches - 1)).abs() / max(num_patches - 1, 1)
    return 1 - (1 - border_weight) * from_centre
