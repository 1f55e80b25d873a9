"""Types of command-line arguments that the scripts share; a wrong one is refused in one line, as
`tapct` does.
"""

from __future__ import annotations

import argparse

import torch


def whole(word: str) -> int:
    """argparse type: a whole number, 0 or more."""
    if not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number")
    return int(word)


def positive(word: str) -> int:
    """argparse type: a whole number above 0."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number above 0")
    return int(word)


def device(word: str) -> str:
    """argparse type: a device that is there."""
    if word not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither cpu nor cuda")
    if word == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this torch sees no CUDA GPU; tapct doctor shows why")
    return word
