"""Work that is done one item ahead, in a thread, while the current item is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def one_ahead(
    items: Iterable[ItemT],
    make: Callable[[ItemT], ResultT],
    may_wait: Callable[[ItemT], bool] = lambda item: False,
) -> Iterator[tuple[ItemT, ResultT]]:
    """Items in their order, each with what `make` returns for it.

    Args:
        items: items.
        make: function that runs in the thread, for one item at a time.
        may_wait: whether an item is made only when it is asked for, e.g. because two of its size
            would not fit into memory.
    Raises:
        Exception: what `make` raised, when its item is due.
    """
    left = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="tapct-ahead") as pool:
        item = next(left, None)
        if item is None:
            return
        coming = pool.submit(make, item)
        while item is not None:
            result = coming.result()
            following = next(left, None)
            at_once = following is not None and not may_wait(following)
            if following is not None and at_once:
                coming = pool.submit(make, following)
            yield item, result
            del result
            if following is not None and not at_once:
                coming = pool.submit(make, following)
            item = following
