"""Sinkhorn-Knopp targets in the log domain, with scores computed by chunks of rows.

Plain form, with every score in memory (tests/nn/test_prototype_loss.py), over the N valid rows of
all ranks:

    Q = exp(scores - max(scores)).T                              K x N
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = Q / (Q.sum over rows of each prototype * K)          every prototype gets the same mass
        Q = Q / (Q.sum over prototypes of each row * N)          every row is a distribution
    targets = N Q.T

Q is always exp(scores) times a factor per prototype times a factor per row. The factor of a row
after its step is that of a softmax, so the targets are softmax(scores + bias_K), and the bias is
all that has to be kept.

Axes: G teacher views, B rows of a view, P rows of a piece of a chunk, N rows of all views of a
piece, K prototypes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tapct.distributed import collectives
from tapct.nn.prototype_scores import Chunks, TeacherScores, softmax


@torch.no_grad()
def sinkhorn_bias(teacher: TeacherScores, iterations: int) -> Tensor:
    """The bias (K,) for which softmax(scores + bias) is the Sinkhorn-Knopp targets of the valid
    rows of all ranks.

    Scores are computed again in every iteration. Ranks exchange K numbers: one sum per iteration,
    and a maximum before the first.

    Args:
        teacher: scores with a bias of 0.
        iterations: normalisations of prototypes and rows; 3 in the published work.
    Source: Cuturi 2013; Caron et al. 2020, arXiv:2006.09882, eq. 3-5.
    """
    num_views, num_rows, _ = teacher.features_GBW.shape
    like = teacher.bias_K
    valid_B = teacher.valid_B
    if valid_B is None:
        valid_B = torch.ones(num_rows, dtype=torch.bool, device=like.device)
    teacher = teacher.narrowed()
    with torch.autocast(like.device.type, enabled=False):
        chunks = Chunks(num_rows, num_views, teacher.prototypes_KW, like.dtype)
        top_K, sum_K = _prototype_sums(teacher, valid_B, chunks)
        mass_K, count = _over_ranks(top_K, sum_K, (num_views * valid_B.sum()).double())
        bias_K = _even_out(mass_K)
        for _ in range(iterations - 1):
            # the step over rows is a softmax; the mass of a prototype is its sum over rows, from
            # which the bias has to be taken away again
            biased, sum_K = replace(teacher, bias_K=bias_K), torch.zeros_like(like)
            for rows, scores_GPK in biased.pieces(chunks):
                targets_GPK = softmax(scores_GPK, scores_GPK.flatten(0, 1))
                weight_N = valid_B[rows].to(like.dtype).repeat(num_views)
                sum_K += weight_N @ targets_GPK.flatten(0, 1)
            # float64: a sum over all ranks
            mean_K = collectives.sum_(sum_K.double()) / count
            bias_K = _even_out(mean_K.log().to(like.dtype) - bias_K)
    return bias_K


def _even_out(mass_K: Tensor) -> Tensor:
    """The bias that gives every prototype the mass 1 / K, from the log of its mass without bias; 0
    where there are no rows, instead of NaN.
    """
    return torch.where(mass_K > -math.inf, -mass_K - math.log(len(mass_K)), 0.0)


def _prototype_sums(
    teacher: TeacherScores, valid_B: Tensor, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Largest score of each prototype over valid rows, and its sum of exp(score - largest): (K,)
    each.

    Before the first normalisation scores have no bound, and at a temperature of 0.01 their exp
    overflows. A piece with a larger score rescales the sum so far.
    """
    like = teacher.bias_K
    outside_B = like.new_zeros(len(valid_B)).masked_fill(~valid_B, -math.inf)
    top_K, sum_K = torch.full_like(like, -math.inf), torch.zeros_like(like)
    for rows, scores_GPK in teacher.pieces(chunks):
        scores_GPK.add_(outside_B[rows, None])
        largest_K = torch.maximum(top_K, scores_GPK.amax((0, 1)))
        # -inf - -inf would be NaN while no row is valid
        shift_K = torch.where(largest_K > -math.inf, largest_K, 0.0)
        sum_K = sum_K * (top_K - shift_K).exp() + scores_GPK.sub_(shift_K).exp_().sum((0, 1))
        top_K = largest_K
    return torch.where(top_K > -math.inf, top_K, 0.0), sum_K


def _over_ranks(top_K: Tensor, sum_K: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the sum over ranks of sum * exp(top), (K,), and the rows of all ranks, at least 1."""
    if collectives.world_size() == 1:
        return sum_K.log() + top_K, count.clamp(min=1)
    reference_K = collectives.max_(top_K.clone())
    # float64 holds the exp of differences down to -700, float32 only down to -87
    mine_K = sum_K.double() * (top_K.double() - reference_K).exp()
    summed = collectives.sum_(torch.cat([mine_K, count[None]]))
    return (summed[:-1].log() + reference_K).to(sum_K.dtype), summed[-1].clamp(min=1)
