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

MemPerCpu = Annotated[
    str,
    typer.Option(
        "--mem-per-cpu",
        metavar="SIZE",
        help="memory of each CPU core, passed to sbatch as --mem-per-cpu",
        show_default="the cluster's default",
    ),
]

MemPerGpu = Annotated[
    str,
    typer.Option(
        "--mem-per-gpu",
        metavar="SIZE",
        help="memory of each GPU, passed to sbatch as --mem-per-gpu",
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

Gres = Annotated[
    str,
    typer.Option(
        "--gres",
        metavar="LIST",
        help="generic resources of each node, e.g. gpu:h100:4",
        show_default="none",
    ),
]

Exclude = Annotated[
    str,
    typer.Option(
        "--exclude",
        metavar="NODES",
        help="nodes that the job must not use",
        show_default="none",
    ),
]

NodeList = Annotated[
    str,
    typer.Option(
        "--nodelist",
        metavar="NODES",
        help="nodes that the job must use",
        show_default="none",
    ),
]

Exclusive = Annotated[bool, typer.Option("--exclusive", help="share the nodes with no other job")]

Dependency = Annotated[
    str,
    typer.Option(
        "--dependency",
        metavar="LIST",
        help="condition on other jobs, e.g. afterok:4711",
        show_default="none",
    ),
]

Reservation = Annotated[
    str,
    typer.Option(
        "--reservation",
        metavar="NAME",
        help="reservation of the job",
        show_default="none",
    ),
]

Comment = Annotated[
    str,
    typer.Option(
        "--comment",
        metavar="TEXT",
        help="comment on the job",
        show_default="none",
    ),
]

Mail = Annotated[
    str,
    typer.Option(
        "--mail",
        metavar="ADDRESS",
        help="address to which SLURM writes when the job ends or fails",
        show_default="none",
    ),
]

JobName = Annotated[
    str,
    typer.Option(
        "--job-name",
        metavar="NAME",
        help="name of the job in the queue",
        show_default="tapct-NAME, with the name of the run folder or of the command",
    ),
]

ElementsAtOnce = Annotated[
    int,
    typer.Option(
        "--at-once",
        "--array-limit",
        metavar="N",
        help="largest number of elements that run at the same time; 0: all",
        min=0,
    ),
]

GpusOfElement = Annotated[
    int,
    typer.Option(
        "--gpus", "--gpus-per-node", metavar="N", help="GPUs of each element; 0: none", min=0
    ),
]

ArrayLimit = Annotated[
    int,
    typer.Option(
        "--array-limit",
        metavar="N",
        help="maximum number of runs of a sweep that train at the same time; 0: all",
        min=0,
    ),
]

Sbatch = Annotated[
    list[str] | None,
    typer.Option(
        "--sbatch",
        metavar="OPTION",
        help="any other option of sbatch, e.g. '--licenses=a'; may be repeated",
        show_default="none",
    ),
]

Setup = Annotated[
    list[str] | None,
    typer.Option(
        "--setup",
        metavar="LINE",
        help="shell line at the beginning of the batch script, e.g. 'module load cuda'; may be "
        "repeated",
        show_default="none",
    ),
]

SrunArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--srun-args",
        metavar="OPTIONS",
        help="further options of srun, e.g. '--cpu-bind=cores'; may be repeated",
        show_default="none",
    ),
]

Container = Annotated[
    str,
    typer.Option(
        "--container",
        metavar="IMAGE",
        help="image in which Python runs; it needs the packages that tapct requires",
        show_default="none",
    ),
]

ContainerWith = Annotated[
    str,
    typer.Option(
        "--container-with",
        metavar="PROGRAM",
        help="program that runs the image: apptainer, singularity, pyxis, or a command line of "
        "your own (docs/cluster.md)",
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
        help="maximum number of requeues in a row without a new checkpoint; the job gives up if "
        "the next start writes none either",
        min=0,
    ),
]

MaxFailures = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="maximum number of requeues in a row after starts that were lost (a killed rank, a "
        "failed node or GPU), without a new checkpoint; the job gives up if the next start is lost "
        "too",
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
