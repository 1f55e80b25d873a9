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
    device = in_scan_VBN.device
    count_C = torch.tensor(list(counts_VB), dtype=torch.int64, pin_memory=device.type == "cuda")
    count_C = count_C.to(device, non_blocking=True)
    keys = (torch.arange(num_views, device=device).repeat_interleave(batch), sample_B.repeat(num_views))
    in_scan_CN = in_scan_VBN.reshape(-1, num_tokens)
    masked_CN = blocks(count_C, grid, in_scan_CN, keys, config, seed)
    masked_CN = _top_up(masked_CN, count_C, in_scan_CN, keys, seed)
    index_M = _indices(masked_CN.flatten(), sum(counts_VB))
    real_CN = masked_CN & in_scan_CN
    weight_C = 1.0 / real_CN.sum(1).clamp(min=1).to(torch.float32)
    weight_M = (real_CN * weight_C[:, None]).flatten()[index_M]
    return Masks(masked_CN.view(num_views, batch, num_tokens), index_M, weight_M)


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
    masked_CN = torch.zeros_like(in_scan_CN)
    left_C = count_C
    for r in range(ROUNDS):
        volume_C = config.min_tokens + (left_C - config.min_tokens) * volume_CR[:, r]
        sides = block_sides(volume_C, height_width_CR[:, r], depth_height_CR[:, r], grid)
        inside = []
        for line, size, side_C, place in zip(lines, grid, sides, place_CR, strict=True):
            start_C = (place[:, r] * (size - side_C + 1)).floor()
            inside.append((line >= start_C[:, None]) & (line < (start_C + side_C)[:, None]))
        z, y, x = inside
        block_CN = (z[:, :, None, None] & y[:, None, :, None] & x[:, None, None, :]).flatten(1)
        fresh_CN = block_CN & in_scan_CN & ~masked_CN & (left_C >= config.min_tokens)[:, None]
        fresh_CN &= fresh_CN.cumsum(1) <= left_C[:, None]  # never overshoot: the block loses its last tokens
        masked_CN |= fresh_CN
        left_C = left_C - fresh_CN.sum(1)
    return masked_CN


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
    token_N = torch.arange(masked_CN.shape[1], device=masked_CN.device)
    chance_CN = rng.hash_bits(seed, "mask top-up", sample_C1, view_C1, token_N) >> 3  # 61 bits with sign
    rank_CN = masked_CN.to(torch.int64) + in_scan_CN.to(torch.int64)  # masked 2, scan 1, padding 0
    order_CN = ((rank_CN << 61) + chance_CN).argsort(dim=1, descending=True)
    return torch.zeros_like(masked_CN).scatter(1, order_CN, token_N < count_C[:, None])


def _indices(masked: Tensor, num_masked: int) -> Tensor:
    """Ascending indices of the True entries; their number is known to the host, so nothing waits for the device."""
    place = torch.where(masked, masked.cumsum(0) - 1, num_masked)
    index = torch.zeros(num_masked + 1, dtype=torch.int64, device=masked.device)
    return index.scatter_(0, place, torch.arange(len(masked), device=masked.device))[:num_masked]
