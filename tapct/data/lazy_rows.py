"""A sequence whose rows are made on demand, as lists of scans with many rows have them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar, overload

R = TypeVar("R")

_MOST_SHOWN = 1000


class LazyRows(Sequence[R], Generic[R]):
    """Rows by number, from either end, and slices of them as tuples.

    Two such sequences, or one and a list or tuple, are equal if their rows are.
    """

    @abstractmethod
    def row(self, i: int) -> R:
        """Make row i, which exists: 0 <= i < len(self)."""

    @overload
    def __getitem__(self, i: int) -> R: ...

    @overload
    def __getitem__(self, i: slice) -> tuple[R, ...]: ...

    def __getitem__(self, i: int | slice) -> R | tuple[R, ...]:
        if isinstance(i, slice):
            return tuple(self.row(k) for k in range(*i.indices(len(self))))
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return self.row(int(i) % len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (LazyRows, tuple, list)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if len(self) > _MOST_SHOWN:  # a traceback would print all rows of an archive
            return f"<{type(self).__name__} of {len(self)} rows>"
        return repr(tuple(self))
