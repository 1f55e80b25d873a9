"""Sinkhorn-Knopp in the log domain: two scaling vectors, logits recomputed by chunk."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tapct.distributed import collectives
from tapct.nn.prototype_loss import _softmax
from tapct.nn.prototype_scores import Chunks, TeacherScores


@torch.no_grad()
def sinkhorn_bias(teacher: TeacherScores, iterations: int) -> Tensor:
    """The bias that makes `softmax(scores + bias)` the Sinkhorn-Knopp targets of all ranks' valid
    rows: (K,).

    Only the scaling of the K prototypes is kept; that of a row is its softmax. Scores are computed
    anew in every iteration. One sum over ranks of K numbers per iteration, and a maximum before the
    first.

    Args:
        teacher: scores, with a bias of 0.
        iterations: of prototypes and rows; 3 in the published work.
    Source: Cuturi 2013; Caron et al. 2020, arXiv:2006.09882, eq. 3-5.
    """
    num_views, num_rows, _ = teacher.features_GBW.shape
    like = teacher.bias_K
    valid_B = (
        torch.ones(num_rows, dtype=torch.bool, device=like.device)
        if teacher.valid_B is None
        else teacher.valid_B
    )
    teacher = teacher.narrowed()
    with torch.autocast(like.device.type, enabled=False):
        chunks = Chunks(num_rows, num_views, teacher.prototypes_KW, like.dtype)
        scores_NK = chunks.memory(num_views)
        top_K, sum_K = _prototype_sums(teacher, valid_B, chunks, scores_NK)
        mass_K, count = _over_ranks(top_K, sum_K, (num_views * valid_B.sum()).double())
        bias_K = _even_out(mass_K)
        for _ in range(iterations - 1):
            # a row step makes a softmax over prototypes of each row; what it gives them is that
            # over the number of rows
            scaled, sum_K = replace(teacher, bias_K=bias_K), torch.zeros_like(like)
            for rows in chunks.ranges:
                targets_NK = _softmax(scaled.chunk(rows, chunks, scores_NK), scores_NK).flatten(
                    0, 1
                )
                sum_K += valid_B[rows].to(like.dtype).repeat(num_views) @ targets_NK
            bias_K = _even_out(
                (collectives.sum_(sum_K.double()) / count).log().to(like.dtype) - bias_K
            )
    return bias_K


def _even_out(mass_K: Tensor) -> Tensor:
    """The bias that gives every prototype the same mass; 0 where no row takes part at all, instead
    of NaN.
    """
    return torch.where(mass_K > -math.inf, -mass_K - math.log(len(mass_K)), 0.0)


def _prototype_sums(
    teacher: TeacherScores, valid_B: Tensor, chunks: Chunks, scores_NK: Tensor
) -> tuple[Tensor, Tensor]:
    """Largest score of each prototype over valid rows, and the sum of exp(score - largest): both
    (K,).

    Nothing bounds the scores before the first scaling, and at a temperature of 0.01 their exp
    overflows.
    """
    like = teacher.bias_K
    outside_B = like.new_zeros(len(valid_B)).masked_fill(~valid_B, -math.inf)
    top_K, sum_K = torch.full_like(like, -math.inf), torch.zeros_like(like)
    for rows in chunks.ranges:
        scores_GCK = teacher.chunk(rows, chunks, scores_NK).add_(outside_B[rows, None])
        largest_K = torch.maximum(top_K, scores_GCK.amax((0, 1)))
        shift_K = torch.where(largest_K > -math.inf, largest_K, 0.0)
        sum_K = sum_K * (top_K - shift_K).exp() + scores_GCK.sub_(shift_K).exp_().sum((0, 1))
        top_K = largest_K
    return torch.where(top_K > -math.inf, top_K, 0.0), sum_K


def _over_ranks(top_K: Tensor, sum_K: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """log of the sum over ranks of sum * exp(top), (K,), and the number of rows of all ranks, at
    least 1.
    """
    if collectives.world_size() == 1:
        return sum_K.log() + top_K, count.clamp(min=1)
    reference_K = collectives.max_(top_K.clone())
    mine_K = (
        sum_K.double() * (top_K.double() - reference_K).exp()
    )  # float64 holds exp of differences down to -700
    summed = collectives.sum_(torch.cat([mine_K, count[None]]))
    return (summed[:-1].log() + reference_K).to(sum_K.dtype), summed[-1].clamp(min=1)
