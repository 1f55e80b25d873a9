"""DINO: the student's class tokens predict the teacher's prototype assignment of the other crops.

    # s student, t teacher, g global crops, l local crops; CE(s, t) = -sum_k t_k log softmax(s / 0.1)_k
    targets = centre_or_sinkhorn(teacher_head(teacher(globals).cls) / temperature)      # 2B x K, no gradient
    local   = sum_l sum_g      mean_b CE(student_head(student(l).cls), targets[g]) / n   # 2L pairs
    global_ = sum_g sum_g'!=g  mean_b CE(student_head(student(g).cls), targets[g']) / n  # 2 pairs
    n       = 2 + 2L

Source: Caron et al. 2021, arXiv:2104.14294; Oquab et al. 2023, arXiv:2304.07193.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tapct.config import setting
from tapct.nn import heads
from tapct.nn.contracts import Loss
from tapct.nn.prototypes import TargetConfig, Targets, soft_cross_entropy, target_sums
from tapct.types import LossResult, TargetStats, Term, TokenSets


@dataclass(frozen=True)
class Config:
    """Weight, temperatures, targets and head of the DINO term."""

    weight: float = setting(1.0, "factor on local + global; DINOv2", ge=0.0)
    student_temp: float = setting(0.1, "student temperature; DINO, arXiv:2104.14294", gt=0.0)
    targets: TargetConfig = field(default_factory=TargetConfig)
    head: heads.Config = field(default_factory=heads.Config)


class DinoLoss(Loss):
    """The DINO term with its targets; its heads belong to student and teacher."""

    head_of = "dino"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.targets = Targets(config.head.num_prototypes, config.targets)

    def forward(self, sets: TokenSets, student_head: nn.Module | None, teacher_head: nn.Module | None) -> LossResult:
        """Compare every student crop with every other global crop of the teacher.

        Args:
            sets: tokens of student and teacher, crop-major.
            student_head: maps class tokens to K logits.
            teacher_head: the same, its moving average.
        Returns:
            Terms `dino_global` and, with local crops, `dino_local`.
        """
        assert student_head is not None and teacher_head is not None
        num_globals, num_locals = sets.num_globals, sets.num_locals
        num_terms = num_globals * (num_globals - 1) + num_globals * num_locals
        with torch.no_grad():
            logits = teacher_head(sets.teacher_global.cls_BD)
            targets_NK = self.targets(logits, sets.teacher_temp)
        targets_VBK = targets_NK.unflatten(0, (num_globals, -1))
        everyone_BK = targets_VBK.sum(0)

        cls = [sets.student_global.cls_BD] + ([sets.student_local.cls_BD] if sets.student_local is not None else [])
        logits_VBK = student_head(torch.cat(cls)).unflatten(0, (num_globals + num_locals, -1))
        student_temp = self.config.student_temp
        others_VBK = everyone_BK - targets_VBK  # for each global crop, the sum of the other crops' targets
        global_sum = soft_cross_entropy(logits_VBK[:num_globals], others_VBK, student_temp).mean(-1).sum()
        pair_sums = [global_sum]
        scale = self.config.weight / num_terms
        num_global_pairs = num_globals * (num_globals - 1)
        terms = [Term("dino_global", scale * global_sum, global_sum.detach() / num_global_pairs)]
        if num_locals:
            local_sum = soft_cross_entropy(logits_VBK[num_globals:], everyone_BK, student_temp).mean(-1).sum()
            pair_sums.append(local_sum)
            terms.append(Term("dino_local", scale * local_sum, local_sum.detach() / (num_globals * num_locals)))
        stats = TargetStats(
            "dino", target_sums(targets_NK), cross_entropy=torch.stack(pair_sums).sum().detach() / num_terms
        )
        return LossResult(tuple(terms), stats)

    def pending(self) -> tuple[Tensor, ...]:
        """Sums for the centre; see `Targets.pending`."""
        return self.targets.pending()

    def finish_step(self, apply: Tensor) -> None:
        """Move the centre after an optimizer step; see `Targets.finish_step`."""
        self.targets.finish_step(apply)


def build(config: Config) -> DinoLoss:
    """Make the loss."""
    return DinoLoss(config)
