"""The hash behind all keyed randomness, in Python integers: no torch, so that light commands can
use it.

`rng` computes the same numbers for tensors. Every number is a pure function of a seed, the name of
a draw and counters.

Source: SplitMix64, Steele, Lea and Flood 2014 (doi:10.1145/2660193.2660195), with Stafford's
    "Mix13" finaliser.
"""

from __future__ import annotations

import hashlib

MASK_64 = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15  # odd, 2^64 / golden ratio
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def hash_int(seed: int, purpose: str, *counters: int) -> int:
    """Hash one key to 64 random bits.

    Args:
        seed: random seed of the run; any integer, its low 64 bits count.
        purpose: name of the draw, so that draws for different uses are independent.
        counters: numbers that identify the draw, e.g. sample number and view; their order matters.
    Returns:
        A signed int64 as an int, equal to `rng.hash_bits` of the same key.
    """
    state = absorb(absorb(0, seed), purpose_id(purpose))
    for counter in counters:
        state = absorb(state, counter)
    return signed(state)


def purpose_id(name: str) -> int:
    """A stable number in [0, 2^63) for the name of a draw."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def absorb(state: int, counter: int) -> int:
    """Mix one more counter into a state; both are unsigned 64-bit numbers."""
    word = (state + (counter + 1) * GAMMA) & MASK_64
    word = ((word ^ (word >> 30)) * MIX_1) & MASK_64
    word = ((word ^ (word >> 27)) * MIX_2) & MASK_64
    return word ^ (word >> 31)


def signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    word &= MASK_64
    return word - (1 << 64) if word >> 63 else word
