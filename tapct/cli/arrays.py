"""`tapct submit index | pack | embed | eval`: work that is divided over the nodes of a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from tapct.base import console
from tapct.cli.app import app, examples
from tapct.cli.submit_options import (
    Account,
    Constraint,
    CpusPerTask,
    DryRun,
    Memory,
    Partition,
    Qos,
    TimeLimit,
)


@app.command(
    "submit-array",
    hidden=True,
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "tapct submit index /data/ct --out /data/archive --parts 16 --time 8:00:00",
        "tapct submit pack data/archive --out data/store --parts 16",
    ),
)
def submit_array(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND",
            help="index, pack, embed or eval, with its own arguments and options",
        ),
    ],
    parts: Annotated[
        int, typer.Option(metavar="N", help="number of elements of the array", min=1, max=10_000)
    ] = 8,
    at_once: Annotated[
        int,
        typer.Option(
            metavar="N", help="largest number of elements that run at once; 0 for all", min=0
        ),
    ] = 0,
    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs of each element", min=0)] = 0,
    limit: TimeLimit = "1-00:00",
    cpus_per_task: CpusPerTask = 0,
    mem: Memory = "",
    partition: Partition = "",
    account: Account = "",
    qos: Qos = "",
    constraint: Constraint = "",
    dry_run: DryRun = False,
) -> None:
    """Divide a command over the nodes of a SLURM cluster.

    Each element of an array does one part of the work, and a last job does what is left and
    finishes. It is harmless to submit the same again: what is done is not done twice.
    """
    from tapct.cluster import arrays, slurm

    resources = arrays.ArrayResources(
        minutes=slurm.time_limit_minutes(limit),
        parts=parts,
        at_once=at_once,
        cpus_per_task=cpus_per_task,
        gpus=gpus,
        mem=slurm.memory_size(mem) if mem else "",
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
    )
    has_workers = any(word.partition("=")[0] == "--workers" for word in words)
    if words[0] in ("index", "pack") and cpus_per_task and not has_workers:
        words = [*words, "--workers", str(cpus_per_task)]
    if dry_run:
        print(arrays.preview(words, resources))
        return
    submitted = arrays.submit_arrays(words, resources)
    for array in submitted.arrays:
        console.say(f"array {array}: tapct {words[0]}, {parts} parts")
    console.say(f"job {submitted.last}: does what is left and finishes; logs in {submitted.logs}")
