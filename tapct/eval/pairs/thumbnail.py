"""A small copy of a scan and its labels: what is kept of a scan for pictures, for the outline of
the body and for label maps that are moved to another scan.

Axes: Z Y X voxels of the copy; N patches in (z, y, x) raster order; a last axis of 3 is (z, y, x).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from tapct.eval.features.dense import PatchGrid
from tapct.eval.pairs.correspondence import PatchFrame
from tapct.eval.scans.body import body_mask
from tapct.eval.scans.labelled_scan import LabelledScan


@dataclass(frozen=True)
class Thumbnail:
    """Every k-th voxel of a scan along each axis, from the first one on.

    Args:
        hu_ZYX: int16.
        spacing_mm: distance of these voxels; the first one is at 0 mm.
        labels_ZYX: uint16, label values; None where they are not kept.
        names: label value -> name; may be empty.
    """

    hu_ZYX: np.ndarray
    spacing_mm: tuple[float, float, float]
    labels_ZYX: np.ndarray | None = None
    names: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of(cls, scan: LabelledScan, most_mm: float, *, with_labels: bool = False) -> Thumbnail:
        """Copy a scan.

        Args:
            scan: scan to copy.
            most_mm: largest distance of the voxels of the copy; an axis with a larger spacing
                keeps all of its voxels.
            with_labels: whether to copy the label map.
        """
        step = [max(1, int(most_mm / mm)) for mm in scan.spacing_mm]
        every = tuple(slice(None, None, k) for k in step)
        z, y, x = (mm * k for mm, k in zip(scan.spacing_mm, step, strict=True))
        hu_ZYX = np.ascontiguousarray(scan.volume.hu_ZYX[every])
        if not with_labels:
            return cls(hu_ZYX, (z, y, x))
        labels_ZYX = np.ascontiguousarray(scan.label_map.labels_ZYX[every])
        return cls(hu_ZYX, (z, y, x), labels_ZYX, scan.label_map.names)

    def index_of(self, mm_P3: np.ndarray) -> np.ndarray:
        """Nearest voxel of the copy: int64 (P, 3), inside the copy."""
        index = np.rint(np.asarray(mm_P3) / self.spacing_mm).astype(np.int64)
        clipped: np.ndarray = index.clip(0, np.array(self.hu_ZYX.shape) - 1)
        return clipped

    @functools.cached_property
    def body_ZYX(self) -> np.ndarray:
        """Rough outline of the body: bool."""
        return body_mask(self.hu_ZYX)

    def body_centre_mm(self) -> np.ndarray:
        """Mean position of the voxels of the body, or of all voxels where there is no body."""
        body = self.body_ZYX if self.body_ZYX.any() else np.ones_like(self.body_ZYX)
        centre = []
        for axis in range(3):
            others = tuple(other for other in range(3) if other != axis)
            count = body.sum(axis=others)
            centre.append(float((np.arange(len(count)) * count).sum() / count.sum()))
        scaled: np.ndarray = np.array(centre) * self.spacing_mm
        return scaled


def body_frame(
    scan: Thumbnail, grid: PatchGrid, spacing_mm: tuple[float, float, float]
) -> PatchFrame:
    """The patches that touch the body; all patches where it is not found.

    A patch is taken if its centre or one of its corners lies in the body.

    Args:
        scan: copy of the scan.
        grid: patch grid of the features.
        spacing_mm: mm of the scan's own voxels.
    """
    num = int(np.prod(grid.shape))
    everything = PatchFrame(grid, spacing_mm, np.arange(num))
    touches_N = np.zeros(num, dtype=bool)
    corners = [np.where(np.array(corner), 0.49, -0.49) for corner in np.ndindex(2, 2, 2)]
    for offset in (np.zeros(3), *corners):
        at_mm = everything.to_mm(everything.index_N3 + offset)
        touches_N |= scan.body_ZYX[tuple(scan.index_of(at_mm).T)]
    if not touches_N.any():
        return everything
    return PatchFrame(grid, spacing_mm, np.flatnonzero(touches_N))
