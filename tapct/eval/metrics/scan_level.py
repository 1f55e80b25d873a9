"""Metrics of scan-level predictions.

AUROC, AUPRC, balanced accuracy, Brier score and calibration of classes; MAE and R^2 of numbers.

All are functions of (truth, scores) that return a float, NaN where the metric does not exist, so
that `prediction_statistics.metrics` can compute them again on each resample. They are written in
numpy because they run some ten thousand times per comparison; tests compare each with scikit-learn.

Several classes: truth holds class numbers 0 ... C-1 and scores are [N, C]. AUROC and AUPRC are the
unweighted mean over classes of "this class against the rest" (macro, one-vs-rest); classes that no
scan of the truth has, or that all have, are left out of the mean.

Axes: N scans, C classes, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tapct.base.exits import UserError

NUM_BINS = 10
THRESHOLD = 0.5


def auroc(truth_N: np.ndarray, score_N: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scan scores above a negative one.

    Args:
        truth_N: bool or 0 and 1; class numbers where scores are [N, C].
        score_N: [N] score of class 1, or [N, C]; any scale.
    Returns:
        Value in [0, 1], ties count half; NaN where only one class is present.
    """
    return _over_classes(_binary_auroc, truth_N, score_N)


def auprc(truth_N: np.ndarray, score_N: np.ndarray) -> float:
    """Average precision: the mean over positive scans of the precision at their score.

    It is the area under the precision-recall curve by steps, without interpolation. The value of a
    useless model is the share of positive scans, not 0.5.

    Args:
        truth_N, score_N: as in `auroc`.
    """
    return _over_classes(_average_precision, truth_N, score_N)


def balanced_accuracy(truth_N: np.ndarray, score_N: np.ndarray) -> float:
    """Mean over classes of the share of their scans that are predicted correctly.

    Args:
        truth_N: bool, 0 and 1, or class numbers.
        score_N: [N] probability of class 1, predicted where it is at least `THRESHOLD`; or [N, C],
            where the class with the highest score is predicted.
    Returns:
        Value in [0, 1]; NaN where only one class is present, since nothing is balanced then.
    """
    truth_N = _classes(truth_N, score_N)
    right_N = _predicted(score_N) == truth_N
    present = np.unique(truth_N)
    if len(present) < 2:
        return math.nan
    return float(np.mean([right_N[truth_N == label].mean() for label in present]))


def brier(truth_N: np.ndarray, probability_N: np.ndarray) -> float:
    """Brier score: mean squared error of the probabilities; lower is better.

    Args:
        truth_N: bool, 0 and 1, or class numbers.
        probability_N: [N] probability of class 1: the mean of (p - truth)^2, in [0, 1]. Or [N, C]:
            the mean over scans of the sum over classes, in [0, 2].
    Source: Brier 1950, for several classes.
    """
    truth_N = _classes(truth_N, probability_N)
    _check_probabilities(probability_N)
    if probability_N.ndim == 1:
        return float(((probability_N - truth_N) ** 2).mean())
    one_hot_NC = truth_N[:, None] == np.arange(probability_N.shape[1])
    return float(((probability_N - one_hot_NC) ** 2).sum(1).mean())


@dataclass(frozen=True)
class Calibration:
    """Reliability curve.

    Args:
        confidence_B: mean predicted probability of each bin; NaN for an empty bin.
        frequency_B: share of scans of each bin for which the prediction is true.
        count_B: number of scans of each bin.
        error: expected calibration error: mean over scans of |frequency - confidence| of their bin.
    """

    confidence_B: np.ndarray
    frequency_B: np.ndarray
    count_B: np.ndarray
    error: float


def calibration(
    truth_N: np.ndarray, probability_N: np.ndarray, num_bins: int = NUM_BINS
) -> Calibration:
    """Compare predicted probabilities with how often they are right, in bins of equal width.

    Args:
        truth_N: bool, 0 and 1, or class numbers.
        probability_N: [N] probability of class 1, compared with how often class 1 is true; or
            [N, C], where the highest probability is compared with how often its class is true.
        num_bins: number of bins between 0 and 1; a value on an edge belongs to the lower bin.
    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    truth_N = _classes(truth_N, probability_N)
    _check_probabilities(probability_N)
    if probability_N.ndim == 1:
        confidence_N, right_N = probability_N, truth_N == 1
    else:
        confidence_N = probability_N.max(1)
        right_N = _predicted(probability_N) == truth_N
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bin_N = np.searchsorted(edges[1:-1], confidence_N)
    count_B = np.bincount(bin_N, minlength=num_bins)
    sum_B = np.bincount(bin_N, confidence_N, num_bins)
    right_B = np.bincount(bin_N, right_N, num_bins)
    some_B = np.maximum(count_B, 1)
    error = float(np.abs(right_B - sum_B).sum() / max(len(truth_N), 1))
    confidence_B = np.where(count_B > 0, sum_B / some_B, np.nan)
    frequency_B = np.where(count_B > 0, right_B / some_B, np.nan)
    return Calibration(confidence_B, frequency_B, count_B, error)


def mean_absolute_error(truth_N: np.ndarray, predicted_N: np.ndarray) -> float:
    """Mean of |predicted - truth|, in the unit of the truth; lower is better."""
    _check_scores(truth_N, predicted_N)
    return float(np.abs(predicted_N - truth_N).mean())


def r_squared(truth_N: np.ndarray, predicted_N: np.ndarray) -> float:
    """Share of the variance that is explained: 1 - squared error / squared deviation from the mean.

    Returns:
        At most 1; 0 for the mean of these scans as the prediction, negative for worse ones; NaN
        where all true values are equal.
    """
    _check_scores(truth_N, predicted_N)
    total = float(((truth_N - truth_N.mean()) ** 2).sum())
    if total == 0:
        return math.nan
    return 1.0 - float(((predicted_N - truth_N) ** 2).sum()) / total


def _over_classes(
    binary: Callable[[np.ndarray, np.ndarray], float], truth_N: np.ndarray, score_N: np.ndarray
) -> float:
    """Value of a binary metric, or its mean over classes against the rest."""
    truth_N = _classes(truth_N, score_N)
    if score_N.ndim == 1:
        return binary(truth_N == 1, score_N)
    each = [binary(truth_N == label, score_N[:, label]) for label in range(score_N.shape[1])]
    existing = [value for value in each if math.isfinite(value)]
    return float(np.mean(existing)) if existing else math.nan


def _binary_auroc(positive_N: np.ndarray, score_N: np.ndarray) -> float:
    """Mann-Whitney statistic from ranks; equal scores share the mean of their ranks."""
    num_positive = int(positive_N.sum())
    num_negative = len(positive_N) - num_positive
    if not num_positive or not num_negative:
        return math.nan
    _, level_N, count_L = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_L = np.cumsum(count_L) - (count_L - 1) / 2
    rank_sum = float(rank_L[level_N][positive_N].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def _average_precision(positive_N: np.ndarray, score_N: np.ndarray) -> float:
    """Average precision; equal scores enter together. NaN where only one class is present."""
    num_positive = int(positive_N.sum())
    if not num_positive or num_positive == len(positive_N):
        return math.nan
    order = np.argsort(-score_N, kind="stable")
    sorted_N = score_N[order]
    last_N = np.append(sorted_N[1:] != sorted_N[:-1], True)  # last scan of each score
    found_L = np.cumsum(positive_N[order])[last_N]
    taken_L = np.flatnonzero(last_N) + 1
    gained_L = np.diff(found_L, prepend=0)
    return float((gained_L * found_L / taken_L).sum() / num_positive)


def _predicted(score_N: np.ndarray) -> np.ndarray:
    """Predicted class of each scan."""
    if score_N.ndim == 1:
        return (score_N >= THRESHOLD).astype(np.int64)
    return score_N.argmax(1)


def _classes(truth_N: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """Class numbers as int64.

    Raises:
        UserError: they are no class numbers, or do not fit the scores.
    """
    _check_scores(truth_N, score_N)
    num_classes = 2 if score_N.ndim == 1 else score_N.shape[1]
    classes_N = np.asarray(truth_N).astype(np.int64)
    if not len(classes_N):
        return classes_N
    if (classes_N != truth_N).any() or classes_N.min() < 0 or classes_N.max() >= num_classes:
        raise UserError(
            f"true classes {np.unique(truth_N)[:5].tolist()} are not whole numbers from 0 to "
            f"{num_classes - 1}, as scores of shape {score_N.shape} need; number the classes from 0"
        )
    return classes_N


def _check_scores(truth_N: np.ndarray, score_N: np.ndarray) -> None:
    if len(truth_N) != len(score_N) or score_N.ndim > 2:
        raise UserError(
            f"{len(truth_N)} true values and scores of shape {score_N.shape}; expected one score, "
            "or one per class, for each true value"
        )
    if not np.isfinite(score_N).all():
        raise UserError("a score is NaN or infinite; leave out scans without a prediction")


def _check_probabilities(probability_N: np.ndarray) -> None:
    inside = (probability_N >= 0) & (probability_N <= 1)
    if not inside.all():
        worst = probability_N[~inside].ravel()[0]
        raise UserError(
            f"{worst:g} is no probability; give probabilities from 0 to 1, not logits or distances"
        )
    if probability_N.ndim == 2 and (np.abs(probability_N.sum(1) - 1) > 1e-3).any():
        raise UserError(
            "the probabilities of a scan do not add up to 1; apply softmax to the scores"
        )
