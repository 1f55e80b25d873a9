"""Commands about an archive as a whole: `contract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console, signals
from tapct.cli.app import app, examples


@app.command(
    epilog=examples(
        "tapct contract data/store",
        "tapct contract data/store --scans 100",
    )
)
def contract(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="folder of the store, written by tapct pack")
    ],
    scans: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="maximum number of scans that are read, spread evenly over the store",
            min=1,
        ),
    ] = 500,
) -> None:
    """Print the HU window, mean and standard deviation of an archive.

    The rule is nnU-Net's: percentiles 0.5 and 99.5, mean and standard deviation of foreground
    voxels. The output is the section `contract` of a config; if a config has no such section, its
    run uses the published numbers.
    """
    from tapct.data.packed import foreground
    from tapct.data.packed.store import Store

    with signals.leaving_at_sigterm():
        opened = Store(store)
        found = foreground.measure(opened, scans)
    for line in found.lines(opened.path.name):
        console.say_line(line)
