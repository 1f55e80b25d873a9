"""On a real SLURM: ranks and nodes are lost in every way that can be made here, and the run ends by
itself, as if nothing had happened.

TAPCT_SLURM=1 pytest -m slurm tests/slurm
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from slurm_jobs import (
    event_rows,
    events_of,
    log_of,
    processes_of,
    processes_on,
    state_of,
    steps_of,
    submit,
    tapct,
    wait_for,
    wait_for_end,
)
from tiny_run import assert_equal_runs

pytestmark = pytest.mark.slurm

WORDS = ("train.steps=120", "log.every=1", "checkpoint.every=10")


def last_loss(run: str) -> dict[str, Any]:
    return next(row for row in reversed(event_rows(run)) if row["event"] == "lost")


def test_a_killed_rank_comes_back_and_the_curve_is_that_of_an_undisturbed_run(here: Path) -> None:
    calm = submit(here, "calm", *WORDS, nodes=2)
    wait_for_end("calm", calm)
    job = submit(here, "run", *WORDS, nodes=2)
    wait_for(lambda: steps_of("run") >= 25, "run", job)
    (rank,) = processes_of("run", "node1")
    os.kill(rank, signal.SIGKILL)
    wait_for_end("run", job)
    assert events_of("run") == ["start", "lost", "start", "done"]
    assert last_loss("run")["why"].startswith("node1: task 1: Killed")
    assert last_loss("run")["nodes"] == "node1"
    assert re.search(r"resuming from \S+ at step [2-9]0 of 120", log_of("run", job))
    assert_equal_runs(Path("run"), Path("calm"), here)
    assert "1 start was lost, the last one by: node1: task 1: Killed" in tapct("jobs", "run")


@pytest.mark.slow
def test_a_taken_port_does_not_stop_a_job(here: Path) -> None:
    job = submit(here, "first", "train.steps=1", nodes=2)
    wait_for_end("first", job)
    with socket.socket() as taken:
        taken.bind(("", 20000 + (int(job) + 1) % 10000))
        taken.listen()
        job = submit(here, "run", "train.steps=4", nodes=2)
        wait_for_end("run", job)
    assert events_of("run") == ["start", "done"]


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_and_the_job_comes_back(here: Path) -> None:
    job = submit(here, "run", *WORDS, "parallel.timeout_s=20", nodes=2)
    wait_for(lambda: steps_of("run") >= 25, "run", job)
    (rank,) = processes_of("run", "node1")
    os.kill(rank, signal.SIGSTOP)
    wait_for_end("run", job)
    assert events_of("run") == ["start", "lost", "start", "done"]
    assert last_loss("run")["nodes"] == "node1"
    assert re.search(
        r"rank 1 on node1 \(last reported: step \d+, \w+\) is furthest behind",
        last_loss("run")["why"],
    )


@pytest.mark.slow
def test_a_node_that_is_gone_does_not_end_the_job(here: Path, slurm: Path) -> None:
    job = submit(here, "run", *WORDS, nodes=2)
    wait_for(lambda: steps_of("run") >= 25, "run", job)
    (rank,) = processes_of("run", "node1")
    os.kill(int((slurm / "run" / "slurmd-node1.pid").read_text()), signal.SIGKILL)
    os.kill(rank, signal.SIGKILL)
    wait_for(lambda: "lost" in events_of("run"), "run", job)
    subprocess.run(["slurmd", "-N", "node1"], check=True)  # it boots again
    wait_for_end("run", job)
    assert events_of("run") == ["start", "lost", "start", "done"]


@pytest.mark.slow
def test_a_first_node_that_is_gone_with_the_batch_script_has_lost_the_start(
    here: Path, slurm: Path
) -> None:
    job = submit(here, "run", *WORDS, nodes=2)
    wait_for(lambda: steps_of("run") >= 25, "run", job)
    os.kill(int((slurm / "run" / "slurmd-node0.pid").read_text()), signal.SIGKILL)
    for process in processes_on("node0", job):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    subprocess.run(["slurmd", "-N", "node0"], check=True)  # it boots again
    wait_for_end("run", job)
    assert events_of("run") == ["start", "lost", "start", "done"]
    assert last_loss("run")["nodes"] == "node0"
    assert last_loss("run")["why"] == "SLURM has ended the start: node0 failed"


@pytest.mark.slow
def test_a_rank_that_crashes_in_every_start_ends_the_job(here: Path) -> None:
    (here / "mylab").mkdir()
    (here / "mylab" / "breaks.py").write_text(CRASHES)
    words = ("views.ops[mylab.breaks]={}", "train.steps=100000", "--max-failures", "1")
    job = submit(here, "run", *words, tasks=2)
    wait_for(lambda: state_of(job) == "FAILED", "run", job)
    assert events_of("run") == ["start", "lost", "start", "lost", "gave up"]
    assert "(--max-failures 1), the last one by: " in log_of("run", job)
    assert "Segmentation fault" in last_loss("run")["why"]


CRASHES = """
import os, signal
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    pass

def build(config):
    if os.environ.get("SLURM_PROCID") == "1":
        os.kill(os.getpid(), signal.SIGSEGV)
    return lambda view, key: view
"""
