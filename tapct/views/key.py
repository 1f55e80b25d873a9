"""The key of a view: all that an op knows of the view it changes, and its random draws.

Axes: B batch, Z Y X depth height width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tapct.base import rng
from tapct.types import HUContract
from tapct.views.boxes import Kind


@dataclass(frozen=True)
class ViewKey:
    """The key of all draws for one view.

    Args:
        seed: seed of the run.
        sample_B: int64, numbers of the samples, on the device of the views.
        kind: global or local.
        view: number of the view within its kind.
        contract: HU window, mean and standard deviation of the run.
        mm_B3: float32, size of the view's voxels in mm along (z, y, x).
    """

    seed: int
    sample_B: Tensor
    kind: Kind
    view: int
    contract: HUContract
    mm_B3: Tensor

    @property
    def group(self) -> int:
        """Index into a field of three probabilities: 0 for the first global view, 1 for the
        other global views, 2 for local views.
        """
        return 2 if self.kind == "local" else min(self.view, 1)

    def uniform(self, purpose: str, low: float, high: float) -> Tensor:
        """(B, 1, 1, 1) float32, uniform in [low, high)."""
        u_B = rng.uniform(self.seed, f"{self.kind} {purpose}", self.sample_B, self.view)
        return (low + (high - low) * u_B)[:, None, None, None]

    def happens(self, purpose: str, p: float) -> Tensor:
        """(B, 1, 1, 1) bool, True with probability p."""
        return self.uniform(f"{purpose} happens", 0.0, 1.0) < p

    def normal_like(self, purpose: str, view_BZYX: Tensor) -> Tensor:
        """(B, Z, Y, X) standard normal float32; a sample's numbers do not depend on its place in
        the batch.
        """
        shape_ZYX = view_BZYX.shape[1:]
        voxel_ZYX = torch.arange(shape_ZYX.numel(), device=view_BZYX.device).view(shape_ZYX)
        sample_B111 = self.sample_B[:, None, None, None]
        return rng.normal(self.seed, f"{self.kind} {purpose}", sample_B111, self.view, voxel_ZYX)


# (view_BZYX in HU, key) -> view_BZYX in HU
Op: TypeAlias = Callable[[Tensor, ViewKey], Tensor]
