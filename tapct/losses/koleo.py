"""KoLeo: spread the class tokens of a batch over the sphere (Sablayrolles et al. 2019, arXiv:1806.03198)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct.config import setting
from tapct.nn.contracts import Loss
from tapct.types import LossResult, Term, TokenSets, UserError


@dataclass(frozen=True)
class Config:
    """Weight of the term."""

    weight: float = setting(0.1, "factor on the sum over the global crops; DINOv2, arXiv:2304.07193", ge=0.0)


def koleo(cls_BD: Tensor, eps: float = 1e-8) -> Tensor:
    """Spread features: minus the mean log distance to the nearest neighbour.

    Args:
        cls_BD: class tokens after the final norm, before the head, any scale, B >= 2.
        eps: added to the difference and to the distance.
    Returns:
        Scalar, float32 (float64 for float64 input); lower is more uniform.
    Raises:
        UserError: B < 2, so no neighbour exists.
    Source: Sablayrolles et al. 2019, arXiv:1806.03198, eq. 5.
    """
    if cls_BD.shape[0] < 2:
        raise UserError(
            f"KoLeo needs a nearest neighbour, but this rank's batch holds {cls_BD.shape[0]} sample. "
            "Raise train.global_batch, lower train.accumulation, or set losses.koleo=null."
        )
    # float32: eps underflows in fp16 and the log becomes infinite
    with torch.autocast(cls_BD.device.type, enabled=False):
        unit_BD = F.normalize(cls_BD if cls_BD.dtype == torch.float64 else cls_BD.float(), dim=-1)
        with torch.no_grad():
            similarity_BB = unit_BD @ unit_BD.T
            nearest_B = similarity_BB.fill_diagonal_(-1.0).argmax(dim=1)
        distance_B = (unit_BD - unit_BD[nearest_B] + eps).norm(dim=-1)
        return -(distance_B + eps).log().mean()


class KoLeoLoss(Loss):
    """KoLeo over each global crop's class tokens of this rank, summed over the crops."""

    head_of = ""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, sets: TokenSets, student_head: nn.Module | None = None, teacher_head: nn.Module | None = None
    ) -> LossResult:
        """One term, `koleo`; it has no head."""
        crops_VBD = sets.student_global.cls_BD.chunk(sets.num_globals)
        total = torch.stack([koleo(cls_BD) for cls_BD in crops_VBD]).sum()
        return LossResult((Term("koleo", self.config.weight * total),))

    def finish_step(self, apply: Tensor) -> None:
        """Keeps nothing between steps."""


def build(config: Config) -> KoLeoLoss:
    """Make the loss."""
    return KoLeoLoss(config)
