"""Watch for ranks that hang, and name the rank that the others wait for."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch.distributed as dist

from tapct.base import console
from tapct.base.exits import LOST_RANK
from tapct.distributed.config import Config
from tapct.distributed.world import CAUSE_FIRST_S, LostRank, World, cause_of, lost_rank

# added to every time-out, so that the back-end's own error comes first: it may know the cause
EXTRA_S = 5.0
LONGEST_SLEEP_S = 10.0  # of the thread, between two checks
MOST_NAMES = 4  # ranks that a message names


class Watch:
    """Ends a run in which a rank hangs, and names that rank.

    A collective that not every rank joins never returns on NCCL, and on gloo its error does not say
    who is missing. So every rank reports its step to the store that all can read, and a thread
    beside training ends the process when this rank has been in one place for longer than its
    time-out.

    Args:
        world: ranks of the run.
        config: time-outs.
    """

    def __init__(self, world: World, config: Config) -> None:
        self.world, self.config = world, config
        self.place, self.since, self.until = "starting", time.monotonic(), math.inf
        self.over = threading.Event()

    def at(self, step: int, phase: Literal["starting", "training", "saving"]) -> None:
        """Report where this rank is: a few bytes to the store at which the ranks met.

        Args:
            step: index of the step, from 0.
            phase: what the rank does in this step.
        """
        timeout_s = self.config.save_timeout_s if phase == "saving" else self.config.timeout_s
        self.place, self.since = f"{phase} in step {step + 1}", time.monotonic()
        # one number, assigned at once, so that the thread never reads half of a change
        self.until = self.since + timeout_s + EXTRA_S
        if self.world.store is not None:
            self.world.store.set(f"where/{self.world.ranks.rank}", f"{step + 1} {phase}")

    def who_is_behind(self) -> str:
        """The ranks that have reported the lowest step, as a clause of a message."""
        try:
            reports = [self._last_report(rank) for rank in range(self.world.ranks.world)]
        except (dist.DistError, RuntimeError):
            return "the store at which the ranks met is gone, so rank 0 or its launcher has ended"
        lowest = min(step for step, _ in reports)
        behind = [rank for rank, (step, _) in enumerate(reports) if step == lowest]
        if len(behind) == len(reports):
            return f"all ranks had reached step {lowest}"
        names = []
        for rank in behind[:MOST_NAMES]:
            step, phase = reports[rank]
            names.append(f"rank {rank} (last reported: step {step}, {phase})")
        others = " and others" if len(behind) > MOST_NAMES else ""
        verb = "is" if len(behind) == 1 else "are"
        return f"{', '.join(names)}{others} {verb} furthest behind"

    def _last_report(self, rank: int) -> tuple[int, str]:
        """Step and phase that a rank has reported last."""
        assert self.world.store is not None
        key = f"where/{rank}"
        if not self.world.store.check([key]):  # `get` would wait for the first report
            return 0, "nothing"
        step, phase = self.world.store.get(key).decode().split()
        return int(step), phase

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Turn a back-end's error for a lost rank into one line with the step and the rank that is
        furthest behind.

        Raises:
            LostRank: another rank has ended or hangs.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world.store is None or not lost_rank(error):
                raise
            line = f"{self.place}: lost another rank ({cause_of(error)}); {self.who_is_behind()}"
            time.sleep(CAUSE_FIRST_S)  # the rank that knows the cause must print and end first
            raise LostRank(line) from error

    def run(self) -> None:
        """The thread: end this process once its time-out has passed."""
        shortest_s = min(self.config.timeout_s, self.config.save_timeout_s)
        while not self.over.wait(min(shortest_s / 4, LONGEST_SLEEP_S)):
            if time.monotonic() > self.until:
                waited_s = time.monotonic() - self.since
                console.error(
                    f"{self.place}: no progress for {waited_s:.0f} s; {self.who_is_behind()}"
                )
                os._exit(LOST_RANK)


@contextmanager
def watch_ranks(world: World, config: Config) -> Iterator[Watch]:
    """Watch the ranks while training runs; a single process needs no thread for it.

    Args:
        world: ranks of the run.
        config: time-outs.
    """
    watch = Watch(world, config)
    if world.store is None:
        yield watch
        return
    thread = threading.Thread(target=watch.run, name="tapct-watch", daemon=True)
    watch.at(-1, "starting")
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()
