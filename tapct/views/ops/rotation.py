"""Rotation: rotate the view in the axial plane about its centre, like a patient who lies at an
angle on the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tapct.base.exits import UserError
from tapct.config import setting
from tapct.views.key import Op, ViewKey


@dataclass(frozen=True)
class Config:
    """Fields of the op `rotation`; off unless a config names it.

    Source: defaults are ours; no published run used them.
    """

    p: tuple[float, float, float] = setting(
        (0.0, 0.3, 0.3),
        "probability for the first global view, other global views, local views",
        ge=0,
        le=1,
    )
    degrees: tuple[float, float] = setting(
        (-15.0, 15.0),
        "angle in degrees, drawn uniformly between the two values; positive: from the x axis "
        "towards the y axis",
        ge=-180,
        le=180,
    )

    def __post_init__(self) -> None:
        if self.degrees[0] > self.degrees[1]:
            raise UserError(f"rotation.degrees is {self.degrees}: the lower end comes first")


def build(config: Config) -> Op:
    """Rotate bilinearly, in mm, so that shapes are kept where pixels are not square.

    The corners are filled with the mirror image of the view at its border: an edge of air would
    show the angle.
    """

    def apply(view_BZYX: Tensor, key: ViewKey) -> Tensor:
        p = config.p[key.group]
        if p == 0:
            return view_BZYX  # saves the gather, which takes longer than all other ops
        angle_B = key.uniform("rotation angle", *config.degrees).flatten() * (math.pi / 180)
        height_B, width_B = (key.mm_B3[:, axis] * view_BZYX.shape[1 + axis] for axis in (1, 2))
        cos_B, sin_B = angle_B.cos(), angle_B.sin()
        # Rows of the matrix from a pixel to the place that it is read from. Its units are half the
        # sides of the view, so the sides' ratio in mm enters beside the sine.
        row_x_B3 = torch.stack([cos_B, sin_B * height_B / width_B, torch.zeros_like(cos_B)], dim=1)
        row_y_B3 = torch.stack([-sin_B * width_B / height_B, cos_B, torch.zeros_like(cos_B)], dim=1)
        place_BYX2 = F.affine_grid(
            torch.stack([row_x_B3, row_y_B3], 1), list(view_BZYX.shape), align_corners=False
        )
        turned_BZYX = F.grid_sample(
            view_BZYX, place_BYX2, padding_mode="reflection", align_corners=False
        )
        return torch.where(key.happens("rotation", p), turned_BZYX, view_BZYX)

    return apply
