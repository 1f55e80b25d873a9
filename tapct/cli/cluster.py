"""Commands for a SLURM cluster: submit, jobs, cancel."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console
from tapct.cli.app import ConfigFile, Overrides, app


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    limit: Annotated[
        str, typer.Option("--time", help="of one start: 2-00:00, 12:00:00, or minutes")
    ] = "1-00:00",
    nodes: Annotated[int, typer.Option(help="machines", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="0: train on CPUs", min=0)] = 0,
    tasks_per_node: Annotated[
        int, typer.Option(help="processes; 0: one per GPU, or one", min=0)
    ] = 0,
    cpus_per_task: Annotated[int, typer.Option(help="0: the cluster's default", min=0)] = 0,
    mem: Annotated[str, typer.Option(help="per node, e.g. 64G")] = "",
    partition: Annotated[str, typer.Option(help="as of sbatch")] = "",
    account: Annotated[str, typer.Option(help="as of sbatch")] = "",
    qos: Annotated[str, typer.Option(help="as of sbatch")] = "",
    constraint: Annotated[str, typer.Option(help="as of sbatch")] = "",
    grace: Annotated[
        int, typer.Option(help="seconds before its end at which a job is told to save", min=1)
    ] = 120,
    max_restarts: Annotated[
        int, typer.Option(help="requeues after which a job gives up", min=0)
    ] = 1000,
    max_idle_restarts: Annotated[
        int,
        typer.Option(
            help="requeues in a row without a new checkpoint after which a job gives up", min=0
        ),
    ] = 5,
    sweep: Annotated[
        list[str] | None, typer.Option(help="key=value,value; repeat it for a product")
    ] = None,
    allow_change: Annotated[bool, typer.Option("--allow-change", help="as in train")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the batch script, write nothing")
    ] = False,
) -> None:
    """Train on a SLURM cluster; preempted or out of time, the job requeues itself and goes on."""
    from tapct.cluster import slurm
    from tapct.cluster import submit as launch

    resources = launch.Resources(
        minutes=slurm.minutes(limit),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        mem=slurm.checked_memory(mem) if mem else "",
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        grace_seconds=grace,
        max_restarts=max_restarts,
        max_idle_restarts=max_idle_restarts,
    )
    plan = launch.plan(config, overrides or [], sweep or [])
    for run in plan.runs:
        launch.check(run, resources, allow_change)
    for line in dict.fromkeys(
        line for run in plan.runs for line in launch.doubts(run.value, resources)
    ):
        print(f"warning: {line}", file=sys.stderr)
    if dry_run:
        print(launch.script(plan, resources))
        return
    submitted = launch.submit(plan, resources, allow_change)
    console.say(
        f"{nodes} x {resources.tasks} tasks, each start at most "
        f"{console.duration(resources.minutes * 60)}"
    )
    for run, submission in zip(plan.runs, submitted, strict=True):
        console.say(f"job {submission.job}: {run.value.out}")
    console.say(
        f"logs in {submitted[0].logs}; watch: tapct jobs {plan.home}; end: tapct cancel {plan.home}"
    )
    if sweep:
        console.say(f"when they are done: tapct compare {shlex.quote(str(plan.home))}/*=*")


@app.command()
def jobs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="run folders, or folders of runs; default runs/")
    ] = None,
) -> None:
    """How far the submitted runs are."""
    from tapct.cluster import jobs as teller
    from tapct.cluster import slurm

    submissions = teller.find(folders or [Path("runs")])
    if not submissions:
        console.say("no run here was submitted; `tapct submit CONFIG` submits one")
        return
    queued = slurm.queue()
    rows = [teller.progress(run, one, queued) for run, one in submissions.items()]
    console.console().print(teller.table(rows))
    for row in rows:
        if row.why:
            console.say(f"{os.path.relpath(row.run)}, job {row.job}: {row.why}")
    if queued is None:
        console.say("SLURM does not answer; states are what the run folders say")


@app.command()
def cancel(
    words: Annotated[
        list[str], typer.Argument(metavar="RUN|JOBID...", help="run folders, or ids of jobs")
    ],
) -> None:
    """Cancel jobs; training saves a checkpoint as it ends."""
    from tapct.cluster import jobs as teller

    for line in teller.cancel(words):
        console.say(line)
