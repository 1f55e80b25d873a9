"""Intervals cover the truth, p-values are right under no difference, patients stay together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tapct.base.exits import UserError
from tapct.eval import intervals, statistics
from tapct.eval.metrics import prediction_statistics, scan_level
from tapct.eval.metrics.prediction_statistics import ScanPredictions
from tapct.eval.scores import ScanScore
from tapct.eval.statistics import ScanTable

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def table(num_patients: int, seed: int = 0, num_seeds: int = 1, num_parts: int = 1) -> ScanTable:
    """Two scans per patient; `pretrained` is 0.1 better than `raw_hu`."""
    rng = np.random.default_rng(seed)
    patients = tuple(f"p{index // 2:03}" for index in range(2 * num_patients))
    scans = tuple(f"s{index:03}" for index in range(2 * num_patients))
    base = rng.beta(6, 3, (num_seeds, len(scans), num_parts))
    noise = rng.normal(0.1, 0.05, base.shape)
    return ScanTable(
        scans,
        patients,
        tuple(f"organ{part}" for part in range(num_parts)),
        {"pretrained": base, "raw_hu": base - noise},
    )


# --- intervals ------------------------------------------------------------------------------------


def one_scan_each(values_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values_P[:, None], np.ones((len(values_P), 1))


def skewed_dice(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    return one_scan_each(rng.beta(6, 2, num))


def low_dice(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    return one_scan_each(rng.beta(1.2, 4, num))


def skewed_difference(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    return one_scan_each(0.1 * rng.gamma(2, 1, num) - 0.1 + rng.normal(0, 0.03, num))


def clustered_dice(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """One to five scans per patient, which resemble each other."""
    count_P = rng.integers(1, 6, num)
    logit_P5 = rng.normal(1.2, 0.8, (num, 1)) + rng.normal(0, 0.6, (num, 5))
    value_P5 = 1 / (1 + np.exp(-logit_P5)) * (np.arange(5) < count_P[:, None])
    return value_P5.sum(1, keepdims=True), count_P[:, None].astype(np.float64)


def dice_of_organs(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Five organs, two of them not in every scan."""
    level_PK = np.array([2.0, 1.0, 0.5, -0.5, 1.5]) + rng.normal(0, 0.6, (num, 1))
    value_PK = 1 / (1 + np.exp(-level_PK - rng.normal(0, 0.7, (num, 5))))
    has_PK = rng.random((num, 5)) < [1, 1, 0.9, 0.7, 1]
    return np.where(has_PK, value_PK, 0.0), has_PK.astype(np.float64)


def coverage(draw: Draw, num_patients: int, num_repeats: int) -> float:
    """Share of repeated studies whose interval holds the true value, in percent."""
    truth = intervals.mean_of_parts(*draw(np.random.default_rng(1), 200_000))
    rng = np.random.default_rng(2)
    hits = 0
    for repeat in range(num_repeats):
        interval = intervals.interval_of_mean(*draw(rng, num_patients), repeat)
        hits += interval is not None and interval.low <= truth <= interval.high
    return 100 * hits / num_repeats


@pytest.mark.parametrize("draw", [skewed_dice, clustered_dice])
def test_the_interval_covers_the_truth_in_95_of_100_studies_of_12_patients(draw: Draw) -> None:
    assert 92 <= coverage(draw, 12, 300) <= 98  # 95 within 2.4 standard errors of 1.26


@pytest.mark.slow
@pytest.mark.parametrize("num_patients", [10, 20, 100])
@pytest.mark.parametrize(
    "draw", [skewed_dice, low_dice, skewed_difference, clustered_dice, dice_of_organs]
)
def test_coverage_is_93_to_97_percent(draw: Draw, num_patients: int) -> None:
    num_repeats = 2000 if num_patients < 100 else 1000
    assert 93 <= coverage(draw, num_patients, num_repeats) <= 97


def test_the_interval_is_that_of_a_loop_over_resamples() -> None:
    """Bootstrap-t written from its definition: scans listed, drawn and averaged one by one."""
    rng = np.random.default_rng(3)
    scans_of = [rng.beta(5, 2, rng.integers(1, 4)) for _ in range(11)]

    def mean_and_error(drawn: list[np.ndarray]) -> tuple[float, float]:
        mean = float(np.concatenate(drawn).mean())
        size = np.mean([len(scans) for scans in drawn])
        residuals = [(scans - mean).sum() / size for scans in drawn]
        return mean, math.sqrt(np.square(residuals).sum() / (11 * 10))

    mean, error = mean_and_error(scans_of)
    ts = []
    for counts_RP in intervals.patient_counts(11, seed=7):
        for counts_P in counts_RP.astype(int):
            drawn = [scans for scans, times in zip(scans_of, counts_P) for _ in range(times)]
            again, its_error = mean_and_error(drawn)
            smooth = math.sqrt((11 * its_error**2 + 0.5 * error**2) / 11.5)
            ts.append((again - mean) / smooth)
    low_t, high_t = np.quantile(ts, [0.025, 0.975])
    sums = np.array([[scans.sum()] for scans in scans_of])
    counts = np.array([[float(len(scans))] for scans in scans_of])
    found = intervals.interval_of_mean(sums, counts, seed=7)
    assert found is not None
    expected = (mean - high_t * error, mean - low_t * error)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-12)


def test_each_resample_draws_as_many_patients_and_blocks_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = np.concatenate(list(intervals.patient_counts(13, seed=1, num_resamples=50)))
    assert whole.shape == (50, 13) and (whole.sum(1) == 13).all()
    monkeypatch.setattr(intervals, "BLOCK_VALUES", 13 * 7)
    again = np.concatenate(list(intervals.patient_counts(13, seed=1, num_resamples=50)))
    np.testing.assert_array_equal(whole, again)
    other = np.concatenate(list(intervals.patient_counts(13, seed=2, num_resamples=50)))
    assert (whole != other).any()


def test_patients_that_are_all_zero_but_one_give_finite_limits() -> None:
    """Many resamples have no spread at all; without smoothing their t would be infinite."""
    values = np.zeros((10, 1))
    values[3] = 0.2
    found = intervals.interval_of_mean(values, np.ones((10, 1)), seed=0, limits=(0, 1))
    assert found is not None and found.low == 0 and 0.02 < found.high < 0.5


def test_student_quantiles_equal_scipy() -> None:
    from scipy import stats

    for freedom in (9, 12, 20, 100):
        expected = stats.t.ppf(0.975, freedom)
        assert intervals.student_quantile(freedom) == pytest.approx(expected, abs=1e-3)


def test_the_bca_interval_of_a_mean_equals_scipy() -> None:
    """With its levels not expanded, which makes 1e-2 of difference at 60 patients."""
    from scipy import stats

    values = np.random.default_rng(0).gamma(2, 1, 60)
    resampled = np.concatenate(list(intervals.patient_counts(60, 0, 20_000))) @ values / 60
    left_out = (values.sum() - values) / 59
    found = intervals.bca_interval(values.mean(), resampled, left_out)
    scipy_result = stats.bootstrap((values,), np.mean, n_resamples=20_000, rng=1, method="BCa")
    theirs = scipy_result.confidence_interval
    assert found is not None
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.04 * width)
    assert found.high - found.low > width


# --- p-values -------------------------------------------------------------------------------------


def test_the_exact_p_value_equals_the_enumeration_by_hand_and_scipy() -> None:
    from scipy import stats

    difference = np.random.default_rng(1).normal(0.3, 1, 11)
    sums = [np.dot(signs, difference) for signs in itertools.product((-1, 1), repeat=11)]
    by_hand = np.mean(np.abs(sums) >= abs(difference.sum()) - 1e-12)
    found = intervals.sign_flip_p(difference, seed=0)
    assert found == by_hand
    theirs = stats.permutation_test(
        (difference,), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert found == pytest.approx(theirs.pvalue, abs=1e-12)


def test_a_sampled_p_value_is_near_the_exact_one_and_never_zero() -> None:
    difference = np.random.default_rng(2).normal(0.4, 1, 16)
    bits = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    exact = np.mean(np.abs((1 - 2 * bits) @ difference) >= abs(difference.sum()) * (1 - 1e-9))
    assert intervals.sign_flip_p(difference, 0) == pytest.approx(exact, abs=0.015)
    assert intervals.sign_flip_p(np.ones(40), 0) == 1 / 10_001
    assert intervals.sign_flip_p(np.zeros(12), 0) == 1


@pytest.mark.parametrize("num_patients", [12, 20])
def test_without_a_difference_5_of_100_p_values_are_below_5_percent(num_patients: int) -> None:
    rng = np.random.default_rng(4)
    draws = rng.standard_t(3, (400, num_patients))
    share = np.mean([intervals.sign_flip_p(one, 0) < 0.05 for one in draws])
    assert 0.02 <= share <= 0.08


def test_holm_equals_its_definition() -> None:
    assert intervals.holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert intervals.holm([0.5, 0.9]) == (1.0, 1.0)
    assert intervals.holm([]) == ()


# --- means over scans -----------------------------------------------------------------------------


def test_the_mean_is_over_parts_of_the_mean_over_scans_that_have_the_part() -> None:
    rows = [
        ScanScore("s1", "pretrained", 0.5, {"liver": 0.4, "spleen": 0.6}),
        ScanScore("s2", "pretrained", 0.8, {"liver": 0.8}),
    ]
    patients = {"s1": "p1", "s2": "p1"}
    by_part = statistics.means(statistics.table_of([rows], patients, by_part=True), seed=0)
    assert by_part.models[0].estimate.value == pytest.approx((0.6 + 0.6) / 2)
    plain = statistics.means(statistics.table_of([rows], patients, by_part=False), seed=0)
    assert plain.models[0].estimate.value == pytest.approx(0.65)
    liver = statistics.table_of([rows], patients, by_part=True).of_part("liver")
    assert statistics.means(liver, seed=0).models[0].estimate.value == pytest.approx(0.6)


def test_below_10_patients_the_scans_are_listed_and_there_is_no_interval_and_no_p_value() -> None:
    nine = statistics.means(table(9), seed=0, limits=(0, 1))
    for one in (*nine.models, *nine.differences):
        assert one.estimate.interval is None and one.estimate.num_patients == 9
        assert one.estimate.num_scans == len(one.estimate.listed) == 18
    assert math.isnan(nine.differences[0].p) and nine.differences[0].num_comparisons == 0
    text = "\n".join(nine.lines())
    assert "no interval: 9 patients, fewer than 10" in text and "scan s003, patient p001" in text
    assert "[" not in text and "p =" not in text
    ten = statistics.means(table(10), seed=0, limits=(0, 1))
    for one in (*ten.models, *ten.differences):
        assert one.estimate.interval is not None and not one.estimate.listed
    assert ten.differences[0].exact and ten.differences[0].p == 2 / 2**10


def test_the_difference_is_paired_and_n_counts_the_scans_that_both_models_have() -> None:
    one = table(20)
    one.values["raw_hu"][0, :2] = np.nan  # no value for one patient
    found = statistics.means(one, seed=0, limits=(0, 1))
    pair = found.differences[0]
    gap = one.values["pretrained"] - one.values["raw_hu"]
    assert pair.estimate.value == pytest.approx(np.nanmean(gap))
    assert (pair.estimate.num_scans, pair.estimate.num_patients) == (38, 19)
    assert found.models[0].estimate.num_scans == 40
    width = pair.estimate.interval.high - pair.estimate.interval.low  # type: ignore[union-attr]
    alone = found.models[0].estimate.interval
    assert alone is not None and width < (alone.high - alone.low) / 2
    assert pair.estimate.interval.low > 0 and pair.p < 0.001  # type: ignore[union-attr]


def test_scans_of_one_patient_stay_together() -> None:
    """Each scan twice adds no knowledge, so the interval must not shrink."""
    once = table(15)
    twice = ScanTable(
        once.scans + tuple(f"{scan}b" for scan in once.scans),
        once.patients * 2,
        once.parts,
        {model: np.concatenate([values, values], 1) for model, values in once.values.items()},
    )
    first, second = (statistics.means(one, seed=0).models[0].estimate for one in (once, twice))
    assert second.interval is not None and first.interval is not None
    assert second.interval.low == pytest.approx(first.interval.low, abs=1e-12)
    assert second.num_scans == 60 and second.num_patients == 15


def test_the_order_of_the_rows_changes_nothing_and_the_seed_does() -> None:
    one = table(12, num_parts=3)
    order = np.random.default_rng(0).permutation(24)
    shuffled = ScanTable(
        tuple(one.scans[index] for index in order),
        tuple(one.patients[index] for index in order),
        one.parts,
        {model: values[:, order] for model, values in one.values.items()},
    )
    assert statistics.means(shuffled, seed=5) == statistics.means(one, seed=5)
    assert statistics.means(one, seed=6) != statistics.means(one, seed=5)


def test_seeds_are_averaged_per_scan_and_shown_as_mean_and_sd() -> None:
    one = table(12, num_seeds=3)
    one = replace(one, values={**one.values, "raw_hu": one.values["raw_hu"][:1]})
    found = statistics.means(one, seed=0)
    own, baseline = found.models
    by_seed = one.values["pretrained"].mean((1, 2))
    assert own.by_seed == pytest.approx(tuple(by_seed))
    assert own.seed_sd == pytest.approx(by_seed.std(ddof=1))
    assert math.isnan(baseline.seed_sd) and len(baseline.by_seed) == 1
    average = replace(
        one, values={model: values.mean(0)[None] for model, values in one.values.items()}
    )
    expected = statistics.means(average, seed=0)
    assert own.estimate.interval == expected.models[0].estimate.interval
    assert found.differences == expected.differences
    assert f"3 seeds {by_seed.mean():.3f} ± {by_seed.std(ddof=1):.3f}" in found.lines()[0]


def test_the_number_of_comparisons_is_named_and_p_values_are_adjusted() -> None:
    one = table(14)
    rng = np.random.default_rng(9)
    near = one.values["pretrained"] - rng.normal(0.01, 0.05, one.values["pretrained"].shape)
    one = replace(one, values={**one.values, "near": near, "same": one.values["pretrained"]})
    found = {pair.other: pair for pair in statistics.means(one, seed=0).differences}
    assert {pair.num_comparisons for pair in found.values()} == {3}
    assert found["raw_hu"].p_holm == pytest.approx(3 * found["raw_hu"].p)
    assert found["near"].p_holm == pytest.approx(min(1, 2 * found["near"].p))
    assert found["same"].p == 1 and found["same"].estimate.interval is None
    assert found["same"].estimate.why_none == "all patients have the same value"
    assert any("for 3 comparisons" in line for line in statistics.means(one, seed=0).lines())


def test_scans_of_unknown_patient_are_patients_of_their_own_and_are_counted() -> None:
    one = replace(table(6), patients=("",) * 12)
    found = statistics.means(one, seed=0)
    assert found.models[0].estimate.num_patients == 12 and found.num_unknown == 12
    assert found.lines()[-1].startswith("12 scans of unknown patient")


def test_without_the_reference_there_is_no_difference() -> None:
    assert statistics.means(table(10), seed=0, reference="missing").differences == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scans": ("a", "a"), "patients": ("p", "q")}, "1 different IDs"),
        ({"scans": ("a", "b"), "patients": ("p",)}, "1 patients"),
        ({"values": {"m": np.zeros((1, 3, 1))}}, r"model m: values have shape \(1, 3, 1\)"),
        ({"values": {"m": np.full((1, 2, 1), np.inf)}}, "infinite"),
    ],
)
def test_a_bad_table_is_an_error(change: dict[str, object], message: str) -> None:
    good = ScanTable(("a", "b"), ("p", "q"), ("value",), {"m": np.zeros((1, 2, 1))})
    with pytest.raises(UserError, match=message):
        replace(good, **change)


def test_two_rows_of_one_scan_are_an_error() -> None:
    rows = [ScanScore("s1", "pretrained", 0.5), ScanScore("s1", "pretrained", 0.6)]
    with pytest.raises(UserError, match="two rows of scan s1"):
        statistics.table_of([rows], {}, by_part=False)


# --- metrics that are no means over scans ---------------------------------------------------------


def predictions(num_patients: int, share: float = 0.5, seed: int = 0) -> ScanPredictions:
    """Two scans per patient, one label per patient; `pretrained` sees the label, `raw_hu` less."""
    rng = np.random.default_rng(seed)
    label_P = (np.arange(num_patients) < share * num_patients).astype(int)
    truth = np.repeat(label_P, 2)
    scores = {}
    for model, gain in (("pretrained", 2.0), ("raw_hu", 0.3)):
        logit = gain * (truth - 0.5) + np.repeat(rng.normal(0, 1, num_patients), 2)
        scores[model] = (1 / (1 + np.exp(-logit - rng.normal(0, 0.3, len(truth)))))[None]
    return ScanPredictions(
        tuple(f"s{index:03}" for index in range(len(truth))),
        tuple(f"p{index // 2:03}" for index in range(len(truth))),
        truth,
        scores,
    )


def test_a_metric_of_the_mean_gives_the_paired_difference_of_the_means() -> None:
    def mean_score(truth: np.ndarray, score: np.ndarray) -> float:
        return float(score.mean())

    one = predictions(24)
    found = prediction_statistics.metrics(one, mean_score, 0, num_flips=500)
    values = {model: scores[:, :, None] for model, scores in one.scores.items()}
    expected = statistics.means(ScanTable(one.scans, one.patients, ("value",), values), 0)
    ours, theirs = found.differences[0], expected.differences[0]
    assert ours.estimate.value == pytest.approx(theirs.estimate.value)
    assert ours.p == pytest.approx(theirs.p, abs=0.05)
    near, bootstrap_t = ours.estimate.interval, theirs.estimate.interval
    assert near is not None and bootstrap_t is not None
    assert near.low == pytest.approx(bootstrap_t.low, abs=0.02)
    assert near.high == pytest.approx(bootstrap_t.high, abs=0.02)


def test_auroc_has_an_interval_and_a_paired_p_value() -> None:
    one = predictions(40)
    found = prediction_statistics.metrics(
        one, scan_level.auroc, 0, limits=(0, 1), num_resamples=400, num_flips=300
    )
    own, baseline = found.models
    assert own.estimate.value == scan_level.auroc(one.truth, one.scores["pretrained"][0])
    interval = own.estimate.interval
    assert interval is not None and interval.low < own.estimate.value < interval.high <= 1
    pair = found.differences[0]
    assert pair.estimate.value == pytest.approx(own.estimate.value - baseline.estimate.value)
    assert pair.estimate.interval is not None and pair.estimate.interval.low > 0
    assert pair.p < 0.05 and pair.num_comparisons == 1 and not pair.exact
    assert (own.estimate.num_scans, own.estimate.num_patients) == (80, 40)


@pytest.mark.slow
def test_the_interval_of_auroc_covers_the_truth() -> None:
    """20 patients of each class, AUROC of two normal distributions whose means differ by 1."""
    from statistics import NormalDist

    truth, rng = np.repeat([0, 1], 20), np.random.default_rng(5)
    expected = NormalDist().cdf(1 / math.sqrt(2))
    names = tuple(f"s{index:02}" for index in range(40))
    hits = 0
    for repeat in range(300):
        one = ScanPredictions(names, names, truth, {"m": (truth + rng.normal(size=40))[None]})
        found = prediction_statistics.metrics(
            one, scan_level.auroc, repeat, limits=(0, 1), num_resamples=500
        )
        interval = found.models[0].estimate.interval
        hits += interval is not None and interval.low <= expected <= interval.high
    assert 93 <= 100 * hits / 300 <= 99


def test_a_rare_class_has_no_interval_and_the_reason_is_printed() -> None:
    found = prediction_statistics.metrics(predictions(40, share=0.2), scan_level.auroc, 0)
    assert found.models[0].estimate.why_none == "8 patients of class 1, fewer than 10"
    assert math.isnan(found.differences[0].p) and math.isfinite(found.models[0].estimate.value)


def test_resamples_without_a_class_are_skipped_and_counted() -> None:
    def undefined_sometimes(truth: np.ndarray, score: np.ndarray) -> float:
        return math.nan if (truth == 1).mean() < 0.3 else scan_level.auroc(truth, score)

    one = predictions(24)
    rows = prediction_statistics._draw_rows(one.patients, 0, 500).resamples
    expected = sum(float((one.truth[row] == 1).mean()) < 0.3 for row in rows)
    found = prediction_statistics.metrics(
        one, undefined_sometimes, 0, num_resamples=500, num_flips=20
    ).models[0]
    assert 0 < expected == found.estimate.num_skipped < 50
    assert found.estimate.interval is not None
    line = prediction_statistics.metrics(
        one, undefined_sometimes, 0, num_resamples=500, num_flips=20
    )
    assert f"{expected} resamples skipped" in line.lines()[0]


def test_few_patients_of_a_metric_are_listed_with_truth_and_score() -> None:
    one = predictions(8)
    found = prediction_statistics.metrics(one, scan_level.auroc, 0)
    listed = found.models[0].estimate.listed
    assert [row.truth for row in listed] == one.truth.tolist()
    assert [row.value for row in listed] == pytest.approx(one.scores["pretrained"][0].tolist())
    assert "(truth 1)" in "\n".join(found.lines())


def test_a_perfect_auroc_has_no_interval() -> None:
    one = predictions(30)
    perfect = replace(one, scores={"pretrained": one.truth[None].astype(float)})
    found = prediction_statistics.metrics(perfect, scan_level.auroc, 0, num_resamples=200).models[0]
    assert found.estimate.value == 1 and found.estimate.interval is None
    assert found.estimate.why_none == "all resamples have the same value"


def test_several_seeds_of_a_metric_are_averaged_on_the_same_resamples() -> None:
    one, other = predictions(30), predictions(30, seed=1)
    scores = {
        "pretrained": np.concatenate([one.scores["pretrained"], other.scores["pretrained"]]),
        "raw_hu": one.scores["raw_hu"],
    }
    found = prediction_statistics.metrics(
        replace(one, scores=scores), scan_level.auroc, 0, num_resamples=100, num_flips=100
    )
    each = [scan_level.auroc(one.truth, score) for score in scores["pretrained"]]
    assert found.models[0].by_seed == pytest.approx(tuple(each))
    assert found.models[0].estimate.value == pytest.approx(np.mean(each))
    assert 0 < found.differences[0].p <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": np.array([0.0, math.nan])}, "true value is not finite"),
        ({"truth": np.array([0])}, "1 true values"),
        ({"scores": {"m": np.array([0.1, 0.2])}}, "model m: scores have shape"),
        ({"scores": {"m": np.array([[0.1, math.nan]])}}, "every scan needs a score"),
    ],
)
def test_bad_predictions_are_an_error(change: dict[str, object], message: str) -> None:
    good = ScanPredictions(("a", "b"), ("p", "q"), np.array([0, 1]), {"m": np.array([[0.1, 0.2]])})
    with pytest.raises(UserError, match=message):
        replace(good, **change)
