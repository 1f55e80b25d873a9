"""Chooses vector, block, scaling, head and its settings for one target, by validation patients.

Where the table of labels has an official split, its validation scans are used. Otherwise the
training patients are divided into folds, each of which is the validation side once; with many
patients, only the first is. With the chosen settings, the head is fitted again to all training
scans.

Axes: N training scans, C classes, F folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tapct.base import rng
from tapct.eval.heads import probes
from tapct.eval.heads.probes import FittedProbe, HeadSettings, Scaler, Settings, Target
from tapct.eval.metrics import scan_level
from tapct.eval.scans.train_test import VAL
from tapct.eval.targets.vectors import WINDOWS, ScanVectors, block_numbers

MIN_PATIENTS_TO_CHOOSE = 3
ONE_FOLD_FROM = 1000  # patients from which one fold in place of all is the validation side

Fold = tuple[np.ndarray, np.ndarray]  # numbers of the scans that are fitted to, and of validation


@dataclass(frozen=True)
class Candidate:
    """One way from features to a target, but for the settings of the head.

    Args:
        head: name of the head.
        vector: name of the vector, or `windows`.
        block: `last`, `middle` or `last4`.
        scaling: `zscore` or `raw`.
    """

    head: str
    vector: str
    block: str
    scaling: str

    def inputs(self, scans: Sequence[ScanVectors]) -> list[np.ndarray] | None:
        """What the head reads of each scan; None where the backbone does not have this vector."""
        if self.vector == WINDOWS:
            return [one.window_set(self.block) for one in scans]
        vectors = [one.vector(self.vector, self.block) for one in scans]
        known = [one for one in vectors if one is not None]
        return known if len(known) == len(scans) else None


@dataclass(frozen=True)
class Labelled:
    """The training scans of one target and one model.

    Args:
        scans: vectors of each scan.
        patients: patient of each scan.
        sides: side of each scan in the official split; empty where there is none.
        target: target of each scan.
    """

    scans: Sequence[ScanVectors]
    patients: Sequence[str]
    sides: Sequence[str]
    target: Target


@dataclass(frozen=True)
class Outcome:
    """A candidate with the settings that were best for it.

    Args:
        candidate: candidate.
        settings: chosen member of the head's grid.
        validation: AUROC or R^2 on the validation scans; NaN where nothing could be chosen.
        tie_break: second number, lower is better, for equal values.
        probe: head, fitted to all training scans; None where there is nothing to fit, as in kNN.
        num_filled: training scans without this vector, which got the mean of the others.
    """

    candidate: Candidate
    settings: Settings
    validation: float
    tie_break: float
    probe: FittedProbe | None = field(default=None, repr=False)
    num_filled: int = 0


@dataclass(frozen=True)
class ProbeChoice:
    """All candidates of one target and one model.

    Args:
        outcomes: candidates.
        best: number of the chosen one.
        how: one line on the validation scans.
        left_out: candidate vectors that this model does not have.
    """

    outcomes: tuple[Outcome, ...]
    best: int
    how: str
    left_out: tuple[str, ...]

    @property
    def chosen(self) -> Outcome:
        """The candidate that was best on the validation scans."""
        return self.outcomes[self.best]


def candidates(
    heads: Sequence[str], vectors: Sequence[str], blocks: Sequence[str], scalings: Sequence[str]
) -> list[Candidate]:
    """All combinations; heads on windows read the windows in place of the vectors."""
    found = []
    for head in heads:
        for vector in (WINDOWS,) if head in probes.SET_HEADS else vectors:
            for block in blocks:
                found += [Candidate(head, vector, block, scaling) for scaling in scalings]
    return found


def choose(
    wanted: Sequence[Candidate],
    labelled: Labelled,
    config: HeadSettings,
    num_folds: int,
    seed: int,
) -> ProbeChoice:
    """Choose the candidate and its settings with the best AUROC or R^2 on validation scans.

    Equal values are common with few scans: then the lower cross-entropy or absolute error decides,
    and then the order of the candidates.

    Args:
        wanted: candidates, at least one of which this model has.
        labelled: training scans.
        config: settings of the heads.
        num_folds: number of folds without an official split.
        seed: random seed of the folds and of heads that are trained by AdamW.
    """
    folds, how = make_folds(labelled, num_folds, seed)
    found, left_out = readable(wanted, labelled.scans)
    outcomes = [
        _outcome(candidate, inputs, labelled.target, folds, config, seed)
        for candidate, inputs in found
    ]
    return best_of(outcomes, how, left_out)


def readable(
    wanted: Sequence[Candidate], scans: Sequence[ScanVectors]
) -> tuple[list[tuple[Candidate, list[np.ndarray]]], list[str]]:
    """The candidates that a model has, each once, with what they read of each training scan.

    Args:
        wanted: candidates.
        scans: training scans.
    Returns:
        Pairs of a candidate and its inputs; and the vectors that the model does not have.
    """
    found: list[tuple[Candidate, list[np.ndarray]]] = []
    left_out: list[str] = []
    seen = set()
    for candidate in wanted:
        numbers = block_numbers(candidate.block, scans[0].num_blocks)
        key = (candidate.head, candidate.vector, numbers, candidate.scaling)
        if key in seen:  # `middle` of a model with one block is its last block
            continue
        seen.add(key)
        inputs = candidate.inputs(scans)
        if inputs is None or all(np.isnan(one).any() for one in inputs):
            left_out.append(f"{candidate.vector} of {candidate.block}")
        else:
            found.append((candidate, inputs))
    return found, list(dict.fromkeys(left_out))


def best_of(outcomes: Sequence[Outcome], how: str, left_out: Sequence[str]) -> ProbeChoice:
    """The choice among candidates by their values on the validation scans; the first of equals."""
    ranks = [_rank(one.validation, one.tie_break) for one in outcomes]
    best = ranks.index(max(ranks)) if ranks else -1
    return ProbeChoice(tuple(outcomes), best, how, tuple(left_out))


def _outcome(
    candidate: Candidate,
    inputs: list[np.ndarray],
    target: Target,
    folds: Sequence[Fold],
    config: HeadSettings,
    seed: int,
) -> Outcome:
    """The best settings of one candidate, and its head fitted to all training scans."""
    members = probes.grid(candidate.head, config)
    chosen, value, tie_break = members[len(members) // 2], math.nan, math.nan
    if folds:
        scores = _scores(candidate, inputs, target, folds, members, config, seed)
        best = max(range(len(members)), key=lambda number: _rank(*scores[number]))
        chosen, (value, tie_break) = members[best], scores[best]
    scaler = Scaler.of(inputs, candidate.scaling)
    scaled = [scaler(one) for one in inputs]
    (member,) = probes.fit(candidate.head, scaled, target, [chosen], config, seed)
    num_filled = sum(bool(np.isnan(one).any()) for one in inputs)
    return Outcome(candidate, chosen, value, tie_break, FittedProbe(scaler, member), num_filled)


def _scores(
    candidate: Candidate,
    inputs: list[np.ndarray],
    target: Target,
    folds: Sequence[Fold],
    members: Sequence[Settings],
    config: HeadSettings,
    seed: int,
) -> list[tuple[float, float]]:
    """Value and tie-break of each member, on the validation scans of all folds together."""
    predicted: list[list[np.ndarray]] = [[] for _ in members]
    for fitted_to, aside in folds:
        scaler = Scaler.of([inputs[i] for i in fitted_to], candidate.scaling)
        scaled = [scaler(inputs[i]) for i in fitted_to]
        held_out = [scaler(inputs[i]) for i in aside]
        fitted = probes.fit(candidate.head, scaled, target.rows(fitted_to), members, config, seed)
        for scores, member in zip(predicted, fitted, strict=True):
            scores.append(member.predict(held_out))
    truth = target.rows(np.concatenate([aside for _, aside in folds]))
    return [validation_score(truth, np.concatenate(scores)) for scores in predicted]


def validation_score(truth: Target, predicted: np.ndarray) -> tuple[float, float]:
    """What a choice is made by.

    Args:
        truth: target of the validation scans.
        predicted: probabilities (N, C), or numbers (N,).
    Returns:
        AUROC (mean over classes against the rest) and cross-entropy; or R^2 and mean absolute
        error.
    """
    if not truth.num_classes:
        value = scan_level.r_squared(truth.values_N, predicted)
        return value, scan_level.mean_absolute_error(truth.values_N, predicted)
    own_N = predicted[np.arange(len(predicted)), truth.values_N]
    cross_entropy = float(-np.log(own_N.clip(min=1e-12)).mean())
    scores = predicted[:, 1] if truth.num_classes == 2 else predicted
    return scan_level.auroc(truth.values_N, scores), cross_entropy


def _rank(value: float, tie_break: float) -> tuple[float, float]:
    """Order of candidates: larger is better; values are rounded, so that the last bits of a
    machine do not decide.
    """
    worst = -math.inf
    return (
        round(value, 9) if math.isfinite(value) else worst,
        -round(tie_break, 9) if math.isfinite(tie_break) else worst,
    )


def make_folds(labelled: Labelled, num_folds: int, seed: int) -> tuple[list[Fold], str]:
    """Divide the training scans for the choice.

    Args:
        labelled: training scans.
        num_folds: most folds.
        seed: random seed.
    Returns:
        Folds, empty where nothing can be chosen, and one line on them.
    """
    everything = np.arange(len(labelled.scans))
    is_val_N = np.array([side == VAL for side in labelled.sides])
    # an official split may have validation scans of patients that have training scans too
    patients_of_val = {labelled.patients[i] for i in np.flatnonzero(is_val_N).tolist()}
    is_other_N = np.array([patient not in patients_of_val for patient in labelled.patients])
    if is_val_N.any() and is_other_N.any():
        how = f"{int(is_val_N.sum())} validation scans of the official split"
        return [(everything[is_other_N], everything[is_val_N])], how
    fold_of = deal_patients(labelled, num_folds, seed)
    if not fold_of:
        few = f"fewer than {MIN_PATIENTS_TO_CHOOSE} training patients"
        return [], f"none: {few}, so the first candidate and the middle of its grid were taken"
    fold_N = np.array([fold_of[patient] for patient in labelled.patients])
    numbers = sorted(set(fold_of.values()))
    used = numbers[:1] if len(fold_of) >= ONE_FOLD_FROM else numbers
    folds = [(everything[fold_N != number], everything[fold_N == number]) for number in used]
    how = f"{len(numbers)}-fold cross-validation over {len(fold_of)} training patients"
    if len(used) == 1:
        num = int((fold_N == used[0]).sum())
        how = f"{num} scans of one fold of {len(numbers)} of the training patients"
    return folds, how


def deal_patients(labelled: Labelled, num_folds: int, seed: int) -> dict[str, int]:
    """Patient -> fold; empty with too few patients.

    Patients are dealt in turn: by their rarest class, or by their mean number, so that the folds
    are alike; the order within a class is random.
    """
    values: dict[str, list[float]] = {}
    for patient, value in zip(labelled.patients, labelled.target.values_N.tolist(), strict=True):
        values.setdefault(patient, []).append(value)
    if len(values) < MIN_PATIENTS_TO_CHOOSE:
        return {}
    rarest = len(values)
    keys: Mapping[str, float] = {patient: float(np.mean(own)) for patient, own in values.items()}
    if labelled.target.num_classes:
        num_with = {
            label: sum(label in own for own in values.values())
            for label in set(labelled.target.values_N.tolist())
        }
        rarest = min(num_with.values())
        by_count = sorted(num_with, key=lambda label: (num_with[label], label))
        keys = {p: min(by_count.index(label) for label in own) for p, own in values.items()}

    def place(patient: str) -> tuple[float, int, str]:
        return keys[patient], rng.hash_int(seed, "probe folds", rng.purpose_id(patient)), patient

    k = max(2, min(num_folds, rarest, len(values)))
    return {patient: number % k for number, patient in enumerate(sorted(values, key=place))}
