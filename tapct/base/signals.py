"""Stop signals are for the process that trains, not for those that it starts.

SLURM sends them to every process of a job step. A loader worker or wandb's service would die of
SIGUSR2, and training with it, before it can save.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Within it, processes that this thread starts are deaf to the stop signals; handlers here
    still run.

    What a thread blocks, its children block from their first instruction on. So this thread blocks
    the signals, and another one takes them; Python runs the handlers in the main thread all the
    same.
    """
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
        # else it starts with the first worker, and unblocks SIGTERM behind itself
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()
        listener.join()


@contextmanager
def heard_by_children() -> Iterator[None]:
    """Within it, inside of `kept_from_children` too, processes that this thread starts can be ended
    by a signal.
    """
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
