"""How the scripts refuse what they cannot do: one line and exit code 2, as `tapct` does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from tapct.types import UserError


def run(main: Callable[[], None]) -> None:
    """Call a script's main; what a person can mend ends in one line."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


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
        raise argparse.ArgumentTypeError("this torch sees no CUDA GPU; tapct doctor tells why")
    return word
