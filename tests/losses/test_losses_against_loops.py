"""Every loss against a slow float64 loop written from the formula."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tapct.base.exits import UserError
from tapct.losses import dino, ibot, koleo
from tapct.nn import heads
from tapct.nn.prototype_scores import TeacherScores
from tapct.nn.prototypes import TargetConfig, Targets
from tapct.nn.sinkhorn import sinkhorn_bias
from tapct.types import Masks, Tokens, TokenSets

B, DIM, K, N, LOCALS = 3, 5, 7, 6, 3
HEAD = heads.Config(num_prototypes=K, hidden=8, bottleneck=4)
TEMP = 0.05


def tokens(batch: int, seed: int) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    return Tokens(make(batch, DIM), make(batch, 2, DIM), make(batch, N, DIM), (1, 2, 3))


def token_sets(
    num_locals: int = LOCALS,
    counts: tuple[int, ...] = (2, 0, 4, 0, 3, 1),
    padded: int | None = None,
) -> TokenSets:
    draw = torch.Generator().manual_seed(9)
    masked = torch.zeros(2 * B, N, dtype=torch.bool)
    weights = []
    for crop, count in enumerate(counts):
        masked[crop, torch.randperm(N, generator=draw)[:count]] = True
        weights += [1.0 / max(count, 1)] * count
    weight_M = torch.tensor(weights, dtype=torch.float64)
    if padded is not None:
        weight_M[padded] = 0.0
    masks = Masks(masked.unflatten(0, (2, B)), masked.flatten().nonzero().squeeze(1), weight_M)
    return TokenSets(
        student_global=tokens(2 * B, 1),
        student_local=tokens(num_locals * B, 2) if num_locals else None,
        teacher_global=tokens(2 * B, 3),
        masks=masks,
        num_globals=2,
        num_locals=num_locals,
        teacher_temp=TEMP,
    )


def head(seed: int, last_layer: str = "weight_norm") -> heads.PrototypeHead:
    made = heads.PrototypeHead(DIM, dataclasses.replace(HEAD, last_layer=last_layer))
    made.init_weights(seed)
    return made.double()


def softmax_loop(logits: list[float]) -> list[float]:
    top = max(logits)
    parts = [math.exp(x - top) for x in logits]
    return [x / sum(parts) for x in parts]


def ce_loop(student: list[float], target: list[float], temp: float = 0.1) -> float:
    top = max(x / temp for x in student)
    log_sum = top + math.log(sum(math.exp(x / temp - top) for x in student))
    return -sum(t * (x / temp - log_sum) for x, t in zip(student, target, strict=True))


def sinkhorn_loop(logits: list[list[float]], temp: float, iterations: int) -> list[list[float]]:
    """SwAV's recipe on the K x n matrix of exponentials, as fidelity states it."""
    n, k = len(logits), len(logits[0])
    q = [[math.exp(logits[i][j] / temp) for i in range(n)] for j in range(k)]
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        q = [[x / (sum(row) * k) for x in row] for row in q]
        columns = [sum(q[j][i] for j in range(k)) for i in range(n)]
        q = [[q[j][i] / (columns[i] * n) for i in range(n)] for j in range(k)]
    return [[q[j][i] * n for j in range(k)] for i in range(n)]


def sinkhorn(logits: torch.Tensor, temp: float, iterations: int) -> torch.Tensor:
    """Targets of logits that are written out: features times the identity."""
    kinds = logits.shape[1]
    zero = torch.zeros(kinds, dtype=logits.dtype)
    plain = TeacherScores(logits[None], torch.eye(kinds, dtype=logits.dtype), temp, zero)
    return torch.softmax(logits / temp + sinkhorn_bias(plain, iterations), dim=1)


def targets_loop(kind: str, logits: torch.Tensor, centre: list[float]) -> list[list[float]]:
    rows = logits.tolist()
    if kind == "sinkhorn":
        return sinkhorn_loop(rows, TEMP, 3)
    return [
        softmax_loop([(x - c) / TEMP for x, c in zip(row, centre, strict=True)]) for row in rows
    ]


@pytest.mark.parametrize("kind", ["centring", "sinkhorn"])
@pytest.mark.parametrize("num_locals", [0, LOCALS])
@pytest.mark.parametrize("last_layer", ["weight_norm", "plain"])
def test_dino_equals_the_loop_over_pairs(kind: str, num_locals: int, last_layer: str) -> None:
    sets, student_head, teacher_head = (
        token_sets(num_locals),
        head(1, last_layer),
        head(2, last_layer),
    )
    loss = dino.build(dino.Config(head=HEAD, weight=0.7, targets=TargetConfig(kind=kind))).double()
    loss.targets.centre_K.copy_(torch.linspace(-0.3, 0.2, K))
    result = loss(sets, student_head, teacher_head)

    with torch.no_grad():
        target = targets_loop(
            kind, teacher_head(sets.teacher_global.cls_BD), loss.targets.centre_K.tolist()
        )
        student = student_head(sets.student_global.cls_BD).tolist()
        local = student_head(sets.student_local.cls_BD).tolist() if num_locals else []
    num_terms = 2 + 2 * num_locals
    global_pairs = [
        ce_loop(student[g * B + b], target[(1 - g) * B + b]) for g in range(2) for b in range(B)
    ]
    local_pairs = [
        ce_loop(local[v * B + b], target[g * B + b])
        for v in range(num_locals)
        for g in range(2)
        for b in range(B)
    ]
    found = {term.name: term for term in result.terms}
    assert float(found["dino_global"].value) == pytest.approx(
        0.7 * sum(global_pairs) / B / num_terms, rel=1e-10
    )
    assert float(found["dino_global"].cross_entropy) == pytest.approx(
        sum(global_pairs) / len(global_pairs), rel=1e-10
    )
    assert ("dino_local" in found) == bool(num_locals)
    if num_locals:
        assert float(found["dino_local"].value) == pytest.approx(
            0.7 * sum(local_pairs) / B / num_terms, rel=1e-10
        )
        assert float(found["dino_local"].cross_entropy) == pytest.approx(
            sum(local_pairs) / len(local_pairs), rel=1e-10
        )
    assert result.targets is not None
    all_pairs = global_pairs + local_pairs
    assert float(result.targets.cross_entropy) == pytest.approx(
        sum(all_pairs) / len(all_pairs), rel=1e-10
    )


@pytest.mark.parametrize("kind", ["centring", "sinkhorn"])
@pytest.mark.parametrize("padded", [None, 3])
@pytest.mark.parametrize("last_layer", ["weight_norm", "plain"])
def test_ibot_equals_the_loop_over_masked_patches(
    kind: str, padded: int | None, last_layer: str
) -> None:
    sets, student_head, teacher_head = (
        token_sets(padded=padded),
        head(1, last_layer),
        head(2, last_layer),
    )
    loss = ibot.build(ibot.Config(head=HEAD, weight=0.6, targets=TargetConfig(kind=kind))).double()
    loss.targets.centre_K.copy_(torch.linspace(-0.3, 0.2, K))
    result = loss(sets, student_head, teacher_head)

    real = [m for m in range(len(sets.masks.weight_M)) if m != padded]
    with torch.no_grad():
        rows = sets.masks.index_M[real]
        logits = teacher_head(sets.teacher_global.patches_BND.reshape(-1, DIM)[rows])
        target = targets_loop(kind, logits, loss.targets.centre_K.tolist())
        student = student_head(sets.student_global.patches_BND.reshape(-1, DIM)[rows]).tolist()
    pairs = [ce_loop(s, t) for s, t in zip(student, target, strict=True)]
    expected = (
        0.6
        * sum(float(sets.masks.weight_M[m]) * ce for m, ce in zip(real, pairs, strict=True))
        / (2 * B)
    )
    assert float(result.terms[0].value) == pytest.approx(expected, rel=1e-10)
    assert float(result.terms[0].cross_entropy) == pytest.approx(sum(pairs) / len(pairs), rel=1e-10)
    assert result.targets is not None and float(result.targets.sums.rows) == len(real)
    entropy = sum(-t * math.log(t) for row in target for t in row if t > 0)
    assert float(result.targets.sums.entropy) == pytest.approx(entropy, rel=1e-5)


def test_ibot_without_a_masked_patch_is_zero_and_still_connected() -> None:
    sets, student_head = token_sets(counts=(0,) * 6), head(1)
    result = ibot.build(ibot.Config(head=HEAD)).double()(sets, student_head, head(2))
    assert float(result.terms[0].value) == 0.0
    result.terms[0].value.backward()
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in student_head.parameters())


def test_koleo_equals_the_loop_over_neighbours() -> None:
    sets = token_sets()
    result = koleo.build(koleo.Config(weight=0.2))(sets)
    total = 0.0
    for crop in range(2):
        rows = sets.student_global.cls_BD[crop * B : (crop + 1) * B].tolist()
        unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
        for i in range(B):
            others = [j for j in range(B) if j != i]
            nearest = max(
                others, key=lambda j: sum(a * b for a, b in zip(unit[i], unit[j], strict=True))
            )
            distance = math.sqrt(
                sum((a - b + 1e-8) ** 2 for a, b in zip(unit[i], unit[nearest], strict=True))
            )
            total -= math.log(distance + 1e-8) / B
    assert float(result.terms[0].value) == pytest.approx(0.2 * total, rel=1e-10)


def test_koleo_of_one_sample_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match="train.global_batch"):
        koleo.koleo(torch.randn(1, 4))


def test_koleo_keeps_float32_under_autocast_and_for_equal_rows() -> None:
    cls_BD = torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = koleo.koleo(cls_BD)
    value.backward()
    assert (
        value.dtype == torch.float32
        and torch.isfinite(value)
        and bool(torch.isfinite(cls_BD.grad).all())
    )


def test_sinkhorn_survives_unequal_gains_at_low_temperature() -> None:
    logits = (
        torch.randn(12, K, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-1, 1.5, 12)[:, None]
    )
    found = sinkhorn(logits, 0.01, 3)
    assert bool(torch.isfinite(found).all())
    assert found.sum(1).tolist() == pytest.approx([1.0] * 12, abs=1e-5)
    wide = sinkhorn(logits.double(), 0.01, 3)
    assert float((found - wide).abs().max()) < 1e-3


def test_a_per_row_maximum_would_not_be_the_same_after_three_iterations() -> None:
    """The known wrong 'fix' for overflow: it changes the answer, so the implementation must not use
    it.
    """
    draw = torch.Generator().manual_seed(4)
    logits, gain = (torch.randn(8, width, generator=draw, dtype=torch.float64) for width in (K, 1))
    logits = logits + gain
    shifted = logits - logits.max(dim=1, keepdim=True).values
    assert float((sinkhorn(logits, 0.3, 3) - sinkhorn(shifted, 0.3, 3)).abs().max()) > 1e-3


def test_the_centre_moves_once_per_step_over_all_micro_batches_and_acts_in_the_next() -> None:
    draw = torch.Generator().manual_seed(5)
    one, two = torch.randn(4, K, generator=draw), torch.randn(2, K, generator=draw)
    targets = Targets(K, TargetConfig(centre_momentum=0.9))
    eye = torch.eye(K)  # scores are features times prototypes
    first = targets.scores(one[None], eye, TEMP)
    assert bool((first.bias_K == 0).all()) and first.temperature == TEMP, "step 0 has centre 0"
    targets.scores(two[None], eye, TEMP)
    assert bool((targets.centre_K == 0).all()), "nothing moves within a step"
    targets.finish_step(torch.tensor(True))
    expected = 0.1 * torch.cat([one, two]).mean(0)
    assert torch.allclose(targets.centre_K, expected, atol=1e-7)
    second = targets.scores(one[None], eye, TEMP)
    assert torch.allclose(one / TEMP + second.bias_K, (one - expected) / TEMP, atol=1e-5)
    targets.finish_step(torch.tensor(False))
    assert torch.allclose(targets.centre_K, expected, atol=1e-7), (
        "a step that was refused leaves the centre"
    )
    assert float(targets.pending_count) == 0


@pytest.mark.parametrize("last_layer", ["weight_norm", "plain"])
def test_gradients_reach_student_and_not_teacher(last_layer: str) -> None:
    sets = token_sets()
    student_head, teacher_head = head(1, last_layer), head(2, last_layer)
    for build, config in (
        (dino.build, dino.Config(head=HEAD)),
        (ibot.build, ibot.Config(head=HEAD)),
    ):
        loss = build(config).double()
        torch.stack(
            [term.value for term in loss(sets, student_head, teacher_head).terms]
        ).sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student_head.parameters()
    )
    assert all(p.grad is None for p in teacher_head.parameters())
