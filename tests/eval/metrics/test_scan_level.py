"""Metrics of scan-level predictions equal scikit-learn, with ties and several classes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tapct.base.exits import UserError
from tapct.eval.metrics import scan_level


def binary_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, 40)
    score = np.round(rng.random(40) * 0.7 + 0.3 * truth, 1)  # rounded, so that scores are equal
    return truth, score


def class_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(4), rng.integers(0, 4, 50)])
    logits = rng.normal(size=(54, 4)) + np.eye(4)[truth]
    return truth, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_binary_metrics_equal_scikit_learn(seed: int) -> None:
    from sklearn import metrics

    truth, score = binary_case(seed)
    pairs = [
        (scan_level.auroc, metrics.roc_auc_score),
        (scan_level.auprc, metrics.average_precision_score),
        (scan_level.brier, metrics.brier_score_loss),
        (scan_level.mean_absolute_error, metrics.mean_absolute_error),
        (scan_level.r_squared, metrics.r2_score),
    ]
    for ours, theirs in pairs:
        assert ours(truth, score) == pytest.approx(theirs(truth, score), abs=1e-12)
    predicted = score >= 0.5
    expected = metrics.balanced_accuracy_score(truth, predicted)
    assert scan_level.balanced_accuracy(truth, score) == pytest.approx(expected, abs=1e-12)
    assert scan_level.auroc(truth.astype(bool), score) == scan_level.auroc(truth, score)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_several_classes_equal_scikit_learn(seed: int) -> None:
    from sklearn import metrics

    truth, score = class_case(seed)
    expected = metrics.roc_auc_score(truth, score, multi_class="ovr", average="macro")
    assert scan_level.auroc(truth, score) == pytest.approx(expected, abs=1e-12)
    expected = metrics.average_precision_score(truth, score, average="macro")
    assert scan_level.auprc(truth, score) == pytest.approx(expected, abs=1e-12)
    expected = metrics.balanced_accuracy_score(truth, score.argmax(1))
    assert scan_level.balanced_accuracy(truth, score) == pytest.approx(expected, abs=1e-12)
    # mean over all entries of a one-hot matrix, times the number of classes
    expected = metrics.mean_squared_error(np.eye(4)[truth], score) * 4
    assert scan_level.brier(truth, score) == pytest.approx(expected, abs=1e-12)


def test_a_class_without_scans_is_left_out_of_the_macro_mean() -> None:
    truth, score = class_case(0)
    kept = truth != 3
    each = [scan_level.auroc(truth[kept] == label, score[kept, label]) for label in range(3)]
    assert scan_level.auroc(truth[kept], score[kept]) == pytest.approx(np.mean(each))


def test_the_reliability_curve_equals_scikit_learn() -> None:
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(0)
    probability = rng.random(500)
    truth = (rng.random(500) < probability**2).astype(int)
    found = scan_level.calibration(truth, probability)
    frequency, confidence = calibration_curve(truth, probability, n_bins=10)
    np.testing.assert_allclose(found.frequency_B, frequency, atol=1e-12)
    np.testing.assert_allclose(found.confidence_B, confidence, atol=1e-12)
    by_hand = found.count_B / 500 * np.abs(frequency - confidence)
    assert found.error == pytest.approx(by_hand.sum(), abs=1e-12)
    assert found.count_B.sum() == 500


def test_the_calibration_error_of_a_simulated_model_is_the_one_it_was_made_with() -> None:
    """True with probability p - 0.1 where the model claims p, so the error is 0.1."""
    rng = np.random.default_rng(1)
    probability = rng.uniform(0.2, 0.9, 200_000)
    truth = (rng.random(200_000) < probability - 0.1).astype(int)
    assert scan_level.calibration(truth, probability).error == pytest.approx(0.1, abs=0.005)


def test_calibration_of_several_classes_is_that_of_the_predicted_class() -> None:
    truth, score = class_case(1)
    right = (score.argmax(1) == truth).astype(int)
    expected = scan_level.calibration(right, score.max(1))
    found = scan_level.calibration(truth, score)
    np.testing.assert_array_equal(found.frequency_B, expected.frequency_B)
    assert found.error == expected.error
    assert np.isnan(found.frequency_B[found.count_B == 0]).all()


def test_one_class_has_no_value() -> None:
    truth, score = np.ones(4, int), np.array([0.1, 0.2, 0.3, 0.4])
    for metric in (scan_level.auroc, scan_level.auprc, scan_level.balanced_accuracy):
        assert math.isnan(metric(truth, score))
        assert math.isnan(metric(1 - truth, score))
    assert math.isnan(scan_level.r_squared(np.ones(4), score))


@pytest.mark.parametrize(
    ("metric", "truth", "score", "message"),
    [
        (scan_level.auroc, [0, 1, 2], [0.1, 0.2, 0.3], "whole numbers from 0 to 1"),
        (scan_level.auroc, [0, 0.5], [0.1, 0.2], "whole numbers"),
        (scan_level.auroc, [0, 1], [0.1, 0.2, 0.3], "expected one score"),
        (scan_level.auroc, [0, 1], [0.1, math.nan], "NaN or infinite"),
        (scan_level.brier, [0, 1], [0.1, 1.2], "1.2 is no probability"),
        (scan_level.brier, [0, 1], [[0.1, 0.2], [0.5, 0.5]], "add up to 1"),
        (scan_level.calibration, [0, 1], [-3.0, 0.5], "-3 is no probability"),
    ],
)
def test_bad_input_is_an_error(metric, truth, score, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        metric(np.array(truth), np.array(score))
