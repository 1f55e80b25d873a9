"""What goes wrong on one rank ends the run of all in bounded time, with a one-line error that
names its cause, and loses nothing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from many_ranks import PLAIN, all_ended, begin, ended, good, launch, start, train
from small_disk import small_disk
from tiny_run import assert_equal_runs, differences, numbers_of, state_of

from tapct.engine.checkpoint import Checkpoints

pytestmark = pytest.mark.dist
STEPS = 12
# on a busy machine a kill may else come before what it must leave alone
IN_TURN = "checkpoint.asynchronous=false"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """Run folder of two ranks to which nothing happened."""
    folder = tmp_path_factory.mktemp("undisturbed")
    good(train(2, folder, store, *PLAIN))
    return folder / "run"


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


def seconds_since_last_step(folder: Path) -> float:
    """From the last step that was written down until now; how long a busy machine took to start
    does not count.
    """
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return time.time() - float(json.loads(rows[-1])["time"])


def seconds_until_the_checkpoint(folder: Path) -> float:
    """From the last step that was written down until its checkpoint was announced."""
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    announced = (folder / "run" / "checkpoints" / "latest").stat().st_mtime
    return announced - float(json.loads(rows[-1])["time"])


def newest(folder: Path) -> str:
    found, complaints = Checkpoints(folder / "run" / "checkpoints", keep=9).newest_whole()
    assert complaints == []
    return found.name if found else ""


def test_a_rank_that_is_killed_ends_the_others_and_the_run_resumes_to_the_same_bits(
    tmp_path: Path, store: Path, undisturbed: Path
) -> None:
    done = launch(2, tmp_path, store, *PLAIN, IN_TURN, fault="1 7 SIGKILL")
    assert done.returncode != 0 and seconds_since_last_step(tmp_path) < 60
    assert newest(tmp_path) == "step_00000004"
    good(train(2, tmp_path, store, *PLAIN))
    assert_equal_runs(tmp_path / "run", undisturbed, tmp_path)


def test_torchrun_restarts_a_run_whose_rank_was_killed(
    tmp_path: Path, store: Path, undisturbed: Path
) -> None:
    again, words = ("--max-restarts=1",), (*PLAIN, IN_TURN)
    fault = "0 7 SIGKILL"
    launcher = start(2, tmp_path, store, *words, torchrun=again, fault=fault, fresh=tmp_path)
    assert "resuming from" in good(ended(launcher))
    assert_equal_runs(tmp_path / "run", undisturbed, tmp_path)


@pytest.mark.parametrize("action", ["nan-gradient", "nan-loss"])
def test_a_number_that_is_not_finite_on_one_rank_reaches_no_weights(
    tmp_path: Path, store: Path, action: str
) -> None:
    done = train(2, tmp_path, store, *PLAIN, "log.every=12", fault=f"1 6 {action}")
    lines = error_lines(done.stderr)
    assert (
        len(lines) == 1
        and lines[0].startswith("error: step 6: ")
        and "weights were not updated" in lines[0]
    )
    assert newest(tmp_path) == "step_00000004"
    printed = good(train(1, tmp_path, store, *PLAIN, "log.every=12"))
    assert "at step 4 of 12" in printed and len(numbers_of(tmp_path / "run")) == STEPS


def test_a_rank_that_hangs_is_named_with_its_step(tmp_path: Path, store: Path) -> None:
    done = launch(2, tmp_path, store, *PLAIN, "parallel.timeout_s=5", fault="1 6 hang")
    assert done.returncode != 0 and seconds_since_last_step(tmp_path) < 60
    lines = error_lines(done.stderr)
    named = (
        r"step 6, forward: lost another rank .*; rank 1 on \S+ \(last reported: step 6, forward\)"
    )
    assert any(re.search(named, line) for line in lines), done.stderr
    assert newest(tmp_path) == "step_00000004"


def test_a_save_may_take_longer_than_a_collective(tmp_path: Path, store: Path) -> None:
    words = (
        *PLAIN,
        "views.ops[faults.slow_disk]={}",
        "train.steps=4",
        "checkpoint.every=100",
        "parallel.timeout_s=5",
    )
    runs = {}
    for rank in ("0", "1"):  # side by side: they only wait
        slow = {"TAPCT_SLOW_DISK": f"{rank} 8.5"}  # more than the time-out and the patience after
        runs[rank] = begin(2, tmp_path / rank, store, *words, more=slow)
    for rank, run in runs.items():
        good(all_ended(run))
        assert newest(tmp_path / rank) == "step_00000004"
        assert seconds_until_the_checkpoint(tmp_path / rank) > 8.5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_hangs_is_named_with_its_step(tmp_path: Path, store: Path, rank: int) -> None:
    words = (
        *PLAIN,
        "views.ops[faults.slow_disk]={}",
        "train.steps=4",
        "checkpoint.every=100",
        "parallel.save_timeout_s=5",
    )
    done = ended(start(2, tmp_path, store, *words, more={"TAPCT_SLOW_DISK": f"{rank} 3600"}))
    assert done.returncode != 0 and seconds_since_last_step(tmp_path) < 60
    assert any("step 4, save" in line for line in error_lines(done.stderr)), done.stderr
    assert newest(tmp_path) == ""


def test_a_rank_may_start_later_than_a_collective_may_take(tmp_path: Path, store: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
        }
    launched = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", **meeting}
        launched.append(
            start(1, tmp_path, store, *PLAIN, "train.steps=2", "parallel.timeout_s=5", more=place)
        )
        if rank == "0":
            time.sleep(7)  # as if its Python came from a slow network disk
    for launcher in launched:
        good(ended(launcher))
    assert newest(tmp_path) == "step_00000002"


def test_the_first_cause_stands_on_top(tmp_path: Path, store: Path) -> None:
    done = launch(2, tmp_path, store, *PLAIN, fault="1 6 raise")
    printed = done.stderr
    assert printed.index("the saboteur's own fault") < printed.index("lost another rank")
    assert "[rank1]: Traceback" in printed and "[rank0]: Traceback" not in printed


def slow_ranks(run: Path, log_every: int, factor: float = 2.0) -> list[int]:
    """By each fetch of the metrics, the rank that the rule calls slow, from what every step has
    written; -1: none.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = []
    for first in range(0, len(rows), log_every):
        part = rows[first : first + log_every]
        last_ones = [row["ranks/slowest"] for row in part]
        rank = max(set(last_ones), key=last_ones.count)
        late, median, step = (
            sum(row[name] for row in part) / len(part)
            for name in ("ranks/slowest_s", "ranks/median_s", "seconds/step")
        )
        often = last_ones.count(rank) > len(part) / 2
        found.append(
            int(rank)
            if often and late >= factor * median and late - median >= max(step / 20, 0.1)
            else -1
        )
    return found


def test_a_slow_rank_is_named(tmp_path: Path, store: Path) -> None:
    for late in ("1 0.3", "-1 0"):
        words = (*PLAIN, "views.ops[faults.late]={}", "train.steps=6", f"out={tmp_path}/{late[0]}")
        printed = good(train(2, tmp_path, store, *words, more={"TAPCT_LATE": late}))
        by_rule = slow_ranks(tmp_path / late[0], log_every=3)
        if late[0] == "1":
            line = r"rank 1 on \S+ is slow in the phase views of steps \d to \d: it comes "
            assert re.search(line, printed) and by_rule[-1] == 1
        for rank in range(2):  # on a busy machine one may be slow by itself
            assert (f"rank {rank} on " in printed) == (
                next((one for one in by_rule if one >= 0), -1) == rank
            )


def test_ranks_that_drift_apart_are_found(tmp_path: Path, store: Path) -> None:
    done = train(2, tmp_path, store, *PLAIN, "parallel.desync_every=2", fault="1 5 drift")
    assert any(
        "rank 1 and rank 0 no longer hold the same loss state" in line
        for line in error_lines(done.stderr)
    )
    assert newest(tmp_path) == "step_00000004"


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_leaves_older_checkpoints_and_stops_or_not(
    tmp_path: Path, store: Path, policy: str
) -> None:
    with small_disk(tmp_path / "small", "2500k") as small:
        words = (
            *PLAIN,
            f"out={small}/run",
            "checkpoint.every=2",
            "checkpoint.keep=9",
            f"checkpoint.on_error={policy}",
        )
        done = train(2, tmp_path, store, *words)
        assert newest(small) >= "step_00000002", "the disk must hold at least one"
        assert not [
            name
            for name in os.listdir(small / "run" / "checkpoints")
            if name.startswith(".writing")
        ]
        printed = done.stdout + done.stderr
        assert "could not be written" in printed and "no space left" in printed
        steps = len(numbers_of(small / "run"))
        assert steps < STEPS if policy == "stop" else steps == STEPS
        assert (done.returncode == 0) is False  # the last one could not be written either


def test_a_signal_to_any_rank_saves_on_all_and_is_no_failure(
    tmp_path: Path, store: Path, undisturbed: Path
) -> None:
    saved = {}
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        folder, way = tmp_path / number.name, launch if number == signal.SIGTERM else train
        printed = good(way(2, folder, store, *PLAIN, fault=f"{number % 2} 5 {number.name}"))
        assert f"stopped by {number.name} and saved at step 5" in printed
        checkpoint = folder / "run" / "checkpoints" / newest(folder)
        saved[number] = state_of(checkpoint, tmp_path / f"{number.name}.pt")
    assert len(saved[signal.SIGTERM]) > 100
    for state in saved.values():  # equal checkpoints resume equally, so one that does is enough
        assert differences(state, saved[signal.SIGTERM]) == []
    good(train(2, folder, store, *PLAIN))
    assert_equal_runs(folder / "run", undisturbed, tmp_path)


def test_a_job_saves_before_its_time_ends(tmp_path: Path, store: Path) -> None:
    end = int(time.time()) + 87  # long enough to start and save on a busy machine
    words = [*PLAIN, "train.steps=100000", "train.save_before_end_s=80"]
    done = train(2, tmp_path, store, *words, more={"SLURM_JOB_END_TIME": str(end)})
    assert "stopped by time limit and saved at step" in good(done)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["time"] > end - 80 or last["step"] == 1, "it had time left"
    assert time.time() < end
