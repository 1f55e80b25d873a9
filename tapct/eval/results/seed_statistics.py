"""The statistics of a task over several runs: seeds of pretraining, and folds of the test patients.

They are computed from what results.json holds of each run: rows of scans, or predictions. With
several seeds, a value is that of the scans' values averaged over seeds, see `statistics`. Folds
test different patients, so their rows are put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tapct.eval.metrics import scan_level
from tapct.eval.metrics.prediction_statistics import Metric, PredictedScans, ScanPredictions
from tapct.eval.results import task_statistics
from tapct.eval.results.old_formats import curve_of, metric_name
from tapct.eval.results.task_section import TaskSection
from tapct.eval.results.task_statistics import MetricStatistics
from tapct.eval.scores import OWN_MODEL, FurtherMetric, ScanScore
from tapct.eval.statistics import Difference, ModelValue, PatientEstimate, Statistics

# headline -> metric of the predictions in results.json
PREDICTED: Mapping[str, Metric] = {
    "mean AUROC": scan_level.auroc,
    "mean balanced accuracy": scan_level.balanced_accuracy,
    "mean R^2": scan_level.r_squared,
}
NO_ROWS = "results.json has no value of single scans for it"


@dataclass(frozen=True)
class RunSection:
    """The results of a task in one run.

    Args:
        seed: seed of pretraining.
        section: results.
    """

    seed: int
    section: TaskSection


def over_runs(
    runs: Sequence[RunSection], patient_of: Mapping[str, str], seed: int
) -> list[MetricStatistics]:
    """Statistics of all metrics of a task: headline, further metrics, label-fraction curve.

    Args:
        runs: results of the task in each run; runs of one seed have different test scans.
        patient_of: test scan -> patient; empty or missing where unknown.
        seed: random seed of the resamples.
    """
    found = [_headline(runs, patient_of, seed)]
    for one in runs[0].section.results.further:
        found.append(_further(runs, one, patient_of, seed))
    return [*found, *_label_fractions(runs)]


def _headline(
    runs: Sequence[RunSection], patient_of: Mapping[str, str], seed: int
) -> MetricStatistics:
    first = runs[0].section
    metric = PREDICTED.get(first.headline.metric)
    if metric is not None:
        predicted = predicted_scans(runs, metric)
        if predicted:
            return task_statistics.of_predictions(predicted, first.headline, patient_of, seed)
    if all(_is_mean_of_rows(run.section) for run in runs):
        rows = _rows_by_seed(runs, lambda section: section.results.scans)
        return task_statistics.of_rows(
            first.headline.metric, first.headline.direction, rows, first.headline.range,
            by_part=first.results.mean_over_parts, patient_of=patient_of, seed=seed,
        )  # fmt: skip
    values = [(run.seed, run.section.headline.values) for run in runs]
    return MetricStatistics(
        first.headline.metric,
        first.headline.direction,
        without_intervals(values, first.num_test, task_statistics.NO_MEAN),
    )


def _is_mean_of_rows(section: TaskSection) -> bool:
    """Whether the statistics of the run found that its rows give the headline."""
    own = section.statistics
    return own is not None and own.of(section.headline.metric) is not None


def _further(
    runs: Sequence[RunSection], wanted: FurtherMetric, patient_of: Mapping[str, str], seed: int
) -> MetricStatistics:
    rows = _rows_by_seed(
        runs,
        lambda section: (
            score
            for one in section.results.further
            if one.metric == wanted.metric
            for score in one.scans
        ),
    )
    return task_statistics.of_rows(
        wanted.metric, wanted.direction, rows, wanted.range,
        by_part=runs[0].section.results.mean_over_parts, patient_of=patient_of, seed=seed,
    )  # fmt: skip


def _rows_by_seed(
    runs: Sequence[RunSection], rows_of: Callable[[TaskSection], Iterable[ScanScore]]
) -> list[list[ScanScore]]:
    """Rows of each seed, of all its folds."""
    rows: dict[int, list[ScanScore]] = {}
    for run in runs:
        rows.setdefault(run.seed, []).extend(rows_of(run.section))
    return list(rows.values())


def predicted_scans(runs: Sequence[RunSection], metric: Metric) -> dict[str, PredictedScans]:
    """Target -> predictions of all models and seeds, from results.json; empty where it has none.

    Args:
        runs: results of a task on labels of scans in each run.
        metric: metric of its headline.
    """
    targets: dict[str, None] = {}
    for run in runs:
        breakdown = run.section.results.breakdown
        targets |= dict.fromkeys(breakdown.values if breakdown is not None else ())
    found = {}
    for target in targets:
        predictions = _predictions(runs, target)
        if predictions is not None:
            found[target] = PredictedScans(predictions, metric)
    return found


def _predictions(runs: Sequence[RunSection], target: str) -> ScanPredictions | None:
    """True values and scores of the scans that all models predict in all seeds."""
    entries: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for run in runs:
        for model, numbers in run.section.results.models.items():
            entry = numbers.get("targets", {}).get(target, {})
            if entry.get("predictions"):
                entries.setdefault((model, run.seed), []).append(entry)
    seeds = list(dict.fromkeys(run.seed for run in runs))
    models = [
        model
        for model in dict.fromkeys(model for model, _ in entries)
        if all((model, seed) in entries for seed in seeds)
    ]
    if not models:
        return None
    known = [entry for some in entries.values() for entry in some]
    classes = sorted({name for entry in known for name in entry.get("classes", ())})
    truth_of: dict[str, Any] = {}
    score_of: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for key, some in entries.items():
        for entry in some:
            for scan, one in entry["predictions"].items():
                truth_of[scan] = classes.index(one["truth"]) if classes else float(one["truth"])
                score_of.setdefault(key, {})[scan] = _score(one, entry, classes)
    wanted = [score_of[model, seed] for model in models for seed in seeds]
    scans = tuple(sorted(set.intersection(*(set(of_scan) for of_scan in wanted))))
    if not scans:
        return None
    scores = {
        model: np.stack(
            [np.stack([score_of[model, seed][scan] for scan in scans]) for seed in seeds]
        )
        for model in models
    }
    truth_S = np.array([truth_of[scan] for scan in scans])
    return ScanPredictions(scans, ("",) * len(scans), truth_S, scores)


def _score(one: Mapping[str, Any], entry: Mapping[str, Any], classes: Sequence[str]) -> np.ndarray:
    """What the metric reads of one scan: a number, or the probabilities of several classes."""
    if not classes:
        return np.array(float(one["predicted"]))
    probability_C = np.zeros(len(classes))
    probability_C[[classes.index(name) for name in entry["classes"]]] = one["probabilities"]
    return probability_C[1] if len(classes) == 2 else probability_C


def _label_fractions(runs: Sequence[RunSection]) -> list[MetricStatistics]:
    """One metric for each number of labelled scans, or patients, in results of earlier versions,
    which have no Dice of single scans; a value is the mean over draws.
    """
    known = {one.metric for run in runs for one in run.section.results.further}
    by_num: dict[tuple[str, int], list[tuple[int, dict[str, float]]]] = {}
    for run in runs:
        of_run: dict[tuple[str, int], dict[str, float]] = {}
        for model, numbers in run.section.results.models.items():
            unit, curve = curve_of(numbers)
            for num, draws in curve.items():
                of_run.setdefault((unit, int(num)), {})[model] = float(np.mean(draws))
        for key, values in of_run.items():
            by_num.setdefault(key, []).append((run.seed, values))
    num_test = runs[0].section.num_test
    return [
        MetricStatistics(
            metric_name(num, unit), "higher", without_intervals(values, num_test, NO_ROWS)
        )
        for (unit, num), values in sorted(by_num.items())
        if metric_name(num, unit) not in known
    ]


def without_intervals(
    values: Sequence[tuple[int, Mapping[str, float]]], num_scans: int, why: str
) -> Statistics:
    """Means over seeds, and differences, of a number that is known for whole runs alone.

    Args:
        values: seed of each run, and its value by model; runs of one seed are averaged.
        num_scans: test scans of a run.
        why: why there are no intervals.
    """
    seeds = list(dict.fromkeys(seed for seed, _ in values))
    models = list(dict.fromkeys(model for _, of_run in values for model in of_run))
    by_seed: dict[str, tuple[float, ...]] = {}
    for model in models:
        of_seed: dict[int, list[float]] = {seed: [] for seed in seeds}
        for seed, of_run in values:
            if model in of_run:
                of_seed[seed].append(of_run[model])
        by_seed[model] = tuple(
            float(np.mean(some)) if some else math.nan for some in of_seed.values()
        )

    def estimate(value: float) -> PatientEstimate:
        return PatientEstimate(value, None, num_scans, 0, why)

    mean = {model: float(np.mean(of_model)) for model, of_model in by_seed.items()}
    found = tuple(ModelValue(model, estimate(mean[model]), by_seed[model]) for model in models)
    differences = tuple(
        Difference(OWN_MODEL, model, estimate(mean[OWN_MODEL] - mean[model]))
        for model in models
        if OWN_MODEL in mean and model != OWN_MODEL
    )
    return Statistics(found, differences, 0, 0)
