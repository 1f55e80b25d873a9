"""Surface distances of an organ in two label maps: NSD (surface Dice) and HD95.

Two definitions of a surface are in use, and their numbers differ by some percent:

- `SURFELS` (the default): a surface element lies between eight neighbouring voxels and has the area
  in mm^2 that the marching-cubes table gives it. Shares and percentiles are weighted by area. This
  is the definition of the package surface-distance and of MONAI's surface Dice with
  `use_subvoxels=True`.
- `VOXELS`: the surface is the set of voxels with a neighbour (of six) outside the organ; all count
  the same, and the percentile is interpolated. This is MONAI's default for surface Dice and its
  only definition for HD95.

Both treat the border of the scan as outside, so an organ that is cut off there has a surface there.

Axes: Z Y X depth height width, N surface elements.

Source: Nikolov et al. 2021 (doi:10.2196/26151), surface Dice and its implementation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from tapct.base.exits import UserError
from tapct.base.extras import installing
from tapct.types import IGNORE_LABEL

PERCENTILE = 95.0


class Definition(Enum):
    """What a surface is; see the top of this file."""

    SURFELS = "surfels"
    VOXELS = "voxels"


class Presence(Enum):
    """In which of the two label maps an organ is."""

    BOTH = "both"
    MISSED = "missed"  # only in the truth: NSD 0, HD95 the diagonal of the scan
    INVENTED = "invented"  # only in the prediction: no score, counted apart
    NEITHER = "neither"  # no score


@dataclass(frozen=True)
class SurfaceScore:
    """Surface distances of one organ in one scan.

    Args:
        nsd: share of both surfaces that is within the tolerance of the other one, in [0, 1]; NaN
            where the organ is not in the truth.
        hd95_mm: the larger one of the 95th percentiles of the distances from each surface to the
            other one; NaN where the organ is not in the truth.
        tolerance_mm: tolerance of `nsd`.
        presence: in which label maps the organ is.
    """

    nsd: float
    hd95_mm: float
    tolerance_mm: float
    presence: Presence


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between two surfaces.

    Args:
        from_truth_mm_N: distance of each element of the true surface to the predicted surface.
        from_prediction_mm_N: the opposite.
        truth_area_N: weight of each element of the true surface: mm^2, or 1 per voxel.
        prediction_area_N: the same for the predicted surface.
        definition: definition of the surface.
    """

    from_truth_mm_N: np.ndarray
    from_prediction_mm_N: np.ndarray
    truth_area_N: np.ndarray
    prediction_area_N: np.ndarray
    definition: Definition

    def nsd(self, tolerance_mm: float) -> float:
        """Normalised surface Dice at a tolerance, in [0, 1]."""
        within = self.truth_area_N[self.from_truth_mm_N <= tolerance_mm].sum()
        within += self.prediction_area_N[self.from_prediction_mm_N <= tolerance_mm].sum()
        return float(within / (self.truth_area_N.sum() + self.prediction_area_N.sum()))

    def hausdorff_mm(self, percentile: float = PERCENTILE) -> float:
        """Hausdorff distance at a percentile, the larger one of both directions."""
        sides = (
            (self.from_truth_mm_N, self.truth_area_N),
            (self.from_prediction_mm_N, self.prediction_area_N),
        )
        if self.definition is Definition.VOXELS:
            return max(float(np.percentile(distance_N, percentile)) for distance_N, _ in sides)
        return max(_weighted_percentile(*side, percentile) for side in sides)


def check_installed() -> None:
    """Raise UserError where the package for the default definition is missing."""
    try:
        import surface_distance  # noqa: F401
    except ImportError as error:
        raise UserError(_missing("surface-distance", error)) from error


def surface_score(
    truth_ZYX: np.ndarray,
    prediction_ZYX: np.ndarray,
    label: int,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    definition: Definition = Definition.SURFELS,
) -> SurfaceScore:
    """NSD and HD95 of one organ.

    Args:
        truth_ZYX: true labels; voxels that nobody has labelled (`IGNORE_LABEL`) belong to no organ,
            whatever the prediction there.
        prediction_ZYX: predicted labels, on the same grid.
        label: number of the organ in both.
        spacing_mm: spacing (z, y, x) of the grid.
        tolerance_mm: distance that still counts as equal; see `tolerances`.
        definition: definition of the surface.
    Raises:
        UserError: the grids differ, or spacing or tolerance are no valid lengths.
    """
    _check(truth_ZYX, prediction_ZYX, spacing_mm, tolerance_mm)
    true_ZYX = truth_ZYX == label
    predicted_ZYX = (prediction_ZYX == label) & (truth_ZYX != IGNORE_LABEL)
    presence = _presence(bool(true_ZYX.any()), bool(predicted_ZYX.any()))
    if presence is Presence.MISSED:
        sides_mm = (num * step for num, step in zip(truth_ZYX.shape, spacing_mm))
        return SurfaceScore(0.0, math.hypot(*sides_mm), tolerance_mm, presence)
    if presence is not Presence.BOTH:
        return SurfaceScore(math.nan, math.nan, tolerance_mm, presence)
    distances = surface_distances(true_ZYX, predicted_ZYX, spacing_mm, definition)
    return SurfaceScore(
        distances.nsd(tolerance_mm), distances.hausdorff_mm(), tolerance_mm, presence
    )


def surface_distances(
    true_ZYX: np.ndarray,
    predicted_ZYX: np.ndarray,
    spacing_mm: Sequence[float],
    definition: Definition = Definition.SURFELS,
) -> SurfaceDistances:
    """Distances between the surfaces of two masks.

    Args:
        true_ZYX: bool, not empty.
        predicted_ZYX: bool, not empty, on the same grid.
        spacing_mm: spacing (z, y, x) of the grid.
        definition: definition of the surface.
    """
    box = _joint_box(true_ZYX, predicted_ZYX)
    # one voxel of margin, so that the border of the box is outside
    true_ZYX, predicted_ZYX = (np.pad(mask[box], 1) for mask in (true_ZYX, predicted_ZYX))
    if definition is Definition.VOXELS:
        return _voxel_distances(true_ZYX, predicted_ZYX, spacing_mm)
    return _surfel_distances(true_ZYX, predicted_ZYX, spacing_mm)


def _surfel_distances(
    true_ZYX: np.ndarray, predicted_ZYX: np.ndarray, spacing_mm: Sequence[float]
) -> SurfaceDistances:
    try:
        import surface_distance
    except ImportError as error:
        raise UserError(_missing("surface-distance", error)) from error
    with warnings.catch_warnings():
        # the package imports from old names of scipy.ndimage
        warnings.simplefilter("ignore", DeprecationWarning)
        found = surface_distance.compute_surface_distances(
            true_ZYX, predicted_ZYX, [float(step) for step in spacing_mm]
        )
    return SurfaceDistances(
        found["distances_gt_to_pred"],
        found["distances_pred_to_gt"],
        found["surfel_areas_gt"],
        found["surfel_areas_pred"],
        Definition.SURFELS,
    )


def _voxel_distances(
    true_ZYX: np.ndarray, predicted_ZYX: np.ndarray, spacing_mm: Sequence[float]
) -> SurfaceDistances:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise UserError(_missing("scipy", error)) from error
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (true_ZYX, predicted_ZYX)]
    far_true, far_predicted = (
        ndimage.distance_transform_edt(~edge, sampling=spacing_mm) for edge in edges
    )
    from_truth, from_prediction = far_predicted[edges[0]], far_true[edges[1]]
    return SurfaceDistances(
        from_truth,
        from_prediction,
        np.ones_like(from_truth),
        np.ones_like(from_prediction),
        Definition.VOXELS,
    )


def _weighted_percentile(distance_N: np.ndarray, area_N: np.ndarray, percentile: float) -> float:
    """Smallest distance within which this percentage of the area lies."""
    order = np.argsort(distance_N, kind="stable")
    share_N = np.cumsum(area_N[order]) / area_N.sum()
    index = min(int(np.searchsorted(share_N, percentile / 100)), len(order) - 1)
    return float(distance_N[order][index])


def _joint_box(true_ZYX: np.ndarray, predicted_ZYX: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds both masks."""
    either_ZYX = true_ZYX | predicted_ZYX
    box = []
    for axis in range(either_ZYX.ndim):
        rest = tuple(other for other in range(either_ZYX.ndim) if other != axis)
        used = np.flatnonzero(either_ZYX.any(rest))
        assert len(used), "surface distances need two masks that are not empty"
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


def _presence(is_true: bool, is_predicted: bool) -> Presence:
    if is_true:
        return Presence.BOTH if is_predicted else Presence.MISSED
    return Presence.INVENTED if is_predicted else Presence.NEITHER


def _check(
    truth_ZYX: np.ndarray,
    prediction_ZYX: np.ndarray,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> None:
    if truth_ZYX.shape != prediction_ZYX.shape or truth_ZYX.ndim != len(spacing_mm):
        raise UserError(
            f"truth has shape {truth_ZYX.shape}, prediction {prediction_ZYX.shape} and spacing "
            f"{len(spacing_mm)} numbers; surface distances need one grid. Resample the prediction "
            "to the grid of the truth."
        )
    if not all(math.isfinite(step) and step > 0 for step in spacing_mm):
        raise UserError(f"spacing {tuple(spacing_mm)} mm; each number must be finite and above 0")
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise UserError(f"tolerance {tolerance_mm} mm; it must be finite and at least 0")


def _missing(package: str, error: ImportError) -> str:
    return (
        f"surface distances need the package {package}, which cannot be imported ({error}); "
        f"install it: {installing('eval', 'surface-distance')}"
    )
