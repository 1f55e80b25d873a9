"""Keep stop signals from the processes that training starts, and end other commands cleanly.

SLURM sends stop signals to every process of a job step. SIGUSR2 would end a loader worker or
wandb's service, and training with it, before it can save.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Within this context, stop signals do not reach the processes that this thread starts.

    The handlers of this process still run. A child process blocks the signals that its parent
    thread blocks, from its first instruction on. So this thread blocks the stop signals and another
    thread receives them; Python runs the handlers in the main thread in any case.
    """
    from multiprocessing import resource_tracker

    listening, done = threading.Event(), threading.Event()

    def listen() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
        listening.set()
        done.wait()

    listener = threading.Thread(target=listen, name="stop signals", daemon=True)
    listener.start()
    listening.wait()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        # otherwise it would start with the first worker, and unblock SIGTERM in this thread
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()
        listener.join()


@contextmanager
def heard_by_children() -> Iterator[None]:
    """Within this context, stop signals reach the processes that this thread starts, also inside
    of `kept_from_children`.
    """
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Terminated(SystemExit):
    """SIGTERM has ended the program; no exception of a library."""


@contextmanager
def leaving_at_sigterm() -> Iterator[None]:
    """Within this context, SIGTERM ends the process as an error does: what was begun is cleaned up.

    The exit code is 143, as that of a process which the signal has killed. Nothing changes where
    the program has a handler of its own, or outside of the main thread.
    """

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not end the cleaning up
        raise Terminated(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
