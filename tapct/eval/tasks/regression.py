"""Numbers of whole scans by regression on frozen features: one probe per target and model.

Axes: N scans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tapct.config import setting
from tapct.eval.heads.probes import ABMIL, EFFICIENT, RIDGE, Target
from tapct.eval.metrics import scan_level
from tapct.eval.scans.labelled_scan import ScanValue
from tapct.eval.scores import Headline
from tapct.eval.targets.probe_task import ProbeConfig, ProbeTask
from tapct.eval.targets.scan_task import TestScans

HEADS = (RIDGE, ABMIL, EFFICIENT)
MIN_VALUES = 3  # different ones of a target that the settings do not name


@dataclass(frozen=True)
class Config(ProbeConfig):
    """Settings of the regression."""

    heads: tuple[str, ...] = setting(
        (RIDGE,),
        "heads to choose from: `ridge`, `abmil` and `efficient` (attention over windows)",
        choices=HEADS,
    )


class Regression(ProbeTask):
    """Find numbers, such as age or organ volume, in the frozen features of a scan."""

    metric_names = ("r2", "mae")
    headline_word = "R^2"

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__("regression", config, config.heads, seed)

    def why_unsuitable(self, target: str, values: Sequence[ScanValue]) -> str:
        """Targets are numbers; truths too where the settings name them."""
        if any(isinstance(value, str) for value in values):
            return "is a category, for the task classification"
        is_named = target in self.config.targets
        if not is_named and any(isinstance(value, bool) for value in values):
            return "is true or false, for the task classification"
        least = 2 if is_named else MIN_VALUES
        if len(set(values)) < least:
            return f"has fewer than {least} different values in the training scans"
        return ""

    def encoded(self, target: str, values: Sequence[ScanValue]) -> Target:
        """Values as numbers."""
        return Target(np.array([float(value) for value in values], dtype=np.float64))

    def is_learned(self, target: str, value: ScanValue) -> bool:
        """Every number can be predicted."""
        return True

    def numbers(self, target: Target, predicted: np.ndarray) -> dict[str, float]:
        """R^2 and mean absolute error."""
        return {
            "r2": scan_level.r_squared(target.values_N, predicted),
            "mae": scan_level.mean_absolute_error(target.values_N, predicted),
        }

    def scan_value(self, target: Target, predicted: np.ndarray) -> np.ndarray:
        """Absolute error."""
        error_N: np.ndarray = np.abs(predicted - target.values_N)
        return error_N

    def _row_value(self, parts: Mapping[str, float]) -> float:
        return math.nan  # R^2 of one scan does not exist

    def predictions_json(self, target: str, tested: TestScans, number: int) -> dict[str, Any]:
        """True and predicted number of each test scan."""
        truth, predicted = tested.target.values_N.tolist(), tested.predicted[number].tolist()
        return {
            scan: {"truth": true, "predicted": float(f"{value:.6g}")}
            for scan, true, value in zip(tested.scans, truth, predicted, strict=True)
        }

    def headline(self) -> Headline:
        """Mean R^2 over targets."""
        meaning = (
            "Share of the variance over test scans that a probe on a vector of each scan from "
            "frozen features explains, mean over targets. Vector, block, scaling, head and its "
            "settings are chosen on validation patients."
        )
        return Headline("mean R^2", self.headline_values(), "higher", meaning, None, self.mean_of())


def build(config: Config, *, seed: int) -> Regression:
    """Make the task of one evaluation.

    Args:
        config: settings.
        seed: random seed of folds and of heads that are trained by AdamW.
    """
    return Regression(config, seed)
