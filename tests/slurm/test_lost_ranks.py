"""On a real SLURM: ranks and nodes are lost in every way that can be made here, and the run ends by
itself, as if nothing had happened.

TAPCT_SLURM=1 pytest -rP -m slurm tests/slurm/test_lost_ranks.py prints the seconds from each fault
to the next step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_jobs import (
    PATIENCE_SECONDS,
    REPOSITORY,
    ask,
    boot,
    end_daemon,
    events_of,
    has_trained_since,
    last_loss,
    log_of,
    lose_first_node,
    processes_of,
    seconds_to_the_next_step,
    state_of,
    steps_of,
    submit,
    tapct,
    wait_for,
    wait_for_end,
)
from tiny_run import assert_equal_runs, numbers_of

pytestmark = pytest.mark.slurm

WORDS = ("train.steps=120", "log.every=1", "checkpoint.every=10")


def print_seconds(fault: float) -> None:
    """For the table of docs/cluster.md; pytest -rP shows it."""
    print(f"{seconds_to_the_next_step('run', fault):.0f} s from the fault to the next step")


def test_a_killed_rank_comes_back_and_the_curve_is_that_of_an_undisturbed_run(here: Path) -> None:
    calm = submit(here, "calm", *WORDS, nodes=2)
    wait_for_end("calm", calm)
    job = submit(here, "run", *WORDS, nodes=2)
    wait_for(lambda: steps_of("run") >= 25, "run", job)
    (rank,) = processes_of("run", "node1")
    fault = time.time()
    os.kill(rank, signal.SIGKILL)
    wait_for_end("run", job)
    print_seconds(fault)
    assert events_of("run") == ["start", "lost", "start", "done"]
    assert last_loss("run")["why"].startswith("node1: task 1: Killed")
    assert last_loss("run")["nodes"] == "node1"
    assert re.search(r"resuming from \S+ at step [2-9]0 of 120", log_of("run", job))
    assert_equal_runs(Path("run"), Path("calm"), here)
    assert "1 start was lost, the last one by: node1: task 1: Killed" in tapct("jobs", "run")


@pytest.mark.slow
def test_a_rank_that_the_kernel_kills_for_want_of_memory_comes_back(here: Path) -> None:
    job = submit(here, "run", *WORDS, nodes=2)
    wait_for(lambda: steps_of("run") >= 25, "run", job)
    (rank,) = processes_of("run", "node1")
    with no_more_memory(rank) as killed:
        fault = time.time()
        wait_for(lambda: "lost" in events_of("run"), "run", job)
        assert killed() == 1, "the kernel's own count of processes that it has killed"
    wait_for_end("run", job)
    print_seconds(fault)
    assert events_of("run") == ["start", "lost", "start", "done"]
    assert last_loss("run")["why"].startswith("node1: task 1: Killed")
    assert last_loss("run")["nodes"] == "node1"


@contextlib.contextmanager
def no_more_memory(process: int) -> Iterator[Callable[[], int]]:
    """Let the next allocations of a process fail; yields how many processes the kernel has killed.

    Memory that it has already is not counted against the limit of its new group.
    """
    groups = Path("/sys/fs/cgroup/memory")
    if not (groups / "memory.limit_in_bytes").exists():
        pytest.skip("this test needs the memory controller of cgroup v1")
    group = groups / f"tapct-{process}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(2**20))
        (group / "cgroup.procs").write_text(str(process))
        counts = group / "memory.oom_control"
        yield lambda: int(re.findall(r"^oom_kill (\d+)$", counts.read_text(), re.MULTILINE)[0])
    finally:
        for other in (group / "cgroup.procs").read_text().split():
            (groups / "cgroup.procs").write_text(other)
        group.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["rank", "node"])
def test_a_node_that_fails_twice_is_excluded(here: Path, slurm: Path, fault: str) -> None:
    """A job of one node, so that the other one is left. SLURM itself requeues it after `node`."""
    ask("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=test")
    try:
        job = submit(here, "run", *WORDS, nodes=1)
        for number in (1, 2):
            wait_for(lambda: steps_of("run") >= 25 * number, "run", job)  # noqa: B023
            began = time.time()
            if fault == "node":
                lose_first_node(slurm, "node0", job)
            else:
                (rank,) = processes_of("run", "node0")
                os.kill(rank, signal.SIGKILL)
            wait_for(lambda: events_of("run").count("lost") == number, "run", job)  # noqa: B023
            if number == 1:
                wait_for(lambda: has_trained_since("run", began), "run", job)  # noqa: B023
    finally:
        ask("scontrol", "update", "NodeName=node1", "State=RESUME")
    wait_for_end("run", job)
    print_seconds(began)
    assert [event for event in events_of("run") if event != "start"] == ["lost", "lost", "done"]
    assert "ExcNodeList=node0 " in ask("scontrol", "show", "job", "-o", job)
    newest = json.loads((Path("run") / "run.json").read_text())["starts"][-1]
    assert newest["nodes"] == "node1"


@pytest.mark.slow
def test_a_second_process_is_refused_while_a_job_trains(here: Path) -> None:
    job = submit(here, "run", *WORDS, nodes=2)
    wait_for(lambda: steps_of("run") >= 5, "run", job)
    began = time.time()
    refused = train(here, *WORDS)
    printed, _ = refused.communicate(timeout=300)
    print(f"{time.time() - began:.0f} s to the refusal")
    assert refused.returncode == 2 and f", job {job}, since " in printed
    wait_for_end("run", job)
    assert events_of("run") == ["start", "done"]


@pytest.mark.slow
def test_a_rank_that_wakes_up_does_not_write_beside_the_process_that_took_over(here: Path) -> None:
    """The second process has process ids of its own, as on another machine."""
    words = ("train.steps=100000", *WORDS[1:], "parallel.timeout_s=900")
    job = submit(here, "run", *words, nodes=2)
    wait_for(lambda: steps_of("run") >= 25, "run", job)
    (rank,) = processes_of("run", "node0")  # the first one holds the lease
    began = time.time()
    os.kill(rank, signal.SIGSTOP)
    other = train(here, *words, elsewhere=True)
    try:
        wait_for(lambda: has_trained_since("run", began + 5), "run", job)
        os.kill(rank, signal.SIGCONT)
        woken = time.time()
        wait_for(lambda: state_of(job) == "FAILED", "run", job)
        print(f"{woken - began:.0f} s to the take-over, {time.time() - woken:.0f} s to the end")
        trained = steps_of("run")
        while steps_of("run") <= trained + 20:
            assert other.poll() is None and time.time() < woken + PATIENCE_SECONDS
            time.sleep(0.3)
    finally:
        other.kill()
        printed, _ = other.communicate(timeout=300)
    assert "taking over the run folder run from host " in printed
    assert "is no longer this process's to write" in log_of("run", job)
    assert events_of("run") == ["start", "failed"]
    assert [row["step"] for row in numbers_of(Path("run"))] == list(range(1, steps_of("run") + 1))


def train(here: Path, *words: str, elsewhere: bool = False) -> subprocess.Popen[str]:
    """Train in the folder of the job without SLURM."""
    known = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"}
    command = [sys.executable, "-m", "tapct", "train", str(here / "tiny.yaml"), "out=run", *words]
    if elsewhere:
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=TERM", *command]
    return subprocess.Popen(
        command, env=known, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


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
    fault = time.time()
    os.kill(rank, signal.SIGSTOP)
    wait_for_end("run", job)
    print_seconds(fault)
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
    fault = time.time()
    end_daemon(slurm, "node1")
    os.kill(rank, signal.SIGKILL)
    wait_for(lambda: "lost" in events_of("run"), "run", job)
    boot("node1")
    wait_for_end("run", job)
    print_seconds(fault)
    assert events_of("run") == ["start", "lost", "start", "done"]


@pytest.mark.slow
def test_a_first_node_that_is_gone_with_the_batch_script_has_lost_the_start(
    here: Path, slurm: Path
) -> None:
    job = submit(here, "run", *WORDS, nodes=2)
    wait_for(lambda: steps_of("run") >= 25, "run", job)
    fault = time.time()
    lose_first_node(slurm, "node0", job)
    wait_for_end("run", job)
    print_seconds(fault)
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
