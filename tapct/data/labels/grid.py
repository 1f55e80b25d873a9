"""Bring a label map onto the grid of its scan by whole voxels; nothing is resampled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tapct.data.scans.geometry import (
    box_corners,
    check_same_directions,
    check_same_grid,
    corners_in_scan,
    sizes_of,
    voxel_to_mm,
)
from tapct.types import IGNORE_LABEL, LabelMap, Refused, Volume

# voxels by which any corner of a smaller or larger grid may miss the scan's voxels
WHOLE_VOXEL_TO = 1e-2


def fit_to_scan(
    labels: LabelMap, volume: Volume, first_voxel_mm: np.ndarray | None = None
) -> LabelMap:
    """Pad or crop a label map to the grid of its scan.

    The grid of the labels must be that of the scan (see `check_same_grid`), or a part of it, or
    hold it, along each axis, by whole voxels. What lies outside the labels becomes background; what
    is cut must be background.

    Args:
        labels: label map on its own grid.
        volume: scan.
        first_voxel_mm: LPS position of the first voxel in the label file, where the file may have
            kept the affine of a larger grid: then a label map of another size whose first voxel is
            that of the scan is refused, because a crop along its header's axes and one that kept
            the wrong header cannot be distinguished. None for files that are cropped by design.
    Raises:
        Refused: `grid_mismatch`.
    """
    if labels.labels_ZYX.shape == volume.hu_ZYX.shape:
        check_same_grid(volume, labels)
        return replace(
            labels,
            spacing_mm=volume.spacing_mm,
            origin_mm=volume.origin_mm,
            directions=volume.directions,
        )
    check_same_directions(volume, labels)
    sizes = sizes_of(volume, labels)
    placed_83 = corners_in_scan(volume, labels)
    offset_XYZ = np.rint(placed_83[0])
    off = float(np.abs(placed_83 - offset_XYZ - box_corners(labels.labels_ZYX.shape)).max())
    if off > WHOLE_VOXEL_TO:
        raise Refused(
            "grid_mismatch",
            f"{sizes}, and their voxels lie up to {off:.2f} voxels apart; rule: "
            f"{WHOLE_VOXEL_TO:g} where the sizes differ",
        )
    if first_voxel_mm is not None and _is_first_voxel_of_scan(first_voxel_mm, labels, volume):
        raise Refused(
            "grid_mismatch",
            f"{sizes}, and both begin at the same voxel, so the labels may be a crop that kept the "
            "header of the whole; write the labels with the size of the scan",
        )
    start_ZYX = tuple(int(index) for index in offset_XYZ[::-1])
    return replace(
        labels,
        labels_ZYX=_moved(labels.labels_ZYX, start_ZYX, volume.hu_ZYX.shape, sizes),
        spacing_mm=volume.spacing_mm,
        origin_mm=volume.origin_mm,
        directions=volume.directions,
    )


def _is_first_voxel_of_scan(first_mm: np.ndarray, labels: LabelMap, volume: Volume) -> bool:
    """Whether the first voxel of the label file lies in the corner of the scan on the same side."""
    to_labels, to_scan = (np.linalg.inv(voxel_to_mm(grid)) for grid in (labels, volume))
    in_labels = to_labels[:3, :3] @ first_mm + to_labels[:3, 3]
    in_scan = to_scan[:3, :3] @ first_mm + to_scan[:3, 3]
    at_far_end = in_labels > 0.5 * (np.asarray(labels.labels_ZYX.shape[::-1]) - 1)
    corner = np.where(at_far_end, np.asarray(volume.hu_ZYX.shape[::-1]) - 1, 0)
    return bool((np.abs(in_scan - corner) < 0.5).all())


def _moved(
    labels_ZYX: np.ndarray, start_ZYX: tuple[int, ...], shape_ZYX: tuple[int, ...], sizes: str
) -> np.ndarray:
    """Labels in an array of the scan's shape, their first voxel at `start_ZYX`.

    Args:
        labels_ZYX: labels on their own grid.
        start_ZYX: index in the scan of their first voxel; negative where they begin before it.
        shape_ZYX: shape of the scan.
        sizes: both shapes, for the error line.
    """
    into, out_of = [], []
    for start, num, size in zip(start_ZYX, labels_ZYX.shape, shape_ZYX):
        is_part, is_whole = start >= 0 and start + num <= size, start <= 0 and start + num >= size
        if not (is_part or is_whole):
            raise Refused(
                "grid_mismatch",
                f"{sizes}, and along one axis the labels begin at voxel {start} of the scan, so "
                "neither holds the other",
            )
        into.append(slice(max(start, 0), min(start + num, size)))
        out_of.append(slice(max(-start, 0), max(-start, 0) + min(num, size)))
    kept_ZYX = labels_ZYX[tuple(out_of)]
    num_cut = _num_labelled(labels_ZYX) - _num_labelled(kept_ZYX)
    if num_cut:
        raise Refused(
            "grid_mismatch", f"{sizes}, and {num_cut} labelled voxels lie outside the scan"
        )
    moved_ZYX = np.zeros(shape_ZYX, dtype=labels_ZYX.dtype)
    moved_ZYX[tuple(into)] = kept_ZYX
    return moved_ZYX


def _num_labelled(labels_ZYX: np.ndarray) -> int:
    """Number of voxels that are neither background nor to be ignored."""
    return int(np.count_nonzero((labels_ZYX != 0) & (labels_ZYX != IGNORE_LABEL)))
