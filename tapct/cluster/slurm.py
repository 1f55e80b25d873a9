"""SLURM's formats of time and memory, its queue, and cancelling. Nothing here knows of runs."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from tapct.base.exits import UserError

# A controller that is busy responds late, one that is down never does.
RESPONSE_SECONDS = 20
ACTIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "REQUEUED",
    "REQUEUE_HOLD",
)
# Fields of squeue --Format and the width of their columns.
QUEUE_FIELDS = (("JobArrayID", 40), ("State", 20), ("RestartCnt", 12), ("Reason", 60))
MINUTES_OF_UNIT = {
    "m": 1,
    "min": 1,
    "minute": 1,
    "minutes": 1,
    "h": 60,
    "hour": 60,
    "hours": 60,
    "d": 1440,
    "day": 1440,
    "days": 1440,
}
TIME_FORMATS = (
    "write days-hours:minutes (2-00:00), hours:minutes:seconds (12:00:00), or minutes (90)"
)


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue.

    Args:
        id: job id; 12_3 for an element of an array.
        state: state in SLURM's capitals, e.g. RUNNING.
        restarts: number of requeues so far.
        reason: reason why the job waits; empty when it does not.
    """

    id: str
    state: str
    restarts: int
    reason: str

    @property
    def is_active(self) -> bool:
        """Whether the job runs or will run."""
        return self.state in ACTIVE


def time_limit_minutes(text: str) -> int:
    """Read a time limit; returns whole minutes, rounded up.

    Args:
        text: time in a format of sbatch --time, or a number with a unit such as `90 minutes`.
    Raises:
        UserError: the text has no such format, or the time is zero.
    """
    minutes = _parse_minutes(text.strip())
    if minutes is None:
        raise UserError(f"--time {text!r} is not a time limit; {TIME_FORMATS}")
    if minutes <= 0:
        raise UserError(f"--time {text!r} leaves no time to run; {TIME_FORMATS}")
    return math.ceil(minutes)


def _parse_minutes(text: str) -> float | None:
    if with_unit := re.fullmatch(r"(\d+)\s*([a-z]+)", text.lower()):
        unit = MINUTES_OF_UNIT.get(with_unit[2])
        return None if unit is None else int(with_unit[1]) * unit
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if clock is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in clock.groups())
    if days is None and third is None:
        # minutes, or minutes:seconds
        hours, minutes, seconds = 0, first or 0, second or 0
    else:
        # hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
        hours, minutes, seconds = first or 0, second or 0, third or 0
        if minutes > 59 or (days is not None and hours > 23):
            return None
    if seconds > 59:
        return None
    return (days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def memory_size(text: str, option: str = "mem") -> str:
    """Check a memory size; returns it in sbatch's format.

    Args:
        text: number with K, M, G or T, e.g. 64G.
        option: name of the option in an error line.
    Raises:
        UserError: the text has another format.
    """
    size = text.strip().upper()
    if not re.fullmatch(r"\d+([KMGT]B?)?", size):
        raise UserError(
            f"--{option} {text!r} is not a memory size; write a number with K, M, G or T, e.g. 64G"
        )
    return size


def read_queue(ids: Sequence[str] = ()) -> dict[str, QueuedJob] | None:
    """Jobs of this user by id, including those that ended recently.

    Args:
        ids: jobs that are looked up too, whoever has submitted them; 12_3 for an element of an
            array. A cluster may hide the jobs of other users.
    Returns:
        None when SLURM does not respond.
    """
    columns = ",".join(f"{name}:{width}" for name, width in QUEUE_FIELDS)
    command = ["squeue", "--noheader", "--array", "--states=all", f"--Format={columns}"]
    try:
        jobs = _parse_queue(_run([*command, f"--user={os.getuid()}"]))
    except (OSError, subprocess.SubprocessError):
        return None
    others = sorted({id.partition("_")[0] for id in ids if id not in jobs})
    if others:
        # squeue fails where it knows none of them any more
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found = _parse_queue(_run([*command, f"--jobs={','.join(others)}"]))
            jobs = {**found, **jobs}
    return jobs


def _parse_queue(output: str) -> dict[str, QueuedJob]:
    jobs = {}
    for line in output.splitlines():
        cells, start = [], 0
        for _, width in QUEUE_FIELDS:
            cells.append(line[start : start + width].strip())
            start += width
        id, state, restarts, reason = cells
        if id:
            count = int(restarts) if restarts.isdigit() else 0
            jobs[id] = QueuedJob(id, state, count, "" if reason in ("None", "N/A") else reason)
    return jobs


def cancel_ids(ids: Sequence[str]) -> None:
    """Cancel jobs.

    Args:
        ids: job ids.
    Raises:
        UserError: scancel is missing, does not respond, or refuses.
    """
    try:
        _run(["scancel", *ids])
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is not on PATH; run this on a login node of the cluster"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"scancel did not respond within {RESPONSE_SECONDS} s; is SLURM up? Try `sinfo`"
        ) from error
    except subprocess.CalledProcessError as error:
        why = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise UserError(f"scancel: {why}") from error


def require_commands() -> None:
    """Raise UserError where jobs cannot be submitted."""
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not on PATH; submit on a login node of the cluster, or "
            "print the batch script with --dry-run"
        )


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=RESPONSE_SECONDS
    )
    return done.stdout
