"""Gram anchoring: the similarities between the patches of a crop should equal those of an earlier
teacher.

    # N x D of each crop
    X = normalize(student(masked globals).patches)
    Y = normalize(snapshot(globals).patches)
    loss = mean over crops of mean over N x N of (X X^T - Y Y^T)^2

The snapshot is a frozen copy of the teacher's backbone, taken at one step and again at later ones.
The loss keeps the geometry of the patches, not their features: X and X R give the same value for
every rotation R.

Nothing of size N x N is made where N > D. With S = X + Y and E = X - Y, X X^T - Y Y^T = (S E^T + E
S^T) / 2. Where student and snapshot agree, E is small and no difference of large numbers is left:

    |X X^T - Y Y^T|^2 = (<S^T S, E^T E> + <S^T E, E^T S>) / 2
    gradient in X     = S (E^T S + E^T E) + E (S^T S + S^T E)

C crops, N patch tokens, D channels.

Source: Simeoni et al. 2025 (DINOv3), arXiv:2508.10104, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct.config import setting
from tapct.nn.contracts import Loss, LossInputs, SnapshotTimes
from tapct.nn.prototypes import as_float
from tapct.types import LossResult, Term, TokenSets

CROPS_AT_ONCE = 8  # bounds what is made beside the tokens: 3 x D x D for each of them


@dataclass(frozen=True)
class Config:
    """Weight, times of the snapshot and tokens of the term."""

    weight: float = setting(2.0, "factor on the term; DINOv3, arXiv:2508.10104", ge=0.0, le=1e6)
    start: int = setting(
        100_000,
        "number of optimizer steps before the first snapshot of the teacher; before this "
        "snapshot, the term is 0 and needs no forward pass; DINOv3: 1,000,000; default: 80 % of "
        "the default train.steps",
        ge=0,
    )
    refresh_every: int = setting(
        10_000,
        "number of steps from one snapshot to the next; 0: only one snapshot; DINOv3, "
        "arXiv:2508.10104",
        ge=0,
    )
    tokens: str = setting(
        "all",
        "patches of the global crops that are compared: all (as in DINOv3), masked (patches that "
        "the student does not see) or unmasked (patches that it sees)",
        choices=("all", "masked", "unmasked"),
    )


class SquareDistance(torch.autograd.Function):
    """(C, N, D) twice -> (C,): sum over N x N of (X X^T - Y Y^T)^2 of each crop; gradient for the
    first alone.
    """

    @staticmethod
    def forward(ctx: Any, student_CND: Tensor, teacher_CND: Tensor) -> Tensor:
        """Value and, where it is wanted, gradient, which are made of the same products."""
        _, num_tokens, dim = student_CND.shape
        of_crops = by_tokens if num_tokens <= dim else by_channels
        wanted = ctx.needs_input_grad[0]
        pairs = zip(student_CND.split(CROPS_AT_ONCE), teacher_CND.split(CROPS_AT_ONCE), strict=True)
        parts = [of_crops(student, teacher, wanted) for student, teacher in pairs]
        if wanted:
            ctx.save_for_backward(torch.cat([gradient for _, gradient in parts]))
        return torch.cat([value for value, _ in parts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Chain rule."""
        return gradients[0][:, None, None] * ctx.saved_tensors[0], None


def by_channels(x_CND: Tensor, y_CND: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Square distance (C,) and its gradient (C, N, D; empty where not wanted) from products of D x
    D.
    """
    sum_CND, gap_CND = x_CND + y_CND, x_CND - y_CND
    sums_CDD, gaps_CDD = sum_CND.mT @ sum_CND, gap_CND.mT @ gap_CND
    mixed_CDD = sum_CND.mT @ gap_CND
    value_C = ((sums_CDD * gaps_CDD).sum((1, 2)) + (mixed_CDD * mixed_CDD.mT).sum((1, 2))) / 2
    if not with_gradient:
        return value_C, x_CND[:0]
    return value_C, sum_CND @ (mixed_CDD.mT + gaps_CDD) + gap_CND @ (sums_CDD + mixed_CDD)


def by_tokens(x_CND: Tensor, y_CND: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """The same from products of N x N, which are fewer in crops of few tokens."""
    half_CNN = (x_CND + y_CND) @ (x_CND - y_CND).mT
    difference_CNN = (half_CNN + half_CNN.mT) / 2
    return difference_CNN.square().sum(
        (1, 2)
    ), 4 * difference_CNN @ x_CND if with_gradient else x_CND[:0]


class GramLoss(Loss):
    """Gram anchoring of the student's global crops to the snapshot's."""

    head_of = ""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.snapshot = SnapshotTimes(config.start, config.refresh_every)

    def problem(self, inputs: LossInputs) -> str:
        """It needs the patches that `tokens` names."""
        if self.config.tokens == "masked" and not inputs.num_masked:
            return "tokens=masked, and these settings mask no patch; raise masks.probability"
        if self.config.tokens == "unmasked" and inputs.all_masked:
            return "tokens=unmasked, and these settings mask every patch; lower masks.ratio"
        return ""

    def forward(
        self,
        sets: TokenSets,
        student_head: nn.Module | None = None,
        teacher_head: nn.Module | None = None,
    ) -> LossResult:
        """One term, `gram`; zero (but connected) before the first snapshot. It has no head.

        A crop without a token that is to be compared counts with 0.
        """
        student_CND = as_float(sets.student_global.patches_BND)
        if sets.snapshot_global is None:
            return LossResult((Term("gram", student_CND[:0].sum()),))
        # float32: a squared difference of cosines in bf16 is mostly rounding
        with torch.autocast(student_CND.device.type, enabled=False):
            unit_CND = F.normalize(student_CND, dim=-1)
            kept_CND = F.normalize(as_float(sets.snapshot_global.patches_BND), dim=-1)
            count_C = unit_CND.new_full((len(unit_CND),), unit_CND.shape[1])
            if self.config.tokens != "all":
                masked_CN = sets.masks.masked_VBN.flatten(0, 1)
                chosen_CN1 = (masked_CN if self.config.tokens == "masked" else ~masked_CN)[
                    ..., None
                ]
                unit_CND, kept_CND = (
                    unit_CND * chosen_CN1,
                    kept_CND * chosen_CN1,
                )  # rows of 0 add nothing
                count_C = chosen_CN1.sum((1, 2)).clamp(min=1)
            square_C: Tensor = SquareDistance.apply(unit_CND, kept_CND)
            return LossResult(
                (Term("gram", self.config.weight * (square_C / count_C.square()).mean()),)
            )

    def finish_step(self, apply: Tensor) -> None:
        """Keeps nothing between steps; the snapshot belongs to `StudentTeacher`."""


def build(config: Config) -> GramLoss:
    """Make the loss."""
    return GramLoss(config)
