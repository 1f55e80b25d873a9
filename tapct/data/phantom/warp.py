"""A known smooth deformation between the two scans of a patient.

A follow-up can be painted in the pose of the first scan and then be moved by a map that is known at
every point: an affine map and a few smooth bumps, one of which is the breath. Textures, vessels and
organs then move together, so that the place of every point in the other scan is known.

Axes: Z Y X voxels. Positions are real mm in the patient's frame (x, y, z), see `frame.to_frame`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tapct.data.phantom.canvas import Canvas, blank_canvas
from tapct.data.phantom.patient import Patient, Study

BUMPS = 6
WIDTH_MM = 60.0  # standard deviation of a bump
BREATH_WIDTH_MM = 90.0
LATTICE = 17  # points per axis on which the reach of a deformation is measured
SLACK_MM = 6.0  # it may be larger between these points
MAX_MM = 12.0  # of the bumps: above, the sum of several could fold the body


@dataclass(frozen=True)
class Warp:
    """A map of points of the follow-up to the same points in the pose of the first scan:
    p + (matrix - 1) p + offset + the sum of the bumps at p.

    Args:
        matrix_33: affine part.
        offset_3: translation in mm.
        centres_K3: centres of the bumps in mm.
        widths_K: standard deviations of the bumps in mm.
        heights_K3: displacements in the centres in mm.
    """

    matrix_33: np.ndarray
    offset_3: np.ndarray
    centres_K3: np.ndarray
    widths_K: np.ndarray
    heights_K3: np.ndarray

    def first(self, points_N3: np.ndarray) -> np.ndarray:
        """Points of the follow-up in the pose of the first scan: (N, 3), float64."""
        points_N3 = np.asarray(points_N3, np.float64)
        moved_N3: np.ndarray = points_N3 @ self.matrix_33.T + self.offset_3
        for centre, width, height in zip(self.centres_K3, self.widths_K, self.heights_K3):
            distance_N = np.square(points_N3 - centre).sum(-1) / (2 * width**2)
            moved_N3 += np.exp(-distance_N)[:, None] * height
        return moved_N3

    def first_of_slice(self, z: float, y_Y: np.ndarray, x_X: np.ndarray) -> np.ndarray:
        """`first` for all points of a slice: (3, Y, X), float64, in the order x, y, z.

        A bump is a product of three functions of one coordinate, so that this needs no exponential
        function of every voxel.
        """
        m, offset = self.matrix_33, self.offset_3
        moved_3YX = np.empty((3, len(y_Y), len(x_X)))
        for axis in range(3):
            row_X = m[axis, 0] * x_X + (m[axis, 2] * z + offset[axis])
            np.add(row_X[None, :], (m[axis, 1] * y_Y)[:, None], out=moved_3YX[axis])
        for centre, width, height in zip(self.centres_K3, self.widths_K, self.heights_K3):
            x_part, y_part, z_part = (
                np.exp(-np.square(at - middle) / (2 * width**2))
                for at, middle in zip((x_X, y_Y, z), centre)
            )
            bump_YX = (y_part * z_part)[:, None] * x_part[None, :]
            for axis in range(3):
                moved_3YX[axis] += height[axis] * bump_YX
        return moved_3YX

    def followup(self, points_N3: np.ndarray) -> np.ndarray:
        """Points in the pose of the first scan, where the follow-up has them: the inverse of
        `first`, to 1e-6 mm.
        """
        wanted_N3 = np.asarray(points_N3, np.float64)
        points_N3 = wanted_N3.copy()
        for _ in range(200):  # a fixed point, since the displacement changes slowly
            error_N3 = self.first(points_N3) - wanted_N3
            points_N3 -= error_N3
            if np.abs(error_N3).max() < 1e-6:
                return points_N3
        raise AssertionError("the deformation of the phantom cannot be inverted")


def draw_warp(patient: Patient, first: Study, followup: Study, warp_mm: float) -> Warp:
    """The deformation between the two scans of a patient.

    Args:
        patient: body that is scanned.
        first, followup: both visits; their turn and breath are parts of the map.
        warp_mm: largest height of a bump.
    """
    rng = patient.rng("warp")
    size = np.array(patient.scale)
    turn = first.turn - followup.turn
    tilt_x, tilt_y = rng.normal(0, 0.015, 2)
    matrix = np.array([[1, -turn, tilt_y], [turn, 1, -tilt_x], [-tilt_y, tilt_x, 1]])
    u, _, v = np.linalg.svd(matrix)
    stretch = np.eye(3) + rng.normal(0, 0.006, (3, 3))
    centres = rng.uniform((-110, -80, -180), (110, 80, 160), (BUMPS, 3)) * size
    directions = rng.normal(0, 1, (BUMPS, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    heights = directions * rng.uniform(0.4, 1.0, (BUMPS, 1)) * warp_mm
    # a deeper breath moves the organs under the diaphragm down, so the same point lay higher before
    breath = np.array([0.0, 0.0, (followup.breath_mm - first.breath_mm) * size[2]])
    return Warp(
        stretch @ (u @ v),
        rng.normal(0, 2.0, 3),
        np.vstack([centres, np.array([0.0, -10.0, -20.0]) * size]),
        np.append(np.full(BUMPS, WIDTH_MM), BREATH_WIDTH_MM),
        np.vstack([heights, breath]),
    )


def grid_mm(study: Study) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of slices, rows and columns of a scan in the patient's frame, in mm."""
    depth, height, width = study.shape
    return (
        study.bottom_z + np.arange(depth) * study.spacing_mm[0],
        (np.arange(height) - (height - 1) / 2) * study.spacing_mm[1] - study.centre_mm[1],
        (np.arange(width) - (width - 1) / 2) * study.spacing_mm[2] - study.centre_mm[0],
    )


def in_first_pose(warp: Warp, first: Study, followup: Study) -> Study:
    """The follow-up as it is painted: in the pose of the first scan, and with a margin from which
    the deformation can take voxels.
    """
    axes = [np.linspace(axis[0], axis[-1], LATTICE) for axis in grid_mm(followup)[::-1]]
    points_N3 = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    reach_xyz = np.abs(warp.first(points_N3) - points_N3).max(0) + SLACK_MM
    margin = [int(np.ceil(mm / step)) for mm, step in zip(reach_xyz[::-1], followup.spacing_mm)]
    depth, height, width = (size + 2 * more for size, more in zip(followup.shape, margin))
    return replace(
        followup,
        shape=(depth, height, width),
        bottom_z=followup.bottom_z - margin[0] * followup.spacing_mm[0],
        turn=first.turn,
        breath_mm=first.breath_mm,
    )


def warped(
    painted: Canvas, marks_ZYX: np.ndarray, warp: Warp, followup: Study
) -> tuple[Canvas, np.ndarray]:
    """Move a painted body into its follow-up: HU by linear interpolation, labels by the nearest
    voxel.

    Args:
        painted: body in the pose of the first scan.
        marks_ZYX: marks of its voxels.
        warp: deformation.
        followup: grid of the follow-up.
    Returns:
        The canvas of the follow-up, and its marks.
    """
    canvas = blank_canvas(painted.patient, followup)
    marks = np.zeros(followup.shape, marks_ZYX.dtype)
    z, y, x = grid_mm(followup)
    starts = np.array([axis[0] for axis in grid_mm(painted.study)])
    highest = np.array(painted.study.shape) - 1.0
    for k in range(len(z)):
        moved_3YX = warp.first_of_slice(z[k], y, x)[::-1]  # z, y, x
        at = [
            # the margin holds all of it; without the limits, a rounding at its end would wrap
            np.clip((moved - start) / step, 0.0, last)
            for moved, start, step, last in zip(moved_3YX, starts, followup.spacing_mm, highest)
        ]
        nearest = tuple(np.rint(axis).astype(np.intp) for axis in at)
        canvas.whole.hu_ZYX[k] = _linear(painted.whole.hu_ZYX, at)
        canvas.whole.label_ZYX[k] = painted.whole.label_ZYX[nearest]
        marks[k] = marks_ZYX[nearest]
    return canvas, marks


def _linear(array_ZYX: np.ndarray, at: list[np.ndarray]) -> np.ndarray:
    """Trilinear interpolation.

    Args:
        array_ZYX: C-contiguous values, at least two along every axis.
        at: indices along z, y and x, inside the array.
    """
    low = [np.minimum(axis.astype(np.intp), size - 2) for axis, size in zip(at, array_ZYX.shape)]
    share = [(axis - below).astype(np.float32) for axis, below in zip(at, low)]
    _, height, width = array_ZYX.shape
    flat, first = array_ZYX.reshape(-1), (low[0] * height + low[1]) * width + low[2]

    def along_x(offset: int) -> np.ndarray:
        left, right = flat[first + offset], flat[first + (offset + 1)]
        return left + share[2] * (right - left)

    def along_y(offset: int) -> np.ndarray:
        front, back = along_x(offset), along_x(offset + width)
        return front + share[1] * (back - front)

    lower, upper = along_y(0), along_y(height * width)
    values: np.ndarray = lower + share[0] * (upper - lower)
    return values
