"""Intervals and p-values from resampled patients: the arithmetic behind `statistics`.

Patients, not scans, are the independent units. A resample draws as many patients as there are, with
replacement, and takes all scans of a drawn patient.

Axes: R resamples, P patients, K parts (e.g. organs).

Sources: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 12 (bootstrap-t) and
    14 (BCa); Hesterberg 2015 (doi:10.1080/00031305.2015.1089789), expanded percentiles; Phipson and
    Smyth 2010 (doi:10.2202/1544-6115.1585), the correction of sampled p-values; Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tapct.base.hashing import hash_int

LEVEL = 0.95
NUM_RESAMPLES = 2000
NUM_FLIPS = 10_000
MAX_EXACT = 13  # 2^13 = 8192 sign vectors, fewer than NUM_FLIPS
BLOCK_VALUES = 2_000_000  # patient counts that one block of resamples may hold
# Weight of the variance of the data in the variance of each resample, as if there were half a
# patient more. Without it, a resample of equal values has no variance and its t is infinite.
SMOOTHING = 0.5


@dataclass(frozen=True)
class Interval:
    """An interval that covers the true value with a probability of about `LEVEL`."""

    low: float
    high: float


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Random numbers by key; equal keys give equal numbers."""
    return np.random.Generator(np.random.PCG64(hash_int(seed, purpose, *counters) % 2**64))


def patient_counts(
    num_patients: int, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Iterator[np.ndarray]:
    """Draw resamples of patients, in blocks.

    Args:
        num_patients: number of patients, P.
        seed: random seed of the evaluation.
        num_resamples: number of resamples over all blocks.
    Yields:
        float64 [R, P]: how often each patient was drawn; each row sums to P.
    """
    rng = generator(seed, "bootstrap of patients", num_patients)
    per_block = max(1, BLOCK_VALUES // num_patients)
    for start in range(0, num_resamples, per_block):
        num = min(per_block, num_resamples - start)
        drawn_RP = rng.integers(0, num_patients, (num, num_patients))
        flat = drawn_RP + np.arange(num)[:, None] * num_patients
        counts = np.bincount(flat.ravel(), minlength=num * num_patients)
        yield counts.reshape(num, num_patients).astype(np.float64)


def mean_of_parts(sum_PK: np.ndarray, count_PK: np.ndarray) -> float:
    """Mean over parts of the mean over scans; a part without scans is left out."""
    count_K = count_PK.sum(0)
    present_K = count_K > 0
    return float((sum_PK.sum(0)[present_K] / count_K[present_K]).mean())


def interval_of_mean(
    sum_PK: np.ndarray,
    count_PK: np.ndarray,
    seed: int,
    limits: tuple[float, float] | None = None,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval | None:
    """Bootstrap-t interval of the mean over parts of the mean over scans.

    The standard error of the data and of each resample is that of the linearised mean, with the
    residuals summed within patients:

        u_P = mean over k of (sum_Pk - mean_k * count_Pk) / (mean over patients of count_Pk)
        variance = sum(u_P^2) / (P (P - 1))

    Args:
        sum_PK: sum of the values of each patient, by part.
        count_PK: number of scans of each patient that have a value, by part; every patient has one.
        seed: random seed of the evaluation.
        limits: lowest and highest possible value; the interval is cut to them.
        num_resamples: number of resamples.
    Returns:
        The interval; None where all patients have the same value, so that no spread can be
        estimated.
    """
    num_patients = len(sum_PK)
    once_RP = np.ones((1, num_patients))
    mean_R, variance_R = _means_and_variances(once_RP, sum_PK, count_PK)
    mean, variance = float(mean_R[0]), float(variance_R[0])
    scale = float(np.abs(sum_PK).max())
    if variance <= (1e-12 * scale) ** 2:
        return None
    t_blocks = []
    for counts_RP in patient_counts(num_patients, seed, num_resamples):
        mean_R, variance_R = _means_and_variances(counts_RP, sum_PK, count_PK)
        smooth_R = (num_patients * variance_R + SMOOTHING * variance) / (num_patients + SMOOTHING)
        t_blocks.append((mean_R - mean) / np.sqrt(smooth_R))
    low_t, high_t = np.quantile(np.concatenate(t_blocks), _tails(LEVEL))
    error = math.sqrt(variance)
    return cut(Interval(mean - float(high_t) * error, mean - float(low_t) * error), limits)


def _means_and_variances(
    counts_RP: np.ndarray, sum_PK: np.ndarray, count_PK: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and its squared standard error in each resample, both [R]; see `interval_of_mean`."""
    num_patients = len(sum_PK)
    scans_RK = counts_RP @ count_PK
    present_RK = scans_RK > 0
    safe_RK = np.where(present_RK, scans_RK, 1.0)
    mean_RK = np.where(present_RK, (counts_RP @ sum_PK) / safe_RK, 0.0)
    num_parts_R = present_RK.sum(1)
    weight_RK = np.where(present_RK, num_patients / safe_RK, 0.0) / num_parts_R[:, None]
    residual_RP = weight_RK @ sum_PK.T - (weight_RK * mean_RK) @ count_PK.T
    squares_R = (counts_RP * residual_RP**2).sum(1)
    return mean_RK.sum(1) / num_parts_R, squares_R / (num_patients * (num_patients - 1))


def bca_interval(
    estimate: float,
    resampled_R: np.ndarray,
    left_out_P: np.ndarray,
    limits: tuple[float, float] | None = None,
) -> Interval | None:
    """Bias-corrected, accelerated percentile interval with levels expanded for few patients.

    Args:
        estimate: value on the data.
        resampled_R: values on the resamples.
        left_out_P: values on the data without one patient each.
        limits: lowest and highest possible value; the interval is cut to them.
    Returns:
        The interval; None where all resamples have the same value.
    """
    if np.ptp(resampled_R) <= 1e-12 * max(abs(estimate), 1.0):
        return None
    normal = NormalDist()
    num_patients = len(left_out_P)
    below = (resampled_R < estimate).mean() + 0.5 * (resampled_R == estimate).mean()
    edge = 1 / (2 * len(resampled_R))
    bias = normal.inv_cdf(float(np.clip(below, edge, 1 - edge)))
    influence_P = left_out_P.mean() - left_out_P
    cubes, squares = float((influence_P**3).sum()), float((influence_P**2).sum())
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0
    reach = math.sqrt(num_patients / (num_patients - 1)) * student_quantile(num_patients - 1)
    levels = []
    for z in (-reach, reach):
        # beyond this the transform folds back; the outermost resample is the answer there
        denominator = max(1 - acceleration * (bias + z), 1e-3)
        levels.append(normal.cdf(bias + (bias + z) / denominator))
    low, high = np.quantile(resampled_R, levels)
    return cut(Interval(float(low), float(high)), limits)


def student_quantile(freedom: int) -> float:
    """Upper 97.5 % quantile of Student's t with 9 or more degrees of freedom, to 1e-3.

    Source: Cornish-Fisher expansion, Abramowitz and Stegun 26.7.5.
    """
    z = NormalDist().inv_cdf(_tails(LEVEL)[1])
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def cut(interval: Interval, limits: tuple[float, float] | None) -> Interval:
    """The interval without the values that the metric cannot take."""
    if limits is None:
        return interval
    return Interval(max(interval.low, limits[0]), min(interval.high, limits[1]))


def sign_vectors(num_patients: int, seed: int, num_flips: int = NUM_FLIPS) -> np.ndarray:
    """Signs for a permutation test: all of them for up to `MAX_EXACT` patients, else drawn ones.

    Returns:
        int8 [R, P] of -1 and 1.
    """
    if num_patients <= MAX_EXACT:
        codes_R1 = np.arange(2**num_patients)[:, None]
        bits_RP = (codes_R1 >> np.arange(num_patients)) & 1
    else:
        rng = generator(seed, "signs of patients", num_patients)
        bits_RP = rng.integers(0, 2, (num_flips, num_patients), dtype=np.int8)
    return (1 - 2 * bits_RP).astype(np.int8)


def flipped_p(observed: float, flipped_R: np.ndarray, *, exact: bool) -> float:
    """Two-sided p-value: share of the flipped statistics that are at least as far from 0.

    Args:
        observed: statistic of the data.
        flipped_R: statistics after flips.
        exact: whether `flipped_R` holds all flips; if not, the data are counted as one more, so
            that p is never 0.
    """
    # 1e-9: the identity must count itself although sums are added in another order
    as_far = int((np.abs(flipped_R) >= abs(observed) * (1 - 1e-9)).sum())
    if exact:
        return as_far / len(flipped_R)
    return (as_far + 1) / (len(flipped_R) + 1)


def sign_flip_p(difference_P: np.ndarray, seed: int) -> float:
    """Two-sided p-value that differences of patients are symmetric about 0.

    Args:
        difference_P: contribution of each patient to the mean difference.
        seed: random seed of the evaluation.
    """
    num_patients = len(difference_P)
    sums_R = sign_vectors(num_patients, seed) @ difference_P
    return flipped_p(float(difference_P.sum()), sums_R, exact=num_patients <= MAX_EXACT)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P-values adjusted for their number, in the same order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def _tails(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2
