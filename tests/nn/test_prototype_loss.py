"""The fused loss against scores that are written out, in values, gradients, statistics and
memory.
"""

from __future__ import annotations

import dataclasses
import math

import forked
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tapct.nn import prototype_loss as prototype_loss_module
from tapct.nn import prototype_scores, sinkhorn
from tapct.nn.prototype_loss import add_narrow, prototype_loss
from tapct.nn.prototype_scores import TeacherScores
from tapct.nn.sinkhorn import sinkhorn_bias

V, G, B, W, K = 4, 2, 7, 5, 11
TEACHER, STUDENT = 0.05, 0.1


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype
    )


def problem(
    views: int = V, targets: int = G, rows: int = B, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, TeacherScores]:
    student = F.normalize(draw(views, rows, W, seed=seed), dim=-1).requires_grad_()
    prototypes = draw(K, W, seed=seed + 1).requires_grad_()
    weight = draw(views, rows, seed=seed + 2).abs()
    valid = draw(rows, seed=seed + 4) > -0.5
    features = F.normalize(draw(targets, rows, W, seed=seed + 3), dim=-1)
    teacher = TeacherScores(
        features, draw(K, W, seed=seed + 5), TEACHER, 0.3 * draw(K, seed=seed + 6), valid
    )
    return student, prototypes, weight, teacher


def written_out(
    student: Tensor, prototypes: Tensor, weight: Tensor, teacher: TeacherScores, cross: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, cross-entropies and targets with every score in memory, view by view."""
    scores = teacher.features_GBW @ teacher.prototypes_KW.T / teacher.temperature + teacher.bias_K
    targets = torch.softmax(scores, -1)
    log_p = torch.log_softmax(student @ prototypes.T / STUDENT, -1)
    ce = torch.stack(
        [
            torch.stack(
                [
                    -(targets[g] * log_p[v]).sum(-1)
                    for g in range(len(targets))
                    if not (cross and g == v)
                ]
            ).sum(0)
            for v in range(len(student))
        ]
    )
    return (weight * ce).sum(), ce, targets


@pytest.mark.parametrize(("rows_at_once", "rows_of_a_piece"), [(1, 1), (3, 2), (100, 3)])
@pytest.mark.parametrize(
    ("views", "targets", "cross"),
    [(4, 2, True), (2, 2, True), (1, 1, False), (3, 2, False), (5, 3, True)],
)
def test_the_fused_loss_equals_the_written_out_one(
    monkeypatch: pytest.MonkeyPatch,
    views: int,
    targets: int,
    cross: bool,
    rows_at_once: int,
    rows_of_a_piece: int,
) -> None:
    row_bytes = 8 * K * max(views, targets)
    monkeypatch.setattr(prototype_scores, "CHUNK_BYTES", rows_at_once * row_bytes)
    monkeypatch.setattr(prototype_scores, "PIECE_BYTES", rows_of_a_piece * row_bytes)
    student, prototypes, weight, teacher = problem(views, targets)
    result = prototype_loss(student, prototypes, weight, teacher, STUDENT, cross)
    (3.0 * result.value).backward()
    found = student.grad.clone(), prototypes.grad.clone()
    student.grad = prototypes.grad = None
    value, ce, goal = written_out(student, prototypes, weight, teacher, cross)
    (3.0 * value).backward()
    assert torch.allclose(result.value, value, rtol=1e-12) and torch.allclose(
        result.ce_VB, ce, rtol=1e-10
    )
    assert torch.allclose(found[0], student.grad, atol=1e-11) and torch.allclose(
        found[1], prototypes.grad, atol=1e-11
    )
    kept = goal[:, teacher.valid_B]
    assert torch.allclose(result.sums.mass_K, kept.sum((0, 1)), rtol=1e-10)
    assert float(result.sums.entropy) == pytest.approx(
        float(torch.special.entr(kept).sum()), rel=1e-10
    )
    assert float(result.sums.rows) == kept.shape[0] * kept.shape[1]
    sum_K, count = teacher.sum_of_scores()
    plain = (teacher.features_GBW @ teacher.prototypes_KW.T)[:, teacher.valid_B]
    assert (
        torch.allclose(sum_K, plain.sum((0, 1))) and float(count) == kept.shape[0] * kept.shape[1]
    )


def test_gradcheck() -> None:
    student, prototypes, weight, teacher = problem()
    assert torch.autograd.gradcheck(
        lambda s, p: prototype_loss(s, p, weight, teacher, STUDENT, True).value,
        (student, prototypes),
    )


def test_a_second_derivative_is_an_error() -> None:
    """The gradients are computed in the forward pass, so they would count as constants."""
    student, prototypes, weight, teacher = problem()
    loss = prototype_loss(student, prototypes, weight, teacher, STUDENT, True).value
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|differentiate twice"):
        torch.autograd.grad(gradient.square().sum(), student)


def test_no_rows_are_no_loss_and_still_connected() -> None:
    student, prototypes, weight, teacher = problem(1, 1, rows=0)
    result = prototype_loss(student, prototypes, weight, teacher, STUDENT, False)
    result.value.backward()
    assert (
        float(result.value) == 0
        and float(prototypes.grad.abs().sum()) == 0
        and float(result.sums.rows) == 0
    )


@pytest.mark.parametrize(("rows_at_once", "rows_of_a_piece"), [(1, 1), (3, 2), (100, 3)])
@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_sinkhorn_by_chunks_equals_sinkhorn_on_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch, iterations: int, rows_at_once: int, rows_of_a_piece: int
) -> None:
    monkeypatch.setattr(prototype_scores, "CHUNK_BYTES", rows_at_once * 8 * K * G)
    monkeypatch.setattr(prototype_scores, "PIECE_BYTES", rows_of_a_piece * 8 * K * G)
    *_, teacher = problem()
    plain = dataclasses.replace(teacher, bias_K=torch.zeros(K, dtype=torch.float64))
    scores = plain.features_GBW @ plain.prototypes_KW.T / plain.temperature
    targets = torch.softmax(scores + sinkhorn_bias(plain, iterations), -1)[:, teacher.valid_B]
    scores = scores[:, teacher.valid_B].flatten(0, 1)
    q = torch.exp(scores - scores.max()).T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / (q.sum(1, keepdim=True) * K)
        q = q / (q.sum(0, keepdim=True) * q.shape[1])
    assert torch.allclose(targets.flatten(0, 1), (q * q.shape[1]).T, rtol=1e-9)


@pytest.mark.parametrize("iterations", [1, 3])
def test_two_ranks_are_one_problem_and_meet_once_per_iteration_and_once_before(
    monkeypatch: pytest.MonkeyPatch, iterations: int
) -> None:
    *_, teacher = problem()
    plain = dataclasses.replace(teacher, bias_K=torch.zeros(K, dtype=torch.float64))
    assert plain.valid_B is not None
    twice = dataclasses.replace(
        plain, features_GBW=torch.cat([plain.features_GBW] * 2, 1), valid_B=plain.valid_B.repeat(2)
    )
    alone = sinkhorn_bias(twice, iterations)
    met: list[str] = []
    # a second rank that holds the same rows
    monkeypatch.setattr(sinkhorn.collectives, "world_size", lambda: 2)
    monkeypatch.setattr(sinkhorn.collectives, "sum_", lambda x: (met.append("sum"), x * 2)[1])
    monkeypatch.setattr(sinkhorn.collectives, "max_", lambda x: (met.append("max"), x)[1])
    assert torch.allclose(sinkhorn_bias(plain, iterations), alone, rtol=1e-12)
    assert met == ["max", *["sum"] * iterations]


def test_sinkhorn_at_temperature_001_neither_overflows_nor_forgets() -> None:
    features, prototypes = (
        F.normalize(draw(1, 64, W), dim=-1).float(),
        3.0 * F.normalize(draw(K, W), dim=-1).float(),
    )
    cold = TeacherScores(features, prototypes, 0.01, torch.zeros(K))
    bias = sinkhorn_bias(cold, 3)
    wide = TeacherScores(
        features.double(), prototypes.double(), 0.01, torch.zeros(K, dtype=torch.float64)
    )
    assert bool(torch.isfinite(bias).all()) and torch.allclose(
        bias.double(), sinkhorn_bias(wide, 3), atol=2e-2
    )
    no_rows = dataclasses.replace(cold, valid_B=torch.zeros(64, dtype=torch.bool))
    assert bool((sinkhorn_bias(no_rows, 3) == 0).all())


@pytest.mark.parametrize(("rows_at_once", "rows_of_a_piece"), [(3, 2), (100, 3), (100, 100)])
def test_under_autocast_the_products_are_narrow_and_the_rest_is_not(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int, rows_of_a_piece: int
) -> None:
    row_bytes = 4 * K * V
    monkeypatch.setattr(prototype_scores, "CHUNK_BYTES", rows_at_once * row_bytes)
    monkeypatch.setattr(prototype_scores, "PIECE_BYTES", rows_of_a_piece * row_bytes)
    student, prototypes, weight, teacher = problem()
    narrow = [x.detach().float().requires_grad_() for x in (student, prototypes)]
    teacher32 = dataclasses.replace(
        teacher,
        features_GBW=teacher.features_GBW.float(),
        prototypes_KW=teacher.prototypes_KW.float(),
        bias_K=teacher.bias_K.float(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        result = prototype_loss(*narrow, weight.float(), teacher32, STUDENT, True)
    result.value.backward()
    value, ce, _ = written_out(student, prototypes, weight, teacher, True)
    value.backward()
    assert result.value.dtype == result.ce_VB.dtype == narrow[1].grad.dtype == torch.float32
    assert torch.allclose(result.ce_VB.double(), ce, rtol=0.02, atol=0.3)
    for found, wanted in zip(narrow, (student, prototypes), strict=True):
        assert (
            F.cosine_similarity(found.grad.double().flatten(), wanted.grad.flatten(), dim=0) > 0.999
        )


def test_under_autocast_sinkhorn_rounds_products_and_no_sums() -> None:
    features, prototypes = (F.normalize(torch.randn(rows, 16), dim=-1) for rows in (200, 64))
    zero_K = torch.zeros(64)
    scores = (features.bfloat16() @ prototypes.bfloat16().T).float()
    wanted = sinkhorn_bias(TeacherScores(scores[None], torch.eye(64), 0.04, zero_K), 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn_bias(TeacherScores(features[None], prototypes, 0.04, zero_K), 3)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("added_bytes", [1, 4 * W * 3, 1 << 20])
def test_narrow_products_are_added_without_rounding_the_sum(
    monkeypatch: pytest.MonkeyPatch, added_bytes: int
) -> None:
    monkeypatch.setattr(prototype_loss_module, "ADDED_BYTES", added_bytes)
    sums, product = draw(K, W, dtype=torch.float32), draw(K, W, seed=1, dtype=torch.bfloat16)
    wanted = sums + product.float()
    add_narrow(sums, product)
    assert torch.equal(sums, wanted)


@pytest.mark.parametrize("product_bytes", [1, 2 * W * 3, 1 << 20])
def test_in_bf16_the_gradient_of_the_prototypes_does_not_depend_on_how_many_come_at_a_time(
    monkeypatch: pytest.MonkeyPatch, product_bytes: int
) -> None:
    student, prototypes, weight, teacher = problem()
    exact = torch.autograd.grad(
        prototype_loss(student, prototypes, weight, teacher, STUDENT, True).value, prototypes
    )[0]
    floats = [x.detach().float().requires_grad_() for x in (student, prototypes)]
    narrow = TeacherScores(
        teacher.features_GBW.float(),
        teacher.prototypes_KW.float(),
        TEACHER,
        teacher.bias_K.float(),
        teacher.valid_B,
    )

    def found() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value = prototype_loss(*floats, weight.float(), narrow, STUDENT, True).value
        return torch.autograd.grad(value, floats[1])[0]

    whole = found()
    monkeypatch.setattr(prototype_loss_module, "PRODUCT_BYTES", product_bytes)
    # a product of fewer columns may add its terms in another order before it is rounded
    torch.testing.assert_close(found(), whole, rtol=2**-7, atol=2**-7 * whole.abs().max().item())
    assert (found().double() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("gap", [0, 1, 16])
def test_a_gap_between_rows_changes_no_number(monkeypatch: pytest.MonkeyPatch, gap: int) -> None:
    monkeypatch.setattr(prototype_scores, "ROW_GAP", gap)
    student, prototypes, weight, teacher = problem()
    value, ce, _ = written_out(student, prototypes, weight, teacher, cross=True)
    found = prototype_loss(student, prototypes, weight, teacher, STUDENT, cross=True)
    torch.testing.assert_close(found.value, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.ce_VB, ce, rtol=1e-12, atol=1e-12)
    wanted, got = (torch.autograd.grad(x, (student, prototypes)) for x in (value, found.value))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


MEASURE = """
import resource, sys, torch
from tapct.nn.prototype_loss import TeacherScores, prototype_loss
rows, kinds, width = 6000, 16384, 64
make = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape), dim=-1)
student, prototypes = make(1, rows, width).requires_grad_(), make(kinds, width).requires_grad_()
teacher = TeacherScores(make(1, rows, width), make(kinds, width), 0.05, torch.zeros(kinds))
few = TeacherScores(teacher.features_GBW[:, :8], teacher.prototypes_KW, 0.05, teacher.bias_K)
prototype_loss(student[:, :8], prototypes, torch.ones(1, 8), few, 0.1, False).value.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prototype_loss(student, prototypes, torch.ones(1, rows), teacher, 0.1, False).value.backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, 4 * rows * kinds / 2**20)
"""


def test_memory_does_not_grow_with_rows_times_prototypes() -> None:
    done = forked.run(["-c", MEASURE])
    assert done.returncode == 0, done.stderr
    extra, one_matrix = map(float, done.stdout.split())
    assert extra < 2 * prototype_scores.CHUNK_BYTES / 2**20 + 40, f"{extra:.0f} MB"
    assert one_matrix > 370, "the written-out loss would hold several of these"
    assert math.isfinite(extra)
