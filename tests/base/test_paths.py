"""Command lines that are kept hold no absolute path; a mistyped path gets a guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapct.base.paths import command_line, near_path, without_absolute_paths


@pytest.mark.parametrize(
    "word",
    [
        "/data/Meyer Hans/store",
        "data.store=/data/Meyer Hans/store",
        "eval.only=[/data/Meyer Hans/*,ts_body/*]",
        "--labels=/data/Meyer Hans",
        "out=~/Meyer Hans/run",
        "pair=a:/data/Meyer Hans",
    ],
)
def test_nothing_of_an_absolute_path_is_left(word: str) -> None:
    line = command_line(["/opt/Meyer/bin/tapct", "eval", word])
    assert line.startswith("tapct eval ") and "path-" in line
    assert not [name for name in ("Meyer", "Hans", "/data", "~", "/opt") if name in line]


def test_a_path_below_the_working_folder_becomes_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"{tmp_path}/tapct/__main__.py", "eval", f"{tmp_path}/runs/a", "device=cpu", "runs/b"]
    assert command_line(words) == "tapct eval runs/a device=cpu runs/b"


def test_other_values_are_unchanged() -> None:
    value = {"a": ["mm/s", 3, 1.5, None, "x/y"], "b": {"c": ("1", True)}}
    assert without_absolute_paths(value) == value


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("runs/frist", "runs/first"),
        ("rnus/first", "runs/first"),
        ("runs/first/exprot", "runs/first/export"),
        ("rnus/other", ""),  # runs exists, runs/other does not
        ("runs/zzz", ""),
        ("runs/case_003", ""),  # case_002 is another patient
    ],
)
def test_a_mistyped_path_gets_a_guess_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first" / "export").mkdir(parents=True)
    (tmp_path / "runs" / "case_002").mkdir()
    assert near_path(Path(given)) == (f" (did you mean {meant}?)" if meant else "")
    assert near_path(tmp_path / given) == (f" (did you mean {tmp_path / meant}?)" if meant else "")
