"""Statistics of block masks: how many blocks a crop has, their sizes and aspects, and which share
of the masked tokens they give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tapct.views import masks
from tapct.views.masks import Choice


@dataclass(frozen=True)
class Statistics:
    """Statistics of the masks of some crops; quantiles are those of 5, 50 and 95 % of all blocks.

    Args:
        blocks: mean number of blocks in a masked crop.
        share_in_blocks: share of the masked tokens that blocks gave; the others are a run that
            reaches the exact count.
        volume: volume of a block in tokens, with the tokens that are outside of the scan, masked
            already or trimmed.
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
    config: masks.Config,
    seed: int,
) -> Statistics:
    """Statistics of the masks that `masks.draw` gives for the same arguments.

    Raises:
        ValueError: no block was placed.
    """
    count_C = np.array(counts_VB, dtype=np.int64)
    choice = masks.choose(count_C, grid, in_scan_VBN, sample_B, config, seed)
    depth, height, width = choice.sides_3RP[:, placed_RP(choice)]
    if not len(depth):
        raise ValueError(
            f"no crop of counts {max(counts_VB, default=0)} or less got a block; mask more tokens"
        )
    at = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device=depth.device)
    return Statistics(
        blocks=len(depth) / len(choice.chosen_PN),
        share_in_blocks=float(in_blocks_PN(choice).sum() / choice.chosen_PN.sum()),
        volume=tuple((depth * height * width).quantile(at).tolist()),
        height_width=tuple((height / width).quantile(at).tolist()),
        depth_height=tuple((depth / height).quantile(at).tolist()),
    )


def in_blocks_PN(choice: Choice) -> Tensor:
    """The masked tokens that blocks gave, (P, N) bool."""
    return choice.chosen_PN & (choice.word_PN & masks.BLOCKS).bool()


def placed_RP(choice: Choice) -> Tensor:
    """The blocks that are masked, whole or trimmed, (R, P) bool."""
    bits_P1 = torch.where(choice.left_P1 > 0, 2 * choice.first_P1 + 1, choice.first_P1)
    bits_P1 = bits_P1 * (choice.word_PN & masks.BLOCKS).any(1, keepdim=True)
    round_R1 = torch.arange(masks.ROUNDS, device=bits_P1.device)[:, None]
    return ((bits_P1.T >> round_R1) & 1).bool()
