"""Commands for one training run on this machine: `doctor`, `plan` and `train`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console, exits, ranks
from tapct.cli.app import ConfigFile, Overrides, app, examples


@app.command(
    epilog=examples(
        "tapct doctor",
        "tapct doctor smoke data.store=data/store out=runs/mine",
        "tapct doctor tap_s_3d --selftest",
    )
)
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="config whose store, run folder and device are checked as well, e.g. smoke",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="settings that replace those of the config, e.g. data.store=data/store device=cpu",
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="store from which scans are read, to check it and to measure the reading speed",
            show_default="data.store of the config",
        ),
    ] = None,
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest",
            help="instead of the checks, train for some steps in several ways (GPU and CPU, bf16, "
            "compiled, each attention back-end, 2 ranks, resumed) and compare the losses; takes "
            "about 3 minutes",
        ),
    ] = False,
    json_path: Annotated[
        Path,
        typer.Option("--json", metavar="FILE", help="file that --selftest writes its results to"),
    ] = Path("selftest.json"),
) -> None:
    """Check that this machine can train.

    Each check prints ok, warn or fail, with a remedy. The exit code is 1 if a check fails. Under
    srun or torchrun, all nodes are checked, and the first rank prints one table.
    """
    if selftest:
        if config is None:
            raise exits.UserError(
                "--selftest trains with a config: name one, e.g. tapct doctor smoke --selftest"
            )
        from tapct.doctor import selftest as proofs

        if not proofs.report(config, overrides or [], json_path):
            raise typer.Exit(1)
        return
    from tapct.doctor import checkup, nodes, verdicts

    found = []
    place = nodes.place_among(os.environ)
    if place is not None:
        table, code = checkup.of_all_nodes(place, config, overrides or [], store)
        for finding in table:
            checkup.show(finding)
        if place.is_first:
            console.say(verdicts.summary(table))
        if code:
            raise typer.Exit(code)
        return
    for finding in checkup.findings(config, overrides or [], store):
        checkup.show(finding)
        found.append(finding)
    console.say(verdicts.summary(found))
    if any(finding.state == "fail" for finding in found):
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "tapct plan tap_b_3d",
        "tapct plan tap_b_3d --memory 80 --gpus 8,16,64",
        "tapct plan tap_b_3d --tflops 990 --utilisation 0.3",
    )
)
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[
        str, typer.Option(metavar="N,N,...", help="GPU counts to report, e.g. 1,8,64")
    ] = "1,2,4,8,16,32,64",
    gpus_per_node: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="number of GPUs of a node; with parallel.shard=0, the GPUs of a node share one "
            "copy of the weights",
            min=1,
        ),
    ] = 8,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="memory of one GPU in GB; adds a table of the largest micro-batch that fits",
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            metavar="TFLOP/S",
            help="sustained TFLOP/s of one GPU, or its peak if --utilisation is given; "
            "adds a table of times",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="measure the TFLOP/s and the reading speed of this machine, instead of giving "
            "--tflops",
        ),
    ] = False,
    utilisation: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="share of the TFLOP/s that training reaches, from 0 to 1",
            show_default="1 with --tflops, 0.4 with --measure",
        ),
    ] = None,
) -> None:
    """Estimate parameters, FLOPs, memory and time of a run.

    Nothing is trained. Memory and time are reported for each GPU count.
    """
    from tapct.plan import command, tables
    from tapct.run import rules

    resolved = rules.load_run_config(config, overrides or [])
    for line in rules.warnings(resolved):
        console.warn(line)
    options = command.Options(gpus, gpus_per_node, memory, tflops, measure, utilisation)
    out = console.console()
    out.width = max(out.width, tables.MIN_WIDTH)
    out.print(command.report(resolved.value, options))


@app.command(
    epilog=examples(
        "tapct train smoke data.store=data/store out=runs/mine",
        "tapct train smoke 'model.patch=[4,8,8]' --print-config",
        "torchrun --nproc-per-node 8 -m tapct train tap_b_3d train.accumulation=8",
    )
)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            help="print every setting and where it comes from, check that a run can start, and "
            "exit",
        ),
    ] = False,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change",
            help="resume even though settings that affect training have changed",
        ),
    ] = False,
    stopped_code: Annotated[
        int,
        typer.Option(
            metavar="CODE",
            help="exit code if a signal (but not Ctrl-C) or the time limit of the job stopped the "
            "run and it was saved; for batch scripts",
            min=0,
        ),
    ] = 0,
) -> None:
    """Pretrain a model; the same command resumes a stopped run.

    A stopped run resumes from its newest checkpoint. Under torchrun or srun, all ranks take part in
    the training.
    """
    from tapct.base import signals

    with signals.kept_from_children():
        from tapct.run import pretrain

        resolved = pretrain.read_config(config, overrides or [])
        if print_config:
            try:
                start = pretrain.check(resolved, allow_change)
            except exits.UserError:
                print(resolved.pretty(), flush=True)
                raise
            print(start.resolved.pretty(), flush=True)
            for line in start.about_data:
                console.say_line(f"# {line}")
            for line in start.warnings:
                console.warn(line)
            return
        stop = pretrain.train(resolved, allow_change)
    if stop.signal:
        command = shlex.join(["tapct", "train", str(config), *(overrides or [])])
        how = "" if ranks.from_environment(os.environ).world == 1 else ", under torchrun or srun,"
        console.say(
            f"stopped by {stop.signal} and saved at step {stop.step}; resume{how} with: {command}"
        )
        # Other signals than Ctrl-C come from a scheduler, which must not see this end as a failure.
        raise typer.Exit(130 if stop.signal == "SIGINT" else stopped_code)
