"""Many losses in one job: it ends by itself, with the numbers of a run that nothing disturbed.

TAPCT_SLURM=1 pytest -m slurm tests/slurm/test_soak.py; about 40 minutes, TAPCT_SOAK_LOSSES=5 makes
it shorter.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from slurm_jobs import event_rows, events_of, processes_of, steps_of, submit, wait_for, wait_for_end
from tiny_run import assert_equal_runs, numbers_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

LOSSES = int(os.environ.get("TAPCT_SOAK_LOSSES", "30"))
STEPS_BETWEEN = 14  # more than checkpoint.every, so that every start makes progress


def lose(kind: str, run: str, slurm: Path) -> None:
    """Take a rank or a node away from a job of two nodes."""
    node = "node1" if kind == "node" else random.choice(("node0", "node1"))
    for rank in processes_of(run, node):
        os.kill(rank, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    if kind == "node":
        daemon = slurm / "run" / f"slurmd-{node}.pid"
        os.kill(int(daemon.read_text()), signal.SIGKILL)
        time.sleep(3.0)
        subprocess.run(["slurmd", "-N", node], check=True)  # it boots again


def table(run: str) -> str:
    """Losses, their causes and the seconds to the next step, as Markdown."""
    steps = [row["time"] for row in numbers_of_all(run)]
    lines = ["| cause | seconds to the next step |", "|---|---|"]
    for row in event_rows(run):
        if row["event"] == "lost":
            after = min((at for at in steps if at > row["time"]), default=float("nan"))
            lines.append(f"| {row['why'][:80]} | {after - row['time']:.0f} |")
    return "\n".join(lines)


def numbers_of_all(run: str) -> list[dict[str, float]]:
    """Rows of metrics.jsonl with their times."""
    text = (Path(run) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_job_survives_many_losses(here: Path, slurm: Path) -> None:
    random.seed(0)
    steps = f"train.steps={STEPS_BETWEEN * (LOSSES + 3)}"
    words = (steps, "log.every=1", "checkpoint.every=10", "parallel.timeout_s=20")
    calm = submit(here, "calm", *words, nodes=2)
    wait_for_end("calm", calm)
    job = submit(here, "run", *words, nodes=2)
    for number in range(LOSSES):
        reached = STEPS_BETWEEN * (number + 1)
        wait_for(lambda: steps_of("run") >= reached, "run", job)  # noqa: B023
        lose(random.choice(("kill", "kill", "stop", "node")), "run", slurm)
        wait_for(lambda: events_of("run").count("lost") > number, "run", job)  # noqa: B023
    wait_for_end("run", job)
    assert events_of("run").count("lost") == LOSSES and events_of("run")[-1] == "done"
    assert len(numbers_of(Path("run"))) == STEPS_BETWEEN * (LOSSES + 3)
    assert_equal_runs(Path("run"), Path("calm"), here)
    print(table("run"))
