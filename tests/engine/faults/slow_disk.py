"""An intensity op that changes nothing, and makes one rank's disk slow: TAPCT_SLOW_DISK="RANK
SECONDS".

The first file of a checkpoint that the rank forces to the disk takes that long: its shards. The
watch of the ranks ends a process a second after its time-out, and not after five.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from torch import Tensor

from tapct.distributed import collectives, watch
from tapct.views.key import Op, ViewKey

RANK, SECONDS = (float(word) for word in os.environ.get("TAPCT_SLOW_DISK", "-1 0").split())
sync, slow = os.fsync, [SECONDS]


def slow_sync(file: int) -> None:
    """os.fsync, of which the first call in the thread that saves is slow on the chosen rank."""
    saves = threading.current_thread().name.startswith("tapct-checkpoint")
    if saves and slow and collectives.rank() == RANK:
        time.sleep(slow.pop())
    sync(file)


os.fsync = slow_sync
watch.EXTRA_S = 1.0


@dataclass(frozen=True)
class Config:
    """Nothing to set."""


def build(config: Config) -> Op:
    """Hand views back."""

    def apply(view_BZYX: Tensor, key: ViewKey) -> Tensor:
        return view_BZYX

    return apply
