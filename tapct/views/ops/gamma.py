"""Gamma: bend the HU scale inside its window, both ends fixed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tapct.base.exits import UserError
from tapct.config import setting
from tapct.views.key import Op, ViewKey


@dataclass(frozen=True)
class Config:
    """Fields of the op `gamma`; off unless a config names it.

    Source: defaults are ours; no published run used them.
    """

    p: tuple[float, float, float] = setting(
        (0.0, 0.3, 0.3),
        "probability for the first global view, other global views, local views",
        ge=0,
        le=1,
    )
    exponent: tuple[float, float] = setting(
        (0.8, 1.25),
        "u -> u^exponent, where u is the HU value mapped from the HU window to [0, 1]; the "
        "exponent is drawn log-uniformly between the two values",
        gt=0,
    )

    def __post_init__(self) -> None:
        if self.exponent[0] > self.exponent[1]:
            raise UserError(f"gamma.exponent is {self.exponent}: the lower end comes first")


def build(config: Config) -> Op:
    """x -> x ** exponent, where x is HU mapped from the window of the contract to [0, 1]; both ends
    of the window stay.
    """

    def apply(view_BZYX: Tensor, key: ViewKey) -> Tensor:
        low, high = key.contract.clip_low, key.contract.clip_high
        log_exponent = key.uniform("gamma exponent", *(math.log(e) for e in config.exponent))
        unit = view_BZYX.sub(low).div_(high - low).clamp_(0.0, 1.0)
        bent = unit.pow_(log_exponent.exp()).mul_(high - low).add_(low)
        return torch.where(key.happens("gamma", config.p[key.group]), bent, view_BZYX)

    return apply
