"""Block masks of the global crops, with exact counts that the host knows before the step.

Axes: B batch, V global views, C = V * B crops (crop-major), N = z * y * x patch tokens of a crop, M masked tokens.
Source: iBOT (arXiv:2111.07832) and DINOv2's mask collator, in 3D and for the whole batch at once; unlike DINOv2's, a
count is never missed: blocks first, then single tokens up to the exact number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapct import rng
from tapct.config import setting
from tapct.types import Masks, UserError

# blocks proposed for a crop; measured at ratios 0.1-0.5, they leave 0.3-1.6 % of the masked tokens of a 3x28x28 grid
# to single draws, and 2-7 % of a 2x8x8 grid, where that is fewer tokens than the smallest block
ROUNDS = 12


@dataclass(frozen=True)
class Config:
    """Which share of the tokens the student does not see. Source of the defaults: DINOv2 and TAP-CT's configs."""

    probability: float = setting(0.5, "share of the global crops of a step that are masked at all", ge=0, le=1)
    ratio: tuple[float, float] = setting(
        (0.1, 0.5), "masked share of a masked crop: those of a step take even steps between the two", ge=0, le=1
    )
    min_tokens: int = setting(4, "smallest volume of a block in tokens", ge=1)
    aspect: tuple[float, float] = setting(
        (0.3, 1 / 0.3), "height / width and depth / height of a block in tokens, log-uniform", gt=0
    )

    def __post_init__(self) -> None:
        for name in ("ratio", "aspect"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"masks.{name} is [{low}, {high}]: the lower end comes first")


def counts(config: Config, *, num_crops_global: int, num_tokens: int, seed: int, step: int) -> list[int]:
    """How many tokens of each global crop of a step are masked; over all ranks and micro-batches.

    Args:
        num_crops_global: global views x global batch.
        num_tokens: N.
        step: number of the optimizer step; with the seed it keys which crop gets which count.
    Returns:
        One count for every crop, 0 where it is not masked; crop-major over the global batch: the crop of a sample and
        a view stands at view * global batch + sample % global batch.
    """
    num_masked = int(num_crops_global * config.probability + 1e-9)  # 0.29 * 100 is 29, whatever floats say
    low, high = config.ratio
    edges = [low + (high - low) * (i + 1) / num_masked for i in range(num_masked)]
    sizes = [int(num_tokens * edge + 1e-9) for edge in edges]
    order = rng.hash_bits(seed, "mask count", step, torch.arange(num_crops_global)).argsort(stable=True)
    drawn = torch.zeros(num_crops_global, dtype=torch.int64)
    drawn[order[:num_masked]] = torch.tensor(sizes, dtype=torch.int64)
    return drawn.tolist()


def draw(
    counts_VB: Sequence[int],
    grid: tuple[int, int, int],
    in_scan_VBN: Tensor,
    sample_B: Tensor,
    config: Config,
    seed: int,
) -> Masks:
    """Draw the masks of a micro-batch, all crops at once, without waiting for the device.

    Keyed by (seed, sample, view): a crop's mask depends on nothing but its own count and scan.

    Args:
        counts_VB: host numbers, crop-major, exact; each 0 .. N.
        grid: tokens along (z, y, x).
        in_scan_VBN: bool; padding is masked only where scan tokens do not suffice, and then weighs 0.
        sample_B: int64 keys of the samples.
    """
    num_views, batch, num_tokens = in_scan_VBN.shape
    assert num_tokens == math.prod(grid) and len(counts_VB) == num_views * batch
    assert all(0 <= count <= num_tokens for count in counts_VB)
    some = [crop for crop, count in enumerate(counts_VB) if count]  # P of the C crops; nothing is drawn for the others
    crop_P, count_P = _to_device([some, [counts_VB[crop] for crop in some]], in_scan_VBN.device)
    view_C, sample_C = _keys(num_views, sample_B)
    keys = (view_C[crop_P], sample_C[crop_P])
    in_scan_PN = in_scan_VBN.reshape(-1, num_tokens)[crop_P]
    masked_PN = blocks(count_P, grid, in_scan_PN, keys, config, seed)
    masked_PN = _top_up(masked_PN, count_P, in_scan_PN, keys, seed)
    place_M = _indices(masked_PN.flatten(), sum(counts_VB))  # among the P crops
    row_M = place_M // num_tokens
    index_M = crop_P[row_M] * num_tokens + place_M % num_tokens
    real_PN = masked_PN & in_scan_PN
    weight_P = 1.0 / real_PN.sum(1).clamp(min=1).to(torch.float32)
    weight_M = real_PN.flatten()[place_M] * weight_P[row_M]
    masked_CN = torch.zeros_like(in_scan_VBN).view(-1, num_tokens).index_copy_(0, crop_P, masked_PN)
    return Masks(masked_CN.view(num_views, batch, num_tokens), index_M, weight_M)


def _to_device(numbers: list[list[int]], device: torch.device) -> Tensor:
    """Host numbers as int64, in one copy that nobody waits for."""
    told = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return told.to(device, non_blocking=True)


def blocks(
    count_C: Tensor,
    grid: tuple[int, int, int],
    in_scan_CN: Tensor,
    keys: tuple[Tensor, Tensor],
    config: Config,
    seed: int,
) -> Tensor:
    """Mask `ROUNDS` random blocks in every crop, each within what is left to mask; the last one is trimmed to fit.

    Args:
        keys: view and sample number of every crop, int64 (C,).
    Returns:
        (C, N) bool with at most count_C True, all of them in the scan.
    """
    return _place_blocks(count_C, grid, in_scan_CN, keys, config, seed)[0]


@dataclass(frozen=True)
class Statistics:
    """What the masks of some crops look like; quantiles are those of 5, 50 and 95 % of all blocks.

    Args:
        blocks: mean number in a masked crop.
        share_in_blocks: of the masked tokens; the others were drawn one by one to reach the exact count.
        volume: tokens of a block, those included that are outside of the scan or masked already.
        height_width: height / width of a block in tokens.
        depth_height: depth / height; bounded by the grid where it is shallow.
    """

    blocks: float
    share_in_blocks: float
    volume: tuple[float, ...]
    height_width: tuple[float, ...]
    depth_height: tuple[float, ...]


def statistics(
    counts_VB: Sequence[int],
    grid: tuple[int, int, int],
    in_scan_VBN: Tensor,
    sample_B: Tensor,
    config: Config,
    seed: int,
) -> Statistics:
    """How the masks that `draw` gives for the same arguments are made; waits for the device.

    Raises:
        ValueError: no block was placed, so there is nothing to tell.
    """
    count_C = torch.tensor(list(counts_VB), dtype=torch.int64, device=in_scan_VBN.device)
    keys = _keys(len(in_scan_VBN), sample_B)
    masked_CN, sides_CR3 = _place_blocks(count_C, grid, in_scan_VBN.flatten(0, 1), keys, config, seed)
    depth, height, width = sides_CR3[sides_CR3[..., 0] > 0].double().unbind(-1)
    if not len(depth):
        raise ValueError(f"no crop of counts {max(counts_VB, default=0)} or less got a block; mask more tokens")
    at = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device=depth.device)
    return Statistics(
        blocks=len(depth) / int((count_C > 0).sum()),
        share_in_blocks=float(masked_CN.sum() / count_C.sum()),
        volume=tuple((depth * height * width).quantile(at).tolist()),
        height_width=tuple((height / width).quantile(at).tolist()),
        depth_height=tuple((depth / height).quantile(at).tolist()),
    )


def _keys(num_views: int, sample_B: Tensor) -> tuple[Tensor, Tensor]:
    """View and sample number of every crop, int64 (C,), crop-major."""
    view_V = torch.arange(num_views, device=sample_B.device)
    return view_V.repeat_interleave(len(sample_B)), sample_B.repeat(num_views)


def _place_blocks(
    count_C: Tensor,
    grid: tuple[int, int, int],
    in_scan_CN: Tensor,
    keys: tuple[Tensor, Tensor],
    config: Config,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """What `blocks` returns, and the sides (C, R, 3) of the proposed blocks in tokens, 0 where one was not placed."""
    device = count_C.device
    rounds = torch.arange(ROUNDS, device=device)
    view_C1, sample_C1 = (key[:, None] for key in keys)

    def uniform(name: str) -> Tensor:
        return rng.uniform(seed, f"mask {name}", sample_C1, view_C1, rounds)

    volume_CR, height_width_CR, depth_height_CR = uniform("volume"), uniform("hw"), uniform("dh")
    low, high = math.log(config.aspect[0]), math.log(config.aspect[1])
    height_width_CR, depth_height_CR = (torch.exp(low + (high - low) * u) for u in (height_width_CR, depth_height_CR))
    place_CR = [uniform(f"place {axis}") for axis in "zyx"]
    lines = [torch.arange(size, device=device) for size in grid]
    free_CN = in_scan_CN.clone()
    left_C, placed = count_C, []
    for r in range(ROUNDS):
        volume_C = config.min_tokens + (left_C - config.min_tokens) * volume_CR[:, r]
        sides = block_sides(volume_C, height_width_CR[:, r], depth_height_CR[:, r], grid)
        placed.append(torch.stack(sides, -1) * (left_C >= config.min_tokens)[:, None])
        inside = []
        for line, size, side_C, place in zip(lines, grid, sides, place_CR, strict=True):
            start_C = (place[:, r] * (size - side_C + 1)).floor()
            inside.append((line >= start_C[:, None]) & (line < (start_C + side_C)[:, None]))
        z, y, x = inside
        z = z & (left_C >= config.min_tokens)[:, None]
        rows_CL = (z[:, :, None] & y[:, None, :]).flatten(1)
        # a product of bytes: on a CPU `and` of two bools that are broadcast takes three times as long
        block_CLX = rows_CL.view(torch.uint8)[:, :, None] * x.view(torch.uint8)[:, None, :]
        fresh_CN = block_CLX.view(torch.bool).flatten(1) & free_CN
        # never overshoot: the block loses its last tokens
        fresh_CN &= fresh_CN.cumsum(1, dtype=torch.int32) <= left_C[:, None].to(torch.int32)
        free_CN ^= fresh_CN
        left_C = left_C - fresh_CN.sum(1)
    return in_scan_CN ^ free_CN, torch.stack(placed, 1)


def block_sides(
    volume: Tensor, height_width: Tensor, depth_height: Tensor, grid: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole sides (z, y, x) of blocks of about that volume, each at least 1 and at most the grid.

    A grid is often only 1 or 3 tokens deep: what the depth cannot take goes to height and width at their own ratio,
    so the volume is kept.

    Args:
        volume: float, tokens.
        height_width: height / width, float.
        depth_height: depth / height, float; gives way where the grid ends.
    """
    # height^3 * (depth / height) / (height / width) = volume
    height = (volume * height_width / depth_height).pow(1 / 3)
    depth = (height * depth_height).round().clamp(1, grid[0])
    area = volume / depth
    height = (area * height_width).sqrt().round().clamp(1, grid[1])
    width = (area / height_width).sqrt().round().clamp(1, grid[2])
    return depth, height, width


def _top_up(masked_CN: Tensor, count_C: Tensor, in_scan_CN: Tensor, keys: tuple[Tensor, Tensor], seed: int) -> Tensor:
    """Add single tokens, uniformly, up to the exact count: from the scan first, from padding if that is not enough."""
    view_C1, sample_C1 = (key[:, None] for key in keys)
    num_tokens = most = masked_CN.shape[1]
    missing_C1 = (count_C - masked_CN.sum(1))[:, None]
    if masked_CN.device.type == "cpu" and len(count_C):  # elsewhere the host would wait for this number
        most = int(missing_C1.max())
    token_N = torch.arange(num_tokens, device=masked_CN.device)
    chance_CN = rng.hash_bits(seed, "mask top-up", sample_C1, view_C1, token_N) >> 3  # 61 bits with sign
    rank_CN = in_scan_CN.to(torch.int64) - 2 * masked_CN.to(torch.int64)  # scan 1, padding 0, masked -1 at most
    order_CR = ((rank_CN << 61) + chance_CN).topk(most, dim=1).indices
    added_CN = torch.zeros_like(masked_CN).scatter(1, order_CR, token_N[:most] < missing_C1)
    return masked_CN | added_CN


def _indices(masked: Tensor, num_masked: int) -> Tensor:
    """Ascending indices of the True entries; their number is known to the host, so nothing waits for the device."""
    place = torch.where(masked, masked.cumsum(0) - 1, num_masked)
    index = torch.zeros(num_masked + 1, dtype=torch.int64, device=masked.device)
    return index.scatter_(0, place, torch.arange(len(masked), device=masked.device))[:num_masked]
