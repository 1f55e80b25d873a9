"""The Typer application, its entry point, and the arguments that several commands share."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import tapct
from tapct.base import exits, files, launcher
from tapct.cli.usage import first_argument, no_submitted_word, usage_line

# what some versions of Typer add to a help text: a type after the name of an argument, as in
# `KEY=VALUE <list[str]>`, and the range of a number, as in `[default: 1; x>=1]`
TYPE_HINT = re.compile(r" <[^>]*>$")
NUMBER_RANGE = re.compile(r"(; )?([\d.]+<=?)?x[<>]=?[\d.]+")


DIVIDED = ("index", "pack", "embed", "eval")  # commands whose work `submit` divides
ALONE = ("submit", "jobs", "cancel", "sweep")  # commands without ranks


def plain_record(name: str, text: str) -> tuple[str, str]:
    """One row of a help text without type hints and ranges.

    Args:
        name: first column, e.g. `--nodes N`.
        text: second column.
    """
    text = NUMBER_RANGE.sub("", text).replace("[]", "").rstrip()
    return TYPE_HINT.sub("", name), text


def describe_help_option(option: Any) -> Any:
    """Give the option --help a text in the form of the other options."""
    if option is not None:
        option.help = "show this message and exit"
    return option


def expanded(value: Any) -> Any:
    """The value of an argument with `~` and `$NAME` replaced where it is a path or a list of them.

    The shell does not do it in quotes, nor after the = of `--out=~/runs`.
    """
    if isinstance(value, Path):
        return files.expand_path(value)
    return [expanded(item) for item in value] if isinstance(value, list | tuple) else value


class Command(TyperCommand):
    """A command whose help names the values of its arguments as we wrote them, and no types."""

    def invoke(self, ctx: Any) -> Any:
        """Call the function of the command."""
        ctx.params = {name: expanded(value) for name, value in ctx.params.items()}
        return super().invoke(ctx)

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help."""
        return describe_help_option(super().get_help_option(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Parts of the usage line: `CONFIG` where a version of Typer writes `{CONFIG}`."""
        return [re.sub(r"[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the tables of arguments and options."""
        tables: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for item in self.get_params(ctx):
            record = item.get_help_record(ctx)
            if record is not None:
                title = "Arguments" if item.param_type_name == "argument" else "Options"
                tables[title].append(plain_record(*record))
        for title, rows in tables.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Commands(TyperGroup):
    """The group of all commands."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help."""
        return describe_help_option(super().get_help_option(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that was given; `submit index` and the like divide it over a cluster."""
        if args[0] == "submit":
            word = first_argument(args[1:], self.commands["submit"])
            if word in DIVIDED:
                _, command, rest = super().resolve_command(ctx, ["submit-array", *args[1:]])
                return f"submit {word}", command, rest  # its name in help and errors
            problem = no_submitted_word(word, DIVIDED, self.commands)
            if problem:
                raise exits.UserError(problem)
        return super().resolve_command(ctx, args)

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


class App(typer.Typer):
    """The application; its commands are of the class `Command`."""

    def command(self, *args: Any, **kwargs: Any) -> Any:
        """Register a function as a command; arguments as in Typer."""
        return super().command(*args, **{"cls": Command, **kwargs})


app = App(
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
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="run folder, e.g. runs/quickstart")]
Workers = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="number of worker processes, at least one",
        min=0,
        show_default="number of CPUs",
    ),
]


Part = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        help="do the I-th of N parts of the work, for several processes or machines at once; a "
        "last call without --part does what is left, and writes the result",
        show_default="the whole",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tapct {tapct.__version__}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
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
    if str(context.invoked_subcommand).split()[0] in ALONE:
        launcher.check_prints(os.environ)


def answer() -> NoReturn:
    """Run the command that was given on the command line.

    Raises:
        SystemExit: the command has ended by itself, with its exit code.
        UserError: the command line is wrong; click would print its usage in four lines.
    """
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # Typer brings its own copy of click in some versions, so its classes are known by name
        kinds = {cls.__name__ for cls in type(error).__mro__}
        if "Abort" in kinds:
            raise exits.Interrupted from error
        if "NoArgsIsHelpError" in kinds:
            error.show()  # type: ignore[attr-defined]
            raise SystemExit(exits.WRONG_INPUT) from error
        if "ClickException" not in kinds:
            raise
        line = usage_line(error, sys.argv[1:], typer.main.get_command(app))
        raise exits.UserError(line) from error
    raise SystemExit(code if isinstance(code, int) else 0)


def main() -> None:
    """Run the command line: the entry point of the console script."""
    exits.leave(exits.exit_code_of(answer))
