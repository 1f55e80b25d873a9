"""Jobs on a real SLURM: submit them, wait for them, read what they leave."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 900  # on a machine with other work; an idle one needs a minute


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


def processes_on(node: str, job: str) -> list[int]:
    """All processes of a job on a node, the batch script and SLURM's own ones included."""
    wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_JOB_ID={job}".encode()}
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
