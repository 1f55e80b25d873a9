"""Whole numbers by key, as tests of draws want them."""

from __future__ import annotations

import torch
from torch import Tensor

from tapct.base import rng


def randint(
    seed: int,
    purpose: str,
    high: int | Tensor,
    *counters: int | Tensor,
    device: torch.device | str | None = None,
) -> Tensor:
    """int64 in [0, high), from the keyed hash.

    Args:
        high: int or integer tensor >= 1 that broadcasts with the counters; the bias is below high /
            2^63.
        seed, purpose, counters, device: as in `rng.hash_bits`.
    """
    if isinstance(high, int):
        assert high >= 1, f"randint needs high >= 1, got {high}"
    elif device is None and not any(isinstance(c, Tensor) for c in counters):
        device = high.device
    bits = rng.hash_bits(seed, purpose, *counters, device=device) & ((1 << 63) - 1)
    return bits % high
