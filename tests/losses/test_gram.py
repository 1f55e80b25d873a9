"""Gram anchoring against a double loop in float64, its gradient, and its digits where student and
snapshot agree.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from tapct.losses import gram
from tapct.types import Masks, Tokens, TokenSets

CROPS, N = 10, 6  # more crops than are taken at once
COUNTS = (2, 0, 6, 1, 3, 0, 5, 4, 6, 2)


def token_sets(
    dim: int, counts: tuple[int, ...] = COUNTS, dtype: torch.dtype = torch.float64
) -> TokenSets:
    """Student, teacher and snapshot of their own; `counts` are the masked tokens in each crop."""
    draw = torch.Generator().manual_seed(dim)

    def tokens() -> Tokens:
        make = [
            torch.randn(CROPS, *shape, dim, generator=draw, dtype=dtype)
            for shape in ((), (2,), (N,))
        ]
        return Tokens(*make, grid=(1, 2, 3))

    masked_CN = torch.zeros(CROPS, N, dtype=torch.bool)
    for crop, count in enumerate(counts):
        masked_CN[crop, torch.randperm(N, generator=draw)[:count]] = True
    masks = Masks(
        masked_CN.unflatten(0, (2, -1)),
        masked_CN.flatten().nonzero().squeeze(1),
        torch.ones(sum(counts)),
    )
    return TokenSets(tokens(), None, tokens(), masks, 2, 0, 0.05, snapshot_global=tokens())


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def gram_loop(sets: TokenSets, tokens: str) -> float:
    """Mean over crops of the mean squared difference of cosines over all pairs of the chosen
    tokens.
    """
    assert sets.snapshot_global is not None
    student, kept = (
        sets.student_global.patches_BND.tolist(),
        sets.snapshot_global.patches_BND.tolist(),
    )
    total = 0.0
    for crop, masked in enumerate(sets.masks.masked_VBN.flatten(0, 1).tolist()):
        chosen = [i for i in range(N) if tokens == "all" or masked[i] == (tokens == "masked")]
        pairs = [(i, j) for i in chosen for j in chosen]
        gaps = [
            cosine(student[crop][i], student[crop][j]) - cosine(kept[crop][i], kept[crop][j])
            for i, j in pairs
        ]
        total += sum(gap * gap for gap in gaps) / max(len(pairs), 1)
    return total / len(student)


@pytest.mark.parametrize("tokens", ["all", "masked", "unmasked"])
@pytest.mark.parametrize("dim", [3, 6, 11])
def test_gram_equals_the_loop_over_pairs_of_patches(tokens: str, dim: int) -> None:
    sets = token_sets(dim)
    (term,) = gram.build(gram.Config(weight=0.7, tokens=tokens))(sets).terms
    assert term.name == "gram"
    assert float(term.value) == pytest.approx(0.7 * gram_loop(sets, tokens), rel=1e-12)


@pytest.mark.parametrize("dim", [3, 6, 11])
def test_the_gradient_is_that_of_the_value(dim: int) -> None:
    sets = token_sets(dim)
    assert sets.snapshot_global is not None
    student, kept = (
        sets.student_global.patches_BND.requires_grad_(),
        sets.snapshot_global.patches_BND,
    )
    assert torch.autograd.gradcheck(lambda x: gram.SquareDistance.apply(x, kept), (student,))
    loss = gram.build(gram.Config(tokens="masked"))
    assert torch.autograd.gradcheck(lambda _: loss(sets).terms[0].value, (student,))


def test_a_rotation_of_all_patches_and_their_lengths_cost_nothing() -> None:
    sets = token_sets(5)
    assert sets.snapshot_global is not None
    turn, _ = torch.linalg.qr(
        torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    lengths = torch.linspace(0.1, 9.0, N, dtype=torch.float64)[:, None]
    sets.student_global.patches_BND.copy_(lengths * sets.snapshot_global.patches_BND @ turn)
    assert abs(float(gram.build(gram.Config())(sets).terms[0].value)) < 1e-15


@pytest.mark.parametrize("shape", [(200, 16), (24, 48)])
def test_float32_keeps_its_digits_where_student_and_snapshot_nearly_agree(
    shape: tuple[int, int],
) -> None:
    draw = torch.Generator().manual_seed(1)
    kept, noise = (torch.randn(2, *shape, generator=draw, dtype=torch.float64) for _ in range(2))
    student = functional.normalize(kept + 1e-3 * noise, dim=-1).float()
    kept = functional.normalize(kept, dim=-1).float()

    def exact(x: torch.Tensor) -> torch.Tensor:
        y = kept.double()
        return (x @ x.mT - y @ y.mT).square().sum((1, 2))

    wide, narrow = student.double().requires_grad_(), student.clone().requires_grad_()
    wanted, found = exact(wide), gram.SquareDistance.apply(narrow, kept)
    wanted.sum().backward()
    wanted = wanted.detach()
    found.sum().backward()
    assert wide.grad is not None and narrow.grad is not None
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    assert float((narrow.grad - wide.grad).norm() / wide.grad.norm()) < 1e-5
    xx, yy, xy = (
        student.mT @ student,
        kept.mT @ kept,
        student.mT @ kept,
    )  # the sum of three large numbers has none left
    plain = xx.square().sum((1, 2)) + yy.square().sum((1, 2)) - 2 * xy.square().sum((1, 2))
    assert float(((plain - wanted) / wanted).abs().max()) > 1e-2


def test_autocast_does_not_reach_the_products() -> None:
    sets = token_sets(4, dtype=torch.float32)
    loss = gram.build(gram.Config())
    value = loss(sets).terms[0].value
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(sets).terms[0].value
    assert inside.dtype == torch.float32 and torch.equal(inside, value)


def test_without_a_snapshot_the_term_is_zero_and_still_connected() -> None:
    values: dict[str, Any] = dict(vars(token_sets(4)), snapshot_global=None)
    sets = TokenSets(**values)
    student = sets.student_global.patches_BND.requires_grad_()
    (term,) = gram.build(gram.Config())(sets).terms
    term.value.backward()
    assert float(term.value.detach()) == 0.0 and term.value.dtype == student.dtype
    assert student.grad is not None and bool((student.grad == 0).all())


def test_no_gradient_reaches_the_snapshot() -> None:
    sets = token_sets(4)
    assert sets.snapshot_global is not None
    sets.student_global.patches_BND.requires_grad_()
    kept = sets.snapshot_global.patches_BND.requires_grad_()
    gram.build(gram.Config())(sets).terms[0].value.backward()
    assert kept.grad is None
