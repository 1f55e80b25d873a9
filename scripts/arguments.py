"""What the command lines of the scripts share: types of arguments, whose errors are one line; the
order of words; and how a script that can be resumed ends.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

import torch

from tapct.base import console
from tapct.base.exits import UserError

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")  # a path with a slash is none


def whole(text: str) -> int:
    """argparse type: an integer, 0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """argparse type: an integer above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return int(text)


def positives(text: str) -> list[int]:
    """argparse type: integers above 0 with commas between them, at least one."""
    if not text:
        raise argparse.ArgumentTypeError("give at least one integer above 0")
    return [positive(word) for word in text.split(",")]


def positives_or_none(text: str) -> list[int]:
    """argparse type: the same; empty for none."""
    return positives(text) if text else []


def device(text: str) -> str:
    """argparse type: a device of this machine."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA GPU; run tapct doctor for the reason")
    return text


def overrides_first(words: list[str]) -> list[str]:
    """The words with key=value arguments in front.

    argparse would take an override behind an option with several values for one of these values.

    Args:
        words: arguments of the command line.
    """
    overrides = [word for word in words if OVERRIDE.match(word)]
    return [*overrides, *(word for word in words if not OVERRIDE.match(word))]


def run(main: Callable[[list[str]], None]) -> None:
    """Run a script that can be resumed; an error for people is one line and exit status 2.

    Args:
        main: function that is called with the arguments of the command line.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        console.error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        console.error("interrupted; repeat the command to resume")
        sys.exit(130)
