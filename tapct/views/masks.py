"""Block masks of the global crops, with exact counts that the host knows before the step.

Plain form of one crop, whose mask is equal to the bit (tests/views/test_masks.py, `slow_mask`):

    masked, left = no tokens, count
    for r in range(ROUNDS):                              blocks are skipped where count < min_tokens
        volume = min_tokens + max(left - min_tokens, 0) * draws.volume[r]
        left   = left - left * draws.volume[r] * (1 - OVERLAP * count / N)
        block  = box of about that volume, with drawn aspects, at a drawn place in the grid
        for token in block, in raster order:
            if token in scan and len(masked) < count:
                masked.add(token)
    for free in (unmasked scan tokens, unmasked padding tokens):
        first = int(draws.run * len(free))               a run of tokens reaches the exact count;
        masked.add(up to count - len(masked) tokens of free from `first`, from the end to its start)

The code does the same for all crops of a micro-batch at once. All blocks are proposed before any is
placed, and every token has a word of bits:

    bit r < ROUNDS      block r covers the token, and the token is scan
    bit ROUNDS          the token is scan
    bit ROUNDS + 1      always set

So `word & (2^k - 1)` shows whether one of the first k rounds covers a token, where the last two
rounds are the whole scan and then everything. Bisection finds the most rounds that fit into the
count (four steps for 15 rounds), and of the next round as many tokens are masked as are still left.

Axes: B batch, V global views, C = V * B crops (crop-major), P masked crops among them,
N = z * y * x patch tokens of a crop, M masked tokens, R proposed blocks, D drawn numbers.
Source: iBOT (arXiv:2111.07832) and DINOv2's mask collator, in 3D; unlike DINOv2's, the count is
always reached.
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

# Blocks proposed for a crop. With the rounds for scan and padding a word has 15 bits, which an
# int16 holds without its sign.
ROUNDS = 13
# Share of a block that earlier blocks are expected to cover, divided by the masked share of the
# crop. At ratios of 0.1-0.5 blocks give 98.5 % of the masked tokens of a 3x28x28 grid; with 0.5
# they are smaller and give 97 %, with 1 larger and 99.5 % (docs/log.md).
OVERLAP = 0.65
BLOCKS = 2**ROUNDS - 1  # the bits of all blocks


@dataclass(frozen=True)
class Config:
    """The share of the tokens that the student does not see, and the size of the masked blocks.
    Source of the defaults: DINOv2 and TAP-CT's configs.
    """

    probability: float = setting(
        0.5, "share of the global crops of a step that get a mask", ge=0, le=1
    )
    ratio: tuple[float, float] = setting(
        (0.1, 0.5),
        "share of masked tokens: the masked crops of one step get evenly spaced shares between "
        "the two values",
        ge=0,
        le=1,
    )
    min_tokens: int = setting(4, "volume of the smallest block, in tokens", ge=1)
    aspect: tuple[float, float] = setting(
        (0.3, 1 / 0.3),
        "height / width and depth / height of a block in tokens, drawn log-uniformly between "
        "the two values",
        gt=0,
    )

    def __post_init__(self) -> None:
        for name in ("ratio", "aspect"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"masks.{name} is [{low}, {high}]: the lower end comes first")


def counts(
    config: Config, *, num_crops_global: int, num_tokens: int, seed: int, step: int
) -> list[int]:
    """Masked tokens of every global crop of a step, over all ranks and micro-batches.

    Args:
        config: share of masked crops, and range of their masked shares.
        num_crops_global: global views x global batch.
        num_tokens: N.
        seed: seed of the run.
        step: number of the optimizer step; with the seed it decides which crop gets which count.
    Returns:
        One count per crop, 0 where it is not masked, crop-major over the global batch: the crop of
        a sample and a view stands at view * global batch + sample % global batch.
    """
    # 1e-9: 0.29 * 100 is 28.999999999999996 in floats and must count 29 crops; tokens alike
    num_masked = int(num_crops_global * config.probability + 1e-9)
    low, high = config.ratio
    shares = [low + (high - low) * (i + 1) / num_masked for i in range(num_masked)]
    sizes = [int(num_tokens * share + 1e-9) for share in shares]
    bits_C = rng.hash_bits(seed, "mask count", step, torch.arange(num_crops_global))
    order_C = bits_C.argsort(stable=True)
    count_C = torch.zeros(num_crops_global, dtype=torch.int64)
    count_C[order_C[:num_masked]] = torch.tensor(sizes, dtype=torch.int64)
    return count_C.tolist()


def draw(
    counts_VB: Sequence[int],
    grid: tuple[int, int, int],
    in_scan_VBN: Tensor,
    sample_B: Tensor,
    config: Config,
    seed: int,
) -> Masks:
    """Draw the masks of a micro-batch, all crops at once, without waiting for the device.

    Keyed by (seed, sample, view): a crop's mask depends on its own count and scan alone.

    Args:
        counts_VB: masked tokens of each crop, exact, crop-major, on the host; 0 to N each.
        grid: tokens along (z, y, x).
        in_scan_VBN: bool, False for padding, which is masked only where the scan tokens do not
            suffice, and then has weight 0.
        sample_B: int64, numbers of the samples, below 2^43.
        config: sizes and aspects of blocks.
        seed: seed of the run.
    """
    count_C = np.array(counts_VB, dtype=np.int64)
    is_masked_C = count_C > 0
    # row of each crop among the P masked ones; all other crops share one empty row after these
    row_C = np.where(is_masked_C, is_masked_C.cumsum() - 1, is_masked_C.sum())
    row_C, repeat_C = _to_device(np.stack([row_C, count_C]), in_scan_VBN.device)
    chosen_PN = choose(count_C, grid, in_scan_VBN, sample_B, config, seed).chosen_PN
    masked_CN = torch.cat([chosen_PN, chosen_PN.new_zeros(1, chosen_PN.shape[1])])[row_C]
    real_CN = masked_CN & in_scan_VBN.flatten(0, 1)
    weight_C = real_CN.sum(1, dtype=torch.int32).clamp_(min=1).to(torch.float32).reciprocal_()
    num_masked = int(count_C.sum())
    index_M = _indices(masked_CN.flatten(), num_masked)
    # without its output size, repeat_interleave would wait for the device to learn it
    weight_M = torch.repeat_interleave(weight_C, repeat_C, output_size=num_masked)
    # as uint8: a CPU selects bytes faster than bools
    weight_M *= real_CN.view(torch.uint8).flatten().index_select(0, index_M).to(torch.float32)
    return Masks(masked_CN.view_as(in_scan_VBN), index_M, weight_M)


def _to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Copy host numbers to the device, from pinned memory, so that nothing waits."""
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def _indices(masked: Tensor, num_masked: int) -> Tensor:
    """Ascending indices of the True entries; the host knows their number, so nothing waits for the
    device.
    """
    if masked.device.type == "cpu":  # numpy's nonzero takes a quarter of the time of what follows
        return torch.from_numpy(masked.numpy().nonzero()[0])
    # every True entry goes to its rank, every False entry to one place after the last, cut off
    rank = torch.where(masked, masked.cumsum(0) - 1, num_masked)
    index = torch.zeros(num_masked + 1, dtype=torch.int64, device=masked.device)
    return index.scatter_(0, rank, torch.arange(len(masked), device=masked.device))[:num_masked]


@dataclass(frozen=True)
class Choice:
    """The masked tokens of the P crops and the blocks that they come from.

    Args:
        chosen_PN: bool, exactly as many as the count.
        word_PN: int16 or int32, the bits of each token; see the top of this file.
        first_P1: bits of the first rounds, all of whose tokens are masked.
        left_P1: masked tokens of the next round.
        sides_3RP: float64, (z, y, x) of the proposed blocks in tokens.
    """

    chosen_PN: Tensor
    word_PN: Tensor
    first_P1: Tensor
    left_P1: Tensor
    sides_3RP: Tensor


@torch.inference_mode()  # nothing here has a gradient, and it is a tenth faster than no_grad
def choose(
    count_C: np.ndarray,
    grid: tuple[int, int, int],
    in_scan_VBN: Tensor,
    sample_B: Tensor,
    config: Config,
    seed: int,
) -> Choice:
    """Propose blocks for every crop whose count is not 0, and mask as many as fit into the count.

    Args:
        count_C: masked tokens of each crop, on the host; the other arguments are those of `draw`.
    """
    num_views, batch, num_tokens = in_scan_VBN.shape
    assert num_tokens == math.prod(grid) and len(count_C) == num_views * batch
    assert ((count_C >= 0) & (count_C <= num_tokens)).all()
    some_P = count_C.nonzero()[0]
    numbers_4P = np.stack([count_C[some_P], some_P, some_P // batch, some_P % batch])
    count_P, crop_P, view_P, sample_row_P = _to_device(numbers_4P, in_scan_VBN.device)
    draw_DP = _uniforms(sample_B[sample_row_P], view_P, seed)
    shape_3RP, place_3RP = draw_DP[:-1].unflatten(0, (2, 3, ROUNDS))
    sides_3RP = _sides(count_P.to(torch.float64), shape_3RP, grid, config)
    outside_PN = _outside(sides_3RP, place_3RP, (count_P < config.min_tokens)[:, None], grid)
    in_scan_PN = in_scan_VBN.flatten(0, 1)[crop_P].to(outside_PN.dtype)
    # turn "outside of block r" into "covered by block r" and set the bit of the scan; clear the
    # words that are padding; set the last bit of all
    word_PN = outside_PN.bitwise_xor_(2 * BLOCKS + 1).mul_(in_scan_PN).bitwise_or_(2 * BLOCKS + 2)
    count_P1 = count_P.to(word_PN.dtype)[:, None]
    first_P1 = _rounds_that_fit(word_PN, count_P1)
    whole_PN = _covered(word_PN, first_P1)
    left_P1 = count_P1 - whole_PN.sum(1, True, dtype=word_PN.dtype)
    next_PN = _covered(word_PN, 2 * first_P1 + 1).sub_(whole_PN)
    run_PN = _run(next_PN, left_P1, draw_DP[-1, :, None] * (first_P1 >= BLOCKS))
    return Choice(whole_PN.add_(run_PN).bool(), word_PN, first_P1, left_P1, sides_3RP)


def _rounds_that_fit(word_PN: Tensor, count_P1: Tensor) -> Tensor:
    """Bits (P, 1) of the most first rounds that together cover no more tokens than the count."""
    first_P1 = torch.zeros_like(count_P1)
    for step in (8, 4, 2, 1):  # bisection over 0 to 15 rounds
        more_P1 = (first_P1 << step) + (2**step - 1)
        num_P1 = _covered(word_PN, more_P1).sum(1, True, dtype=word_PN.dtype)
        first_P1 = torch.where(num_P1 <= count_P1, more_P1, first_P1)
    return first_P1


def _run(token_PN: Tensor, length_P1: Tensor, start_P1: Tensor) -> Tensor:
    """A run of `length` tokens among those of a round: 1 for these, else 0; changes `token_PN`.

    A block keeps its first tokens, so its run starts at 0. A run in the scan or in padding starts
    anywhere and continues at the first token after the last.

    Args:
        token_PN: 1 for tokens of the round, else 0.
        length_P1: tokens to take.
        start_P1: start of the run in [0, 1), as a share of the tokens.
    """
    rank_PN = token_PN.cumsum(1, dtype=token_PN.dtype)  # 1 for the first token of the round
    num_P1 = rank_PN[:, -1:].clone()
    # distance from the start of the run; tokens before it come after the last
    rank_PN -= (start_P1 * num_P1).to(token_PN.dtype) + 1
    rank_PN += _negative(rank_PN) & num_P1
    # below the length of the run; `negative` gives all bits, of which `token` keeps one
    return token_PN.bitwise_and_(_negative(rank_PN.sub_(length_P1)))


def _uniforms(sample_P: Tensor, view_P: Tensor, seed: int) -> Tensor:
    """The D = 6 * ROUNDS + 1 numbers of each mask, (D, P) float64 in [0, 1), multiples of 2^-16.

    A block takes six: volume, two aspects and a place along three axes; the run takes one. A hash
    of 64 bits gives four numbers.
    """
    num = 6 * ROUNDS + 1
    hash_H = torch.arange((num + 3) // 4, device=sample_P.device)
    # sample, view and number of the hash side by side in one counter: 43 + 12 + 8 bits
    key_P = (sample_P << 20) + (view_P << 8)
    bits_PH = rng.hash_bits(seed, "mask", key_P[:, None] + hash_H)
    parts_DP = bits_PH.view(torch.int16).T[:num]
    # contiguous: rows of numbers, not columns, are read by all that follows; + 0.5, since an int16
    # runs from -2^15
    return parts_DP.to(torch.float64, memory_format=torch.contiguous_format) * 2.0**-16 + 0.5


def _sides(count_P: Tensor, draw_3RP: Tensor, grid: tuple[int, int, int], config: Config) -> Tensor:
    """Sides (z, y, x) of the proposed blocks in tokens, (3, R, P) float64.

    A volume is uniform between `min_tokens` and what earlier blocks are expected to leave. float64:
    devices differ in the last bits, and a difference of float32's size would change whole numbers.
    """
    volume_RP = draw_3RP[0]
    low, high = math.log(config.aspect[0]), math.log(config.aspect[1])
    height_width_RP, depth_height_RP = (draw_3RP[1:] * (high - low) + low).exp_()
    stays_RP = 1 - volume_RP * (1 - OVERLAP / math.prod(grid) * count_P)
    left_RP = count_P * stays_RP.cumprod(0) / stays_RP  # before each block, not after it
    volume_RP = (left_RP - config.min_tokens).clamp_(min=0) * volume_RP + config.min_tokens
    return torch.stack(block_sides(volume_RP, height_width_RP, depth_height_RP, grid))


def _outside(
    sides_3RP: Tensor, place_3RP: Tensor, none_P1: Tensor, grid: tuple[int, int, int]
) -> Tensor:
    """Words (P, N) whose bit r shows that block r does not cover the token: its z, its y or its x
    is outside.

    Args:
        sides_3RP: sides of the blocks along (z, y, x).
        place_3RP: place in [0, 1), from one end of the grid to the other.
        none_P1: bool, crops that get no block.
        grid: tokens along (z, y, x).
    """
    # a word holds the bits of all rounds, and also any count of tokens
    dtype = torch.int16 if math.prod(grid) < 2**15 else torch.int32
    round_R11 = torch.arange(ROUNDS, device=none_P1.device, dtype=dtype)[:, None, None]
    bit_R11 = torch.ones_like(round_R11) << round_R11
    last_3RP1 = (sides_3RP - 1).to(dtype)[..., None]
    size_311 = _to_device(np.array(grid), none_P1.device)[:, None, None]
    start_3RP1 = (place_3RP * (size_311 + 1 - sides_3RP)).to(dtype)[..., None]
    # one line of L = max(grid) tokens per axis; a token is in the block at offsets 0 to `last`, so
    # outside where the offset or `last - offset` is negative
    line_L = torch.arange(max(grid), device=none_P1.device, dtype=dtype)
    offset_3RPL = line_L - start_3RP1
    negative_3RPL = _negative((last_3RP1 - offset_3RPL).bitwise_or_(offset_3RPL))
    # every round has a bit of its own, so a sum is an OR of all
    lines_3PL = negative_3RPL.bitwise_and_(bit_R11).sum(1, dtype=dtype)
    z_PL, y_PL, x_PL = (line_PL[:, :size] for line_PL, size in zip(lines_3PL, grid, strict=True))
    z_PL |= none_P1 * BLOCKS
    yx_PL = (y_PL[:, :, None] | x_PL[:, None, :]).flatten(1)
    return (z_PL[:, :, None] | yx_PL[:, None, :]).flatten(1)


def _covered(word_PN: Tensor, rounds_P1: Tensor) -> Tensor:
    """1 where one of these rounds covers the token, else 0."""
    return (word_PN & rounds_P1).clamp_(max=1)


def _negative(number: Tensor) -> Tensor:
    """All bits where an int16 or int32 is negative, else none; on a CPU a comparison takes ten
    times as long.
    """
    return number >> (8 * number.element_size() - 1)


def block_sides(
    volume: Tensor, height_width: Tensor, depth_height: Tensor, grid: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole sides (z, y, x) of blocks of about that volume, each at least 1 and at most the grid.

    A grid is often only 1 or 3 tokens deep: what exceeds its depth goes to height and width at
    their own ratio, so the volume is kept.

    Args:
        volume: volume in tokens, float.
        height_width: height / width, float.
        depth_height: depth / height, float; not kept where the grid is too shallow.
        grid: tokens along (z, y, x).
    """
    # height^3 * (depth / height) / (height / width) = volume
    height = (volume * height_width / depth_height).pow(1 / 3)
    depth = (height * depth_height).round().clamp(1, grid[0])
    area = volume / depth
    height = (area * height_width).sqrt().round().clamp(1, grid[1])
    width = (area / height_width).sqrt().round().clamp(1, grid[2])
    return depth, height, width
