"""Places in two scans whose patch features are most alike, with positions between patch centres.

Between patch centres, features are interpolated linearly. A place is the position at which the
interpolated feature of one scan has the largest cosine similarity to a feature of the other scan.

Axes: N kept patches of a scan, P points, K places per point, D channels, C candidate positions,
Z Y X patches of the grid; a last axis of 3 is (z, y, x).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tapct.eval.features.dense import PatchGrid

_CHUNK_BYTES = 64 << 20  # of the largest temporary
_SHRINK = 0.6  # of the step between patch centres; what is left to go is 1.5 times the last step
_FINE_STEPS = 20  # the last step is 3e-5 patches
_COARSE_STEPS = 11  # 0.003 patches are enough where a map is fitted to many places
_LEAST_INNER = 12  # correspondences; three times as many as an affine map needs
_EPS = 1e-12


@dataclass(frozen=True)
class PatchFrame:
    """Where the patches of a scan that may be matched lie.

    Positions in mm are measured from the centre of the scan's first voxel along its axes. Positions
    in patches are 0 at the centre of the first patch of the grid.

    Args:
        grid: patch grid of the features.
        spacing_mm: mm of the scan's voxels along (z, y, x).
        kept_N: int64, ascending raster numbers of the patches that may be matched, at least one.
    """

    grid: PatchGrid
    spacing_mm: tuple[float, float, float]
    kept_N: np.ndarray

    @functools.cached_property
    def index_N3(self) -> np.ndarray:
        """Number of each kept patch along (z, y, x): int64."""
        return np.stack(np.unravel_index(self.kept_N, self.grid.shape), axis=1)

    @functools.cached_property
    def slot_ZYX(self) -> np.ndarray:
        """Row of each patch among the kept ones, -1 for the others; int64, with a margin of one
        patch on all sides.
        """
        slots = np.full([size + 2 for size in self.grid.shape], -1, dtype=np.int64)
        slots[tuple((self.index_N3 + 1).T)] = np.arange(len(self.kept_N))
        return slots

    @functools.cached_property
    def centre_N3(self) -> np.ndarray:
        """Centre of each kept patch in mm: float64."""
        return self.to_mm(self.index_N3)

    def to_mm(self, at_P3: np.ndarray) -> np.ndarray:
        """Positions in patches -> positions in mm."""
        first, step = self._first_and_step()
        moved: np.ndarray = first + np.asarray(at_P3, np.float64) * step
        return moved

    def to_patches(self, mm_P3: np.ndarray) -> np.ndarray:
        """Positions in mm -> positions in patches."""
        first, step = self._first_and_step()
        moved: np.ndarray = (np.asarray(mm_P3, np.float64) - first) / step
        return moved

    def _first_and_step(self) -> tuple[np.ndarray, np.ndarray]:
        first = np.array(self.grid.centre_mm((0, 0, 0), self.spacing_mm))
        return first, np.array(self.grid.spacing_mm(self.spacing_mm))


@dataclass(frozen=True)
class ScanFeatures:
    """The features of the kept patches of one scan, of one model and block.

    Args:
        frame: where the patches lie.
        rows_ND: float16 on the CPU; one factor for the whole scan brings all values into the range.
        device: device on which similarities are computed.
    """

    frame: PatchFrame
    rows_ND: Tensor
    device: torch.device

    @classmethod
    def of(cls, features_DZYX: Tensor, frame: PatchFrame) -> ScanFeatures:
        """Keep what matching needs of the features of a scan."""
        kept_N = torch.from_numpy(frame.kept_N).to(features_DZYX.device)
        rows_ND = features_DZYX.flatten(1)[:, kept_N].T.float()
        # a cosine does not depend on the factor, and float16 ends at 65504
        rows_ND = rows_ND / rows_ND.abs().max().clamp_min(_EPS)
        return cls(frame, rows_ND.half().cpu(), features_DZYX.device)

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of the features."""
        return self.rows_ND.numel() * self.rows_ND.element_size()

    def unit_ND(self) -> Tensor:
        """All rows with length 1: float32 on the device."""
        return _unit(self.rows_ND.to(self.device).float())

    def at(self, mm_P3: np.ndarray) -> Tensor:
        """Linearly interpolated features: float64 (P, D).

        Patches that are not kept have no weight; where none of the neighbours is kept, the feature
        of the nearest kept patch is taken.
        """
        highest = np.array(self.frame.grid.shape) - 1
        at_P3 = self.frame.to_patches(mm_P3).clip(0, highest)
        low_P3 = np.minimum(np.floor(at_P3), np.maximum(highest - 1, 0)).astype(np.int64)
        share_P3 = at_P3 - low_P3
        total_PD = torch.zeros(len(at_P3), self.rows_ND.shape[1], dtype=torch.float64)
        weight_P = np.zeros(len(at_P3))
        for corner in np.ndindex(2, 2, 2):
            slot_P = self.frame.slot_ZYX[tuple((low_P3 + corner + 1).T)]
            part_P = np.where(np.array(corner), share_P3, 1 - share_P3).prod(1) * (slot_P >= 0)
            total_PD += torch.from_numpy(part_P)[:, None] * self.rows_ND[slot_P].double()
            weight_P += part_P
        lonely_P = weight_P <= 0
        if lonely_P.any():
            nearest = [
                int(np.square(self.frame.centre_N3 - mm).sum(1).argmin())
                for mm in np.asarray(mm_P3)[lonely_P]
            ]
            total_PD[torch.from_numpy(lonely_P)] = self.rows_ND[nearest].double()
            weight_P[lonely_P] = 1
        return total_PD / torch.from_numpy(weight_P)[:, None]


@dataclass(frozen=True)
class Places:
    """Places in a scan that were found for some points, the best first.

    Args:
        mm_PK3: positions in mm, float64; NaN where there is no further place.
        similarity_PK: cosine similarity to the feature of the point, float64; NaN likewise.
    """

    mm_PK3: np.ndarray
    similarity_PK: np.ndarray


def similarity_PN(query_PD: Tensor, target: ScanFeatures) -> Tensor:
    """Cosine similarity of each query to each kept patch: float32 (P, N) on the target's device."""
    return _unit(query_PD.to(target.device).float()) @ target.unit_ND().T


def find_places(
    query_PD: Tensor, target: ScanFeatures, *, num: int, apart_mm: float
) -> tuple[Places, Tensor]:
    """The places in a scan that are most similar to some features.

    The patch of the largest similarity is the first place. Patches within `apart_mm` of its centre
    belong to it; the best of the others is the second place, and so on. Each place is then refined
    between patch centres.

    Args:
        query_PD: features to look for.
        target: scan to look in.
        num: number of places of each point.
        apart_mm: least distance of the patches of two places.
    Returns:
        The places, and the similarity of all kept patches: float32 (P, N).
    """
    similarity = similarity_PN(query_PD, target)
    left_PN = similarity.clone()
    centre_N3 = torch.from_numpy(target.frame.centre_N3).to(left_PN)
    slot_PK = np.full((len(query_PD), num), -1)
    for k in range(num):
        best_P = left_PN.max(dim=1)
        found_P = torch.isfinite(best_P.values).cpu().numpy()
        if not found_P.any():
            break
        slot_PK[found_P, k] = best_P.indices.cpu().numpy()[found_P]
        distance_PN = torch.cdist(centre_N3[best_P.indices], centre_N3)
        left_PN[distance_PN <= apart_mm] = -torch.inf
    found_PK = slot_PK >= 0
    mm_PK3, value_PK = np.full((*slot_PK.shape, 3), np.nan), np.full(slot_PK.shape, np.nan)
    point = torch.from_numpy(np.nonzero(found_PK)[0])
    at_P3, value_PK[found_PK] = refined(query_PD[point], target, slot_PK[found_PK])
    mm_PK3[found_PK] = target.frame.to_mm(at_P3)
    return Places(mm_PK3, value_PK), similarity


def refined(
    query_PD: Tensor, target: ScanFeatures, slot_P: np.ndarray, steps: int = _FINE_STEPS
) -> tuple[np.ndarray, np.ndarray]:
    """Move each place from a patch centre to the position, at most one patch away, where the
    interpolated feature is most similar to the query.

    The similarity at a position needs only the products of the 27 features around the patch, so
    that many positions are tried: the best of 27 neighbours is taken again and again, with steps
    that shrink from 1/2 patch. Positions that need a patch which is not kept are not tried.

    Args:
        query_PD: features to look for.
        target: scan to look in.
        slot_P: row of the patch, among the kept ones, to start from.
        steps: number of steps.
    Returns:
        Positions in patches (P, 3) and their cosine similarities (P,), both float64.
    """
    at_P3, value_P = np.empty((len(slot_P), 3)), np.empty(len(slot_P))
    chunk = max(1, _CHUNK_BYTES // (27 * 8 * max(target.rows_ND.shape[1], 27)))
    for first in range(0, len(slot_P), chunk):
        part = slice(first, first + chunk)
        query = _unit(query_PD[part].cpu().double())
        at_P3[part], value_P[part] = _refined(query, target, slot_P[part], steps)
    return at_P3, value_P


def _refined(
    query_PD: Tensor, target: ScanFeatures, slot_P: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """`refined` for a few points at once; queries have length 1."""
    index_P3 = target.frame.index_N3[slot_P]
    around_C3 = np.array(list(np.ndindex(3, 3, 3)))
    near_PC = target.frame.slot_ZYX[tuple((index_P3[:, None] + around_C3).transpose(2, 0, 1))]
    is_missing_PC = torch.from_numpy(near_PC < 0)
    rows_PCD = target.rows_ND[np.maximum(near_PC, 0)].double()
    dot_PC = torch.einsum("pcd,pd->pc", rows_PCD, query_PD)
    products_PCC = rows_PCD @ rows_PCD.transpose(1, 2)
    offset_P3 = torch.zeros(len(slot_P), 3, dtype=torch.float64)
    # the position itself comes first, so that it stays where nothing around it is better
    order = sorted((tuple(row) for row in around_C3 - 1), key=lambda row: row != (0, 0, 0))
    moves_C3 = torch.tensor(order, dtype=torch.float64)
    value_P = torch.zeros(len(slot_P), dtype=torch.float64)
    for number in range(steps):
        step_C3 = 0.5 * _SHRINK**number * moves_C3
        tried_PC3 = (offset_P3[:, None] + step_C3).clamp(-1, 1)
        weight_PCC = _hat_weights(tried_PC3)
        length_PC = ((weight_PCC @ products_PCC) * weight_PCC).sum(2).clamp_min(0).sqrt()
        value_PC = (weight_PCC @ dot_PC[..., None])[..., 0] / length_PC.clamp_min(_EPS)
        needs_missing_PC = (weight_PCC * is_missing_PC[:, None]).sum(2) > 0
        value_P, best_P = value_PC.masked_fill(needs_missing_PC, -torch.inf).max(1)
        offset_P3 = tried_PC3[torch.arange(len(slot_P)), best_P]
    return index_P3 + offset_P3.numpy(), value_P.numpy()


def _hat_weights(at_PC3: Tensor) -> Tensor:
    """Weights of linear interpolation between 27 patches: (P, C, 27) for positions in -1..1."""
    # 1 - |position - centre| for the centres -1, 0 and 1, not below 0
    below, above = at_PC3.clamp(max=0), at_PC3.clamp(min=0)
    z, y, x = torch.stack([-below, 1 + below - above, above], dim=-1).unbind(2)
    plane = (y[..., :, None] * x[..., None, :]).flatten(2)
    return (z[..., :, None] * plane[..., None, :]).flatten(2)


@dataclass(frozen=True)
class Correspondences:
    """Pairs of points in two scans that have alike features.

    Args:
        fixed_P3: positions in the first scan in mm, float64: centres of patches.
        moving_P3: positions in the second scan in mm, float64: between centres of patches.
    """

    fixed_P3: np.ndarray
    moving_P3: np.ndarray


def mutual_correspondences(
    fixed: ScanFeatures, moving: ScanFeatures, chosen_P: np.ndarray, *, cycle_patches: int
) -> Correspondences:
    """Patches whose nearest feature in the other scan leads back to them.

    Args:
        fixed: first scan.
        moving: second scan.
        chosen_P: rows of the patches of the first scan for which a partner is looked for.
        cycle_patches: largest distance, in patches along each axis, between a patch and the one
            that its nearest feature in the other scan leads back to.
    """
    unit_fixed, unit_moving = fixed.unit_ND(), moving.unit_ND()
    chosen = chosen_P.astype(np.int64)
    kept: list[np.ndarray] = []
    partner: list[np.ndarray] = []
    num_most = max(len(unit_fixed), len(unit_moving))
    chunk = max(1, _CHUNK_BYTES // (4 * num_most))
    for first in range(0, len(chosen), chunk):
        start = chosen[first : first + chunk]
        there = (unit_fixed[start] @ unit_moving.T).argmax(1)
        back = (unit_moving[there] @ unit_fixed.T).argmax(1).cpu().numpy()
        moved = np.abs(fixed.frame.index_N3[back] - fixed.frame.index_N3[start]).max(1)
        kept.append(start[moved <= cycle_patches])
        partner.append(there.cpu().numpy()[moved <= cycle_patches])
    kept_P, partner_P = np.concatenate(kept), np.concatenate(partner)
    at_P3, _ = refined(fixed.rows_ND[kept_P], moving, partner_P, _COARSE_STEPS)
    inner_P = ~_is_held_by_border(at_P3, moving.frame, partner_P)
    if inner_P.sum() < _LEAST_INNER:  # a scan of one or two patch slices is all border
        inner_P[:] = True
    return Correspondences(
        fixed.frame.centre_N3[kept_P[inner_P]], moving.frame.to_mm(at_P3[inner_P])
    )


def _is_held_by_border(at_P3: np.ndarray, frame: PatchFrame, slot_P: np.ndarray) -> np.ndarray:
    """Places on the border of the kept patches: the true one may lie beyond it. bool (P,)."""
    index_P3 = frame.index_N3[slot_P]
    held_P = np.zeros(len(slot_P), dtype=bool)
    for axis in range(3):
        for side in (-1, 1):
            beside_P3 = index_P3.copy()
            beside_P3[:, axis] += side
            is_missing_P = frame.slot_ZYX[tuple((beside_P3 + 1).T)] < 0
            held_P |= is_missing_P & (at_P3[:, axis] == index_P3[:, axis])
    return held_P


def _unit(rows_ND: Tensor) -> Tensor:
    return rows_ND / rows_ND.norm(dim=1, keepdim=True).clamp_min(_EPS)
