"""A loss of value 0 that does to one rank what the environment asks for: TAPCT_FAULT="RANK STEP
ACTION", steps from 1.

It stands in every run of a comparison, so that the configs are equal; without the variable it does
nothing.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tapct.distributed import collectives
from tapct.nn.contracts import Loss
from tapct.types import LossResult, Term, TokenSets


@dataclass(frozen=True)
class Config:
    """Nothing to set."""


class NanGradient(torch.autograd.Function):
    """0 whose gradient is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].new_full(ctx.shape, float("nan"))


class Saboteur(Loss):
    """Counts optimizer steps and acts at one of them."""

    head_of = ""
    steps: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("steps", torch.zeros(()))

    def forward(
        self,
        sets: TokenSets,
        student_head: nn.Module | None = None,
        teacher_head: nn.Module | None = None,
    ) -> LossResult:
        """Act, and add nothing."""
        cls_BD = sets.student_global.cls_BD
        value = (cls_BD * 0.0).sum()
        rank, step, action = os.environ.get("TAPCT_FAULT", "-1 0 none").split()
        first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first_try and collectives.rank() == int(rank) and int(self.steps) + 1 == int(step):
            value = value + act(action, cls_BD)
            self.steps += action == "drift"
        return LossResult((Term("saboteur", value),))

    def finish_step(self, apply: Tensor) -> None:
        """Count."""
        self.steps += 1


def act(action: str, cls_BD: Tensor) -> Tensor | float:
    """What goes wrong; returns what is added to the loss."""
    if action.startswith("SIG"):
        send(signal.Signals[action])
    elif action == "hang":
        time.sleep(3600)
    elif action == "raise":
        raise ValueError("the saboteur's own fault")
    elif action == "nan-gradient":
        value: Tensor = NanGradient.apply(cls_BD)
        return value
    elif action == "nan-loss":
        return float("nan")
    return 0.0


def send(number: signal.Signals) -> None:
    """Send this process a signal and wait until its handler has run; in `tapct train` another
    thread takes it.
    """
    flag = getattr(signal.getsignal(number), "__self__", None)
    os.kill(os.getpid(), number)
    until = time.monotonic() + 10.0
    while flag is not None and not flag.signal and time.monotonic() < until:
        time.sleep(0.001)


def build(config: Config) -> Saboteur:
    """Make the loss."""
    return Saboteur(config)
