"""The frames of a multi-frame file that make one scan, as text at the end of the scan's path.

One file may hold several scans. `scan.dcm#1-40` is the scan of its first 40 frames,
`scan.dcm#2-80:2` that of every second one. `#` is followed by numbers from 1 and ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_RANGE = r"\d+(?:-\d+(?::\d+)?)?"
_FRAMES = re.compile(rf"(?P<file>.+)#(?P<frames>{_RANGE}(?:,{_RANGE})*)", re.DOTALL)


def with_frames(file: Path, numbers: Iterable[int]) -> Path:
    """The path of a scan.

    Args:
        file: path of the file, or of the first of several.
        numbers: numbers of its frames, from 1, in any order.
    """
    left = sorted(set(numbers))
    parts = []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        length = 1
        while length < len(left) and left[length] - left[length - 1] == step:
            length += 1
        if length == 2 and step > 1:
            length = 1  # two numbers make no range
        first, last = left[0], left[length - 1]
        text = str(first) if length == 1 else f"{first}-{last}"
        parts.append(f"{text}:{step}" if length > 1 and step > 1 else text)
        left = left[length:]
    return file.with_name(f"{file.name}#{','.join(parts)}")


def without_frames(path: str) -> tuple[str, tuple[int, ...]]:
    """The path of the file and the numbers of the frames; no numbers for the path of a file."""
    match = _FRAMES.fullmatch(path)
    if match is None:
        return path, ()
    numbers: list[int] = []
    for part in match["frames"].split(","):
        ends, _, step = part.partition(":")
        first, _, last = ends.partition("-")
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return match["file"], tuple(numbers)
