"""Commands that make and list scans: `phantom` and `index`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console, exits, files, signals
from tapct.cli.app import CPUS, Part, Workers, app, examples
from tapct.cli.scan_limits import Memory, Timeout, limits_of
from tapct.data import formats
from tapct.data.scans.read_rules import MAX_LOSSY_RATIO, MIN_DEPTH, ReadRules


@app.command(epilog=examples("tapct phantom --out data/archive --num 40"))
def phantom(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="folder to create for the archive")],
    num: Annotated[int, typer.Option(metavar="N", help="number of scans", min=1)] = 40,
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="random seed; the same seed gives the same archive", min=0),
    ] = 0,
    followup_share: Annotated[
        float,
        typer.Option(metavar="SHARE", help="share of patients with a second scan", min=0, max=1),
    ] = 0.25,
    arterial_share: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="share of the scans with contrast agent that show the arterial phase; the other "
            "scans with contrast agent show the venous phase",
            min=0,
            max=1,
        ),
    ] = 0.0,
    warp_mm: Annotated[
        float,
        typer.Option(
            metavar="MM",
            help="the second scan of a patient is a known smooth deformation of the first, with "
            "bumps of at most this size; 0: the second scan is painted in a pose of its own",
            min=0,
            max=12,
        ),
    ] = 0.0,
) -> None:
    """Create a synthetic CT archive with organ labels.

    The tables scan_labels.csv and landmarks.csv hold the true values of each scan; `tapct eval`
    reads these tables.
    """
    from tapct.data.phantom import archive as maker

    with signals.leaving_at_sigterm(), console.progress_bar("phantom") as progress:
        config = maker.Config(
            num=num,
            seed=seed,
            followup_share=followup_share,
            arterial_share=arterial_share,
            warp_mm=warp_mm,
        )
        report = maker.write(out, config, progress)
    console.say_line(
        f"{report.scans} scans in {out}; next: tapct index {out} --out {out}/manifest.parquet"
    )


@app.command(
    epilog=examples(
        "tapct index data/archive --out data/manifest.parquet",
        "tapct index scans --out scans.parquet --patient-regex '(sub-\\d+)'",
        "tapct index disk1 disk2/ct scans.csv --out data/archive",
        "tapct index /data/2024 --root /data --out data/archive",
    )
)
def index(
    context: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SRC",
            help=f"folders that are searched, with all folders in them, for "
            f"{formats.listed('and')}; files; patterns such as 'scans/*/ct.nii.gz'; or lists "
            "(.csv, .tsv or .json) with the columns path, label, patient and split",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="PLACE",
            help="manifest to write, a .parquet file; or a folder for the manifest of an archive "
            "that grows: there a later call reads only new and changed files",
        ),
    ],
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="folder that contains everything in SRC: the paths of the manifest start there, "
            "so that scans which are added later keep the IDs of all others",
            show_default="nearest folder that contains SRC",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="folder with label maps that have the names of the scans",
            show_default="label maps beside the scans",
        ),
    ] = None,
    ignore_label: Annotated[
        list[int] | None,
        typer.Option(
            metavar="VALUE",
            help="label value of voxels that nobody has labelled, e.g. -1; losses and metrics "
            "leave them out; may be repeated",
            show_default="none",
        ),
    ] = None,
    patient_regex: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="regular expression that is searched in the path of a scan below SRC; if the scan "
            "has no PatientID, group 1 of the expression is its patient",
        ),
    ] = None,
    patient_column: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv:COLUMN",
            help="table with the patients: one column names the scan by its path below SRC, and "
            "COLUMN names its patient; this patient takes precedence over the PatientID",
        ),
    ] = None,
    patient_from: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="folder:N: the N-th folder below SRC is the patient; header: the PatientID is "
            "used even if all studies have the same PatientID",
        ),
    ] = None,
    older: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="older manifest of the archive: its scans keep their patients, so that no patient "
            "changes sides of a split",
            show_default="the manifest at --out",
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="forget the patients of the older manifest"),
    ] = False,
    split_seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="data.split_seed of your runs: if two known patients turn out to be one, no scan "
            "moves to the test side of this split",
            min=0,
            max=2**63 - 1,
        ),
    ] = 0,
    study_dates: Annotated[
        bool,
        typer.Option("--study-dates", help="store the whole date of a study, not only its year"),
    ] = False,
    min_depth: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="refuse scans with fewer axial slices",
            min=1,
        ),
    ] = MIN_DEPTH,
    derived: Annotated[
        bool,
        typer.Option(
            "--derived",
            help="accept DICOM images that were computed from others: projections such as MIP, "
            "reformats, maps of materials",
        ),
    ] = False,
    max_lossy_ratio: Annotated[
        float,
        typer.Option(metavar="R", help="refuse scans that were compressed with loss beyond R:1"),
    ] = MAX_LOSSY_RATIO,
    resample_tilt: Annotated[
        bool,
        typer.Option(
            "--resample-tilt",
            help="accept scans with gantry tilt, with their slices shifted to a grid with right "
            "angles",
        ),
    ] = False,
    rules: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML file with thresholds of the checks of values, such as 'max_clamped: 0.9' "
            "(docs/ingest.md lists them)",
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="one threshold of the checks of values, e.g. max_clamped=0.9; may be repeated",
        ),
    ] = None,
    part: Part = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML page to write about the archive, with pictures of scans; `tapct report "
            "MANIFEST` can write this page later",
            show_default="none",
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            metavar="EXPRESSION",
            help="with a manifest in place of SRC: write the manifest of the accepted scans "
            'for which this expression is true, e.g. "spacing_z_mm <= 5 and kernel not in '
            "['B70f']\"; no scan is read",
            show_default="all scans",
        ),
    ] = None,
    workers: Workers = CPUS,
    timeout: Timeout = 120.0,
    memory_gb: Memory = None,
) -> None:
    """List the scans of a folder and check each of them.

    The manifest has a row for each scan: accepted with its geometry and statistics, or refused
    with the reason. If no scan is accepted, or no label map of --labels is used, the exit code
    is 2. A call that was killed resumes when it is repeated.
    """
    if select is not None:
        from tapct.data.index.sub_manifest import write_selected

        if len(sources) != 1:
            raise exits.UserError("--select reads one manifest; give one path in place of SRC")
        _check_alone(context, "--select", {"sources", "out", "select", "report", "workers"})
        for line in write_selected(sources[0], out, select):
            console.say_line(line)
        if report is not None:
            _write_report(out, report, workers)
        return
    if report is not None:
        if part is not None:
            raise exits.UserError(
                "--report has no effect with --part; give it to the last call, which has no --part"
            )
        files.check_new_file(report, "--report")
    if fresh and older is not None:
        raise exits.UserError("--fresh forgets the patients that --older names; give one of them")
    with signals.leaving_at_sigterm(), console.ListingProgress("index", "scans") as progress:
        from tapct.data.checks.check_rules import read_rules
        from tapct.data.index.build import build_manifest, check_usable, examine_share
        from tapct.data.index.kept_patients import KeepRules
        from tapct.data.index.report import lines_about
        from tapct.data.index.share import parse_share

        checks = read_rules(rules, rule or ())
        share = parse_share(part)
        if share is not None:
            examine_share(
                *(sources, out, share),
                start_at=root,
                labels=labels,
                ignore_labels=ignore_label or (),
                study_dates=study_dates,
                min_depth=min_depth,
                accept=ReadRules(derived, max_lossy_ratio, resample_tilt, checks),
                workers=max(1, workers),
                limits=limits_of(timeout, memory_gb),
                progress=progress.update,
                listed=progress.listed,
            )
            return
        manifest = build_manifest(
            sources,
            out,
            start_at=root,
            labels=labels,
            ignore_labels=ignore_label or (),
            patient_regex=patient_regex,
            patient_column=patient_column,
            patient_from=patient_from,
            study_dates=study_dates,
            min_depth=min_depth,
            accept=ReadRules(derived, max_lossy_ratio, resample_tilt, checks),
            workers=max(1, workers),
            limits=limits_of(timeout, memory_gb),
            progress=progress.update,
            listed=progress.listed,
            keep=KeepRules(older, fresh, split_seed),
        )
    for line in lines_about(manifest, out, min_depth):
        console.say_line(line)
    if report is not None:
        _write_report(out, report, workers)
    check_usable(manifest, labels)


def _check_alone(context: typer.Context, option: str, allowed: Collection[str]) -> None:
    """Refuse options that have no effect beside another one.

    Args:
        context: context of the command.
        option: option that excludes them.
        allowed: names of the parameters that may be given with it.
    Raises:
        UserError: one of the others was given.
    """
    for parameter in context.command.params:
        name = str(parameter.name)
        source = str(context.get_parameter_source(name))
        if name not in allowed and source.endswith("COMMANDLINE"):
            raise exits.UserError(f"{parameter.opts[0]} has no effect with {option}; leave it out")


def _write_report(manifest_file: Path, out: Path, workers: int) -> None:
    """Write the page about an archive and print its place."""
    from tapct.report import archive

    with signals.leaving_at_sigterm(), console.progress_bar("report") as progress:
        written = archive.write(manifest_file, out, workers=max(1, workers), progress=progress)
    console.say_line(f"report: {written}")
