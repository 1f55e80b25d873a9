"""Cross-entropy over prototypes, fused: the matrix of all scores never exists.

Plain form, with every score in memory (tests/nn/test_prototype_loss.py, `written_out`):

    scores_VBK  = student_VBW @ prototypes_KW.T / student_temp
    targets_GBK = softmax(teacher scores)                              see `prototype_scores`
    ce_VB       = sum_g -(targets_gBK * log_softmax(scores_VBK)).sum(K)      g != v with `cross`
    value       = (weight_VB * ce_VB).sum()

The gradient with respect to the scores, where p_v teacher views are compared with student view v:

    dscores_VBK = weight_VB * (p_v * softmax(scores_VBK) - sum_g targets_gBK) / student_temp

Here a chunk of rows is computed, used and overwritten, a few rows of it at a time (a piece). The
gradients of features and prototypes are computed in the forward pass, while the scores exist, and
only scaled in the backward pass: four matrix products per row (scores of teacher and student, two
gradients), the fewest possible. Memory beside the inputs, for any number of rows: one gradient of
the size of the prototypes, two chunks of products, and some pieces of scores. Under autocast the
products are in its dtype; scores, softmax and sums are wider.

Axes: V student views, G teacher views, B rows of a view, C rows of a chunk, P rows of a piece, N
rows of all views of a chunk or piece, W bottleneck width, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tapct.nn.prototype_scores import Chunks, TeacherScores, copy_piece, softmax
from tapct.types import TargetSums

ADDED_BYTES = 1 << 20  # of the sum, in one addition of narrow numbers on a CPU
PRODUCT_BYTES = 1 << 23  # of a narrow product on a CPU, before it is added


def return_both(features_RW: Tensor, prototypes_KW: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and prototypes as they are, as the `then` of a head.

    A plain last layer is the parameter itself, which FSDP frees after the call: it is copied.
    """
    if isinstance(prototypes_KW, nn.Parameter):
        prototypes_KW = prototypes_KW.clone()
    return features_RW, prototypes_KW


@dataclass(frozen=True)
class PrototypeLoss:
    """Result of the fused loss.

    Args:
        value: scalar with a gradient, the weighted sum of cross-entropies.
        ce_VB: cross-entropy of each student row in nats, summed over teacher views, detached.
        sums: sums over the targets of valid rows, detached.
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
    """Weighted sum of the cross-entropies of student rows and teacher targets.

    Args:
        student_VBW: student features on the unit sphere; row b of every view belongs to row b of
            the teacher.
        prototypes_KW: the student's effective last layer.
        weight_VB: factor on the cross-entropy of each row, without gradient.
        teacher: scores of the teacher, without gradient; their softmax is the targets.
        student_temp: temperature of the student.
        cross: True where student view v is not compared with teacher view v, the same crop.
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
    """The loss, whose forward pass computes the gradients too; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_VBW: Tensor,
        prototypes_KW: Tensor,
        weight_VB: Tensor,
        teacher: TeacherScores,
        student_temp: float,
        cross: bool,
        needs_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        (num_views, num_rows, _), num_targets = student_VBW.shape, len(teacher.features_GBW)
        like, views = student_VBW, max(num_views, num_targets)
        narrow_KW = prototypes_KW.to(teacher.prototypes_KW.dtype)
        chunks = Chunks(num_rows, views, narrow_KW, like.dtype)
        teacher_NK, student_NK = chunks.memory(num_targets), chunks.memory(num_views)
        scores_NK, targets_NK = chunks.cache(views), chunks.cache(num_targets)
        pairs_V = _pairs(like, num_targets, cross)
        gradients = None
        if needs_gradients:
            gradients = _Gradients(student_VBW, prototypes_KW, narrow_KW, chunks, student_temp)
        ce_VB = like.new_empty(num_views, num_rows)
        mass_K, entropy = like.new_zeros(len(prototypes_KW)), like.new_zeros(())
        count = like.new_zeros(())
        for rows in chunks.ranges:
            teacher_GCK = teacher.products(rows, chunks, teacher_NK)
            x_VCW = student_VBW[:, rows]
            x_NW = (x_VCW.flatten(0, 1) / student_temp).to(narrow_KW.dtype)
            student_VCK = chunks.product(x_NW, narrow_KW, student_NK).unflatten(0, x_VCW.shape[:2])
            for piece in chunks.pieces(rows):
                place = slice(rows.start + piece.start, rows.start + piece.stop)
                scores_GPK = teacher.scores_of(teacher_GCK, piece, scores_NK)
                targets_GPK = softmax(scores_GPK, targets_NK)
                valid_P = None if teacher.valid_B is None else teacher.valid_B[place].to(like.dtype)
                mass, spread, number = _target_sums(scores_GPK, targets_GPK, valid_P)
                mass_K, entropy, count = mass_K + mass, entropy + spread, count + number
                goal_VPK = _goals(targets_GPK, num_views, cross)
                # the student's scores overwrite the teacher's, of which only the targets are kept
                scores_VPK = copy_piece(student_VCK, piece, scores_NK)
                ce_VB[:, place], guess_VPK = _cross_entropy(scores_VPK, goal_VPK, pairs_V)
                if gradients is not None:
                    if not _is_one_pair_each(num_views, num_targets, cross):
                        guess_VPK.mul_(pairs_V[:, None, None])
                    # the gradient overwrites the student's products
                    student_VCK[:, piece] = guess_VPK.sub_(goal_VPK)
            if gradients is not None:
                gradients.add(rows, student_VCK, weight_VB[:, rows])
        if gradients is not None:
            ctx.save_for_backward(gradients.student_VBW, gradients.prototypes_KW)
        ctx.mark_non_differentiable(ce_VB, mass_K, entropy, count)
        return (weight_VB * ce_VB).sum(), ce_VB, mass_K, entropy, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dstudent_VBW, dprototypes_KW = ctx.saved_tensors
        # two gradients, and None for each of the five other arguments of `forward`
        return dstudent_VBW * gradients[0], dprototypes_KW * gradients[0], *[None] * 5


class _Gradients:
    """Gradients of the loss with respect to student features and prototypes, added up by chunk.

    Args:
        student_VBW: student features.
        prototypes_KW: the student's effective last layer.
        narrow_KW: the same in the dtype of the products.
        chunks: ranges of rows.
        student_temp: temperature of the student.
    """

    def __init__(
        self,
        student_VBW: Tensor,
        prototypes_KW: Tensor,
        narrow_KW: Tensor,
        chunks: Chunks,
        student_temp: float,
    ) -> None:
        self.features_VBW, self.narrow_KW = student_VBW, narrow_KW
        self.student_temp = student_temp
        self.student_VBW = torch.empty_like(student_VBW)
        self.prototypes_KW = torch.zeros_like(prototypes_KW)
        num_prototypes, width = narrow_KW.shape
        self.at_once = num_prototypes
        if chunks.is_small:
            self.at_once = max(1, PRODUCT_BYTES // (narrow_KW.dtype.itemsize * width))
        # k prototypes at a time on a CPU: a step needs most memory here
        self.product_kW = None if chunks.wide else torch.empty_like(narrow_KW[: self.at_once])

    def add(self, rows: slice, error_VCK: Tensor, weight_VC: Tensor) -> None:
        """Add the part of some rows, from pairs * softmax(scores) - targets, in the dtype of the
        products, and their weights.
        """
        x_VCW, error_NK = self.features_VBW[:, rows], error_VCK.flatten(0, 1)
        # weight and temperature are factors of rows: on W columns they cost less than on K
        scale_N1 = (weight_VC / self.student_temp).flatten()[:, None]
        dfeatures_NW = torch.mm(error_NK, self.narrow_KW) * scale_N1
        self.student_VBW[:, rows] = dfeatures_NW.unflatten(0, x_VCW.shape[:2])
        scaled_NW = (x_VCW.flatten(0, 1) * scale_N1).to(self.narrow_KW.dtype)
        if self.product_kW is None:
            self.prototypes_KW.addmm_(error_NK.T, scaled_NW)
            return
        # float32 sums of narrow products; plain form: prototypes_KW += error_NK.T @ scaled_NW
        parts = error_NK.split(self.at_once, dim=1), self.prototypes_KW.split(self.at_once)
        for error_Nk, sum_kW in zip(*parts, strict=True):
            into_kW = self.product_kW[: len(sum_kW)]
            add_narrow(sum_kW, torch.mm(error_Nk.T, scaled_NW, out=into_kW))


def add_narrow(into_KW: Tensor, product_KW: Tensor) -> None:
    """Add a product to a sum of a wider dtype.

    Plain form: into_KW += product_KW. On a CPU, torch would first copy the whole product to the
    wider dtype; here it copies a part that stays in the cache.
    """
    rows = len(into_KW)
    if into_KW.device.type == "cpu":
        rows = max(1, ADDED_BYTES // (into_KW.dtype.itemsize * into_KW.shape[1]))
    for into_kW, product_kW in zip(into_KW.split(rows), product_KW.split(rows), strict=True):
        into_kW += product_kW


def _pairs(student_VBW: Tensor, num_targets: int, cross: bool) -> Tensor:
    """Number of teacher views that each student view is compared with, (V,)."""
    pairs_V = student_VBW.new_full((len(student_VBW),), float(num_targets))
    if cross:
        pairs_V[:num_targets] -= 1.0
    return pairs_V


def _is_one_pair_each(num_views: int, num_targets: int, cross: bool) -> bool:
    """Whether every student view is compared with one teacher view, so that no factor is needed."""
    return num_targets - cross == 1 and (num_views <= num_targets or not cross)


def _goals(targets_GPK: Tensor, num_views: int, cross: bool) -> Tensor:
    """Sum of the targets that each student view is compared with: (V or 1, P, K)."""
    num_targets = targets_GPK.shape[0]
    if num_targets == 1 and not cross:
        return targets_GPK
    if cross and num_views == num_targets == 2:
        return targets_GPK.flip(0)  # each view is compared with the other
    everyone_1PK = targets_GPK.sum(0, keepdim=True)
    if not cross:
        return everyone_1PK
    others_GPK = everyone_1PK - targets_GPK
    return torch.cat([others_GPK, everyone_1PK.expand(num_views - num_targets, -1, -1)])


def _cross_entropy(scores_VPK: Tensor, goal_VPK: Tensor, pairs_V: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, (V, P), and the softmax of the scores, in their memory.

    Args:
        scores_VPK: scores of the student, contiguous; they are overwritten.
        goal_VPK: sum of the targets that each view is compared with, (V or 1, P, K).
        pairs_V: number of these targets.
    """
    top_VP = scores_VPK.amax(-1)
    agreement_VP = _dot(goal_VPK.expand_as(scores_VPK), scores_VPK)
    guess_VPK = softmax(scores_VPK, scores_VPK.flatten(0, 1))
    # log-sum-exp of a row = its largest score - log of its largest probability, which is at least
    # 1/K, so the log is safe
    log_sum_VP = top_VP - guess_VPK.amax(-1).log()
    return pairs_V[:, None] * log_sum_VP - agreement_VP, guess_VPK


def _dot(a_VPK: Tensor, b_VPK: Tensor) -> Tensor:
    """Inner products over the last axis, (V, P)."""
    # a product of matrices of one row and one column would be slower: the elementwise products of a
    # piece stay in the cache
    return (a_VPK * b_VPK).sum(-1)


def _target_sums(
    scores_GPK: Tensor, targets_GPK: Tensor, valid_P: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over valid rows: of the targets, (K,), of their entropies, and of the rows.

    The entropy of a softmax is its log-sum-exp minus its mean score; the log-sum-exp follows from
    any one score and its probability.
    """
    log_sum_GP = scores_GPK.amax(-1) - targets_GPK.amax(-1).log()
    entropy_GP = log_sum_GP - _dot(targets_GPK, scores_GPK)
    weight_GP = torch.ones_like(entropy_GP) if valid_P is None else valid_P.expand_as(entropy_GP)
    mass_K = weight_GP.flatten() @ targets_GPK.flatten(0, 1)
    return mass_K, (weight_GP * entropy_GP).sum(), weight_GP.sum()
