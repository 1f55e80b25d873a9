"""Run one function over many inputs in processes; an input that kills its worker does not end the
run.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def map_unordered(
    function: Callable[[In], Out],
    inputs: Sequence[In],
    workers: int,
    on_crash: Callable[[In], Out],
) -> Iterator[tuple[int, Out]]:
    """Yield (index, result) as they become ready.

    When a worker dies (a reader library crashed, memory ran out), the inputs in flight are tried
    again one by one, and only the one that kills its worker again gets `on_crash`.

    Args:
        function: picklable; it must not raise.
        inputs: picklable.
        workers: processes; 0 or 1 runs in this process, without protection.
        on_crash: makes the result of an input that ends its process.
    """
    if workers <= 1:
        yield from ((index, function(item)) for index, item in enumerate(inputs))
        return
    todo = list(range(len(inputs)))[::-1]
    while todo:
        suspects: list[int] = []
        yield from _run_pool(function, inputs, todo, suspects, workers)
        for index in suspects:
            alone: list[int] = []
            yield from _run_pool(function, inputs, [index], alone, 1)
            if alone:
                yield index, on_crash(inputs[index])


def _run_pool(
    function: Callable[[In], Out],
    inputs: Sequence[In],
    todo: list[int],
    suspects: list[int],
    workers: int,
) -> Iterator[tuple[int, Out]]:
    """Take indices from the end of `todo` until it is empty or a worker dies; `suspects` gets those
    then in flight.
    """
    # forkserver: a fork of this process would copy locks that its other threads hold
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    in_flight: dict[Future[Out], int] = {}
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=context)
    try:
        while todo or in_flight:
            while todo and len(in_flight) < 2 * workers:
                in_flight[pool.submit(function, inputs[todo[-1]])] = todo[-1]
                todo.pop()
            done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                yield in_flight.pop(future), result
    except BrokenProcessPool:
        suspects.extend(sorted(in_flight.values()))
    finally:
        pool.shutdown(cancel_futures=True)
