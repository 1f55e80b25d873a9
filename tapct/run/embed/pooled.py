"""Vectors of a whole scan, pooled while its features are computed: no features are kept.

The same vectors as `vectors.scan_vectors` computes from features in memory, to rounding.

Axes: D channels, Z Y X patches of the grid, N patches, R registers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tapct.eval.features.dense import PatchGrid, WindowVectors
from tapct.eval.targets.vectors import CLS, MAX, MEAN, PARTS, REGISTERS, STD, ScanVectors


class _Moments:
    """Mean, standard deviation and largest value of patches that come in parts, in float64.

    Source: Chan, Golub and LeVeque 1979, on merging sums of squared deviations.
    """

    def __init__(self) -> None:
        self.num = 0
        self.mean_D: Tensor | float = 0.0
        self.squares_D: Tensor | float = 0.0
        self.max_D: Tensor | None = None

    def add(self, rows_ND: Tensor) -> None:
        """Take some patches."""
        values_ND, num = rows_ND.double(), len(rows_ND)
        mean_D = values_ND.mean(0)
        difference_D = mean_D - self.mean_D
        total = self.num + num
        self.squares_D = (
            self.squares_D
            + (values_ND - mean_D).square().sum(0)
            + difference_D.square() * (self.num * num / total)
        )
        self.mean_D = self.mean_D + difference_D * (num / total)
        self.num = total
        max_D = rows_ND.amax(0)
        self.max_D = max_D if self.max_D is None else torch.maximum(self.max_D, max_D)

    def parts(self) -> dict[str, Tensor]:
        """The three vectors."""
        assert isinstance(self.mean_D, Tensor) and isinstance(self.squares_D, Tensor)
        assert self.max_D is not None
        std_D = (self.squares_D / self.num).sqrt()
        return {MEAN: self.mean_D, STD: std_D, MAX: self.max_D}


class PoolingSink:
    """Pools the features of one scan as they are computed.

    Args:
        grid: patch grid of the scan.
        vectors: names of vectors.
        shares: name of a vector `mask:ORGAN` -> float32 (N,), share of the organ in each patch.
        num_blocks: blocks of the backbone.
    """

    def __init__(
        self,
        grid: PatchGrid,
        vectors: Sequence[str],
        shares: Mapping[str, np.ndarray],
        num_blocks: int,
    ) -> None:
        self.num_blocks = num_blocks
        self.wanted = {part for name in vectors for part in PARTS.get(name, (name,))}
        self.weights_ZN = {
            name: torch.from_numpy(share_N / share_N.sum()).reshape(grid.shape[0], -1)
            for name, share_N in shares.items()
        }
        self.moments: dict[int, _Moments] = {}
        self.masked_D: dict[tuple[int, str], Tensor | float] = {}
        self.pooled: dict[int, dict[str, np.ndarray]] = {}

    def rows(self, block: int, first: int, rows_ZYXD: Tensor) -> None:
        """Take finished rows of patches."""
        rows_ND = rows_ZYXD.flatten(0, 2)
        if self.wanted & {MEAN, STD, MAX}:
            self.moments.setdefault(block, _Moments()).add(rows_ND)
        for name, weights_ZN in self.weights_ZN.items():
            weight_N = weights_ZN[first : first + len(rows_ZYXD)].flatten().to(rows_ND)
            before = self.masked_D.get((block, name), 0.0)
            self.masked_D[block, name] = before + (weight_N @ rows_ND).double()

    def finish(self, block: int, windows: WindowVectors) -> None:
        """Take the vectors of all windows."""
        found = {CLS: windows.cls_WD.mean(0)}
        if block in self.moments:
            found |= self.moments.pop(block).parts()
        if windows.registers_WRD.shape[1]:
            found[REGISTERS] = windows.registers_WRD.mean(0).flatten()
        for name in self.weights_ZN:
            masked_D = self.masked_D[block, name]
            assert isinstance(masked_D, Tensor)
            found[name] = masked_D
        self.pooled[block] = {
            part: vector_D.float().cpu().numpy()
            for part, vector_D in found.items()
            if part in self.wanted
        }

    def vectors(self) -> ScanVectors:
        """The vectors of a finished scan."""
        return ScanVectors(self.num_blocks, self.pooled)
