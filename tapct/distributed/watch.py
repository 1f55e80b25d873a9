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
from tapct.distributed.world import (
    CAUSE_FIRST_S,
    Config,
    LostRank,
    World,
    cause_of,
    lost_rank,
)

PATIENCE_S = 5.0  # more than the back-end's own time-out, so that its word comes first


class Watch:
    """Ends a run in which a rank hangs, and says which: every rank writes down where it is, where
    all can read it.

    A collective that not every rank joins never returns on NCCL, and without a word of who is
    missing on gloo. So a thread beside training looks at the clock, and reads the others' last
    words when this rank has been in one place for longer than that place's time-out.
    """

    def __init__(self, world: World, config: Config) -> None:
        self.world, self.config = world, config
        self.where, self.since, self.until = "starting", time.monotonic(), math.inf
        self.over = threading.Event()

    def at(self, step: int, what: Literal["starting", "training", "saving"]) -> None:
        """Write down where this rank is; a few bytes to the store that the ranks met at."""
        limit_s = self.config.save_timeout_s if what == "saving" else self.config.timeout_s
        self.where, self.since = f"{what} in step {step + 1}", time.monotonic()
        self.until = (
            self.since + limit_s + PATIENCE_S
        )  # one number, so that the thread reads no half of a change
        if self.world.store is not None:
            self.world.store.set(f"where/{self.world.ranks.rank}", f"{step + 1} {what}")

    def others(self) -> str:
        """Who is behind, in words."""
        assert self.world.store is not None
        try:
            keys = [f"where/{rank}" for rank in range(self.world.ranks.world)]
            # `get` would wait for a word that was never written
            told = [
                self.world.store.get(key).decode() if self.world.store.check([key]) else "0 nothing"
                for key in keys
            ]
        except (dist.DistError, RuntimeError):
            return "and the store that they met at is gone, so rank 0 or its launcher has ended"
        steps = [int(line.split()[0]) for line in told]
        behind = [
            f"rank {rank} ({line})"
            for rank, line in enumerate(told)
            if int(line.split()[0]) == min(steps)
        ]
        if len(behind) == len(told):
            return f"all ranks had come to step {steps[0]}"
        return (
            "the last word of "
            f"{', '.join(behind[:4])}{' and others' if len(behind) > 4 else ''} is the oldest"
        )

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Turn what a back-end says when a rank is gone into one line with rank, step and who was
        last heard of.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world.store is None or not lost_rank(error):
                raise
            words = f"{self.where}: lost another rank ({cause_of(error)}); {self.others()}"
            time.sleep(
                CAUSE_FIRST_S
            )  # so that the rank which knows the cause speaks and ends first
            raise LostRank(words) from error

    def look(self) -> None:
        """The thread."""
        while not self.over.wait(
            min(self.config.timeout_s / 4, self.config.save_timeout_s / 4, 10.0)
        ):
            if time.monotonic() > self.until:
                console.error(
                    f"{self.where}: nothing moved for {time.monotonic() - self.since:.0f} s; "
                    f"{self.others()}"
                )
                os._exit(LOST_RANK)


@contextmanager
def watch(world: World, config: Config) -> Iterator[Watch]:
    """Look after the ranks while training runs; one process needs nobody to look after it."""
    watch = Watch(world, config)
    if world.store is None:
        yield watch
        return
    thread = threading.Thread(target=watch.look, name="tapct-watch", daemon=True)
    watch.at(-1, "starting")
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()
