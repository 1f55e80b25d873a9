"""Nearest neighbours of whole scans: classes by a weighted vote, and retrieval of scans that have
the same class.

Axes: N training scans, D channels, K neighbours, C classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tapct.config import setting
from tapct.eval.features.dense import DenseFeatures
from tapct.eval.heads import neighbours
from tapct.eval.heads.probes import Scaler
from tapct.eval.scans.train_test import VAL
from tapct.eval.scores import Headline
from tapct.eval.targets import probe_choice
from tapct.eval.targets.class_task import ClassTask
from tapct.eval.targets.probe_choice import Candidate, Labelled, Outcome, ProbeChoice
from tapct.eval.targets.scan_task import ScanConfig, ScanTruth, TestScans
from tapct.eval.targets.vectors import ScanVectors

KNN = "knn"


@dataclass(frozen=True)
class Config(ScanConfig):
    """Settings of the vote and of the retrieval."""

    k: tuple[int, ...] = setting(
        (10, 20, 100, 200),
        "numbers of neighbours to choose from. The precision of the retrieval is also measured "
        "among this number of most similar scans. If a number is larger than the number of "
        "training scans, all training scans vote; arXiv:2304.07193",
        ge=1,
    )
    temperature: float = setting(
        0.07, "temperature of the vote: weights are exp(cosine / T); arXiv:2304.07193", gt=0
    )


@dataclass(frozen=True)
class VectorSpace:
    """The training scans of one model in one vector.

    Args:
        candidate: vector, block and scaling.
        scaler: scaling.
        unit_ND: float32, scaled vectors of length 1.
        num_filled: scans without this vector, which got the mean of the others.
    """

    candidate: Candidate
    scaler: Scaler
    unit_ND: Tensor = field(repr=False)
    num_filled: int


@dataclass(frozen=True)
class Retrieved:
    """How well the training scans with the class of one test scan are found.

    Args:
        precision: average precision of the ranking of all training scans.
        precision_at: k -> share of the first k that have the class.
        share: share of all training scans that have it, the value by chance.
    """

    precision: float
    precision_at: Mapping[int, float]
    share: float


class Knn(ClassTask):
    """Find the class of a scan by the training scans that are most similar to it."""

    metric_names = ("balanced_accuracy", "auroc", "auprc", "brier")
    headline_word = "balanced accuracy"

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__("knn", config, seed)
        self.check_some("k", config.k)
        self.own = config
        self._spaces: dict[str, list[VectorSpace]] = {}  # model -> spaces
        self._rows: dict[str, dict[str, np.ndarray]] = {}  # model -> target -> training scans
        self._labels: dict[str, dict[str, Tensor]] = {}  # model -> target -> their classes
        self._ranked: dict[str, np.ndarray] = {}  # target -> classes, most similar scan first
        # (model, target) -> test scan -> quality of its retrieval
        self._retrieved: dict[tuple[str, str], dict[str, Retrieved]] = defaultdict(dict)

    def choose(
        self, model: str, targets: Sequence[str], vectors: Mapping[str, ScanVectors]
    ) -> dict[str, ProbeChoice]:
        """Choose vector, block, scaling and k for each target. Neighbours of a scan are never of
        its own patient.
        """
        wanted = probe_choice.candidates(
            [KNN], self.config.vectors, self.config.blocks, self.config.scaling
        )
        found, left_out = probe_choice.readable(wanted, list(vectors.values()))
        self._spaces[model] = [_space(candidate, inputs) for candidate, inputs in found]
        place = {scan: number for number, scan in enumerate(vectors)}
        self._rows[model], self._labels[model] = {}, {}
        choices = {}
        for target in targets:
            labelled = self.labelled(target, vectors)
            known = [scan for scan in vectors if target in self.known[scan].values]
            self._rows[model][target] = np.array([place[scan] for scan in known])
            self._labels[model][target] = torch.from_numpy(labelled.target.values_N)
            choices[target] = self._choice(model, target, labelled, left_out)
        return choices

    def _choice(
        self, model: str, target: str, labelled: Labelled, left_out: Sequence[str]
    ) -> ProbeChoice:
        """All pairs of a space and a k, with their value on the validation scans."""
        is_val_N = np.array([side == VAL for side in labelled.sides])
        patient_N = np.unique(labelled.patients, return_inverse=True)[1]
        how = f"each of {len(set(labelled.patients))} training patients by the others"
        if is_val_N.any() and not is_val_N.all():
            how = f"{int(is_val_N.sum())} validation scans of the official split"
            queries, known = np.flatnonzero(is_val_N), np.flatnonzero(~is_val_N)
        else:
            queries = known = np.arange(len(patient_N))
        forbidden_QN = torch.from_numpy(patient_N[queries][:, None] == patient_N[known])
        outcomes = []
        for space in self._spaces[model]:
            unit_ND = space.unit_ND[self._rows[model][target]]
            similarity_QK, number_QK = neighbours.nearest(
                unit_ND[queries], unit_ND[known], max(self.own.k), forbidden_QN
            )
            label_QK = self._labels[model][target][known][number_QK]
            for k in self.own.k:
                predicted_QC = self._vote(similarity_QK, label_QK, k, target)
                value = probe_choice.validation_score(labelled.target.rows(queries), predicted_QC)
                settings = {"k": float(k)}
                outcomes.append(
                    Outcome(space.candidate, settings, *value, num_filled=space.num_filled)
                )
        return probe_choice.best_of(outcomes, how, left_out)

    def _vote(self, similarity_QK: Tensor, label_QK: Tensor, k: int, target: str) -> np.ndarray:
        votes_QC = neighbours.vote(
            similarity_QK, label_QK, k, len(self.classes[target]), self.own.temperature
        )
        array: np.ndarray = votes_QC.numpy()
        return array

    def predictions(
        self, model: str, targets: Sequence[str], vectors: ScanVectors
    ) -> dict[str, list[np.ndarray]]:
        """Votes of the training scans, in every space and with every k."""
        found: dict[str, list[np.ndarray]] = {target: [] for target in targets}
        self._ranked = {}
        for space in self._spaces[model]:
            inputs = space.candidate.inputs([vectors])
            assert inputs is not None, "registers are a property of the backbone, not of a scan"
            query_1D = neighbours.unit(torch.from_numpy(space.scaler(inputs[0])).float()[None])
            similarity_1N = query_1D @ space.unit_ND.T
            for target in targets:
                own_1N = similarity_1N[:, self._rows[model][target]]
                best = own_1N.topk(min(max(self.own.k), own_1N.shape[1]), dim=1)
                label_1K = self._labels[model][target][best.indices]
                for k in self.own.k:
                    found[target].append(self._vote(best.values, label_1K, k, target)[0])
                if self.choices[model][target].chosen.candidate == space.candidate:
                    order_N = own_1N[0].argsort(descending=True, stable=True)
                    self._ranked[target] = self._labels[model][target][order_N].numpy()
        return found

    def judge(self, model: str, dense: DenseFeatures, truth: ScanTruth) -> dict[str, np.ndarray]:
        """Predict a test scan, and rank the training scans by their similarity to it."""
        predictions = super().judge(model, dense, truth)
        for target, label_N in self._ranked.items():
            if not self.is_learned(target, truth.values[target]):
                continue
            own = self.encoded(target, [truth.values[target]]).values_N[0]
            is_relevant_N = label_N == own
            self._retrieved[model, target][truth.scan] = Retrieved(
                neighbours.average_precision(is_relevant_N),
                neighbours.precision_at(is_relevant_N, self.own.k),
                float(is_relevant_N.mean()),
            )
        return predictions

    def details(self, model: str, target: str, tested: TestScans) -> dict[str, Any]:
        """Also the quality of the retrieval, in the chosen space."""
        entry = super().details(model, target, tested)
        each = list(self._retrieved[model, target].values())
        if each:
            entry["retrieval"] = {
                "mean_average_precision": float(np.mean([one.precision for one in each])),
                "precision_at": {
                    str(k): float(np.mean([one.precision_at[k] for one in each]))
                    for k in self.own.k
                },
                "by_chance": float(np.mean([one.share for one in each])),
            }
        return entry

    def headline(self) -> Headline:
        """Mean balanced accuracy over targets."""
        meaning = (
            "Balanced accuracy of the weighted vote of the nearest training scans by cosine "
            "similarity, mean over targets. Vector, block, scaling and k are chosen on validation "
            "patients."
        )
        values = self.headline_values()
        return Headline(
            "mean balanced accuracy", values, "higher", meaning, (0.0, 1.0), self.mean_of()
        )


def _space(candidate: Candidate, inputs: Sequence[np.ndarray]) -> VectorSpace:
    """The training scans in one vector."""
    scaler = Scaler.of(inputs, candidate.scaling)
    scaled_ND = np.stack([scaler(one).astype(np.float32) for one in inputs])
    num_filled = sum(bool(np.isnan(one).any()) for one in inputs)
    return VectorSpace(candidate, scaler, neighbours.unit(torch.from_numpy(scaled_ND)), num_filled)


def build(config: Config, *, seed: int) -> Knn:
    """Make the task of one evaluation. It draws nothing at random.

    Args:
        config: settings.
        seed: random seed of the evaluation.
    """
    return Knn(config, seed)
