"""Runs that were evaluated on the same test scans: the paired difference of each to the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tapct.eval import statistics
from tapct.eval.results.json_file import Evaluation
from tapct.eval.scores import OWN_MODEL
from tapct.eval.statistics import Difference


@dataclass(frozen=True)
class PairedRuns:
    """Runs compared by the headline of one task.

    Args:
        first: name of the run that is subtracted.
        differences: name of a run -> that run minus the first one.
        why_not: name of a run -> reason why it cannot be compared with the first one.
    """

    first: str
    differences: Mapping[str, Difference]
    why_not: Mapping[str, str]


def paired(runs: Sequence[tuple[str, Evaluation | None]], task: str) -> PairedRuns | None:
    """Compare the pretrained models of runs by patient.

    Args:
        runs: name and evaluation of each run.
        task: task name.
    Returns:
        None where fewer than two runs have the task.
    """
    known: list[tuple[str, Evaluation]] = []
    for name, evaluation in runs:
        if evaluation is not None and task in evaluation.tasks:
            known.append((name, evaluation))
    if len(known) < 2:
        return None
    (first, reference), *others = known
    differences: dict[str, Difference] = {}
    why_not: dict[str, str] = {}
    for name, evaluation in others:
        reason = _why_not(reference, evaluation, task)
        if reason:
            why_not[name] = reason
            continue
        differences[name] = _difference(first, reference, name, evaluation, task)
    adjusted = statistics.with_holm(tuple(differences.values()))
    return PairedRuns(first, dict(zip(differences, adjusted, strict=True)), why_not)


def _why_not(one: Evaluation, other: Evaluation, task: str) -> str:
    """Reason why two evaluations cannot be paired; empty where they can."""
    ours, theirs = one.tasks[task], other.tasks[task]
    if not one.split.test_patients or not other.split.test_patients:
        return "an earlier version of tapct did not write which scans are of one patient"
    shared = ours.config.keys() & theirs.config.keys()  # a later version may have more settings
    same_settings = all(ours.config[key] == theirs.config[key] for key in shared)
    if ours.headline.metric != theirs.headline.metric or not same_settings:
        return "the settings of the task differ"
    if _scans(one, task) != _scans(other, task):
        return "the test scans differ"
    if set(one.split.train) != set(other.split.train):
        return "the training scans differ"
    if _labels(one) != _labels(other):
        return "the voxels or the labels differ"
    if ours.statistics is None or ours.statistics.of(ours.headline.metric) is None:
        return "the headline has no statistics"
    if not ours.results.scans or ours.statistics.why_none:
        return "the headline is no mean over scans"
    return ""


def _labels(evaluation: Evaluation) -> tuple[str, str] | None:
    """Digests of voxels and labels; None for evaluations without a store."""
    data = evaluation.origin.data
    return None if data is None else (data.store, data.labels)


def _scans(evaluation: Evaluation, task: str) -> set[str]:
    rows = evaluation.tasks[task].results.scans
    return {row.scan for row in rows if row.model == OWN_MODEL}


def _difference(
    first: str, reference: Evaluation, name: str, evaluation: Evaluation, task: str
) -> Difference:
    """A run minus the first one; the models of the table are the runs."""
    rows = []
    for run, found in (("first", reference), ("other", evaluation)):
        scores = found.tasks[task].results.scans
        rows += [replace(row, model=run) for row in scores if row.model == OWN_MODEL]
    split, section = reference.split, reference.tasks[task]
    patient_of = dict(zip(split.test, split.test_patients, strict=True))
    table = statistics.table_of([rows], patient_of, by_part=section.results.mean_over_parts)
    (difference,) = statistics.means(
        table, reference.seed, reference="other", limits=section.headline.range
    ).differences
    return replace(difference, reference=name, other=first)
