"""KoLeo: spread the class tokens of a batch over the sphere (Sablayrolles et al., ICLR 2019,
arXiv:1806.03198).

B samples of this rank, N candidates for a neighbour (this rank's samples, or those of all W ranks),
V global crops, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct.base.exits import UserError
from tapct.config import setting
from tapct.distributed import collectives
from tapct.nn.contracts import Loss
from tapct.nn.prototypes import as_float
from tapct.types import LossResult, Term, TokenSets


@dataclass(frozen=True)
class Config:
    """Weight and reach of the term."""

    weight: float = setting(
        0.1, "factor on the sum over the global crops; DINOv2, arXiv:2304.07193", ge=0.0, le=1e6
    )
    cross_rank: bool = setting(
        False,
        "true: the nearest neighbour is searched among the samples of all ranks (for small "
        "batches); false: among those of the same rank, as in DINOv2",
    )


def koleo(
    cls_BD: Tensor, everyone_ND: Tensor | None = None, first: int = 0, eps: float = 1e-8
) -> Tensor:
    """Spread features: minus the mean log distance to the nearest neighbour.

    Args:
        cls_BD: class tokens after the final norm, before the head, any scale.
        everyone_ND: candidates for the neighbour, N >= 2, with `cls_BD` among them; None: `cls_BD`
            itself.
        first: row of `everyone_ND` at which `cls_BD` begins.
        eps: added to the difference and to the distance.
    Returns:
        Scalar, float32 (float64 for float64 input); lower is more uniform.
    Raises:
        UserError: N < 2, so no neighbour exists.
    Source: Sablayrolles et al., ICLR 2019, arXiv:1806.03198, eq. 5.
    """
    everyone_ND = cls_BD if everyone_ND is None else everyone_ND
    if everyone_ND.shape[0] < 2:
        raise UserError(
            f"KoLeo needs a nearest neighbour, but this rank's batch holds {cls_BD.shape[0]} "
            "sample. "
            "Raise train.global_batch, lower train.accumulation, set losses.koleo.cross_rank=true "
            "on several ranks, or "
            "losses.koleo=null."
        )
    # float32: eps underflows in fp16 and the log becomes infinite
    with torch.autocast(cls_BD.device.type, enabled=False):
        unit_BD, unit_ND = (F.normalize(as_float(x), dim=-1) for x in (cls_BD, everyone_ND))
        with torch.no_grad():
            similarity_BN = unit_BD @ unit_ND.T
            similarity_BN.diagonal(first).fill_(-1.0)  # a sample is not its own neighbour
            nearest_B = similarity_BN.argmax(dim=1)
        distance_B = (unit_BD - unit_ND[nearest_B] + eps).norm(dim=-1)
        return -(distance_B + eps).log().mean()


class KoLeoLoss(Loss):
    """KoLeo over each global crop's class tokens, summed over the crops."""

    head_of = ""
    min_samples_reason = (
        "KoLeo compares the samples of a micro-batch of a rank, or with cross_rank=true those of "
        "all ranks"
    )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        sets: TokenSets,
        student_head: nn.Module | None = None,
        teacher_head: nn.Module | None = None,
    ) -> LossResult:
        """One term, `koleo`; it has no head."""
        cls_VBD = sets.student_global.cls_BD.unflatten(0, (sets.num_globals, -1))
        everyone_VND, first = cls_VBD, 0
        if self.config.cross_rank:
            everyone_VND = (
                collectives.gather_with_gradient(cls_VBD).transpose(0, 1).flatten(1, 2)
            )  # ranks in order
            first = collectives.rank() * cls_VBD.shape[1]
        each = [
            koleo(cls_BD, all_ND, first)
            for cls_BD, all_ND in zip(cls_VBD, everyone_VND, strict=True)
        ]
        return LossResult((Term("koleo", self.config.weight * torch.stack(each).sum()),))

    def min_samples(self, world: int) -> int:
        """Two, where the samples of another rank are no neighbours."""
        return 1 if self.config.cross_rank and world > 1 else 2

    def finish_step(self, apply: Tensor) -> None:
        """Keeps nothing between steps."""


def build(config: Config) -> KoLeoLoss:
    """Make the loss."""
    return KoLeoLoss(config)
