"""Types of command-line arguments that the scripts share; a wrong value gives a one-line error."""

from __future__ import annotations

import argparse

import torch


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


def device(text: str) -> str:
    """argparse type: a device of this machine."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA GPU; run tapct doctor for the reason")
    return text
