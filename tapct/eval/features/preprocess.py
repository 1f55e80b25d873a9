"""How a whole scan is prepared for a frozen backbone: the settings, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tapct.base.exits import UserError
from tapct.base.geometry import Size3, patch_grid, times
from tapct.config import setting
from tapct.data.scans.geometry import SPACING_RANGE_MM

# modes of torch's interpolate that `Preprocess.resize` may name
RESIZES = {"linear": "bilinear", "cubic": "bicubic", "area": "area", "nearest": "nearest-exact"}


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
        "distance in voxels (z, y, x) from one window to the next: a multiple of the patch, or of "
        "a cell (see refine). Windows overlap if it is smaller than the window",
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
        "before_resize clips the HU before the in-plane resize, as in training; after_resize "
        "clips them after it",
        choices=("before_resize", "after_resize"),
    )
    pad: str = setting(
        "clipped",
        "value of the slices that are added behind the last slice: clipped (the lower end of the "
        "HU window, as in training) or raw (-1024 HU, which is not clipped)",
        choices=("clipped", "raw"),
    )
    refine: tuple[int, int, int] = setting(
        (1, 1, 1),
        "cells of the feature grid per patch (z, y, x); with 2, the stride must be an odd "
        "multiple of half a patch: the patches of one window are then shifted by half a patch "
        "against those of the next window, and the features of a cell are the mean over all "
        "patches that cover this cell",
        ge=1,
    )
    spacing_mm: tuple[float, float, float] = setting(
        (0.0, 0.0, 0.0),
        "voxel spacing (z, y, x) in mm to which the scan is resized, so that the window has the "
        "same size in mm in every scan; along y and x, it is used instead of size_yx. 0: the axis "
        "is not resized by spacing",
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
