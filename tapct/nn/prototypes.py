"""Teacher targets over prototypes: centring or Sinkhorn, and the state of the centre.

Axes: G teacher views, B rows of a view (class tokens or masked patches), W bottleneck width, K
prototypes. All is float32, or float64 for float64 input: sums over 65k prototypes lose mass in
bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tapct.config import setting
from tapct.nn.prototype_scores import TeacherScores
from tapct.nn.sinkhorn import sinkhorn_bias


@dataclass(frozen=True)
class TargetConfig:
    """Configure how teacher scores become targets."""

    kind: str = setting(
        "centring",
        "centring (DINO, the published TAP-CT runs) or sinkhorn (SwAV, DINOv2)",
        choices=("centring", "sinkhorn"),
    )
    centre_momentum: float = setting(
        0.9,
        "momentum m of the centre's moving average: c <- m c + (1 - m) mean; DINO, "
        "arXiv:2104.14294",
        ge=0.0,
        lt=1.0,
    )
    sinkhorn_iterations: int = setting(
        3, "number of row and column normalisations; SwAV, arXiv:2006.09882", ge=1
    )


def as_float(x: Tensor) -> Tensor:
    """x in float32; float64 stays, since tests compare in it."""
    return x if x.dtype == torch.float64 else x.float()


class Targets(nn.Module):
    """Turn teacher scores into targets, and keep the centre that this needs.

    Centring uses in step i the centre of the steps before i. `finish_step` moves it once per
    optimizer step, over all micro-batches and ranks; the caller sums `pending` over ranks before.
    Sinkhorn balances the rows of one call over all ranks, so with accumulation each micro-batch is
    balanced separately.

    Args:
        num_prototypes: number of prototypes K.
        config: kind of targets and its constants.
    """

    centre_K: Tensor
    pending_sum_K: Tensor
    pending_count: Tensor

    def __init__(self, num_prototypes: int, config: TargetConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centre_K", torch.zeros(num_prototypes))
        # Checkpoints hold the pending sums too, although these are 0 whenever one is written.
        self.register_buffer("pending_sum_K", torch.zeros(num_prototypes))
        self.register_buffer("pending_count", torch.zeros(()))

    def warnings(self, teacher_temp: float, student_temp: float) -> list[str]:
        """Settings that work but are probably not intended, one clause each.

        Args:
            teacher_temp: highest temperature of the teacher in the run.
            student_temp: temperature of the student.
        """
        clauses = []
        if teacher_temp >= student_temp:
            clauses.append(
                f"student_temp {student_temp:g} is not above the teacher's temperature "
                f"{teacher_temp:g} (optim.teacher_temp): the targets are not sharper than the "
                "predictions, and training may collapse"
            )
        unread = "centre_momentum" if self.config.kind == "sinkhorn" else "sinkhorn_iterations"
        if getattr(self.config, unread) != getattr(TargetConfig, unread):
            clauses.append(f"targets.{unread} has no effect with targets.kind={self.config.kind}")
        return clauses

    @torch.no_grad()
    def scores(
        self,
        features_GBW: Tensor,
        prototypes_KW: Tensor,
        temperature: float,
        valid_B: Tensor | None = None,
    ) -> TeacherScores:
        """Scores whose softmax is the targets of these rows; centring adds them to the pending sum
        for the next centre.

        Args:
            features_GBW: teacher features of this micro-batch, on the unit sphere.
            prototypes_KW: the teacher's effective last layer.
            temperature: temperature of the teacher.
            valid_B: bool, rows that count; None: all.
        Returns:
            Scores whose features and prototypes have the dtype of the products.
        """
        plain = TeacherScores(
            features_GBW, prototypes_KW, temperature, torch.zeros_like(prototypes_KW[:, 0]), valid_B
        )
        if self.config.kind == "sinkhorn":
            plain = plain.narrowed()
            return replace(plain, bias_K=sinkhorn_bias(plain, self.config.sinkhorn_iterations))
        sum_K, count = plain.sum_of_scores()
        self.pending_sum_K += sum_K
        self.pending_count += count
        return replace(
            plain, bias_K=(-self.centre_K / temperature).to(prototypes_KW.dtype)
        ).narrowed()

    def pending(self) -> tuple[Tensor, ...]:
        """Buffers that the caller sums over ranks before `finish_step`; none with Sinkhorn."""
        return () if self.config.kind == "sinkhorn" else (self.pending_sum_K, self.pending_count)

    @torch.no_grad()
    def finish_step(self, apply: Tensor) -> None:
        """Move the centre towards the mean of the pending scores.

        Args:
            apply: bool scalar on the device; False after a step that was not finite, whose scores
                are dropped.
        """
        # all without a branch on device values, which would wait for the device
        mean_K = self.pending_sum_K / self.pending_count.clamp(min=1)
        moved_K = self.centre_K.lerp(mean_K, 1 - self.config.centre_momentum)
        self.centre_K.copy_(torch.where(apply & (self.pending_count > 0), moved_K, self.centre_K))
        self.pending_sum_K.zero_()
        self.pending_count.zero_()
