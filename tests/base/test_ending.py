"""The mark that a process leaves for the batch script."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapct.base import ending


def test_a_mark_that_cannot_be_written_does_not_keep_a_process_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gone" / "end"
    monkeypatch.setenv(ending.MARK, str(path))
    assert ending.leave_error(MemoryError()) == "lost"
    assert capfd.readouterr().err == f"cannot write {path}: No such file or directory\n"
