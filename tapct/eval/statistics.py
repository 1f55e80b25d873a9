"""How certain the numbers of an evaluation are: intervals, paired differences, p-values.

`means` is for metrics that are means over scans (Dice, NSD, absolute error);
`prediction_statistics` is for the others (AUROC, balanced accuracy, R^2). Both resample patients,
so all scans of a patient stay together, and both compare models on the same patients.
docs/evaluation.md, "Statistics", has the rules for readers and the coverage that was measured.

Axes: E seeds, S scans, P patients, K parts (e.g. organs), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.eval import intervals
from tapct.eval.intervals import NUM_RESAMPLES, Interval
from tapct.eval.scores import OWN_MODEL, ScanScore

MIN_PATIENTS = 10  # no interval and no p-value below it


@dataclass(frozen=True)
class ScanTable:
    """The values of all models on all scans.

    Args:
        scans: scan IDs.
        patients: patient of each scan; empty where unknown, then the scan counts as a patient of
            its own, as in the split.
        parts: names of the parts that are averaged, e.g. organs; one name where there are none.
        values: model -> float64 [E, S, K]; NaN where there is no value. Models may have different
            numbers of seeds.
    """

    scans: tuple[str, ...]
    patients: tuple[str, ...]
    parts: tuple[str, ...]
    values: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if len(self.patients) != len(self.scans) or len(set(self.scans)) != len(self.scans):
            raise UserError(
                f"{len(self.scans)} scans with {len(set(self.scans))} different IDs and "
                f"{len(self.patients)} patients; give each scan once, with one patient"
            )
        for model, values_ESK in self.values.items():
            expected = (len(self.scans), len(self.parts))
            if values_ESK.ndim != 3 or values_ESK.shape[1:] != expected or not len(values_ESK):
                raise UserError(
                    f"model {model}: values have shape {values_ESK.shape}; expected "
                    f"(seeds, {expected[0]} scans, {expected[1]} parts)"
                )
            if np.isinf(values_ESK).any():
                raise UserError(f"model {model}: a value is infinite; use NaN where there is none")

    def of_part(self, part: str) -> ScanTable:
        """The same table for one part alone."""
        index = self.parts.index(part)
        values = {model: table[:, :, index : index + 1] for model, table in self.values.items()}
        return replace(self, parts=(part,), values=values)


@dataclass(frozen=True)
class ListedScan:
    """A scan that is shown because there are too few patients for an interval.

    Args:
        scan: scan ID.
        patient: its patient; empty where unknown.
        value: value of the metric on this scan; its score where the metric is no mean over scans.
        truth: true value that the score is compared with; NaN where the metric is a mean.
    """

    scan: str
    patient: str
    value: float
    truth: float = math.nan


@dataclass(frozen=True)
class PatientEstimate:
    """A value and how certain it is.

    Args:
        value: mean or metric; with several seeds, of the values averaged over seeds.
        interval: 95 % interval over patients; None where there is none.
        num_scans: scans with a value.
        num_patients: their patients.
        why_none: reason why there is no interval; empty where there is one.
        listed: the scans, where there are fewer than `MIN_PATIENTS` patients.
        num_skipped: resamples on which the metric does not exist, such as AUROC of one class.
    """

    value: float
    interval: Interval | None
    num_scans: int
    num_patients: int
    why_none: str = ""
    listed: tuple[ListedScan, ...] = ()
    num_skipped: int = 0


@dataclass(frozen=True)
class ModelValue:
    """The result of one model.

    Args:
        model: model name.
        estimate: its value.
        by_seed: value of each seed alone.
    """

    model: str
    estimate: PatientEstimate
    by_seed: tuple[float, ...]

    @property
    def seed_sd(self) -> float:
        """Standard deviation over seeds (n - 1 in the denominator); NaN for a single seed."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """The reference minus another model, on the scans that have values of both.

    Args:
        reference: model name.
        other: model name.
        estimate: value of the reference minus that of the other model.
        p: two-sided p-value; NaN where there is none.
        p_holm: the same, adjusted for the number of comparisons (Holm).
        exact: whether all flips were enumerated for `p`.
        num_comparisons: number of p-values that `p_holm` is adjusted for.
    """

    reference: str
    other: str
    estimate: PatientEstimate
    p: float = math.nan
    p_holm: float = math.nan
    exact: bool = False
    num_comparisons: int = 0


@dataclass(frozen=True)
class Statistics:
    """Values of all models and differences of the reference to all other models.

    Args:
        models: one value per model.
        differences: one per other model; empty where the reference is missing.
        num_resamples: resamples of patients behind each interval.
        seed: random seed of the resamples.
        num_unknown: scans of unknown patient, each counted as a patient of its own.
    """

    models: tuple[ModelValue, ...]
    differences: tuple[Difference, ...]
    num_resamples: int
    seed: int
    num_unknown: int = 0

    def lines(self, digits: int = 3) -> list[str]:
        """The statistics as lines for a terminal; each names its numbers of scans and patients."""
        lines = []
        for one in self.models:
            seeds = ""
            if len(one.by_seed) > 1:
                mean = float(np.mean(one.by_seed))
                seeds = f"; {len(one.by_seed)} seeds {mean:.{digits}f} ± {one.seed_sd:.{digits}f}"
            lines.append(f"{one.model}: {_shown(one.estimate, digits)}{seeds}")
            lines.extend(_listed_lines(one.estimate, digits))
        for pair in self.differences:
            line = f"{pair.reference} - {pair.other}: {_shown(pair.estimate, digits, sign='+')}"
            if math.isfinite(pair.p):
                kind = "exact" if pair.exact else "sampled"
                line += (
                    f"; p = {pair.p:.2g} ({kind}), {pair.p_holm:.2g} after Holm's adjustment "
                    f"for {pair.num_comparisons} comparisons"
                )
            lines.append(line)
            lines.extend(_listed_lines(pair.estimate, digits))
        if self.num_unknown:
            lines.append(
                f"{self.num_unknown} scans of unknown patient count as a patient of their own each"
            )
        return lines


def table_of(
    scores_by_seed: Sequence[Sequence[ScanScore]],
    patient_of: Mapping[str, str],
    *,
    by_part: bool,
) -> ScanTable:
    """Collect the rows of a task, of one seed or several, into a table.

    Args:
        scores_by_seed: rows of each seed; a scan may be missing in some seeds.
        patient_of: scan ID -> patient; empty or missing where unknown.
        by_part: whether the result is the mean over parts of the mean over scans, as mean Dice is;
            else it is the mean over scans of `ScanScore.value`.
    """
    rows = [(seed, score) for seed, scores in enumerate(scores_by_seed) for score in scores]
    scans = sorted({score.scan for _, score in rows})
    part_names = {part for _, score in rows for part in score.parts}
    parts = sorted(part_names) if by_part else ["value"]
    scan_at = {scan: index for index, scan in enumerate(scans)}
    seeds_of: dict[str, list[int]] = {}
    seen: set[tuple[int, str, str]] = set()
    for seed, score in rows:
        key = (seed, score.model, score.scan)
        if key in seen:
            raise UserError(f"model {score.model} has two rows of scan {score.scan}; give one")
        seen.add(key)
        if seed not in seeds_of.setdefault(score.model, []):
            seeds_of[score.model].append(seed)
    shape = (len(scans), len(parts))
    values = {model: np.full((len(own), *shape), np.nan) for model, own in seeds_of.items()}
    for seed, score in rows:
        target_K = values[score.model][seeds_of[score.model].index(seed), scan_at[score.scan]]
        if by_part:
            target_K[:] = [score.parts.get(part, math.nan) for part in parts]
        else:
            target_K[0] = score.value
    patients = tuple(patient_of.get(scan, "") for scan in scans)
    return ScanTable(tuple(scans), patients, tuple(parts), values)


def means(
    table: ScanTable,
    seed: int,
    *,
    reference: str = OWN_MODEL,
    limits: tuple[float, float] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    with_p: bool = True,
) -> Statistics:
    """Mean of each model over scans, and paired differences to the reference.

    Args:
        table: values of all models.
        seed: random seed of the evaluation.
        reference: model that all others are compared with.
        limits: lowest and highest value that the metric can take, such as (0, 1) for Dice.
        num_resamples: number of resamples of patients.
        with_p: whether p-values are computed.
    """
    table = _in_order(table)
    averaged = {model: _over_seeds(values) for model, values in table.values.items()}
    models = []
    for model, values_SK in averaged.items():
        estimate = _mean_estimate(table, values_SK, seed, limits, num_resamples)
        by_seed = tuple(_plain_mean(seed_SK) for seed_SK in table.values[model])
        models.append(ModelValue(model, estimate, by_seed))
    width = limits[1] - limits[0] if limits is not None else math.inf
    differences = []
    for other in others(averaged, reference):
        difference_SK = averaged[reference] - averaged[other]
        between = None if limits is None else (-width, width)
        estimate = _mean_estimate(table, difference_SK, seed, between, num_resamples)
        p, exact = _p_of_mean(table, difference_SK, seed) if with_p else (math.nan, False)
        differences.append(Difference(reference, other, estimate, p, exact=exact))
    num_unknown = sum(not patient for patient in table.patients)
    return Statistics(tuple(models), with_holm(differences), num_resamples, seed, num_unknown)


def _mean_estimate(
    table: ScanTable,
    values_SK: np.ndarray,
    seed: int,
    limits: tuple[float, float] | None,
    num_resamples: int,
) -> PatientEstimate:
    """Mean over parts of the mean over scans, with its interval."""
    has_S = np.isfinite(values_SK).any(1)
    if not has_S.any():
        return PatientEstimate(math.nan, None, 0, 0, "no scan has a value")
    sum_PK, count_PK = _by_patient(table, values_SK)
    mean = intervals.mean_of_parts(sum_PK, count_PK)
    num_scans, num_patients = int(has_S.sum()), len(sum_PK)
    if num_patients < MIN_PATIENTS:
        listed = tuple(
            ListedScan(table.scans[scan], table.patients[scan], float(np.nanmean(values_SK[scan])))
            for scan in np.flatnonzero(has_S)
        )
        return PatientEstimate(mean, None, num_scans, num_patients, too_few(num_patients), listed)
    interval = intervals.interval_of_mean(sum_PK, count_PK, seed, limits, num_resamples)
    why = "" if interval is not None else "all patients have the same value"
    return PatientEstimate(mean, interval, num_scans, num_patients, why)


def _p_of_mean(table: ScanTable, difference_SK: np.ndarray, seed: int) -> tuple[float, bool]:
    """Sign-flip p-value of a mean difference, and whether it is exact; NaN for few patients."""
    if not np.isfinite(difference_SK).any():
        return math.nan, False
    sum_PK, count_PK = _by_patient(table, difference_SK)
    if len(sum_PK) < MIN_PATIENTS:
        return math.nan, False
    count_K = count_PK.sum(0)
    present_K = count_K > 0
    contribution_P = (sum_PK[:, present_K] / count_K[present_K]).mean(1)
    return intervals.sign_flip_p(contribution_P, seed), len(sum_PK) <= intervals.MAX_EXACT


def _by_patient(table: ScanTable, values_SK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of values of each patient that has one, both [P, K]."""
    has_S = np.isfinite(values_SK).any(1)
    own = [patient for patient, has in zip(own_patients(table.scans, table.patients), has_S) if has]
    patient_S, num_patients = patient_numbers(own)
    finite_SK = np.isfinite(values_SK[has_S])
    sum_PK = np.zeros((num_patients, values_SK.shape[1]))
    count_PK = np.zeros_like(sum_PK)
    np.add.at(sum_PK, patient_S, np.where(finite_SK, values_SK[has_S], 0.0))
    np.add.at(count_PK, patient_S, finite_SK.astype(np.float64))
    return sum_PK, count_PK


def _plain_mean(values_SK: np.ndarray) -> float:
    """Mean over parts of the mean over scans of one seed; NaN where no scan has a value."""
    finite_SK = np.isfinite(values_SK)
    if not finite_SK.any():
        return math.nan
    return intervals.mean_of_parts(np.where(finite_SK, values_SK, 0.0), finite_SK.astype(float))


def _over_seeds(values_ESK: np.ndarray) -> np.ndarray:
    """Mean over the seeds that have a value, [S, K]; NaN where none has."""
    finite_ESK = np.isfinite(values_ESK)
    num_SK = finite_ESK.sum(0)
    sum_SK = np.where(finite_ESK, values_ESK, 0.0).sum(0)
    return np.where(num_SK > 0, sum_SK / np.maximum(num_SK, 1), np.nan)


def others(values: Mapping[str, np.ndarray], reference: str) -> list[str]:
    """Models that are compared with the reference; none where the reference is missing."""
    return [model for model in values if model != reference] if reference in values else []


def with_holm(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    """Add the adjusted p-values; comparisons without a p-value are not counted."""
    tested = [pair for pair in differences if math.isfinite(pair.p)]
    adjusted = dict(
        zip((pair.other for pair in tested), intervals.holm([pair.p for pair in tested]))
    )
    return tuple(
        replace(
            pair,
            p_holm=adjusted.get(pair.other, math.nan),
            num_comparisons=len(tested) if pair.other in adjusted else 0,
        )
        for pair in differences
    )


def own_patients(scans: Sequence[str], patients: Sequence[str]) -> tuple[str, ...]:
    """Patient of each scan; a scan of unknown patient is a patient of its own."""
    return tuple(patient or f"\0{scan}" for scan, patient in zip(scans, patients))


def patient_numbers(patients: Sequence[str]) -> tuple[np.ndarray, int]:
    """Number of the patient of each scan, in the order of their names, and how many there are."""
    names, patient_S = np.unique(np.array(patients, dtype=object), return_inverse=True)
    return patient_S, len(names)


def too_few(num_patients: int) -> str:
    """Reason against an interval."""
    return f"{counted(num_patients, 'patient')}, fewer than {MIN_PATIENTS}"


def _in_order(table: ScanTable) -> ScanTable:
    """The table sorted by scan ID, so that the order of the rows changes no digit."""
    order = sorted(range(len(table.scans)), key=lambda index: table.scans[index])
    return ScanTable(
        tuple(table.scans[index] for index in order),
        tuple(table.patients[index] for index in order),
        table.parts,
        {model: values[:, order] for model, values in table.values.items()},
    )


def _shown(estimate: PatientEstimate, digits: int, sign: str = "") -> str:
    """Value, interval or the reason against one, and the numbers of scans and patients."""
    text = f"{estimate.value:{sign}.{digits}f}"
    if estimate.interval is not None:
        low, high = estimate.interval.low, estimate.interval.high
        text += f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    text += f" (n = {estimate.num_scans} scans of {estimate.num_patients} patients)"
    if estimate.why_none:
        text += f", no interval: {estimate.why_none}"
    if estimate.num_skipped:
        text += f", {estimate.num_skipped} resamples skipped on which the metric is undefined"
    return text


def _listed_lines(estimate: PatientEstimate, digits: int) -> list[str]:
    lines = []
    for one in estimate.listed:
        line = f"  scan {one.scan}, patient {one.patient or 'unknown'}: {one.value:.{digits}f}"
        lines.append(line if math.isnan(one.truth) else f"{line} (truth {one.truth:g})")
    return lines
