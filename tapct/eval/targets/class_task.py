"""What the tasks on classes of whole scans share: classes, metrics, calibration.

Axes: N scans, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tapct.eval.heads.probes import Target
from tapct.eval.metrics import scan_level
from tapct.eval.pictures import curves
from tapct.eval.pictures.curves import CalibrationCurve
from tapct.eval.scans.labelled_scan import ScanValue
from tapct.eval.targets.scan_task import DIGITS, ScanTask, TestScans, or_none

MOST_CLASSES = 20  # of a category that the settings do not name; more are texts, as a rule


class ClassTask(ScanTask):
    """Find the class of whole scans."""

    metric_names = ("auroc", "auprc", "balanced_accuracy", "brier")
    headline_word = "AUROC"

    def why_unsuitable(self, target: str, values: Sequence[ScanValue]) -> str:
        """Targets are truths and categories; numbers too where the settings name them."""
        classes = sorted({class_name(value) for value in values})
        if len(classes) < 2:
            return f"has {'one class' if classes else 'no value'} in the training scans"
        if target not in self.config.targets:
            if any(_is_number(value) for value in values):
                return "is a number, for the task regression"
            if len(classes) > MOST_CLASSES:
                return f"has {len(classes)} classes, more than {MOST_CLASSES}"
        self.classes[target] = tuple(classes)
        return ""

    def encoded(self, target: str, values: Sequence[ScanValue]) -> Target:
        """Values as class numbers."""
        classes = self.classes[target]
        numbers = [classes.index(class_name(value)) for value in values]
        return Target(np.array(numbers, dtype=np.int64), len(classes))

    def is_learned(self, target: str, value: ScanValue) -> bool:
        """Whether the class occurs in the training scans."""
        return class_name(value) in self.classes[target]

    def numbers(self, target: Target, predicted: np.ndarray) -> dict[str, float]:
        """AUROC, AUPRC, balanced accuracy and Brier score."""
        scores = predicted[:, 1] if target.num_classes == 2 else predicted
        truth_N = target.values_N
        return {
            "auroc": scan_level.auroc(truth_N, scores),
            "auprc": scan_level.auprc(truth_N, scores),
            "balanced_accuracy": scan_level.balanced_accuracy(truth_N, scores),
            "brier": scan_level.brier(truth_N, scores),
        }

    def scan_value(self, target: Target, predicted: np.ndarray) -> np.ndarray:
        """Probability of the true class."""
        own_N: np.ndarray = predicted[np.arange(len(predicted)), target.values_N]
        return own_N

    def _row_value(self, parts: Mapping[str, float]) -> float:
        return float(np.mean(list(parts.values()))) if parts else float("nan")

    def details(self, model: str, target: str, tested: TestScans) -> dict[str, Any]:
        """Classes, calibration and the predictions of the test scans."""
        classes = self.classes[target]
        entry: dict[str, Any] = {"classes": list(classes), **super().details(model, target, tested)}
        if not tested.scans:
            return entry
        predicted = tested.predicted[self.choices[model][target].best]
        scores = predicted[:, 1] if len(classes) == 2 else predicted
        curve = scan_level.calibration(tested.target.values_N, scores)
        entry["calibration"] = {
            "confidence": [or_none(value) for value in curve.confidence_B.tolist()],
            "frequency": [or_none(value) for value in curve.frequency_B.tolist()],
            "count": curve.count_B.tolist(),
            "error": or_none(curve.error),
        }
        return entry

    def predictions_json(self, target: str, tested: TestScans, number: int) -> dict[str, Any]:
        """True class and probabilities of each test scan."""
        classes, label_N = self.classes[target], tested.target.values_N.tolist()
        rows = zip(tested.scans, label_N, tested.predicted[number], strict=True)
        return {
            scan: {"truth": classes[label], "probabilities": np.round(row, DIGITS).tolist()}
            for scan, label, row in rows
        }

    def draw_results(self, path: Path) -> str:
        """Write the calibration of each target and model."""
        drawn: dict[str, dict[str, CalibrationCurve]] = {}
        for model, entry in self.results().models.items():
            for target, section in entry["targets"].items():
                if "calibration" in section:
                    curve = section["calibration"]
                    drawn.setdefault(target, {})[model] = CalibrationCurve(
                        curve["confidence"], curve["frequency"], curve["error"]
                    )
        if not drawn:
            return ""
        curves.draw_calibration(path, drawn)
        return (
            "calibration on the test scans: how often the predicted class is true, by its "
            "predicted probability; of two classes, the probability of the second one"
        )


def class_name(value: ScanValue) -> str:
    """The class that a value stands for."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: ScanValue) -> bool:
    return isinstance(value, float) and not isinstance(value, bool)
