"""The options of `tapct submit`: resources of the job, sweeps and checks."""

from __future__ import annotations

from typing import Annotated

import typer

TimeLimit = Annotated[
    str,
    typer.Option(
        "--time",
        metavar="TIME",
        help="wall-time limit of one job start, e.g. 90 (minutes), 12:00:00 (hours) or 2-00:00 "
        "(two days)",
    ),
]

Nodes = Annotated[int, typer.Option(metavar="N", help="number of nodes", min=1)]

GpusPerNode = Annotated[
    int, typer.Option(metavar="N", help="GPUs of each node; 0 trains on CPUs", min=0)
]

TasksPerNode = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="processes on each node; 0 starts one per GPU, or one without GPUs",
        min=0,
    ),
]

CpusPerTask = Annotated[
    int,
    typer.Option(
        metavar="N", help="CPU cores of each process; 0 takes the cluster's default", min=0
    ),
]

Memory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="memory of each node, e.g. 64G",
        show_default="the cluster's default",
    ),
]

Partition = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="partition of the job, passed to sbatch as --partition",
        show_default="the cluster's default",
    ),
]

Account = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="account of the job, passed to sbatch as --account",
        show_default="the cluster's default",
    ),
]

Qos = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="quality of service, passed to sbatch as --qos",
        show_default="the cluster's default",
    ),
]

Constraint = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="required node features, passed to sbatch as --constraint",
        show_default="the cluster's default",
    ),
]

Grace = Annotated[
    int,
    typer.Option(
        metavar="SECONDS",
        help="seconds before the time limit at which the job receives the signal to save and "
        "to requeue itself",
        min=1,
    ),
]

MaxRestarts = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="maximum number of requeues in total, even if the run makes progress",
        min=0,
    ),
]

MaxIdleRestarts = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="maximum number of starts in a row that write no new checkpoint",
        min=0,
    ),
]

MaxFailures = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="maximum number of starts in a row that are lost to a killed rank, a failed node or "
        "GPU, without a new checkpoint",
        min=0,
    ),
]

SweepAxes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE,VALUE",
        help="several values of one setting; one run per value. Repeated options give all "
        "combinations",
    ),
]

AllowChange = Annotated[
    bool,
    typer.Option(
        "--allow-change",
        help="resume even though settings that affect training have changed",
    ),
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print the batch script and submit nothing")
]
