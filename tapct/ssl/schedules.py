"""What changes from step to step, as pure functions of the step: lr, weight decay, momentum,
teacher temperature.

Steps are optimizer steps, counted from 0; gradient accumulation and world size do not enter. A
resumed run therefore continues every curve where it stopped, without any state of its own.
Source: DINOv2's CosineScheduler, arXiv:2304.07193 (warm-up with both ends included, then a cosine
that would reach its final value one step after the last).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tapct.base.exits import UserError
from tapct.config import setting

REFERENCE_BATCH = 1024  # the global batch at which `lr` is stated under the square-root rule


@dataclass(frozen=True)
class OptimSchedule:
    """Learning rate, weight decay, teacher momentum and temperature over a run.

    Warm-ups are shares of the run, so that a shortened run keeps the shape of its curves.
    """

    lr: float = setting(
        4e-3,
        "peak learning rate; with lr_scaling=sqrt: the value for a global batch of 1024 "
        "(TAP-CT configs)",
        gt=0.0,
    )
    lr_scaling: str = setting(
        "sqrt",
        "sqrt: lr * sqrt(global batch / 1024) (DINOv2); none: lr is the same for every batch",
        choices=("sqrt", "none"),
    )
    min_lr: float = setting(
        1e-6, "learning rate at the end of the cosine; it is not scaled (DINOv2)", ge=0.0
    )
    warmup_share: float = setting(
        0.1,
        "share of all steps in which the learning rate rises linearly from 0 (TAP-CT configs: "
        "10 of 100 epochs)",
        ge=0.0,
        lt=1.0,
    )
    weight_decay: tuple[float, float] = setting(
        (0.04, 0.4),
        "weight decay at the start and at the end of the run, with a cosine between the two "
        "values (DINOv2)",
        ge=0.0,
    )
    momentum: tuple[float, float] = setting(
        (0.992, 1.0),
        "EMA momentum of the teacher at the start and at the end of the run, with a cosine "
        "between the two values (DINOv2)",
        ge=0.0,
        le=1.0,
    )
    teacher_temp: tuple[float, float] = setting(
        (0.04, 0.07),
        "teacher temperature at the start and after its warm-up; it changes linearly during the "
        "warm-up and is constant afterwards (DINOv2)",
        ge=1e-3,
    )
    teacher_temp_warmup_share: float = setting(
        0.3,
        "share of all steps in which the teacher temperature changes (TAP-CT configs: 30 of "
        "100 epochs)",
        ge=0.0,
        lt=1.0,
    )
    freeze_last_layer_steps: int = setting(
        0,
        "number of steps at the start in which the last layers of the heads are not trained "
        "(DINOv2: one epoch, 1250 steps)",
        ge=0,
    )


@dataclass(frozen=True)
class StepValues:
    """The scheduled values of one optimizer step.

    Args:
        lr: learning rate before layer decay and other multipliers.
        wd: weight decay of decayed parameters.
        momentum: m in teacher <- m * teacher + (1 - m) * student.
        teacher_temp: temperature of the teacher's targets.
        last_layer_frozen: the last layers of the heads take lr 0 in this step.
    """

    lr: float
    wd: float
    momentum: float
    teacher_temp: float
    last_layer_frozen: bool


def linear_warmup(step: int, start: float, end: float, num_steps: int) -> float:
    """Value at `step` of `num_steps` evenly spaced values from start to end, both included; `end`
    from then on.

    One step alone takes `start`, as numpy.linspace does.
    """
    if step >= num_steps:
        return end
    return start + (end - start) * step / (num_steps - 1) if num_steps > 1 else start


def cosine(step: int, start: float, end: float, num_steps: int) -> float:
    """Half a cosine from `start` at step 0 towards `end`, which it takes at `num_steps` and
    keeps.
    """
    if step >= num_steps:
        return end
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * step / num_steps))


def peak_lr(config: OptimSchedule, global_batch: int) -> float:
    """Learning rate at the end of the warm-up for this global batch (samples per optimizer step,
    all ranks).
    """
    scale = math.sqrt(global_batch / REFERENCE_BATCH) if config.lr_scaling == "sqrt" else 1.0
    return config.lr * scale


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run; stateless.

    Args:
        config: the curves.
        total_steps: optimizer steps of the whole run, >= 1.
        global_batch: samples per optimizer step over all ranks and micro-batches, >= 1.
    Raises:
        UserError: no steps, no samples, or a peak learning rate below `min_lr`.
    """

    config: OptimSchedule
    total_steps: int
    global_batch: int

    def __post_init__(self) -> None:
        for name, value in (("total steps", self.total_steps), ("global batch", self.global_batch)):
            if value < 1:
                raise UserError(
                    f"the schedules got {name} {value}; at least 1 is needed. Raise it in the "
                    "train section."
                )
        peak = peak_lr(self.config, self.global_batch)
        if peak < self.config.min_lr:
            raise UserError(
                f"peak learning rate {peak:.3g} (lr {self.config.lr:g}, scaling "
                f"'{self.config.lr_scaling}', global "
                f"batch {self.global_batch}) is below min_lr {self.config.min_lr:g}. Raise lr, "
                "lower min_lr, or set "
                "lr_scaling=none."
            )

    @property
    def warmup_steps(self) -> int:
        """Steps in which lr rises."""
        return round(self.config.warmup_share * self.total_steps)

    @property
    def teacher_temp_warmup_steps(self) -> int:
        """Steps in which the teacher temperature moves."""
        return round(self.config.teacher_temp_warmup_share * self.total_steps)

    def at(self, step: int) -> StepValues:
        """Values of one step.

        Args:
            step: number of optimizer steps finished before this one, >= 0; past the end every curve
                keeps its end.
        """
        assert step >= 0, step
        config, total = self.config, self.total_steps
        return StepValues(
            lr=self._lr(step),
            wd=cosine(step, *config.weight_decay, total),
            momentum=cosine(step, *config.momentum, total),
            teacher_temp=linear_warmup(step, *config.teacher_temp, self.teacher_temp_warmup_steps),
            last_layer_frozen=step < config.freeze_last_layer_steps,
        )

    def _lr(self, step: int) -> float:
        peak, warmup = peak_lr(self.config, self.global_batch), self.warmup_steps
        if step < warmup:
            return linear_warmup(step, 0.0, peak, warmup)
        return cosine(step - warmup, peak, self.config.min_lr, self.total_steps - warmup)
