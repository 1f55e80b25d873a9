"""What a job requests, from the options of a command of `tapct submit` and the file of the site."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:  # --help is instant
    from tapct.cluster.resources import Resources


def of_context(context: typer.Context, command: str = "train") -> Resources:
    """What a job requests: the options of the command line, and below them those of the site.

    Args:
        context: context of a command whose parameters have the names of `Resources`, with `time`
            and `grace`. A command may leave some out; the file of the site may set these for other
            commands.
        command: section of the file of the site. If the command line gives no grace, that of all
            commands but train is at most a quarter of the time limit, since elements may be short.
    """
    from tapct.cluster import resources, site, slurm

    defaults: dict[str, Any] = {"time": "", "grace": 0}
    for field in dataclasses.fields(resources.Resources):
        if field.name not in ("minutes", "grace_seconds"):
            defaults[field.name] = field.default
    own = {name: context.params[name] for name in defaults if name in context.params}
    explicit = []
    for name in own:
        if str(context.get_parameter_source(name)).endswith("COMMANDLINE"):
            explicit.append(name.replace("_", "-"))
    given = {name.replace("_", "-"): value for name, value in {**defaults, **own}.items()}
    options: dict[str, Any] = {}
    for dashed, value in site.with_site(given, explicit, command).items():
        name = dashed.replace("-", "_")
        if name in own:
            options[name] = tuple(value) if isinstance(value, list) else value
    for name in ("sbatch", "setup", "srun_args"):
        options[name] = options[name] or ()
    for name in ("mem", "mem_per_cpu", "mem_per_gpu"):
        if options[name]:
            options[name] = slurm.memory_size(options[name], name.replace("_", "-"))
    options["container"] = resources.container_image(
        options["container"], options["container_with"]
    )
    minutes, grace = slurm.time_limit_minutes(options.pop("time")), options.pop("grace")
    if command != "train" and "grace" not in explicit:
        grace = min(grace, 60 * minutes // 4)
    return resources.Resources(minutes=minutes, grace_seconds=grace, **options)
