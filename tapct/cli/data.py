"""Commands that make and prepare data: phantom, index, pack."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console
from tapct.cli.app import app


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
