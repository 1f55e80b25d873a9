"""Commands for a SLURM cluster: `submit`, `jobs` and `cancel`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tapct.base import console
from tapct.cli.app import ConfigFile, Overrides, app, examples
from tapct.cli.submit_options import (
    Account,
    AllowChange,
    Constraint,
    CpusPerTask,
    DryRun,
    GpusPerNode,
    Grace,
    MaxFailures,
    MaxIdleRestarts,
    MaxRestarts,
    Memory,
    Nodes,
    Partition,
    Qos,
    SweepAxes,
    TasksPerNode,
    TimeLimit,
)

if TYPE_CHECKING:  # --help is instant
    from tapct.cluster.jobs import Submission
    from tapct.cluster.resources import Resources
    from tapct.cluster.submit import PlannedRuns


@app.command(
    epilog=examples(
        "tapct submit tap_s_3d --gpus-per-node 4 --time 2-00:00 out=runs/mine",
        "tapct submit tap_s_3d --gpus-per-node 1 --sweep optim.lr=1e-4,2e-4",
    )
)
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    limit: TimeLimit = "1-00:00",
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 0,
    tasks_per_node: TasksPerNode = 0,
    cpus_per_task: CpusPerTask = 0,
    mem: Memory = "",
    partition: Partition = "",
    account: Account = "",
    qos: Qos = "",
    constraint: Constraint = "",
    grace: Grace = 120,
    max_restarts: MaxRestarts = 1000,
    max_idle_restarts: MaxIdleRestarts = 5,
    max_failures: MaxFailures = 10,
    sweep: SweepAxes = None,
    allow_change: AllowChange = False,
    dry_run: DryRun = False,
) -> None:
    """Train on a SLURM cluster.

    A job that is preempted or reaches its time limit saves a checkpoint, requeues itself and
    resumes.
    """
    from tapct.cluster import slurm
    from tapct.cluster import submit as submission
    from tapct.cluster.resources import Resources

    resources = Resources(
        minutes=slurm.time_limit_minutes(limit),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        mem=slurm.memory_size(mem) if mem else "",
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        grace_seconds=grace,
        max_restarts=max_restarts,
        max_idle_restarts=max_idle_restarts,
        max_failures=max_failures,
    )
    planned = submission.plan_runs(config, overrides or [], sweep or [])
    warnings: list[str] = []
    for run in planned.runs:
        warnings += submission.check_run(run, resources, allow_change)
        warnings += submission.run_warnings(run, resources)
    for line in dict.fromkeys(warnings):  # each once
        console.warn(line)
    if dry_run:
        print(submission.preview_batch_script(planned, resources))
        return
    submitted = submission.submit_runs(planned, resources, allow_change, warn=console.warn)
    for line in lines_about(planned, submitted, resources):
        console.say(line)


def lines_about(
    planned: PlannedRuns, submitted: Sequence[Submission], resources: Resources
) -> Iterator[str]:
    """What was submitted, and how to follow it."""
    duration = console.duration(resources.minutes * 60)
    yield f"{resources.nodes} x {resources.tasks} tasks, each start at most {duration}"
    for run, each in zip(planned.runs, submitted, strict=True):
        yield f"job {each.job}: {run.value.out}"
    root = planned.root
    yield f"logs in {submitted[0].logs}; watch: tapct jobs {root}; end: tapct cancel {root}"
    if planned.folders != [root]:
        yield f"when they are done: tapct compare {shlex.quote(str(root))}/*=*"


@app.command(epilog=examples("tapct jobs", "tapct jobs runs/mine runs/sweep"))
def jobs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FOLDER",
            help="run folders, or folders that contain runs; default: the folder `runs`",
        ),
    ] = None,
) -> None:
    """Show the progress of submitted runs."""
    from tapct.cluster import jobs as submitted_jobs
    from tapct.cluster import slurm

    submissions = submitted_jobs.find_submissions(folders or [Path("runs")])
    if not submissions:
        console.say("no run here was submitted; `tapct submit CONFIG` submits one")
        return
    queued = slurm.read_queue()
    rows = [submitted_jobs.read_progress(run, one, queued) for run, one in submissions.items()]
    console.console().print(submitted_jobs.progress_table(rows))
    for row in rows:
        if row.why:
            console.say(f"{os.path.relpath(row.run)}, job {row.job}: {row.why}")
        elif row.losses:
            line = submitted_jobs.line_about_losses(row.losses)
            console.say(f"{os.path.relpath(row.run)}, job {row.job}: {line}")
        if row.evaluated is not None:
            line = submitted_jobs.line_about_best(row.evaluated)
            console.say(f"{os.path.relpath(row.run)}: {line}")
    if queued is None:
        console.say("SLURM does not respond; states are read from the run folders")


@app.command(epilog=examples("tapct cancel runs/mine", "tapct cancel 4711"))
def cancel(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|JOB", help="run folders, folders that hold runs, or SLURM job IDs"
        ),
    ],
) -> None:
    """Cancel jobs.

    A run saves a checkpoint first, if the setting KillWait of SLURM leaves enough time (30 s by
    default).
    """
    from tapct.cluster import jobs as submitted_jobs

    for line in submitted_jobs.cancel_jobs(words):
        console.say(line)
