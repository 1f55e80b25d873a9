"""The Typer application, its entry point, and the arguments that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tapct.base import exits


class Commands(TyperGroup):
    """All commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen one."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise exits.Interrupted from error


app = typer.Typer(
    cls=Commands,
    help="Pretrain 3D foundation models on CT: index, pack, train, eval, export, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. optim.lr=1e-3 model.patch=[4,8,8]")
]
ConfigFile = Annotated[Path, typer.Argument(help="YAML config, e.g. configs/smoke.yaml")]
RunFolder = Annotated[Path, typer.Argument(help="run folder, e.g. runs/quickstart")]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Options of all commands."""
    if debug:
        os.environ["TAPCT_DEBUG"] = "1"


def main() -> None:
    """Entry point of the console script."""
    exits.leave(exits.exit_code_of(app))
