"""Errors of the command line itself are one line with the next step, and the exit code is 2."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from shell import Shell
from shell import shell as shell  # a fixture

from tapct.base.exits import UserError
from tapct.base.files import check_new_path
from tapct.cli.app import app
from tapct.cli.usage import usage_line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "index --workres 3",
            "tapct index has no option --workres; did you mean --workers? see tapct index -h",
        ),
        (
            "pack m --outt=3",
            "tapct pack has no option --outt; did you mean --out? see tapct pack -h",
        ),
        ("index --bogus", "tapct index has no option --bogus; see tapct index -h"),
        ("pack -o 3", "tapct pack has no option -o; see tapct pack -h"),
        ("--verison", "tapct has no option --verison; did you mean --version? see tapct -h"),
        ("indx", "tapct has no command 'indx'; did you mean 'index'? see tapct -h"),
        ("zzz", "tapct has no command 'zzz'; see tapct -h"),
        ("index", "tapct index needs SRC; see tapct index -h"),
        ("pack m", "tapct pack needs --out FOLDER; see tapct pack -h"),
        ("train", "tapct train needs CONFIG; see tapct train -h"),
        ("index a --out", "the option --out needs a value; see tapct index -h"),
        ("index a --derived=3", "the option --derived takes no value; see tapct index -h"),
        (
            "pack m --out o more",
            "tapct pack takes no further argument, but got: more; see tapct pack -h",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(shell: Shell, words: str, line: str) -> None:
    code, out, err = shell(*words.split())
    assert (code, out, err) == (2, "", f"error: {line}\n")


NEITHER = " is no config and no command"
NOT_TAKEN = "tapct submit does not take the command"
TAKES = "tapct submit takes a config, or index, pack, embed or eval"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("indx a --out b", f"indx{NEITHER}; did you mean index? {TAKES}"),
        ("Pack m --out b", f"Pack{NEITHER}; did you mean pack? {TAKES}"),
        ("embd m a --out b", f"embd{NEITHER}; did you mean embed? {TAKES}"),
        ("--exclusive --nodes 2 evla r", f"evla{NEITHER}; did you mean eval? {TAKES}"),
        ("train smoke", f"{NOT_TAKEN} train: {TAKES}; tapct submit CONFIG trains"),
        ("export a --out b", f"{NOT_TAKEN} export: {TAKES}; see tapct submit -h"),
        ("smok --parts 4", "tapct submit has no option --parts; see tapct submit -h"),
        ("--job-name indx", "tapct submit needs CONFIG; see tapct submit -h"),
    ],
)  # fmt: skip
def test_a_mistyped_command_behind_submit_is_named(shell: Shell, words: str, line: str) -> None:
    code, out, err = shell("submit", *words.split())
    assert (code, out, err) == (2, "", f"error: {line}\n")


def test_a_file_that_is_named_like_a_mistyped_command_is_a_config(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "indx").write_text("nonsense: 1\n")
    assert "indx:1: nonsense" in shell.bad("submit", "indx", "--dry-run")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("index a --out m --workers foo", "--workers", "foo"),
        ("index a --out m --min-depth 0", "--min-depth", "1"),  # the value, or the least one
        ("index a --out m --max-lossy-ratio abc", "--max-lossy-ratio", "abc"),
        ("index a --out m --ignore-label z", "--ignore-label", "z"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(
    shell: Shell, words: str, name: str, value: str
) -> None:
    code, out, err = shell(*words.split())
    lines = err.splitlines()
    assert (code, out, len(lines)) == (2, "", 1)
    assert name in err and value in err and lines[0].endswith("see tapct index -h")


def test_versions_of_click_that_check_values_themselves_give_the_same_form() -> None:
    class BadParameter(Exception):
        message = "'foo' is not a valid integer."
        ctx = None
        param = SimpleNamespace(param_type_name="option", opts=["--workers"], metavar="N")

        def format_message(self) -> str:
            return f"Invalid value for '--workers': {self.message}"

    commands = typer.main.get_command(app)
    line = usage_line(BadParameter(), ["index", "a", "--workers", "foo"], commands)
    assert line == "--workers: 'foo' is not a valid integer; see tapct index -h"


@pytest.mark.parametrize(
    "words",
    [
        "index {a} --out {a}/file/m.parquet",
        "index {a} --out {a}/file/sub/m.parquet",
        "embed model scan --out {a}/file/f.npz",
        "phantom --out {a}/file/phantom",
    ],
)
def test_a_place_below_a_file_is_refused_before_any_work(
    shell: Shell, tmp_path: Path, words: str
) -> None:
    (tmp_path / "file").write_text("")
    line = shell.bad(*words.format(a=tmp_path).split())
    assert f"{tmp_path / 'file'} is not a folder" in line and "--out" in line
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_path_whose_folders_are_missing_is_allowed_and_not_made(tmp_path: Path) -> None:
    check_new_path(tmp_path / "a" / "b" / "m.parquet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(UserError, match="gone is not a folder"):
        check_new_path(tmp_path / "gone" / "m.parquet")


def test_a_folder_in_place_of_a_file_is_refused(shell: Shell, tmp_path: Path) -> None:
    line = shell.bad("index", tmp_path, "--out", tmp_path)
    assert "is a folder; give the file to write, such as" in line
    for words in (
        ("index", tmp_path, "--out", tmp_path / "m.parquet", "--report", tmp_path),
        ("doctor", "smoke", "--selftest", "--json", tmp_path),
    ):
        line = shell.bad(*words)
        assert f"{words[-2]} {tmp_path} is a folder; give the file to write" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.csv", "m.parquet.gz"])
def test_suffixes_of_results_are_checked(shell: Shell, tmp_path: Path, name: str) -> None:
    assert ".parquet" in shell.bad("index", tmp_path, "--out", tmp_path / name)
    line = shell.bad("embed", "model", "scan", "--out", tmp_path / name)
    assert ".npz" in line or name == "m"  # `m` may be a folder
    assert list(tmp_path.iterdir()) == []
