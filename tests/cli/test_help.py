"""Help texts: whole at 80 columns, complete, in plain words, and with examples that run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from shell import Shell
from shell import shell as shell  # a fixture

import tapct
from tapct.base.exits import UserError
from tapct.cli.app import app, plain_record
from tapct.config import load_config
from tapct.plan import command as plan_command
from tapct.run.config import RunConfig

PROGRAM: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {
    name: command for name, command in PROGRAM.commands.items() if not command.hidden
}
ROOM = Path(tapct.__file__).resolve().parent / "cli"
# words that a reader outside of this project has to decode
FORBIDDEN = (
    r"told|tells?\b|telling|says?\b|said|go(es)? on|gets? on|going on|as of\b|at hand|judged?s?\b"
    r"|anew|in vain|numbers of GPUs|looks? whether|curve anew|shapes? (the|another) curve"
)


def help_of(shell: Shell, *command: str) -> str:
    shell.monkeypatch.setenv("COLUMNS", "80")
    return shell.good(*command, "--help")


def documented(command: Any) -> list[Any]:
    """The arguments and options of a command that its help shows."""
    return [item for item in command.params if not getattr(item, "hidden", False)]


def example_lines(command: Any) -> list[str]:
    epilog = command.epilog or ""
    return [line.strip() for line in epilog.splitlines()[2:]]


EXAMPLES = [(name, line) for name in COMMANDS for line in example_lines(COMMANDS[name])]


def test_help_shows_the_first_sentence_of_every_command_whole(shell: Shell) -> None:
    lines = help_of(shell).splitlines()
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        first = command.help.split("\n\n")[0]
        assert first.endswith(".") and "\n" not in first, first
        assert f"  {name:<{width}}  {first}" in lines


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_a_help_text_fits_80_columns_and_is_not_cut(shell: Shell, name: str) -> None:
    text = help_of(shell, *name.split())
    assert all(len(line) <= 80 for line in text.splitlines()), text
    usage_and_lists = re.compile(r"(\]|N,|\S)\.\.\.")  # [KEY=VALUE]..., N,N,...
    for line in text.splitlines():
        assert "…" not in line
        assert not re.search(r"\.\.\.$", line) or usage_and_lists.search(line.split("  ")[0]), line


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_a_help_text_shows_neither_types_nor_ranges(shell: Shell, name: str) -> None:
    text = help_of(shell, *name.split())
    assert not re.search(r"<\w+(\[\w+\])?>|x[<>]=?\d|[{}]", text), text
    assert re.search(r"  -h, --help +show this message and exit$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["eval", "doctor"])
def test_the_example_settings_of_a_help_text_can_be_given_to_the_command(name: str) -> None:
    (item,) = (item for item in COMMANDS[name].params if item.name == "overrides")
    settings = re.findall(r"\S+=\S+", item.help)
    free = ("eval.", "device=", "model.attention", "data.store")  # as in run/model_source.py
    assert settings and all(word.startswith(free) for word in settings)
    load_config(RunConfig, Path("smoke"), settings)


def test_a_row_of_a_help_text_loses_the_type_and_the_range_and_keeps_the_default() -> None:
    assert plain_record("KEY=VALUE <list[str]>", "settings") == ("KEY=VALUE", "settings")
    assert plain_record("--nodes N", "nodes  [default: 1; x>=1]") == (
        "--nodes N",
        "nodes  [default: 1]",
    )
    assert plain_record("--level N", "level  [default: 1; 1<=x<=9]")[1] == "level  [default: 1]"
    assert plain_record("--least N", "least  [x>=1]")[1] == "least"
    assert plain_record("MAX N", "x=2; [required]") == ("MAX N", "x=2; [required]")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described_and_names_its_value(shell: Shell, name: str) -> None:
    text = " ".join(help_of(shell, name).split())
    for item in documented(COMMANDS[name]):
        if item.name == "help":
            continue
        assert item.help and len(item.help.split()) >= 3, (name, item.name)
        # wrapped lines may break a word at its hyphens
        assert re.sub(r"\s", "", item.help) in re.sub(r"\s", "", text), (name, item.name)
        takes_value = item.param_type_name == "argument" or not item.is_flag
        assert not takes_value or item.metavar, f"{name} {item.name}: name its value or unit"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_default_is_in_the_help(shell: Shell, name: str) -> None:
    text = re.sub(r"\s", "", help_of(shell, name))
    without = {"labels", "patient_regex", "patient_column", "patient_from", "ignore_label"}
    without |= {
        "rule",
        "rules",
        "memory",
        "tflops",
        "sweep",
        "metric",
        "overrides",
        "models",
        "settings",
    }
    for item in documented(COMMANDS[name]):
        if item.name == "help" or item.required or getattr(item, "is_flag", False):
            continue
        shown = item.show_default
        if isinstance(shown, str):
            assert re.sub(r"\s", "", shown) in text
        elif item.default not in (None, ()):
            assert re.sub(r"\s", "", f"[default: {item.default}") in text
        else:
            # nothing is the default of these: their help shows what they add
            assert item.name in without | {"config", "folders"}, (name, item.name)


def test_the_default_share_of_a_measured_rate_is_the_one_in_the_help(shell: Shell) -> None:
    assert f"{plan_command.UTILISATION} with --measure" in " ".join(help_of(shell, "plan").split())


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_texts_are_in_plain_words(shell: Shell, name: str) -> None:
    text = " ".join(help_of(shell, *name.split()).split())
    assert re.findall(rf"\b(?:{FORBIDDEN})\b", text, re.IGNORECASE) == []


def test_no_message_of_the_command_line_is_in_dialect() -> None:
    for file in sorted(ROOM.glob("*.py")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if "console.say" not in line:  # the name of a function of base/console
                assert not re.search(rf"\b(?:{FORBIDDEN})\b", line, re.IGNORECASE), line


def test_the_exit_code_for_batch_scripts_is_shown_and_works(shell: Shell) -> None:
    assert "--stopped-code" in help_of(shell, "train")
    context = COMMANDS["train"].make_context("train", ["smoke", "--stopped-code", "143"])
    assert context.params["stopped_code"] == 143


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_h_is_help(shell: Shell, name: str) -> None:
    shell.monkeypatch.setenv("COLUMNS", "80")
    assert shell.good(*name.split(), "-h") == shell.good(*name.split(), "--help")


def test_version_prints_the_version(shell: Shell) -> None:
    assert shell.good("--version") == f"tapct {tapct.__version__}\n"


def test_every_command_has_an_example_of_its_own() -> None:
    assert {name for name, _ in EXAMPLES} == set(COMMANDS)
    assert all(re.search(rf"\btapct {name}\b", line) for name, line in EXAMPLES)


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_an_example_parses_and_its_settings_exist(name: str, line: str) -> None:
    assert len(line) <= 76
    for word in re.findall(r"\S+", line):  # zsh takes brackets without quotes for a pattern
        assert "[" not in word or word.startswith("'"), line
    words = shlex.split(line)
    context = COMMANDS[name].make_context(name, words[words.index(name) + 1 :])
    config = context.params.get("config")
    for sweep in context.params.get("sweep") or ():
        key, _, values = sweep.partition("=")
        load_config(RunConfig, config, [f"{key}={values.split(',')[0]}"])
    load_config(RunConfig, config, context.params.get("overrides") or [])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_typo_in_an_option_names_the_nearest(shell: Shell, name: str) -> None:
    for item in documented(COMMANDS[name]):
        option = item.opts[-1]
        if not option.startswith("--") or len(option) < 6:
            continue
        typo = option[:-2] + option[-1]
        code, _, err = shell(name, typo)
        assert code == 2 and option in err.splitlines()[-1], err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_typo_in_a_command_names_the_nearest(shell: Shell, name: str) -> None:
    typo = name[:-2] + name[-1] + name[-2]
    code, _, err = shell(typo)
    assert code == 2 and f"'{name}'" in err.splitlines()[-1], err


@pytest.mark.parametrize("name", ["smok", "tap_b_3", "tap-s-3d"])
def test_a_typo_in_the_name_of_a_config_names_the_nearest(shell: Shell, name: str) -> None:
    nearest = {"smok": "smoke", "tap_b_3": "tap_b_3d", "tap-s-3d": "tap_s_3d"}[name]
    line = shell.bad("train", name)
    assert re.search(rf"did you mean .*\b{nearest}\b", line), line
    with pytest.raises(UserError, match=nearest):
        load_config(RunConfig, Path(name), [])


DOCS = Path(tapct.__file__).resolve().parent.parent
PAGES = [DOCS / "README.md", DOCS / "CONTRIBUTING.md", *sorted((DOCS / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_docs_quote_brackets_for_zsh(page: Path) -> None:
    for line in re.findall(r"^    (tapct .*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        unquoted = re.sub(r"'[^']*'|\"[^\"]*\"|\s#.*", "", line)
        assert "[" not in unquoted, f"{page.name}: {line}: zsh takes brackets for a pattern"
