"""Where the crops lie: boxes drawn on the device, by key, with a share of body in each.

Axes: B batch, V views of one kind, C candidate places, Z Y X depth height width in voxels of the
slab; 3 is (z, y, x). A box is a half-open interval [start, start + length) per axis, in voxels,
where voxel k covers [k, k + 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tapct.base import rng
from tapct.types import HUContract

Kind = Literal["global", "local"]

CELL = (
    4,
    8,
    8,
)  # voxels of one cell of the body map; a cell is judged by 16 voxels of its first slice
BODY_ABOVE_AIR_HU = (
    48.0  # a cell whose mean lies higher than this above clipped air is body: lung (about -850) is
)


@dataclass(frozen=True)
class Rule:
    """How the crops of one kind are drawn; fields as in `recipe.Config`.

    Args:
        window: size of the finished view (z, y, x).
        area: share of the scan's in-plane area, uniform between the two.
        aspect: height / width in voxels, log-uniform between the two.
        z_zoom: slices of the scan per slice of the view, log-uniform between the two; (1, 1) cuts
            whole slices.
        body_share_min: share of body that a crop should hold.
        candidates: how many places are tried for it.
        flip_p: chance of a flip along (z, y, x).
    """

    window: tuple[int, int, int]
    area: tuple[float, float]
    aspect: tuple[float, float]
    z_zoom: tuple[float, float]
    body_share_min: float
    candidates: int
    flip_p: tuple[float, float, float]


@dataclass(frozen=True)
class Boxes:
    """The drawn crops of one kind.

    Args:
        start_VB3: float32, first edge of the box in voxels of the slab.
        length_VB3: float32, edge length in voxels, > 0.
        flip_VB3: bool, the view is mirrored along this axis.
        body_share_VB: float32 in [0, 1], share of body inside the box.
    """

    start_VB3: Tensor
    length_VB3: Tensor
    flip_VB3: Tensor
    body_share_VB: Tensor


def body_cells(hu_BZYX: Tensor, contract: HUContract) -> Tensor:
    """A coarse map of what is body (or table), lungs included, and what is air.

    Args:
        hu_BZYX: int16 HU.
        contract: its lower clip is what air is.
    Returns:
        float32 0 or 1 per `CELL`, the far cells filled up with air.
    """
    sampled = hu_BZYX[
        :, :: CELL[0], ::2, ::2
    ]  # a sixteenth of the voxels: 16 per cell make a steady mean
    cell_y, cell_x = CELL[1] // 2, CELL[2] // 2
    fill = (0, -sampled.shape[3] % cell_x, 0, -sampled.shape[2] % cell_y)
    above_air = (
        sampled.to(torch.float32)
        .clamp(contract.clip_low, contract.clip_high)
        .sub(contract.clip_low)
    )
    cells = (
        F.pad(above_air, fill)
        .unflatten(3, (-1, cell_x))
        .unflatten(2, (-1, cell_y))
        .mean(dim=(3, 5))
    )
    return (cells > BODY_ABOVE_AIR_HU).to(torch.float32)


def body_share(cells_Bzyx: Tensor, start_VBC3: Tensor, length_VBC3: Tensor) -> Tensor:
    """Share of each box's volume that is body: the overlap of a box with a cell is a product of
    three overlaps.

    Args:
        cells_Bzyx: from `body_cells`.
        start_VBC3, length_VBC3: boxes in voxels.
    Returns:
        (V, B, C) float32; what lies outside the slab counts as air.
    """
    overlaps = []
    for axis in range(3):
        edge = torch.arange(cells_Bzyx.shape[1 + axis], device=start_VBC3.device) * CELL[axis]
        start, length = start_VBC3[..., axis, None], length_VBC3[..., axis, None]
        common = torch.minimum(start + length, edge + CELL[axis]) - torch.maximum(start, edge)
        overlaps.append(common.clamp(min=0) / length)
    z_VBCz, y_VBCy, x_VBCx = overlaps
    share_VBCzy = torch.einsum("bzyx,vbcx->vbczy", cells_Bzyx, x_VBCx)
    return ((share_VBCzy * y_VBCy[..., None, :]).sum(-1) * z_VBCz).sum(-1)


def max_length(rule: Rule, slab_ZYX: tuple[int, int, int]) -> tuple[float, float, float]:
    """The longest edges that `draw` can give in slabs of this size, for static shapes; voxels along
    (z, y, x).
    """
    _, height, width = slab_ZYX
    area = rule.area[1] * height * width
    longest_y = max(math.sqrt(area * rule.aspect[1]), rule.area[1] * height)
    longest_x = max(math.sqrt(area / rule.aspect[0]), rule.area[1] * width)
    return (
        rule.window[0] * rule.z_zoom[1],
        min(longest_y, float(height)),
        min(longest_x, float(width)),
    )


def draw(
    rule: Rule,
    kind: Kind,
    num_views: int,
    cells_Bzyx: Tensor,
    extent_B3: Tensor,
    sample_B: Tensor,
    seed: int,
) -> Boxes:
    """Draw the boxes of all views of one kind.

    The size of a box is drawn once, so that `area` and `aspect` are exactly what was asked for;
    only its place is drawn `candidates` times, and the first place with enough body is taken, else
    the one with the most.

    Args:
        cells_Bzyx: from `body_cells`.
        extent_B3: int64, voxels of the slab that are scan. In-plane a box never leaves them; along
            z only where the scan is shorter than the box, which then starts at the scan's first
            slice.
        sample_B: int64 keys of the samples.
    """
    view_V1 = torch.arange(num_views, device=sample_B.device)[:, None]
    extent_B3 = extent_B3.to(torch.float32)
    length_VB3 = _lengths(rule, kind, view_V1, extent_B3, sample_B, seed)
    start_VBC3 = _starts(rule, kind, view_V1, extent_B3, length_VB3, sample_B, seed)
    share_VBC = body_share(cells_Bzyx, start_VBC3, length_VB3[:, :, None].expand_as(start_VBC3))
    order_C = torch.arange(rule.candidates, 0, -1, device=sample_B.device)
    score_VBC = torch.where(share_VBC >= rule.body_share_min, 1.0 + order_C, share_VBC)
    best_VB = score_VBC.argmax(dim=2)
    start_VB3 = start_VBC3.gather(2, best_VB[:, :, None, None].expand(-1, -1, 1, 3)).squeeze(2)
    flips = [
        rng.uniform(seed, f"{kind} flip", sample_B, view_V1, axis) < chance
        for axis, chance in enumerate(rule.flip_p)
    ]
    share_VB = share_VBC.gather(2, best_VB[:, :, None]).squeeze(2)
    return Boxes(start_VB3, length_VB3, torch.stack(flips, dim=2), share_VB)


def _lengths(
    rule: Rule, kind: Kind, view_V1: Tensor, extent_B3: Tensor, sample_B: Tensor, seed: int
) -> Tensor:
    """Edge lengths (V, B, 3): area uniform, aspect log-uniform over what fits into the scan at that
    area.
    """
    height_B, width_B = extent_B3[:, 1], extent_B3[:, 2]
    area_VB = _between(rule.area, rng.uniform(seed, f"{kind} area", sample_B, view_V1))
    lowest = torch.log(area_VB * height_B / width_B)  # there the box is as wide as the scan
    highest = torch.log(height_B / (area_VB * width_B))  # there it is as high
    first = torch.minimum(
        torch.maximum(lowest, lowest.new_full((), math.log(rule.aspect[0]))), highest
    )
    last = torch.maximum(
        torch.minimum(highest, lowest.new_full((), math.log(rule.aspect[1]))), lowest
    )
    aspect_VB = torch.exp(
        first + (last - first) * rng.uniform(seed, f"{kind} aspect", sample_B, view_V1)
    )
    voxels_VB = area_VB * height_B * width_B
    length_y = torch.minimum((voxels_VB * aspect_VB).sqrt(), height_B)
    length_x = torch.minimum((voxels_VB / aspect_VB).sqrt(), width_B)
    log_zoom = (math.log(rule.z_zoom[0]), math.log(rule.z_zoom[1]))
    zoom_VB = _between(log_zoom, rng.uniform(seed, f"{kind} zoom", sample_B, view_V1)).exp()
    return torch.stack([rule.window[0] * zoom_VB, length_y, length_x], dim=2)


def _starts(
    rule: Rule,
    kind: Kind,
    view_V1: Tensor,
    extent_B3: Tensor,
    length_VB3: Tensor,
    sample_B: Tensor,
    seed: int,
) -> Tensor:
    """Candidate places (V, B, C, 3), uniform over all that keep the box inside the scan."""
    view_V11, candidate_C = (
        view_V1[..., None],
        torch.arange(rule.candidates, device=sample_B.device),
    )
    free_VB13 = (extent_B3 - length_VB3).clamp(min=0)[:, :, None]
    starts = []
    for axis, name in enumerate("zyx"):
        u_VBC = rng.uniform(seed, f"{kind} place {name}", sample_B[:, None], view_V11, candidate_C)
        free_VB1 = free_VB13[..., axis]
        if axis == 0 and rule.z_zoom == (1.0, 1.0):
            starts.append(
                (u_VBC * (free_VB1 + 1)).floor().minimum(free_VB1)
            )  # whole slices, no interpolation
        else:
            starts.append(u_VBC * free_VB1)
    return torch.stack(starts, dim=3)


def _between(bounds: tuple[float, float], u: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * u
