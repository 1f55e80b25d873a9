"""Two ranks that are killed again and again, at random moments and in random parts, lose nothing
and end the same.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from many_ranks import PLAIN, ended, good, start, train
from tiny_run import assert_equal_runs

from tapct.engine.checkpoint import Checkpoints, damage

pytestmark = pytest.mark.dist
PATIENCE_S = 60.0
# the loader has threads and no processes, so the ranks and their launcher are all there is
VICTIMS = ("rank 0", "rank 1", "both ranks", "launcher and ranks")
STEPS_PER_KILL = 6  # at most 4 until the moment to strike is chosen, and those until it has come
STEPS_LEFT = 8  # after the last kill, of the run that nobody kills


def children(parent: int) -> list[int]:
    """Process ids of the living children of a process, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # gone meanwhile
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(entry.name))
    return sorted(found)


def ranks_of(launcher: int) -> list[int]:
    """The ranks that torchrun started: its children that are Python running tapct."""
    return [child for child in children(launcher) if b"tapct" in command_of(child)]


def command_of(process: int) -> bytes:
    """Command line of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def announced(out: Path) -> int:
    latest = out / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0


def kill(victim: str, launcher: subprocess.Popen[str]) -> int:
    """SIGKILL a part of a run; how many processes were there to be killed."""
    ranks = ranks_of(launcher.pid)
    targets = {
        "rank 0": ranks[:1],
        "rank 1": ranks[1:],
        "both ranks": ranks,
        "launcher and ranks": [launcher.pid, *ranks],
    }[victim]
    killed = 0
    for target in targets:
        with suppress(ProcessLookupError):  # it ended in the meantime, and does not count
            os.kill(target, signal.SIGKILL)
            killed += 1
    return killed


def output_of(launcher: subprocess.Popen[str]) -> str:
    """All that a run printed, which must end soon now."""
    done = ended(launcher, PATIENCE_S)
    return done.stdout + done.stderr


def strike(
    folder: Path, store: Path, words: tuple[str, ...], victim: str, draw: random.Random
) -> bool:
    """Start the run, let it write 1 or 2 checkpoints, kill the victim within about the time of one
    more.

    Returns:
        False when the run was over before.
    """
    before, began = announced(folder / "run"), time.monotonic()
    launcher = start(2, folder, store, *words)
    goal = before + draw.randrange(1, 3) * 2
    while announced(folder / "run") < goal and launcher.poll() is None:
        assert time.monotonic() - began < PATIENCE_S, output_of(launcher)
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.25))
    struck = launcher.poll() is None and kill(victim, launcher) > 0
    output = output_of(launcher)
    assert struck or launcher.returncode == 0, output
    latest = announced(folder / "run")
    assert latest >= before, "what was announced was lost"
    assert latest == 0 or damage(folder / "run" / "checkpoints" / f"step_{latest:08d}") is None
    whole, complaints = Checkpoints(folder / "run" / "checkpoints", keep=1).newest_whole()
    assert (
        complaints == [] and whole is not None and int(whole.name.removeprefix("step_")) >= latest
    )
    return struck


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_two_ranks_killed_at_random_moments_end_as_if_nothing_had_been(
    tmp_path: Path, store: Path, kills: int
) -> None:
    folder = tmp_path / "chaos"
    steps = STEPS_PER_KILL * kills + STEPS_LEFT
    words = (*PLAIN, f"train.steps={steps}", "data.loader.workers=2", "parallel.timeout_s=20")
    often = (*words, "checkpoint.every=2")
    draw, outcomes = random.Random(kills), []
    for number in range(kills):
        victim = VICTIMS[number % len(VICTIMS)]
        outcomes.append(
            (victim, strike(folder, store, often, victim, draw), announced(folder / "run"))
        )
    assert sum(struck for _, struck, _ in outcomes) == kills, outcomes
    patience = PATIENCE_S + 2.0 * steps  # of a run to which nothing happens, on a busy machine
    good(train(2, folder, store, *often, timeout=patience))
    # a run that writes only its last checkpoint: neither kills nor checkpoints change a number
    seldom = (*words, f"checkpoint.every={steps}")
    good(train(2, folder / "undisturbed", store, *seldom, timeout=patience))
    print(json.dumps(outcomes))
    assert_equal_runs(folder / "run", folder / "undisturbed" / "run", folder)
