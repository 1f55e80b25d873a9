"""Nearest neighbours by cosine similarity: the vote of DINOv2, and the quality of a retrieval.

Axes: Q queries, N known vectors, D channels, K neighbours in order, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 256  # queries at a time


def unit(vectors_ND: Tensor) -> Tensor:
    """Vectors of length 1; a vector of zeros stays as it is."""
    return torch.nn.functional.normalize(vectors_ND, dim=1)


def nearest(
    query_QD: Tensor, known_ND: Tensor, most: int, forbidden_QN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The most similar vectors of each query, in descending order.

    Args:
        query_QD: float32, of length 1.
        known_ND: float32, of length 1.
        most: number of neighbours, at most N.
        forbidden_QN: bool, True for vectors that are no neighbours of a query, such as those of the
            same patient.
    Returns:
        Cosine similarities (Q, K), -inf for a forbidden one, and numbers of the vectors (Q, K).
    """
    most = min(most, len(known_ND))
    similarities, numbers = [], []
    for first in range(0, len(query_QD), CHUNK):
        similarity_QN = query_QD[first : first + CHUNK] @ known_ND.T
        if forbidden_QN is not None:
            similarity_QN.masked_fill_(forbidden_QN[first : first + CHUNK], -torch.inf)
        best = similarity_QN.topk(most, dim=1)
        similarities.append(best.values)
        numbers.append(best.indices)
    return torch.cat(similarities), torch.cat(numbers)


def vote(
    similarity_QK: Tensor, label_QK: Tensor, k: int, num_classes: int, temperature: float
) -> Tensor:
    """Probabilities of classes from the k nearest neighbours, weighted by exp(similarity / T).

    Args:
        similarity_QK: cosine similarities, descending; -inf does not vote.
        label_QK: int64 classes of the neighbours.
        k: number of neighbours, as far as there are that many.
        num_classes: number of classes.
        temperature: T.
    Returns:
        float64 (Q, C); rows sum to 1, equal probabilities where nobody votes.
    Source: Oquab et al. 2024, arXiv:2304.07193, k-NN evaluation.
    """
    similarity_QK, label_QK = similarity_QK[:, :k].double(), label_QK[:, :k]
    weight_QK = ((similarity_QK - similarity_QK[:, :1]) / temperature).exp().nan_to_num(0.0)
    votes_QC = torch.zeros(len(label_QK), num_classes, dtype=torch.float64)
    votes_QC.scatter_add_(1, label_QK, weight_QK)
    total_Q1 = votes_QC.sum(1, keepdim=True)
    return torch.where(total_Q1 > 0, votes_QC / total_Q1, 1.0 / num_classes)


def average_precision(is_relevant_K: np.ndarray) -> float:
    """Mean of the precision at each relevant item of a whole ranking; NaN without any.

    Args:
        is_relevant_K: bool, from the most similar item to the least.
    """
    place_R = np.flatnonzero(is_relevant_K) + 1
    if not len(place_R):
        return float("nan")
    return float((np.arange(1, len(place_R) + 1) / place_R).mean())


def precision_at(is_relevant_K: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    """Share of relevant items among the first k, for each k; among all where there are fewer."""
    return {k: float(is_relevant_K[:k].mean()) for k in ks}
