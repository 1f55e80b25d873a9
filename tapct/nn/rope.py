"""Rotary positions in three dimensions: the position of a token rotates its queries and keys, so
that attention scores depend on differences of positions.

    coordinate = unit (i + 0.5 - n / 2)          per axis, from the crop's centre; patch i of n
    angle      = 2 pi coordinate / period        P periods per axis: shortest * base^(p / P)
    (a, b)     = (a cos - b sin, b cos + a sin)  channel pairs (j, j + 3P), the same for every head

A head of C channels has P = C // 6 pairs per axis. The last C - 6P channels are not rotated
(C = 64: P = 10, 4 channels remain), nor are the prefix tokens, CLS and registers. Queries and keys
are rotated alike, so q.k depends on the difference of two positions only. With `axes: yx` there
are two axes, P = C // 4, as in DINOv3: patches that differ in z alone have the same position.

Axes: T packed tokens (see `attention`), H heads, C channels per head, P pairs per axis, R = 3P
pairs of all axes (2P with `axes: yx`); B crops of one group, N patches of one crop, n patches
along one axis, S prefix tokens or kept rows.
Source: Su et al. 2021, arXiv:2104.09864; 2D in DINOv3, arXiv:2508.10104, from which periods, jitter
    and rescale are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapct.base import rng
from tapct.config import setting
from tapct.nn.posembed import Grid

AXES = {"zyx": (0, 1, 2), "yx": (1, 2)}

# Shortest period in the unit of the coordinates: that of DINOv3, else not below two patches (ours).
_SHORTEST = {"normalised": 1.0, "voxel": 16.0, "mm": 32.0}


@dataclass(frozen=True)
class Config:
    """Rotary positions; read where `model.positions` is rope or both."""

    coordinates: str = setting(
        "normalised",
        "unit of positions: normalised (-1 to 1 along each axis of the crop, DINOv3), voxel "
        "(voxels of the view) or mm (of the body)",
        choices=tuple(_SHORTEST),
    )
    axes: str = setting(
        "zyx",
        "axes whose positions rotate queries and keys; yx: the axes of DINOv3, which weights of "
        "DINOv3 need; patches that differ only in z then have the same position",
        choices=tuple(AXES),
    )
    base: float = setting(
        100.0,
        "a head of C channels has P = C // 6 periods per axis (C // 4 with axes yx): shortest * "
        "base^(p / P) for p = 0 to P - 1; DINOv3: 100",
        gt=1.0,
    )
    shortest: float | None = setting(
        None,
        "shortest period in the unit of the coordinates; null: 1 for normalised (DINOv3), 16 "
        "for voxel, 32 for mm (our own choice)",
        gt=0.0,
    )
    jitter: float = setting(
        1.0,
        "in training, the positions along each axis of a crop are multiplied by a factor of their "
        "own, drawn log-uniformly from 1 / jitter to jitter; 1: off; DINOv3",
        ge=1.0,
    )
    rescale: float = setting(
        1.0,
        "in training, the positions of a crop are multiplied by one factor for all axes, drawn "
        "log-uniformly from 1 / rescale to rescale; 1: off; 2 in DINOv3's configs",
        ge=1.0,
    )

    @property
    def channels_per_period(self) -> int:
        """Channels of a head that one period per axis takes: two in a pair, for every axis."""
        return 2 * len(AXES[self.axes])

    @property
    def varies(self) -> bool:
        """Whether coordinates are drawn in training."""
        return self.jitter > 1.0 or self.rescale > 1.0


@dataclass(frozen=True)
class Rotation:
    """Rotation of the queries and keys of packed tokens; computed once per forward pass, shared by
    all blocks.

    Args:
        cos_TR: float32, cosine of each pair's angle; 1 for prefix tokens.
        sin_TR: float32, sine; 0 for prefix tokens.
    """

    cos_TR: Tensor
    sin_TR: Tensor

    def take(self, row_S: Tensor) -> Rotation:
        """The rotation of some rows of the packed axis."""
        return Rotation(self.cos_TR.index_select(0, row_S), self.sin_TR.index_select(0, row_S))

    def turn(self, x_THC: Tensor) -> Tensor:
        """Rotate queries or keys: (T, H, C) -> (T, H, C), float32 or wider."""
        num_pairs = self.cos_TR.shape[1]
        # float32: a bf16 product of 8 bits would lose small differences of positions
        wide = x_THC.to(torch.promote_types(x_THC.dtype, torch.float32))
        a_THR, b_THR, rest = wide.split(
            [num_pairs, num_pairs, wide.shape[2] - 2 * num_pairs], dim=2
        )
        cos_T1R, sin_T1R = self.cos_TR[:, None].to(wide.dtype), self.sin_TR[:, None].to(wide.dtype)
        return torch.cat(
            [a_THR * cos_T1R - b_THR * sin_T1R, b_THR * cos_T1R + a_THR * sin_T1R, rest], dim=2
        )


def pairs_per_axis(config: Config, head_dim: int) -> int:
    """P of a head of `head_dim` channels."""
    return head_dim // config.channels_per_period


def shortest_period(config: Config) -> float:
    """The shortest period, in the unit of the coordinates."""
    return _SHORTEST[config.coordinates] if config.shortest is None else config.shortest


def periods(config: Config, head_dim: int, device: torch.device) -> Tensor:
    """The periods of one axis in the unit of the coordinates, (P,) float32."""
    num_pairs = pairs_per_axis(config, head_dim)
    exponent_P = torch.arange(num_pairs, device=device, dtype=torch.float32) / num_pairs
    return shortest_period(config) * config.base**exponent_P


def coordinates(
    config: Config, grid: Grid, patch: Grid, spacing_mm_B3: Tensor | None, device: torch.device
) -> list[Tensor]:
    """Positions of patch centres relative to the centre of the crop.

    Args:
        config: unit of the coordinates.
        grid: patches along (z, y, x).
        patch: voxels of one patch.
        spacing_mm_B3: mm per voxel of each crop along (z, y, x); needed for `mm`.
    Returns:
        Per axis (B, n) float32; B = 1 where the positions of all crops are equal.
    """
    places = []
    for axis, (n, side) in enumerate(zip(grid, patch, strict=True)):
        # centres lie at halves: exact in float32, and symmetric to the last bit
        step_1n = (torch.arange(n, device=device, dtype=torch.float32) + (0.5 - n / 2))[None]
        if config.coordinates == "normalised":
            places.append(step_1n * 2 / n)
        elif config.coordinates == "voxel":
            places.append(step_1n * side)
        else:
            assert spacing_mm_B3 is not None, "millimetres need the spacing"
            places.append(step_1n * side * spacing_mm_B3[:, axis, None].to(torch.float32))
    return places


def draw_scales(
    config: Config, num_crops: int, *, seed: int, counters: Sequence[int], device: torch.device
) -> Tensor | None:
    """Random factors on the coordinates of each crop in training; None where there are none.

    DINOv3 draws once per forward pass; here every crop has a draw of its own.

    Args:
        config: ranges of the factors.
        num_crops: B.
        seed: seed of the run.
        counters: key of the draw, e.g. step, micro-batch, rank and group.
        device: device of the factors.
    Returns:
        (B, 3) float32, log-uniform per axis within `jitter` and over all axes within `rescale`.
    """
    if not config.varies:
        return None
    crop_B1 = torch.arange(num_crops, device=device)[:, None]
    axis_3 = torch.arange(3, device=device)
    each_B3 = rng.uniform(seed, "rope/jitter", *counters, crop_B1, axis_3) * 2 - 1
    all_B1 = rng.uniform(seed, "rope/rescale", *counters, crop_B1) * 2 - 1
    return (each_B3 * math.log(config.jitter) + all_B1 * math.log(config.rescale)).exp()


def group_rotation(
    config: Config,
    head_dim: int,
    *,
    grid: Grid,
    patch: Grid,
    num_crops: int,
    num_prefix: int,
    spacing_mm_B3: Tensor | None,
    scale_B3: Tensor | None,
    device: torch.device,
) -> Rotation:
    """The rotation of one group of crops; each crop is [prefix, patches in (z, y, x) raster order].

    Args:
        config: coordinates and periods.
        head_dim: channels C of a head.
        grid: patches along (z, y, x).
        patch: voxels of one patch along (z, y, x).
        num_crops: B.
        num_prefix: tokens before the patches, which are not rotated.
        spacing_mm_B3: mm per voxel of each crop, see `coordinates`.
        scale_B3: factors on the coordinates, see `draw_scales`.
        device: device of the tables.
    Returns:
        Tables of B * (num_prefix + N) rows.
    """
    period_P = periods(config, head_dim, device)
    places = coordinates(config, grid, patch, spacing_mm_B3, device)
    tables, axes = [], AXES[config.axes]
    for axis in axes:
        place_Bn = places[axis]
        if scale_B3 is not None:
            place_Bn = place_Bn * scale_B3[:, axis, None]
        tables.append(2 * math.pi * place_Bn[..., None] / period_P)
    # cos and sin of n angles per axis, then repeated over the grid: N would be many times as many
    cos_BNR = _on_grid([table_BnP.cos() for table_BnP in tables], axes, grid)
    sin_BNR = _on_grid([table_BnP.sin() for table_BnP in tables], axes, grid)
    # an angle of 0 leaves the prefix tokens as they are
    ones_BSR = cos_BNR.new_ones(cos_BNR.shape[0], num_prefix, cos_BNR.shape[2])
    cos_BTR = torch.cat([ones_BSR, cos_BNR], dim=1)
    sin_BTR = torch.cat([torch.zeros_like(ones_BSR), sin_BNR], dim=1)
    cos_BTR, sin_BTR = (
        table.expand(num_crops, -1, -1).flatten(0, 1) for table in (cos_BTR, sin_BTR)
    )
    return Rotation(cos_BTR, sin_BTR)


def _on_grid(tables: Sequence[Tensor], axes: Sequence[int], grid: Grid) -> Tensor:
    """Values per axis (B, n, P) -> values of every patch (B, N, R) in raster order, pairs of the
    first axis first.
    """
    parts = []
    for axis, values_BnP in zip(axes, tables, strict=True):
        shape = [values_BnP.shape[0], 1, 1, 1, values_BnP.shape[2]]
        shape[1 + axis] = grid[axis]
        parts.append(values_BnP.view(shape).expand(-1, *grid, -1))
    return torch.cat(parts, dim=-1).flatten(1, 3)


def join(groups: Sequence[Rotation]) -> Rotation:
    """The rotation of several groups, packed in order."""
    if len(groups) == 1:
        return groups[0]
    return Rotation(
        torch.cat([group.cos_TR for group in groups]), torch.cat([group.sin_TR for group in groups])
    )
