"""Window jitter: clip the view to a slightly narrower HU window and stretch it to the full one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tapct.base.exits import UserError
from tapct.config import setting
from tapct.types import HUContract
from tapct.views.key import Op, ViewKey


@dataclass(frozen=True)
class Config:
    """Fields of the op `window_jitter`; off unless a config names it.

    Source: defaults are ours; no published run used them.
    """

    p: tuple[float, float, float] = setting(
        (0.0, 0.3, 0.3),
        "probability for the first global view, other global views, local views",
        ge=0,
        le=1,
    )
    low_hu: float = setting(
        30.0,
        "the lower end moves up by a number of HU that is drawn uniformly between 0 and this",
        ge=0,
    )
    high_hu: float = setting(
        200.0,
        "the upper end moves down by a number of HU that is drawn uniformly between 0 and this",
        ge=0,
    )

    def __post_init__(self) -> None:
        if self.low_hu + self.high_hu > 1000:
            raise UserError(
                f"window_jitter moves its ends by up to {self.low_hu} + {self.high_hu} HU: keep "
                "the sum at most 1000, or little of the window is left"
            )

    def check_contract(self, contract: HUContract) -> None:
        """Raise UserError where nothing of the HU window could be left."""
        width = contract.clip_high - contract.clip_low
        if self.low_hu + self.high_hu >= width:
            raise UserError(
                f"window_jitter moves the ends of the HU window by up to {self.low_hu:g} + "
                f"{self.high_hu:g} HU, and contract.clip_low to contract.clip_high are only "
                f"{width:g} HU; lower low_hu or high_hu"
            )


def build(config: Config) -> Op:
    """Clip to [low + a, high - b] and map this linearly onto [low, high]: air stays air, other HU
    shift a little.

    The window is never widened: the view was clipped to the full window before it was resampled.
    """

    def apply(view_BZYX: Tensor, key: ViewKey) -> Tensor:
        happens = key.happens("window jitter", config.p[key.group])
        clip_low, clip_high = key.contract.clip_low, key.contract.clip_high
        rise = torch.where(happens, key.uniform("window low", 0.0, config.low_hu), 0.0)
        drop = torch.where(happens, key.uniform("window high", 0.0, config.high_hu), 0.0)
        low, high = clip_low + rise, clip_high - drop
        unit = ((view_BZYX - low) / (high - low)).clamp_(0.0, 1.0)
        narrowed = unit.mul_(clip_high - clip_low).add_(clip_low)
        return torch.where(happens, narrowed, view_BZYX)

    return apply
