"""DINO: the student's class tokens predict the teacher's prototype assignment of the other crops.

    # s student, t teacher, g global crops, l local crops
    # CE(s, t) = -sum_k t_k log softmax(s / 0.1)_k
    # targets: 2B x K, without gradient
    targets = centre_or_sinkhorn(teacher_head(teacher(globals).cls) / temperature)
    local   = sum_l sum_g      mean_b CE(student_head(student(l).cls), targets[g]) / n   # 2L pairs
    global_ = sum_g sum_g'!=g  mean_b CE(student_head(student(g).cls), targets[g']) / n  # 2 pairs
    n       = 2 + 2L

Axes: B samples, D channels, W bottleneck width of the head, K prototypes, V student views (global
crops, then local ones), G teacher views, N = G*B and R = V*B rows, crop-major.

Source: Caron et al. 2021, arXiv:2104.14294; Oquab et al. 2023, arXiv:2304.07193.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tapct.config import setting
from tapct.nn import heads
from tapct.nn.contracts import HeadRows, Loss, LossInputs
from tapct.nn.prototype_loss import PrototypeLoss, prototype_loss, return_both
from tapct.nn.prototypes import TargetConfig, Targets
from tapct.types import LossResult, TargetStats, Term, TokenSets


@dataclass(frozen=True)
class Config:
    """Weight, temperatures, targets and head of the DINO term."""

    weight: float = setting(
        1.0, "factor on the sum of the local and the global term; DINOv2", ge=0.0, le=1e6
    )
    student_temp: float = setting(0.1, "student temperature; DINO, arXiv:2104.14294", ge=1e-3)
    targets: TargetConfig = field(default_factory=TargetConfig)
    head: heads.Config = field(default_factory=heads.Config)


class DinoLoss(Loss):
    """The DINO term with its targets; its heads belong to student and teacher."""

    head_of = "dino"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.targets = Targets(config.head.num_prototypes, config.targets)

    def forward(
        self, sets: TokenSets, student_head: nn.Module | None, teacher_head: nn.Module | None
    ) -> LossResult:
        """Compare every student crop with every other global crop of the teacher.

        Args:
            sets: tokens of student and teacher, crop-major.
            student_head: head of class tokens, a `PrototypeHead`. With a second argument it returns
                what that function makes of its features and prototypes, instead of logits.
            teacher_head: moving average of the student's head.
        Returns:
            Terms `dino_global` and, with local crops, `dino_local`.
        """
        assert student_head is not None and teacher_head is not None
        num_globals, num_locals = sets.num_globals, sets.num_locals
        num_terms = num_globals * (num_globals - 1) + num_globals * num_locals
        with torch.no_grad():
            features_NW, teacher_KW = teacher_head(sets.teacher_global.cls_BD, return_both)
            target_scores = self.targets.scores(
                features_NW.unflatten(0, (num_globals, -1)), teacher_KW, sets.teacher_temp
            )
            # under autocast `target_scores` holds copies in bf16: free the float32 originals
            del features_NW, teacher_KW
        student_cls = [sets.student_global.cls_BD]
        if sets.student_local is not None:
            student_cls.append(sets.student_local.cls_BD)
        num_samples = target_scores.features_GBW.shape[1]
        scale = self.config.weight / (num_terms * num_samples)

        def compare(features_RW: Tensor, prototypes_KW: Tensor) -> PrototypeLoss:
            student_VBW = features_RW.unflatten(0, (num_globals + num_locals, -1))
            weight_VB = torch.full_like(student_VBW[..., 0], scale)
            # cross: a global crop is compared with the other ones, not with itself
            return prototype_loss(
                student_VBW,
                prototypes_KW,
                weight_VB,
                target_scores,
                self.config.student_temp,
                cross=True,
            )

        result: PrototypeLoss = student_head(torch.cat(student_cls), compare)
        return self.terms_of(result, num_globals, num_locals, scale)

    def terms_of(
        self, result: PrototypeLoss, num_globals: int, num_locals: int, scale: float
    ) -> LossResult:
        """The two terms; the whole gradient flows through the first, their values are the share of
        each.
        """
        global_sum, local_sum = result.ce_VB[:num_globals].sum(), result.ce_VB[num_globals:].sum()
        num_samples = result.ce_VB.shape[1]

        ce_VB = result.ce_VB

        def value_by_sample() -> Tensor:
            return scale * ce_VB.sum(0)

        num_global_pairs = num_globals * (num_globals - 1)
        num_local_pairs = num_globals * num_locals
        if num_globals == 1:  # a global crop is never compared with itself
            local = Term("dino_local", result.value, local_sum / (num_samples * num_local_pairs))
            mean_ce = local_sum / (num_samples * num_local_pairs)
            return LossResult((local,), TargetStats("dino", result.sums, mean_ce), value_by_sample)
        local_value = scale * local_sum
        terms = [
            Term(
                "dino_global",
                result.value - local_value,
                global_sum / (num_samples * num_global_pairs),
            )
        ]
        if num_locals:
            terms.append(
                Term("dino_local", local_value, local_sum / (num_samples * num_local_pairs))
            )
        mean_ce = (global_sum + local_sum) / (num_samples * (num_global_pairs + num_local_pairs))
        return LossResult(tuple(terms), TargetStats("dino", result.sums, mean_ce), value_by_sample)

    def problem(self, inputs: LossInputs) -> str:
        """It needs two crops of a scan, one of them global."""
        if inputs.num_globals + inputs.num_locals > 1:
            return ""
        return (
            "it compares different crops of a scan, and views.num_globals=1 with "
            "views.num_locals=0 gives one crop; raise one of them"
        )

    def warnings(self, inputs: LossInputs) -> list[str]:
        """Temperatures that do not fit together, and settings of the targets without effect."""
        return self.targets.warnings(inputs.teacher_temp, self.config.student_temp)

    def prototype_rows(self, num_globals: int, num_locals: int, num_masked: float) -> HeadRows:
        """The class tokens: of all crops for the student, of the global ones for the teacher."""
        balanced = self.config.targets.kind == "sinkhorn"
        return HeadRows(num_globals + num_locals, num_globals, balanced)

    def pending(self) -> tuple[Tensor, ...]:
        """Sums for the centre; see `Targets.pending`."""
        return self.targets.pending()

    def finish_step(self, apply: Tensor) -> None:
        """Move the centre after an optimizer step; see `Targets.finish_step`."""
        self.targets.finish_step(apply)


def build(config: Config) -> DinoLoss:
    """Make the loss."""
    return DinoLoss(config)
