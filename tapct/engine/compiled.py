"""`torch.compile` of the blocks of every network: the same numbers up to rounding, by fewer and
larger kernels.

What is compiled is the `forward` of a block, not the block: parameters keep their names, and FSDP's
hooks stay outside of the graph. All blocks are alike and share graphs. Stochastic depth changes the
number of rows at every step, so sizes are symbols; new graphs are made only where a branch keeps
all crops, or where two sizes are equal by chance.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tapct.base import console
from tapct.base.exits import UserError
from tapct.ssl.student_teacher import StudentTeacher

# of one function before torch gives up on it; teacher and student, each branch whole or by a subset
GRAPHS = 64
WANTED = ("auto", "always", "never")


def decide(wanted: str, device: torch.device) -> bool:
    """Whether blocks are compiled: `auto` is yes on a GPU, where a compiler is found, and no on a
    CPU.

    Raises:
        UserError: `always`, and there is no compiler.
    """
    if wanted == "never" or (wanted == "auto" and device.type == "cpu"):
        return False
    names = compilers(device)
    if any(shutil.which(name) for name in names):
        return True
    missing = f"{' or '.join(names)} is not on the PATH"
    line = f"train.compile={wanted} needs a compiler for this {device.type}, and {missing}"
    if wanted == "always":
        raise UserError(f"{line}; install one, or set train.compile=never")
    console.say(f"{line}; continuing without it")
    return False


def compilers(device: torch.device) -> tuple[str, ...]:
    """Programs of which torch needs one: C++ for kernels of a CPU, C for what starts those of a
    GPU.
    """
    variable, usual = (
        ("CXX", ("g++", "clang++")) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    )
    return (os.environ[variable],) if os.environ.get(variable) else usual


def compile_blocks(pair: StudentTeacher, backend: str = "inductor") -> None:
    """Compile the blocks of all networks, in place; the work is done when each is called first.

    Args:
        pair: student, teacher and its snapshot.
        backend: what torch.compile makes of a graph; eager executes it as it is, without a
            compiler.
    Raises:
        UserError: the backbone has no repeated blocks.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for network in (pair.student, *pair.frozen()):
        blocks = network.backbone.repeated_blocks()
        if not blocks:
            raise UserError(
                "train.compile: this backbone has no repeated blocks to compile; set "
                "train.compile=never"
            )
        for block in blocks:
            compile_forward(block, backend)


def compile_forward(block: nn.Module, backend: str = "inductor") -> None:
    """Compile what a module does when it is called; its parameters and hooks stay as they are."""
    block.forward = torch.compile(block.forward, dynamic=True, backend=backend)


@contextmanager
def naming_failures() -> Iterator[None]:
    """Turn what the compiler cannot do into one line with the way out."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        cause = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"train.compile: torch could not compile a block ({cause}); set train.compile=never"
        ) from error
