"""Commands for a SLURM cluster: `submit`, `jobs` and `cancel`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console
from tapct.cli.app import ConfigFile, Overrides, app, examples


@app.command(
    epilog=examples(
        "tapct submit tap_s_3d --gpus-per-node 4 --time 2-00:00 out=runs/mine",
        "tapct submit tap_s_3d --gpus-per-node 1 --sweep optim.lr=1e-4,2e-4",
    )
)
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    limit: Annotated[
        str,
        typer.Option(
            "--time",
            metavar="TIME",
            help="wall-time limit of one job start, e.g. 90 (minutes), 12:00:00 (hours) or 2-00:00 "
            "(two days)",
        ),
    ] = "1-00:00",
    nodes: Annotated[int, typer.Option(metavar="N", help="number of nodes", min=1)] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(metavar="N", help="GPUs of each node; 0 trains on CPUs", min=0)
    ] = 0,
    tasks_per_node: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="processes on each node; 0 starts one per GPU, or one without GPUs",
            min=0,
        ),
    ] = 0,
    cpus_per_task: Annotated[
        int,
        typer.Option(
            metavar="N", help="CPU cores of each process; 0 takes the cluster's default", min=0
        ),
    ] = 0,
    mem: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="memory of each node, e.g. 64G",
            show_default="the cluster's default",
        ),
    ] = "",
    partition: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="partition of the job, passed to sbatch as --partition",
            show_default="the cluster's default",
        ),
    ] = "",
    account: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="account of the job, passed to sbatch as --account",
            show_default="the cluster's default",
        ),
    ] = "",
    qos: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="quality of service, passed to sbatch as --qos",
            show_default="the cluster's default",
        ),
    ] = "",
    constraint: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="required node features, passed to sbatch as --constraint",
            show_default="the cluster's default",
        ),
    ] = "",
    grace: Annotated[
        int,
        typer.Option(
            metavar="SECONDS",
            help="seconds before the time limit at which the job receives the signal to save and "
            "to requeue itself",
            min=1,
        ),
    ] = 120,
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="maximum number of requeues in total, even if the run makes progress",
            min=0,
        ),
    ] = 1000,
    max_idle_restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="maximum number of starts in a row that write no new checkpoint",
            min=0,
        ),
    ] = 5,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="several values of one setting; one run per value. Repeated options give all "
            "combinations",
        ),
    ] = None,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change",
            help="resume even though settings that affect training have changed",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the batch script and submit nothing")
    ] = False,
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
    console.say(
        f"{nodes} x {resources.tasks} tasks, each start at most "
        f"{console.duration(resources.minutes * 60)}"
    )
    for run, each in zip(planned.runs, submitted, strict=True):
        console.say(f"job {each.job}: {run.value.out}")
    root = planned.root
    console.say(f"logs in {submitted[0].logs}; watch: tapct jobs {root}; end: tapct cancel {root}")
    if sweep:
        console.say(f"when they are done: tapct compare {shlex.quote(str(root))}/*=*")


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
