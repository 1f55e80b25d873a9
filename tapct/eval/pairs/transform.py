"""Maps from one scan to another: a robust affine map from correspondences, and a smooth field of
what it leaves over.

Axes: P points, K correspondences, H hypotheses, S correspondences of one hypothesis; a last axis of
3 is (z, y, x) in mm from the centre of a scan's first voxel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NUM_HYPOTHESES = 500  # of either kind
SAMPLE = 4  # correspondences that determine an affine map
LARGEST_STRETCH = 2.0  # a body is not mirrored, and no direction is more than doubled or halved
DAMPING = 1.0  # far from all correspondences the field is 0; near one, it has half of its weight
_RIDGE = 1e-6  # mm^2: decides directions in which all correspondences agree, moves nothing else
_TUKEY = 4.685  # 95 % efficiency under normal errors
_LEAST_LIMIT_MM = 1e-6
_MOST_ROUNDS = 50
_CHUNK_VALUES = 4 << 20


@dataclass(frozen=True)
class Affine:
    """The map p -> matrix p + offset.

    Args:
        matrix_33: matrix.
        offset_3: translation in mm.
    """

    matrix_33: np.ndarray
    offset_3: np.ndarray

    def __call__(self, points_P3: np.ndarray) -> np.ndarray:
        """Mapped points (P, 3)."""
        mapped: np.ndarray = np.asarray(points_P3) @ self.matrix_33.T + self.offset_3
        return mapped


@dataclass(frozen=True)
class Transform:
    """An affine map, plus a smooth field that is the mean of residuals under a Gaussian kernel.

    At a point, the field is sum(w k r) / (DAMPING + sum(w k)) over the correspondences, with weight
    w, residual r and kernel k = exp(-distance^2 / (2 width^2)).

    Args:
        affine: affine map.
        at_K3: points of the correspondences in the fixed scan.
        residual_K3: what the affine map leaves over there, in mm.
        weight_K: weights in 0..1.
        width_mm: standard deviation of the kernel; 0: no field.
    """

    affine: Affine
    at_K3: np.ndarray
    residual_K3: np.ndarray
    weight_K: np.ndarray
    width_mm: float

    def __call__(self, points_P3: np.ndarray) -> np.ndarray:
        """Points of the fixed scan in the moving scan, (P, 3)."""
        points_P3 = np.asarray(points_P3, np.float64)
        mapped: np.ndarray = self.affine(points_P3) + self.field(points_P3)
        return mapped

    def field(self, points_P3: np.ndarray) -> np.ndarray:
        """The smooth field at some points: (P, 3) in mm."""
        out = np.zeros_like(points_P3)
        if not self.width_mm or not len(self.at_K3):
            return out
        chunk = max(1, _CHUNK_VALUES // len(self.at_K3))
        for first in range(0, len(points_P3), chunk):
            part = points_P3[first : first + chunk]
            squared = _squared_distances(part, self.at_K3)
            kernel = np.exp(-squared / (2 * self.width_mm**2)) * self.weight_K
            total = DAMPING + kernel.sum(1, keepdims=True)
            out[first : first + chunk] = kernel @ self.residual_K3 / total
        return out

    def without_field(self) -> Transform:
        """The affine map alone."""
        return Transform(self.affine, self.at_K3, self.residual_K3, self.weight_K, 0.0)

    def on_lattice(
        self, shape: Sequence[int], spacing_mm: Sequence[float]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The map at all points of a lattice, one slice at a time.

        The field is computed at nodes that lie half a kernel width apart, and interpolated linearly
        between them.

        Args:
            shape: number of points along (z, y, x); the first one is at 0 mm.
            spacing_mm: their distance.
        Yields:
            Slice number, and the points of the slice in the moving scan: float64 (3, Y, X), the
            first axis is (z, y, x).
        """
        axes = [np.arange(size) * mm for size, mm in zip(shape, spacing_mm, strict=True)]
        nodes = [_nodes(axis[-1], self.width_mm / 2) for axis in axes]
        grid = np.stack(np.meshgrid(*nodes, indexing="ij"), -1)
        field_3ZYX = np.moveaxis(self.field(grid.reshape(-1, 3)).reshape(grid.shape), -1, 0)
        along_z, along_y, along_x = (
            _interpolation(axis, node) for axis, node in zip(axes, nodes, strict=True)
        )
        # Plain form: self.affine of every point. An affine map is a sum of one term per axis, so
        # the terms of y and x are computed once for all slices.
        _, y, x = axes
        by_z, by_y, by_x = self.affine.matrix_33.T[:, :, None, None]
        plane_3YX = by_y * y[:, None] + by_x * x + self.affine.offset_3[:, None, None]
        for number, z in enumerate(axes[0]):
            moved_3YX = plane_3YX + by_z * z
            if self.width_mm:
                between_3YX = np.tensordot(field_3ZYX, along_z[number], axes=(1, 0))
                moved_3YX += along_y @ between_3YX @ along_x.T
            yield number, moved_3YX


def translation(offset_3: np.ndarray) -> Transform:
    """A map that moves all points by one vector."""
    none = np.zeros((0, 3))
    return Transform(Affine(np.eye(3), np.asarray(offset_3, float)), none, none, np.zeros(0), 0.0)


def fit_transform(
    fixed_K3: np.ndarray, moving_K3: np.ndarray, *, inlier_mm: float, width_mm: float, seed: int
) -> Transform | None:
    """Fit a robust affine map to correspondences, and a smooth field to its residuals.

    Many hypotheses, from one correspondence (a translation) or from four, are compared by the sum
    of their squared residuals, each cut at `inlier_mm`. The best one starts iteratively reweighted
    least squares with Tukey's biweight. It ignores residuals above `inlier_mm`, and above 4.685
    standard deviations where that is less; the standard deviation is estimated from the median.

    Args:
        fixed_K3: points in the fixed scan.
        moving_K3: the same points in the moving scan; some may be wrong.
        inlier_mm: residual above which a correspondence counts as wrong.
        width_mm: standard deviation of the field's kernel; 0: no field.
        seed: random seed of the hypotheses.
    Returns:
        The map; None where fewer than four correspondences agree.
    """
    if len(fixed_K3) < SAMPLE:
        return None
    matrix, offset = _best_hypothesis(fixed_K3, moving_K3, inlier_mm, seed)
    affine = Affine(matrix, offset)
    weight_K = _biweight(moving_K3 - affine(fixed_K3), inlier_mm)
    for _ in range(_MOST_ROUNDS):
        if np.count_nonzero(weight_K) < SAMPLE:
            return None
        matrices, offsets = _least_squares(fixed_K3[None], moving_K3[None], weight_K[None])
        if not _is_plausible(matrices)[0]:
            break
        affine = Affine(matrices[0], offsets[0])
        residual_K3 = moving_K3 - affine(fixed_K3)
        new_K = _biweight(residual_K3, _limit_mm(residual_K3, weight_K > 0, inlier_mm))
        is_steady = np.abs(new_K - weight_K).max() < 1e-9
        weight_K = new_K
        if is_steady:
            break
    residual_K3 = moving_K3 - affine(fixed_K3)
    weight_K = _biweight(residual_K3, inlier_mm)
    used = weight_K > 0
    if np.count_nonzero(used) < SAMPLE:
        return None
    return Transform(affine, fixed_K3[used], residual_K3[used], weight_K[used], width_mm)


def _best_hypothesis(
    fixed_K3: np.ndarray, moving_K3: np.ndarray, inlier_mm: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and offset with the smallest sum of cut squared residuals."""
    rng = np.random.default_rng(seed)
    sample_HS = rng.integers(0, len(fixed_K3), (NUM_HYPOTHESES, SAMPLE))
    matrices, offsets = _least_squares(
        fixed_K3[sample_HS], moving_K3[sample_HS], np.ones(sample_HS.shape)
    )
    plausible = _is_plausible(matrices)
    single_H = rng.integers(0, len(fixed_K3), NUM_HYPOTHESES)
    shifts = moving_K3[single_H] - fixed_K3[single_H]
    matrices = np.concatenate([matrices[plausible], np.tile(np.eye(3), (NUM_HYPOTHESES, 1, 1))])
    offsets = np.concatenate([offsets[plausible], shifts])
    chunk = max(1, _CHUNK_VALUES // (3 * len(fixed_K3)))
    costs = []
    for first in range(0, len(matrices), chunk):
        part = slice(first, first + chunk)
        mapped_H3K = matrices[part] @ fixed_K3.T + offsets[part, :, None]
        squared = np.square(mapped_H3K - moving_K3.T).sum(1)
        costs.append(np.minimum(squared, inlier_mm**2).sum(1))
    best = int(np.concatenate(costs).argmin())
    return matrices[best], offsets[best]


def _least_squares(
    fixed_HS3: np.ndarray, moving_HS3: np.ndarray, weight_HS: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares for the matrices (H, 3, 3) and offsets (H, 3) of affine maps.

    A tiny penalty on the distance of a matrix from the identity decides directions that the
    points do not determine, e.g. across a plane in which all of them lie.
    """
    total_H11 = weight_HS.sum(1)[:, None, None]
    weight_HS1 = weight_HS[..., None]
    mean_fixed = (weight_HS1 * fixed_HS3).sum(1, keepdims=True) / total_H11
    mean_moving = (weight_HS1 * moving_HS3).sum(1, keepdims=True) / total_H11
    from_mean = fixed_HS3 - mean_fixed
    change = (moving_HS3 - mean_moving) - from_mean
    square = np.einsum("hs,hsi,hsj->hij", weight_HS, from_mean, from_mean)
    square += _RIDGE * total_H11 * np.eye(3)
    cross = np.einsum("hs,hsi,hsj->hij", weight_HS, from_mean, change)
    matrices = np.eye(3) + np.linalg.solve(square, cross).transpose(0, 2, 1)
    offsets = mean_moving[:, 0] - np.einsum("hij,hj->hi", matrices, mean_fixed[:, 0])
    return matrices, offsets


def _is_plausible(matrices_H33: np.ndarray) -> np.ndarray:
    """Matrices that neither mirror nor stretch or shrink a direction too much: bool (H,)."""
    stretch = np.linalg.svd(matrices_H33, compute_uv=False)
    within: np.ndarray = (stretch[:, 0] <= LARGEST_STRETCH) & (stretch[:, 2] >= 1 / LARGEST_STRETCH)
    return within & (np.linalg.det(matrices_H33) > 0)


def _biweight(residual_K3: np.ndarray, limit_mm: float) -> np.ndarray:
    """Tukey's weights (1 - (r / limit)^2)^2, 0 beyond the limit."""
    share = np.square(residual_K3).sum(1) / limit_mm**2
    weight: np.ndarray = np.square(np.clip(1 - share, 0, None))
    return weight


def _limit_mm(residual_K3: np.ndarray, used_K: np.ndarray, inlier_mm: float) -> float:
    """Residual from which on a correspondence has no weight."""
    median = float(np.median(np.linalg.norm(residual_K3[used_K], axis=1)))
    # the median length of a normal vector in three dimensions is 1.538 standard deviations
    return min(inlier_mm, max(_LEAST_LIMIT_MM, _TUKEY * median / 1.538))


def _squared_distances(points_P3: np.ndarray, at_K3: np.ndarray) -> np.ndarray:
    """(P, K); differences first, since a difference of squares would lose digits."""
    squared = np.zeros((len(points_P3), len(at_K3)))
    for axis in range(3):
        squared += np.square(points_P3[:, axis, None] - at_K3[None, :, axis])
    return squared


def _nodes(end_mm: float, step_mm: float) -> np.ndarray:
    """Positions from 0 to the end, at most a step apart."""
    num = 2 if step_mm <= 0 else max(2, int(np.ceil(end_mm / step_mm)) + 1)
    return np.linspace(0, max(end_mm, 1e-6), num)


def _interpolation(at_mm: np.ndarray, nodes_mm: np.ndarray) -> np.ndarray:
    """Matrix of linear interpolation from nodes to positions between them."""
    step = nodes_mm[1] - nodes_mm[0]
    return np.clip(1 - np.abs(at_mm[:, None] - nodes_mm) / step, 0, None)
