"""Points of a scan that are looked for in another scan: named landmarks, or the connected parts of
labels such as lesions.

Axes: Z Y X voxels of the scan; P parts of one name; a last axis of 3 is (z, y, x) in mm from the
centre of the scan's first voxel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from tapct.base.exits import UserError
from tapct.base.extras import installing
from tapct.eval.labels.organ_classes import BODY_NAMES, OUTSIDE_NAMES, is_called
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.types import IGNORE_LABEL

LEAST_VOXELS = 8  # smaller parts of a label are specks, unless the label has no larger part


@dataclass(frozen=True)
class Region:
    """The voxels of one connected part of a label, cut out of the scan.

    Args:
        mask_ZYX: bool, the voxels of its bounding box.
        corner_3: index of the first voxel of the box.
        spacing_mm: distance of the voxels.
    """

    mask_ZYX: np.ndarray
    corner_3: np.ndarray
    spacing_mm: tuple[float, float, float]

    def holds(self, mm_3: np.ndarray) -> bool:
        """Whether a position lies in a voxel of the part."""
        if not np.isfinite(mm_3).all():
            return False
        index = np.rint(np.asarray(mm_3) / self.spacing_mm).astype(np.int64) - self.corner_3
        inside = bool(((index >= 0) & (index < self.mask_ZYX.shape)).all())
        return inside and bool(self.mask_ZYX[tuple(index)])

    def centre_mm(self) -> np.ndarray:
        """The mean position of the voxels, or the voxel nearest to it where it is outside."""
        voxels = np.argwhere(self.mask_ZYX) + self.corner_3
        at_mm = voxels * np.array(self.spacing_mm)
        mean: np.ndarray = at_mm.mean(axis=0)
        if self.holds(mean):
            return mean
        nearest: np.ndarray = at_mm[np.square(at_mm - mean).sum(axis=1).argmin()]
        return nearest


@dataclass(frozen=True)
class NamedPoints:
    """The points of one name in a scan: one for a landmark, one per connected part for a label.

    Args:
        mm_P3: positions.
        regions: connected parts in the same order; empty for a landmark.
    """

    mm_P3: np.ndarray
    regions: tuple[Region, ...] = ()

    def error_mm(self, place_3: np.ndarray) -> float:
        """Distance from a place to the nearest of the points."""
        return float(np.linalg.norm(self.mm_P3 - place_3, axis=1).min())

    def is_hit(self, place_3: np.ndarray, radius_mm: float) -> bool:
        """Whether a place is within a radius of one of the points or inside a connected part."""
        if not np.isfinite(place_3).all():
            return False
        near = self.error_mm(place_3) <= radius_mm
        return near or any(region.holds(place_3) for region in self.regions)


def landmark_points(scan: LabelledScan, names: Collection[str]) -> dict[str, NamedPoints]:
    """The landmarks of a scan.

    Args:
        scan: scan with landmarks.
        names: names of the points; empty: all.
    """
    return {
        name: NamedPoints(np.array([point], dtype=np.float64))
        for name, point in sorted(scan.landmarks_mm.items())
        if not names or name in names
    }


def label_points(scan: LabelledScan, names: Collection[str]) -> dict[str, NamedPoints]:
    """The connected parts of the labels of a scan, the largest first.

    Args:
        scan: scan with a label map.
        names: names or values of labels; empty: all but the background, the body and the table.
    """
    label_map = scan.label_map
    called = dict(label_map.names)
    counts = np.bincount(label_map.labels_ZYX.reshape(-1))
    found: dict[str, list[Region]] = {}
    for value in np.flatnonzero(counts).tolist():
        name = called.get(value, f"label {value}")
        if value in (0, IGNORE_LABEL) or not _is_wanted(value, name, names):
            continue
        found.setdefault(name, []).extend(_parts(label_map.labels_ZYX == value, scan.spacing_mm))
    return {
        name: NamedPoints(np.array([region.centre_mm() for region in regions]), tuple(regions))
        for name, regions in found.items()
    }


def common_points(first: Mapping[str, NamedPoints], second: Mapping[str, NamedPoints]) -> list[str]:
    """Names of points that both scans have, in the order of the first."""
    return [name for name in first if name in second]


def _is_wanted(value: int, name: str, names: Collection[str]) -> bool:
    if names:
        return is_called(value, name, tuple(names))
    return not is_called(value, name, (*BODY_NAMES, *OUTSIDE_NAMES))


def _parts(mask_ZYX: np.ndarray, spacing_mm: tuple[float, float, float]) -> list[Region]:
    """The connected parts of a label, which touch at faces, the largest first.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise UserError(
            "the connected parts of labels need scipy, which is not installed: "
            + installing("eval", "scipy")
        ) from error
    numbers_ZYX, num = ndimage.label(mask_ZYX)
    boxes = ndimage.find_objects(numbers_ZYX)
    regions = []
    for number in range(1, num + 1):
        box = boxes[number - 1]
        corner = np.array([side.start for side in box])
        regions.append(Region(numbers_ZYX[box] == number, corner, spacing_mm))
    sizes = [int(region.mask_ZYX.sum()) for region in regions]
    order = sorted(range(num), key=lambda number: (-sizes[number], number))
    least = min(LEAST_VOXELS, max(sizes, default=0))
    return [regions[number] for number in order if sizes[number] >= least]


def mean_of(values: Collection[float]) -> float:
    """Mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
