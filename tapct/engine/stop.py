"""When to stop: signals, the end of a job's time, a failed save; one rank's reason becomes that of
all.

Every rank puts what it knows into the step's one collective (`slots`), and all read the same sum
(`agreed`). On a GPU the sum is read one step late, when it has long arrived, so that the host never
waits for the device.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping
from types import FrameType

import torch
from torch import Tensor

from tapct.base.launcher import Torchrun

TIME_LIMIT = "time limit"
NO_LAUNCHER = "the end of torchrun"  # by a signal that it does not pass on, such as SIGUSR1
FAILED_SAVE = "failed save"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# the first one that holds is reported
REASONS = (FAILED_SAVE, *(one.name for one in SIGNALS), TIME_LIMIT, NO_LAUNCHER)


class StopFlag:
    """Remembers the first stop signal instead of dying from it; the second Ctrl-C goes through.

    Args:
        device: device on which the step's collective runs.
        alone: whether there is one process, which needs no agreement.
        deadline: `time.time()` after which training stops; infinite for none.
    """

    def __init__(
        self, device: torch.device, alone: bool = True, deadline: float = math.inf
    ) -> None:
        self.device, self.alone, self.deadline = device, alone, deadline
        self.torchrun = Torchrun(os.environ)
        self.signal = ""
        self.failed_save = False
        self.previous: dict[int, object] = {}
        self.heard: deque[tuple[Tensor, torch.cuda.Event | None]] = deque(maxlen=2)

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.previous[number] = signal.signal(number, self.notice)
        return self

    def notice(self, number: int, frame: FrameType | None) -> None:
        """Handler of all four signals."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reason(self) -> str:
        """Why this rank would stop; empty to continue."""
        if self.failed_save:
            return FAILED_SAVE
        if self.signal:
            return self.signal
        if time.time() > self.deadline:
            return TIME_LIMIT
        return NO_LAUNCHER if self.torchrun.has_ended() else ""

    def slots(self) -> Tensor:
        """Part of this rank in the collective: one number per reason, 0 or 1."""
        mine, slots = self.reason(), torch.zeros(len(REASONS), device=self.device)
        if mine:  # filled where it lies: `slots[i] = 1.0` copies from the host and waits for it
            slots[REASONS.index(mine)].fill_(1.0)
        return slots

    def hear(self, summed: Tensor) -> None:
        """Take in the sum over ranks of the step that was just queued, without waiting for it.

        Args:
            summed: sum of `slots` over the ranks, on the device.
        """
        if self.device.type != "cuda":
            self.heard.append((summed.clone(), None))
            return
        host = torch.empty(summed.shape, dtype=summed.dtype, pin_memory=True)
        host.copy_(summed, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.heard.append((host, event))

    def agreed(self) -> str:
        """Why all ranks stop now, the same on every one; empty to continue."""
        if self.alone:
            return self.reason()
        late = self.device.type == "cuda"
        if len(self.heard) < 1 + late:
            return ""
        sums, event = self.heard[-1 - late]
        if event is not None:
            event.synchronize()
        return next(
            (reason for reason, count in zip(REASONS, sums.tolist(), strict=True) if count), ""
        )


def job_deadline(environment: Mapping[str, str], margin_s: float) -> float:
    """`time.time()` at which a SLURM job should begin its last save; infinite outside of one, or
    without a limit.

    Args:
        environment: `os.environ`; SLURM_JOB_END_TIME holds seconds since 1970.
        margin_s: seconds before the end of the job's time.
    """
    end = environment.get("SLURM_JOB_END_TIME", "")
    return float(end) - margin_s if end.isdigit() and int(end) else math.inf
