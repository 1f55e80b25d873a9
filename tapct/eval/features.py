"""Frozen dense features of a whole scan: its patch grid, the way back to voxels, and how the scan
is prepared for sliding windows. `extraction.py` computes the features.

Axes: Z Y X depth height width (voxels, or patches of the grid where stated), D channels,
C maps (classes), W windows of a scan, R registers.
Padding: the scan stands at the origin and air follows at the far end of each axis, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tapct.base.exits import UserError
from tapct.base.geometry import Grid, Size3, patch_grid, times
from tapct.config import setting
from tapct.data.scans.geometry import SPACING_RANGE_MM
from tapct.types import AIR_HU, HUContract
from tapct.views.resample import resize_volume

# modes of torch's interpolate that `Preprocess.resize` may name
RESIZES = {"linear": "bilinear", "cubic": "bicubic", "area": "area", "nearest": "nearest-exact"}
_SLAB_BYTES = 16 << 20  # of the largest temporary while a map is brought to voxels


@dataclass(frozen=True)
class Preprocess:
    """How a whole scan is prepared for a frozen backbone; stored in every export with the HU
    contract.
    """

    size_yx: tuple[int, int] = setting(
        (224, 224),
        "in-plane size in voxels that the scan is resized to; 0: the scan keeps its size; "
        "arXiv:2512.00872",
        ge=0,
    )
    window: tuple[int, int, int] = setting(
        (12, 224, 224), "voxels (z, y, x) that the backbone sees at once; arXiv:2512.00872", ge=1
    )
    stride: tuple[int, int, int] = setting(
        (8, 112, 112),
        "step of the window in voxels (z, y, x), a multiple of the patch (of a cell, see refine); "
        "windows overlap where it is smaller than the window",
        ge=1,
    )
    border_weight: float = setting(
        1.0,
        "weight of the outermost tokens of a window in the mean over windows; the tokens at "
        "its centre have weight 1",
        gt=0,
        le=1,
    )

    resize: str = setting(
        "antialias",
        "in-plane resize: antialias (the matrices of training), or linear, cubic, area or nearest "
        "of torch's interpolate, for weights of other projects",
        choices=("antialias", *RESIZES),
    )
    clip: str = setting(
        "before_resize",
        "whether HU are clipped before the in-plane resize, as in training, or after it",
        choices=("before_resize", "after_resize"),
    )
    pad: str = setting(
        "clipped",
        "value behind the end of the scan: clipped (air at the lower end of the HU window, as in "
        "training) or raw (-1024 HU, which is not clipped)",
        choices=("clipped", "raw"),
    )
    refine: tuple[int, int, int] = setting(
        (1, 1, 1),
        "cells of the feature grid per patch (z, y, x); with 2, the stride must be an odd multiple "
        "of half a patch: windows then lie between each other's patches, and the features of a "
        "cell are the mean over all patches that cover it",
        ge=1,
    )
    spacing_mm: tuple[float, float, float] = setting(
        (0.0, 0.0, 0.0),
        "voxel spacing (z, y, x) in mm that the scan is resized to, so that the window has the "
        "same size in mm in every scan; it replaces size_yx along y and x. 0: not by spacing",
        ge=0,
    )

    def __post_init__(self) -> None:
        low, high = SPACING_RANGE_MM
        for axis, mm in zip("zyx", self.spacing_mm, strict=True):
            if mm and not low <= mm <= high:
                raise UserError(
                    f"preprocess.spacing_mm is {mm:g} along {axis}; rule: 0, or from {low:g} to "
                    f"{high:g} mm"
                )
        for axis, window, stride in zip("zyx", self.window, self.stride, strict=True):
            if stride > window:
                raise UserError(
                    f"preprocess.stride is {stride} along {axis}, more than the window of "
                    f"{window}: voxels would be "
                    f"skipped. Use {window} or less."
                )

    @property
    def needs_spacing(self) -> bool:
        """Whether the size of the resized scan depends on the spacing of the scan."""
        return any(self.spacing_mm)

    def cell(self, patch: Size3, name: str = "preprocess") -> Size3:
        """Voxels (z, y, x) of a cell of the feature grid: a patch, or a part of it.

        Args:
            patch: voxels (z, y, x) of a patch.
            name: section of these settings, for the error line.
        Raises:
            UserError: a patch cannot be divided into `refine` cells, windows do not lie on the
                grid, or the stride leads to some cells of a patch only.
        """
        on_grid = "windows fall on the patch grid"
        patch_grid(self.window, patch, f"{name}.window", on_grid)
        for axis, side, parts in zip("zyx", patch, self.refine, strict=True):
            if side % parts:
                raise UserError(
                    f"{name}.refine is {parts} along {axis}, which does not divide a patch of "
                    f"{side} voxels; change it"
                )
        z, y, x = (side // parts for side, parts in zip(patch, self.refine, strict=True))
        if max(self.refine) > 1:
            on_grid = f"{name}.refine divides the patch {times(patch)} into such cells"
        steps = patch_grid(self.stride, (z, y, x), f"{name}.stride", on_grid)
        for axis, step, cell, parts in zip("zyx", steps, (z, y, x), self.refine, strict=True):
            if math.gcd(step, parts) > 1:
                fits = next(n for n in range(step - 1, 0, -1) if math.gcd(n, parts) == 1)
                raise UserError(
                    f"{name}.refine is {parts} along {axis}, but with a stride of "
                    f"{step * cell} windows do not lie at every cell of a patch; use a stride of "
                    f"{fits * cell}, or {name}.refine 1"
                )
        return z, y, x


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
        position = (centre / self.patch[axis] - 0.5).clamp(0, num_patches - 1)
        low = position.floor().long().clamp(max=max(num_patches - 2, 0))
        share = position - low
        matrix = torch.zeros(num_voxels, num_patches, dtype=torch.float64)
        matrix.scatter_add_(1, low[:, None], (1 - share)[:, None])
        matrix.scatter_add_(1, (low + 1).clamp(max=num_patches - 1)[:, None], share[:, None])
        return matrix.float()

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
    """

    features_DZYX: Tensor
    cls_D: Tensor
    grid: PatchGrid
    blocks: Mapping[int, BlockFeatures] = field(default_factory=dict)

    def tokens_ND(self, block: int | None = None) -> Tensor:
        """The features as rows, patches in (z, y, x) raster order.

        Args:
            block: number of the block; None, the default, for the last one.
        """
        features_DZYX = self.features_DZYX
        if block is not None:
            features_DZYX = self.blocks[block].features_DZYX
        return features_DZYX.permute(1, 2, 3, 0).flatten(0, 2)


@dataclass(frozen=True)
class Prepared:
    """A scan ready for windows: resized, clipped, normalised, padded; the same for all models.

    Args:
        input_ZYX: float32 after `HUContract.normalise`, padded with air to whole patches and to one
            window at least.
        grid: of the patches that touch the scan.
        spacing_mm: mm of the resized voxels along (z, y, x); None if it was not given.
    """

    input_ZYX: Tensor
    grid: PatchGrid
    spacing_mm: tuple[float, float, float] | None = None


def prepare(
    hu_ZYX: np.ndarray,
    contract: HUContract,
    preprocess: Preprocess,
    patch: Size3,
    device: torch.device | str = "cpu",
    spacing_mm: Sequence[float] | None = None,
) -> Prepared:
    """Resize, clip, normalise and pad a scan.

    By default the clip comes before the resize, as in training: metal and padding values must not
    ring into tissue.

    Args:
        hu_ZYX: int16 HU of the whole scan.
        spacing_mm: mm of the scan's own voxels along (z, y, x); only a backbone that works in mm,
            or `Preprocess.spacing_mm`, needs it.
    Raises:
        UserError: window or stride off the patch grid, or no spacing where it is needed.
    """
    depth, height, width = hu_ZYX.shape
    grid = PatchGrid.of_scan(hu_ZYX.shape, preprocess, patch, spacing_mm)
    resized = grid.resized
    padded = [
        max(-(-size // side) * side, window)
        for size, side, window in zip(resized, patch, preprocess.window, strict=True)
    ]
    air = float(contract.normalise(torch.tensor(float(AIR_HU))))
    if preprocess.pad == "raw":
        air = (AIR_HU - contract.mean) / contract.std
    input_ZYX = torch.full(padded, air, device=device)
    planes_ZYX = None  # slices that have their size, where they are resampled along z too
    if resized[0] != depth:
        planes_ZYX = torch.empty((depth, *resized[1:]), device=device)
    step = max(1, _SLAB_BYTES // (4 * height * width))
    for start in range(0, depth, step):  # in their plane, slabs of slices are independent
        slab = torch.from_numpy(np.ascontiguousarray(hu_ZYX[start : start + step])).to(
            device, torch.float32
        )
        if preprocess.clip == "before_resize":
            slab = slab.clamp(contract.clip_low, contract.clip_high)
        if resized[1:] != (height, width):
            slab = resized_slab(slab, resized[1:], preprocess, contract)
        if planes_ZYX is not None:
            planes_ZYX[start : start + len(slab)] = slab
            continue
        input_ZYX[start : start + len(slab), : resized[1], : resized[2]] = contract.normalise(slab)
    if planes_ZYX is not None:
        whole_ZYX = resize_volume(planes_ZYX, resized, _air_hu(preprocess, contract))
        input_ZYX[: resized[0], : resized[1], : resized[2]] = contract.normalise(whole_ZYX)
    if spacing_mm is None:
        return Prepared(input_ZYX, grid)
    z, y, x = (mm / side for mm, side in zip(grid.spacing_mm(spacing_mm), grid.patch, strict=True))
    return Prepared(input_ZYX, grid, (z, y, x))


def resized_slab(
    hu_ZYX: Tensor, size_yx: tuple[int, int], preprocess: Preprocess, contract: HUContract
) -> Tensor:
    """Slices resized in their plane, by `Preprocess.resize`.

    Args:
        hu_ZYX: float32 HU of some slices.
        size_yx: voxels of a slice afterwards.
        preprocess: mode, and whether the slices are clipped already.
        contract: HU window.
    """
    if preprocess.resize == "antialias":
        air = _air_hu(preprocess, contract)
        return resize_volume(hu_ZYX, (len(hu_ZYX), *size_yx), air)
    return F.interpolate(hu_ZYX[:, None], size=size_yx, mode=RESIZES[preprocess.resize])[:, 0]


def _air_hu(preprocess: Preprocess, contract: HUContract) -> float:
    """HU outside of the scan during the resize."""
    return contract.clip_low if preprocess.clip == "before_resize" else float(AIR_HU)


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
