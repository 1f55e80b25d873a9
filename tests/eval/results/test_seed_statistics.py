"""Statistics over several runs: the values are those of each run, put together by another way."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tapct.eval.metrics.scan_level import auroc, r_squared
from tapct.eval.results import task_statistics
from tapct.eval.results.seed_statistics import RunSection, over_runs
from tapct.eval.results.task_section import TaskSection
from tapct.eval.scores import Breakdown, Headline, ScanScore, TaskResults

SCANS = [f"s{number:02}" for number in range(24)]
PATIENT_OF = {scan: f"p{number // 2}" for number, scan in enumerate(SCANS)}
MODELS = ("pretrained", "untrained")


def section_of(headline: Headline, results: TaskResults) -> TaskSection:
    own = task_statistics.of_task(results, headline, {}, PATIENT_OF, 0)
    return TaskSection({}, "scan", 9, len(SCANS), 0, headline, results, (), own)


def predictions(seed: int, is_number: bool) -> tuple[TaskSection, dict[str, np.ndarray]]:
    """A section as results.json holds it, and the score of each scan by model."""
    rng = np.random.default_rng(seed)
    truth_S = np.arange(24) % 2 if not is_number else np.arange(24) / 7
    models, score_of = {}, {}
    for model in MODELS:
        score_S = np.round(truth_S * 0.3 + rng.uniform(0, 0.6, 24), 6)
        score_of[model] = score_S
        saved = {}
        for scan, truth, score in zip(SCANS, truth_S.tolist(), score_S.tolist()):
            saved[scan] = {"truth": truth, "predicted": score}
            if not is_number:
                probabilities = [round(1 - score, 6), score]
                saved[scan] = {"truth": ("no", "yes")[truth], "probabilities": probabilities}
        entry = (
            {"predictions": saved}
            if is_number
            else {"predictions": saved, "classes": ["no", "yes"]}
        )
        models[model] = {"targets": {"lesion": entry}}
    metric = r_squared if is_number else auroc
    values = {model: metric(truth_S, score_of[model]) for model in MODELS}
    name = "mean R^2" if is_number else "mean AUROC"
    headline = Headline(name, values, "higher", "how", None if is_number else (0.0, 1.0))
    table = Breakdown("by target", "target", {"lesion": values})
    rows = tuple(ScanScore(scan, model, math.nan) for scan in SCANS for model in MODELS)
    return section_of(headline, TaskResults(models, rows, table)), score_of


@pytest.mark.parametrize("is_number", [False, True])
def test_metrics_of_predictions_are_means_over_seeds(is_number: bool) -> None:
    sections = [predictions(seed, is_number)[0] for seed in (3, 4)]
    runs = [RunSection(seed, one) for seed, one in zip((3, 4), sections)]
    (found,) = over_runs(runs, PATIENT_OF, 0)
    for one in found.whole.models:
        by_seed = [section.headline.values[one.model] for section in sections]
        assert one.by_seed == pytest.approx(by_seed)
        assert one.estimate.value == pytest.approx(np.mean(by_seed))
        assert (one.estimate.num_scans, one.estimate.num_patients) == (24, 12)
        assert one.estimate.interval is not None
    (pair,) = found.whole.differences
    assert pair.other == "untrained" and 0 < pair.p <= 1
    assert list(found.parts) == ["lesion"]


def dice(
    seed: int, fold: int = 0, num_folds: int = 1, curve_key: str = "dice_by_num_patients"
) -> TaskSection:
    rng = np.random.default_rng(seed)
    scans = SCANS[fold::num_folds]
    rows = tuple(
        ScanScore(scan, model, value, {"liver": value})
        for model in MODELS
        for scan, value in zip(scans, rng.uniform(0, 1, len(scans)).tolist())
    )
    values = {m: float(np.mean([row.value for row in rows if row.model == m])) for m in MODELS}
    curve = {model: {curve_key: {"1": [0.1, 0.3], "5": [seed / 10]}} for model in MODELS}
    results = TaskResults(curve, rows, None, mean_over_parts=True)
    return section_of(Headline("mean Dice", values, "higher", "how", (0.0, 1.0)), results)


def test_folds_of_a_seed_are_put_together() -> None:
    runs = [RunSection(seed, dice(seed + 9 * fold, fold, 2)) for seed in (1, 2) for fold in (0, 1)]
    whole, one_patient, five_patients = over_runs(runs, PATIENT_OF, 0)
    rows = [row for run in runs for row in run.section.results.scans if row.model == "untrained"]
    (untrained,) = (one for one in whole.whole.models if one.model == "untrained")
    assert untrained.estimate.value == pytest.approx(np.mean([row.value for row in rows]))
    assert untrained.estimate.num_scans == 24
    assert one_patient.metric == "mean Dice with 1 labelled patient"
    assert one_patient.whole.models[0].by_seed == pytest.approx((0.2, 0.2))
    # the mean over the two folds of each seed
    assert five_patients.whole.models[0].by_seed == pytest.approx((0.55, 0.65))
    assert five_patients.whole.models[0].estimate.interval is None


def test_curves_of_earlier_results_count_scans() -> None:
    runs = [RunSection(1, dice(1, curve_key="dice_by_num_scans"))]
    _, *curve = over_runs(runs, PATIENT_OF, 0)
    names = [f"mean Dice with {num}" for num in ("1 labelled scan", "5 labelled scans")]
    assert [one.metric for one in curve] == names


def test_a_headline_without_rows_is_shown_without_an_interval() -> None:
    section = dice(1)
    other = replace(section.headline, values={"pretrained": 0.9, "untrained": 0.4})
    found, *_ = over_runs([RunSection(0, section_of(other, section.results))], PATIENT_OF, 0)
    assert [one.estimate.value for one in found.whole.models] == [0.9, 0.4]
    assert found.whole.models[0].estimate.why_none == task_statistics.NO_MEAN
    assert found.whole.differences[0].estimate.value == pytest.approx(0.5)
