"""Commands that make and prepare data: `phantom`, `index` and `pack`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tapct.base import console, exits, signals
from tapct.base.counted import counted
from tapct.cli.app import CPUS, Workers, app, examples
from tapct.data import formats
from tapct.data.read_rules import MAX_LOSSY_RATIO, MIN_DEPTH, ReadRules

if TYPE_CHECKING:
    from tapct.data.pack import PackReport
    from tapct.data.process_pool import ScanLimits

Timeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="refuse a scan whose reading takes longer than this and 1 s per MB",
        min=1,
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory-gb",
        metavar="GB",
        help="memory of all worker processes together; refuse a scan that needs more",
        min=0.1,
        show_default="80% of the machine's or the job's",
    ),
]


def limits_of(timeout: float, memory_gb: float | None) -> ScanLimits:
    """The limits of one scan as `process_pool` takes them."""
    from tapct.data.process_pool import ScanLimits

    return ScanLimits(
        seconds=timeout, memory_bytes=None if memory_gb is None else int(memory_gb * 1e9)
    )


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
            help="share of the arterial phase among scans with contrast agent, the others are "
            "venous",
            min=0,
            max=1,
        ),
    ] = 0.0,
    warp_mm: Annotated[
        float,
        typer.Option(
            metavar="MM",
            help="largest bump of a known smooth deformation between the two scans of a patient; "
            "0 paints the second scan in a pose of its own",
            min=0,
            max=12,
        ),
    ] = 0.0,
) -> None:
    """Create a synthetic CT archive with organ labels.

    The tables scan_labels.csv and landmarks.csv hold what is true of each scan; `tapct eval` reads
    them.
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
    )
)
def index(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help=f"folder that is searched, with all folders in it, for {formats.listed('and')}",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="manifest to write, a .parquet file")],
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
            "leave them out; may be given several times",
            show_default="none",
        ),
    ] = None,
    patient_regex: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="regular expression for scans without a PatientID: group 1, searched in the path "
            "below FOLDER, is used instead",
        ),
    ] = None,
    patient_column: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv:COLUMN",
            help="table with the patients: a column names the scan by its path below FOLDER, "
            "COLUMN its patient; it outranks the PatientID",
        ),
    ] = None,
    patient_from: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="folder:N, the N-th folder below FOLDER is the patient; or header, a "
            "PatientID counts also where all studies have the same one",
        ),
    ] = None,
    study_dates: Annotated[
        bool,
        typer.Option("--study-dates", help="store the whole date of a study, not its year alone"),
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
        typer.Option(metavar="NAME=VALUE", help="one such threshold; may be given several times"),
    ] = None,
    workers: Workers = CPUS,
    timeout: Timeout = 120.0,
    memory_gb: Memory = None,
) -> None:
    """List the scans of a folder and check each of them.

    The manifest has a row for each scan: accepted with its geometry and statistics, or refused
    with the reason. If no scan is accepted, or no label map of --labels is used, the exit code
    is 2.
    """
    from tapct.data.check_rules import read_rules
    from tapct.data.index import build_manifest, check_usable
    from tapct.data.passed_over import summary
    from tapct.data.patient_report import lines_about_patients

    checks = read_rules(rules, rule or ())
    with signals.leaving_at_sigterm(), console.progress_bar("index") as progress:
        manifest = build_manifest(
            folder,
            out,
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
            progress=progress,
        )
    console.say_line(
        ", ".join(f"{count} {reason}" for reason, count in manifest.summary().items()) + f": {out}"
    )
    for line in lines_about_patients(manifest.rows):
        console.say_line(line)
    if manifest.label_report is not None:
        for line in manifest.label_report.lines():
            console.say_line(line)
    for row in manifest.rows:
        if row.marks and row.status == "accepted":
            console.say_line(f"  accepted {row.path}, marked {row.marks}")
        if row.detail:
            reason = (
                f"refused {row.path}: {row.reason}" if row.status == "refused" else f"{row.path}"
            )
            console.say_line(f"  {reason}: {row.detail}")
    others = summary(manifest.passed_over)
    if others:
        console.say_line(f"passed over: {others}")
    num_short = manifest.summary().get("too_few_slices", 0)
    if num_short:
        short = counted(num_short, "scan has", "scans have")
        console.say_line(f"{short} fewer than {min_depth} slices; --min-depth 1 accepts them")
    check_usable(manifest, labels)


@app.command(
    epilog=examples(
        "tapct pack data/manifest.parquet --out data/store",
        "tapct pack data/manifest.parquet --out data/store --verify --repair",
    )
)
def pack(
    manifest_file: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="manifest written by tapct index")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="folder of the store to write")],
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="folder of the scans, if it has moved since tapct index",
            show_default="where it was, relative to the manifest",
        ),
    ] = None,
    workers: Workers = CPUS,
    timeout: Timeout = 120.0,
    memory_gb: Memory = None,
    level: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="compression level from 1 to 9; 9 gives the smallest files",
            min=1,
            max=9,
        ),
    ] = 1,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="read the packed scans again and compare their digests; the exit code is 2 if one "
            "is damaged",
        ),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="with --verify: pack damaged scans again from the archive"),
    ] = False,
) -> None:
    """Compress the accepted scans into a store for fast reading.

    A second call with the same store packs only the scans that are missing, and those whose packed
    file cannot be opened, for example because it was cut short.
    """
    from tapct.data import manifest
    from tapct.data import pack as packer
    from tapct.data.store import Store

    if repair and not verify:
        raise exits.UserError("--repair packs again what --verify finds; give both")

    def pack_and_report(again: Collection[str] = ()) -> None:
        with console.progress_bar("pack") as progress:
            report = packer.pack(
                found,
                out,
                workers=max(1, workers),
                level=level,
                again=again,
                limits=limits_of(timeout, memory_gb),
                progress=progress,
            )
        report_packed(report, out)

    with signals.leaving_at_sigterm():
        found = manifest.Manifest.read(manifest_file, root)
        pack_and_report()
        if not verify:
            return
        damaged = verify_store(out, workers)
        if damaged and repair:
            again = [Store(out).scans[i] for i in damaged]
            pack_and_report([scan.id for scan in again])
            lost = {scan.path for scan in again}
            lost -= {scan.path for scan in Store(out).scans}
            damaged = verify_store(out, workers)
            if lost:
                console.say_line(
                    f"  not repaired, since they cannot be packed: {', '.join(sorted(lost))}"
                )
                raise typer.Exit(exits.UserError.exit_code)
    if damaged:
        raise typer.Exit(exits.UserError.exit_code)


def report_packed(report: PackReport, out: Path) -> None:
    """Print what `pack` did: counts, then a line for everything that is not as it should be."""
    share = report.stored_bytes / max(report.voxel_bytes, 1)
    console.say_line(
        f"{len(report.packed)} packed, {report.kept} kept from before, {len(report.refused)} "
        "refused; "
        f"{report.stored_bytes / 1e6:.0f} MB, {share:.0%} of the uncompressed size: {out}"
    )
    for scan in report.refused:
        console.say_line(f"  refused {scan.path}: {scan.reason}: {scan.detail}")
    if report.num_labelled or report.labels_refused:
        console.say_line(f"labels of {counted(report.num_labelled, 'scan')} packed")
    for scan in report.labels_refused:
        console.say_line(f"  labels {scan.path} not packed: {scan.reason}: {scan.detail}")
    if report.damaged:
        console.say_line(f"  damaged files packed again: {', '.join(report.damaged)}")
    if report.unlisted:
        one, several = f"file of {out} belongs", f"files of {out} belong"
        unlisted = counted(len(report.unlisted), one, several)
        console.say_line(f"  {unlisted} to no scan of this manifest")


def verify_store(folder: Path, workers: int) -> list[int]:
    """Read every scan of a store and print a line per damaged one; their numbers."""
    from tapct.data.store import Store
    from tapct.data.verify import damaged_scans

    store = Store(folder)
    with console.progress_bar("verify") as progress:
        damaged = damaged_scans(store, workers=workers, progress=progress)
    console.say_line(
        f"{len(store) - len(damaged)} of {counted(len(store), 'packed scan')} verified: {folder}"
    )
    for error in damaged.values():
        console.say_line(f"  {error}")
    return list(damaged)
