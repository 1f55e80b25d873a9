"""Intervals of metrics that are not means over scans: AUROC, balanced accuracy, R^2.

The metric is computed again on every resample of patients, for all models on the same resamples.
`statistics` has the types of the result and the metrics that are means over scans.

Axes: E seeds, S scans, P patients, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tapct.base.exits import UserError
from tapct.eval import intervals
from tapct.eval.intervals import NUM_FLIPS, NUM_RESAMPLES
from tapct.eval.scores import OWN_MODEL
from tapct.eval.statistics import (
    MIN_PATIENTS,
    Difference,
    ListedScan,
    ModelValue,
    PatientEstimate,
    Statistics,
    others,
    own_patients,
    patient_numbers,
    too_few,
    with_holm,
)

MIN_PER_CLASS = 10  # patients of the rarest class; no interval and no p-value below it
MIN_USABLE = 0.9  # share of the resamples on which the metric must exist

Metric = Callable[[np.ndarray, np.ndarray], float]  # (truth, scores) -> value, NaN if undefined


@dataclass(frozen=True)
class ScanPredictions:
    """What each model predicts of each scan, for a metric that is not a mean over scans.

    Args:
        scans: scan IDs.
        patients: patient of each scan; empty where unknown.
        truth: [S]; whole numbers or booleans are classes, other numbers are measurements.
        scores: model -> [E, S] or [E, S, classes]; every scan has a score.
    """

    scans: tuple[str, ...]
    patients: tuple[str, ...]
    truth: np.ndarray
    scores: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if not len(self.scans) == len(self.patients) == len(self.truth) == len(set(self.scans)):
            raise UserError(
                f"{len(self.scans)} scans with {len(set(self.scans))} different IDs, "
                f"{len(self.patients)} patients and {len(self.truth)} true values; "
                "give each scan once, with one patient and one true value"
            )
        if not np.isfinite(np.asarray(self.truth, dtype=np.float64)).all():
            raise UserError("a true value is not finite; leave out scans without a true value")
        for model, scores_ES in self.scores.items():
            if scores_ES.ndim < 2 or scores_ES.shape[1] != len(self.scans):
                raise UserError(
                    f"model {model}: scores have shape {scores_ES.shape}; expected "
                    f"(seeds, {len(self.scans)} scans) or (seeds, scans, classes)"
                )
            if not np.isfinite(scores_ES).all():
                raise UserError(f"model {model}: a score is not finite; every scan needs a score")

    @property
    def are_classes(self) -> bool:
        """Whether the truth is a class."""
        return bool(np.issubdtype(self.truth.dtype, np.integer) or self.truth.dtype == np.bool_)


@dataclass(frozen=True)
class PredictedScans:
    """What a task hands over for the statistics of a headline that is no mean over scans.

    Args:
        predictions: true values and scores of the test scans.
        metric: function of (truth, scores) that gives the headline value.
    """

    predictions: ScanPredictions
    metric: Metric


@dataclass(frozen=True)
class _Rows:
    """Scans on which a metric is computed, as indices.

    Args:
        people: scans of each patient.
        resamples: scans of each resample; a patient that was drawn twice has each scan twice.
    """

    people: tuple[np.ndarray, ...]
    resamples: tuple[np.ndarray, ...]


def _draw_rows(patients: Sequence[str], seed: int, num_resamples: int) -> _Rows:
    patient_S, num_patients = patient_numbers(patients)
    everything = np.arange(len(patient_S))
    resamples: list[np.ndarray] = []
    for counts_RP in intervals.patient_counts(num_patients, seed, num_resamples):
        times_RS = counts_RP[:, patient_S].astype(np.int64)
        resamples.extend(np.repeat(everything, times_S) for times_S in times_RS)
    people = tuple(np.flatnonzero(patient_S == one) for one in range(num_patients))
    return _Rows(people, tuple(resamples))


def metrics(
    predictions: ScanPredictions,
    metric: Metric,
    seed: int,
    *,
    reference: str = OWN_MODEL,
    limits: tuple[float, float] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    num_flips: int = NUM_FLIPS,
    with_p: bool = True,
) -> Statistics:
    """Metric of each model, computed again on every resample, and differences to the reference.

    With several seeds, the value is the mean of the metric over seeds, on the same resample for all
    seeds. The p-value exchanges the scores of both models for half of the patients, so the scores
    must be on the same scale, as probabilities are.

    Args:
        predictions: true values and scores of all scans.
        metric: function of (truth, scores) of some scans; NaN where it does not exist, as AUROC of
            one class.
        seed: random seed of the evaluation.
        reference: model that all others are compared with.
        limits: lowest and highest value of the metric; -inf or inf where unbounded.
        num_resamples: number of resamples of patients.
        num_flips: number of exchanges of patients, where not all are enumerated.
        with_p: whether p-values are computed.
    """
    predictions = _in_order(predictions)
    truth_S = predictions.truth
    drawn = _draw_rows(own_patients(predictions.scans, predictions.patients), seed, num_resamples)
    refusal = _why_no_metric_interval(predictions, drawn)
    everything = np.arange(len(truth_S))
    left_out = [np.setdiff1d(everything, scans) for scans in drawn.people]
    rows = [everything] if refusal else [everything, *left_out, *drawn.resamples]
    values = {
        model: np.array([[metric(truth_S[row], one_S[row]) for row in rows] for one_S in scores_ES])
        for model, scores_ES in predictions.scores.items()
    }
    num_patients = len(drawn.people)
    models, differences = [], []
    for model, values_ER in values.items():
        estimate = _metric_estimate(values_ER.mean(0), len(truth_S), num_patients, limits, refusal)
        if num_patients < MIN_PATIENTS:
            estimate = replace(estimate, listed=_listed(predictions, model))
        models.append(ModelValue(model, estimate, tuple(values_ER[:, 0].tolist())))
    between = None if limits is None else (limits[0] - limits[1], limits[1] - limits[0])
    for other in others(values, reference):
        gap_R = values[reference].mean(0) - values[other].mean(0)
        estimate = _metric_estimate(gap_R, len(truth_S), num_patients, between, refusal)
        p = math.nan
        if with_p and not refusal and math.isfinite(estimate.value):
            p = _p_of_metric(predictions, metric, drawn.people, (reference, other), seed, num_flips)
        exact = math.isfinite(p) and num_patients <= intervals.MAX_EXACT
        differences.append(Difference(reference, other, estimate, p, exact=exact))
    num_unknown = sum(not patient for patient in predictions.patients)
    return Statistics(tuple(models), with_holm(differences), num_resamples, seed, num_unknown)


def _metric_estimate(
    values_R: np.ndarray,
    num_scans: int,
    num_patients: int,
    limits: tuple[float, float] | None,
    refusal: str,
) -> PatientEstimate:
    """PatientEstimate from the metric on all scans, without each patient, and on each resample."""
    value = float(values_R[0])
    if refusal or not math.isfinite(value):
        return PatientEstimate(
            value, None, num_scans, num_patients, refusal or "the metric is undefined"
        )
    left_out_P, resampled_R = values_R[1 : num_patients + 1], values_R[num_patients + 1 :]
    usable_R = np.isfinite(resampled_R)
    skipped = int((~usable_R).sum())
    if usable_R.mean() < MIN_USABLE or not np.isfinite(left_out_P).all():
        why = f"the metric is undefined on {skipped} of {len(resampled_R)} resamples"
        return PatientEstimate(value, None, num_scans, num_patients, why, num_skipped=skipped)
    interval = intervals.bca_interval(value, resampled_R[usable_R], left_out_P, limits)
    why = "" if interval is not None else "all resamples have the same value"
    return PatientEstimate(value, interval, num_scans, num_patients, why, num_skipped=skipped)


def _listed(predictions: ScanPredictions, model: str) -> tuple[ListedScan, ...]:
    """Score of each scan, mean over seeds; of several classes, the score of the true one.

    It is empty if a scan has several scores and its true value is not one of the classes.
    """
    score_S = np.asarray(predictions.scores[model], dtype=np.float64).mean(0)
    if score_S.ndim == 2 and not predictions.are_classes:
        return ()
    if score_S.ndim == 2:
        score_S = score_S[np.arange(len(score_S)), predictions.truth.astype(np.int64)]
    rows = zip(predictions.scans, predictions.patients, score_S, predictions.truth)
    return tuple(
        ListedScan(scan, who, float(score), float(truth)) for scan, who, score, truth in rows
    )


def _why_no_metric_interval(predictions: ScanPredictions, drawn: _Rows) -> str:
    """Reason against an interval of a metric; empty where there is none."""
    if len(drawn.people) < MIN_PATIENTS:
        return too_few(len(drawn.people))
    if not predictions.are_classes:
        return ""
    for label in np.unique(predictions.truth):
        num = sum(bool((predictions.truth[scans] == label).any()) for scans in drawn.people)
        if num < MIN_PER_CLASS:
            return f"{num} patients of class {int(label)}, fewer than {MIN_PER_CLASS}"
    return ""


def _p_of_metric(
    predictions: ScanPredictions,
    metric: Metric,
    people: Sequence[np.ndarray],
    pair: tuple[str, str],
    seed: int,
    num_flips: int,
) -> float:
    """P-value of a difference of metrics: the scores of both models are exchanged by patient."""
    ours, theirs = (predictions.scores[model] for model in pair)
    num_seeds = max(len(ours), len(theirs))
    if not {len(ours), len(theirs)} <= {1, num_seeds}:
        return math.nan  # seeds cannot be paired
    ours, theirs = (np.broadcast_to(one, (num_seeds, *one.shape[1:])) for one in (ours, theirs))
    patient_S = np.empty(len(predictions.truth), dtype=np.int64)
    for number, scans in enumerate(people):
        patient_S[scans] = number
    signs_RP = intervals.sign_vectors(len(people), seed, num_flips)
    extra = (1,) * (ours.ndim - 2)
    truth_S = predictions.truth
    gaps = []
    for signs_P in np.concatenate([np.ones_like(signs_RP[:1]), signs_RP]):
        keep_S = (signs_P[patient_S] > 0).reshape(-1, *extra)
        first, second = np.where(keep_S, ours, theirs), np.where(keep_S, theirs, ours)
        each = [metric(truth_S, a) - metric(truth_S, b) for a, b in zip(first, second)]
        gaps.append(float(np.mean(each)))
    exact = len(people) <= intervals.MAX_EXACT
    return intervals.flipped_p(gaps[0], np.array(gaps[1:]), exact=exact)


def _in_order(predictions: ScanPredictions) -> ScanPredictions:
    """The predictions sorted by scan ID, so that the order of the rows changes no digit."""
    order = sorted(range(len(predictions.scans)), key=lambda index: predictions.scans[index])
    return ScanPredictions(
        tuple(predictions.scans[index] for index in order),
        tuple(predictions.patients[index] for index in order),
        predictions.truth[order],
        {model: scores[:, order] for model, scores in predictions.scores.items()},
    )


def joined(targets: Sequence[PredictedScans]) -> PredictedScans:
    """Several targets as one: its metric is the mean of theirs, on the same resamples.

    Args:
        targets: targets with the same models; their scans may differ.
    """
    scans = sorted({scan for one in targets for scan in one.predictions.scans})
    number = {scan: index for index, scan in enumerate(scans)}
    patients = [""] * len(scans)
    place_TS = np.full((len(targets), len(scans)), -1)  # position of each scan in each target
    for place_S, one in zip(place_TS, targets, strict=True):
        for position, scan in enumerate(one.predictions.scans):
            place_S[number[scan]] = position
            patients[number[scan]] = one.predictions.patients[position]
    scores = {}
    for model in targets[0].predictions.scores:
        columns = [_columns(one.predictions.scores[model]) for one in targets]
        filled = [np.zeros((len(each), len(scans), each.shape[2])) for each in columns]
        for place_S, whole_ESC, each_ESC in zip(place_TS, filled, columns, strict=True):
            whole_ESC[:, place_S >= 0] = each_ESC[:, place_S[place_S >= 0]]
        scores[model] = np.concatenate(filled, axis=2)
    widths = [_columns(next(iter(one.predictions.scores.values()))).shape[2] for one in targets]
    ends = np.cumsum([0, *widths])

    def mean_metric(scan_N: np.ndarray, score_NC: np.ndarray) -> float:
        values = []
        for target, one in enumerate(targets):
            position_N = place_TS[target, scan_N.astype(np.int64)]
            known_N = position_N >= 0
            own_NC = score_NC[known_N, ends[target] : ends[target + 1]]
            flat = next(iter(one.predictions.scores.values())).ndim == 2
            truth_N = one.predictions.truth[position_N[known_N]]
            values.append(one.metric(truth_N, own_NC[:, 0] if flat else own_NC))
        return float(np.mean(values))

    # the truth is the number of the scan, as a measurement: the metric looks up the true values
    truth_S = np.arange(len(scans), dtype=np.float64)
    joint = ScanPredictions(tuple(scans), tuple(patients), truth_S, scores)
    return PredictedScans(joint, mean_metric)


def _columns(scores: np.ndarray) -> np.ndarray:
    """Scores [E, S, C], of one column where they are [E, S]."""
    return scores[:, :, None] if scores.ndim == 2 else scores
