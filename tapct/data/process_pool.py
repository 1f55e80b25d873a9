"""Apply one function to many inputs in worker processes, and survive an input that ends its worker.

The workers of `tapct index` and `tapct pack` are these processes. The loader of a training run has
threads instead (`data.loader.workers`).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Sequence
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
) -> Generator[tuple[int, Out], None, None]:
    """Yield (index of the input, result) in the order in which the results become ready.

    When a worker dies (a reader library crashed, memory ran out), the inputs in flight are tried
    again one by one, and `on_crash` gives the result of the one that ends its worker again.

    Args:
        function: function that can be pickled and does not raise.
        inputs: values that can be pickled.
        workers: number of processes; 0 or 1 runs in this process, without protection.
        on_crash: function that makes the result of an input that ends its process.
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
) -> Generator[tuple[int, Out], None, None]:
    """Process indices from the end of `todo` until it is empty or a worker dies.

    Args:
        function, inputs, workers: as in `map_unordered`.
        todo: list of indices; those that were given to a worker are removed.
        suspects: list that receives the indices in flight when a worker died.
    """
    # forkserver: a fork of this process would copy the locks that its other threads hold
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
