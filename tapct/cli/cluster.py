"""Commands for a SLURM cluster: `submit`, `jobs` and `cancel`; and `sweep` on this machine."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tapct.base import console, signals
from tapct.base.exits import UserError
from tapct.cli import submit_options as option
from tapct.cli import submitted_resources
from tapct.cli.app import ConfigFile, Overrides, app, examples

if TYPE_CHECKING:  # --help is instant
    from tapct.cluster.jobs import Submission
    from tapct.cluster.resources import Resources
    from tapct.cluster.submit import PlannedRuns


@app.command(
    epilog=examples(
        "tapct submit tap_s_3d_small_batch --gpus-per-node 1 --cpus-per-task 9",
        "tapct submit smoke --cpus-per-task 3 --sweep optim.lr=1e-3,3e-3",
    )
)
def submit(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    time: option.TimeLimit = "1-00:00",
    nodes: option.Nodes = 1,
    gpus_per_node: option.GpusPerNode = 0,
    tasks_per_node: option.TasksPerNode = 0,
    cpus_per_task: option.CpusPerTask = 0,
    mem: option.Memory = "",
    mem_per_cpu: option.MemPerCpu = "",
    mem_per_gpu: option.MemPerGpu = "",
    partition: option.Partition = "",
    account: option.Account = "",
    qos: option.Qos = "",
    constraint: option.Constraint = "",
    gres: option.Gres = "",
    exclude: option.Exclude = "",
    nodelist: option.NodeList = "",
    exclusive: option.Exclusive = False,
    dependency: option.Dependency = "",
    reservation: option.Reservation = "",
    comment: option.Comment = "",
    mail: option.Mail = "",
    job_name: option.JobName = "",
    sbatch: option.Sbatch = None,
    setup: option.Setup = None,
    srun_args: option.SrunArgs = None,
    container: option.Container = "",
    container_with: option.ContainerWith = "apptainer",
    grace: option.Grace = 120,
    max_restarts: option.MaxRestarts = 1000,
    max_idle_restarts: option.MaxIdleRestarts = 5,
    max_failures: option.MaxFailures = 10,
    sweep: option.SweepAxes = None,
    array_limit: option.ArrayLimit = 0,
    allow_change: option.AllowChange = False,
    dry_run: option.DryRun = False,
) -> None:
    """Train on a SLURM cluster.

    A job that is preempted, reaches its time limit or loses a node requeues itself and resumes. A
    file with defaults of the cluster is described in docs/cluster.md.

    `tapct submit index`, `pack`, `embed` or `eval`, followed by the arguments of that command,
    divides the work of the command over the nodes of the cluster.
    """
    from tapct.cluster import submit as submission

    resources = submitted_resources.of_context(context)
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


@app.command(
    epilog=examples(
        "tapct sweep smoke optim.lr=1e-3,3e-3 --parallel 2 out=runs/sweep",
        "tapct sweep smoke optim.lr=1e-3,3e-3 views.num_locals=2,4 train.steps=500",
    )
)
def sweep(
    config: ConfigFile,
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,VALUE",
            help="settings of all runs, and those with several values; one run per combination",
        ),
    ],
    parallel: Annotated[
        int,
        typer.Option(metavar="N", help="number of runs that train at the same time", min=1),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the runs and start nothing")
    ] = False,
) -> None:
    """Train every combination of some settings on this machine.

    The folders are those of `tapct submit --sweep`. The runs are ranked by the best value of their
    evaluated headline, if eval.during.every is set. The same command resumes runs that were
    stopped.
    """
    from tapct.cluster import local_sweep
    from tapct.cluster import submit as submission

    common, axes = local_sweep.divided(settings)
    if not axes:
        raise UserError(
            "no setting has several values; write for example optim.lr=1e-3,3e-3, or use tapct "
            "train for a single run"
        )
    planned = submission.plan_runs(config, common, axes)
    for line in local_sweep.check_runs(planned):
        console.warn(line)
    if dry_run:
        for folder in planned.folders:
            console.say(str(folder))
        return
    with signals.leaving_at_sigterm():
        outcomes = local_sweep.train_all(planned, parallel)
    console.console().print(local_sweep.result_table(local_sweep.ranked(planned.folders)))
    for line in local_sweep.lines_about(planned, outcomes):
        console.say(line)
    if any(outcome.code for outcome in outcomes):
        raise typer.Exit(1)


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
    queued = slurm.read_queue([one.job for one in submissions.values()])
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
