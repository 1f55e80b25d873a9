"""Teacher targets over prototypes, and the cross-entropy against them.

Axes: N rows (class tokens or masked patches), K prototypes. All in float32, or float64 when given float64: sums over
65k prototypes lose mass in bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct import collectives
from tapct.config import setting
from tapct.types import TargetSums


@dataclass(frozen=True)
class TargetConfig:
    """How teacher logits become targets."""

    kind: str = setting(
        "centring",
        "centring (DINO, the published TAP-CT runs) or sinkhorn (SwAV, DINOv2)",
        choices=("centring", "sinkhorn"),
    )
    centre_momentum: float = setting(0.9, "c <- m c + (1 - m) mean; DINO, arXiv:2104.14294", ge=0.0, lt=1.0)
    sinkhorn_iterations: int = setting(3, "row and column normalisations; SwAV, arXiv:2006.09882", ge=1)


def as_float(x: Tensor) -> Tensor:
    """float32 at least: bf16 and fp16 are lifted, float64 stays (the oracles run in it)."""
    return x if x.dtype == torch.float64 else x.float()


def sinkhorn(logits_NK: Tensor, temperature: float, iterations: int, valid_N: Tensor | None = None) -> Tensor:
    """Balanced assignment of N rows to K prototypes by Sinkhorn-Knopp, in the log domain.

    Alternates: every prototype gets mass 1/K, every row mass 1/n. The row step comes last, so each target sums to 1.
    The rows of all ranks are one problem: a sum over ranks of K numbers per iteration, and a maximum before the first.

    Args:
        logits_NK: teacher logits.
        temperature: of the teacher.
        iterations: 3 in the published work; not run to convergence.
        valid_N: bool; rows that are False take no part (their targets are a plain softmax). None: all take part.
    Returns:
        targets (N, K), rows sum to 1.
    Source: Cuturi 2013; Caron et al. 2020, arXiv:2006.09882, eq. 3-5.
    """
    scores_NK = as_float(logits_NK) / temperature
    num_prototypes = scores_NK.shape[1]
    outside_N = scores_NK.new_zeros(len(scores_NK))
    if valid_N is not None:
        outside_N = outside_N.masked_fill(~valid_N, -math.inf)
    row_N = outside_N
    column_K = scores_NK.new_zeros(num_prototypes)
    log_rows = scores_NK.new_zeros(())
    for iteration in range(iterations):
        if iteration > 0:
            row_N = outside_N - torch.logsumexp(scores_NK + column_K, dim=1) - log_rows
        mass_K = torch.logsumexp(scores_NK + row_N[:, None], dim=0)
        if collectives.world_size() > 1 or iteration == 0:
            mass_K, log_rows = _mass_of_all_ranks(mass_K, column_K, outside_N > -math.inf, first=iteration == 0)
        # where no row takes part at all, leave the prototypes unscaled instead of making NaN
        column_K = torch.where(mass_K > -math.inf, -mass_K - math.log(num_prototypes), 0.0)
    # the last row step: rows sum to 1
    return torch.softmax(scores_NK + column_K, dim=1)


def _mass_of_all_ranks(mass_K: Tensor, column_K: Tensor, valid_N: Tensor, *, first: bool) -> tuple[Tensor, Tensor]:
    """Log mass of each prototype over the rows of all ranks, and the log number of those rows.

    Args:
        mass_K: log mass over this rank's rows.
        column_K: log scaling of the prototypes so far.
        valid_N: this rank's rows that take part.
        first: before the first scaling, when nothing bounds the masses.
    """
    if collectives.world_size() == 1:
        return mass_K, valid_N.sum().clamp(min=1).to(mass_K.dtype).log()
    # A row step leaves a total mass of 1, so exp(mass + column) <= 1: column is a reference that needs no collective.
    # float64: it holds exp of differences down to -700, which a temperature of 0.01 reaches.
    reference_K = collectives.max_(mass_K.clone()) if first else -column_K
    reference_K = torch.where(reference_K > -math.inf, reference_K, 0.0).double()
    packet = torch.cat([(mass_K.double() - reference_K).exp(), valid_N.sum()[None].double()])
    summed = collectives.sum_(packet)
    return (summed[:-1].log() + reference_K).to(mass_K.dtype), summed[-1].clamp(min=1).log().to(mass_K.dtype)


def soft_cross_entropy(logits_NK: Tensor, targets_NK: Tensor, temperature: float) -> Tensor:
    """-sum_k t_k log softmax(s / temperature)_k for each row: (N, K), (N, K) -> (N,)."""
    return -(targets_NK * F.log_softmax(as_float(logits_NK) / temperature, dim=-1)).sum(-1)


def target_sums(targets_NK: Tensor, real_N: Tensor | None = None) -> TargetSums:
    """Sum up one chunk of teacher targets.

    Args:
        targets_NK: probabilities, each row sums to 1.
        real_N: True for rows that count; all of them by default (a padded token's row does not).
    """
    targets_NK = as_float(targets_NK.detach())
    if real_N is not None:
        targets_NK = targets_NK * real_N.unsqueeze(1)  # a zero row has entropy 0 and no mass
    rows = targets_NK.new_tensor(float(len(targets_NK))) if real_N is None else real_N.to(targets_NK.dtype).sum()
    return TargetSums(targets_NK.sum(0), torch.special.entr(targets_NK).sum(), rows)


class Targets(nn.Module):
    """Turn teacher logits into targets, and keep the state that needs.

    Centring uses in step i the centre made of the steps before i; `finish_step` moves it once per optimizer step, over
    all micro-batches and ranks: the caller sums `pending` over ranks before. Sinkhorn balances the rows of one call on
    all ranks, so with accumulation each micro-batch is a problem of its own.

    Args:
        num_prototypes: K.
        config: kind and constants.
    """

    centre_K: Tensor
    pending_sum_K: Tensor
    pending_count: Tensor

    def __init__(self, num_prototypes: int, config: TargetConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centre_K", torch.zeros(num_prototypes))
        # Checkpoints are written between optimizer steps, when nothing is pending; kept in them all the same.
        self.register_buffer("pending_sum_K", torch.zeros(num_prototypes))
        self.register_buffer("pending_count", torch.zeros(()))

    @torch.no_grad()
    def forward(self, logits_NK: Tensor, temperature: float, valid_N: Tensor | None = None) -> Tensor:
        """Targets of these rows; remembers their mean for the next step's centre.

        Args:
            logits_NK: teacher logits of this micro-batch.
            temperature: of the teacher.
            valid_N: bool, rows that count; None: all.
        Returns:
            (N, K), rows sum to 1.
        """
        if self.config.kind == "sinkhorn":
            return sinkhorn(logits_NK, temperature, self.config.sinkhorn_iterations, valid_N)
        logits_NK = as_float(logits_NK)
        if valid_N is None:
            self.pending_sum_K += logits_NK.sum(0)
            self.pending_count += logits_NK.shape[0]
        else:
            self.pending_sum_K += (logits_NK * valid_N[:, None]).sum(0)
            self.pending_count += valid_N.sum()
        return torch.softmax((logits_NK - self.centre_K) / temperature, dim=-1)

    def pending(self) -> tuple[Tensor, ...]:
        """Buffers that ranks add up before `finish_step`; none for Sinkhorn."""
        return () if self.config.kind == "sinkhorn" else (self.pending_sum_K, self.pending_count)

    @torch.no_grad()
    def finish_step(self, apply: Tensor) -> None:
        """Move the centre by the pending mean, if there is one.

        Args:
            apply: bool scalar on the device; False (a step that was not finite) drops what is pending.
        """
        mean_K = self.pending_sum_K / self.pending_count.clamp(min=1)
        moved_K = self.centre_K.lerp(mean_K, 1 - self.config.centre_momentum)
        self.centre_K.copy_(torch.where(apply & (self.pending_count > 0), moved_K, self.centre_K))
        self.pending_sum_K.zero_()
        self.pending_count.zero_()
