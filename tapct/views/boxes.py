"""Crop boxes: drawn on the device, by key, with a minimum share of body in each.

Axes: B batch, V views of one kind, C candidate places, Z Y X depth height width in voxels of the
slab, z y x cells of the body map along these axes; 3 is (z, y, x). A box is a half-open interval
[start, start + length) per axis, in voxels, where voxel k covers [k, k + 1).
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

# Voxels (z, y, x) of one cell of the body map; its mean is taken over 16 voxels of its first slice.
CELL = (4, 8, 8)
# A cell is body if its mean lies more than this above air. Air is clipped to -1008 HU, so -960 HU
# and above is body, which includes lung (about -850 HU).
BODY_ABOVE_AIR_HU = 48.0


@dataclass(frozen=True)
class Rule:
    """How to draw the crops of one kind; fields as in `recipe.Config`.

    Args:
        window: voxels (z, y, x) of the finished view.
        area: range of the crop's share of the scan's in-plane area, uniform.
        aspect: range of height / width in voxels, log-uniform.
        z_zoom: range of slices of the scan per slice of the view, log-uniform; (1, 1) cuts whole
            slices.
        body_share_min: smallest share of body that a crop should hold.
        candidates: number of places that are tried for it.
        flip_p: chance of a flip along (z, y, x).
        region_area: range of the share of the scan's in-plane area in which all crops of a sample
            lie; (1, 1) is the whole slice.
    """

    window: tuple[int, int, int]
    area: tuple[float, float]
    aspect: tuple[float, float]
    z_zoom: tuple[float, float]
    body_share_min: float
    candidates: int
    flip_p: tuple[float, float, float]
    region_area: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Boxes:
    """The drawn crops of one kind.

    Args:
        start_VB3: float32, first edge of the box in voxels of the slab.
        length_VB3: float32, edge length in voxels, > 0.
        flip_VB3: bool, the view is mirrored along this axis.
    """

    start_VB3: Tensor
    length_VB3: Tensor
    flip_VB3: Tensor


def body_cells(hu_BZYX: Tensor, contract: HUContract) -> Tensor:
    """A coarse map of body (lungs and table included) and air.

    Args:
        hu_BZYX: int16 HU.
        contract: HU window, whose lower clip is air.
    Returns:
        (B, z, y, x) float32, 1 for a body cell of `CELL` voxels, 0 for air; cells that reach beyond
        the slab are filled up with air.
    """
    # a sixteenth of the voxels: 16 per cell give a steady mean
    sampled = hu_BZYX[:, :: CELL[0], ::2, ::2]
    cell_y, cell_x = CELL[1] // 2, CELL[2] // 2
    padding = (0, -sampled.shape[3] % cell_x, 0, -sampled.shape[2] % cell_y)
    clipped = sampled.to(torch.float32).clamp(contract.clip_low, contract.clip_high)
    above_air = F.pad(clipped.sub(contract.clip_low), padding)
    # (B, z, y, voxels in y, x, voxels in x): the mean over the voxels of a cell
    split = above_air.unflatten(3, (-1, cell_x)).unflatten(2, (-1, cell_y))
    return (split.mean(dim=(3, 5)) > BODY_ABOVE_AIR_HU).to(torch.float32)


def body_share(cells_Bzyx: Tensor, start_VBC3: Tensor, length_VBC3: Tensor) -> Tensor:
    """Share of each box's volume that is body.

    Args:
        cells_Bzyx: map from `body_cells`.
        start_VBC3: first edges of the boxes in voxels.
        length_VBC3: edge lengths in voxels.
    Returns:
        (V, B, C) float32; volume outside the slab counts as air.
    """
    # the overlap of a box with a cell is the product of its overlaps along the three axes
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
    """The longest edges that `draw` can give in slabs of this size, in voxels along (z, y, x).

    The host knows them before the draw, so shapes that depend on them are static.
    """
    _, height, width = slab_ZYX
    area = rule.area[1] * height * width
    # a crop that is as wide as its region has this share of the slice's height
    share = rule.area[1] / math.sqrt(rule.region_area[0])
    longest_y = max(math.sqrt(area * rule.aspect[1]), share * height)
    longest_x = max(math.sqrt(area / rule.aspect[0]), share * width)
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

    The size of a box is drawn once, so that `area` and `aspect` have exactly the distribution of
    the rule. Its place is drawn `candidates` times: the first place with enough body is taken, else
    the place with the most body.

    Args:
        rule: ranges and chances.
        kind: global or local; part of the key of every draw.
        num_views: V.
        cells_Bzyx: map from `body_cells`.
        extent_B3: int64, voxels of the slab that are scan. In-plane a box never leaves them. Along
            z it leaves them where the scan is shorter than the box, which then starts at the first
            slice.
        sample_B: int64, numbers of the samples.
        seed: seed of the run.
    """
    view_V1 = torch.arange(num_views, device=sample_B.device)[:, None]
    extent_B3 = extent_B3.to(torch.float32)
    region = _region(rule, cells_Bzyx, extent_B3, sample_B, seed)
    length_VB3 = _lengths(rule, kind, view_V1, extent_B3, region, sample_B, seed)
    start_VBC3 = _starts(rule, kind, view_V1, region, length_VB3, sample_B, seed)
    share_VBC = body_share(cells_Bzyx, start_VBC3, length_VB3[:, :, None].expand_as(start_VBC3))
    best_VB = _best_place(share_VBC, rule)
    start_VB3 = start_VBC3.gather(2, best_VB[:, :, None, None].expand(-1, -1, 1, 3)).squeeze(2)
    flips = [
        rng.uniform(seed, f"{kind} flip", sample_B, view_V1, axis) < chance
        for axis, chance in enumerate(rule.flip_p)
    ]
    return Boxes(start_VB3, length_VB3, torch.stack(flips, dim=2))


def _best_place(share_C: Tensor, rule: Rule) -> Tensor:
    """The first candidate with enough body, else the one with the most.

    Args:
        share_C: share of body of each candidate, last axis.
        rule: the least share, and the number of candidates.
    """
    # A place with enough body scores more than 1, the earlier the more; any other its share, at
    # most 1. So one argmax does both, without asking the device whether a place was found.
    order_C = torch.arange(rule.candidates, 0, -1, device=share_C.device)
    return torch.where(share_C >= rule.body_share_min, 1.0 + order_C, share_C).argmax(dim=-1)


@dataclass(frozen=True)
class _Region:
    """The part of each slab in which all crops of its sample lie, in voxels of the slab.

    Args:
        start_B3: first edges.
        length_B3: edge lengths.
    """

    start_B3: Tensor
    length_B3: Tensor


def _region(
    rule: Rule, cells_Bzyx: Tensor, extent_B3: Tensor, sample_B: Tensor, seed: int
) -> _Region:
    """Draw the region of each sample: as deep as the slab, of the shape of the slice.

    Its place is chosen like that of a crop. The key has no kind of view, so global and local views
    of a sample share the region.
    """
    if rule.region_area == (1.0, 1.0):
        return _Region(torch.zeros_like(extent_B3), extent_B3)
    edge_B = _between(rule.region_area, rng.uniform(seed, "region area", sample_B)).sqrt()
    depth_B = extent_B3[:, 0]
    length_B3 = torch.stack([depth_B, extent_B3[:, 1] * edge_B, extent_B3[:, 2] * edge_B], dim=1)
    candidate_C = torch.arange(rule.candidates, device=sample_B.device)
    place_BC2 = torch.stack(
        [
            rng.uniform(seed, f"region place {name}", sample_B[:, None], candidate_C)
            for name in "yx"
        ],
        dim=2,
    )
    free_B12 = (extent_B3 - length_B3)[:, None, 1:].clamp(min=0)
    start_BC3 = F.pad(place_BC2 * free_B12, (1, 0))
    share_BC = body_share(
        cells_Bzyx, start_BC3[None], length_B3[None, :, None].expand_as(start_BC3[None])
    )[0]
    best_B = _best_place(share_BC, rule)
    start_B3 = start_BC3.gather(1, best_B[:, None, None].expand(-1, 1, 3)).squeeze(1)
    return _Region(start_B3, length_B3)


def _lengths(
    rule: Rule,
    kind: Kind,
    view_V1: Tensor,
    extent_B3: Tensor,
    region: _Region,
    sample_B: Tensor,
    seed: int,
) -> Tensor:
    """Edge lengths (V, B, 3) in voxels: area uniform, aspect log-uniform over the part of its range
    that fits into the region at that area.
    """
    height_B, width_B = region.length_B3[:, 1], region.length_B3[:, 2]
    of_scan_VB = _between(rule.area, rng.uniform(seed, f"{kind} area", sample_B, view_V1))
    # the same area as a share of the region, exact where the region is the whole slice
    slices_B = (extent_B3[:, 1] * extent_B3[:, 2]) / (height_B * width_B)
    area_VB = (of_scan_VB * slices_B).clamp(max=1)
    # log of the aspects at which the box is as wide as the region, and as high as the region
    lowest_VB = torch.log(area_VB * height_B / width_B)
    highest_VB = torch.log(height_B / (area_VB * width_B))
    low, high = (lowest_VB.new_full((), math.log(edge)) for edge in rule.aspect)
    first_VB = torch.minimum(torch.maximum(lowest_VB, low), highest_VB)
    last_VB = torch.maximum(torch.minimum(highest_VB, high), lowest_VB)
    u_VB = rng.uniform(seed, f"{kind} aspect", sample_B, view_V1)
    aspect_VB = torch.exp(first_VB + (last_VB - first_VB) * u_VB)
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
    region: _Region,
    length_VB3: Tensor,
    sample_B: Tensor,
    seed: int,
) -> Tensor:
    """Candidate places (V, B, C, 3), uniform over all that keep the box inside the region."""
    view_V11 = view_V1[..., None]
    candidate_C = torch.arange(rule.candidates, device=sample_B.device)
    free_VB13 = (region.length_B3 - length_VB3).clamp(min=0)[:, :, None]
    first_B31 = region.start_B3[..., None]
    starts = []
    for axis, name in enumerate("zyx"):
        u_VBC = rng.uniform(seed, f"{kind} place {name}", sample_B[:, None], view_V11, candidate_C)
        free_VB1 = free_VB13[..., axis]
        if axis == 0 and rule.z_zoom == (1.0, 1.0):
            # whole slices, so that nothing is interpolated along z; `minimum`: u * n may round to n
            starts.append((u_VBC * (free_VB1 + 1)).floor().minimum(free_VB1))
        else:
            starts.append(first_B31[:, axis] + u_VBC * free_VB1)
    return torch.stack(starts, dim=3)


def _between(bounds: tuple[float, float], u: Tensor) -> Tensor:
    """u in [0, 1) -> a number between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * u
