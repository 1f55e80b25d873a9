"""Several archives in one run: exact shares, whole passes, O(1) at any sample."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from tapct.base.exits import UserError
from tapct.data.loading.mixture import Mixture, counts_of
from tapct.data.loading.sampler import scan_of

SEED = 5


def drawn(mixture: Mixture, start: int, stop: int) -> list[int]:
    return [mixture.scan_of(sample, SEED) for sample in range(start, stop)]


def test_every_block_has_exactly_the_shares() -> None:
    mixture = Mixture(["a", "b"], [range(7), range(7, 12)], [3.0, 1.0])
    assert mixture.counts == (3, 1) and mixture.block == 4
    for block in range(50):
        rows = drawn(mixture, 4 * block, 4 * block + 4)
        assert sum(row < 7 for row in rows) == 3
    # the places of the archives in a block differ from block to block
    places = {tuple(row < 7 for row in drawn(mixture, 4 * b, 4 * b + 4)) for b in range(50)}
    assert len(places) == 4


def test_an_archive_shows_each_of_its_scans_once_a_pass() -> None:
    mixture = Mixture(["a", "b"], [range(7), range(7, 12)], [3.0, 1.0])
    own = [row for row in drawn(mixture, 0, 4 * 70) if row < 7]  # 30 passes of archive a
    for start in range(0, len(own), 7 * 3):  # passes and blocks end together after 7 blocks
        assert Counter(own[start : start + 21]) == dict.fromkeys(range(7), 3)
    assert len({tuple(own[k : k + 7]) for k in range(0, 210, 7)}) > 1


def test_an_archive_keeps_its_order_when_another_one_is_added() -> None:
    two = Mixture(["a", "b"], [range(7), range(7, 12)], [1.0, 1.0])
    three = Mixture(["a", "c", "b"], [range(7), range(12, 20), range(7, 12)], [1.0, 2.0, 1.0])

    def places(mixture: Mixture, archive: int) -> dict[int, int]:
        """Number of the sample in its archive -> row."""
        found = {}
        for sample in range(400):
            k, number = mixture.place(sample, SEED)
            if k == archive:
                found[number] = mixture.scan_of(sample, SEED)
        return found

    before, after = places(two, 0), places(three, 0)
    assert all(after[number] == row for number, row in before.items() if number in after)


def test_numbers_in_an_archive_have_no_gap_and_none_comes_twice() -> None:
    mixture = Mixture(["a", "b", "c"], [range(3), range(3, 9), [9]], [0.5, 0.3, 0.2])
    assert mixture.counts == (5, 3, 2)
    for archive, count in enumerate(mixture.counts):
        numbers = [
            number
            for k, number in (mixture.place(sample, SEED) for sample in range(10 * 20))
            if k == archive
        ]
        assert sorted(numbers) == list(range(20 * count))


def test_the_place_of_sample_10_to_the_12_takes_microseconds() -> None:
    big = Mixture(["a", "b"], [range(10**6), np.arange(10**6, 10**6 + 1000)], [0.7, 0.3])
    best = np.inf
    for _ in range(5):
        begin = time.perf_counter()
        for sample in range(10**12, 10**12 + 20):
            big.scan_of(sample, SEED)
        best = min(best, (time.perf_counter() - begin) / 20)
    assert best < 1e-3  # about 0.02 ms on a free core


def test_a_replacement_is_of_the_same_archive() -> None:
    mixture = Mixture(["a", "b"], [range(7), range(7, 12)], [1.0, 1.0])
    for sample, replacement in itertools.product(range(20), range(6)):
        first = mixture.scan_of(sample, SEED)
        assert (mixture.scan_of(sample, SEED, replacement) < 7) == (first < 7)


def test_one_archive_alone_is_drawn_by_the_sampler_of_a_single_store() -> None:
    mixture = Mixture(["a"], [range(7)], [2.0])
    assert mixture.block == 1
    own_seed_rows = drawn(mixture, 0, 21)
    assert all(Counter(own_seed_rows[k : k + 7]) == dict.fromkeys(range(7), 1) for k in (0, 7, 14))
    assert scan_of(0, 7, SEED) in range(7)


def test_the_weights_become_the_smallest_whole_numbers() -> None:
    assert counts_of("ab", [0.7, 0.3]) == (7, 3)
    assert counts_of("abc", [1, 1, 1]) == (3334, 3333, 3333)
    assert counts_of("ab", [1e9, 1e9]) == (1, 1)
    with pytest.raises(UserError, match="archive b has weight 1 of 1e\\+06"):
        counts_of("ab", [1e6 - 1, 1])
