"""Commands for trained models: `eval`, `export`, `embed`, `report` and `compare`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console, exits, files, signals
from tapct.base.counted import counted
from tapct.cli.app import CPUS, RunFolder, Workers, app, examples
from tapct.data import formats

NPZ, CVPR26 = "npz", "cvpr26"  # formats of `embed`
DataSet = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="NAME",
        help="data set whose evaluation is shown: the name of a folder in RUN/eval, or its "
        "beginning",
        show_default="the data set of the run",
    ),
]
CustomCode = Annotated[
    bool,
    typer.Option(
        "--custom-code",
        help="allow an export with a backbone of your own: the module that its config.json "
        "names is imported, which runs its code",
    ),
]


@app.command(
    name="eval",
    epilog=examples(
        "tapct eval runs/quickstart",
        "tapct eval runs/mine eval.max_scans=20 device=cpu",
        "tapct eval runs/mine --step best",
        "tapct eval models/theirs data.store=data/mine/store",
        "tapct eval runs/mine --models theirs=models/theirs --models first=runs/first",
        "tapct eval runs/mine --data amos22 --root data/amos22",
    ),
)
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="run folder, checkpoint, or folder written by tapct export",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="settings that replace those of the run: eval.*, device, model.attention or "
            "data.store, e.g. eval.max_scans=20 device=cpu (for weights outside of a run folder "
            "also the others of data, and seed)",
        ),
    ] = None,
    step: Annotated[
        str,
        typer.Option(
            metavar="STEP",
            help="step of the checkpoint of a run; or best, the step with the best result among "
            "the evaluations so far (eval.during.best)",
            show_default="the newest",
        ),
    ] = "",
    validation: Annotated[
        bool,
        typer.Option(
            "--validation",
            help="test on the validation patients (eval.validation_share), as evaluations during "
            "training do",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="folder to write the results to",
            show_default="RUN/eval/DATASET/STEP, or MODEL-eval/DATASET/WEIGHTS",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            metavar="NAME=PATH",
            help="further model in the same table: a run folder, a checkpoint or an export, with "
            "its own HU window and preprocessing; repeat the option for more",
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="public data set to evaluate on, e.g. amos22, or a YAML file that describes one "
            "(docs/datasets.md lists them); it is indexed and packed first",
            show_default="the store of the run",
        ),
    ] = "",
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="with --data: folder of its files, which are only read",
            show_default="none",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="with --data: folder for its manifest and store; give the same folder for several "
            "models",
            show_default="data, in the folder of the evaluations",
        ),
    ] = None,
    workers: Workers = CPUS,
    custom_code: CustomCode = False,
) -> None:
    """Evaluate the frozen features of a run or of exported weights.

    Baselines solve the same tasks: untrained models, raw HU values and the position in the body
    (eval.baselines). Features are computed once and kept (eval.cache).
    """
    from tapct.run import best_step, dataset_model, finished, model_source

    wanted_step = best_step.parse_step(step)
    chosen = dataset_model.choose(data, root, work, overrides or [])
    opened = model_source.open_model(model, overrides or [], wanted_step, custom_code)
    others = finished.open_others(models or [], opened.config.device, custom_code)
    if chosen is not None:
        with signals.leaving_at_sigterm():
            opened = dataset_model.on_data(opened, chosen, max(1, workers))
    found = finished.evaluate_model(opened, out=out, others=others, on_validation=validation)
    for line in found.evaluation.lines():
        console.say(line)
    console.say(f"results and pictures in {found.folder}")


@app.command(
    epilog=examples(
        "tapct export runs/quickstart --out models/quickstart",
        "tapct export runs/quickstart --hf models/hf --licence apache-2.0",
        "tapct export runs/mine --step best --out models/mine",
    )
)
def export(
    run_folder: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="folder to write", show_default="RUN/export"),
    ] = None,
    step: Annotated[
        str,
        typer.Option(
            metavar="STEP",
            help="step of the checkpoint; or best, the step with the best result among the "
            "evaluations so far (eval.during.best)",
            show_default="the newest",
        ),
    ] = "",
    hf: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="write a folder for Hugging Face transformers instead, with a model card",
            show_default="none",
        ),
    ] = None,
    licence: Annotated[
        str,
        typer.Option(
            metavar="SPDX",
            help="with --hf: licence of the weights for the model card, e.g. cc-by-nc-4.0",
            show_default="not stated",
        ),
    ] = "",
) -> None:
    """Export the weights of the teacher network.

    The folder contains model.safetensors and config.json. tapct.load_pretrained reads it.
    With --hf, AutoModel of transformers loads the folder, without tapct.
    """
    from tapct.run import best_step, finished

    chosen = best_step.parse_step(step)
    if hf is None:
        if licence:
            raise exits.UserError("--licence needs --hf")
        console.say(f"exported to {finished.export(run_folder, out, chosen)}")
        return
    if out is not None:
        raise exits.UserError("give --out or --hf, not both")
    if licence and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise exits.UserError(
            f"--licence {licence}: give an SPDX identifier, e.g. apache-2.0 or cc-by-nc-4.0"
        )
    written = finished.export_for_transformers(run_folder, files.expand_path(hf), licence, chosen)
    console.say(f"exported to {written}, for transformers")


@app.command(
    epilog=examples(
        "tapct embed models/quickstart scan.nii.gz --out scan.npz",
        "tapct embed models/mine scan.nii.gz --custom-code",
        "tapct embed models/mine scans --out vectors --format cvpr26",
        "tapct embed models/mine cases.csv --root scans --out vectors --format cvpr26",
    )
)
def embed(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="folder written by tapct export, or a run folder that contains it"
        ),
    ],
    scan: Annotated[
        Path,
        typer.Argument(
            metavar="SCAN",
            help=f"{formats.listed('or', without='dicom')} file, or folder of a DICOM series; with "
            "--format cvpr26 a folder of scans, or a CSV file with a column case_id, id or path",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="file to write the features to, .npz; with --format cvpr26 the folder of the "
            "vectors",
        ),
    ] = Path("features.npz"),
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="npz, dense features of one scan; or cvpr26, one vector per scan in CASE_ID.h5, "
            "as the CVPR 2026 challenge on CT diagnosis reads them",
        ),
    ] = NPZ,
    vector: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="with --format cvpr26: cls, mean, cls_mean, mean_std_max, registers, or mask "
            "(with --masks)",
            show_default="cls_mean, or mask with --masks",
        ),
    ] = "",
    block: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="with --format cvpr26: block of the vector: last, middle or last4 (four vectors, "
            "one after the other)",
        ),
    ] = "last",
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="with --format cvpr26: folder of label maps with the names of the scans; the "
            "vector is the mean of the patches in the mask",
            show_default="none",
        ),
    ] = None,
    organ: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="with --masks: name or value of a label that belongs to the mask; repeat the "
            "option for more",
            show_default="all labels",
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="with a CSV file: folder of the scans",
            show_default="the folder of the file",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="with --format cvpr26: feature cache (eval.cache.path) to read and to write; its "
            "features are rounded to 16 bits",
            show_default="none",
        ),
    ] = None,
    custom_code: CustomCode = False,
) -> None:
    """Compute dense features of a scan, or a vector for each of many.

    A second call with --format cvpr26 computes only what is missing. If some scans have no vector,
    because they cannot be read for example, they are named and the exit code is 4.
    """
    if form == CVPR26:
        from tapct.distributed.device import flush_denormals, pick_device
        from tapct.run import embedding
        from tapct.weights.pretrained import load_pretrained

        wanted = embedding.VectorChoice.of(vector, block, organ or (), masks is not None)
        embedding.load_h5py()
        flush_denormals()
        device = pick_device("auto")
        loaded = load_pretrained(model, custom_code=custom_code, device=device)
        encoder = embedding.encoder_of(loaded, device, cache)
        num = embedding.embed_cases(encoder, scan, out, wanted, root=root, masks=masks)
        console.say(f"{counted(num, 'vector')} in {out}")
        return
    only_for_cvpr26(
        form, {"--vector": vector, "--masks": masks, "--organ": organ, "--root": root,
               "--cache": cache, "--block": "" if block == "last" else block}
    )  # fmt: skip
    if out.is_dir():
        raise exits.UserError(
            f"--out {out} is a folder; give the file to write, such as {out / 'features.npz'}"
        )
    if out.suffix != ".npz":
        raise exits.UserError(f"--out {out}: features are written as .npz; use {out}.npz")
    files.check_new_path(out)
    from tapct.data.scans import ingest
    from tapct.weights import pretrained as weights

    pretrained = weights.load_pretrained(model, custom_code=custom_code)
    pretrained.embed(ingest.read_volume(scan)).write_npz(out)
    console.say(f"features in {out}")


def only_for_cvpr26(form: str, options: Mapping[str, object]) -> None:
    """Refuse an unknown format, and options that npz does not have.

    Args:
        form: option --format.
        options: options of cvpr26 alone, by name.
    """
    if form != NPZ:
        raise exits.UserError(f"--format {form}: must be {NPZ} or {CVPR26}")
    for option, value in options.items():
        if value:
            raise exits.UserError(f"{option} needs --format {CVPR26}")


@app.command(
    epilog=examples(
        "tapct report runs/quickstart",
        "tapct report runs/mine --watch",
        "tapct report runs/one runs/two --out both.html",
    )
)
def report(
    run_folders: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="run folders, e.g. runs/mine")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML page to write",
            show_default="RUN/report.html, or report.html for several runs",
        ),
    ] = None,
    data: DataSet = "",
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="write the page again while the run trains, until it has finished or until "
            "Ctrl-C; an open page loads itself again",
        ),
    ] = False,
    every: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="time between two pages with --watch; longer if writing takes more than a tenth "
            "of it",
        ),
    ] = 30.0,
) -> None:
    """Write an HTML report of one run or several.

    The page shows a verdict, curves, the time budget, evaluations with slices of test scans, and
    the config. Several runs are also compared. It is one file that loads nothing from elsewhere.
    """
    from tapct.report import page, several
    from tapct.report.watch import watch as write_again

    def write(reload_s: float) -> Path:
        if len(run_folders) == 1:
            return page.write(run_folders[0], data, out, reload_s)
        return several.write(run_folders, out, data, reload_s)

    if watch:
        write_again(run_folders, write, every, console.say)
    else:
        console.say(f"report: {write(0.0)}")


@app.command(
    epilog=examples(
        "tapct compare runs/one runs/two",
        "tapct compare runs/* --metric loss/total --metric 'health/*' --out all.html",
    )
)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="run folders, e.g. runs/*")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML page to write")] = Path(
        "compare.html"
    ),
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="metric to draw, a name in metrics.jsonl or a pattern such as 'health/*'; "
            "repeat the option for more",
            show_default="losses and health",
        ),
    ] = None,
    data: DataSet = "",
) -> None:
    """Compare runs: metrics, settings and curves.

    Prints a table of metrics and of the settings in which the runs differ, and writes a page with
    their curves.
    """
    from tapct.report import compare as comparing
    from tapct.report import compare_page

    comparison = comparing.read(runs, metric or [], data)
    for note in comparison.notes:
        console.say(note)
    console.say(comparing.render_text(comparison, console.console().width))
    console.say(f"curves: {compare_page.write(comparison, out)}")
