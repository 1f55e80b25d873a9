"""iBOT: at every masked patch the student predicts the teacher's prototype assignment of that
patch.

    rows    = masked patch tokens of all global crops, and only those                    # M
    targets = centre_or_sinkhorn(teacher_head(teacher(globals).patches[rows]) / temperature)
    scores  = student_head(student(masked globals).patches[rows])
    loss    = sum_m weight_m CE(scores_m, targets_m) / (V*B)
    weight  = 1 / (masked in-scan tokens of that crop); V*B counts the crops without a mask too

Axes: V global views, B samples, N patch tokens of a crop, D channels, M masked tokens, W bottleneck
width of the head, K prototypes. In `patches_BND` the first axis holds all V*B crops.

Source: Zhou et al. 2021, arXiv:2111.07832; Oquab et al. 2023, arXiv:2304.07193.
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
    """Weight, temperatures, targets and head of the iBOT term."""

    weight: float = setting(1.0, "factor on the term; DINOv2", ge=0.0, le=1e6)
    student_temp: float = setting(0.1, "student temperature; iBOT, arXiv:2111.07832", ge=1e-3)
    share_dino_head: bool = setting(
        False,
        "use DINO's head and prototypes (as in iBOT and TAP-CT); the settings of both heads "
        "must then be equal",
    )
    targets: TargetConfig = field(default_factory=TargetConfig)
    head: heads.Config = field(default_factory=heads.Config)


class IBotLoss(Loss):
    """The iBOT term with its targets; its heads belong to student and teacher."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.head_of = "dino" if config.share_dino_head else "ibot"
        self.targets = Targets(config.head.num_prototypes, config.targets)

    def forward(
        self, sets: TokenSets, student_head: nn.Module | None, teacher_head: nn.Module | None
    ) -> LossResult:
        """Compare student and teacher at the masked patches.

        Args:
            sets: tokens of student and teacher, crop-major, with the masks.
            student_head: head of patch tokens, a `PrototypeHead`. With a second argument it returns
                what that function makes of its features and prototypes, instead of logits.
            teacher_head: moving average of the student's head.
        Returns:
            Term `ibot`; zero, but still with gradients (of zero), when no patch is masked.
        """
        assert student_head is not None and teacher_head is not None
        masks = sets.masks
        student_MD = sets.student_global.patches_BND.flatten(0, 1)[masks.index_M]
        num_crops = sets.student_global.patches_BND.shape[0]
        # A masked token that is all padding has no weight in the loss, and does not count in the
        # targets' statistics either.
        in_scan_M = masks.weight_M > 0
        with torch.no_grad():
            teacher_MD = sets.teacher_global.patches_BND.flatten(0, 1)[masks.index_M]
            features_MW, teacher_KW = teacher_head(teacher_MD, return_both)
            target_scores = self.targets.scores(
                features_MW[None], teacher_KW, sets.teacher_temp, in_scan_M
            )
            # under autocast `target_scores` holds copies in bf16: free the float32 originals
            del teacher_MD, features_MW, teacher_KW
        weight_M = (self.config.weight / num_crops) * masks.weight_M

        def compare(features_MW: Tensor, prototypes_KW: Tensor) -> PrototypeLoss:
            # One view of M rows. A row of the student is compared with the same patch of the
            # teacher's crop; cross=True would leave that pair out.
            return prototype_loss(
                features_MW[None],
                prototypes_KW,
                weight_M.to(features_MW.dtype)[None],
                target_scores,
                self.config.student_temp,
                cross=False,
            )

        result: PrototypeLoss = student_head(student_MD, compare)
        mean_ce = (result.ce_VB[0] * in_scan_M).sum() / in_scan_M.sum().clamp(min=1)
        num_patches = sets.student_global.patches_BND.shape[1]
        num_samples, index_M = num_crops // sets.num_globals, masks.index_M
        ce_M = result.ce_VB[0]

        # The function must not hold `sets`, whose tokens would stay in memory for the whole step.
        def value_by_sample() -> Tensor:
            # crop-major: crop v*B + b shows sample b
            sample_M = index_M // num_patches % num_samples
            value_B = weight_M.new_zeros(num_samples)
            return value_B.index_add(0, sample_M, weight_M * ce_M.to(weight_M.dtype))

        return LossResult(
            (Term("ibot", result.value, mean_ce),),
            TargetStats("ibot", result.sums, mean_ce),
            value_by_sample,
        )

    def problem(self, inputs: LossInputs) -> str:
        """It needs masked patches."""
        if inputs.num_masked:
            return ""
        return (
            "it predicts masked patches, and these settings mask none; raise masks.probability, "
            "masks.ratio or train.global_batch"
        )

    def warnings(self, inputs: LossInputs) -> list[str]:
        """Temperatures that do not fit together, and settings of the targets without effect."""
        return self.targets.warnings(inputs.teacher_temp, self.config.student_temp)

    def prototype_rows(self, num_globals: int, num_locals: int, num_masked: float) -> HeadRows:
        """The masked patches of student and teacher."""
        balanced = self.config.targets.kind == "sinkhorn"
        return HeadRows(num_masked, num_masked, balanced)

    def pending(self) -> tuple[Tensor, ...]:
        """Sums for the centre; see `Targets.pending`."""
        return self.targets.pending()

    def finish_step(self, apply: Tensor) -> None:
        """Move the centre after an optimizer step; see `Targets.finish_step`."""
        self.targets.finish_step(apply)


def build(config: Config) -> IBotLoss:
    """Make the loss."""
    return IBotLoss(config)
