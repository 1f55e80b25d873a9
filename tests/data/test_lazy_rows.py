"""Rows that are made on demand are taken as those of a tuple are."""

from __future__ import annotations

import pytest

from tapct.data.lazy_rows import LazyRows


class Squares(LazyRows[int]):
    def __init__(self, num: int) -> None:
        self.num, self.made = num, 0

    def __len__(self) -> int:
        return self.num

    def row(self, i: int) -> int:
        assert 0 <= i < self.num
        self.made += 1
        return i * i


@pytest.mark.parametrize("num", [0, 1, 7])
def test_rows_and_slices_are_those_of_a_tuple(num: int) -> None:
    rows, plain = Squares(num), tuple(i * i for i in range(num))
    for i in range(-num, num):
        assert rows[i] == plain[i]
    bounds = (None, -3, -1, 0, 2, 100)
    for part in (slice(a, b, c) for a in bounds for b in bounds for c in (None, 2, -1)):
        assert rows[part] == plain[part]
    for i in (num, -num - 1):
        with pytest.raises(IndexError, match=f"row {i} of {num}"):
            rows[i]
    assert rows == plain and rows == list(plain) and rows == Squares(num)
    assert repr(rows) == repr(plain)
    assert rows != Squares(num + 1) and rows != "text" and list(rows) == list(plain)


def test_only_rows_that_are_wanted_are_made() -> None:
    rows = Squares(1_000_000)
    assert rows[-1] == 999_999**2 and rows[10:13] == (100, 121, 144) and rows.made == 4
    assert "1000000 rows" in repr(rows) and rows.made == 4
