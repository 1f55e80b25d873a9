from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from keyed_draws import randint
from scipy import stats

from tapct.base import hashing, rng

EDGES = [0, 1, -1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63)]


def test_torch_and_python_twins_are_bit_equal() -> None:
    values = EDGES + [rng.hash_int(3, "values", i) for i in range(50)]
    counters = torch.tensor(values, dtype=torch.int64)
    for seed in (0, 1, -7, 2**63 - 1):
        got = rng.hash_bits(seed, "twin", 5, counters, -3)
        assert got.tolist() == [rng.hash_int(seed, "twin", 5, value, -3) for value in values]
        pair = rng.hash_bits(seed, "twin", counters[:, None], counters[None])
        assert pair.tolist() == [[rng.hash_int(seed, "twin", a, b) for b in values] for a in values]


def test_first_word_is_splitmix64() -> None:
    """Reference output of SplitMix64 with seed 1234567 (Vigna's splitmix64.c)."""
    state, out = 1234567, []
    for i in range(5):
        out.append(hashing.absorb(state, i))
    assert out == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip


def test_ints_and_tensors_give_the_same_draw() -> None:
    by_int = torch.stack([rng.hash_bits(9, "same", i, 4) for i in range(20)])
    assert torch.equal(by_int, rng.hash_bits(9, "same", torch.arange(20), 4))
    assert torch.equal(
        by_int, rng.hash_bits(9, "same", torch.arange(20, dtype=torch.int32), torch.tensor(4))
    )
    assert rng.hash_bits(9, "same").shape == ()
    assert rng.hash_bits(9, "same").item() == rng.hash_int(9, "same")


def test_counters_broadcast() -> None:
    a, b = torch.arange(3)[:, None, None], torch.arange(4)[:, None]
    assert rng.uniform(0, "shape", a, 1, b, torch.arange(5)).shape == (3, 4, 5)
    assert randint(0, "shape", torch.tensor([3, 7]), 1).shape == (2,)


def test_seed_purpose_counter_and_their_order_all_count() -> None:
    keys = [
        (0, "a", 1, 2),
        (1, "a", 1, 2),
        (0, "b", 1, 2),
        (0, "a", 2, 1),
        (0, "a", 1, 2, 0),
        (0, "a", 1),
        (0, "a"),
    ]
    assert len({rng.hash_int(*key) for key in keys}) == len(keys)
    assert rng.hash_int(0, "a", 1, 2) == rng.hash_int(0, "a", 1, 2)


def test_purpose_id_is_stable_and_not_negative() -> None:
    digest = hashlib.blake2b(b"slab", digest_size=8).digest()
    assert rng.purpose_id("slab") == int.from_bytes(digest, "little") >> 1
    assert all(0 <= rng.purpose_id(str(i)) < 2**63 for i in range(200))


def test_a_million_keys_do_not_collide() -> None:
    bits = rng.hash_bits(0, "collide", torch.arange(1000)[:, None], torch.arange(1000))
    assert bits.unique().numel() == 1_000_000


@pytest.mark.parametrize("stride", [1, 2, 64, 2**20, 2**40])
def test_uniform_is_uniform_and_independent_of_its_neighbour(stride: int) -> None:
    u = rng.uniform(11, "flat", torch.arange(200_000) * stride).double().numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 4.5 / math.sqrt(len(u))
    cells = np.histogram2d(u[1::2], u[::2], bins=32, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-4


def test_draws_over_seeds_purposes_and_counters_are_independent() -> None:
    n = torch.arange(100_000)
    draws = [rng.uniform(s, p, c, n) for s in (0, 1) for p in ("x", "y") for c in (0, 1)]
    draws += [rng.uniform(s, p, n, 0) for s in (0, 1) for p in ("x", "y")]
    corr = np.corrcoef(torch.stack(draws).double().numpy())
    assert np.abs(corr - np.eye(len(draws))).max() < 5 / math.sqrt(len(n))


def test_every_bit_is_fair_and_flips_with_every_counter_bit() -> None:
    n = torch.arange(20_000)
    shifts = torch.arange(64)
    base = rng.hash_bits(5, "bits", n)
    share = ((base[:, None] >> shifts) & 1).double().mean(0)
    assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(n))
    for bit in (0, 1, 7, 31, 40, 62):
        flipped = base ^ rng.hash_bits(5, "bits", n ^ (1 << bit))
        share = ((flipped[:, None] >> shifts) & 1).double().mean(0)
        assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(n))


def test_normal_is_normal() -> None:
    x = rng.normal(2, "gauss", torch.arange(300_000))
    assert x.dtype == torch.float32 and torch.isfinite(x).all()
    assert stats.kstest(x.double().numpy(), "norm").pvalue > 1e-4
    assert abs(x.mean().item()) < 5 / math.sqrt(len(x)) and abs(x.var().item() - 1) < 0.015


def test_randint_covers_its_range_evenly_for_each_high() -> None:
    high = torch.tensor([1, 2, 7, 1000])
    draws = randint(4, "die", high, torch.arange(40_000)[:, None])
    assert draws.min() == 0 and (draws.max(0).values == high - 1).all()
    assert stats.chisquare(torch.bincount(draws[:, 2]).numpy()).pvalue > 1e-4
    assert randint(4, "die", 2**62, torch.arange(1000)).max() > 2**61


def test_float_counters_are_refused() -> None:
    with pytest.raises(AssertionError):
        rng.uniform(0, "x", torch.tensor([0.5]))
