"""Organs of patches by nearest neighbours: the vote of the most similar training patches.

Axes: N patches of a scan, K kept patches, Q query patches, D channels, C classes, V label values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tapct.base import rng
from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.config import setting
from tapct.eval.contract import Task
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.heads import neighbours
from tapct.eval.labels.organ_classes import BODY, OUTSIDE, ClassSettings
from tapct.eval.labels.truth import PatchTruth, patch_truth
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.scans.usable import Labels
from tapct.eval.scores import Breakdown, Headline, ScanScore, TaskResults
from tapct.eval.targets.vectors import block_numbers

VALIDATION_PATCHES = 2048  # training patches that choose k
BLOCKS = ("last", "middle")


@dataclass(frozen=True)
class Config(ClassSettings):
    """Settings of the vote and of the patches."""

    block: str = setting("last", "block whose features are compared", choices=BLOCKS)
    k: tuple[int, ...] = setting(
        (10, 20, 100, 200),
        "numbers of neighbours; the headline uses the one with the best balanced accuracy on "
        "training patches of other patients; arXiv:2304.07193",
        ge=1,
    )
    temperature: float = setting(
        0.07, "temperature of the vote: weights are exp(cosine / T); arXiv:2304.07193", gt=0
    )
    max_tokens: int = setting(
        49152, "maximum number of training patches of all scans together, stratified by label", ge=1
    )
    max_queries: int = setting(
        1024, "maximum number of patches of each test scan, stratified by label", ge=1
    )


@dataclass(frozen=True)
class KnownPatches:
    """Training patches of one scan and one model.

    Args:
        patient: patient of the scan; the scan ID where it is unknown.
        unit_KD: float32, features of length 1.
        classes: class of each patch.
    """

    patient: str
    unit_KD: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class PatchMemory:
    """The training patches of one model.

    Args:
        unit_KD: float32, features of length 1.
        label_K: int64, numbers of their classes.
        k: chosen number of neighbours.
        validation: balanced accuracy of each k on training patches; empty with one patient.
    """

    unit_KD: Tensor
    label_K: Tensor
    k: int
    validation: Mapping[int, float]


class PatchKnn(Task[PatchTruth, None]):
    """Find the organ of a patch by the training patches that are most similar to it. State grows
    with the training patches that are kept.
    """

    labels = Labels.VOXELS

    def __init__(self, config: Config, seed: int) -> None:
        if not config.k:
            raise UserError("eval.tasks.patch_knn.k is empty; give at least one number")
        self.config, self.seed = config, seed
        self.words = config.words()
        self.tokens_per_scan = config.max_tokens
        self.classes: tuple[str, ...] = ()
        self._kept: dict[str, list[KnownPatches]] = defaultdict(list)
        self._memory: dict[str, PatchMemory] = {}
        # model -> scan -> k -> confusion matrix; rows are truth
        self._confusion: dict[str, dict[str, dict[int, np.ndarray]]] = defaultdict(dict)
        self._in_training: set[str] = set()  # organs of the training scans
        self._in_test: set[str] = set()  # organs of the test scans

    def named_labels(self) -> Mapping[str, tuple[str, ...]]:
        """Words of the settings that must name a label; the defaults need not."""
        return self.config.named_labels()

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """The block of the config."""
        return block_numbers(self.config.block, num_blocks)

    def begin(self, num_train: int) -> None:
        """Divide the training patches equally among the training scans."""
        self.tokens_per_scan = max(1, self.config.max_tokens // num_train)

    def truth(self, scan: LabelledScan, grid: PatchGrid, in_play_Z: np.ndarray) -> PatchTruth:
        """Count the labels on the patch grid."""
        body_labelled = self.words.body_labelled(dict(scan.label_map.names))
        return patch_truth(scan, grid, body_labelled=body_labelled, in_play_Z=in_play_Z)

    def learn(self, model: str, dense: DenseFeatures, truth: PatchTruth) -> None:
        """Keep patches of one training scan."""
        self._in_training |= self._organs_of(truth)
        unit_KD, classes = self._sampled(dense, truth, self.tokens_per_scan)
        patient = truth.scan.patient or truth.scan.id
        self._kept[model].append(KnownPatches(patient, unit_KD, classes))

    def _organs_of(self, truth: PatchTruth) -> set[str]:
        """The organs in the label map of a scan, also those that no patch is mostly of."""
        names = truth.names()
        return {self.words.class_of(value, names) for value in truth.values} - {OUTSIDE, BODY}

    def _sampled(
        self, dense: DenseFeatures, truth: PatchTruth, num: int
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Features and classes of patches, as many of each label as there are, up to equal shares.

        The class of a patch is the label that most of its voxels have.
        """
        index_K, _ = truth.sample(num, self.seed)
        (block,) = block_numbers(self.config.block, 1 + max(dense.blocks, default=0))
        features_ND = dense.tokens_ND(block if dense.blocks else None)
        unit_KD = neighbours.unit(features_ND[index_K.to(features_ND.device)].float())
        names = truth.names()
        of_value = [self.words.class_of(value, names) for value in truth.values]
        majority_K = truth.shares_NV[index_K.numpy()].argmax(1)
        return unit_KD, tuple(of_value[column] for column in majority_K)

    def fit(self) -> None:
        """Join the patches of each model and choose k by those of other training patients.

        Raises:
            UserError: no organ occurs in the training scans.
        """
        # of all models: one with smaller patches may have patches of organs that others lack
        present = {name for kept in self._kept.values() for one in kept for name in one.classes}
        organs = sorted(present - {OUTSIDE, BODY})
        if not organs:
            raise UserError(
                "task patch_knn: no training patch is mostly of an organ (they are "
                f"{', '.join(sorted(present))}); check the label maps and "
                "eval.tasks.patch_knn.organs"
            )
        self.classes = (*(name for name in (OUTSIDE, BODY) if name in present), *organs)
        for model in list(self._kept):
            kept = self._kept.pop(model)
            unit_KD = torch.cat([one.unit_KD for one in kept])
            labels = [self.classes.index(name) for one in kept for name in one.classes]
            label_K = torch.tensor(labels, device=unit_KD.device)
            patients = [one.patient for one in kept for _ in one.classes]
            validation = self._validation(unit_KD, label_K, patients)
            k = max(validation, key=lambda number: validation[number], default=self.config.k[0])
            self._memory[model] = PatchMemory(unit_KD, label_K, k, validation)

    def _validation(
        self, unit_KD: Tensor, label_K: Tensor, patients: Sequence[str]
    ) -> dict[int, float]:
        """Balanced accuracy of each k on some training patches; neighbours are never of the same
        patient. Empty with one patient.
        """
        numbers = np.unique(patients, return_inverse=True)[1]
        if numbers.max() == 0:
            return {}
        patient_K = torch.from_numpy(numbers).to(unit_KD.device)
        draw_K = rng.uniform(self.seed, "patch knn", 0, torch.arange(len(label_K)))
        chosen_Q = draw_K.argsort(stable=True)[:VALIDATION_PATCHES].to(unit_KD.device)
        confusion = {k: np.zeros((len(self.classes),) * 2, dtype=np.int64) for k in self.config.k}
        for rows in chosen_Q.split(neighbours.CHUNK):
            forbidden_QN = patient_K[rows][:, None] == patient_K
            predicted = self._predicted(unit_KD[rows], unit_KD, label_K, forbidden_QN)
            for k, predicted_Q in predicted.items():
                confusion[k] += self._pairs(label_K[rows].cpu().numpy(), predicted_Q)
        return {k: balanced(matrix) for k, matrix in confusion.items()}

    def _predicted(
        self,
        query_QD: Tensor,
        unit_KD: Tensor,
        label_K: Tensor,
        forbidden_QN: Tensor | None = None,
    ) -> dict[int, np.ndarray]:
        """Class of each query with each k."""
        most = max(self.config.k)
        similarity_QK, number_QK = neighbours.nearest(query_QD, unit_KD, most, forbidden_QN)
        label_QK = label_K[number_QK].cpu()
        found = {}
        for k in self.config.k:
            votes_QC = neighbours.vote(
                similarity_QK.cpu(), label_QK, k, len(self.classes), self.config.temperature
            )
            found[k] = votes_QC.argmax(1).numpy()
        return found

    def _pairs(self, truth_Q: np.ndarray, predicted_Q: np.ndarray) -> np.ndarray:
        num = len(self.classes)
        return np.bincount(truth_Q * num + predicted_Q, minlength=num * num).reshape(num, num)

    def judge(self, model: str, dense: DenseFeatures, truth: PatchTruth) -> None:
        """Vote on patches of a test scan. Classes that no training scan has are left out."""
        self._in_test |= self._organs_of(truth)
        unit_QD, names = self._sampled(dense, truth, self.config.max_queries)
        rows = [number for number, name in enumerate(names) if name in self.classes]
        truth_Q = np.array([self.classes.index(names[row]) for row in rows], dtype=np.int64)
        matrices = {k: np.zeros((len(self.classes),) * 2, dtype=np.int64) for k in self.config.k}
        if rows:
            memory = self._memory[model]
            predicted = self._predicted(unit_QD[rows], memory.unit_KD, memory.label_K)
            matrices = {k: self._pairs(truth_Q, one_Q) for k, one_Q in predicted.items()}
        self._confusion[model][truth.scan.id] = matrices

    def results(self) -> TaskResults:
        """Balanced accuracy of each k; recall of each class with the chosen k.

        The means go over the classes that the test patches of every model have: models of different
        patches would be compared on different organs otherwise.
        """
        by_k_of = {
            model: {
                k: self._mean_recalls([one[k] for one in per_scan.values()]) for k in self.config.k
            }
            for model, per_scan in self._confusion.items()
        }
        recalls_of = {model: by_k[self._memory[model].k] for model, by_k in by_k_of.items()}
        common = [
            name
            for name in self.classes
            if recalls_of and all(name in recalls for recalls in recalls_of.values())
        ]
        models: dict[str, dict[str, Any]] = {}
        scans: list[ScanScore] = []
        by_class: dict[str, dict[str, float]] = {}
        for model, per_scan in self._confusion.items():
            memory = self._memory[model]
            for name, recall in recalls_of[model].items():
                by_class.setdefault(name, {})[model] = recall
            models[model] = {
                "balanced_accuracy": _mean_or_none(recalls_of[model], common),
                "k": memory.k,
                "by_k": {
                    str(k): _mean_or_none(recalls, common) for k, recalls in by_k_of[model].items()
                },
                "validation_by_k": {str(k): value for k, value in memory.validation.items()},
                "recall": recalls_of[model],
                "num_queries": int(sum(one[memory.k].sum() for one in per_scan.values())),
                "num_known": len(memory.label_K),
            }
            for scan, matrices in per_scan.items():
                recalls = self._recalls(matrices[memory.k])
                parts = {name: recalls[name] for name in common if name in recalls}
                value = _mean_or_none(parts, common)
                scans.append(ScanScore(scan, model, np.nan if value is None else value, parts))
        table = Breakdown("Recall of each class", "class", by_class)
        return TaskResults(models, tuple(scans), table, mean_over_parts=True)

    def _mean_recalls(self, confusions: Sequence[np.ndarray]) -> dict[str, float]:
        """Recall of each class, mean over the scans in which it occurs."""
        by_class: dict[str, list[float]] = {}
        for confusion_CC in confusions:
            for name, recall in self._recalls(confusion_CC).items():
                by_class.setdefault(name, []).append(recall)
        return {name: float(np.mean(by_class[name])) for name in self.classes if name in by_class}

    def _recalls(self, confusion_CC: np.ndarray) -> dict[str, float]:
        """Recall of the classes that occur."""
        return {
            name: float(row[number] / row.sum())
            for number, (name, row) in enumerate(zip(self.classes, confusion_CC, strict=True))
            if row.sum()
        }

    def headline(self) -> Headline:
        """Balanced accuracy: mean over classes of the mean over scans of the recall.

        Raises:
            UserError: there is none.
        """
        results = self.results()
        values: dict[str, float] = {}
        for model, entry in results.models.items():
            if entry["balanced_accuracy"] is None:
                raise UserError(
                    "task patch_knn: the test patches of the models have no class in common that a "
                    f"training patch has ({', '.join(self.classes)}). Give labels to more scans, "
                    "or change eval.seed"
                )
            values[model] = entry["balanced_accuracy"]
        meaning = (
            "Balanced accuracy of the weighted vote of the nearest training patches by cosine "
            "similarity: mean over classes of the mean over test scans of the recall. k is chosen "
            "on patients of the training side."
        )
        mean_of = self._mean_of([one["recall"] for one in results.models.values()])
        return Headline("balanced accuracy", values, "higher", meaning, (0.0, 1.0), mean_of)

    def _mean_of(self, recalls: Sequence[Mapping[str, float]]) -> str:
        """What the balanced accuracy is a mean of, and which organs are not in it.

        Args:
            recalls: class -> recall, of each model.
        """
        inside = [name for name in self.classes if all(name in one for one in recalls)]
        some = {name for one in recalls for name in one}
        left_out = []
        for name in sorted(({*self.classes} | self._in_training | self._in_test) - {*inside}):
            if name in some:
                why = "not in the test patches of every model"
            elif name not in self._in_training and name not in (OUTSIDE, BODY):
                why = "in no training scan"
            elif name not in self.classes:
                why = "no training patch is mostly of it"
            elif name not in self._in_test and name not in (OUTSIDE, BODY):
                why = "in no test scan"
            else:
                why = "no test patch is mostly of it"
            left_out.append(f"{name} ({why})")
        classes = counted(len(inside), "class", "classes")
        line = f"mean of the recall of {classes}: {', '.join(inside)}"
        return line + (f"; left out: {', '.join(left_out)}" if left_out else "")


def balanced(confusion_CC: np.ndarray) -> float:
    """Mean recall of the classes that occur; NaN without any."""
    total_C = confusion_CC.sum(1)
    occurs_C = total_C > 0
    if not occurs_C.any():
        return float("nan")
    return float((confusion_CC.diagonal()[occurs_C] / total_C[occurs_C]).mean())


def _mean_or_none(by_class: Mapping[str, float], wanted: Sequence[str]) -> float | None:
    """Mean over the wanted classes that are there; None without any."""
    values = [by_class[name] for name in wanted if name in by_class]
    return float(np.mean(values)) if values else None


def build(config: Config, *, seed: int) -> PatchKnn:
    """Make the task of one evaluation.

    Args:
        config: settings.
        seed: random seed of the choice of patches.
    """
    return PatchKnn(config, seed)
