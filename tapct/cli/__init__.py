"""The command line. Every command imports what it needs inside itself, so that `--help` does not
wait for torch.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tapct.base import console, exits, ranks, signals


class Commands(TyperGroup):
    """All commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen one."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise exits.Interrupted from error


app = typer.Typer(
    cls=Commands,
    help="Pretrain 3D foundation models on CT: index, pack, train, eval, export, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. optim.lr=1e-3 model.patch=[4,8,8]")
]
ConfigFile = Annotated[Path, typer.Argument(help="YAML config, e.g. configs/smoke.yaml")]
RunFolder = Annotated[Path, typer.Argument(help="run folder, e.g. runs/quickstart")]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Options of all commands."""
    if debug:
        os.environ["TAPCT_DEBUG"] = "1"


@app.command()
def phantom(
    out: Annotated[Path, typer.Option(help="folder of the archive to make")],
    num: Annotated[int, typer.Option(help="how many scans", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="the same seed gives the same archive", min=0)] = 0,
) -> None:
    """Make a synthetic CT archive with organ labels."""
    from tapct.data.phantom import archive as maker

    with console.progress_bar("phantom") as progress:
        report = maker.write(out, maker.Config(num=num, seed=seed), progress)
    console.say(
        f"{report.scans} scans in {out}; next: tapct index {out} --out {out}/manifest.parquet"
    )


@app.command()
def index(
    folder: Annotated[
        Path, typer.Argument(help="folder with NIfTI, NRRD, MHA or DICOM, any depth")
    ],
    out: Annotated[Path, typer.Option(help="manifest to write (.parquet)")],
    labels: Annotated[
        Path | None, typer.Option(help="folder with label maps of the same names")
    ] = None,
    patient_regex: Annotated[
        str | None, typer.Option(help="its first group on the path names the patient")
    ] = None,
    min_depth: Annotated[int, typer.Option(help="refuse scans with fewer slices", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="processes; 0: in this one", min=0)] = os.cpu_count()
    or 1,
) -> None:
    """List an archive: each scan accepted with its facts, or refused with the reason."""
    from tapct.data.index import build

    with console.progress_bar("index") as progress:
        found = build(
            folder,
            out,
            labels=labels,
            patient_regex=patient_regex,
            min_depth=min_depth,
            workers=workers,
            progress=progress,
        )
    console.say(
        ", ".join(f"{count} {reason}" for reason, count in found.summary().items()) + f": {out}"
    )
    for row in found.rows:
        if row.detail:
            reason = (
                f"refused {row.path}: {row.reason}" if row.status == "refused" else f"{row.path}"
            )
            console.say(f"  {reason}: {row.detail}")


@app.command()
def pack(
    manifest_file: Annotated[Path, typer.Argument(metavar="MANIFEST", help="from tapct index")],
    out: Annotated[Path, typer.Option(help="store folder")],
    workers: Annotated[int, typer.Option(help="processes; 0: in this one", min=0)] = os.cpu_count()
    or 1,
    level: Annotated[int, typer.Option(help="compression level", min=1, max=9)] = 1,
) -> None:
    """Pack the accepted scans for fast slab reads; a second call goes on where the first
    stopped.
    """
    from tapct.data import manifest
    from tapct.data import pack as packer

    with console.progress_bar("pack") as progress:
        found = manifest.Manifest.read(manifest_file)
        report = packer.pack(found, out, workers=workers, level=level, progress=progress)
    share = report.stored_bytes / max(report.voxel_bytes, 1)
    console.say(
        f"{len(report.packed)} packed, {report.kept} kept from before, {len(report.refused)} "
        "refused; "
        f"{report.stored_bytes / 1e6:.0f} MB, {share:.0%} of the voxels: {out}"
    )
    for scan in report.refused:
        console.say(f"  refused {scan.path}: {scan.reason}: {scan.detail}")


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
    for run in planned.runs:
        submission.check_run(run, resources, allow_change)
    warnings = [
        line for run in planned.runs for line in submission.run_warnings(run.value, resources)
    ]
    for line in dict.fromkeys(warnings):  # each once
        print(f"warning: {line}", file=sys.stderr)
    if dry_run:
        print(submission.preview_batch_script(planned, resources))
        return
    submitted = submission.submit_runs(planned, resources, allow_change)
    console.say(
        f"{nodes} x {resources.tasks} tasks, each start at most "
        f"{console.duration(resources.minutes * 60)}"
    )
    for run, each in zip(planned.runs, submitted, strict=True):
        console.say(f"job {each.job}: {run.value.out}")
    home = planned.home
    console.say(f"logs in {submitted[0].logs}; watch: tapct jobs {home}; end: tapct cancel {home}")
    if sweep:
        console.say(f"when they are done: tapct compare {shlex.quote(str(home))}/*=*")


@app.command()
def jobs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="run folders, or folders of runs; default runs/")
    ] = None,
) -> None:
    """How far the submitted runs are."""
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
        console.say("SLURM does not respond; states are what the run folders say")


@app.command()
def cancel(
    words: Annotated[
        list[str], typer.Argument(metavar="RUN|JOBID...", help="run folders, or ids of jobs")
    ],
) -> None:
    """Cancel jobs; training saves a checkpoint as it ends."""
    from tapct.cluster import jobs as submitted_jobs

    for line in submitted_jobs.cancel_jobs(words):
        console.say(line)


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


@app.command(name="eval")
def evaluate(
    run_folder: RunFolder,
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option(help="judge the checkpoint of this step, not the newest", min=1)
    ] = None,
) -> None:
    """Judge the frozen features of a run beside untrained and raw-HU baselines."""
    from tapct.run import finished

    results = finished.evaluate(run_folder, overrides or [], step)
    for name, model in results["models"].items():
        console.say(f"{name:<24} mean Dice {model['mean_dice']:.3f}")
    console.say(
        "results and pictures in "
        f"{run_folder}/eval{'' if step is None else f'/steps/step_{step:08d}'}"
    )


@app.command()
def export(
    run_folder: RunFolder,
    out: Annotated[Path | None, typer.Option(help="folder to write; default RUN/export")] = None,
) -> None:
    """Write the teacher as safetensors + config.json, for tapct.load_pretrained."""
    from tapct.run import finished

    console.say(f"exported to {finished.export(run_folder, out)}")


@app.command()
def embed(
    model: Annotated[Path, typer.Argument(help="export folder")],
    scan: Annotated[Path, typer.Argument(help="NIfTI, NRRD, MHA or DICOM folder")],
    out: Annotated[Path, typer.Option(help="features file (.npz)")] = Path("features.npz"),
) -> None:
    """Dense features of one scan."""
    from tapct.data import ingest
    from tapct.weights import pretrained as weights

    pretrained = weights.load_pretrained(model)
    pretrained.embed(ingest.read_volume(scan)).write_npz(out)
    console.say(f"features in {out}")


@app.command()
def report(run_folder: RunFolder) -> None:
    """Write RUN/report.html: curves, health, timing, pictures and config on one page."""
    from tapct.report import page

    console.say(f"report: {page.write(run_folder)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="run folders, e.g. runs/*")],
    out: Annotated[Path, typer.Option(help="page to write")] = Path("compare.html"),
    metric: Annotated[
        list[str] | None,
        typer.Option(help="what to draw, again for more: a name of metrics.jsonl, or 'health/*'"),
    ] = None,
) -> None:
    """Runs side by side: numbers, the settings in which they differ, and a page with their
    curves.
    """
    from tapct.report import compare as comparing

    comparison = comparing.read(runs, metric or [])
    for note in comparison.notes:
        console.say(note)
    console.say(comparing.render_text(comparison, console.console().width))
    console.say(f"curves: {comparing.write(comparison, out)}")


def main() -> None:
    """Entry point of the console script."""
    exits.leave(exits.exit_code_of(app))


if __name__ == "__main__":
    main()
