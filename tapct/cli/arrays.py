"""`tapct submit index | pack | embed | eval`: work that is divided over the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tapct.base import console, files
from tapct.base.exits import UserError
from tapct.cli import submit_options as option
from tapct.cli import submitted_resources
from tapct.cli.app import app, examples

if TYPE_CHECKING:  # --help is instant
    from tapct.cluster.resources import Resources

ON_CPUS = ("index", "pack")  # commands that use no GPU, and whose --workers are the CPU cores


@app.command(
    "submit-array",
    hidden=True,
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "tapct submit index /data/ct --out /data/archive --parts 16 --time 8:00:00",
        "tapct submit pack data/archive --out data/store --parts 16",
        "tapct submit embed runs/mine /data/ct --out vectors --scan --gpus 1",
        "tapct submit eval runs/mine --parts 4 --gpus 1 --time 2:00:00",
    ),
)
def submit_array(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="ARGS",
            help="arguments and options of the command itself, as in tapct index, pack, embed or "
            "eval",
        ),
    ],
    parts: Annotated[
        int, typer.Option(metavar="N", help="number of elements of the array", min=1, max=10_000)
    ] = 8,
    array_limit: option.ElementsAtOnce = 0,
    gpus_per_node: option.GpusOfElement = 0,
    time: option.TimeLimit = "1-00:00",
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
    dry_run: option.DryRun = False,
) -> None:
    """Divide a command over the nodes of a SLURM cluster.

    The command is index, pack, embed or eval. Each element of an array of jobs does one part of the
    work. A last job does what is left and writes the result. You can submit the same command again
    without harm: nothing is done twice.
    """
    from tapct.cluster import arrays

    arrays.check_words(words)
    resources = one_task(submitted_resources.of_context(context, words[0]))
    check_as_command(context, words, comes_later="dependency" in resources.options)
    for line in warnings(words, resources):
        console.warn(line)
    cores = str(resources.options.get("cpus-per-task", ""))
    if words[0] in ON_CPUS and cores.isdigit() and not has_workers(words):
        words = [*words, "--workers", cores]
    if dry_run:
        print(arrays.preview(words, resources, parts))
        return
    submitted = arrays.submit_arrays(words, resources, parts)
    for array in submitted.arrays:
        console.say(f"array {array}: tapct {words[0]}, {parts} parts")
    console.say(
        f"job {submitted.last}: does what is left and writes the result; logs in {submitted.logs}"
    )


def check_as_command(context: typer.Context, words: Sequence[str], comes_later: bool) -> None:
    """Read the words as every element will do, so that a mistake is found before the queue.

    Args:
        context: context of this command.
        words: command with its arguments.
        comes_later: whether the job waits for another one, which may make what it reads.
    Raises:
        ClickException: they are no command line of tapct.
        UserError: what they name does not exist.
    """
    root = context.find_root()
    command = root.command.get_command(root, words[0])  # type: ignore[attr-defined]
    parsed = command.make_context(f"submit {words[0]}", list(words[1:]), parent=root)
    arguments = {one.name for one in command.params if one.param_type_name == "argument"}
    if words[0] == "embed":
        arguments.discard("model")  # may be a name at Hugging Face
    values = [parsed.params.get(name) for name in arguments]
    parsed.close()
    for path in paths_in(values):
        is_pattern = any(letter in str(path) for letter in "*?[")
        if not (comes_later or is_pattern or files.expand_path(path).exists()):
            raise UserError(
                f"{path} does not exist on this machine; tapct submit must find it here too, at "
                "the same path as on the nodes. Correct the path, or add --dependency if another "
                "job makes it"
            )


def paths_in(values: Sequence[object]) -> Iterator[Path]:
    """The paths among some values, also those in lists."""
    for value in values:
        if isinstance(value, Path):
            yield value
        elif isinstance(value, list | tuple):
            yield from paths_in(value)


def one_task(resources: Resources) -> Resources:
    """The same request for one process on one node, whatever the number of its GPUs."""
    import dataclasses

    return dataclasses.replace(resources, nodes=1, tasks_per_node=1)


def has_workers(words: Sequence[str]) -> bool:
    """Whether a command sets its number of worker processes."""
    return any(word.partition("=")[0] == "--workers" for word in words)


def warnings(words: Sequence[str], resources: Resources) -> Iterator[str]:
    """Combinations that work but are probably not intended, one line each."""
    command = words[0]
    if command in ON_CPUS and resources.has_gpus:
        yield (
            f"tapct {command} uses no GPU, but each element requests one; leave the option out, or "
            f"give {command} a section of its own in the file of the site"
        )
    if command not in ON_CPUS and not resources.has_gpus:
        yield f"each element requests no GPU, so tapct {command} computes on the CPU; add --gpus"
    if command in ON_CPUS and not has_workers(words):
        others = ("cpus-per-task", "cpus-per-gpu", "cores-per-socket", "exclusive")
        if not any(name in resources.options for name in others):
            yield (
                "without --cpus-per-task, most clusters give each element one core, which all its "
                "worker processes would share; add --cpus-per-task"
            )
