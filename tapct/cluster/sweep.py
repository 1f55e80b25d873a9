"""Sweeps: all combinations of values of some keys, each with a short name for its run folder."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tapct.base.exits import UserError

OPENING, CLOSING, QUOTES = "[{(", "]})", "'\""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        name: name of its run folder, e.g. `lr=1e-4,num_locals=4`.
        values: pairs of key and value, as they were written.
    """

    name: str
    values: tuple[tuple[str, str], ...]

    def overrides(self, common: Sequence[str], out: Path) -> list[str]:
        """Config overrides of this run.

        Args:
            common: overrides that all runs share.
            out: folder around the run folders.
        """
        own = [f"{key}={value}" for key, value in self.values]
        return [*common, *own, f"out={json.dumps(str(out / self.name))}"]


def product(arguments: Sequence[str]) -> list[Point]:
    """All combinations of the values of all keys.

    Args:
        arguments: texts `key=value,value`; several in one text are separated by spaces. Commas and
            spaces within brackets or quotes belong to a value:
            `views.global_area=[0.1,0.2],[0.3,0.4]`.
    Raises:
        UserError: a text is not key=values, a key or value occurs twice, a value is empty, or a
            bracket stays open.
    """
    axes = _read_axes(arguments)
    short_names = {key: _short(key, list(axes)) for key in axes}
    points = []
    for values in itertools.product(*axes.values()):
        pairs = tuple(zip(axes, values, strict=True))
        name = ",".join(f"{short_names[key]}={_file_name(value)}" for key, value in pairs)
        points.append(Point(name, pairs))
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--sweep makes the run {name} twice; name each value once")
    return points


def _read_axes(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Key -> its values."""
    texts: list[str] = []
    for argument in arguments:
        texts += [part for part in split_outside(argument, " \t\n") if part]
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        values = split_outside(listed, ",")
        if not equals or not key or not all(values):
            raise UserError(f"--sweep {text!r} is not key=value,value, e.g. optim.lr=1e-4,2e-4")
        if key in axes:
            raise UserError(f"--sweep names {key} twice; list all its values after one {key}=")
        if key == "out":
            raise UserError(
                "--sweep out=...: each run gets a folder of its own below out; sweep over "
                "something else"
            )
        axes[key] = values
    return axes


def split_outside(text: str, separators: str) -> list[str]:
    """Split a text at separators that are outside of brackets and quotes.

    Args:
        text: text to split.
        separators: single characters.
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
            if char == quote:
                quote = ""
        elif char in QUOTES:
            quote = char
        elif char in OPENING:
            depth += 1
        elif char in CLOSING:
            depth -= 1
    if depth or quote:
        raise UserError(f"--sweep {text!r}: a bracket or quote is not closed")
    return [part.strip() for part in parts]


def _short(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a dotted key that no other key of the sweep shares."""
    for end in _ends(key):
        sharing = [other for other in keys if end in _ends(other)]
        if len(sharing) == 1:
            return end
    return key


def _ends(key: str) -> list[str]:
    """`optim.lr` -> `lr`, `optim.lr`."""
    parts = key.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _file_name(value: str) -> str:
    """A value without the characters that a folder name should not hold."""
    kept = value.strip("[](){}'\" ")
    return re.sub(r"[^\w.+-]+", "-", kept) or "empty"
