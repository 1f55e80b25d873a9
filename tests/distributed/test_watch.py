"""A rank that hangs is named, and the run ends with the exit code of a lost rank."""

from __future__ import annotations

import os
import time
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist

from tapct.base import ending
from tapct.base.exits import LOST_RANK
from tapct.base.ranks import Ranks
from tapct.distributed import watch as watching
from tapct.distributed.config import Config
from tapct.distributed.watch import Behind, Phase, Watch
from tapct.distributed.world import LostRank, World

ROOT = Path(watching.__file__).resolve().parents[2]


def watch_of(rank: int, num_ranks: int, store: dist.Store) -> Watch:
    world = World(Ranks(rank, num_ranks, rank), torch.device("cpu"), store=store)
    return Watch(world, Config())


@pytest.mark.parametrize(
    ("steps", "clause"),
    [
        ({0: 6, 1: 6}, "all ranks had reached step 7, forward"),
        ({0: 6, 1: 5}, "rank 1 (last reported: step 6, forward) is furthest behind"),
        ({0: 6}, "rank 1 (last reported: step 0, nothing) is furthest behind"),
        (
            {0: 6, 1: 5, 2: 5},
            "rank 1 (last reported: step 6, forward), rank 2 (last reported: step 6, forward) "
            "are furthest behind",
        ),
    ],
)
def test_the_rank_with_the_lowest_step_is_behind(steps: dict[int, int], clause: str) -> None:
    store, num_ranks = dist.HashStore(), max(2, len(steps))
    watches = [watch_of(rank, num_ranks, store) for rank in range(num_ranks)]
    for rank, step in steps.items():
        watches[rank].at(step, "forward")
    assert watches[0].who_is_behind() == Behind(clause)


@pytest.mark.parametrize("reached", range(1, 6))
def test_within_a_step_the_rank_that_has_come_less_far_is_behind(reached: int) -> None:
    store = dist.HashStore()
    watches = [watch_of(rank, 3, store) for rank in range(3)]
    # two micro-batches
    step: tuple[Phase, ...] = ("data", "views", "forward", "views", "forward", "collective")
    for rank, watch in enumerate(watches):
        store.set(f"node/{rank}", f"node{rank}")
        for phase in step[:reached] if rank == 1 else step:
            watch.at(6, phase)
    assert watches[0].who_is_behind() == Behind(
        f"rank 1 on node1 (last reported: step 7, {step[reached - 1]}) is furthest behind",
        ("node1",),
    )


def test_in_one_phase_the_rank_that_has_joined_fewer_collectives_is_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.HashStore()
    watches = [watch_of(rank, 3, store) for rank in range(3)]
    for rank, watch in enumerate(watches):
        watch.at(6, "forward")
        store.set(f"joined/{rank}", str(40 - (rank == 2)))
    monkeypatch.setattr(watching, "num_collectives", lambda: 40)
    clause = "rank 2 (last reported: step 7, forward) is furthest behind"
    assert watches[0].who_is_behind() == Behind(clause)


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "ANSWER_S", 0.1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "gpu01")
    monkeypatch.setenv("MASTER_PORT", "29500")
    watch = watch_of(1, 2, dist.HashStore())

    def answer_late(rank: int) -> tuple[int, int, str]:
        time.sleep(1.0)
        return 1, 0, "forward"

    monkeypatch.setattr(watch, "_last_report", answer_late)
    clause = "rank 0 on gpu01, which keeps the reports, does not answer"
    assert watch.who_is_behind() == Behind(clause, ("gpu01",))


def test_a_thread_that_waits_for_the_store_does_not_keep_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "JOIN_S", 0.1)
    watch = watch_of(1, 2, dist.HashStore())
    monkeypatch.setattr(watch, "run", lambda: time.sleep(5.0))
    began = time.monotonic()
    with pytest.raises(LostRank), watching.watch_ranks(watch):
        raise LostRank("rank 0 is gone")
    assert time.monotonic() - began < 3.0


def test_at_most_four_ranks_are_named() -> None:
    store = dist.HashStore()
    watches = [watch_of(rank, 9, store) for rank in range(9)]
    watches[0].at(3, "save")
    clause = watches[0].who_is_behind().clause
    assert clause.count("last reported") == 4 and clause.endswith("and others are furthest behind")


def test_a_lost_rank_becomes_one_line_and_other_errors_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "CAUSE_FIRST_S", 0.0)
    watch = watch_of(0, 2, dist.HashStore())
    watch.at(4, "collective")
    with (
        pytest.raises(LostRank, match=r"step 5, collective: lost another rank \(Connection closed"),
        watch.naming_lost_ranks(),
    ):
        raise RuntimeError("[pair.cc:5] Connection closed by peer [10.0.0.1]:99. This may mean ...")
    with pytest.raises(RuntimeError, match="shapes differ"), watch.naming_lost_ranks():
        raise RuntimeError("shapes differ")


HANGING = """
import time
import torch, torch.distributed as dist
from tapct.base.ranks import Ranks
from tapct.distributed import watch as watching
from tapct.distributed.config import Config
from tapct.distributed.world import World

watching.EXTRA_S = 0.0
store = dist.HashStore()
world = World(Ranks(0, 2, 0), torch.device("cpu"), store=store)
watch = watching.Watch(world, Config(timeout_s=1.0, save_timeout_s={save_timeout_s}))
with watching.watch_ranks(watch):
    store.set("where/1", "3 0 forward")
    store.set("node/1", "gpu07")
    watch.at(3, "{phase}")
    time.sleep({seconds})
print("over")
"""


def run_hanging(phase: str, seconds: float, save_timeout_s: float) -> tuple[int, str, str]:
    program = HANGING.format(phase=phase, seconds=seconds, save_timeout_s=save_timeout_s)
    done = forked.run(["-c", program], {**os.environ, "PYTHONPATH": str(ROOT)}, timeout=100)
    return done.returncode, done.stdout, done.stderr


def test_a_process_that_waits_too_long_ends_and_names_the_other_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ending.MARK, str(tmp_path / "end"))
    code, out, err = run_hanging("collective", seconds=60, save_timeout_s=1.0)
    assert code == LOST_RANK and out == ""
    assert err.startswith("error: step 4, collective: no progress for ")
    line = "rank 1 on gpu07 (last reported: step 3, forward) is furthest behind"
    assert err.endswith(line + "\n")
    # for the batch script of a job
    end, nodes, why = (tmp_path / "end").read_text().splitlines()
    assert (end, nodes) == ("lost", "gpu07") and why.endswith(line)


def test_a_save_may_take_longer_than_a_collective() -> None:
    assert run_hanging("save", seconds=3, save_timeout_s=90.0) == (0, "over\n", "")
