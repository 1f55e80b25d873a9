"""Commands that make and prepare data: `phantom`, `index` and `pack`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tapct.base import console, exits, signals
from tapct.cli.app import CPUS, Workers, app, examples
from tapct.data import formats
from tapct.data.read_rules import MAX_LOSSY_RATIO, MIN_DEPTH, ReadRules

if TYPE_CHECKING:
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
) -> None:
    """Create a synthetic CT archive with organ labels."""
    from tapct.data.phantom import archive as maker

    with signals.leaving_at_sigterm(), console.progress_bar("phantom") as progress:
        report = maker.write(out, maker.Config(num=num, seed=seed), progress)
    console.say(
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
    patient_regex: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="regular expression for scans without a PatientID: group 1, searched in the path "
            "below FOLDER, is used instead",
        ),
    ] = None,
    min_depth: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="refuse scans with fewer axial slices; a patch of the 3D configs has 4",
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

    checks = read_rules(rules, rule or ())
    with signals.leaving_at_sigterm(), console.progress_bar("index") as progress:
        manifest = build_manifest(
            folder,
            out,
            labels=labels,
            patient_regex=patient_regex,
            min_depth=min_depth,
            accept=ReadRules(derived, max_lossy_ratio, resample_tilt, checks),
            workers=max(1, workers),
            limits=limits_of(timeout, memory_gb),
            progress=progress,
        )
    console.say(
        ", ".join(f"{count} {reason}" for reason, count in manifest.summary().items()) + f": {out}"
    )
    for row in manifest.rows:
        if row.marks and row.status == "accepted":
            console.say(f"  accepted {row.path}, marked {row.marks}")
        if row.detail:
            reason = (
                f"refused {row.path}: {row.reason}" if row.status == "refused" else f"{row.path}"
            )
            console.say(f"  {reason}: {row.detail}")
    others = summary(manifest.passed_over)
    if others:
        console.say(f"passed over: {others}")
    num_short = manifest.summary().get("too_few_slices", 0)
    if num_short:
        console.say(
            f"{num_short} scan{'s have' if num_short > 1 else ' has'} fewer than {min_depth} "
            "slices; --min-depth 1 accepts them"
        )
    check_usable(manifest, labels)


@app.command(
    epilog=examples(
        "tapct pack data/manifest.parquet --out data/store",
        "tapct pack data/manifest.parquet --out data/store --verify",
    )
)
def pack(
    manifest_file: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="manifest written by tapct index")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="folder of the store to write")],
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
) -> None:
    """Compress the accepted scans into a store for fast reading.

    A second call with the same store packs only the scans that are missing, and those whose packed
    file cannot be opened, for example because it was cut short.
    """
    from tapct.data import manifest
    from tapct.data import pack as packer

    with signals.leaving_at_sigterm(), console.progress_bar("pack") as progress:
        found = manifest.Manifest.read(manifest_file)
        report = packer.pack(
            found,
            out,
            workers=max(1, workers),
            level=level,
            limits=limits_of(timeout, memory_gb),
            progress=progress,
        )
    share = report.stored_bytes / max(report.voxel_bytes, 1)
    console.say(
        f"{len(report.packed)} packed, {report.kept} kept from before, {len(report.refused)} "
        "refused; "
        f"{report.stored_bytes / 1e6:.0f} MB, {share:.0%} of the uncompressed size: {out}"
    )
    for scan in report.refused:
        console.say(f"  refused {scan.path}: {scan.reason}: {scan.detail}")
    if report.damaged:
        console.say(f"  damaged files packed again: {', '.join(report.damaged)}")
    if report.unlisted:
        console.say(f"  {len(report.unlisted)} files of {out} belong to no scan of this manifest")
    if verify:
        verify_store(out, workers)


def verify_store(folder: Path, workers: int) -> None:
    """Read every scan of a store; print a line per damaged one and end with exit code 2."""
    from tapct.data.store import Store
    from tapct.data.verify import damaged_scans

    store = Store(folder)
    with console.progress_bar("verify") as progress:
        damaged = damaged_scans(store, workers=workers, progress=progress)
    console.say(f"{len(store) - len(damaged)} of {len(store)} packed scans verified: {folder}")
    for error in damaged:
        console.say(f"  {error}")
    if damaged:
        raise typer.Exit(exits.UserError.exit_code)
