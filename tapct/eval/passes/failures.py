"""The tasks and the models of an evaluation that fail, which does not end the others."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tapct.base import console
from tapct.base.ending import is_fault_of_machine
from tapct.base.exits import LOST_RANK, UserError, single_line
from tapct.data.readers.raw import is_out_of_memory

MOST_CHARACTERS = 400  # of the text of an error in a reason


class LeftOut:
    """Names of tasks or of models, and why some of them are left out.

    An error of one of them is printed, kept as a reason, and does not reach the others. It is
    raised again if nothing would be left to evaluate, and then ends the evaluation.

    Args:
        kind: what the names are: `task` or `model`.
        names: all of them.
        needed: name of the one without which an evaluation means nothing; empty: any one is enough.
    Attributes:
        reasons: name -> reason, in the order in which they failed.
    """

    def __init__(self, kind: str, names: Iterable[str], needed: str = "") -> None:
        self.kind, self.needed = kind, needed
        self.left = set(names)
        self.reasons: dict[str, str] = {}

    @contextmanager
    def caught(
        self, name: str, doing: str, passed_on: tuple[type[Exception], ...] = ()
    ) -> Iterator[None]:
        """Within this context, an error is one of this name.

        Args:
            name: task or model that is at work.
            doing: what it does, e.g. `judge() of model untrained on scan a1`.
            passed_on: errors that are none of this name.
        Raises:
            Exception: the error, if nothing is left; also one of `passed_on`, and one that ends
                everything, see `ends_all`.
        """
        try:
            yield
        except passed_on:
            raise
        except Exception as error:
            if ends_all(error):
                raise
            self.leave_out(name, doing, error)

    def leave_out(self, name: str, doing: str, error: Exception) -> None:
        """Leave a name out from here on; arguments and errors as of `caught`."""
        if name == self.needed or self.left == {name}:
            raise error
        self.left.discard(name)
        self.reasons[name] = reason_of(f"{self.kind} {name}: ", doing, error)
        if os.environ.get("TAPCT_DEBUG") == "1":
            traceback.print_exception(error)
        console.say_line(f"{self.kind} {name} is left out: {self.reasons[name]}")


def ends_all(error: BaseException) -> bool:
    """Whether an error ends the whole evaluation: the memory of the machine is exhausted, a rank is
    lost, or a GPU or a disk does not work. If the memory of the GPU is exhausted, another task or
    model may need less of it.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return (
        on_cpu
        or is_out_of_memory(error)
        or is_fault_of_machine(error)
        or getattr(error, "exit_code", 0) == LOST_RANK
    )


def reason_of(prefix: str, doing: str, error: BaseException) -> str:
    """Why something is left out, as one line: the text of an error that a user can correct, else
    what was being done, with the type of the error and the place in the code.

    Args:
        prefix: beginning of the text that is not repeated.
        doing: what was being done.
        error: error.
    """
    text = single_line(error, MOST_CHARACTERS).removeprefix(prefix)
    if isinstance(error, UserError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    colon = ": " if text else ""
    return f"{doing} raised {type(error).__name__}{colon}{text}{place}"
