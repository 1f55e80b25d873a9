"""Watch for ranks that hang, and name the rank that the others wait for."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from tapct.base import console, ending, ranks
from tapct.base.exits import LOST_RANK
from tapct.base.launcher import Torchrun
from tapct.distributed.config import Config
from tapct.distributed.world import CAUSE_FIRST_S, LostRank, World, cause_of, lost_rank

# added to every time-out, so that the back-end's own error comes first: it may know the cause
EXTRA_S = 5.0
LONGEST_SLEEP_S = 10.0  # of the thread, between two checks
MOST_NAMES = 4  # ranks that a message names
ANSWER_S = 10.0  # within which the store must answer
# The thread may wait for a store that never answers: the first rank keeps it, and can hang itself.
JOIN_S = 2.0

# What a rank does within a step. `forward` includes the backward pass, in which FSDP gathers
# weights and reduces gradients; `collective` is the one sum of all that ranks agree on.
Phase = Literal["starting", "data", "views", "forward", "collective", "optimizer", "save"]
NCCL_HINT = (
    "; for the collective that each rank waits in, start with TORCH_NCCL_TRACE_BUFFER_SIZE=2000 "
    "TORCH_NCCL_DUMP_ON_TIMEOUT=1 and read its files (/tmp/nccl_trace_rank_N) with the command "
    "`torchfrtrace`"
)


@dataclass(frozen=True)
class Behind:
    """The ranks that are furthest behind.

    Args:
        clause: they as a clause of a message.
        nodes: names of their nodes; empty where all ranks are equally far.
    """

    clause: str
    nodes: tuple[str, ...] = ()


class Watch:
    """Ends a run in which a rank hangs, and names that rank.

    A collective that not every rank joins never returns on NCCL, and on gloo its error does not say
    who is missing. So every rank reports its step and phase to the store that all can read, and a
    thread beside training ends the process when this rank has been in one place for longer than
    its time-out.

    Args:
        world: ranks of the run.
        config: time-outs.
    """

    def __init__(self, world: World, config: Config) -> None:
        self.world, self.config = world, config
        self.place, self.since, self.until = "starting", time.monotonic(), math.inf
        self.step, self.count = -1, 0  # of the last report, and reports in this step
        self.over = threading.Event()
        self.torchrun = Torchrun(os.environ)

    def at(self, step: int, phase: Phase) -> None:
        """Report what this rank begins to do: a few bytes to the store at which the ranks met. It
        does not wait for an answer.

        Args:
            step: index of the step, from 0.
            phase: what the rank does in this step.
        """
        self.count = self.count + 1 if step == self.step else 0
        self.step = step
        timeout_s = self.config.save_timeout_s if phase == "save" else self.config.timeout_s
        self.place, self.since = f"step {step + 1}, {phase}", time.monotonic()
        # one number, assigned at once, so that the thread never reads half of a change
        self.until = self.since + timeout_s + EXTRA_S
        self.report(f"where/{self.world.ranks.rank}", f"{step + 1} {self.count} {phase}")

    def report(self, key: str, value: str) -> None:
        """Write a value to the store at which the ranks met, if there are several."""
        # the store of torchrun ends with it: then all ranks stop after this step, and save
        if self.world.store is not None and not self.torchrun.has_ended():
            self.world.store.set(key, value)

    def name_node(self) -> None:
        """Write the name of this rank's node to the store."""
        self.report(f"node/{self.world.ranks.rank}", ending.node_name(os.environ))

    def who_is_behind(self) -> Behind:
        """The ranks that are furthest behind, asked of the store with a time-out: the process that
        keeps the store can be the one that hangs.
        """
        answers: list[Behind] = []
        asking = threading.Thread(target=lambda: answers.append(self._who_is_behind()), daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        if answers:
            return answers[0]
        keeper = "torchrun" if self.torchrun.process else "rank 0"
        with suppress(ValueError):
            host, _ = ranks.rendezvous(os.environ)
            return Behind(f"{keeper} on {host}, which keeps the reports, does not answer", (host,))
        return Behind(f"{keeper}, which keeps the reports, does not answer")

    def _who_is_behind(self) -> Behind:
        """The ranks that have reported the earliest place: the lowest step, in it the fewest
        phases, and of those in the same phase the ones that have joined the fewest collectives.
        """
        try:
            reports = [self._last_report(rank) for rank in range(self.world.ranks.world)]
            earliest = min((step, count) for step, count, _ in reports)
            behind = [rank for rank, report in enumerate(reports) if report[:2] == earliest]
            if len(behind) == len(reports):
                joined = [self._joined(rank) for rank in behind]
                behind = [rank for rank in behind if joined[rank] == min(joined)]
            nodes = {rank: self._node(rank) for rank in behind}
        except (dist.DistError, RuntimeError):
            return Behind(
                "the store at which the ranks met is gone, so rank 0 or its launcher has ended"
            )
        if len(behind) == len(reports):
            step, _, phase = reports[0]
            return Behind(f"all ranks had reached step {step}, {phase}")
        names = []
        for rank in behind[:MOST_NAMES]:
            step, _, phase = reports[rank]
            on = f" on {nodes[rank]}" if nodes[rank] else ""
            names.append(f"rank {rank}{on} (last reported: step {step}, {phase})")
        others = " and others" if len(behind) > MOST_NAMES else ""
        verb = "is" if len(behind) == 1 else "are"
        return Behind(
            f"{', '.join(names)}{others} {verb} furthest behind",
            tuple(sorted(set(filter(None, nodes.values())))),
        )

    def _last_report(self, rank: int) -> tuple[int, int, str]:
        """Step, number of the report in it, and phase that a rank has reported last."""
        assert self.world.store is not None
        key = f"where/{rank}"
        if not self.world.store.check([key]):  # `get` would wait for the first report
            return 0, 0, "nothing"
        step, count, phase = self.world.store.get(key).decode().split()
        return int(step), int(count), phase

    def node_of(self, rank: int) -> str:
        """Name of a rank's node; empty where it has not written it, or the store is lost."""
        try:
            return "" if self.world.store is None else self._node(rank)
        except (dist.DistError, RuntimeError):
            return ""

    def _node(self, rank: int) -> str:
        assert self.world.store is not None
        key = f"node/{rank}"
        return self.world.store.get(key).decode() if self.world.store.check([key]) else ""

    def _joined(self, rank: int) -> int:
        """Number of collectives that a rank had joined when its thread looked last; now, for this
        one.
        """
        assert self.world.store is not None
        if rank == self.world.ranks.rank:
            return num_collectives()
        key = f"joined/{rank}"
        return int(self.world.store.get(key)) if self.world.store.check([key]) else 0

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
            behind = self.who_is_behind()
            line = f"{self.place}: lost another rank ({cause_of(error)}); {behind.clause}"
            time.sleep(CAUSE_FIRST_S)  # the rank that knows the cause must print and end first
            raise LostRank(line, behind.nodes) from error

    def run(self) -> None:
        """The thread: report how many collectives this rank has joined, and end this process once
        its time-out has passed.
        """
        shortest_s = min(self.config.timeout_s, self.config.save_timeout_s)
        while not self.over.wait(min(shortest_s / 4, LONGEST_SLEEP_S)):
            if time.monotonic() > self.until:
                try:
                    waited_s = time.monotonic() - self.since
                    behind = self.who_is_behind()
                    line = f"{self.place}: no progress for {waited_s:.0f} s; {behind.clause}"
                    ending.leave("lost", line, behind.nodes)
                    console.error(line + (NCCL_HINT if self.world.device.type == "cuda" else ""))
                finally:  # whatever fails here, as a pipe that nobody reads any more
                    os._exit(LOST_RANK)
            # last, because it waits where the store is cut off
            with suppress(dist.DistError, RuntimeError):  # `who_is_behind` reports a lost store
                self.report(f"joined/{self.world.ranks.rank}", str(num_collectives()))


def num_collectives() -> int:
    """Number of collectives that this process has joined, over all process groups; torch counts
    them without a public function.
    """
    total = 0
    for group in list(getattr(dist.distributed_c10d._world, "pg_map", ())):
        with suppress(RuntimeError, AttributeError):  # a back-end that does not count
            total += int(group._get_sequence_number_for_group())
    return total


@contextmanager
def watch_ranks(watch: Watch) -> Iterator[Watch]:
    """Watch the ranks while training runs; a single process needs no thread for it.

    Args:
        watch: of this rank.
    """
    if watch.world.store is None:
        yield watch
        return
    thread = threading.Thread(target=watch.run, name="tapct-watch", daemon=True)
    watch.name_node()
    watch.at(-1, "starting")
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join(JOIN_S)
