"""Nearest neighbours equal a loop over all pairs; retrieval equals scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tapct.eval import neighbours


def brute_force(query_QD, known_ND, labels, k, num_classes, temperature, forbidden=None):
    """Probabilities of the vote, one pair at a time."""
    rows = []
    for q, query in enumerate(query_QD):
        pairs = []
        for n, known in enumerate(known_ND):
            if forbidden is not None and forbidden[q][n]:
                continue
            cosine = float(query @ known / np.linalg.norm(query) / np.linalg.norm(known))
            pairs.append((cosine, labels[n]))
        votes = np.zeros(num_classes)
        for cosine, label in sorted(pairs, reverse=True)[:k]:
            votes[label] += math.exp(cosine / temperature)
        rows.append(votes / votes.sum())
    return np.array(rows)


@pytest.mark.parametrize("k", [1, 4, 500])
@pytest.mark.parametrize("with_forbidden", [False, True])
def test_the_vote_equals_brute_force(
    monkeypatch: pytest.MonkeyPatch, k: int, with_forbidden: bool
) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", 3)
    rng = np.random.default_rng(0)
    query_QD, known_ND = rng.normal(size=(7, 5)), rng.normal(size=(20, 5))
    labels = rng.integers(3, size=20)
    forbidden = rng.random((7, 20)) < 0.4 if with_forbidden else None
    unit_QD, unit_ND = (
        neighbours.unit(torch.from_numpy(one).float()) for one in (query_QD, known_ND)
    )
    blocked = None if forbidden is None else torch.from_numpy(forbidden)
    similarity_QK, number_QK = neighbours.nearest(unit_QD, unit_ND, k, blocked)
    voted = neighbours.vote(similarity_QK, torch.from_numpy(labels)[number_QK], k, 3, 0.07)
    expected = brute_force(query_QD, known_ND, labels, k, 3, 0.07, forbidden)
    assert voted.numpy() == pytest.approx(expected, abs=1e-5)


def test_nobody_votes_where_all_are_forbidden() -> None:
    unit = neighbours.unit(torch.ones(2, 3))
    similarity, number = neighbours.nearest(unit, unit, 2, torch.ones(2, 2, dtype=torch.bool))
    voted = neighbours.vote(similarity, torch.tensor([0, 1])[number], 2, 2, 0.07)
    assert (voted == 0.5).all()


def test_the_retrieval_equals_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(1)
    similarity_N, is_relevant_N = rng.random(30), rng.random(30) < 0.3
    order = np.argsort(-similarity_N)
    value = neighbours.average_precision(is_relevant_N[order])
    assert value == pytest.approx(average_precision_score(is_relevant_N, similarity_N))
    assert math.isnan(neighbours.average_precision(np.zeros(3, dtype=bool)))
    found = neighbours.precision_at(np.array([True, False, True, True]), (1, 2, 10))
    assert found == {1: 1.0, 2: 0.5, 10: 0.75}
