"""Seconds of an evaluation by part."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

READ, PREPARE, FORWARD, WRITE, LOAD = "read", "prepare", "forward", "write", "load"
PARTS = (READ, PREPARE, FORWARD, WRITE, LOAD)


class Stopwatch:
    """Adds up seconds by part. A part that runs inside another one counts for itself alone; parts
    of different threads overlap, so the sum can exceed the wall time.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = threading.local()  # seconds of the parts inside the current one, per thread

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time in this context for a part.

        Args:
            name: one of `PARTS`.
        """
        outside, self._inner.seconds = getattr(self._inner, "seconds", 0.0), 0.0
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[name] += took - self._inner.seconds
            self._inner.seconds = outside + took
