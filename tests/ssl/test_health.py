from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from tapct.ssl import health
from tapct.ssl.health import TermReading, target_health, verdict
from tapct.types import TargetSums

K = 8


def target_sums(targets: torch.Tensor, real: torch.Tensor | None = None) -> TargetSums:
    """Sums over targets that are written out."""
    kept = targets if real is None else targets[real]
    entropies = -torch.xlogy(kept, kept).sum()
    return TargetSums(kept.sum(0), entropies, torch.tensor(float(len(kept))))


def numbers(targets: torch.Tensor, real: torch.Tensor | None = None) -> dict[str, float]:
    found = target_health(target_sums(targets, real))
    return {field.name: float(getattr(found, field.name)) for field in dataclasses.fields(found)}


def one_hot(prototype: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(prototype), K).float()


def test_uniform_targets_have_full_entropies_and_no_information() -> None:
    found = numbers(torch.full((24, K), 1 / K))
    assert found["marginal_entropy"] == pytest.approx(math.log(K), abs=1e-6)
    assert found["target_entropy"] == pytest.approx(math.log(K), abs=1e-6)
    assert found["information"] == pytest.approx(0, abs=1e-6)
    assert found["prototypes_used"] == 1


def test_collapsed_targets_have_no_entropy_and_no_information() -> None:
    found = numbers(one_hot([3] * 24))
    assert found == {
        "marginal_entropy": 0,
        "target_entropy": 0,
        "information": 0,
        "prototypes_used": 1 / K,
    }


def test_balanced_one_hot_targets_have_all_information() -> None:
    found = numbers(one_hot(list(range(K)) * 3))
    assert found["information"] == pytest.approx(math.log(K), abs=1e-6)
    assert found["target_entropy"] == 0
    assert found["prototypes_used"] == 1


def test_information_equals_mean_divergence_from_the_mean_target() -> None:
    targets = torch.softmax(torch.randn(50, K, generator=torch.Generator().manual_seed(1)) * 3, 1)
    rows = targets.double().numpy()
    mean, divergence = rows.mean(0), 0.0
    for row in rows:  # I = mean_i KL(t_i || mean)
        for k in range(K):
            divergence += row[k] * math.log(row[k] / mean[k]) / len(rows)
    found = numbers(targets)
    assert found["information"] == pytest.approx(divergence, abs=1e-5)
    assert found["marginal_entropy"] == pytest.approx(-(mean * np.log(mean)).sum(), abs=1e-5)
    assert found["prototypes_used"] == np.mean([m > 0.1 / K for m in mean])


def test_sums_of_chunks_equal_the_whole_and_padded_rows_do_not_count() -> None:
    targets = torch.softmax(torch.randn(30, K, generator=torch.Generator().manual_seed(2)) * 4, 1)
    real = torch.arange(30) % 3 > 0
    whole = numbers(targets[real])
    sums = target_sums(targets[:11], real[:11]) + target_sums(targets[11:], real[11:])
    assert float(sums.rows) == 20
    for name, value in whole.items():
        assert float(getattr(target_health(sums), name)) == pytest.approx(value, abs=1e-5), name
    assert numbers(targets, torch.zeros(30, dtype=torch.bool))["information"] == 0


def test_prototypes_below_a_tenth_of_their_share_are_not_in_use() -> None:
    row = torch.tensor([0.2 / K, 0.05 / K] + [0.0] * (K - 3) + [1 - 0.25 / K])
    assert numbers(row.repeat(5, 1))["prototypes_used"] == 2 / K


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_rankme_of_equal_singular_values_is_the_rank(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left = torch.linalg.qr(torch.randn(100, rank, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(32, rank, generator=generator))[0]
    assert float(health.rankme(7 * left @ right.T)) == pytest.approx(rank, rel=1e-3)


def test_rankme_equals_numpy_on_the_same_evenly_spaced_rows() -> None:
    features = (
        torch.randn(1500, 40, generator=torch.Generator().manual_seed(4))
        * torch.linspace(0.1, 3, 40)
        + 1
    )
    sigma = np.linalg.svd(features.double().numpy()[::3], compute_uv=False)
    share = sigma / sigma.sum() + 1e-7
    assert float(health.rankme(features)) == pytest.approx(
        math.exp(-(share * np.log(share)).sum()), rel=1e-4
    )
    assert float(health.rankme(torch.zeros(10, 4))) < 1.1


def test_cosine_of_matching_rows() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    teacher = torch.tensor([[5.0, 0.0], [1.0, 1.0]])
    assert float(health.teacher_student_cosine(student, teacher)) == pytest.approx(
        (1 + math.sqrt(0.5)) / 2
    )


def test_cls_std_is_one_over_root_d_when_spread_and_zero_when_collapsed() -> None:
    spread = torch.randn(4000, 64, generator=torch.Generator().manual_seed(5))
    assert float(health.cls_std(health.cls_moments(spread))) == pytest.approx(1 / 8, rel=0.02)
    assert (
        float(health.cls_std(health.cls_moments(torch.arange(1.0, 9.0)[:, None] * spread[:1])))
        < 1e-6
    )
    assert float(health.cls_std(health.cls_moments(spread[:1]))) == 0


def test_outliers_are_the_tokens_with_a_norm_far_above_the_others() -> None:
    generator = torch.Generator().manual_seed(6)
    patches = torch.randn(4, 250, 32, generator=generator)
    assert float(health.patch_norm_outliers(patches)) == 0
    patches[1, :20] *= 10
    assert float(health.patch_norm_outliers(patches)) == pytest.approx(0.02)
    patches[2, :20] *= 0.01  # small norms are not the sign
    assert float(health.patch_norm_outliers(patches)) == pytest.approx(0.02)
    nearly_equal = torch.ones(100, 4)
    nearly_equal[0] = 1.001
    assert float(health.patch_norm_outliers(nearly_equal)) == 0


def reading(
    ln_k_minus_ce: float, marginal: float, target: float, name: str = "dino"
) -> TermReading:
    return TermReading(name, ln_k_minus_ce, marginal, target, ln_k=math.log(256))


@pytest.mark.parametrize(
    ("term", "state"),
    [
        (reading(0.001, 5.54, 5.53), "stuck"),
        (reading(-0.3, 5.54, 5.53), "stuck"),
        (reading(5.5, 0.02, 0.01), "collapsed"),
        (reading(2.0, 3.5, 3.49), "collapsed"),
        (reading(1.1, 5.3, 4.0), "alive"),
        (reading(0.1, 5.3, 5.2), "faint"),
        (reading(-0.1, 5.3, 4.0), "not following"),
        (reading(float("nan"), 5.3, 4.0), "not finite"),
        (reading(1.0, float("inf"), 4.0), "not finite"),
    ],
)
def test_verdict_distinguishes_life_from_stuck_and_collapsed(term: TermReading, state: str) -> None:
    found = verdict([term])
    assert found.state == state
    assert found.next_step
    assert found.words.startswith("dino: ")


def test_the_worst_term_gives_the_state_and_all_terms_are_heard() -> None:
    found = verdict([reading(1.1, 5.3, 4.0), reading(0.0, 5.54, 5.53, "ibot")])
    assert found.state == "stuck"
    assert "dino: " in found.words and "ibot: " in found.words
    assert verdict([]).state == "unknown"


def test_constructed_targets_get_the_verdict_they_were_made_for() -> None:
    def verdict_of(targets: torch.Tensor, student_log: torch.Tensor) -> str:
        found = numbers(targets)
        ce = float(-(targets * student_log).sum(1).mean())
        term = TermReading(
            "dino",
            math.log(K) - ce,
            found["marginal_entropy"],
            found["target_entropy"],
            math.log(K),
        )
        return verdict([term]).state

    uniform = torch.full((24, K), 1 / K)
    balanced, same = one_hot(list(range(K)) * 3), one_hot([3] * 24)
    assert verdict_of(uniform, uniform.log()) == "stuck"
    assert verdict_of(same, (same * 0.9 + 0.1 / K).log()) == "collapsed"
    assert verdict_of(balanced, (balanced * 0.9 + 0.1 / K).log()) == "alive"
    assert verdict_of(balanced, uniform.log()) == "not following"
