"""Randomness by key: one counter-based hash, the same on every device, rank and world size.

A draw is a pure function of (seed, purpose, counters), e.g. (seed, "crop area", sample number,
view). There is no state, so nothing has to be saved, advanced or seeded per rank; a resumed run or
another world size draws the same. Everything is int64 torch arithmetic (multiplication wraps,
shifts are made logical by a mask) and never waits for the device.

Source: SplitMix64, Steele, Lea and Flood 2014 (doi:10.1145/2660193.2660195), with Stafford's
    "Mix13" finaliser.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from tapct.base.hashing import GAMMA, MIX_1, MIX_2, signed
from tapct.base.hashing import hash_int as hash_int
from tapct.base.hashing import purpose_id as purpose_id

Counter: TypeAlias = int | Tensor

_SIGNED_GAMMA, _SIGNED_MIX_1, _SIGNED_MIX_2 = (signed(c) for c in (GAMMA, MIX_1, MIX_2))


def _xor_shift(word: Tensor, by: int) -> Tensor:
    """word ^ (word >>> by): torch shifts keep the sign of int64, the mask makes them logical."""
    return word ^ ((word >> by) & ((1 << (64 - by)) - 1))


def _absorb(state: Tensor | int, counter: Tensor | int) -> Tensor:
    """Mix one more word into a state: int64, bit-equal to `hashing.absorb`; at least one of the two
    arguments is a tensor.
    """
    if isinstance(counter, Tensor):
        assert not (counter.is_floating_point() or counter.is_complex()), (
            "a counter is a whole number"
        )
        step: Tensor | int = (counter.to(torch.int64) + 1) * _SIGNED_GAMMA
    else:
        step = signed((counter + 1) * GAMMA)
    word = step + state
    assert isinstance(word, Tensor)
    word = _xor_shift(word, 30) * _SIGNED_MIX_1
    word = _xor_shift(word, 27) * _SIGNED_MIX_2
    return _xor_shift(word, 31)


def hash_bits(
    seed: int, purpose: str, *counters: Counter, device: torch.device | str | None = None
) -> Tensor:
    """64 random bits for every key.

    Args:
        seed, purpose: as in `hash_int`.
        counters: ints or integer tensors that broadcast against each other.
        device: where the result lies; by default that of the first tensor among the counters, or
            the CPU.
    Returns:
        int64 of the broadcast shape; 0-d where all counters are ints.
    """
    if device is None:
        device = next((c.device for c in counters if isinstance(c, Tensor)), torch.device("cpu"))
    num_ints = next((i for i, c in enumerate(counters) if isinstance(c, Tensor)), len(counters))
    prefix = hash_int(seed, purpose, *(c for c in counters[:num_ints] if isinstance(c, int)))
    if num_ints == len(counters):
        return torch.full((), prefix, dtype=torch.int64, device=device)
    state: Tensor | int = prefix
    for counter in counters[num_ints:]:
        state = _absorb(state, counter.to(device) if isinstance(counter, Tensor) else counter)
    assert isinstance(state, Tensor)
    return state


def uniform(
    seed: int, purpose: str, *counters: Counter, device: torch.device | str | None = None
) -> Tensor:
    """float32 in [0, 1), a multiple of 2^-24; shape and keys as in `hash_bits`."""
    bits = hash_bits(seed, purpose, *counters, device=device)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def normal(
    seed: int, purpose: str, *counters: Counter, device: torch.device | str | None = None
) -> Tensor:
    """Standard normal float32 (Box-Muller, |x| <= 6.7); equal over devices up to the last bits of
    log and cos.
    """
    bits = hash_bits(seed, purpose, *counters, device=device)
    radius_u = (((bits >> 32) & 0xFFFFFFFF) + 1).to(
        torch.float32
    ) * 2.0**-32  # in (0, 1]: the log stays finite
    angle_u = (bits & 0xFFFFFF).to(torch.float32) * 2.0**-24
    return (-2.0 * radius_u.log()).sqrt() * (2.0 * math.pi * angle_u).cos()
