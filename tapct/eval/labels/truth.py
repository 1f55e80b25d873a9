"""Labels on the patch grid: which share of each patch is which label, and which patches a decoder
is trained on.

Axes: Z Y X voxels of the scan as read; N patches of the grid in (z, y, x) raster order; V label
    values; K kept patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tapct.base import rng
from tapct.eval.features.dense import PatchGrid
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.types import IGNORE_LABEL

OUTSIDE = -1  # label value that stands for the air around the patient
AIR_BELOW_HU = -900
_AXES = (0, 1, 2)


@dataclass(frozen=True)
class PatchTruth:
    """What the labels say about each patch of one scan.

    Args:
        scan: the scan and its labels.
        grid: of the patches.
        values: label values that occur, ascending; `OUTSIDE` where it was derived from HU. Voxels
            with IGNORE_LABEL do not count; a scan with no other voxels has the value 0.
        shares_NV: float32, share of each value among a patch's voxels that are labelled; rows sum
            to 1, or to 0 where no voxel is.
        in_play_Z: bool, True for the slices of the grid that the task may use; see `Task.truth`.
        labelled_N: bool, False for the patches whose voxels all have IGNORE_LABEL.
    """

    scan: LabelledScan
    grid: PatchGrid
    values: tuple[int, ...]
    shares_NV: np.ndarray
    in_play_Z: np.ndarray
    labelled_N: np.ndarray

    def open_N(self) -> np.ndarray:
        """Patches that the task may use and that somebody has labelled: bool (N,)."""
        in_play_N = np.repeat(self.in_play_Z, self.grid.shape[1] * self.grid.shape[2])
        open_N: np.ndarray = in_play_N & self.labelled_N
        return open_N

    def names(self) -> dict[int, str]:
        """Label value -> name, from the label file; may be empty."""
        return dict(self.scan.label_map.names)

    def sample(self, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Choose patches for training, stratified by their majority label, so that small organs are
        all kept.

        Args:
            num_tokens: most patches of this scan.
        Returns:
            int64 (K,) ascending patch indices; float32 (K,) how many patches each stands for.
        """
        majority_N = self.shares_NV.argmax(1)
        open_N = self.open_N()
        draw_N = rng.uniform(
            seed, "eval tokens", rng.purpose_id(self.scan.id), torch.arange(len(majority_N))
        ).numpy()
        strata = [np.flatnonzero(open_N & (majority_N == v)) for v in range(len(self.values))]
        strata = sorted((s for s in strata if len(s)), key=len)
        kept, weights, left = [], [], num_tokens
        for position, stratum in enumerate(strata):
            quota = max(1, left // (len(strata) - position))
            chosen = stratum[np.argsort(draw_N[stratum], kind="stable")[:quota]]
            kept.append(chosen)
            weights.append(np.full(len(chosen), len(stratum) / len(chosen), dtype=np.float32))
            left -= len(chosen)
        if not kept:  # every voxel of the scan is to be ignored
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        index_K, weight_K = np.concatenate(kept), np.concatenate(weights)
        order = np.argsort(index_K)
        return torch.from_numpy(index_K[order]), torch.from_numpy(weight_K[order])


def patch_truth(
    scan: LabelledScan, grid: PatchGrid, *, body_labelled: bool, in_play_Z: np.ndarray
) -> PatchTruth:
    """Count the scan's own label voxels in every patch.

    Args:
        body_labelled: True where label 0 already means the air outside, because the body has a
            label of its own; else air connected with the in-plane border becomes `OUTSIDE`.
        in_play_Z: as in `PatchTruth`.
    """
    labels_ZYX = scan.label_map.labels_ZYX
    values = np.flatnonzero(np.bincount(labels_ZYX.reshape(-1), minlength=1))
    values = values[values != IGNORE_LABEL]
    if not len(values):  # nobody has labelled any voxel, so no patch is labelled either
        values = np.zeros(1, dtype=np.int64)
    # voxels to ignore are counted in a column behind those of the values, which is then dropped
    column = np.full(IGNORE_LABEL + 1, len(values), dtype=np.uint16)
    column[values] = np.arange(len(values))
    counts_NV = _count(column[labels_ZYX], len(values) + 1, grid)[:, :-1]
    num_labelled_N = counts_NV.sum(1)
    labelled_N = num_labelled_N > 0
    shares_NV = (counts_NV / np.maximum(num_labelled_N, 1)[:, None]).astype(np.float32)
    known = tuple(int(v) for v in values)
    if body_labelled or 0 not in known:
        return PatchTruth(scan, grid, known, shares_NV, in_play_Z, labelled_N)
    is_air_ZYX = scan.volume.hu_ZYX < AIR_BELOW_HU
    air_N = _count((is_air_ZYX & (labels_ZYX == 0)).astype(np.uint16), 2, grid)[:, 1]
    air_share_N = (air_N / np.maximum(num_labelled_N, 1)).astype(np.float32)
    # air spreads through voxels that nobody has labelled, too
    may_spread_ZYX = is_air_ZYX & ((labels_ZYX == 0) | (labels_ZYX == IGNORE_LABEL))
    spread_N2 = _count(may_spread_ZYX.astype(np.uint16), 2, grid)
    spread_N = (spread_N2[:, 1] / spread_N2.sum(1)).astype(np.float32)
    outside_N = air_share_N * _reached_from_border(spread_N.reshape(grid.shape)).reshape(-1)
    shares_NV[:, 0] -= outside_N
    shares_NV = np.concatenate([outside_N[:, None], shares_NV.clip(0)], axis=1)
    return PatchTruth(scan, grid, (OUTSIDE, *known), shares_NV, in_play_Z, labelled_N)


def _count(columns_ZYX: np.ndarray, num_columns: int, grid: PatchGrid) -> np.ndarray:
    """How many label voxels of each column lie in each patch: int64 (N, columns).

    A voxel belongs to the patch that holds its centre. Where voxels are larger than a patch's own
    voxels, they are first split into equal parts, so that no patch is left empty.
    """
    split = [-(-r // o) for r, o in zip(grid.resized, grid.original, strict=True)]
    for axis in _AXES:
        if split[axis] > 1:
            columns_ZYX = columns_ZYX.repeat(split[axis], axis=axis)
    z, y, x = (grid.patch_of_voxel(axis, columns_ZYX.shape[axis]) for axis in _AXES)
    num_y, num_x = grid.shape[1:]
    in_plane = (y[:, None] * num_x + x[None, :]) * num_columns
    counts = np.zeros((grid.shape[0], num_y * num_x * num_columns), dtype=np.int64)
    for slice_YX, row in zip(columns_ZYX, z, strict=True):
        counts[row] += np.bincount((in_plane + slice_YX).reshape(-1), minlength=counts.shape[1])
    return counts.reshape(-1, num_columns)


def _reached_from_border(air_ZYX: np.ndarray) -> np.ndarray:
    """Patches that touch the air around the patient, slice by slice: bool, same shape as the air
    shares given.

    Air spreads from the in-plane border through patches that are mostly air; z is left out, since
    lungs that are cut by the end of the scan are not outside. The last step takes in the patches
    along the skin.
    """
    open_ZYX = torch.from_numpy(air_ZYX > 0.5).float()
    reached = torch.zeros_like(open_ZYX)
    reached[:, [0, -1], :] = open_ZYX[:, [0, -1], :]
    reached[:, :, [0, -1]] = open_ZYX[:, :, [0, -1]]
    while True:
        spread = F.max_pool2d(reached[:, None], 3, stride=1, padding=1)[:, 0]
        grown = spread * open_ZYX
        if torch.equal(grown, reached):
            return (spread > 0).numpy()
        reached = grown
