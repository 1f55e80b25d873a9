"""The sampler is a permutation per pass, costs nothing to enter anywhere, and does not know the
world size.
"""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from tapct.base.exits import UserError
from tapct.base.hashing import hash_int
from tapct.data.loading.batch_share import BatchShare
from tapct.data.loading.sampler import permute, scan_of


def order(num_scans: int, pass_number: int, seed: int) -> list[int]:
    start = pass_number * num_scans
    return [scan_of(start + position, num_scans, seed) for position in range(num_scans)]


@settings(max_examples=60, deadline=None)
@given(
    num_scans=st.integers(1, 300),
    pass_number=st.integers(0, 10**6),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_every_pass_shows_every_scan_once(num_scans: int, pass_number: int, seed: int) -> None:
    assert sorted(order(num_scans, pass_number, seed)) == list(range(num_scans))


@pytest.mark.parametrize("num_scans", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1025])
def test_a_pass_is_whole_at_the_edges_of_the_feistel_domains(num_scans: int) -> None:
    assert sorted(order(num_scans, 3, seed=0)) == list(range(num_scans))


def test_a_billion_scans_need_no_memory_and_never_repeat_within_a_pass() -> None:
    num_scans = 10**9
    tracemalloc.start()
    scans = [scan_of(17 * num_scans + position * 999_983, num_scans, 5) for position in range(1000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert len(set(scans)) == 1000 and 0 <= min(scans) and max(scans) < num_scans
    assert abs(np.mean(scans) / num_scans - 0.5) < 4 * math.sqrt(1 / 12 / 1000)


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(order(50, pass_number, seed)) for pass_number in range(5) for seed in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("num_scans", [3, 4])
def test_all_orders_of_few_scans_are_equally_likely(num_scans: int) -> None:
    num_passes, num_orders = 2400, math.factorial(num_scans)
    seen = Counter(tuple(order(num_scans, p, seed=1)) for p in range(num_passes))
    expected = num_passes / num_orders
    statistic = sum(
        (seen[o] - expected) ** 2 / expected for o in itertools.permutations(range(num_scans))
    )
    assert statistic < chi2.isf(1e-4, num_orders - 1)


def test_every_scan_is_equally_likely_at_every_place_and_after_every_other() -> None:
    num_scans, num_passes = 11, 1500
    at, after = np.zeros((2, num_scans, num_scans))
    for p in range(num_passes):
        scans = order(num_scans, p, seed=2)
        at[np.arange(num_scans), scans] += 1
        after[scans[:-1], scans[1:]] += 1
    expected = num_passes / num_scans
    assert ((at - expected) ** 2 / expected).sum() < chi2.isf(1e-4, (num_scans - 1) ** 2)
    off = ~np.eye(num_scans, dtype=bool)
    assert (after[~off] == 0).all()
    assert ((after[off] - expected) ** 2 / expected).sum() < chi2.isf(
        1e-4, num_scans * (num_scans - 1) - 1
    )


@pytest.mark.parametrize("step", [0, 7, 10**9])
def test_every_split_of_a_step_shows_the_same_samples_once(step: int) -> None:
    for world, accumulation in [(1, 1), (1, 4), (2, 1), (2, 3), (24, 1), (4, 6)]:
        parts = [
            BatchShare(24, accumulation, world).samples(step, micro, rank)
            for micro in range(accumulation)
            for rank in range(world)
        ]
        assert {len(part) for part in parts} == {24 // (world * accumulation)}
        assert sorted(itertools.chain(*parts)) == list(range(step * 24, step * 24 + 24))


@pytest.mark.parametrize(
    ("world", "accumulation", "global_batch"), [(3, 1, 8), (2, 3, 8), (8, 1, 4), (1, 1, 0)]
)
def test_an_unequal_share_is_refused_with_a_one_line_error(
    world: int, accumulation: int, global_batch: int
) -> None:
    with pytest.raises(
        UserError, match=f"global_batch {global_batch} .*multiple of {world * accumulation}"
    ) as error:
        BatchShare(global_batch, accumulation, world)
    assert "\n" not in str(error.value)


def test_the_hashes_of_the_rounds_are_those_of_their_keys() -> None:
    """`permute` computes what all positions of a key share once; the plain form is here."""

    def plain(position: int, num_scans: int, key: int) -> int:
        half_bits = max(1, ((num_scans - 1).bit_length() + 1) // 2)
        mask = (1 << half_bits) - 1
        while True:
            left, right = position >> half_bits, position & mask
            for i in range(8):
                drawn = hash_int(key, "sampler round", i, right)
                left, right = right, left ^ (drawn & mask)
            position = left << half_bits | right
            if position < num_scans:
                return position

    for num_scans, key in itertools.product((1, 2, 7, 1000, 10**7), (0, -5, 2**63 - 1)):
        for position in range(0, num_scans, max(1, num_scans // 5)):
            assert permute(position, num_scans, key) == plain(position, num_scans, key)
