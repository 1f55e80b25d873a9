"""Talk to SLURM: its forms of time and memory, its queue, cancelling. Nothing here knows of
runs.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from tapct.base.exits import UserError

PATIENCE_SECONDS = 20  # a controller that is busy answers late, one that is gone never
ALIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "REQUEUED",
    "REQUEUE_HOLD",
)
_QUEUE = (
    ("JobArrayID", 40),
    ("State", 20),
    ("RestartCnt", 12),
    ("Reason", 60),
)  # field of squeue -O, its width
_UNITS = {
    "m": 1,
    "min": 1,
    "minute": 1,
    "minutes": 1,
    "h": 60,
    "hour": 60,
    "hours": 60,
    "d": 1440,
    "day": 1440,
}
_UNITS["days"] = _UNITS["d"]
_TIME_RULE = "write days-hours:minutes (2-00:00), hours:minutes:seconds (12:00:00), or minutes (90)"


@dataclass(frozen=True)
class QueuedJob:
    """A job as the queue tells it.

    Args:
        id: 12, or 12_3 for an element of an array.
        state: in SLURM's capitals, e.g. RUNNING.
        restarts: how often it was requeued.
        reason: why it waits; empty when it does not.
    """

    id: str
    state: str
    restarts: int
    reason: str

    @property
    def alive(self) -> bool:
        """Whether it runs or will run."""
        return self.state in ALIVE


def minutes(text: str) -> int:
    """A time limit in whole minutes, rounded up.

    Args:
        text: a form of sbatch --time, or a number with a unit such as `90 minutes`.
    Raises:
        UserError: no such form, or no time at all.
    """
    found = _clock_minutes(text.strip())
    if found is None:
        raise UserError(f"--time {text!r} is no time limit; {_TIME_RULE}")
    if found <= 0:
        raise UserError(f"--time {text!r} is no time at all; {_TIME_RULE}")
    return math.ceil(found)


def _clock_minutes(text: str) -> float | None:
    if words := re.fullmatch(r"(\d+)\s*([a-z]+)", text.lower()):
        unit = _UNITS.get(words[2])
        return None if unit is None else int(words[1]) * unit
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if form is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in form.groups())
    if days is None and third is None:  # minutes, or minutes:seconds
        hours, mins, seconds = 0, first or 0, second or 0
    else:  # hours:minutes:seconds; days-hours, days-hours:minutes ...
        hours, mins, seconds = first or 0, second or 0, third or 0
        if mins > 59 or (days is not None and hours > 23):
            return None
    if seconds > 59:
        return None
    return (days or 0) * 1440 + hours * 60 + mins + seconds / 60


def checked_memory(text: str) -> str:
    """A memory size in sbatch's form.

    Raises:
        UserError: no number with K, M, G or T.
    """
    if not re.fullmatch(r"\d+([KMGT]B?)?", text.strip().upper()):
        raise UserError(
            f"--mem {text!r} is no size of memory; write a number with K, M, G or T, e.g. 64G"
        )
    return text.strip().upper()


def queue() -> dict[str, QueuedJob] | None:
    """Jobs of this user by id, those that ended lately included; None when SLURM does not
    answer.
    """
    form = ",".join(f"{name}:{width}" for name, width in _QUEUE)
    try:
        told = _ask(
            [
                "squeue",
                "--noheader",
                "--array",
                "--states=all",
                f"--user={os.getuid()}",
                f"--Format={form}",
            ]
        )
    except (OSError, subprocess.SubprocessError):
        return None
    jobs = {}
    for line in told.splitlines():
        parts, start = [], 0
        for _, width in _QUEUE:
            parts.append(line[start : start + width].strip())
            start += width
        if parts[0]:
            count = int(parts[2]) if parts[2].isdigit() else 0
            reason = "" if parts[3] in ("None", "N/A") else parts[3]
            jobs[parts[0]] = QueuedJob(parts[0], parts[1], count, reason)
    return jobs


def cancel(ids: Sequence[str]) -> None:
    """End jobs.

    Raises:
        UserError: scancel is missing, does not answer, or refuses.
    """
    try:
        _ask(["scancel", *ids])
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is not on PATH; run this on a login node of the cluster"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"scancel did not answer within {PATIENCE_SECONDS} s; is SLURM up? Try `sinfo`"
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"scancel: {' '.join(error.stderr.split()) or f'exit code {error.returncode}'}"
        ) from error


def need_sbatch() -> None:
    """Raises UserError where jobs cannot be submitted."""
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        where = "submit on a login node of the cluster, or look at the script with --dry-run"
        raise UserError(f"{' and '.join(missing)} not on PATH; {where}")


def _ask(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    )
    return done.stdout
