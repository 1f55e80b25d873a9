"""Gain: stretch HU about air by a factor, like another scanner calibration or contrast phase."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tapct.base.exits import UserError
from tapct.config import setting
from tapct.views.key import Op, ViewKey


@dataclass(frozen=True)
class Config:
    """Fields of the op `gain`.

    Source: TAP-CT's public training configs (0.8-1.2, p 0.7 on global 2 and locals).
    """

    p: tuple[float, float, float] = setting(
        (0.0, 0.7, 0.7),
        "probability for the first global view, other global views, local views",
        ge=0,
        le=1,
    )
    factor: tuple[float, float] = setting(
        (0.8, 1.2),
        "HU -> air + factor * (HU - air) with air = contract.clip_low; the factor is drawn "
        "uniformly between the two values",
        gt=0,
    )

    def __post_init__(self) -> None:
        if self.factor[0] > self.factor[1]:
            raise UserError(f"gain.factor is {self.factor}: the lower end comes first")


def build(config: Config) -> Op:
    """view -> air + factor * (view - air).

    Air, the lower clip of the window, stays air; a gain on z-scores would move it. Values above the
    upper clip are cut when the view is normalised.
    """

    def apply(view_BZYX: Tensor, key: ViewKey) -> Tensor:
        happens = key.happens("gain", config.p[key.group])
        factor = torch.where(happens, key.uniform("gain factor", *config.factor), 1.0)
        air = key.contract.clip_low
        return (view_BZYX - air).mul_(factor).add_(air)

    return apply
