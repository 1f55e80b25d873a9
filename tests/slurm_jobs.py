"""Jobs on a real SLURM: submit them, wait for them, read what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 900  # on a machine with other work; an idle one needs a minute
DOWN_SECONDS = 25  # of a first node


def tapct(*words: str | Path) -> str:
    """What a tapct command prints; it must succeed."""
    known = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"}
    command = [sys.executable, "-m", "tapct", *map(str, words)]
    done = subprocess.run(
        command, env=known, capture_output=True, text=True, timeout=600, check=False
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 0 and errors == [], done.stdout + done.stderr
    return done.stdout


def submit(here: Path, run: str, *words: str, nodes: int = 1, tasks: int = 1) -> str:
    """Submit the tiny config; returns the id of the job."""
    layout = ["--nodes", str(nodes), "--tasks-per-node", str(tasks)]
    printed = tapct(
        "submit", here / "tiny.yaml", f"out={run}", "--time", "10", "--grace", "20", *layout, *words
    )
    found = re.search(r"job (\S+):", printed)
    assert found is not None, printed
    return found[1]


def ask(*words: str) -> str:
    return subprocess.run(
        words, capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def state_of(job: str) -> str:
    found = re.search(r"JobState=(\w+)", ask("scontrol", "show", "job", "-o", job))
    return found[1] if found else ""


def log_of(run: Path | str, job: str) -> str:
    """All logs of a job, one after the other."""
    paths = sorted(
        [
            *Path(run).glob(f"jobs/*/{job}_*_log.out"),
            *Path(run).parent.glob(f"jobs/*/{job}_*_log.out"),
        ]
    )
    return "".join(path.read_text() for path in paths)


def wait_for(what: Callable[[], object], run: Path | str, job: str) -> None:
    """Wait until something holds; a job that fails meanwhile ends the wait with its log."""
    began = time.monotonic()
    while not what():
        known = log_of(run, job)
        assert time.monotonic() - began < PATIENCE_SECONDS, f"{job} is {state_of(job)}:\n{known}"
        assert state_of(job) not in ("FAILED", "TIMEOUT", "NODE_FAIL") or what(), known
        time.sleep(0.3)


def wait_for_end(run: Path | str, job: str, state: str = "COMPLETED") -> None:
    wait_for(lambda: state_of(job) == state, run, job)


def steps_of(run: Path | str) -> int:
    path = Path(run) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def event_rows(run: Path | str) -> list[dict[str, Any]]:
    """Starts and ends of all jobs of a run."""
    paths = sorted(Path(run).glob("jobs/*/events.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def events_of(run: Path | str) -> list[str]:
    return [row["event"] for row in event_rows(run)]


def last_loss(run: Path | str) -> dict[str, Any]:
    """Event of the last lost start."""
    return next(row for row in reversed(event_rows(run)) if row["event"] == "lost")


def has_trained_since(run: Path | str, fault: float) -> bool:
    """Whether a step was trained after a fault and after every loss."""
    return _next_step(run, fault) is not None


def seconds_to_the_next_step(run: Path | str, fault: float) -> float:
    """Seconds from a fault to the first step that is trained after its loss was recorded.

    Args:
        run: run folder; nothing was lost since the fault but by the fault.
        fault: Unix time of the fault.
    """
    step = _next_step(run, fault)
    assert step is not None, f"{run} has not trained since"
    return step - fault


def _next_step(run: Path | str, fault: float) -> float | None:
    """Unix time of the first step after a fault and after every loss."""
    since = max([fault, *(row["time"] for row in event_rows(run) if row["event"] == "lost")])
    rows = (Path(run) / "metrics.jsonl").read_text().split("\n")[:-1]
    return min((at for at in (json.loads(row)["time"] for row in rows) if at > since), default=None)


def end_daemon(folder: Path, node: str) -> None:
    """Kill the slurmd of a node, as if the node had lost its power."""
    os.kill(int((folder / "run" / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)


def boot(node: str) -> None:
    """Start the slurmd of a node again."""
    subprocess.run(["slurmd", "-N", node], check=True)


def lose_first_node(folder: Path, node: str, job: str) -> None:
    """Kill the slurmd of a node and all that a job runs there, its batch script too; boot the node.

    It is down as long as a fast real one. SLURM 22.05 does not miss a batch script if the node is
    back within BatchStartTimeout + MessageTimeout, 20 s, of the last time that it was seen.
    """
    end_daemon(folder, node)
    for process in processes_on(node, job):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    time.sleep(DOWN_SECONDS)
    boot(node)


def processes_on(node: str, job: str) -> list[int]:
    """All processes of a job on a node, the batch script and SLURM's own ones included."""
    wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_JOB_ID={job}".encode()}
    wanted.add(f"SLURM_CONF={os.environ['SLURM_CONF']}".encode())  # not of another cluster
    found: set[int] = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if not wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                continue
            found.add(int(folder.name))
            parent = int(re.findall(r"PPid:\t(\d+)", (folder / "status").read_text())[0])
            if "slurmstepd" in Path(f"/proc/{parent}/comm").read_text():
                found.add(parent)
        except OSError:  # it has ended meanwhile
            continue
    return sorted(found)


def processes_of(run: Path | str, node: str) -> list[int]:
    """Ranks of a run on a node, by their environment and command line."""
    wanted = str(Path(run).absolute()).encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
            # srun has the same words in its command line
            if b"\0-m\0submitit.core._submit" not in command or wanted not in command:
                continue
            if command.startswith(b"srun"):
                continue
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        names = {f"SLURMD_NODENAME={node}".encode()}
        if names <= set(environment) and b"SLURM_PROCID=" in b"\0".join(environment):
            found.append(int(folder.name))
    return sorted(found)
