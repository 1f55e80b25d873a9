"""Many losses in one job: it ends by itself, with the numbers of a run that nothing disturbed.

TAPCT_SLURM=1 pytest -rP -m slurm tests/slurm/test_soak.py; about 40 minutes, TAPCT_SOAK_LOSSES=8
makes it shorter. It prints a table of the losses.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from pathlib import Path

import pytest
from slurm_jobs import (
    boot,
    end_daemon,
    events_of,
    has_trained_since,
    last_loss,
    lose_first_node,
    processes_of,
    seconds_to_the_next_step,
    steps_of,
    submit,
    wait_for,
    wait_for_end,
)
from tiny_run import assert_equal_runs, numbers_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

LOSSES = int(os.environ.get("TAPCT_SOAK_LOSSES", "30"))
STEPS_BETWEEN = 14  # more than checkpoint.every, so that every start makes progress
KINDS = {
    "kill": "a rank is killed",
    "stop": "a rank stands still",
    "node": "slurmd and the rank of the second node are killed",
    "first": "slurmd, the batch script and the rank of the first node are killed",
}
# Of every eight losses. SLURM holds a job whose batch script has disappeared five times, so that
# at most four of 30 losses may be of this kind.
MIX = ("kill", "stop", "node", "kill", "first", "node", "kill", "stop")


def lose(kind: str, run: str, job: str, slurm: Path) -> None:
    """Take a rank or a node away from a job of two nodes."""
    if kind == "first":
        lose_first_node(slurm, "node0", job)
        return
    node = "node1" if kind == "node" else random.choice(("node0", "node1"))
    if kind == "node":
        end_daemon(slurm, node)
    for rank in processes_of(run, node):
        os.kill(rank, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    if kind == "node":
        time.sleep(3.0)
        boot(node)


def table(seconds: list[tuple[str, float]]) -> str:
    """Kinds of losses and the seconds from the fault to the next step, as Markdown.

    Args:
        seconds: kind and seconds of each loss.
    """
    lines = ["| fault | number | median | maximum |", "|---|---|---|---|"]
    names = {**KINDS, "": "all"}
    for kind, name in names.items():
        own = [each for its, each in seconds if kind in ("", its)]
        if own:
            figures = f"{statistics.median(own):.0f} | {max(own):.0f}"
            lines.append(f"| {name} | {len(own)} | {figures} |")
    return "\n".join(lines)


def test_a_job_survives_many_losses(here: Path, slurm: Path) -> None:
    random.seed(0)
    kinds = [MIX[number % len(MIX)] for number in range(LOSSES)]
    random.shuffle(kinds)
    seconds = []
    steps = f"train.steps={STEPS_BETWEEN * (LOSSES + 3)}"
    words = (steps, "log.every=1", "checkpoint.every=10", "parallel.timeout_s=20")
    calm = submit(here, "calm", *words, nodes=2)
    wait_for_end("calm", calm)
    job = submit(here, "run", *words, nodes=2)
    began = time.time()
    for number, kind in enumerate(kinds):
        reached = STEPS_BETWEEN * (number + 1)
        wait_for(lambda: steps_of("run") >= reached, "run", job)  # noqa: B023
        before, fault = events_of("run").count("lost"), time.time()
        lose(kind, "run", job, slurm)
        wait_for(lambda: events_of("run").count("lost") > before, "run", job)  # noqa: B023
        wait_for(lambda: has_trained_since("run", fault), "run", job)  # noqa: B023
        seconds.append((kind, seconds_to_the_next_step("run", fault)))
        print(f"{number + 1}. {kind}: {last_loss('run')['why'][:80]}: {seconds[-1][1]:.0f} s")
    wait_for_end("run", job)
    lost = events_of("run").count("lost")
    print(f"{(time.time() - began) / 60:.1f} minutes, {lost} starts were lost\n{table(seconds)}")
    # SLURM 22.05 has once cancelled a step of its own accord, probably by repeating a signal to the
    # step of the start before, which has the same id, on a node that had not responded
    assert lost >= LOSSES and events_of("run")[-1] == "done"
    assert len(numbers_of(Path("run"))) == STEPS_BETWEEN * (LOSSES + 3)
    assert_equal_runs(Path("run"), Path("calm"), here)
