"""An intensity op that changes nothing and keeps one rank waiting: TAPCT_LATE="RANK SECONDS"."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from torch import Tensor

from tapct.distributed import collectives
from tapct.views.key import Op, ViewKey


@dataclass(frozen=True)
class Config:
    """Nothing to set."""


def build(config: Config) -> Op:
    """Sleep, and hand the view back."""
    rank, seconds = os.environ.get("TAPCT_LATE", "-1 0").split()

    def apply(view_BZYX: Tensor, key: ViewKey) -> Tensor:
        if collectives.rank() == int(rank):
            time.sleep(float(seconds))
        return view_BZYX

    return apply
