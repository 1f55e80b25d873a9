"""Calls that may never return, such as opening a file on a network disk that does not answer."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

LEAST_SECONDS = 10.0  # to which the limit falls where many calls are late


class NoAnswer(Exception):
    """A call that took longer than its limit.

    Args:
        seconds: the limit.
    Attributes:
        problem: the limit in words, as the object of "has".
    """

    def __init__(self, seconds: float) -> None:
        self.problem = f"no answer within {seconds:.3g} s (--timeout)"
        super().__init__(self.problem)


class TimeLimit:
    """Make calls one after the other, each with a time limit.

    A thread makes them. Python cannot end a thread, so one whose call is late is left behind, and a
    new one makes the next calls. Each late call halves the limit, down to ten seconds, so that a
    disk that does not answer is waited for a few times and not once per file.

    Args:
        seconds: longest time of a call; infinite to call without a thread.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self._calls: queue.SimpleQueue[Any] | None = None
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a function, or its exception.

        Args:
            function: function to call; it may still run after a NoAnswer.
            arguments: arguments of the function.
        Raises:
            NoAnswer: the function has not returned in time.
        """
        if math.isinf(self.seconds):
            return function(*arguments)
        if self._calls is None:
            self._calls, self._answers = queue.SimpleQueue(), queue.SimpleQueue()
            given = (self._calls, self._answers)
            threading.Thread(target=_serve, args=given, daemon=True).start()
        self._calls.put((function, arguments))
        try:
            result, error = self._answers.get(timeout=self.seconds)
        except queue.Empty:
            self.close()
            waited = self.seconds
            self.seconds = max(self.seconds / 2, min(self.seconds, LEAST_SECONDS))
            raise NoAnswer(waited) from None
        if error is not None:
            raise error
        answer: T = result
        return answer

    def close(self) -> None:
        """End the thread once its present call has returned."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None


def _serve(calls: queue.SimpleQueue[Any], answers: queue.SimpleQueue[Any]) -> None:
    """Make calls until None is received."""
    while (call := calls.get()) is not None:
        function, arguments = call
        try:
            answers.put((function(*arguments), None))
        except BaseException as error:  # the caller raises it
            answers.put((None, error))
