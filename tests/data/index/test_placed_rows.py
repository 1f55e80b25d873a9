"""Rows that were written in any order come back in the order of their places."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from tapct.data.index import placed_rows
from tapct.data.index.placed_rows import PLACE, PlacedRows
from tapct.data.search import seen_folders
from tapct.data.search.seen_folders import SeenFolders

SCHEMA = pyarrow.schema([("number", pyarrow.int64()), ("words", pyarrow.list_(pyarrow.string()))])


@pytest.mark.parametrize("most_bytes", [0, 300, 1 << 20])
def test_rows_come_back_in_the_order_of_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    monkeypatch.setattr(placed_rows, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(placed_rows, "_MOST_BYTES", most_bytes)
    draw = random.Random(most_bytes)
    for case in range(30):
        rows = PlacedRows(tmp_path / str(case), SCHEMA)
        places = draw.sample(range(60), draw.randrange(40))
        expected = {place: [str(place)] * (place % 3) for place in places}
        while places:
            some = [places.pop() for _ in range(min(len(places), draw.randrange(1, 6)))]
            if draw.random() < 0.5:
                words = [expected[place] for place in some]
                rows.add(pyarrow.table([some, words], schema=SCHEMA), np.array(some))
            else:
                for place in some:
                    rows.append({"number": place, "words": expected[place]}, place)
            if draw.random() < 0.2:
                rows = pickle.loads(pickle.dumps(rows))  # as from one process to another
        assert len(rows) == max(expected, default=-1) + 1
        found = [(row[PLACE], row["number"], row["words"]) for row in rows.rows()]
        assert found == [(place, place, expected[place]) for place in sorted(expected)]
        assert [set(row) for row in rows.rows(["words"])] == [{"words", PLACE}] * len(expected)
        assert all(len(table) <= 4 for table in rows.tables())
        rows.remove()
        assert not rows.folder.exists() and not list(rows.rows())


def test_a_row_without_a_place_comes_after_the_others(tmp_path: Path) -> None:
    rows = PlacedRows(tmp_path / "rows", SCHEMA)
    for number in range(3):
        rows.append({"number": number, "words": []})
    assert [row["number"] for row in rows.rows()] == [0, 1, 2]


def test_folders_that_were_seen_are_those_that_were_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_folders, "_MOST_RECENT", 7)
    draw, seen = random.Random(0), SeenFolders()
    expected: set[tuple[int, int]] = set()
    for _ in range(500):
        identity = draw.randrange(3), draw.choice([draw.randrange(90), 2**64 - 1, 2**63])
        assert (identity in seen) == (identity in expected)
        if identity not in expected:
            seen.add(identity)
            expected.add(identity)
    assert len(expected) > 100
