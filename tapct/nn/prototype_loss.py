"""Cross-entropy over prototypes without ever holding all scores: last layer, softmax, targets, gradients by chunk.

    scores   = student features P' / student temperature              V student views x B rows x K
    targets  = softmax(teacher features Q' / teacher temperature + bias)    G teacher views x B rows x K
    loss     = sum_v,b weight_vb * sum_g CE(scores_vb, targets_gb)     with `cross`: without g = v
    dscores  = weight_vb * (n_v softmax(scores_vb) - sum_g targets_gb) / student temperature

Centring is a bias of -centre / temperature, Sinkhorn a bias found by `sinkhorn_bias`; so both are one softmax. All is
made for a chunk of rows b, used, and forgotten. The gradients with respect to features and prototypes are made in the
forward pass, from scores that are at hand, and only scaled in the backward pass: four matrix products per row (scores
of teacher and student, two gradients), the fewest there are. Memory beside the inputs, whatever the number of rows: a
gradient of the size of the prototypes, and two chunks of scores, which every chunk takes over from the one before;
with `cross` two or three more for what views are compared with. Under autocast the products are in its dtype, and half
a chunk more.

V student views, G teacher views, B rows of a view, C rows of a chunk, W bottleneck width, K prototypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tapct import collectives
from tapct.types import TargetSums

CHUNK_BYTES = 1 << 26  # of one chunk of float32 scores


class Chunks:
    """Row ranges whose scores take about `CHUNK_BYTES`, and memory for those of one of them.

    It is used again for every range: fresh pages from the system cost a CPU half as much as the product in them.
    """

    def __init__(self, num_rows: int, views: int, like_KW: Tensor, dtype: torch.dtype) -> None:
        """
        Args:
            num_rows: of each of the views.
            like_KW: prototypes in the dtype of the products.
            dtype: of the scores.
        """
        num_prototypes = len(like_KW)
        rows = min(max(1, CHUNK_BYTES // (dtype.itemsize * num_prototypes * views)), num_rows)
        self.ranges = [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, max(rows, 1))]
        self.rows, self.dtype, self.like_KW = rows, dtype, like_KW
        self.wide = dtype == like_KW.dtype
        self.narrow_NK = like_KW.new_empty(0 if self.wide else rows * views, num_prototypes)

    def memory(self, views: int) -> Tensor:
        """For the scores of so many views of one range: (N, K)."""
        return self.like_KW.new_empty(self.rows * views, len(self.like_KW), dtype=self.dtype)

    def product(self, features_NW: Tensor, prototypes_KW: Tensor, into_NK: Tensor) -> Tensor:
        """features @ prototypes.T in the first N rows of that memory."""
        into_NK = into_NK[: len(features_NW)]
        if self.wide:
            return torch.mm(features_NW, prototypes_KW.T, out=into_NK)
        return into_NK.copy_(torch.mm(features_NW, prototypes_KW.T, out=self.narrow_NK[: len(features_NW)]))

    def narrowed(self, wide_NK: Tensor) -> Tensor:
        """The same numbers in the dtype of the products."""
        return wide_NK if self.wide else self.narrow_NK[: len(wide_NK)].copy_(wide_NK)


@dataclass(frozen=True)
class TeacherScores:
    """Teacher scores that are never written out: features times prototypes.

    Args:
        features_GBW: on the unit sphere.
        prototypes_KW: the effective last layer.
        temperature: of the teacher.
        bias_K: added to the scores after the temperature.
        valid_B: bool, rows that count in targets' statistics and centre; None: all.
    """

    features_GBW: Tensor
    prototypes_KW: Tensor
    temperature: float
    bias_K: Tensor
    valid_B: Tensor | None = None

    def chunk(self, rows: slice, chunks: Chunks, into_NK: Tensor) -> Tensor:
        """Scores after temperature and bias: (G, C, K), in that memory."""
        features_GCW = self.features_GBW[:, rows]
        features_NW, scale = features_GCW.flatten(0, 1), 1.0 / self.temperature
        scaled_NK = into_NK[: len(features_NW)]
        if chunks.wide:
            torch.addmm(self.bias_K, features_NW, self.prototypes_KW.T, alpha=scale, out=scaled_NK)
        else:
            chunks.product(features_NW, self.prototypes_KW, into_NK).mul_(scale).add_(self.bias_K)
        return scaled_NK.unflatten(0, features_GCW.shape[:2])

    def narrowed(self) -> TeacherScores:
        """The same with features and prototypes rounded to the dtype in which the product is to be made."""
        dtype = product_dtype(self.features_GBW)
        return replace(self, features_GBW=self.features_GBW.to(dtype), prototypes_KW=self.prototypes_KW.to(dtype))

    def sum_of_scores(self) -> tuple[Tensor, Tensor]:
        """Sum over valid rows of the plain scores, (K,), and the number of these rows: what the centre is made of."""
        num_views, num_rows, _ = self.features_GBW.shape
        if self.valid_B is None:
            sum_W, count = self.features_GBW.sum((0, 1)), self.features_GBW.new_tensor(float(num_views * num_rows))
        else:
            sum_W = (self.features_GBW * self.valid_B[:, None]).sum((0, 1))
            count = num_views * self.valid_B.sum().to(sum_W.dtype)
        return self.prototypes_KW @ sum_W, count


def pair_up(features_RW: Tensor, prototypes_KW: Tensor) -> tuple[Tensor, Tensor]:
    """For a head's `then`: hand out what it got; a plain last layer as a copy, since FSDP frees it after the call."""
    return features_RW, prototypes_KW.clone() if isinstance(prototypes_KW, nn.Parameter) else prototypes_KW


@dataclass(frozen=True)
class PrototypeLoss:
    """What the fused loss gives.

    Args:
        value: scalar with a gradient, the weighted sum.
        ce_VB: sum over teacher views of the cross-entropy of each student row, detached.
        sums: over the targets of valid rows, detached.
    """

    value: Tensor
    ce_VB: Tensor
    sums: TargetSums


def prototype_loss(
    student_VBW: Tensor,
    prototypes_KW: Tensor,
    weight_VB: Tensor,
    teacher: TeacherScores,
    student_temp: float,
    cross: bool,
) -> PrototypeLoss:
    """The fused loss; see the top of this file.

    Args:
        student_VBW: student features on the unit sphere; rows b of all views belong to row b of the teacher.
        prototypes_KW: the student's effective last layer.
        weight_VB: factor on the cross-entropy of each row; no gradient flows into it.
        teacher: gives the targets; no gradient flows into it.
        student_temp: of the student.
        cross: student view v is not compared with teacher view v (the same crop).
    Returns:
        Value and statistics. Gradients of the value reach `student_VBW` and `prototypes_KW`.
    """
    needs = torch.is_grad_enabled() and (student_VBW.requires_grad or prototypes_KW.requires_grad)
    teacher = teacher.narrowed()
    with torch.autocast(student_VBW.device.type, enabled=False):
        value, ce_VB, mass_K, entropy, rows = _Fused.apply(
            student_VBW, prototypes_KW, weight_VB, teacher, student_temp, cross, needs
        )
    return PrototypeLoss(value, ce_VB, TargetSums(mass_K, entropy, rows))


def product_dtype(like: Tensor) -> torch.dtype:
    """That of autocast where it is on, else that of the features."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


class _Fused(torch.autograd.Function):
    """Forward makes the gradients too; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_VBW: Tensor,
        prototypes_KW: Tensor,
        weight_VB: Tensor,
        teacher: TeacherScores,
        student_temp: float,
        cross: bool,
        needs: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        num_views, num_rows, width = student_VBW.shape
        num_targets = teacher.features_GBW.shape[0]
        num_prototypes, like = prototypes_KW.shape[0], student_VBW
        narrow_KW = prototypes_KW.to(teacher.prototypes_KW.dtype)
        ce_VB = like.new_empty(num_views, num_rows)
        mass_K, entropy, count = like.new_zeros(num_prototypes), like.new_zeros(()), like.new_zeros(())
        dstudent_VBW = torch.empty_like(student_VBW) if needs else None
        dprototypes_KW = torch.zeros_like(prototypes_KW) if needs else None
        pairs_V = torch.full((num_views,), float(num_targets), dtype=like.dtype, device=like.device)
        if cross:
            pairs_V[:num_targets] -= 1.0
        one_pair_each = num_targets - cross == 1 and (num_views <= num_targets or not cross)
        views = max(num_views, num_targets)
        chunks = Chunks(num_rows, views, narrow_KW, like.dtype)
        scores_NK, targets_NK = chunks.memory(views), chunks.memory(num_targets)
        narrow_dKW = torch.empty_like(narrow_KW) if needs and not chunks.wide else None
        for rows in chunks.ranges:
            scores_GCK = teacher.chunk(rows, chunks, scores_NK)
            targets_GCK = _softmax(scores_GCK, targets_NK)
            valid_C = None if teacher.valid_B is None else teacher.valid_B[rows].to(like.dtype)
            mass, spread, number = _statistics(scores_GCK, targets_GCK, valid_C)
            mass_K, entropy, count = mass_K + mass, entropy + spread, count + number
            goal_VCK = _goals(targets_GCK, num_views, cross)
            x_VCW = student_VBW[:, rows]
            x_NW = (x_VCW.flatten(0, 1) / student_temp).to(narrow_KW.dtype)
            scores_VCK = chunks.product(x_NW, narrow_KW, scores_NK).unflatten(0, x_VCW.shape[:2])
            top_VC = scores_VCK.amax(-1)
            agreement_VC = _dot(goal_VCK.expand_as(scores_VCK), scores_VCK)
            guess_VCK = _softmax(scores_VCK, scores_NK)  # in place: they are not needed any more
            log_sum_VC = top_VC - guess_VCK.amax(-1).log()  # the largest probability is >= 1/K, so its log is safe
            ce_VB[:, rows] = pairs_V[:, None] * log_sum_VC - agreement_VC
            if dstudent_VBW is None or dprototypes_KW is None:
                continue
            if not one_pair_each:
                guess_VCK.mul_(pairs_V[:, None, None])
            error_NK = chunks.narrowed(guess_VCK.sub_(goal_VCK).flatten(0, 1))
            scale_N1 = (weight_VB[:, rows] / student_temp).flatten()[:, None]
            dstudent_VBW[:, rows] = (torch.mm(error_NK, narrow_KW) * scale_N1).unflatten(0, x_VCW.shape[:2])
            scaled_NW = (x_VCW.flatten(0, 1) * scale_N1).to(narrow_KW.dtype)
            if chunks.wide:
                dprototypes_KW.addmm_(error_NK.T, scaled_NW)
            else:
                dprototypes_KW += torch.mm(error_NK.T, scaled_NW, out=narrow_dKW)
        if needs:
            ctx.save_for_backward(dstudent_VBW, dprototypes_KW)
        ctx.mark_non_differentiable(ce_VB, mass_K, entropy, count)
        return (weight_VB * ce_VB).sum(), ce_VB, mass_K, entropy, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dstudent_VBW, dprototypes_KW = ctx.saved_tensors
        return dstudent_VBW * gradients[0], dprototypes_KW * gradients[0], None, None, None, None, None


def _goals(targets_GCK: Tensor, num_views: int, cross: bool) -> Tensor:
    """What each student view is compared with, summed over teacher views: (V or 1, C, K)."""
    num_targets = targets_GCK.shape[0]
    if num_targets == 1 and not cross:
        return targets_GCK
    if cross and num_views == num_targets == 2:
        return targets_GCK.flip(0)  # each the other
    everyone_1CK = targets_GCK.sum(0, keepdim=True)
    if not cross:
        return everyone_1CK
    others_GCK = everyone_1CK - targets_GCK
    return torch.cat([others_GCK, everyone_1CK.expand(num_views - num_targets, -1, -1)])


def _softmax(scores_VCK: Tensor, into_NK: Tensor) -> Tensor:
    """Over the last axis, in the first V * C rows of that memory."""
    into_VCK = into_NK[: scores_VCK.shape[0] * scores_VCK.shape[1]].view_as(scores_VCK)
    return torch.softmax(scores_VCK, dim=-1, out=into_VCK)


def _dot(a_VCK: Tensor, b_VCK: Tensor) -> Tensor:
    """Inner products over the last axis, without a product of their size: (V, C)."""
    return torch.matmul(a_VCK.unsqueeze(-2), b_VCK.unsqueeze(-1)).squeeze(-1).squeeze(-1)


def _statistics(scores_GCK: Tensor, targets_GCK: Tensor, valid_C: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the targets, (K,), of their entropies, and their number, over valid rows.

    The entropy of a softmax is log-sum minus mean score; the log-sum follows from any one score and its probability.
    """
    log_sum_GC = scores_GCK.amax(-1) - targets_GCK.amax(-1).log()
    entropy_GC = log_sum_GC - _dot(targets_GCK, scores_GCK)
    weight_GC = torch.ones_like(entropy_GC) if valid_C is None else valid_C.expand_as(entropy_GC)
    mass_K = weight_GC.flatten() @ targets_GCK.flatten(0, 1)
    return mass_K, (weight_GC * entropy_GC).sum(), weight_GC.sum()


@torch.no_grad()
def sinkhorn_bias(teacher: TeacherScores, iterations: int) -> Tensor:
    """The bias that makes `softmax(scores + bias)` the Sinkhorn-Knopp targets of all ranks' valid rows: (K,).

    Only the scaling of the K prototypes is kept; that of a row is its softmax. Scores are computed anew in every
    iteration. One sum over ranks of K numbers per iteration, and a maximum before the first.

    Args:
        teacher: scores, with a bias of 0.
        iterations: of prototypes and rows; 3 in the published work.
    Source: Cuturi 2013; Caron et al. 2020, arXiv:2006.09882, eq. 3-5.
    """
    num_views, num_rows, _ = teacher.features_GBW.shape
    like = teacher.bias_K
    valid_B = torch.ones(num_rows, dtype=torch.bool, device=like.device) if teacher.valid_B is None else teacher.valid_B
    teacher = teacher.narrowed()
    with torch.autocast(like.device.type, enabled=False):
        chunks = Chunks(num_rows, num_views, teacher.prototypes_KW, like.dtype)
        scores_NK = chunks.memory(num_views)
        top_K, sum_K = _prototype_sums(teacher, valid_B, chunks, scores_NK)
        mass_K, count = _over_ranks(top_K, sum_K, (num_views * valid_B.sum()).double())
        bias_K = _even_out(mass_K)
        for _ in range(iterations - 1):
            # a row step makes a softmax over prototypes of each row; what it gives them is that over the number of rows
            scaled, sum_K = replace(teacher, bias_K=bias_K), torch.zeros_like(like)
            for rows in chunks.ranges:
                targets_NK = _softmax(scaled.chunk(rows, chunks, scores_NK), scores_NK).flatten(0, 1)
                sum_K += valid_B[rows].to(like.dtype).repeat(num_views) @ targets_NK
            bias_K = _even_out((collectives.sum_(sum_K.double()) / count).log().to(like.dtype) - bias_K)
    return bias_K


def _even_out(mass_K: Tensor) -> Tensor:
    """The bias that gives every prototype the same mass; 0 where no row takes part at all, instead of NaN."""
    return torch.where(mass_K > -math.inf, -mass_K - math.log(len(mass_K)), 0.0)


def _prototype_sums(
    teacher: TeacherScores, valid_B: Tensor, chunks: Chunks, scores_NK: Tensor
) -> tuple[Tensor, Tensor]:
    """Largest score of each prototype over valid rows, and the sum of exp(score - largest): both (K,).

    Nothing bounds the scores before the first scaling, and at a temperature of 0.01 their exp overflows.
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
    """log of the sum over ranks of sum * exp(top), (K,), and the number of rows of all ranks, at least 1."""
    if collectives.world_size() == 1:
        return sum_K.log() + top_K, count.clamp(min=1)
    reference_K = collectives.max_(top_K.clone())
    mine_K = sum_K.double() * (top_K.double() - reference_K).exp()  # float64 holds exp of differences down to -700
    summed = collectives.sum_(torch.cat([mine_K, count[None]]))
    return (summed[:-1].log() + reference_K).to(sum_K.dtype), summed[-1].clamp(min=1)
