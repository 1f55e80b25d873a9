"""A rank that hangs is named, and the run ends with the exit code of a lost rank."""

from __future__ import annotations

import os
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist

from tapct.base.exits import LOST_RANK
from tapct.base.ranks import Ranks
from tapct.distributed import watch as watching
from tapct.distributed.config import Config
from tapct.distributed.watch import Watch
from tapct.distributed.world import LostRank, World

ROOT = Path(watching.__file__).resolve().parents[2]


def watch_of(rank: int, num_ranks: int, store: dist.Store) -> Watch:
    world = World(Ranks(rank, num_ranks, rank), torch.device("cpu"), store=store)
    return Watch(world, Config())


@pytest.mark.parametrize(
    ("steps", "clause"),
    [
        ({0: 6, 1: 6}, "all ranks had reached step 7"),
        ({0: 6, 1: 5}, "rank 1 (last reported: step 6, training) is furthest behind"),
        ({0: 6}, "rank 1 (last reported: step 0, nothing) is furthest behind"),
        (
            {0: 6, 1: 5, 2: 5},
            "rank 1 (last reported: step 6, training), rank 2 (last reported: step 6, training) "
            "are furthest behind",
        ),
    ],
)
def test_the_rank_with_the_lowest_step_is_behind(steps: dict[int, int], clause: str) -> None:
    store, num_ranks = dist.HashStore(), max(2, len(steps))
    watches = [watch_of(rank, num_ranks, store) for rank in range(num_ranks)]
    for rank, step in steps.items():
        watches[rank].at(step, "training")
    assert watches[0].who_is_behind() == clause


def test_at_most_four_ranks_are_named() -> None:
    store = dist.HashStore()
    watches = [watch_of(rank, 9, store) for rank in range(9)]
    watches[0].at(3, "saving")
    clause = watches[0].who_is_behind()
    assert clause.count("last reported") == 4 and clause.endswith("and others are furthest behind")


def test_a_lost_rank_becomes_one_line_and_other_errors_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "CAUSE_FIRST_S", 0.0)
    watch = watch_of(0, 2, dist.HashStore())
    watch.at(4, "training")
    with (
        pytest.raises(LostRank, match=r"training in step 5: lost another rank \(Connection closed"),
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
with watching.watch_ranks(world, Config(timeout_s=1.0, save_timeout_s={save_timeout_s})) as watch:
    store.set("where/1", "3 training")
    watch.at(3, "{phase}")
    time.sleep({seconds})
print("over")
"""


def run_hanging(phase: str, seconds: float, save_timeout_s: float) -> tuple[int, str, str]:
    program = HANGING.format(phase=phase, seconds=seconds, save_timeout_s=save_timeout_s)
    done = forked.run(["-c", program], {**os.environ, "PYTHONPATH": str(ROOT)}, timeout=100)
    return done.returncode, done.stdout, done.stderr


def test_a_process_that_waits_too_long_ends_and_names_the_other_rank() -> None:
    code, out, err = run_hanging("training", seconds=60, save_timeout_s=1.0)
    assert code == LOST_RANK and out == ""
    assert err.startswith("error: training in step 4: no progress for ")
    assert err.endswith("rank 1 (last reported: step 3, training) is furthest behind\n")


def test_a_save_may_take_longer_than_a_collective() -> None:
    assert run_hanging("saving", seconds=3, save_timeout_s=90.0) == (0, "over\n", "")
