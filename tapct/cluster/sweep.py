"""Sweeps: the product of some values of some keys, each with a short name for its run folder."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tapct.base.exits import UserError

_OPEN, _CLOSE, _QUOTES = "[{(", "]})", "'\""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        name: of its run folder, e.g. `lr=1e-4,num_locals=4`.
        values: (key, value) as they were written.
    """

    name: str
    values: tuple[tuple[str, str], ...]

    def overrides(self, common: Sequence[str], out: Path) -> list[str]:
        """The overrides of this run: the common ones, the point's own, and its run folder below
        `out`.
        """
        return [
            *common,
            *(f"{key}={value}" for key, value in self.values),
            f"out={json.dumps(str(out / self.name))}",
        ]


def product(words: Sequence[str]) -> list[Point]:
    """All combinations of the values of all keys.

    Args:
        words: `key=value,value`; several in one word stand apart by spaces. Commas and spaces
            within brackets or
            quotes belong to a value: `views.global_area=[0.1,0.2],[0.3,0.4]`.
    Raises:
        UserError: no key=values, a key twice, a value twice or empty, or a bracket that stays open.
    """
    axes: dict[str, list[str]] = {}
    for word in (part for text in words for part in split_outside(text, " \t\n") if part):
        key, equals, listed = word.partition("=")
        values = split_outside(listed, ",")
        if not equals or not key or not all(values):
            raise UserError(f"--sweep {word!r} is not key=value,value, e.g. optim.lr=1e-4,2e-4")
        if key in axes:
            raise UserError(f"--sweep names {key} twice; list all its values after one {key}=")
        if key == "out":
            raise UserError(
                "--sweep out=...: each run gets a folder of its own below out; sweep over "
                "something else"
            )
        axes[key] = values
    points = []
    for chosen in itertools.product(*axes.values()):
        pairs = tuple(zip(axes, chosen, strict=True))
        points.append(
            Point(
                ",".join(f"{_short(key, list(axes))}={_file_name(value)}" for key, value in pairs),
                pairs,
            )
        )
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--sweep makes the run {name} twice; name each value once")
    return points


def split_outside(text: str, separators: str) -> list[str]:
    """Split at separators that stand outside of brackets and quotes.

    Raises:
        UserError: a bracket or quote stays open.
    """
    parts, depth, quote = [""], 0, ""
    for char in text:
        if not depth and not quote and char in separators:
            parts.append("")
            continue
        parts[-1] += char
        if quote:
            quote = "" if char == quote else quote
        elif char in _QUOTES:
            quote = char
        else:
            depth += (char in _OPEN) - (char in _CLOSE)
    if depth or quote:
        raise UserError(f"--sweep {text!r}: a bracket or quote is not closed")
    return [part.strip() for part in parts]


def _short(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a dotted key that no other key of the sweep shares."""
    return next((end for end in _ends(key) if sum(end in _ends(other) for other in keys) == 1), key)


def _ends(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _file_name(value: str) -> str:
    kept = value.strip("[](){}'\" ")
    return re.sub(r"[^\w.+-]+", "-", kept) or "empty"
