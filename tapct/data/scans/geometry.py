"""Orientation and grid of a scan: axial slices first, LPS, spacing in mm."""

from __future__ import annotations

import itertools
from typing import TypeAlias

import numpy as np

from tapct.base.geometry import times
from tapct.types import Directions, LabelMap, Refused, Volume

Spacing3: TypeAlias = tuple[float, float, float]  # mm along (z, y, x)
Point3: TypeAlias = tuple[float, float, float]  # LPS mm (x, y, z)

SPACING_RANGE_MM = (0.05, 50.0)
# |cosine| between two axes; rounding of headers stays below 1e-3, half a degree of tilt gives 9e-3
MAX_SHEAR = 5e-3
MAX_ANISOTROPY = 100.0  # largest spacing relative to the smallest; 0.15 mm pixels of 10 mm have 67
MAX_ORIGIN_MM = 10_000.0  # distance from the origin along each axis; a scanner's table has 2 m
MAX_EXTENT_MM = 2_500.0  # of a whole body with its table
MIN_EXTENT_MM = 5.0  # of each axis with many voxels, and of two axes in any case
_MANY_VOXELS = 16
MIN_ALIGNMENT = 0.75  # cosine of 41 degrees between a file axis and the LPS axis that it becomes
GRID_TOLERANCE = 0.25  # voxels that two grids may be apart at any corner
# largest difference of any component of two unit vectors that count as one direction (0.3 degrees)
SAME_DIRECTION = 5e-3


def to_lps(
    voxels_IJK: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, Spacing3, Point3, Directions]:
    """Permute and flip to the nearest LPS axes, z first.

    Args:
        voxels_IJK: voxels along the axes of the file.
        affine: 4x4 matrix, (i, j, k, 1) -> LPS mm.
    Returns:
        A view (Z, Y, X) of the voxels, spacing (z, y, x) in mm, position (x, y, z) of its first
        voxel in LPS mm, directions of its axes x, y and z.
    Raises:
        Refused: bad_affine, bad_spacing, sheared, oblique.
    """
    if not np.isfinite(affine).all():
        raise Refused("bad_affine", "the affine holds NaN or infinity")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing < SPACING_RANGE_MM[0]).any() or (spacing > SPACING_RANGE_MM[1]).any():
        raise Refused(
            "bad_spacing", f"spacing is {spacing.round(4).tolist()} mm; rule: {SPACING_RANGE_MM} mm"
        )
    direction = affine[:3, :3] / spacing
    shear = float(np.abs(direction.T @ direction - np.eye(3)).max())
    if shear > MAX_SHEAR:
        degrees = np.degrees(np.arcsin(min(1, shear)))
        raise Refused(
            "sheared",
            f"axes are {degrees:.1f} degrees off a right angle (gantry tilt?); resample the scan "
            "to an upright grid",
        )
    axes = _nearest_axes(direction)
    alignment = min(abs(direction[world, axes[world]]) for world in range(3))
    if alignment < MIN_ALIGNMENT:
        angle = np.degrees(np.arccos(alignment))
        raise Refused(
            "oblique",
            f"an axis is {angle:.0f} degrees off the body's; rule: at most 41; resample to axial "
            "slices",
        )
    origin, index = affine[:3, 3].copy(), [slice(None)] * 3
    columns: list[tuple[float, float, float]] = []
    for world, axis in enumerate(axes):
        sign = -1.0 if direction[world, axis] < 0 else 1.0
        dx, dy, dz = (float(cosine) for cosine in sign * direction[:, axis])
        columns.append((dx, dy, dz))
        if direction[world, axis] < 0:
            origin += affine[:3, axis] * (voxels_IJK.shape[axis] - 1)
            index[axis] = slice(None, None, -1)
    view_ZYX = voxels_IJK[tuple(index)].transpose(axes[::-1])
    x, y, z = axes
    spacing_mm = (float(spacing[z]), float(spacing[y]), float(spacing[x]))
    origin_mm = (float(origin[0]), float(origin[1]), float(origin[2]))
    return view_ZYX, spacing_mm, origin_mm, (columns[0], columns[1], columns[2])


def check_extent(shape: tuple[int, ...], affine: np.ndarray) -> None:
    """Refuse a grid that no scan of a body has. Label maps are not checked, since they may be cut
    to one small organ.

    Args:
        shape: number of voxels along I, J, K.
        affine: float64 4x4 matrix, (i, j, k, 1) -> LPS mm.
    Raises:
        Refused: absurd_geometry.
    """
    spacing, origin = np.linalg.norm(affine[:3, :3], axis=0), affine[:3, 3]
    text = f"spacing {spacing.round(4).tolist()} mm, {'x'.join(map(str, shape))} voxels"
    extent = spacing * np.asarray(shape)
    if spacing.max() > MAX_ANISOTROPY * spacing.min():
        raise Refused(
            "absurd_geometry", f"{text}; rule: spacings differ at most {MAX_ANISOTROPY:g} times"
        )
    if (np.abs(origin) > MAX_ORIGIN_MM).any():
        raise Refused(
            "absurd_geometry",
            f"the first voxel lies at {origin.round(1).tolist()} mm; rule: at most "
            f"{MAX_ORIGIN_MM:g} mm from the origin",
        )
    if (extent > MAX_EXTENT_MM).any():
        raise Refused(
            "absurd_geometry",
            f"{text} are {extent.max():.0f} mm long; rule: at most {MAX_EXTENT_MM:g} mm",
        )
    is_thin = extent < MIN_EXTENT_MM
    if is_thin.sum() > 1 or (is_thin & (np.asarray(shape) >= _MANY_VOXELS)).any():
        raise Refused(
            "absurd_geometry",
            f"{text} are {extent.round(1).tolist()} mm; rule: at least {MIN_EXTENT_MM:g} mm "
            f"along an axis of {_MANY_VOXELS} voxels or more, and along two axes",
        )


def _nearest_axes(direction: np.ndarray) -> tuple[int, int, int]:
    """The axis of the file that is nearest to each of the LPS axes x, y, z."""

    def alignment(axes: tuple[int, ...]) -> float:
        return float(np.prod([abs(direction[world, axes[world]]) for world in range(3)]))

    x, y, z = max(itertools.permutations(range(3)), key=alignment)
    return x, y, z


def voxel_to_mm(grid: Volume | LabelMap) -> np.ndarray:
    """4x4 matrix (x, y, z, 1) in voxels of a grid -> LPS mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.asarray(grid.directions).T * np.asarray(grid.spacing_mm[::-1])
    matrix[:3, 3] = grid.origin_mm
    return matrix


def check_same_directions(volume: Volume, labels: LabelMap) -> None:
    """Refuse labels whose axes point elsewhere than those of the scan.

    Raises:
        Refused: `grid_mismatch`.
    """
    cosines = np.sum(np.asarray(volume.directions) * np.asarray(labels.directions), axis=1)
    difference = np.abs(np.asarray(volume.directions) - np.asarray(labels.directions)).max()
    if difference > SAME_DIRECTION:
        angle = np.degrees(np.arccos(np.clip(cosines, -1, 1))).max()
        raise Refused(
            "grid_mismatch",
            f"labels are turned by {angle:.1f} degrees against the scan; rule: at most 0.3",
        )


def corners_in_scan(volume: Volume, labels: LabelMap) -> np.ndarray:
    """Where the corners of a label map lie in the scan: (8, 3) voxels along x, y, z.

    The corners are those of the box through the centres of the outermost voxels, in the order of
    `box_corners`.
    """
    corners_83 = box_corners(labels.labels_ZYX.shape)
    to_scan = np.linalg.inv(voxel_to_mm(volume)) @ voxel_to_mm(labels)
    placed: np.ndarray = corners_83 @ to_scan[:3, :3].T + to_scan[:3, 3]
    return placed


def box_corners(shape_ZYX: tuple[int, ...]) -> np.ndarray:
    """Indices (8, 3) along x, y, z of the outermost voxels of an array."""
    z, y, x = (size - 1 for size in shape_ZYX)
    return np.asarray(list(itertools.product((0, x), (0, y), (0, z))), dtype=np.float64)


def sizes_of(volume: Volume, labels: LabelMap) -> str:
    """Sizes of labels and scan, for the line of a refusal."""
    labelled, scanned = times(labels.labels_ZYX.shape), times(volume.hu_ZYX.shape)
    return f"labels are {labelled}, the scan is {scanned} voxels (z, y, x)"


def check_same_grid(volume: Volume, labels: LabelMap) -> None:
    """Refuse labels that do not lie on the scan's own voxels.

    The shapes must be equal, the directions equal to SAME_DIRECTION, and all eight corners at the
    same place to a quarter of a voxel. Only headers can be compared: a scan that was cropped but
    kept the affine of the whole scan passes.

    Args:
        volume: scan.
        labels: label map to compare with it.
    Raises:
        Refused: `grid_mismatch`.
    """
    if volume.hu_ZYX.shape != labels.labels_ZYX.shape:
        raise Refused("grid_mismatch", sizes_of(volume, labels))
    check_same_directions(volume, labels)
    off_83 = corners_in_scan(volume, labels) - box_corners(labels.labels_ZYX.shape)
    distance = float(np.abs(off_83).max())
    if distance > GRID_TOLERANCE:
        raise Refused(
            "grid_mismatch",
            f"labels lie up to {distance:.2f} voxels off the scan; rule: {GRID_TOLERANCE}",
        )
