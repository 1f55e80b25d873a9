"""Commands about one training run on this machine: doctor, plan, train."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console, ranks, signals
from tapct.cli.app import ConfigFile, Overrides, app


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="YAML config whose store, folder and device are tried")
    ] = None,
    overrides: Overrides = None,
    store: Annotated[
        Path | None, typer.Option(help="store to read from, instead of the config's")
    ] = None,
) -> None:
    """Look whether this machine can train: ok, warn or fail with the remedy; exit code 1 if
    anything fails.
    """
    from tapct.doctor import checkup, verdicts

    found = []
    for finding in checkup.findings(config, overrides or [], store):
        checkup.show(finding)
        found.append(finding)
    console.say(verdicts.summary(found))
    if any(finding.state == "fail" for finding in found):
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="numbers of GPUs to tell of")] = "1,2,4,8,16,32,64",
    gpus_per_node: Annotated[
        int, typer.Option(help="that hold one copy where parallel.shard=0", min=1)
    ] = 8,
    memory: Annotated[
        float | None, typer.Option(help="GB of a GPU: what fits, with which accumulation")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="that a GPU sustains; its peak with --utilisation")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="measure rate and reading on this machine")
    ] = False,
    utilisation: Annotated[
        float | None, typer.Option(help="share of the rate; 0.4 of a measured one")
    ] = None,
) -> None:
    """Tokens, parameters and FLOPs of a config; memory, time and reading by the number of GPUs."""
    from tapct import config as configs
    from tapct.plan import command
    from tapct.run.config import RunConfig

    resolved = configs.load_config(RunConfig, config, overrides or [])
    options = command.Options(gpus, gpus_per_node, memory, tflops, measure, utilisation)
    console.console().print(command.tables(resolved.value, options))


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="show each value and its source")
    ] = False,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change",
            help="go on from a checkpoint although the config shapes another curve",
        ),
    ] = False,
    stopped_code: Annotated[
        int,
        typer.Option(
            help="exit code when a signal or the end of a job's time stopped it, and it has saved",
            min=0,
        ),
    ] = 0,
) -> None:
    """Pretrain; started again, it goes on from the newest checkpoint. Under torchrun or srun, on
    all their ranks.
    """
    with signals.kept_from_children():
        from tapct.run import pretrain

        resolved = pretrain.read_config(config, overrides or [])
        if print_config:
            print(resolved.pretty())
            return
        stop = pretrain.train(resolved, allow_change)
    if stop.signal:
        again = shlex.join(["tapct", "train", str(config), *(overrides or [])])
        how = "" if ranks.from_environment(os.environ).world == 1 else ", under torchrun or srun,"
        console.say(
            f"stopped by {stop.signal} and saved at step {stop.step}; go on{how} with: {again}"
        )
        # signals other than Ctrl-C are a scheduler's, which must not take the end for a failure
        raise typer.Exit(130 if stop.signal == "SIGINT" else stopped_code)
