"""Frozen dense features of a whole scan: its patch grid, and the way back to voxels.
`extraction.py` computes the features.

Axes: Z Y X depth height width (voxels, or patches of the grid where stated), D channels,
C maps (classes), W windows of a scan, R registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tapct.base.exits import UserError
from tapct.base.geometry import Grid, Size3
from tapct.eval.features.preprocess import Preprocess

_SLAB_BYTES = 16 << 20  # of the largest temporary while a map is brought to voxels


@dataclass(frozen=True)
class PatchGrid:
    """Where the patches of a scan lie in its voxels.

    Args:
        patch: voxels (z, y, x) of one patch in the resized scan; of a cell, where
            `Preprocess.refine` divides patches into cells, which then are what is called patches
            here.
        resized: shape of the resized scan, before padding.
        original: shape of the scan as it was read.
    """

    patch: Size3
    resized: Size3
    original: Size3

    @classmethod
    def of_scan(
        cls,
        shape_ZYX: Sequence[int],
        preprocess: Preprocess,
        patch: Size3,
        spacing_mm: Sequence[float] | None = None,
    ) -> PatchGrid:
        """The grid of a scan of this shape in voxels; the voxels need not be read.

        Args:
            shape_ZYX: voxels of the scan.
            preprocess: how it is resized.
            patch: voxels (z, y, x) of a patch.
            spacing_mm: mm of the scan's voxels along (z, y, x); needed where `preprocess` resizes
                to a spacing.
        Raises:
            UserError: the spacing is missing, or windows do not lie on the grid.
        """
        depth, height, width = shape_ZYX
        size_y, size_x = preprocess.size_yx
        resized = [depth, size_y or height, size_x or width]
        if preprocess.needs_spacing and spacing_mm is None:
            raise UserError(
                "preprocess.spacing_mm resizes each scan to a spacing, and the spacing of this "
                "scan was not given; give spacing_mm"
            )
        for axis, wanted in enumerate(preprocess.spacing_mm):
            if wanted and spacing_mm is not None:
                resized[axis] = max(1, int(shape_ZYX[axis] * spacing_mm[axis] / wanted + 0.5))
        z, y, x = resized
        return cls(preprocess.cell(patch), (z, y, x), (depth, height, width))

    @property
    def shape(self) -> Grid:
        """Patches along (z, y, x): enough to cover the resized scan."""
        z, y, x = (-(-size // side) for size, side in zip(self.resized, self.patch, strict=True))
        return z, y, x

    @property
    def patches_per_voxel(self) -> tuple[float, float, float]:
        """Patches along (z, y, x) in one voxel of the scan as it was read."""
        z, y, x = (
            r / o / p for r, o, p in zip(self.resized, self.original, self.patch, strict=True)
        )
        return z, y, x

    def centre_mm(
        self, patch_index: Sequence[float], spacing_mm: Sequence[float]
    ) -> tuple[float, float, float]:
        """Position of a patch's centre along (z, y, x) in mm, from the centre of the scan's first
        voxel.

        The centre of patch i lies at (i + 0.5) * patch in edges of resized voxels, thus at
        ((i + 0.5) * patch * original / resized - 0.5) * spacing. Padding lies behind the scan, so
        it moves nothing.

        Args:
            patch_index: number of the patch along (z, y, x); fractions lie between two centres.
            spacing_mm: mm of the scan's own voxels along (z, y, x).
        """
        z, y, x = (
            ((i + 0.5) * p * o / r - 0.5) * mm
            for i, p, o, r, mm in zip(
                patch_index, self.patch, self.original, self.resized, spacing_mm, strict=True
            )
        )
        return z, y, x

    def spacing_mm(self, spacing_mm: Sequence[float]) -> tuple[float, float, float]:
        """Distance of patch centres along (z, y, x) in mm, from the scan's own voxel spacing in
        mm.
        """
        z, y, x = (
            mm * o / r * p
            for mm, o, r, p in zip(spacing_mm, self.original, self.resized, self.patch, strict=True)
        )
        return z, y, x

    def matrix(self, axis: int) -> Tensor:
        """Linear interpolation from patch centres to the original voxels' centres along one axis.

        Voxel i of the original lies at ((i + 0.5) * resized / original) / patch - 0.5 in units of
        patches. Beyond the outermost patch centres the value is held, so a constant map stays
        constant up to the border.

        Returns:
            float32 (original[axis], shape[axis]); rows sum to 1.
        """
        num_voxels, num_patches = self.original[axis], self.shape[axis]
        centre = (torch.arange(num_voxels, dtype=torch.float64) + 0.5) * (
            self.resized[axis] / num_voxels
        )
        position = centre / self.patch[axis] - 0.5
        return _between(position, torch.arange(num_patches, dtype=torch.float64)).float()

    def voxel_slabs(self, maps_CZYX: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Linear upsampling of maps on the patch grid to the original voxels, a bounded slab of
        slices at a time.

        Args:
            maps_CZYX: float32 on the patch grid.
        Yields:
            (first slice, end slice, float32 (C, slices, Y, X) on the original grid).
        """
        self._check_maps(maps_CZYX)
        mz, my, mx = (self.matrix(axis).to(maps_CZYX.device) for axis in range(3))
        depth, height, width = self.original
        step = max(1, _SLAB_BYTES // (4 * maps_CZYX.shape[0] * height * width))
        for start in range(0, depth, step):
            end = min(depth, start + step)
            slab = torch.einsum("cgyx,zg->czyx", maps_CZYX, mz[start:end])
            yield start, end, my @ (slab @ mx.T)

    def to_voxels(self, maps_CZYX: Tensor) -> Tensor:
        """`voxel_slabs` in one piece: float32 (C, Z, Y, X) on the original grid, all in memory."""
        return torch.cat([slab for _, _, slab in self.voxel_slabs(maps_CZYX)], dim=1)

    def argmax_voxels(self, maps_CZYX: Tensor) -> np.ndarray:
        """Index of the largest upsampled map at every original voxel: uint16 (Z, Y, X);
        memory-bounded.
        """
        out = np.empty(self.original, dtype=np.uint16)
        for start, end, slab in self.voxel_slabs(maps_CZYX):
            if slab.is_cuda:
                out[start:end] = slab.argmax(dim=0).cpu().numpy()
            else:
                for z in range(start, end):
                    out[z] = _largest(slab[:, z - start].numpy())
        return out

    def patch_of_voxel(self, axis: int, num_samples: int) -> np.ndarray:
        """Patch index (int64) of each of `num_samples` equal parts of the scan along an axis, by
        the part's centre.
        """
        centre = (np.arange(num_samples) + 0.5) * (self.resized[axis] / num_samples)
        return np.minimum(centre // self.patch[axis], self.shape[axis] - 1).astype(np.int64)

    def _check_maps(self, maps_CZYX: Tensor) -> None:
        if tuple(maps_CZYX.shape[1:]) != self.shape:
            raise ValueError(f"maps are {tuple(maps_CZYX.shape)}, the patch grid is {self.shape}")


@dataclass(frozen=True)
class WindowVectors:
    """One vector of each kind for every window of a scan, of one block.

    Args:
        cls_WD: float32, class tokens.
        mean_WD: float32, mean of the window's patch tokens.
        std_WD: float32, their standard deviation, channel by channel (divided by N, not N - 1).
        max_WD: float32, their largest value, channel by channel.
        registers_WRD: float32, register tokens; R is 0 where the backbone has none.
        start_W3: int64, first voxel (z, y, x) of each window in the resized scan.
    """

    cls_WD: Tensor
    mean_WD: Tensor
    std_WD: Tensor
    max_WD: Tensor
    registers_WRD: Tensor
    start_W3: Tensor


@dataclass(frozen=True)
class BlockFeatures:
    """The features of a scan after one block of the backbone, through the final norm.

    Args:
        features_DZYX: float32 on the patch grid, averaged over overlapping windows.
        windows: vectors of each window.
    """

    features_DZYX: Tensor
    windows: WindowVectors


@dataclass(frozen=True)
class DenseFeatures:
    """The features of a scan from a frozen backbone.

    Args:
        features_DZYX: float32 on the patch grid of the resized scan, averaged over overlapping
            windows; of the last block.
        cls_D: float32, mean class token over the windows; of the last block.
        grid: maps features, or logits made of them, to voxels.
        blocks: number of a block, counted from 0 -> its features, for the blocks that a task asked
            for (`Task.blocks`). The last block is always there. Empty where features were not
            computed by `features_of`.
        window: voxels (z, y, x) of a window in the resized scan; None where features were not
            computed by `features_of`.
    """

    features_DZYX: Tensor
    cls_D: Tensor
    grid: PatchGrid
    blocks: Mapping[int, BlockFeatures] = field(default_factory=dict)
    window: Size3 | None = None

    def tokens_ND(self, block: int | None = None) -> Tensor:
        """The features as rows, patches in (z, y, x) raster order.

        Args:
            block: number of the block; None, the default, for the last one.
        """
        features_DZYX = self.features_DZYX
        if block is not None:
            features_DZYX = self.blocks[block].features_DZYX
        return features_DZYX.permute(1, 2, 3, 0).flatten(0, 2)

    def cls_around_ND(self) -> Tensor:
        """The class token of the windows around each patch, of the last block, as rows in the order
        of `tokens_ND`.

        The windows form a full grid. Along each axis, the class token is interpolated linearly
        between the windows whose centres are next to the centre of the patch. Beyond the outermost
        centres, the value is held.

        Raises:
            ValueError: the features were not computed by `features_of`.
        """
        if self.window is None or not self.blocks:
            raise ValueError("class tokens of windows need features that `features_of` computed")
        windows = self.blocks[max(self.blocks)].windows
        matrices, counts = [], []
        for axis, side in enumerate(self.window):
            start_K = windows.start_W3[:, axis].unique()
            patch_N = torch.arange(self.grid.shape[axis]) + 0.5
            matrix_NK = _between(patch_N * self.grid.patch[axis], start_K + side / 2)
            matrices.append(matrix_NK.to(windows.cls_WD))
            counts.append(len(start_K))
        cls_KKKD = windows.cls_WD.unflatten(0, counts)  # windows in (z, y, x) raster order
        for axis, matrix_NK in enumerate(matrices):
            cls_KKKD = torch.tensordot(matrix_NK, cls_KKKD.movedim(axis, 0), 1).movedim(0, axis)
        return cls_KKKD.flatten(0, 2)


def _between(at_N: Tensor, knots_K: Tensor) -> Tensor:
    """Weights of linear interpolation: (N, K), rows sum to 1. Beyond the first and the last knot,
    the value is held.

    Args:
        at_N: places that need a value.
        knots_K: places of the values, ascending.
    """
    weights_NK = at_N.new_zeros(len(at_N), len(knots_K))
    above_N = torch.searchsorted(knots_K, at_N).clamp(max=len(knots_K) - 1)
    below_N = (above_N - 1).clamp(min=0)
    distance_N = knots_K[above_N] - knots_K[below_N]
    distance_N[above_N == below_N] = 1  # both are the first knot, and so is the value
    share_N = ((at_N - knots_K[below_N]) / distance_N).clamp(0, 1)
    weights_NK.scatter_add_(1, below_N[:, None], (1 - share_N)[:, None])
    weights_NK.scatter_add_(1, above_N[:, None], share_N[:, None])
    return weights_NK


def _largest(maps_CYX: np.ndarray) -> np.ndarray:
    """Index of the largest map at each pixel, the first of equals: an integer type, (Y, X).

    Plain form: maps_CYX.argmax(0). Over the first axis, argmax and max of torch and numpy take 12
    times as long as these comparisons of whole maps. A later map has a larger index, so the index
    is the maximum of those maps that were larger than all before them.
    """
    dtype = np.uint8 if len(maps_CYX) <= 256 else np.uint16
    largest, index = maps_CYX[0].copy(), np.zeros(maps_CYX.shape[1:], dtype=dtype)
    for number in range(1, len(maps_CYX)):
        is_larger = maps_CYX[number] > largest
        np.maximum(largest, maps_CYX[number], out=largest)
        np.maximum(index, np.multiply(is_larger, number, dtype=dtype), out=index)
    return index
