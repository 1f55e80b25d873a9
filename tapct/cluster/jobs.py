"""Jobs of runs: what was submitted, how far it is, and cancelling. Works from the run folders when
SLURM is silent.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapct.base import console, jsonl
from tapct.base.exits import UserError
from tapct.cluster import slurm
from tapct.cluster.slurm import QueuedJob

if TYPE_CHECKING:
    from rich.table import Table

FILE = "submission.json"
NOT_RUNS = ("checkpoints", "code", "eval", "export", "jobs", "tensorboard", "wandb")


@dataclass(frozen=True)
class Submission:
    """RUN/jobs/<time>/submission.json: one run that was handed to SLURM.

    Args:
        job: its id; 12_3 for the run of an array.
        submitted: seconds since 1970.
        steps: optimizer steps of the whole run.
        max_restarts: requeues after which the job gives up.
        logs: folder with one log per rank.
    """

    job: str
    submitted: float
    steps: int
    max_restarts: int
    logs: str

    def write(self, folder: Path) -> None:
        """Write it into RUN/jobs/<time>."""
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Progress:
    """One line of the table.

    Args:
        run: run folder.
        job: id.
        state: the queue's in small letters, or what the files say.
        step: finished steps.
        steps: of the whole run.
        loss: of the last step; NaN when there is none.
        seconds: per step, median of the last steps; NaN when there is none.
        restarts: requeues so far.
        why: the job gave up, in words; empty when it did not.
    """

    run: Path
    job: str
    state: str
    step: int
    steps: int
    loss: float
    seconds: float
    restarts: int
    why: str = ""


def find(folders: Sequence[Path]) -> dict[Path, Submission]:
    """The newest submission of each run in or below some folders, in order of submission.

    Raises:
        UserError: a folder is missing.
    """
    found: dict[Path, tuple[Submission, ...]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder; name a run folder, or one with runs below it"
            )
        for run in _runs(folder):
            submissions = [
                one for path in run.glob(f"jobs/*/{FILE}") if (one := _read(path)) is not None
            ]
            if submissions:
                found[run] = tuple(sorted(submissions, key=lambda one: one.submitted))
    newest = {run: submissions[-1] for run, submissions in found.items()}
    return dict(sorted(newest.items(), key=lambda pair: (pair[1].submitted, str(pair[0]))))


def _runs(folder: Path) -> Iterator[Path]:
    for place, below, _ in os.walk(folder):
        if "jobs" in below:
            yield Path(place)
        below[:] = sorted(
            name for name in below if name not in NOT_RUNS and not name.startswith(".")
        )


def _read(path: Path) -> Submission | None:
    try:
        return Submission(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # half written, or of another version
        return None


def progress(run: Path, submission: Submission, queued: dict[str, QueuedJob] | None) -> Progress:
    """How far a run is.

    Args:
        queued: of `slurm.queue`.
    """
    rows = jsonl.read_tail(run / "metrics.jsonl", "step")
    step = int(rows[-1]["step"]) if rows else 0
    loss = rows[-1].get("loss/total") if rows else None
    paces = [row["seconds/step"] for row in rows[-20:] if row.get("seconds/step") is not None]
    events = jsonl.read(_events_file(run, submission.job), "event").rows
    job = None if queued is None else queued.get(submission.job)
    why = _why_given_up(job, events)
    restarts = (
        job.restarts
        if job is not None
        else max([int(event.get("restarts", 0)) for event in events], default=0)
    )
    return Progress(
        run=run,
        job=submission.job,
        state="gave up"
        if why
        else _state(job, events, step >= submission.steps, answered=queued is not None),
        step=step,
        steps=submission.steps,
        loss=math.nan if loss is None else float(loss),
        seconds=statistics.median(paces) if paces else math.nan,
        restarts=restarts,
        why=why,
    )


def _why_given_up(job: QueuedJob | None, events: Sequence[dict[str, Any]]) -> str:
    """What the batch script said when it did not requeue; empty when it did, or someone else
    has.
    """
    last = events[-1] if events else {}
    over = job is None or not job.alive
    return str(last.get("why", "")) if over and last.get("event") == "gave up" else ""


def _state(
    job: QueuedJob | None, events: Sequence[dict[str, Any]], all_steps: bool, answered: bool
) -> str:
    if job is not None:
        return job.state.lower()
    last = events[-1]["event"] if events else ""
    if all_steps or last == "done":
        return "done"
    if last in ("failed", "stopped"):
        return last
    if answered:
        return "gone" if last else "never ran"
    return "running?" if last else "waiting?"


def _events_file(run: Path, job: str) -> Path:
    for path in run.glob(f"jobs/*/{FILE}"):
        found = _read(path)
        if found is not None and found.job == job:
            return path.with_name("events.jsonl")
    return run / "events.jsonl"


def table(rows: Sequence[Progress]) -> Table:
    """The table of `tapct jobs`; fits 80 columns."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("run", overflow="fold", min_width=12)
    made.add_column("job", no_wrap=True)
    made.add_column("state", no_wrap=True)
    for name in ("step", "loss", "s/step", "left", "restarts"):
        made.add_column("re" if name == "restarts" else name, justify="right", no_wrap=True)
    for row in rows:
        left = (
            console.duration((row.steps - row.step) * row.seconds) if row.step < row.steps else ""
        )
        made.add_row(
            os.path.relpath(row.run),
            row.job,
            row.state[:12],
            f"{row.step}/{row.steps}",
            "" if math.isnan(row.loss) else f"{row.loss:.3f}",
            "" if math.isnan(row.seconds) else f"{row.seconds:.3g}",
            "" if left == "?" else left,
            str(row.restarts),
        )
    return made


def cancel(words: Sequence[str]) -> list[str]:
    """Cancel the jobs of run folders, of folders with runs below, or of ids; returns one line per
    job.

    Raises:
        UserError: SLURM does not answer, or a word names no job that waits or runs.
    """
    queued = slurm.queue()
    if queued is None:
        raise UserError(
            "SLURM does not answer (squeue), so nothing was cancelled; is this a login node? Try "
            "`sinfo`"
        )
    chosen: dict[str, str] = {}
    for word in words:
        found = _chosen_by(word, queued)
        if not found:
            raise UserError(
                f"{word} has no job that waits or runs, so nothing was cancelled; see `squeue --me`"
            )
        chosen.update(found)
    slurm.cancel(list(chosen))
    return [
        f"cancelled job {job}, was {queued[job].state.lower()}{place}"
        for job, place in chosen.items()
    ]


def _chosen_by(word: str, queued: dict[str, QueuedJob]) -> dict[str, str]:
    if re.fullmatch(r"\d+(_\d+)?", word) and not Path(word).is_dir():
        ids = [job for job in queued if job == word or job.startswith(f"{word}_")]
        return {job: "" for job in ids if queued[job].alive}
    runs = find([Path(word)])
    if not runs:
        raise UserError(
            f"{word} holds no run that was submitted; name a run folder or the id of a job"
        )
    return {
        one.job: f": {run}"
        for run, one in runs.items()
        if one.job in queued and queued[one.job].alive
    }
