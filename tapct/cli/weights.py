"""Command for the weights of other projects: `import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tapct.base import console
from tapct.cli.app import app, examples
from tapct.cli.evaluation import CustomCode


@app.command(
    name="import",
    epilog=examples(
        "tapct import models/tap-ct-b-3d --out models/theirs",
        "tapct import fomofo/tap-ct-b-3d --out models/theirs",
        "tapct import dinov2_vitb14_pretrain.pth --allow inflated --out models/2d",
        "tapct import 2d.pth 'model.patch=[4,14,14]' --allow inflated --out out/3d",
    ),
)
def import_weights(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="run folder, checkpoint, export, Hugging Face folder, Hugging Face id OWNER/NAME "
            "in the local cache, or .safetensors, .pth, .pt or .bin file",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="export folder to write")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="settings that replace those of the weights: model.*, hu_contract.* or "
            "preprocess.*, e.g. 'preprocess.window=[12,224,224]'",
        ),
    ] = None,
    allow: Annotated[
        str,
        typer.Option(
            metavar="KIND,KIND,...",
            help="mismatches that are accepted: missing, resized (inflated too), inflated, "
            "unexpected",
            show_default="none",
        ),
    ] = "",
    inflate: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="how a 2D kernel is spread over the slices of a patch: mean or centre",
        ),
    ] = "mean",
    window: Annotated[
        str,
        typer.Option(
            metavar="Z,Y,X",
            help="size in voxels of the crops for which the positions of the weights were learned",
            show_default="as their config.json states, or as their number suggests",
        ),
    ] = "",
    custom_code: CustomCode = False,
) -> None:
    """Make an export from weights of tapct or of another project.

    A table shows which tensors were loaded, resized, inflated, missing or unexpected. The folder
    can be used like any other export: in eval, embed, train.init and tapct.load_pretrained.
    """
    from tapct.run import importing

    lines = importing.import_weights(
        source,
        out,
        settings=settings or (),
        allow=allow,
        inflate=inflate,
        window=window,
        custom_code=custom_code,
    )
    for line in lines:
        console.say(line)
    console.say(f"imported to {out}")
