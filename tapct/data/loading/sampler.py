"""Which scan a sample shows: a permutation per pass that can be entered anywhere.

Samples are numbered through the whole run. Pass p holds the samples p*n .. p*n + n - 1 of an
archive with n scans and shows every scan once, in an order of its own. The order is never written
down: a Feistel network permutes the smallest domain of 4^h >= n numbers, and a result >= n is sent
through again until it falls below n (cycle walking), which makes a permutation of 0..n-1. So any
sample of any pass costs a few hashes, memory does not grow with n, resuming is arithmetic, and
ranks and world sizes do not matter.

Source: Luby and Rackoff 1988 (doi:10.1137/0217022); cycle walking: Black and Rogaway 2002
(doi:10.1007/3-540-45760-7_9).
"""

from __future__ import annotations

import functools

from tapct.base import rng
from tapct.base.hashing import absorb, purpose_id

_ROUNDS = 8  # 4 are a strong permutation of large domains; small ones need more to look uniform


def permute(position: int, num_scans: int, key: int) -> int:
    """The scan at a position of the permutation named by `key`; positions and scans count
    0..num_scans-1.
    """
    assert 0 <= position < num_scans
    half_bits = max(1, ((num_scans - 1).bit_length() + 1) // 2)
    mask, states = (1 << half_bits) - 1, _round_states(key)
    while True:
        left, right = position >> half_bits, position & mask
        for state in states:
            # = hash_int(key, "sampler round", number of the round, right)
            left, right = right, left ^ (absorb(state, right) & mask)
        position = left << half_bits | right
        if position < num_scans:  # the domain is < 4 times larger: < 4 turns on average
            return position


@functools.lru_cache(maxsize=64)
def _round_states(key: int) -> tuple[int, ...]:
    """What the hashes of each round begin with, which all positions share."""
    state = absorb(absorb(0, key), purpose_id("sampler round"))
    return tuple(absorb(state, i) for i in range(_ROUNDS))


def scan_of(sample: int, num_scans: int, seed: int) -> int:
    """The scan that a sample shows.

    Args:
        sample: its number in the whole run, >= 0.
        num_scans: in the store, >= 1.
        seed: of the run.
    Returns:
        A row of the store; samples p*n .. p*n + n - 1 give each row once.
    """
    assert sample >= 0 and num_scans >= 1
    pass_number, position = divmod(sample, num_scans)
    return permute(position, num_scans, rng.hash_int(seed, "sampler pass", pass_number))
