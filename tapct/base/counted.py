"""Numbers of things in a sentence."""

from __future__ import annotations


def counted(num: int, noun: str, plural: str = "") -> str:
    """A number and its noun, e.g. `1 scan`, `2 scans`.

    Args:
        num: number of things.
        noun: noun for one of them.
        plural: noun for any other number; empty where it only takes an s.
    """
    return f"{num} {noun if num == 1 else plural or noun + 's'}"
