"""The statistics of one task: from its rows or predictions to intervals and paired differences.

`statistics` and `prediction_statistics` have the methods; here it is decided which numbers of a
task they are applied to, and how the result stands in results.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tapct.base.exits import UserError
from tapct.eval import statistics
from tapct.eval.intervals import Interval
from tapct.eval.metrics import prediction_statistics
from tapct.eval.metrics.prediction_statistics import PredictedScans
from tapct.eval.scores import Headline, ScanScore, TaskResults
from tapct.eval.statistics import Difference, ModelValue, PatientEstimate, Statistics

NO_MEAN = "the headline is no mean over the test scans and the task hands over no predictions"
NUM_EXCHANGES = 2000  # for p-values of metrics that are computed again for each; p >= 1/2001
SAME = 1e-6  # relative difference of two numbers that are computed in another order


@dataclass(frozen=True)
class MetricStatistics:
    """The statistics of one metric of a task.

    Args:
        metric: its name.
        direction: `higher` or `lower`, whichever is better.
        whole: statistics of the value that is shown for each model.
        parts: the same for each part, e.g. each organ; may be empty. There are no p-values of parts
            of a mean: they would be too many comparisons for a test.
    """

    metric: str
    direction: str
    whole: Statistics
    parts: Mapping[str, Statistics] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskStatistics:
    """The statistics of a task.

    Args:
        metrics: the headline first, then the further metrics of the task.
        why_none: reason why there are none of the headline; empty where there are.
    """

    metrics: tuple[MetricStatistics, ...] = ()
    why_none: str = ""

    def of(self, metric: str) -> MetricStatistics | None:
        """The statistics of one metric; None where there are none."""
        return next((one for one in self.metrics if one.metric == metric), None)


def of_task(
    results: TaskResults,
    headline: Headline,
    predicted: Mapping[str, PredictedScans],
    patient_of: Mapping[str, str],
    seed: int,
) -> TaskStatistics:
    """Compute the statistics of all metrics of a task.

    Args:
        results: its numbers.
        headline: its headline.
        predicted: target -> predictions, where the headline is no mean over scans; else empty.
        patient_of: test scan -> patient; empty where unknown.
        seed: random seed of the evaluation.
    """
    found: list[MetricStatistics] = []
    why_none = ""
    try:
        found.append(_of_headline(results, headline, predicted, patient_of, seed))
    except UserError as error:  # the numbers themselves are kept
        why_none = str(error)
    for one in results.further:
        found.append(
            of_rows(
                one.metric,
                one.direction,
                [one.scans],
                one.range,
                by_part=results.mean_over_parts,
                patient_of=patient_of,
                seed=seed,
            )  # fmt: skip
        )
    return TaskStatistics(tuple(found), why_none)


def _of_headline(
    results: TaskResults,
    headline: Headline,
    predicted: Mapping[str, PredictedScans],
    patient_of: Mapping[str, str],
    seed: int,
) -> MetricStatistics:
    if predicted:
        own = of_predictions(predicted, headline, patient_of, seed)
        if not _is_of(headline, own.whole):
            raise UserError(
                f"the predictions behind {headline.metric} give other values than the headline; "
                "`predicted_scans` and `headline` of the task must use the same scans and metric"
            )
        return own
    if not results.scans:
        raise UserError("the task has no values of single scans")
    own = of_rows(
        headline.metric, headline.direction, [results.scans], headline.range,
        by_part=results.mean_over_parts, patient_of=patient_of, seed=seed,
    )  # fmt: skip
    if not _is_of(headline, own.whole):
        raise UserError(NO_MEAN)
    return own


def of_rows(
    metric: str,
    direction: str,
    scans_by_seed: Sequence[Sequence[ScanScore]],
    limits: tuple[float, float] | None,
    *,
    by_part: bool,
    patient_of: Mapping[str, str],
    seed: int,
) -> MetricStatistics:
    """Statistics of a mean over scans, and of each part.

    Args:
        metric: name of the metric.
        direction: `higher` or `lower`.
        scans_by_seed: rows of each seed.
        limits: lowest and highest possible value; None where it is unbounded.
        by_part: whether the value is the mean over parts of the mean over scans.
        patient_of: test scan -> patient; empty where unknown.
        seed: random seed of the resamples.
    """
    whole = statistics.means(
        statistics.table_of(scans_by_seed, patient_of, by_part=by_part), seed, limits=limits
    )
    parts: dict[str, Statistics] = {}
    if any(score.parts for scans in scans_by_seed for score in scans):
        table = statistics.table_of(scans_by_seed, patient_of, by_part=True)
        for part in table.parts:
            own = table.of_part(part)
            parts[part] = _short(statistics.means(own, seed, limits=limits, with_p=False))
    return MetricStatistics(metric, direction, _short(whole), parts)


def of_predictions(
    predicted: Mapping[str, PredictedScans],
    headline: Headline,
    patient_of: Mapping[str, str],
    seed: int,
) -> MetricStatistics:
    """Statistics of a metric of predictions, the mean over targets, and of each target.

    Args:
        predicted: target -> predictions, of one seed or several.
        headline: name, direction and range of the metric.
        patient_of: test scan -> patient; empty where unknown.
        seed: random seed of the resamples.
    """

    def computed(one: PredictedScans, *, with_p: bool) -> Statistics:
        patients = tuple(patient_of.get(scan, "") for scan in one.predictions.scans)
        known = replace(one.predictions, patients=patients)
        return _short(
            prediction_statistics.metrics(
                known,
                one.metric,
                seed,
                limits=headline.range,
                num_flips=NUM_EXCHANGES,
                with_p=with_p,
            )  # fmt: skip
        )

    if len(predicted) == 1:
        ((target, one),) = predicted.items()
        whole = computed(one, with_p=True)
        parts = {target: replace(whole, differences=_without_p(whole.differences))}
    else:
        parts = {target: computed(one, with_p=False) for target, one in predicted.items()}
        refused = _refused(parts)
        joint = prediction_statistics.joined(list(predicted.values()))
        if refused:
            whole = _without_interval(joint, parts, refused)
        else:
            whole = computed(joint, with_p=True)
    return MetricStatistics(headline.metric, headline.direction, whole, parts)


def _refused(parts: Mapping[str, Statistics]) -> str:
    """The first target that has no interval in any model, and why; empty where there is none."""
    for target, found in parts.items():
        if all(one.estimate.interval is None for one in found.models):
            return f"{target}: {found.models[0].estimate.why_none}"
    return ""


def _without_interval(
    joint: PredictedScans, parts: Mapping[str, Statistics], why: str
) -> Statistics:
    """The mean over targets without an interval, because a target has none."""
    predictions = joint.predictions
    first = next(iter(parts.values()))
    fewest = min((found.models[0].estimate for found in parts.values()), key=_num_patients)
    models = []
    for model, scores in predictions.scores.items():
        by_seed = tuple(joint.metric(predictions.truth, one) for one in scores)
        value = math.fsum(by_seed) / len(by_seed)
        estimate = PatientEstimate(
            value, None, fewest.num_scans, fewest.num_patients, why, num_skipped=0
        )
        models.append(ModelValue(model, estimate, by_seed))
    return Statistics(tuple(models), (), first.num_resamples, first.seed, first.num_unknown)


def _num_patients(estimate: PatientEstimate) -> int:
    return estimate.num_patients


def _without_p(differences: tuple[Difference, ...]) -> tuple[Difference, ...]:
    return tuple(
        replace(one, p=math.nan, p_holm=math.nan, exact=False, num_comparisons=0)
        for one in differences
    )


def _is_of(headline: Headline, found: Statistics) -> bool:
    """Whether the values are those of the headline."""
    values = {one.model: one.estimate.value for one in found.models}
    for model, value in headline.values.items():
        own = values.get(model, math.nan)
        if math.isfinite(value) != math.isfinite(own):
            return False
        if math.isfinite(value) and not math.isclose(value, own, rel_tol=SAME, abs_tol=SAME**2):
            return False
    return True


def _short(found: Statistics) -> Statistics:
    """The same without the lists of scans, which stand beside the statistics in the results."""
    return replace(
        found,
        models=tuple(
            replace(one, estimate=replace(one.estimate, listed=())) for one in found.models
        ),
        differences=tuple(
            replace(one, estimate=replace(one.estimate, listed=())) for one in found.differences
        ),
    )


def to_json(found: TaskStatistics | None) -> dict[str, Any] | None:
    """The object in results.json."""
    if found is None:
        return None
    metrics = []
    for one in found.metrics:
        parts = {part: asdict(of_part) for part, of_part in one.parts.items()}
        metrics.append(
            {
                "metric": one.metric,
                "direction": one.direction,
                "whole": asdict(one.whole),
                "parts": parts,
            }
        )
    return {"metrics": metrics, "why_none": found.why_none}


def from_json(content: Mapping[str, Any] | None) -> TaskStatistics | None:
    """Rebuild what `to_json` wrote; None where an earlier version wrote none."""
    if content is None:
        return None
    metrics = tuple(
        MetricStatistics(
            str(one["metric"]),
            str(one["direction"]),
            _statistics(one["whole"]),
            {str(part): _statistics(of_part) for part, of_part in one["parts"].items()},
        )
        for one in content["metrics"]
    )
    return TaskStatistics(metrics, str(content["why_none"]))


def _statistics(content: Mapping[str, Any]) -> Statistics:
    models = tuple(
        ModelValue(
            str(one["model"]),
            _estimate(one["estimate"]),
            tuple(_number(value) for value in one["by_seed"]),
        )
        for one in content["models"]
    )
    differences = tuple(
        Difference(
            str(one["reference"]),
            str(one["other"]),
            _estimate(one["estimate"]),
            _number(one["p"]),
            _number(one["p_holm"]),
            bool(one["exact"]),
            int(one["num_comparisons"]),
        )
        for one in content["differences"]
    )
    return Statistics(
        models,
        differences,
        int(content["num_resamples"]),
        int(content["seed"]),
        int(content["num_unknown"]),
    )


def _estimate(content: Mapping[str, Any]) -> PatientEstimate:
    between = content["interval"]
    interval = None
    if between is not None:
        low = -math.inf if between["low"] is None else float(between["low"])
        high = math.inf if between["high"] is None else float(between["high"])
        interval = Interval(low, high)
    return PatientEstimate(
        _number(content["value"]),
        interval,
        int(content["num_scans"]),
        int(content["num_patients"]),
        str(content["why_none"]),
        (),
        int(content["num_skipped"]),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
