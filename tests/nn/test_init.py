"""Initial weights depend on seed and name alone: not on the version of torch, the layers of a model
or the number of ranks.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tapct.models import vit
from tapct.nn import init

# of seed 0 and the name "x"; the same with torch 2.11 and torch 2.13. Of fewer than 16 numbers,
# torch draws each by itself.
TRUNC_NORMAL = {
    8: (-0.008739828, -0.001440115, 0.001632503, -0.003354016),
    1000: (0.014299133, 0.002839773, -0.001341709, 0.018466916),
}


def drawn(size: int, std: float, seed: int = 0) -> Tensor:
    parameter = torch.empty(size)
    init.trunc_normal(parameter, std, seed, "x")
    return parameter


@pytest.mark.parametrize("size", TRUNC_NORMAL)
def test_a_seed_gives_the_same_weights_with_every_torch(size: int) -> None:
    torch.testing.assert_close(
        drawn(size, 0.02)[:4], torch.tensor(TRUNC_NORMAL[size]), rtol=0, atol=2e-9
    )


def test_no_weight_of_a_vit_lies_beyond_ten_sigma() -> None:
    with torch.device("meta"):
        backbone = vit.build(vit.Config(dim=256, heads=4, depth=2))
    names = [name for name, p in backbone.named_parameters() if p.ndim == 2 and "mask" not in name]
    assert len(names) == 8
    for name in names:
        weight = torch.empty(backbone.get_parameter(name).shape)
        init.trunc_normal(weight, 0.02, 0, name)
        assert float(weight.abs().max()) < 10 * 0.02
        assert float(weight.std()) == pytest.approx(0.02, rel=0.02)


def test_a_wide_normal_is_cut_and_what_lies_beyond_is_drawn_again() -> None:
    values = drawn(200_000, 1.5).double()
    assert float(values.abs().max()) <= init.CUT
    # nothing piles up at the cut: the share of every slice is that of the cut normal distribution
    edges = torch.linspace(-init.CUT, init.CUT, 17, dtype=torch.float64)
    shares = torch.histogram(values, edges).hist / len(values)
    below = torch.special.ndtr(edges / 1.5)
    wanted = below.diff() / (below[-1] - below[0])
    torch.testing.assert_close(shares, wanted, rtol=0, atol=5 * math.sqrt(0.07 / len(values)))


def test_names_and_seeds_give_other_weights() -> None:
    assert not torch.equal(drawn(16, 0.02), drawn(16, 0.02, seed=1))
