"""Building blocks of the transformer: scales, feed-forwards, and stochastic depth by subsets of
crops.

T packed tokens (see `attention`), S rows of the crops that are kept, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct.base import rng
from tapct.nn.backends import Span, Spans
from tapct.nn.lean import DeferredLinear, DeferredRows, linear_of


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch.

    Source: Touvron et al. 2021, arXiv:2103.17239.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x_TD: Tensor | DeferredLinear) -> Tensor:
        """gamma * x, (T, D) -> (T, D)."""
        if isinstance(x_TD, DeferredLinear):
            return x_TD.compute(self.gamma)
        return x_TD * self.gamma


class NoScale(nn.Module):
    """Takes the place of LayerScale in a model without it."""

    def forward(self, x_TD: Tensor | DeferredLinear) -> Tensor:
        """x, (T, D) -> (T, D)."""
        return x_TD.compute() if isinstance(x_TD, DeferredLinear) else x_TD


class Mlp(nn.Module):
    """Two linear layers with exact GELU between; D -> hidden -> D."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_TD: Tensor | DeferredRows) -> Tensor | DeferredLinear:
        """fc2(gelu(fc1(x))), (T, D) -> (T, D); deferred if the input is."""
        hidden = DeferredRows(F.gelu, (linear_of(self.fc1, x_TD),))
        y_TD = DeferredLinear(self.fc2, hidden)
        return y_TD if isinstance(x_TD, DeferredRows) else y_TD.compute()


def swiglu_hidden(hidden: int) -> int:
    """Width that gives SwiGLU about the parameters of an MLP of width `hidden`: 2/3, rounded up to
    8 as in DINOv2.
    """
    return (int(hidden * 2 / 3) + 7) // 8 * 8


class SwiGLU(nn.Module):
    """Gated feed-forward, w3(silu(a) * b) with (a, b) = w12(x). Source: Shazeer 2020,
    arXiv:2002.05202; DINOv2.

    Args:
        dim: channels D.
        hidden: width of the MLP that it replaces; its own is `swiglu_hidden(hidden)`.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        width = swiglu_hidden(hidden)
        self.w12 = nn.Linear(dim, 2 * width)
        self.w3 = nn.Linear(width, dim)

    def forward(self, x_TD: Tensor | DeferredRows) -> Tensor | DeferredLinear:
        """w3(silu(a) * b) with (a, b) = w12(x), (T, D) -> (T, D); deferred if the input is."""
        hidden = DeferredRows(_gate, (linear_of(self.w12, x_TD),))
        y_TD = DeferredLinear(self.w3, hidden)
        return y_TD if isinstance(x_TD, DeferredRows) else y_TD.compute()


def _gate(both_TF: Tensor) -> Tensor:
    """silu(a) * b of the two halves."""
    gate, value = both_TF.chunk(2, dim=-1)
    return F.silu(gate) * value


@dataclass(frozen=True)
class DropKey:
    """Key of the draws of stochastic depth: equal keys give equal subsets.

    Args:
        seed: seed of the run.
        step: number of the optimizer step.
        micro: number of the micro-batch within the step.
        rank: rank of the process.
    """

    seed: int
    step: int
    micro: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Subset:
    """The crops that one residual branch works on.

    Args:
        row_S: int64, kept rows of the packed axis, ascending.
        spans: runs of crops of equal length among the kept rows.
        scales: crops / kept crops of each group; numbers of the host, which no mixed-precision
            policy rounds.
    """

    row_S: Tensor
    spans: Spans
    scales: tuple[float, ...]

    def take(self, x_TD: Tensor) -> Tensor:
        """The rows of the kept crops: (T, D) -> (S, D)."""
        return x_TD.index_select(0, self.row_S)

    def add(self, x_TD: Tensor, residual_SD: Tensor) -> Tensor:
        """x plus the scaled residual of the kept crops, (T, D).

        The mean over draws is x plus the residual of all crops.
        """
        sum_TD = x_TD.clone()
        rows = [span.rows for span in self.spans]
        parts = zip(
            self.row_S.split(rows), residual_SD.to(x_TD.dtype).split(rows), self.scales, strict=True
        )
        for row_s, residual_sD, scale in parts:
            if torch.compiler.is_compiling():  # with alpha, every scale would be a new graph
                sum_TD.index_add_(0, row_s, residual_sD * scale)
            else:
                sum_TD.index_add_(0, row_s, residual_sD, alpha=scale)
        return sum_TD


def kept_crops(num_crops: int, drop: float, rounding: str, uniform: float) -> int:
    """Number of crops of a group that keep the branch: num_crops * (1 - drop), at least 1.

    Args:
        num_crops: crops of the group.
        drop: share of crops that skip the branch.
        rounding: "stochastic" rounds up with the chance of the fraction, so the mean is exact;
            "dinov2" truncates, which drops half of 2 crops at drop 0.1.
        uniform: random number in [0, 1) that decides the stochastic rounding.
    Source: DINOv2, drop_add_residual_stochastic_depth.
    """
    keep = num_crops * (1 - drop)
    whole = math.floor(keep)
    return max(whole + int(rounding == "stochastic" and uniform < keep - whole), 1)


def draw_subsets(
    spans: Spans, *, branches: int, drop: float, rounding: str, key: DropKey, device: torch.device
) -> list[Subset | None]:
    """Draw, for each residual branch of the model, the random subset of crops that goes through it.

    Every branch and every run of equal lengths (crop group) has a draw of its own, uniform over
    subsets of its size. The sizes are drawn on the host, so that nothing waits for the device.

    Args:
        spans: runs of crops of the packed batch.
        branches: residual branches of the model, two per block.
        drop: share of crops that skip a branch, 0 <= drop < 1.
        rounding: rounding of the number of kept crops, see `kept_crops`.
        key: key of all draws.
        device: device of the rows.
    Returns:
        One entry per branch; None where all crops are kept.
    """
    counters = (key.step, key.micro, key.rank)
    order, starts, start = [], [], 0
    for group, span in enumerate(spans):
        branch_L1 = torch.arange(branches, device=device)[:, None]
        crop_B = torch.arange(span.crops, device=device)
        bits_LB = rng.hash_bits(
            key.seed, "drop_path/crops", *counters, group, branch_L1, crop_B, device=device
        )
        # the order of random numbers is a random permutation; its first crops are the kept ones
        order.append(bits_LB.argsort(dim=1))
        starts.append(start)
        start += span.rows
    subsets: list[Subset | None] = []
    for branch in range(branches):
        kept = []
        for group, span in enumerate(spans):
            bits = rng.hash_int(key.seed, "drop_path/count", *counters, group, branch)
            uniform = ((bits >> 40) & 0xFFFFFF) / 2**24  # the upper 24 bits, as in rng.uniform
            kept.append(kept_crops(span.crops, drop, rounding, uniform))
        if all(count == span.crops for count, span in zip(kept, spans, strict=True)):
            subsets.append(None)
            continue
        chosen = [order[group][branch, :count].sort().values for group, count in enumerate(kept)]
        subsets.append(_subset(spans, starts, chosen))
    return subsets


def _subset(spans: Spans, starts: Sequence[int], chosen: Sequence[Tensor]) -> Subset:
    """Turn chosen crops of each group (int64 indices, ascending) into packed rows."""
    rows = []
    for span, start, crop_s in zip(spans, starts, chosen, strict=True):
        token_N = torch.arange(start, start + span.tokens, device=crop_s.device)
        rows.append((crop_s[:, None] * span.tokens + token_N).flatten())
    kept_spans = tuple(
        Span(len(crop_s), span.tokens) for span, crop_s in zip(spans, chosen, strict=True)
    )
    scales = tuple(a.crops / b.crops for a, b in zip(spans, kept_spans, strict=True))
    return Subset(torch.cat(rows), kept_spans, scales)
