"""Commands for trained models: `eval`, `export`, `embed`, `report` and `compare`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console, exits, files, signals
from tapct.base.counted import counted
from tapct.cli.app import CPUS, Part, RunFolder, Workers, app, examples
from tapct.data import formats

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
            "also seed and all settings of data)",
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
            "its own HU window and preprocessing; may be repeated",
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="public data set to evaluate on, e.g. amos22 (docs/datasets.md lists the names), "
            "or a YAML file that describes a data set; the data set is indexed and packed first",
            show_default="the store of the run",
        ),
    ] = "",
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="with --data: folder with the files of the data set; nothing is written into it",
            show_default="none",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="with --data: folder for its manifest and store; give the same folder for several "
            "models",
            show_default="RUN/eval/data, or MODEL-eval/data",
        ),
    ] = None,
    part: Part = None,
    workers: Workers = CPUS,
    custom_code: CustomCode = False,
) -> None:
    """Evaluate the frozen features of a run or of exported weights.

    Baselines solve the same tasks: untrained models, raw HU values and the position in the body
    (eval.baselines). Features are computed once and kept (eval.cache). If one of several tasks or
    of the further models fails or has no result on these scans, all other results are written, and
    the exit code is 4.
    """
    from tapct.data.index.share import WHOLE, parse_share
    from tapct.eval.runner import ShareComputed
    from tapct.run import best_step, dataset_model, finished, model_source

    share = parse_share(part)
    wanted_step = best_step.parse_step(step)
    chosen = dataset_model.choose(data, root, work, overrides or [])
    opened = model_source.open_model(model, overrides or [], wanted_step, custom_code)
    others = finished.open_others(models or [], opened.config.device, custom_code)
    if chosen is not None:
        with signals.leaving_at_sigterm():
            opened = dataset_model.on_data(opened, chosen, max(1, workers))
    try:
        found = finished.evaluate_model(
            opened, out=out, others=others, on_validation=validation, share=share or WHOLE
        )
    except ShareComputed:
        console.say(f"features of part {part} computed; `tapct eval` without --part evaluates them")
        return
    for line in found.evaluation.lines():
        console.say(line)
    console.say(f"results and pictures in {found.folder}")
    missing = found.evaluation.missing()
    if missing:
        raise exits.Incomplete(
            f"{missing}; the lines above give the reasons, and all other results are written"
        )


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
    if licence:
        check_licence(licence)
    written = finished.export_for_transformers(run_folder, files.expand_path(hf), licence, chosen)
    console.say(
        f"exported to {written}, for transformers; {written / 'README.md'} is its model card"
    )


def check_licence(licence: str) -> None:
    """Raise UserError for a text that is no SPDX identifier: the hub would not know it."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        if re.search(r"[\s()]", licence) or licence.lower().startswith("licenseref-"):
            raise InvalidLicenseExpression("an expression, or a licence of one's own")
        canonicalize_license_expression(licence)
    except InvalidLicenseExpression as error:
        raise exits.UserError(
            f"--licence {licence} is no SPDX identifier; give one of https://spdx.org/licenses, "
            "e.g. apache-2.0 or cc-by-nc-4.0, or leave the option out"
        ) from error


@app.command(
    epilog=examples(
        "tapct embed models/quickstart scan.nii.gz --out scan.npz",
        "tapct embed models/quickstart scans --out vectors --scan",
        "tapct embed models/quickstart scans.csv --out features --format zarr",
        "tapct embed models/mine scan.nii.gz --custom-code",
        "tapct embed models/mine scans --out vectors --format cvpr26",
        "tapct embed models/mine cases.csv --root scans --out vectors --format cvpr26",
    )
)
def embed(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="folder written by tapct export, run folder, checkpoint, or weights of another "
            "project",
        ),
    ],
    scan: Annotated[
        Path,
        typer.Argument(
            metavar="SCAN|FOLDER|CSV",
            help=f"{formats.listed('or', without='dicom')} file, folder of a DICOM series, folder "
            "of scans, or CSV file with a column path (and id, label) or case_id",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="folder for the results: one file per scan, or one table with --format parquet. "
            "For the dense features of a single scan, you can give the .npz file itself",
            show_default="features.npz for one scan",
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="npz or zarr: dense features of each scan; parquet: one table with a vector of "
            "each scan; cvpr26: one file per vector, as the CVPR 2026 challenge on CT diagnosis "
            "reads them",
            show_default="npz, or parquet with --scan",
        ),
    ] = "",
    per_scan: Annotated[
        bool,
        typer.Option(
            "--scan", help="one vector per scan in place of dense features; always so in parquet"
        ),
    ] = False,
    vector: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="vector of a scan: cls, mean, cls_mean, mean_std_max, registers, or mask (with "
            "--masks)",
            show_default="cls_mean, or mask with --masks",
        ),
    ] = "",
    block: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="block of the vector: last, middle or last4 (four vectors, one after the other)",
        ),
    ] = "last",
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="folder of label maps with the names of the scans; the vector is the mean of the "
            "patches in the mask",
            show_default="none",
        ),
    ] = None,
    organ: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="with --masks: name or value of a label that belongs to the mask; may be repeated",
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
            help="feature cache (eval.cache.path) for vectors, to read and to write; its features "
            "are rounded to 16 bits",
            show_default="none",
        ),
    ] = None,
    part: Part = None,
    custom_code: CustomCode = False,
) -> None:
    """Compute dense features or one vector of each scan.

    Repeat an interrupted command to compute what is missing. If some scans have no result, for
    example because they cannot be read, their names are printed, the results of the other scans are
    written, and the exit code is 4.
    """
    from tapct.cli.embed_options import EmbedOptions
    from tapct.data.index.share import WHOLE, parse_share

    share = parse_share(part) or WHOLE
    options = EmbedOptions.of(
        scan,
        out,
        form,
        per_scan,
        vector_words={
            "--vector": vector,
            "--masks": masks,
            "--organ": organ,
            "--cache": cache,
            "--block": "" if block == "last" else block,
        },
    )
    from tapct.distributed.device import pick_device, prepare_cpu
    from tapct.run.embed import many_scans, named_scans, scan_vector
    from tapct.types import Refused
    from tapct.weights.pretrained import load_pretrained

    wanted = None
    if options.is_vector:
        wanted = scan_vector.VectorChoice.of(vector, block, organ or (), masks is not None)
    many_scans.check_library(options.form)
    named_scans.check_given(scan, root, masks)
    many_scans.check_writable(options.folder)
    prepare_cpu()
    device = pick_device("auto")
    loaded = load_pretrained(model, custom_code=custom_code, device=device)
    if options.file is not None:
        if share != WHOLE:
            raise exits.UserError("--part divides many scans; give a folder as --out")
        try:
            embedded = loaded.embed(scan)
        except Refused as error:
            if scan.is_dir():
                raise exits.UserError(
                    f"{error}; to embed all scans of a folder, give a folder as --out"
                ) from error
            raise
        embedded.write_npz(options.file)
        console.say(f"features in {options.file}")
        return
    encoder = many_scans.encoder_of(loaded, device, cache)
    keep_names = options.form == options.CVPR26
    cases = named_scans.find_cases(scan, root, masks, keep_names=keep_names)
    cases = cases.of_share(share)
    share_number = 0 if share == WHOLE else share.number
    output = many_scans.output_for(options.form, options.folder, encoder, wanted, share_number)
    with signals.leaving_at_sigterm():
        num = many_scans.embed_cases(encoder, cases, output, options.folder)
    console.say(f"{counted(num, output.what)} in {output.place_of_results}")


@app.command(
    epilog=examples(
        "tapct report runs/quickstart",
        "tapct report runs/mine --watch",
        "tapct report runs/one runs/two --out both.html",
        "tapct report data/manifest.parquet",
    )
)
def report(
    run_folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="run folders, e.g. runs/mine; or one manifest or store of an archive",
        ),
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
            help="with --watch: time between two pages; it is longer if writing a page takes more "
            "than a tenth of this time",
        ),
    ] = 30.0,
) -> None:
    """Write an HTML report of one run or several, or of an archive.

    The page of a run shows a verdict, curves, the time budget, evaluations with slices of test
    scans, and the config. Several runs are also compared. With a manifest or a store in place of
    RUN, the page shows what the archive holds. The page is
    one file and loads nothing from elsewhere.
    """
    from tapct.report import archive, page, several
    from tapct.report.watch import watch as write_again

    if any(archive.is_archive(path) for path in run_folders):
        if len(run_folders) > 1 or watch or data:
            raise exits.UserError(
                "the report of an archive takes one manifest or store, without --watch and --data"
            )
        with signals.leaving_at_sigterm(), console.progress_bar("report") as bar:
            written = archive.write(run_folders[0], out, workers=1, progress=bar)
        console.say_line(f"report: {written}")
        return

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
            "may be repeated",
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
