"""Rows of JSON lines: all of them, the last ones, and lines that are no rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tapct.base import jsonl

BROKEN = [b'{"step": 2, "loss/to', b"[1]", b"3", b"", b"   ", b'{"other": 1}', b'"\xff"', b"\xff{}"]


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_is_no_row_is_skipped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    found = jsonl.read(path, "step")
    assert [row["step"] for row in found.rows] == [1, 3]
    assert found.num_unreadable == (1 if line.strip() else 0)
    assert jsonl.read_tail(path, "step") == found.rows


def test_a_row_that_was_cut_off_at_the_end_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2, "loss/total": 0.125}\n'
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        rows = jsonl.read(path, "step").rows
        # a row ends with its brace, whether or not the line break has been written
        assert len(rows) == whole[:end].count(b"}"), end
        assert jsonl.read_tail(path, "step") == rows


def test_a_file_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    assert jsonl.read(tmp_path / "none", "step") == jsonl.Rows([], 0)
    assert jsonl.read_tail(tmp_path / "none", "step") == []


def test_only_the_tail_of_a_large_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "filler": "x" * (step % 977)} for step in range(2000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tail = jsonl.read_tail(path, "step")
    assert 0 < len(tail) < len(rows) and tail == rows[-len(tail) :]
    size = sum(len(json.dumps(row)) + 1 for row in tail)
    assert jsonl.TAIL_BYTES - 1100 < size <= jsonl.TAIL_BYTES
    monkeypatch.setattr(jsonl, "TAIL_BYTES", path.stat().st_size)
    assert jsonl.read_tail(path, "step") == rows
