"""Steps of the HU between neighbouring slices, as a lost or wrong intercept in some slices makes.

Anatomy changes from slice to slice in some voxels, up and down. A wrong intercept moves nearly all
of them by the same amount, and only between two slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tapct.types import AIR_HU, Refused

_SIDE = 64  # pixels of a slice along each axis that are compared
_TISSUE_ABOVE = -300  # HU, in one of the two slices
_NO_AIR_ABOVE = -700  # HU; where a body ends, and lung begins, is no step of the level
_AIR_BELOW = -700
_MIN_SHARE = 0.05  # of the pixels of a slice
_MIN_PIXELS = 40
_UNCHANGED_ABOVE = -950  # HU; below it, air that is clamped does not move
_UNCHANGED = 0.15  # change relative to the step below which a voxel keeps its HU
_MAX_UNCHANGED = 0.2  # share of voxels above air
_TAIL = 0.2  # share of the voxels on each side that may differ from the others
_ABSENT = 0.1  # share of the tissue of its neighbours below which a slice has none
_MIN_TISSUE = 0.05  # share of the pixels of a slice that has a body
# by the values alone
_MIN_HU = 60.0  # real scans reach 20 HU, and 310 HU in crops of the lung, there unevenly
_UNIFORM = 0.8  # least change of 80 % of the voxels relative to that of half of them
_ALONE = 4.0  # ratio to the steps before and after
# where the header changes the rescaling too
_MIN_HU_RESCALED = 25.0
_UNIFORM_RESCALED = 0.5
_USUAL = 4.0  # ratio to the steps elsewhere in the series


@dataclass(frozen=True)
class _LevelSteps:
    """Steps between neighbouring slices in one kind of tissue, 0 where it is too rare.

    Args:
        median: median of the differences in HU.
        least: difference in HU that 80 % of the voxels reach or exceed, without sign; 0 where they
            differ in sign.
    """

    median: np.ndarray
    least: np.ndarray


def check_levels(hu_ZYX: np.ndarray) -> None:
    """Refuse a scan in which the HU of some slices are shifted, by its values alone.

    Args:
        hu_ZYX: int16 HU, every value >= AIR_HU.
    Raises:
        Refused: not_hu.
    """
    pixels = _thinned(hu_ZYX)
    num_slices = len(pixels)
    for steps in _steps(pixels):
        size = np.abs(steps.median)
        # the outermost slices may be interpolated with what lies outside of the scan
        for pair in range(1, num_slices - 2):
            beside = max(size[pair - 1], size[pair + 1])
            is_uniform = steps.least[pair] >= max(_MIN_HU, _UNIFORM * size[pair])
            if is_uniform and size[pair] > _ALONE * beside:
                raise Refused(
                    "not_hu",
                    f"nearly all HU change by {steps.median[pair]:.0f} between the slices {pair} "
                    f"and {pair + 1} of {num_slices}, and little before and after; some slices "
                    "have another intercept or slope; export the series again",
                )


def check_rescaling(
    planes: Sequence[np.ndarray], rescalings: Sequence[tuple[float, float]]
) -> None:
    """Refuse a series whose HU step where its slope or intercept changes between two slices.

    A rescaling of its own in every slice is legal, as long as the HU stay at one level.

    Args:
        planes: HU (rows, columns) of the slices in order.
        rescalings: slope and intercept of each.
    Raises:
        Refused: not_hu.
    """
    if len(set(rescalings)) == 1:
        return
    stride_y, stride_x = (max(1, size // _SIDE) for size in planes[0].shape)
    pixels = np.stack([np.maximum(plane[::stride_y, ::stride_x], AIR_HU) for plane in planes])
    pairs = list(zip(rescalings[:-1], rescalings[1:], strict=True))
    changes = np.asarray([before != after for before, after in pairs])
    for steps in _steps(pixels):
        size = np.abs(steps.median)
        usual = float(np.quantile(size[~changes], 0.9)) if not changes.all() else 0.0
        limit = max(_MIN_HU_RESCALED, _USUAL * usual)
        is_step = changes & (size > limit) & (steps.least >= _UNIFORM_RESCALED * size)
        if is_step.any():
            pair = int(np.argmax(is_step))
            (slope, intercept), (next_slope, next_intercept) = pairs[pair]
            raise Refused(
                "not_hu",
                f"the HU change by {steps.median[pair]:.0f} between the slices {pair} and "
                f"{pair + 1} of {len(planes)}, where slope and intercept change from {slope:g} and "
                f"{intercept:g} to {next_slope:g} and {next_intercept:g}; correct the rescaling",
            )
    _check_absent(pixels, changes)


def _thinned(hu_ZYX: np.ndarray) -> np.ndarray:
    stride_y, stride_x = (max(1, size // _SIDE) for size in hu_ZYX.shape[1:])
    return np.ascontiguousarray(hu_ZYX[:, ::stride_y, ::stride_x])


def _steps(pixels: np.ndarray) -> tuple[_LevelSteps, _LevelSteps]:
    """Steps in the body and in the air of every two neighbouring slices."""
    results = np.zeros((2, 2, len(pixels) - 1))
    for pair, (first, second) in enumerate(zip(pixels[:-1], pixels[1:], strict=True)):
        low, high = np.minimum(first, second), np.maximum(first, second)
        difference = second.astype(np.float32) - first
        body = (high > _TISSUE_ABOVE) & (low > _NO_AIR_ABOVE)
        air = (low < _AIR_BELOW) & (low > AIR_HU) & (high <= _TISSUE_ABOVE)
        for kind, region in enumerate((body, air)):
            if region.sum() >= max(_MIN_PIXELS, _MIN_SHARE * region.size):
                below, middle, above = np.quantile(difference[region], (_TAIL, 0.5, 1 - _TAIL))
                results[kind, :, pair] = middle, max(below, -above, 0.0)
        # where anatomy changes, such as lung beside the liver, other lung stays as it is
        above_air = difference[low > _UNCHANGED_ABOVE]
        stays = np.abs(above_air) < _UNCHANGED * abs(results[0, 0, pair])
        if stays.any() and stays.mean() > _MAX_UNCHANGED:
            results[0, 1, pair] = 0.0
    return _LevelSteps(*results[0]), _LevelSteps(*results[1])


def _check_absent(pixels: np.ndarray, changes: np.ndarray) -> None:
    """Refuse slices that hold air alone between slices of a body, where the rescaling changes."""
    tissue = (pixels > _TISSUE_ABOVE).mean(axis=(1, 2))
    has_body = np.flatnonzero(tissue >= _MIN_TISSUE)
    for before, after in zip(has_body[:-1], has_body[1:], strict=True):
        between = tissue[before + 1 : after]
        if not (changes[before] and changes[after - 1]):
            continue
        if between.size and between.max() < _ABSENT * min(tissue[before], tissue[after]):
            raise Refused(
                "not_hu",
                f"the slices {before + 1} to {after - 1} of {len(pixels)} hold no body, although "
                "the slices before and after do; check their intercept",
            )
