"""Commands on finished runs: eval, export, embed, report, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console
from tapct.cli.app import Overrides, RunFolder, app


@app.command(name="eval")
def evaluate(
    run_folder: RunFolder,
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option(help="evaluate the checkpoint of this step, not the newest", min=1)
    ] = None,
) -> None:
    """Evaluate the frozen features of a run beside untrained and raw-HU baselines."""
    from tapct.run import finished

    evaluation = finished.evaluate(run_folder, overrides or [], step)
    for line in evaluation.lines():
        console.say(line)
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
