"""The canvas on which the phantom is painted: a voxel grid in standard-body millimetres, boxes of
it, and smooth random fields.

Axes: Z Y X voxels of a box. Everything is evaluated inside boxes around an organ, in float32, so
that a scan costs a fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from tapct.data.phantom.patient import Patient, Study

Point3: TypeAlias = tuple[float, float, float]  # standard mm (x, y, z)
Along: TypeAlias = np.ndarray | np.floating | float  # one number, or one per slice (Z11)
WALL_POWER = 2.4  # exponent of the superellipses that are a torso's cross sections


@dataclass(frozen=True)
class Field:
    """White noise on a lattice in the patient's frame, interpolated by a cubic B-spline: zero mean,
    unit variance.

    Args:
        lattice_ZYX: float32 noise.
        start: position of the first lattice point.
        step: mm between lattice points (x, y, z), about the correlation length.
    """

    lattice_ZYX: np.ndarray
    start: Point3
    step: Point3


def make_field(patient: Patient, purpose: str, low: Point3, high: Point3, step: Point3) -> Field:
    """The field of one patient for one purpose, the same at every visit.

    Args:
        patient: whose field it is.
        purpose: name of the field.
        low, high: corners of the box that it covers.
        step: mm between lattice points (x, y, z).
    """
    counts = tuple(int(np.ceil((b - a) / s)) + 4 for a, b, s in zip(low, high, step, strict=True))
    lattice = patient.rng(purpose).standard_normal(counts[::-1], dtype=np.float32)
    start = (low[0] - step[0], low[1] - step[1], low[2] - step[2])
    return Field(lattice, start, step)


def _spline_matrix(at: np.ndarray, start: float, step: float, count: int) -> np.ndarray:
    """Cubic B-spline weights of positions (rows) on lattice points (columns), scaled so that white
    noise keeps unit variance on average.
    """
    t = (at.astype(np.float64) - start) / step
    base = np.floor(t).astype(np.int64)
    f = t - base
    taps = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
    matrix = np.zeros((len(at), count))
    rows = np.arange(len(at))
    for k, tap in enumerate(taps):
        np.add.at(matrix, (rows, np.clip(base - 1 + k, 0, count - 1)), tap / 6)
    # 151/315: mean over f of the sum of squared weights
    return (matrix / np.sqrt(151 / 315)).astype(np.float32)


@dataclass(frozen=True)
class Box:
    """A box of the canvas; arrays are views into it.

    Args:
        x_YX, y_YX: standard mm of every pixel, rotated with the patient.
        z_Z11: standard mm of every slice.
        hu_ZYX: float32 HU.
        label_ZYX: uint8 labels.
        wall_ZYX: irregularity of the body's layers, added in the superellipse test.
        px_YX, py_YX: |x| and |y| to the power WALL_POWER.
    """

    x_YX: np.ndarray
    y_YX: np.ndarray
    z_Z11: np.ndarray
    hu_ZYX: np.ndarray
    label_ZYX: np.ndarray
    wall_ZYX: np.ndarray
    px_YX: np.ndarray
    py_YX: np.ndarray

    def sample(self, field: Field) -> np.ndarray:
        """Interpolate a field at the voxels of this box: float32 ZYX."""
        cz, cy, cx = field.lattice_ZYX.shape
        mz = _spline_matrix(self.z_Z11[:, 0, 0], field.start[2], field.step[2], cz)
        my = _spline_matrix(
            self.y_YX[:, self.y_YX.shape[1] // 2], field.start[1], field.step[1], cy
        )
        mx = _spline_matrix(self.x_YX[self.x_YX.shape[0] // 2], field.start[0], field.step[0], cx)
        coarse = (mz @ field.lattice_ZYX.reshape(cz, cy * cx)).reshape(len(mz), cy, cx)
        rows = np.matmul(my, coarse)
        return (rows.reshape(-1, cx) @ mx.T).reshape(len(mz), len(my), len(mx))

    def ellipsoid(
        self, centre: Point3, radii: Point3, lean: tuple[float, float] = (0.0, 0.0)
    ) -> np.ndarray:
        """Squared distance from the centre relative to the radii, 1 on the surface.

        Args:
            centre: centre of the ellipsoid.
            radii: half-axes in mm (x, y, z).
            lean: shear of x and y along z, mm per mm.
        """
        dz = self.z_Z11 - np.float32(centre[2])
        if lean == (0.0, 0.0):
            plane = np.square((self.x_YX - centre[0]) / radii[0]) + np.square(
                (self.y_YX - centre[1]) / radii[1]
            )
            return plane.astype(np.float32) + np.square(dz / np.float32(radii[2]))
        return self.tube(
            centre[0] + lean[0] * dz, centre[1] + lean[1] * dz, radii[0], radii[1]
        ) + np.square(dz / np.float32(radii[2]))

    def tube(self, x: Along, y: Along, rx: Along, ry: Along) -> np.ndarray:
        """Squared distance from an axis along z relative to the radii, 1 on the surface.

        Args:
            x, y: position of the axis in every slice, standard mm.
            rx, ry: half-axes in every slice, mm.
        """
        out = np.square((self.x_YX - x) * (1.0 / np.asarray(rx, np.float32)))
        out += np.square((self.y_YX - y) * (1.0 / np.asarray(ry, np.float32)))
        return out

    def paint(
        self, mask: np.ndarray, hu: np.ndarray | np.floating | float, label: int | None = None
    ) -> None:
        """Write HU, and the label if one is given, where the mask is True."""
        np.copyto(self.hu_ZYX, hu, where=mask, casting="same_kind")
        if label is not None:
            np.copyto(self.label_ZYX, np.uint8(label), where=mask)

    def inside(self, a_Z: np.ndarray, b_Z: np.ndarray) -> np.ndarray:
        """Whether voxels lie inside a superellipse per slice: bool ZYX.

        Args:
            a_Z, b_Z: half-axes along x and y, standard mm.
        """
        q = self.px_YX * _power(a_Z) + self.py_YX * _power(b_Z)
        return q + self.wall_ZYX < 1


def _power(axis_Z: np.ndarray) -> np.ndarray:
    """Half-axes to the power -WALL_POWER, Z11."""
    return np.power(np.maximum(axis_Z, 1.0), -WALL_POWER).astype(np.float32).reshape(-1, 1, 1)


@dataclass(frozen=True)
class Canvas:
    """The whole scan as one box, and the boxes of it that hold a range of standard mm."""

    whole: Box
    patient: Patient
    study: Study

    def box(self, low: Point3, high: Point3) -> Box | None:
        """The part of the scan that holds a box of standard mm, or None where it lies outside the
        scan.

        Args:
            low, high: corners of the box.
        """
        study, whole = self.study, self.whole
        z = whole.z_Z11[:, 0, 0]
        keep = np.flatnonzero((z >= low[2]) & (z <= high[2]))
        corners = []
        for x in (low[0], high[0]):
            corners += [_to_pixels(x, y, self.patient, study) for y in (low[1], high[1])]
        columns, rows = np.array(corners).T
        x0, x1 = _clip_range(columns, study.shape[2])
        y0, y1 = _clip_range(rows, study.shape[1])
        if keep.size == 0 or x1 - x0 < 2 or y1 - y0 < 2:
            return None
        plane = (slice(y0, y1), slice(x0, x1))
        cube = (slice(int(keep[0]), int(keep[-1]) + 1), *plane)
        return Box(
            x_YX=whole.x_YX[plane],
            y_YX=whole.y_YX[plane],
            z_Z11=whole.z_Z11[cube[0]],
            hu_ZYX=whole.hu_ZYX[cube],
            label_ZYX=whole.label_ZYX[cube],
            wall_ZYX=whole.wall_ZYX[cube],
            px_YX=whole.px_YX[plane],
            py_YX=whole.py_YX[plane],
        )

    def field(self, purpose: str, low: Point3, high: Point3, step: float | Point3) -> Field:
        """A field of this patient, see `make_field`; one number as `step` counts for all axes."""
        steps = step if isinstance(step, tuple) else (step, step, step)
        return make_field(self.patient, purpose, low, high, steps)


def _clip_range(values: np.ndarray, size: int) -> tuple[int, int]:
    """First and last pixel + 1 that hold these positions with a margin, inside 0..size."""
    return max(0, int(np.floor(values.min())) - 1), min(size, int(np.ceil(values.max())) + 2)


def _to_pixels(x: float, y: float, patient: Patient, study: Study) -> tuple[float, float]:
    """Standard mm -> (column, row), the inverse of the maps in `blank_canvas`."""
    c, s = np.cos(study.turn), np.sin(study.turn)
    rx, ry = x * patient.scale[0], y * patient.scale[1]
    u, v = c * rx - s * ry + study.centre_mm[0], s * rx + c * ry + study.centre_mm[1]
    column = u / study.spacing_mm[2] + (study.shape[2] - 1) / 2
    row = v / study.spacing_mm[1] + (study.shape[1] - 1) / 2
    return column, row


def blank_canvas(patient: Patient, study: Study) -> Canvas:
    """Air everywhere, and the coordinates of every voxel."""
    depth, height, width = study.shape
    u = (np.arange(width) - (width - 1) / 2) * study.spacing_mm[2] - study.centre_mm[0]
    v = (np.arange(height) - (height - 1) / 2) * study.spacing_mm[1] - study.centre_mm[1]
    c, s = np.cos(study.turn), np.sin(study.turn)
    x = ((c * u[None, :] + s * v[:, None]) / patient.scale[0]).astype(np.float32)
    y = ((-s * u[None, :] + c * v[:, None]) / patient.scale[1]).astype(np.float32)
    heights_mm = study.bottom_z + np.arange(depth) * study.spacing_mm[0]
    box = Box(
        x_YX=x,
        y_YX=y,
        z_Z11=(heights_mm / patient.scale[2]).astype(np.float32).reshape(-1, 1, 1),
        hu_ZYX=np.full(study.shape, -1000.0, np.float32),
        label_ZYX=np.zeros(study.shape, np.uint8),
        wall_ZYX=np.empty((0,), np.float32),  # needs the coordinates of this box, see below
        px_YX=np.power(np.abs(x), np.float32(WALL_POWER)),
        py_YX=np.power(np.abs(y), np.float32(WALL_POWER)),
    )
    field = make_field(patient, "wall", (-240, -170, -260), (240, 170, 240), (55, 55, 70))
    wall_ZYX = box.sample(field) * np.float32(0.035)
    return Canvas(replace(box, wall_ZYX=wall_ZYX), patient, study)
