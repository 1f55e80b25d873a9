"""Block masks of the global crops, with exact counts that the host knows before the step.

Axes: B batch, V global views, C = V * B crops (crop-major), P those of them that are masked, N = z
* y * x patch tokens of a crop, M masked tokens, R proposed blocks.
Source: iBOT (arXiv:2111.07832) and DINOv2's mask collator, in 3D and for the whole batch at once;
unlike DINOv2's, a count is never missed. All blocks are proposed before any is placed, and every
token has one word, whose bit r says that block r covers it. As many of the first blocks are masked
as fit into the count, and of the next one what is then left. What blocks cannot give is a run of
tokens from a random place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tapct.base import rng
from tapct.base.exits import UserError
from tapct.config import setting
from tapct.types import Masks

# blocks proposed for a crop; with the scan and the padding they are 15 bits, an int16 that is not
# negative
ROUNDS = 13
# the share of a block that earlier ones are expected to cover, over the masked share of the crop.
# At ratios of 0.1-0.5 blocks give 98.5 % of the masked tokens of a 3x28x28 grid; at 0.5 it is 97 %
# by smaller blocks, at 1 99.5 % by larger
OVERLAP = 0.65
BLOCKS = 2**ROUNDS - 1  # the bits of all blocks


@dataclass(frozen=True)
class Config:
    """Which share of the tokens the student does not see. Source of the defaults: DINOv2 and
    TAP-CT's configs.
    """

    probability: float = setting(
        0.5, "share of the global crops of a step that are masked at all", ge=0, le=1
    )
    ratio: tuple[float, float] = setting(
        (0.1, 0.5),
        "masked share of a masked crop: those of a step take even steps between the two",
        ge=0,
        le=1,
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


def counts(
    config: Config, *, num_crops_global: int, num_tokens: int, seed: int, step: int
) -> list[int]:
    """How many tokens of each global crop of a step are masked; over all ranks and micro-batches.

    Args:
        num_crops_global: global views x global batch.
        num_tokens: N.
        step: number of the optimizer step; with the seed it keys which crop gets which count.
    Returns:
        One count for every crop, 0 where it is not masked; crop-major over the global batch: the
        crop of a sample and a view stands at view * global batch + sample % global batch.
    """
    num_masked = int(
        num_crops_global * config.probability + 1e-9
    )  # 0.29 * 100 is 29, whatever floats say
    low, high = config.ratio
    edges = [low + (high - low) * (i + 1) / num_masked for i in range(num_masked)]
    sizes = [int(num_tokens * edge + 1e-9) for edge in edges]
    order = rng.hash_bits(seed, "mask count", step, torch.arange(num_crops_global)).argsort(
        stable=True
    )
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
        in_scan_VBN: bool; padding is masked only where scan tokens do not suffice, and then weighs
            0.
        sample_B: int64 keys of the samples, below 2^43.
    """
    count_C = np.array(counts_VB, dtype=np.int64)
    masked_C = count_C > 0
    row_C = np.where(
        masked_C, masked_C.cumsum() - 1, masked_C.sum()
    )  # of the P rows; one more for all other crops
    row_C, repeat_C = _to_device(np.stack([row_C, count_C]), in_scan_VBN.device)
    chosen_PN = choose(count_C, grid, in_scan_VBN, sample_B, config, seed).chosen_PN
    masked_CN = torch.cat([chosen_PN, chosen_PN.new_zeros(1, chosen_PN.shape[1])])[row_C]
    real_CN = masked_CN & in_scan_VBN.flatten(0, 1)
    weight_C = real_CN.sum(1, dtype=torch.int32).clamp_(min=1).to(torch.float32).reciprocal_()
    num_masked = int(count_C.sum())
    index_M = _indices(masked_CN.flatten(), num_masked)
    weight_M = torch.repeat_interleave(weight_C, repeat_C, output_size=num_masked)
    weight_M *= real_CN.view(torch.uint8).flatten().index_select(0, index_M).to(torch.float32)
    return Masks(masked_CN.view_as(in_scan_VBN), index_M, weight_M)


def _to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Host numbers in one copy that nobody waits for."""
    told = torch.from_numpy(numbers)
    return told.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else told


def _indices(masked: Tensor, num_masked: int) -> Tensor:
    """Ascending indices of the True entries; their number is known to the host, so nothing waits
    for the device.
    """
    if masked.device.type == "cpu":  # in a quarter of the time
        return torch.from_numpy(masked.numpy().nonzero()[0])
    place = torch.where(masked, masked.cumsum(0) - 1, num_masked)
    index = torch.zeros(num_masked + 1, dtype=torch.int64, device=masked.device)
    return index.scatter_(0, place, torch.arange(len(masked), device=masked.device))[:num_masked]


@dataclass(frozen=True)
class Statistics:
    """What the masks of some crops look like; quantiles are those of 5, 50 and 95 % of all blocks.

    Args:
        blocks: mean number in a masked crop.
        share_in_blocks: of the masked tokens; the others were taken as a run to reach the exact
            count.
        volume: tokens of a block, those included that are outside of the scan, masked already or
            trimmed.
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
    choice = choose(np.array(counts_VB, dtype=np.int64), grid, in_scan_VBN, sample_B, config, seed)
    depth, height, width = choice.sides_3RP[:, choice.placed_RP]
    if not len(depth):
        raise ValueError(
            f"no crop of counts {max(counts_VB, default=0)} or less got a block; mask more tokens"
        )
    at = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device=depth.device)
    return Statistics(
        blocks=len(depth) / len(choice.chosen_PN),
        share_in_blocks=float(choice.in_blocks_PN.sum() / choice.chosen_PN.sum()),
        volume=tuple((depth * height * width).quantile(at).tolist()),
        height_width=tuple((height / width).quantile(at).tolist()),
        depth_height=tuple((depth / height).quantile(at).tolist()),
    )


@dataclass(frozen=True)
class Choice:
    """The masked tokens of the P crops and the blocks that they come from.

    Args:
        chosen_PN: bool, exactly as many as the count.
        word_PN: integers; bit r says that block r covers the token.
        first_P1: bits of the first rounds that are masked as a whole.
        left_P1: tokens of the next round that are masked too.
        sides_3RP: (z, y, x) of the proposed blocks in tokens, float64.
    """

    chosen_PN: Tensor
    word_PN: Tensor
    first_P1: Tensor
    left_P1: Tensor
    sides_3RP: Tensor

    @property
    def in_blocks_PN(self) -> Tensor:
        """The masked tokens that blocks gave."""
        return self.chosen_PN & (self.word_PN & BLOCKS).bool()

    @property
    def placed_RP(self) -> Tensor:
        """The blocks that are masked, whole or trimmed."""
        bits_P1 = torch.where(self.left_P1 > 0, 2 * self.first_P1 + 1, self.first_P1)
        bits_P1 = bits_P1 * (self.word_PN & BLOCKS).any(1, keepdim=True)
        return ((bits_P1.T >> torch.arange(ROUNDS, device=bits_P1.device)[:, None]) & 1).bool()


@torch.inference_mode()  # a tenth faster; nothing here has a gradient
def choose(
    count_C: np.ndarray,
    grid: tuple[int, int, int],
    in_scan_VBN: Tensor,
    sample_B: Tensor,
    config: Config,
    seed: int,
) -> Choice:
    """Draw blocks for every crop whose count is not 0, and take what fits; the other arguments as
    in `draw`.
    """
    num_views, batch, num_tokens = in_scan_VBN.shape
    assert num_tokens == math.prod(grid) and len(count_C) == num_views * batch
    assert ((count_C >= 0) & (count_C <= num_tokens)).all()
    some_P = count_C.nonzero()[0]
    told = np.stack([count_C[some_P], some_P, some_P // batch, some_P % batch])
    count_P, crop_P, view_P, place_P = _to_device(told, in_scan_VBN.device)
    word = (
        torch.int16 if num_tokens < 2**15 else torch.int32
    )  # it holds the bits of all rounds, and any count
    count_P1 = count_P.to(word)[:, None]
    draw_DP = _uniforms(sample_B[place_P], view_P, seed)
    shape_3RP, place_3RP = draw_DP[:-1].unflatten(0, (2, 3, ROUNDS))
    sides_3RP = _sides(count_P.to(torch.float64), shape_3RP, grid, config)
    outside_PN = _outside(sides_3RP, place_3RP, (count_P < config.min_tokens)[:, None], grid)
    in_scan_PN = in_scan_VBN.flatten(0, 1)[crop_P].to(word)
    # round R is the whole scan, and what comes then is everything
    word_PN = outside_PN.bitwise_xor_(2 * BLOCKS + 1).mul_(in_scan_PN).bitwise_or_(2 * BLOCKS + 2)
    first_P1 = torch.zeros_like(count_P1)
    for step in (
        8,
        4,
        2,
        1,
    ):  # bisection for the most rounds that together cover no more than the count
        more_P1 = (first_P1 << step) + (2**step - 1)
        first_P1 = torch.where(
            _covered(word_PN, more_P1).sum(1, True, dtype=word) <= count_P1, more_P1, first_P1
        )
    whole_PN = _covered(word_PN, first_P1)
    fresh_PN = _covered(word_PN, 2 * first_P1 + 1).sub_(whole_PN)
    left_P1 = count_P1 - whole_PN.sum(1, True, dtype=word)
    # a block loses its last tokens; of scan and padding a run is taken that begins anywhere and
    # goes on at the first
    rank_PN = fresh_PN.cumsum(1, dtype=word)
    num_P1 = rank_PN[:, -1:].clone()
    start_P1 = (draw_DP[-1, :, None] * num_P1 * (first_P1 >= BLOCKS)).to(word)
    rank_PN -= start_P1 + 1
    rank_PN += _negative(rank_PN) & num_P1
    fresh_PN &= _negative(rank_PN.sub_(left_P1))
    return Choice(whole_PN.add_(fresh_PN).bool(), word_PN, first_P1, left_P1, sides_3RP)


def _uniforms(sample_P: Tensor, view_P: Tensor, seed: int) -> Tensor:
    """The 6 * ROUNDS + 1 numbers that a mask takes, (D, P) float64 in [0, 1), multiples of 2^-16:
    four from a hash.
    """
    num = 6 * ROUNDS + 1
    key_P = (sample_P << 20) + (view_P << 8)
    bits_PH = rng.hash_bits(
        seed, "mask", key_P[:, None] + torch.arange((num + 3) // 4, device=key_P.device)
    )
    return (
        bits_PH.view(torch.int16).T[:num].to(torch.float64, memory_format=torch.contiguous_format)
        * 2.0**-16
    ) + 0.5


def _sides(count_P: Tensor, draw_3RP: Tensor, grid: tuple[int, int, int], config: Config) -> Tensor:
    """Sides (z, y, x) of the proposed blocks in tokens, (3, R, P).

    A volume is uniform between `min_tokens` and what the earlier blocks are expected to leave. All
    in float64, so that the last bits, in which devices differ, do not reach a whole number.
    """
    volume_RP = draw_3RP[0]
    low, high = math.log(config.aspect[0]), math.log(config.aspect[1])
    height_width_RP, depth_height_RP = (draw_3RP[1:] * (high - low) + low).exp_()
    stays_RP = 1 - volume_RP * (1 - OVERLAP / math.prod(grid) * count_P)
    left_RP = count_P * stays_RP.cumprod(0) / stays_RP  # before each block
    volume_RP = (left_RP - config.min_tokens).clamp_(min=0) * volume_RP + config.min_tokens
    return torch.stack(block_sides(volume_RP, height_width_RP, depth_height_RP, grid))


def _outside(
    sides_3RP: Tensor, place_3RP: Tensor, none_P1: Tensor, grid: tuple[int, int, int]
) -> Tensor:
    """Bit r says that block r does not cover the token, as its z, its y or its x is outside; (P,
    N).

    Args:
        place_3RP: uniform in [0, 1), from one end of the grid to the other.
        none_P1: bool, crops that get no block.
    """
    word = torch.int16 if math.prod(grid) < 2**15 else torch.int32
    round_R11 = torch.arange(ROUNDS, device=none_P1.device, dtype=word)[:, None, None]
    bit_R11 = torch.ones_like(round_R11) << round_R11
    last_3RP1 = (sides_3RP - 1).to(word)[..., None]
    size_311 = _to_device(np.array(grid), none_P1.device)[:, None, None]
    start_3RP1 = (place_3RP * (size_311 + 1 - sides_3RP)).to(word)[..., None]
    line_3RPL = (
        torch.arange(max(grid), device=none_P1.device, dtype=word) - start_3RP1
    )  # in the block 0 .. its last
    outside_3RPL = _negative((last_3RP1 - line_3RPL).bitwise_or_(line_3RPL)).bitwise_and_(bit_R11)
    lines_3PL = outside_3RPL.sum(1, dtype=word)
    z_PL, y_PL, x_PL = (line_PL[:, :size] for line_PL, size in zip(lines_3PL, grid, strict=True))
    z_PL |= none_P1 * BLOCKS
    yx_PL = (y_PL[:, :, None] | x_PL[:, None, :]).flatten(1)
    return (z_PL[:, :, None] | yx_PL[:, None, :]).flatten(1)


def _covered(word_PN: Tensor, rounds_P1: Tensor) -> Tensor:
    """1 where one of these rounds covers the token, else 0."""
    return (word_PN & rounds_P1).clamp_(max=1)


def _negative(number: Tensor) -> Tensor:
    """All bits where an int16 or int32 is negative, else none; a comparison takes ten times as long
    on a CPU.
    """
    return number >> (8 * number.element_size() - 1)


def block_sides(
    volume: Tensor, height_width: Tensor, depth_height: Tensor, grid: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole sides (z, y, x) of blocks of about that volume, each at least 1 and at most the grid.

    A grid is often only 1 or 3 tokens deep: what the depth cannot take goes to height and width at
    their own ratio, so the volume is kept.

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
