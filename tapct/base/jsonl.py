"""Read files of one JSON object per line, such as metrics.jsonl, while another process appends.

A row that was cut off by a kill, or a line that somebody has edited wrongly, is no row; it never
stops a reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 18  # more than twenty rows of metrics.jsonl


@dataclass(frozen=True)
class Rows:
    """The rows of a file.

    Args:
        rows: JSON objects that hold the key, in the order of the file.
        num_unreadable: other lines, blank ones not counted.
    """

    rows: list[dict[str, Any]]
    num_unreadable: int


def parse(line: str | bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None where it holds something else."""
    try:
        value = json.loads(line)
    except ValueError:  # broken JSON, or bytes that are not UTF-8
        return None
    return value if isinstance(value, dict) else None


def read(path: Path, key: str) -> Rows:
    """Read a whole file; one that does not exist has no rows.

    Args:
        path: file to read.
        key: key that every row has, e.g. `step`.
    Raises:
        OSError: the file cannot be read.
    """
    return _rows(path.read_bytes() if path.is_file() else b"", key)


def each(path: Path, key: str) -> Iterator[dict[str, Any] | None]:
    """Read a file row by row; one that does not exist has no rows.

    Args:
        path: file to read.
        key: key that every row has.
    Yields:
        The rows in the order of the file, and None for each line that is no row; blank lines are
        left out.
    Raises:
        OSError: the file cannot be read.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                row = parse(line)
                yield row if row is not None and key in row else None


def read_tail(path: Path, key: str) -> list[dict[str, Any]]:
    """Read the last rows only, so that a file of hundreds of MB costs nothing.

    Args:
        path: file to read; one that does not exist has no rows.
        key: key that every row has.
    Returns:
        Rows that lie wholly in the last `TAIL_BYTES` bytes, in the order of the file.
    Raises:
        OSError: the file cannot be read.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(path.stat().st_size - TAIL_BYTES, 0)
        file.seek(start)
        content = file.read()
    if start:  # the first line began before the tail
        content = content.partition(b"\n")[2]
    return _rows(content, key).rows


def _rows(content: bytes, key: str) -> Rows:
    lines = [line for line in content.splitlines() if line.strip()]
    rows = [row for row in map(parse, lines) if row is not None and key in row]
    return Rows(rows, len(lines) - len(rows))
