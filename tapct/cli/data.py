"""Commands that make and prepare data: `phantom`, `index` and `pack`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tapct.base import console, exits, signals
from tapct.base.counted import counted
from tapct.cli.app import CPUS, Part, Workers, app, examples
from tapct.data import formats
from tapct.data.scans.read_rules import MAX_LOSSY_RATIO, MIN_DEPTH, ReadRules

if TYPE_CHECKING:
    from tapct.data.manifest import Manifest
    from tapct.data.packed.pack_report import PackReport
    from tapct.data.workers.process_pool import ScanLimits

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
    from tapct.data.workers.process_pool import ScanLimits

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
        "tapct index disk1 disk2/ct scans.csv --out data/archive",
    )
)
def index(
    context: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SRC",
            help=f"folders that are searched, with all folders in them, for "
            f"{formats.listed('and')}; files; patterns such as 'scans/*/ct.nii.gz'; or lists (.csv "
            "or .json) with the columns path, label, patient and split",
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
            "below SRC, is used instead",
        ),
    ] = None,
    patient_column: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv:COLUMN",
            help="table with the patients: a column names the scan by its path below SRC, "
            "COLUMN its patient; it outranks the PatientID",
        ),
    ] = None,
    patient_from: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="folder:N, the N-th folder below SRC is the patient; or header, a "
            "PatientID counts also where all studies have the same one",
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
    part: Part = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML page to write about the archive, with pictures of scans; `tapct report "
            "MANIFEST` writes it later",
            show_default="none",
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            metavar="EXPRESSION",
            help="with a manifest in place of SRC: write the manifest of the accepted scans "
            "that fulfil it, e.g. \"spacing_z_mm <= 5 and kernel not in ['B70f']\"; no scan is "
            "read",
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
    codec: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="zstd, or lz4 for files that are about a fifth larger and faster to read",
        ),
    ] = "zstd",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="pack nothing; read the packed scans again and compare their digests; the exit "
            "code is 2 if one is damaged",
        ),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="with --verify: pack damaged scans again from the archive"),
    ] = False,
    allow_missing: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="end with exit code 0, not 4, if at most N accepted scans are missing or changed",
            min=0,
        ),
    ] = 0,
    drop_missing: Annotated[
        bool,
        typer.Option(
            "--drop-missing",
            help="take scans that cannot be packed out of the store; else it keeps what it had "
            "before of them",
        ),
    ] = False,
    replace_store: Annotated[
        bool,
        typer.Option(
            "--replace-store", help="let the manifest of another archive replace an existing store"
        ),
    ] = False,
    part: Part = None,
) -> None:
    """Compress the accepted scans into a store for fast reading.

    A second call with the same store packs only the scans that are missing, and those whose packed
    file cannot be opened, for example because it was cut short. If accepted scans cannot be packed,
    because their files are gone or changed, the others are packed and the exit code is 4.
    """
    from tapct.data import manifest
    from tapct.data.index.share import WHOLE, parse_share
    from tapct.data.packed import pack as packer

    if repair and not verify:
        raise exits.UserError("--repair packs again what --verify finds; give both")
    share = parse_share(part)
    if share is not None and verify:
        raise exits.UserError("--part packs a part of the scans; leave out --verify")

    def pack_and_report(again: Collection[str] = ()) -> PackReport:
        with console.progress_bar("pack") as progress:
            report = packer.pack(
                found,
                out,
                workers=max(1, workers),
                level=level,
                codec=codec,
                say=console.say_line,
                again=again,
                drop_missing=drop_missing,
                replace_store=replace_store,
                limits=limits_of(timeout, memory_gb),
                progress=progress,
                share=share or WHOLE,
            )
        for line in report.lines():
            console.say_line(line)
        return report

    with signals.leaving_at_sigterm():
        found = manifest.Manifest.read(manifest_file, root)
        if verify and not repair:
            verify_only(found, out, workers, allow_missing)
            return
        report = pack_and_report()
        if repair:
            repair_store(out, workers, pack_and_report)
    missing = report.missing_line(allow_missing)
    if missing:
        raise exits.Incomplete(missing)


def verify_only(manifest: Manifest, folder: Path, workers: int, allow_missing: int) -> None:
    """Verify a store without writing anything.

    Args:
        manifest: manifest that should have been packed.
        folder: folder of the store.
        workers: number of threads.
        allow_missing: number of accepted scans that may be missing.
    Raises:
        UserError: the store is of another manifest, or lacks accepted scans.
        Exit: a scan is damaged; its line has been printed.
    """
    from tapct.data.packed.store import Store
    from tapct.data.packed.verify import check_complete

    damaged = verify_store(folder, workers)
    if damaged:
        raise typer.Exit(exits.WRONG_INPUT)
    check_complete(Store(folder), manifest, allow_missing)


def repair_store(folder: Path, workers: int, pack_again: Callable[[list[str]], object]) -> None:
    """Pack damaged scans again.

    Args:
        folder: folder of the store.
        workers: number of threads.
        pack_again: function that packs the scans with these ids from the archive.
    Raises:
        Exit: scans are damaged still; their lines have been printed.
    """
    from tapct.data.packed.store import Store

    damaged = verify_store(folder, workers)
    if not damaged:
        return
    scans = [Store(folder).scans[i] for i in damaged]
    pack_again([scan.id for scan in scans])
    still_damaged = verify_store(folder, workers)
    by_id = {scan.id for scan in Store(folder).scans}
    lost = [scan.path for scan in scans if scan.id not in by_id]
    lost += [Store(folder).scans[i].path for i in still_damaged]
    if lost:
        console.say_line(f"  not repaired, since they cannot be packed: {', '.join(sorted(lost))}")
        raise typer.Exit(exits.WRONG_INPUT)


def verify_store(folder: Path, workers: int) -> list[int]:
    """Read every scan of a store and print a line per damaged one; their numbers."""
    from tapct.data.packed.store import Store
    from tapct.data.packed.verify import damaged_scans

    store = Store(folder)
    with console.progress_bar("verify") as progress:
        damaged = damaged_scans(store, workers=workers, progress=progress)
    console.say_line(
        f"{len(store) - len(damaged)} of {counted(len(store), 'packed scan')} verified: {folder}"
    )
    for error in damaged.values():
        console.say_line(f"  {error}")
    return list(damaged)
