"""The Typer application, its entry point, and the arguments that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import tapct
from tapct.base import exits


class Commands(TyperGroup):
    """The group of all commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was given on the command line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise exits.Interrupted from error


def examples(*lines: str) -> str:
    """Command lines as the epilog of a help text.

    Args:
        lines: complete command lines, at most 76 columns each.
    """
    # click joins and wraps the lines of a paragraph unless it begins with a backspace character
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


app = typer.Typer(
    cls=Commands,
    help="Pretrain 3D foundation models on CT scans and evaluate them.",
    epilog="'tapct COMMAND -h' shows the options of a command, with examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CPUS = os.cpu_count() or 1  # default of --workers

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="settings that replace those of the config, e.g. optim.lr=1e-3 'model.patch=[4,8,8]'",
    ),
]
ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file, or the name of a config that comes with tapct, e.g. smoke",
    ),
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="folder of a run, e.g. runs/quickstart")
]
Workers = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="number of worker processes; 0 works in this process",
        min=0,
        show_default="number of CPUs",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tapct {tapct.__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[
        bool, typer.Option("--debug", help="print the traceback of every error")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """Read the options that stand before the name of a command."""
    if debug:
        os.environ["TAPCT_DEBUG"] = "1"


def main() -> None:
    """Run the command line: the entry point of the console script."""
    exits.leave(exits.exit_code_of(app))
