"""What the tasks on labels of whole scans share: vectors of the scans, predictions of the test
scans by every candidate, and their metrics.

Axes: N scans, C classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tapct.base import console
from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.config import setting
from tapct.eval.contract import Task
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.heads.probes import SCALINGS, Target
from tapct.eval.metrics import scan_level
from tapct.eval.metrics.prediction_statistics import Metric, PredictedScans, ScanPredictions
from tapct.eval.scans.labelled_scan import LabelledScan, ScanValue
from tapct.eval.scans.usable import Labels
from tapct.eval.scores import Breakdown, ScanScore, TaskResults
from tapct.eval.targets.probe_choice import Labelled, Outcome, ProbeChoice
from tapct.eval.targets.vectors import (
    BLOCKS,
    VECTOR_WORDS,
    ScanVectors,
    blocks_to_read,
    check_vectors,
    organ_of,
    organ_shares,
    scan_vectors,
)

DIGITS = 6  # of predictions in results.json


# metrics of headlines, as functions of true values and scores
METRICS: dict[str, Metric] = {
    "auroc": scan_level.auroc,
    "balanced_accuracy": scan_level.balanced_accuracy,
    "r2": scan_level.r_squared,
}


@dataclass(frozen=True)
class ScanConfig:
    """What is predicted, and from which vectors."""

    targets: tuple[str, ...] = setting(
        (), "names of targets of eval.scan_labels; empty: all targets of a suitable type"
    )
    vectors: tuple[str, ...] = setting(
        ("cls", "mean", "cls_mean", "mean_std_max"),
        f"vectors to choose from: {VECTOR_WORDS}",
    )
    blocks: tuple[str, ...] = setting(
        ("last",),
        "blocks to choose from; the feature cache grows with each block",
        choices=BLOCKS,
    )
    scaling: tuple[str, ...] = setting(
        ("zscore",),
        "scalings to choose from: `zscore` standardises each channel, `raw` leaves it unchanged",
        choices=SCALINGS,
    )
    all_predictions: bool = setting(
        False,
        "whether results.json holds the predictions of all combinations, and not only those of "
        "the chosen one",
    )


@dataclass(frozen=True)
class ScanTruth:
    """What is known about a scan.

    Args:
        scan: scan ID.
        patient: patient of the scan; the scan ID where it is unknown.
        side: side in the official split; empty where there is none.
        values: target -> value.
        shares: vector `mask:ORGAN` -> share of the organ in each patch.
    """

    scan: str
    patient: str
    side: str
    values: Mapping[str, ScanValue]
    shares: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class TestScans:
    """The test scans of one target and one model, in the order of their IDs.

    Args:
        scans: scan IDs.
        patients: patients.
        target: true values.
        predicted: of each candidate: probabilities (N, C), or numbers (N,).
    """

    scans: tuple[str, ...]
    patients: tuple[str, ...]
    target: Target
    predicted: tuple[np.ndarray, ...]


class ScanTask(Task[ScanTruth, dict[str, np.ndarray]]):
    """Predict targets of whole scans. State grows with the vectors of the training scans.

    Args:
        name: name of the task, for error messages.
        config: settings.
        seed: random seed.
        max_windows: windows that are kept of a scan, for candidates that read them.
    """

    labels = Labels.SCAN
    metric_names: tuple[str, ...] = ()  # the first one is the headline's
    headline_word: str = ""

    def __init__(self, name: str, config: ScanConfig, seed: int, max_windows: int = 0) -> None:
        self.name, self.config, self.seed = name, config, seed
        check_vectors(config.vectors, f"eval.tasks.{name}.vectors")
        self.check_some("blocks", config.blocks)
        self.check_some("scaling", config.scaling)
        self.max_windows = max_windows
        self.classes: dict[str, tuple[str, ...]] = {}  # target -> names; none for numbers
        self.left_out: dict[str, str] = {}  # target -> why it is not predicted
        self.choices: dict[str, dict[str, ProbeChoice]] = {}  # model -> target -> choice
        self.known: dict[str, ScanTruth] = {}  # training scans
        self._train: dict[str, dict[str, ScanVectors]] = defaultdict(dict)
        self._found_masks: set[str] = set()
        self._test_known: dict[str, ScanTruth] = {}
        # model -> scan -> target -> prediction of each candidate
        self._test: dict[str, dict[str, dict[str, list[np.ndarray]]]] = defaultdict(dict)
        self._results: TaskResults | None = None

    def check_some(self, key: str, values: Sequence[Any]) -> None:
        """Refuse a setting that leaves nothing to choose from."""
        if not values:
            raise UserError(f"eval.tasks.{self.name}.{key} is empty; give at least one value")

    def expect_values(
        self, train: Sequence[Mapping[str, ScanValue]], test: Sequence[Mapping[str, ScanValue]]
    ) -> None:
        """Refuse scans of which no result could come, before features are computed: no target is
        suitable, or none has two different values in the test scans, so that the headline would not
        exist.
        """
        without: list[str] = []
        for target in self._suitable_targets(train):
            found = [values[target] for values in test if target in values]
            if len({str(value) for value in found if self.is_learned(target, value)}) > 1:
                return
            without.append(target)
        if without:
            raise self.no_headline(", ".join(without))

    def no_headline(self, targets: str) -> UserError:
        """The error where no target has two different values in the test scans."""
        return UserError(
            f"task {self.name}: {self.headline_word} exists for no target, because each has fewer "
            f"than two different values in the test scans ({targets}). Give labels to more scans, "
            f"change eval.seed, or switch the task off with eval.tasks.{self.name}=null"
        )

    @property
    def needs_label_map(self) -> bool:
        """Whether a vector is pooled inside an organ."""
        return any(organ_of(vector) for vector in self.config.vectors)

    def named_labels(self) -> Mapping[str, tuple[str, ...]]:
        """The targets that the settings name."""
        return {"targets": self.config.targets}

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """All blocks that the probes may read."""
        return blocks_to_read(self.config.blocks, num_blocks)

    @abstractmethod
    def why_unsuitable(self, target: str, values: Sequence[ScanValue]) -> str:
        """Why the task has no probe for a target; empty where it has one.

        Args:
            target: name of the target.
            values: its values in the training scans.
        """

    @abstractmethod
    def encoded(self, target: str, values: Sequence[ScanValue]) -> Target:
        """Values of a target as classes or numbers."""

    @abstractmethod
    def is_learned(self, target: str, value: ScanValue) -> bool:
        """Whether a probe can predict this value, which a test scan has."""

    @abstractmethod
    def numbers(self, target: Target, predicted: np.ndarray) -> dict[str, float]:
        """Metrics of the predictions of test scans; the first one is the headline's."""

    @abstractmethod
    def scan_value(self, target: Target, predicted: np.ndarray) -> np.ndarray:
        """One number for each test scan: float64 (N,), for the rows of scans."""

    def truth(self, scan: LabelledScan, grid: PatchGrid, in_play_Z: np.ndarray) -> ScanTruth:
        """Read the values of a scan, and where its organs lie."""
        shares = organ_shares(scan, grid, self.config.vectors)
        patient = scan.patient or scan.id
        return ScanTruth(scan.id, patient, scan.official_side, dict(scan.scan_labels), shares)

    def learn(self, model: str, dense: DenseFeatures, truth: ScanTruth) -> None:
        """Keep the vectors of one training scan."""
        self._train[model][truth.scan] = self._vectors(dense, truth)
        self.known[truth.scan] = _without_shares(truth)
        self._found_masks |= set(truth.shares)

    def _vectors(self, dense: DenseFeatures, truth: ScanTruth) -> ScanVectors:
        return scan_vectors(
            dense,
            self.config.vectors,
            self.config.blocks,
            shares=truth.shares,
            max_windows=self.max_windows,
        )

    def fit(self) -> None:
        """Choose and fit the probes of each model and target.

        Raises:
            UserError: no target is suitable, one that the settings name is not, or no training scan
                has an organ that they name.
        """
        for vector in self.config.vectors:
            if organ_of(vector) and vector not in self._found_masks:
                raise UserError(
                    f"eval.tasks.{self.name}.vectors names {vector!r}, but no training scan has a "
                    f"label map with the label {organ_of(vector)!r}; correct it or leave it out"
                )
        targets = self._suitable_targets([truth.values for truth in self.known.values()])
        if self.left_out:
            console.say(f"{self.name}: left out: {', '.join(sorted(self.left_out))}")
        for model in list(self._train):
            vectors = self._train.pop(model)
            self.choices[model] = self.choose(model, targets, vectors)
            for target, choice in self.choices[model].items():
                self._check_outcomes(model, target, choice)

    def _check_outcomes(self, model: str, target: str, choice: ProbeChoice) -> None:
        if not choice.outcomes:
            raise UserError(
                f"eval.tasks.{self.name}.vectors: model {model} has none of "
                f"{', '.join(choice.left_out)} for target {target}; add one of {VECTOR_WORDS}"
            )

    def labelled(self, target: str, vectors: Mapping[str, ScanVectors]) -> Labelled:
        """The training scans of one model whose value of a target is known."""
        known = [self.known[scan] for scan in vectors if target in self.known[scan].values]
        return Labelled(
            [vectors[one.scan] for one in known],
            [one.patient for one in known],
            [one.side for one in known],
            self.encoded(target, [one.values[target] for one in known]),
        )

    @abstractmethod
    def choose(
        self, model: str, targets: Sequence[str], vectors: Mapping[str, ScanVectors]
    ) -> dict[str, ProbeChoice]:
        """Choose for each target of one model; the validation scans are among the training scans.

        Args:
            model: model name.
            targets: targets.
            vectors: training scan -> vectors.
        """

    @abstractmethod
    def predictions(
        self, model: str, targets: Sequence[str], vectors: ScanVectors
    ) -> dict[str, list[np.ndarray]]:
        """Target -> prediction of one scan by each of the candidates, in the order of
        `ProbeChoice.outcomes`: probabilities (C,), or a number ().
        """

    def _suitable_targets(self, train: Sequence[Mapping[str, ScanValue]]) -> list[str]:
        """Targets that get a probe, in the order of the settings or of their names; the others are
        in `left_out` from then on.

        Args:
            train: target -> value of each training scan.
        """
        values: dict[str, list[ScanValue]] = {}
        for of_scan in train:
            for target, value in of_scan.items():
                values.setdefault(target, []).append(value)
        suitable = []
        self.left_out = {}
        for target in self.config.targets or sorted(values):
            reason = self.why_unsuitable(target, values.get(target, []))
            if not reason:
                suitable.append(target)
                continue
            if target in self.config.targets:
                raise UserError(f"eval.tasks.{self.name}.targets: {target} {reason}")
            self.left_out[target] = reason
        if not suitable:
            lines = "; ".join(f"{target} {reason}" for target, reason in self.left_out.items())
            raise UserError(
                f"task {self.name} has no suitable target in eval.scan_labels: {lines or 'none'}. "
                f"Add one, or switch the task off with eval.tasks.{self.name}=null"
            )
        return suitable

    def judge(self, model: str, dense: DenseFeatures, truth: ScanTruth) -> dict[str, np.ndarray]:
        """Predict the known targets of a test scan with every candidate; returns the predictions of
        the chosen ones.
        """
        self._results = None
        vectors = self._vectors(dense, truth)
        self._test_known[truth.scan] = _without_shares(truth)
        targets = [target for target in self.choices[model] if target in truth.values]
        predictions = self.predictions(model, targets, vectors)
        self._test[model][truth.scan] = predictions
        return {
            target: each[self.choices[model][target].best] for target, each in predictions.items()
        }

    def test_scans(self, model: str, target: str) -> TestScans:
        """The test scans of a target whose value a probe can predict."""
        per_scan = self._test[model]
        known = []
        for scan in sorted(per_scan):
            truth = self._test_known[scan]
            if target in per_scan[scan] and self.is_learned(target, truth.values[target]):
                known.append(truth)
        predicted = [per_scan[one.scan][target] for one in known]
        columns = zip(*predicted, strict=True)
        return TestScans(
            tuple(one.scan for one in known),
            tuple(one.patient for one in known),
            self.encoded(target, [one.values[target] for one in known]),
            tuple(np.stack(column) for column in columns),
        )

    def scan_predictions(self, target: str) -> ScanPredictions:
        """Predictions of the chosen probe of every model, for intervals and paired differences."""
        of_model = {model: self.test_scans(model, target) for model in self._test}
        first = next(iter(of_model.values()))
        scores = {
            model: _scores(one, one.predicted[self.choices[model][target].best])[None]
            for model, one in of_model.items()
        }
        return ScanPredictions(first.scans, first.patients, first.target.values_N, scores)

    def predicted_scans(self) -> dict[str, PredictedScans]:
        """The same for the targets of the headline, with its metric, for the runner."""
        breakdown = self.results().breakdown
        metric = METRICS[self.metric_names[0]]
        targets = breakdown.values if breakdown is not None else ()
        return {target: PredictedScans(self.scan_predictions(target), metric) for target in targets}

    def results(self) -> TaskResults:
        """Metrics of each target, the chosen probe, and all candidates in one table per target."""
        if self._results is None:
            self._results = self._computed()
        return self._results

    def _computed(self) -> TaskResults:
        models: dict[str, dict[str, Any]] = {}
        rows: dict[tuple[str, str], dict[str, float]] = {}
        for model, per_scan in self._test.items():
            rows |= {(scan, model): {} for scan in per_scan}
            sections: dict[str, Any] = {}
            for target in self.choices[model]:
                tested = self.test_scans(model, target)
                sections[target] = self._section(model, target, tested)
                if tested.scans:
                    predicted = tested.predicted[self.choices[model][target].best]
                    values_N = self.scan_value(tested.target, predicted)
                    for scan, value in zip(tested.scans, values_N.tolist(), strict=True):
                        rows[scan, model][target] = value
            models[model] = {**self._means(sections), "targets": sections}
        scans = tuple(
            ScanScore(scan, model, self._row_value(parts), parts)
            for (scan, model), parts in rows.items()
        )
        return TaskResults(models, scans, self._breakdown(models))

    @abstractmethod
    def _row_value(self, parts: Mapping[str, float]) -> float:
        """Value of the row of a scan, from its numbers by target."""

    def _section(self, model: str, target: str, tested: TestScans) -> dict[str, Any]:
        """What results.json holds of one model and one target."""
        choice = self.choices[model][target]
        table = []
        for number, outcome in enumerate(choice.outcomes):
            numbers: dict[str, float] = {}
            if tested.scans:
                numbers = self.numbers(tested.target, tested.predicted[number])
            table.append(
                {
                    **_described(outcome),
                    **{name: or_none(value) for name, value in numbers.items()},
                    "chosen": number == choice.best,
                }
            )
            if self.config.all_predictions and tested.scans:
                table[-1]["predictions"] = self.predictions_json(target, tested, number)
        chosen = table[choice.best]
        # a target whose value no test scan has is without metrics
        metrics = {name: chosen.get(name) for name in self.metric_names}
        is_known = [target in one.values for one in self.known.values()]
        with_value = [s for s, parts in self._test[model].items() if target in parts]
        return {
            **metrics,
            "num_train": sum(is_known),
            "num_test": len(tested.scans),
            "num_unseen": len(with_value) - len(tested.scans),
            "chosen": _described(choice.chosen),
            "chosen_by": choice.how,
            "table": table,
            "left_out": list(choice.left_out),
            **self.details(model, target, tested),
        }

    @abstractmethod
    def predictions_json(self, target: str, tested: TestScans, number: int) -> dict[str, Any]:
        """Test scan -> true value and prediction, as results.json holds them.

        Args:
            target: name of the target.
            tested: its test scans.
            number: number of the candidate.
        """

    def details(self, model: str, target: str, tested: TestScans) -> dict[str, Any]:
        """Further entries of a section, e.g. predictions."""
        if not tested.scans:
            return {}
        best = self.choices[model][target].best
        return {"predictions": self.predictions_json(target, tested, best)}

    def _means(self, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        """Mean of each metric over the targets that have it."""
        means: dict[str, float | None] = {}
        for name in self.metric_names:
            known = [one[name] for one in sections.values() if one[name] is not None]
            means[name] = float(np.mean(known)) if known else None
        return means

    def _breakdown(self, models: Mapping[str, Mapping[str, Any]]) -> Breakdown:
        name = self.metric_names[0]
        values: dict[str, dict[str, float]] = {}
        for model, entry in models.items():
            for target, section in entry["targets"].items():
                if section[name] is not None:
                    values.setdefault(target, {})[model] = section[name]
        return Breakdown(f"{self.headline_word} of each target", "target", values)

    def headline_values(self) -> dict[str, float]:
        """Model -> mean of the headline metric over targets.

        Raises:
            UserError: it exists for no target.
        """
        values: dict[str, float] = {}
        for model, entry in self.results().models.items():
            value = entry[self.metric_names[0]]
            if value is None:
                raise self.no_headline(", ".join(sorted(self.choices[model])))
            values[model] = value
        return values

    def mean_of(self) -> str:
        """Targets of the mean, and those that are not in it."""
        breakdown = self.results().breakdown
        inside = list(breakdown.values) if breakdown else []
        outside = sorted({t for own in self.choices.values() for t in own} - set(inside))
        outside = [f"{target} (fewer than two values in the test scans)" for target in outside]
        outside += [f"{target} ({reason})" for target, reason in sorted(self.left_out.items())]
        line = f"mean of {counted(len(inside), 'target')}: {', '.join(inside)}"
        return line + (f"; left out: {', '.join(outside)}" if outside else "")


def _scores(tested: TestScans, predicted: np.ndarray) -> np.ndarray:
    """Scores as rank metrics read them: of two classes, the probability of class 1."""
    return predicted[:, 1] if tested.target.num_classes == 2 else predicted


def _described(outcome: Outcome) -> dict[str, Any]:
    """A candidate and its settings, as results.json holds them."""
    candidate = outcome.candidate
    return {
        "head": candidate.head,
        "vector": candidate.vector,
        "block": candidate.block,
        "scaling": candidate.scaling,
        "settings": dict(outcome.settings),
        "validation": or_none(outcome.validation),
        "num_filled": outcome.num_filled,
    }


def _without_shares(truth: ScanTruth) -> ScanTruth:
    return ScanTruth(truth.scan, truth.patient, truth.side, truth.values)


def or_none(value: float) -> float | None:
    """A number for JSON, which knows no NaN."""
    return value if math.isfinite(value) else None
