"""Runs the command line in the process of a test, as a console script would."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tapct import cli


def leave_code(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """Run a command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["tapct", *map(str, words)])
    try:
        cli.main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def without_warnings(text: str) -> list[str]:
    """The other lines of what a command has printed on standard error."""
    return [line for line in text.splitlines() if not line.startswith("warning: ")]


class Shell:
    """Runs the command line in this process, as a console script would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str | Path) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self.capsys.readouterr()
        code = leave_code(self.monkeypatch, *words)
        out, err = self.capsys.readouterr()
        return code, out, err

    def good(self, *words: str | Path) -> str:
        """What a command prints that succeeds; its only lines on standard error are warnings."""
        code, out, err = self(*words)
        assert (code, without_warnings(err)) == (0, []), (out, err)
        return out

    def bad(self, *words: str | Path) -> str:
        """The one line that a failing command prints."""
        code, out, err = self(*words)
        assert code != 0
        assert "Traceback" not in out + err
        lines = without_warnings(err)
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.delenv("TAPCT_DEBUG", raising=False)
    return Shell(monkeypatch, capsys)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
