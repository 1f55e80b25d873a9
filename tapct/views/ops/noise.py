"""Noise: white Gaussian noise in HU, as a lower dose or a sharper kernel would add."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tapct.base.exits import UserError
from tapct.config import setting
from tapct.views.key import Op, ViewKey


@dataclass(frozen=True)
class Config:
    """Fields of the op `noise`; off unless a config names it.

    Source: defaults are ours; no published run used them.
    """

    p: tuple[float, float, float] = setting(
        (0.0, 0.3, 0.3),
        "probability for the first global view, other global views, local views",
        ge=0,
        le=1,
    )
    sigma_hu: tuple[float, float] = setting(
        (0.0, 30.0), "standard deviation in HU, drawn uniformly between the two values", ge=0
    )

    def __post_init__(self) -> None:
        if self.sigma_hu[0] > self.sigma_hu[1]:
            raise UserError(f"noise.sigma_hu is {self.sigma_hu}: the lower end comes first")


def build(config: Config) -> Op:
    """view -> view + sigma * normal; values below air are cut when the view is normalised."""

    def apply(view_BZYX: Tensor, key: ViewKey) -> Tensor:
        p = config.p[key.group]
        if p == 0:
            return view_BZYX  # saves a hash per voxel, which takes longer than any other draw
        happens = key.happens("noise", p)
        sigma = torch.where(happens, key.uniform("noise sigma", *config.sigma_hu), 0.0)
        return key.normal_like("noise", view_BZYX).mul_(sigma).add_(view_BZYX)

    return apply
