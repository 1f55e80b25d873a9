"""Jobs of runs: what was submitted, its progress, and cancelling.

Progress is read from the run folders too, so that it is known when SLURM does not respond.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapct.base import console, jsonl, lease
from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.base.files import expand_path
from tapct.base.recent import LAST_STEPS, last_mean
from tapct.cluster import slurm
from tapct.cluster.slurm import QueuedJob
from tapct.eval.results import best_record
from tapct.eval.results.best_record import BestRecord
from tapct.eval.results.terminal import shown
from tapct.run_folder import JobFolder, RunFolder

if TYPE_CHECKING:
    from rich.table import Table

STATE_WIDTH = 12  # characters of the column `state`


@dataclass(frozen=True)
class Submission:
    """One run that was handed to SLURM; the content of RUN/jobs/<time>/submission.json.

    Args:
        job: job id; 12_3 for the run of an array.
        submitted: time of submission, in seconds since 1970.
        steps: optimizer steps of the whole run.
        max_restarts: total requeues after which the job gives up.
        logs: folder with one log per rank.
    """

    job: str
    submitted: float
    steps: int
    max_restarts: int
    logs: str

    def write(self, folder: Path) -> None:
        """Write submission.json into RUN/jobs/<time>."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        JobFolder(folder).submission.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Progress:
    """One line of the table of `tapct jobs`.

    Args:
        run: run folder.
        job: job id.
        state: state in the queue, in lower case, or what the files of the run show.
        step: number of finished steps.
        steps: number of steps of the whole run.
        loss: total loss of the last step; NaN when there is none.
        seconds: seconds per step, median of the last steps; NaN when there is none.
        restarts: number of requeues so far.
        why: reason for which the job gave up or is held for good; empty when it is not.
        losses: causes of the starts that were lost, the newest last.
        evaluated: headline of the evaluated steps; None when there is none.
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
    losses: tuple[str, ...] = ()
    evaluated: BestRecord | None = None


def find_submissions(folders: Sequence[Path]) -> dict[Path, Submission]:
    """The newest submission of each run in or below some folders.

    Args:
        folders: run folders, or folders with runs below them.
    Returns:
        Run folder -> submission, in order of submission.
    Raises:
        UserError: a folder is missing.
    """
    newest: dict[Path, Submission] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder; name a run folder, or one with runs below it"
            )
        for run in _run_folders(folder):
            submissions = _read_submissions(run)
            if submissions:
                newest[run] = submissions[-1]
    return dict(sorted(newest.items(), key=lambda pair: (pair[1].submitted, str(pair[0]))))


def _run_folders(folder: Path) -> Iterator[Path]:
    not_runs = RunFolder(folder).own_folders()
    for place, below, _ in os.walk(folder):
        if RunFolder(Path(place)).jobs.name in below:
            yield Path(place)
        # os.walk descends into the folders that are left in this list
        below[:] = sorted(
            name for name in below if name not in not_runs and not name.startswith(".")
        )


def _read_submissions(run: Path) -> list[Submission]:
    """All submissions of a run, the oldest first."""
    submissions = []
    for job in RunFolder(run).submissions():
        try:
            content = json.loads(job.submission.read_text(encoding="utf-8"))
            submissions.append(Submission(**content))
        except (ValueError, TypeError):  # half written, or by another version of tapct
            continue
    return sorted(submissions, key=lambda submission: submission.submitted)


def read_progress(
    run: Path, submission: Submission, queue: dict[str, QueuedJob] | None
) -> Progress:
    """Read how far a run is.

    Args:
        run: run folder.
        submission: newest submission of the run.
        queue: jobs by id, from `slurm.read_queue`; None when SLURM does not respond.
    """
    rows = jsonl.read_tail(RunFolder(run).metrics, "step")
    step, loss = step_and_loss(rows)
    recent = rows[-LAST_STEPS:]
    paces = [row["seconds/step"] for row in recent if row.get("seconds/step") is not None]
    events = _read_events(run, submission.job)
    job = None if queue is None else queue.get(submission.job)
    given_up = _why_given_up(job, events)
    writer = None if job is not None else _writer(run, submission.job)
    if given_up:
        state = "gave up"
    elif writer:
        state = writer
    else:
        state = _state(job, events, step >= submission.steps, has_queue=queue is not None)
    if job is not None:
        restarts = job.restarts
    else:
        restarts = max((int(event.get("restarts", 0)) for event in events), default=0)
    return Progress(
        run=run,
        job=submission.job,
        state=state,
        step=step,
        steps=submission.steps,
        loss=loss,
        seconds=statistics.median(paces) if paces else math.nan,
        restarts=restarts,
        why=given_up or _why_held(job),
        losses=tuple(str(event.get("why", "")) for event in events if event["event"] == "lost"),
        evaluated=best_record.read(run),
    )


def step_and_loss(rows: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """The newest step in rows of metrics.jsonl, and the mean loss up to it; 0 and NaN without rows.

    Args:
        rows: last rows of the file.
    """
    if not rows:
        return 0, math.nan
    step = int(rows[-1]["step"])
    logged = [(row["step"], row["loss/total"]) for row in rows if "loss/total" in row]
    values = [math.nan if value is None else float(value) for _, value in logged]
    return step, last_mean([at for at, _ in logged], values, step)


def _writer(run: Path, job: str) -> str:
    """`running` where the lease of a run shows that a job works on it which the queue does not
    show, as on a cluster that hides the jobs of other users; else empty.
    """
    path = RunFolder(run).lease
    try:
        is_recent = time.time() - path.stat().st_mtime < lease.STALE_S
        holder = lease.holder_of(path)
    except OSError:
        return ""
    # the job of an element of an array has a number of its own in the lease
    is_own = holder is not None and (holder.job == job or "_" in job)
    is_dead = holder is not None and lease.has_ended(holder)
    return "running" if is_own and is_recent and not is_dead else ""


def _why_given_up(job: QueuedJob | None, events: Sequence[dict[str, Any]]) -> str:
    """The reason that the batch script recorded when it did not requeue the job.

    Empty when it did requeue the job, or when a person has requeued it since.
    """
    last = events[-1] if events else {}
    is_over = job is None or not job.is_active
    return str(last.get("why", "")) if is_over and last.get("event") == "gave up" else ""


def _why_held(job: QueuedJob | None) -> str:
    """Why SLURM will never start a job that waits; empty when it will."""
    if job is None or job.reason != "JobHoldMaxRequeue":
        return ""
    return (
        "SLURM holds the job, since its batch script has disappeared with the first node five "
        f"times; resume with: scontrol release {job.id}, or cancel it and submit again"
    )


def _state(
    job: QueuedJob | None, events: Sequence[dict[str, Any]], has_all_steps: bool, has_queue: bool
) -> str:
    """The state of a job; with a question mark where only SLURM could know it."""
    if job is not None:
        return job.state.lower()
    last = events[-1]["event"] if events else ""
    if has_all_steps or last == "done":
        return "done"
    if last in ("failed", "stopped", "lost"):
        return str(last)
    if has_queue:
        return "gone" if last else "never ran"
    return "running?" if last else "waiting?"


def _read_events(run: Path, job: str) -> list[dict[str, Any]]:
    """Events of a job, beside its submission.json: start, stopped, done, failed, lost, cut off,
    gave up.
    """
    for folder in RunFolder(run).submissions():
        if _job_id(folder.submission) == job:
            return jsonl.read(folder.events, "event").rows
    return []


def _job_id(path: Path) -> str:
    """The job id in a submission.json; empty where the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError:  # cut off when the process that wrote it was killed
        return ""
    return str(content.get("job", "")) if isinstance(content, dict) else ""


def progress_table(rows: Sequence[Progress]) -> Table:
    """The table of `tapct jobs`; fits 80 columns. With evaluations during training, it has the
    headline of the newest evaluated step.
    """
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("job", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "s/step", "left", "re"):  # re: restarts
        table.add_column(name, justify="right", no_wrap=True)
    has_evaluations = any(row.evaluated is not None for row in rows)
    if has_evaluations:
        table.add_column("eval", justify="right", no_wrap=True)
    for row in rows:
        left = ""
        if row.step < row.steps and not math.isnan(row.seconds):
            left = console.duration((row.steps - row.step) * row.seconds)
        table.add_row(
            os.path.relpath(row.run),
            row.job,
            row.state[:STATE_WIDTH],
            f"{row.step}/{row.steps}",
            "" if math.isnan(row.loss) else f"{row.loss:.3f}",
            "" if math.isnan(row.seconds) else f"{row.seconds:.3g}",
            left,
            str(row.restarts),
            *([newest_headline(row.evaluated)] if has_evaluations else []),
        )
    return table


def line_about_losses(losses: Sequence[str]) -> str:
    """How many starts of a job were lost and why the last one was, as a single line."""
    verb = "was" if len(losses) == 1 else "were"
    return f"{counted(len(losses), 'start')} {verb} lost, the last one by: {losses[-1]}"


def newest_headline(record: BestRecord | None) -> str:
    """The headline of the newest evaluated step; empty where there is none."""
    return "" if record is None else shown(record.values[record.newest])


def line_about_best(record: BestRecord) -> str:
    """The newest and the best evaluated step, as a single line."""
    newest = f"{shown(record.values[record.newest])} at step {record.newest}"
    best = "no best step"
    if record.best is not None:
        best = f"best {shown(record.values[record.best])} at step {record.best}"
    return f"{record.task}: {record.metric} {newest}, {best}, on the {record.people}"


def cancel_jobs(targets: Sequence[str]) -> list[str]:
    """Cancel jobs.

    Args:
        targets: run folders, folders with runs below them, or job ids.
    Returns:
        One line per cancelled job, to print.
    Raises:
        UserError: SLURM does not respond, or a target has no job that waits or runs.
    """
    wanted = [job for target in targets for job in _known_jobs(target)]
    queue = slurm.read_queue(wanted)
    if queue is None:
        raise UserError(
            "SLURM does not respond (squeue), so nothing was cancelled; is this a login node? Try "
            "`sinfo`"
        )
    lines: dict[str, str] = {}
    for target in targets:
        chosen = _active_jobs_of(target, queue)
        if not chosen:
            raise UserError(
                f"{target} has no job that waits or runs, so nothing was cancelled; see "
                "`squeue --me`"
            )
        for job, run in chosen.items():
            place = "" if run is None else f": {run}"
            lines[job] = f"cancelled job {job}, was {queue[job].state.lower()}{place}"
    slurm.cancel_ids(list(lines))
    return list(lines.values())


def _known_jobs(target: str) -> list[str]:
    """Ids of jobs that a target names, or whose runs lie in it."""
    folder = expand_path(target)
    if not folder.is_dir():
        return [target] if re.fullmatch(r"\d+(_\d+)?", target) else []
    return [submission.job for submission in find_submissions([folder]).values()]


def _active_jobs_of(target: str, queue: dict[str, QueuedJob]) -> dict[str, Path | None]:
    """Ids of the jobs that wait or run -> run folder, or None where the target is an id."""
    is_id = re.fullmatch(r"\d+(_\d+)?", target) is not None
    folder = expand_path(target)
    if is_id and not folder.is_dir():
        ids = [job for job in queue if job == target or job.startswith(f"{target}_")]
        return {job: None for job in ids if queue[job].is_active}
    submissions = find_submissions([folder])
    if not submissions:
        raise UserError(f"{target} holds no run that was submitted; name a run folder or a job id")
    chosen: dict[str, Path | None] = {}
    for run, submission in submissions.items():
        job = submission.job
        if job in queue and queue[job].is_active:
            chosen[job] = run
    return chosen
