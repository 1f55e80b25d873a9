"""Cross-entropy over prototypes without ever holding all scores: last layer, softmax, targets,
gradients by chunk.

    scores   = student features P' / student temperature              V student views x B rows x K
    targets  = softmax(teacher features Q' / teacher temperature + bias)    G teacher views x B rows x K
    loss     = sum_v,b weight_vb * sum_g CE(scores_vb, targets_gb)     with `cross`: without g = v
    dscores  = weight_vb * (n_v softmax(scores_vb) - sum_g targets_gb) / student temperature

Centring is a bias of -centre / temperature, Sinkhorn a bias found by `sinkhorn_bias`; so both are
one softmax. All is made for a chunk of rows b, used, and forgotten. The gradients with respect to
features and prototypes are made in the forward pass, from scores that are at hand, and only scaled
in the backward pass: four matrix products per row (scores of teacher and student, two gradients),
the fewest there are. Memory beside the inputs, whatever the number of rows: a gradient of the size
of the prototypes, and two chunks of scores, which every chunk takes over from the one before; with
`cross` two or three more for what views are compared with. Under autocast the products are in its
dtype, and half a chunk more.

V student views, G teacher views, B rows of a view, C rows of a chunk, W bottleneck width, K
prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tapct.nn.prototype_scores import Chunks, TeacherScores
from tapct.types import TargetSums


def pair_up(features_RW: Tensor, prototypes_KW: Tensor) -> tuple[Tensor, Tensor]:
    """For a head's `then`: hand out what it got; a plain last layer as a copy, since FSDP frees it
    after the call.
    """
    return features_RW, prototypes_KW.clone() if isinstance(
        prototypes_KW, nn.Parameter
    ) else prototypes_KW


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
        student_VBW: student features on the unit sphere; rows b of all views belong to row b of the
            teacher.
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
        mass_K, entropy, count = (
            like.new_zeros(num_prototypes),
            like.new_zeros(()),
            like.new_zeros(()),
        )
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
            log_sum_VC = (
                top_VC - guess_VCK.amax(-1).log()
            )  # the largest probability is >= 1/K, so its log is safe
            ce_VB[:, rows] = pairs_V[:, None] * log_sum_VC - agreement_VC
            if dstudent_VBW is None or dprototypes_KW is None:
                continue
            if not one_pair_each:
                guess_VCK.mul_(pairs_V[:, None, None])
            error_NK = chunks.narrowed(guess_VCK.sub_(goal_VCK).flatten(0, 1))
            scale_N1 = (weight_VB[:, rows] / student_temp).flatten()[:, None]
            dstudent_VBW[:, rows] = (torch.mm(error_NK, narrow_KW) * scale_N1).unflatten(
                0, x_VCW.shape[:2]
            )
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
        return (
            dstudent_VBW * gradients[0],
            dprototypes_KW * gradients[0],
            None,
            None,
            None,
            None,
            None,
        )


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


def _statistics(
    scores_GCK: Tensor, targets_GCK: Tensor, valid_C: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the targets, (K,), of their entropies, and their number, over valid rows.

    The entropy of a softmax is log-sum minus mean score; the log-sum follows from any one score and
    its probability.
    """
    log_sum_GC = scores_GCK.amax(-1) - targets_GCK.amax(-1).log()
    entropy_GC = log_sum_GC - _dot(targets_GCK, scores_GCK)
    weight_GC = torch.ones_like(entropy_GC) if valid_C is None else valid_C.expand_as(entropy_GC)
    mass_K = weight_GC.flatten() @ targets_GCK.flatten(0, 1)
    return mass_K, (weight_GC * entropy_GC).sum(), weight_GC.sum()
