"""Ranks that are forked from one Python in which torch and tapct are loaded already, which costs
seconds a rank.

`python nest.py` reads requests and answers them, one line of JSON each. A program of its own, since
it forks: nothing but imports has happened in it. Threads that libraries start when they are loaded
(of jemalloc, in pyarrow) are lost in a rank, and not missed. All ranks hash strings alike, which
Pythons of their own would not: tests by `launch` do.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

# some of these are imported late, and then by every rank for itself
import fsspec  # noqa: F401
import numpy as np
import pyarrow.dataset  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
from pydantic import TypeAdapter  # noqa: F401

from tapct import cli
from tapct.run import pretrain  # noqa: F401

GRACE_S = 20.0  # of ranks whose fellow has failed: to end by themselves, and say why


def become(rank: int, request: dict[str, Any]) -> None:
    """What a forked process has to do to be as `python -m tapct` begins."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    files = [
        (os.devnull, os.O_RDONLY),
        *((path, os.O_WRONLY | os.O_CREAT) for path in request["files"][rank]),
    ]
    for number, (path, flags) in enumerate(files):
        os.dup2(os.open(path, flags, 0o600), number)
    os.environ.clear()
    os.environ.update(request["environments"][rank])
    os.chdir(request["folder"])
    sys.argv = ["tapct", *request["words"]]
    torch.set_num_threads(1)
    # as in a Python of its own: who draws without a key gets something else on every rank
    random.seed()
    np.random.seed()


def wait(ranks: list[int], timeout_s: float) -> list[int | None]:
    """Exit code of each, or minus the signal that ended it; None for one that had to be killed
    here.
    """
    codes: list[int | None] = [None] * len(ranks)
    running, end = set(range(len(ranks))), time.monotonic() + timeout_s
    while running and time.monotonic() < end:
        # there is one request at a time: who asked is gone
        if select.select([sys.stdin], [], [], 0.005)[0]:
            break
        for rank in sorted(running):
            found, status = os.waitpid(ranks[rank], os.WNOHANG)
            if found:
                running.remove(rank)
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank]:
                    end = min(end, time.monotonic() + GRACE_S)
    for rank in running:
        with suppress(ProcessLookupError):  # it has no group of its own yet
            os.killpg(ranks[rank], signal.SIGKILL)
        os.kill(ranks[rank], signal.SIGKILL)
        os.waitpid(ranks[rank], 0)
    return codes


def serve() -> bool:
    """Answer requests until there are no more; True in a forked rank, which then is what `python -m
    tapct` is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks has it too, and closes our input
    for line in sys.stdin:
        request = json.loads(line)
        ranks: list[int] = []
        for rank in range(len(request["environments"])):
            ranks.append(os.fork())
            if not ranks[-1]:
                become(rank, request)
                return True
        print(json.dumps(wait(ranks, request["timeout_s"])), flush=True)
    return False


def run_and_leave() -> NoReturn:
    """Run `tapct` and leave at once: Python would take torch apart, which takes a second."""
    code: int | str | None = 0
    try:
        cli.main()
    except SystemExit as leave:
        code = leave.code
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    # what is loaded is never collected: ranks neither search it nor copy the memory that holds it
    gc.collect()
    gc.freeze()
    if serve():
        run_and_leave()
