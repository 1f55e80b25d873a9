"""How well one scan was brought onto another one, and means over pairs of scans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tapct.eval.pairs.partners import ScanPair
from tapct.eval.pairs.points import mean_of
from tapct.eval.scores import ScanScore

DICE, LANDMARKS = "dice", "landmarks"


@dataclass(frozen=True)
class PairScore:
    """How well one map brings a moving scan onto a fixed one.

    Args:
        dice: organ -> Dice, of organs that both scans have.
        error_mm: landmark -> error, of landmarks that both scans have.
        num_used: correspondences that the affine map agrees with.
        failed: whether too few correspondences agreed, so that the identity was taken.
    """

    dice: Mapping[str, float]
    error_mm: Mapping[str, float]
    num_used: int = 0
    failed: bool = False

    def parts(self, metric: str) -> Mapping[str, float]:
        """The values of the headline metric."""
        return self.dice if metric == DICE else self.error_mm

    def mean(self, metric: str) -> float:
        """Their mean; NaN without a value."""
        return mean_of(list(self.parts(metric).values()))


def means_of(of_pair: Mapping[ScanPair, PairScore]) -> dict[str, Any]:
    """Means by organ and landmark over the fixed scans, of each over its moving scans, and means
    over organs and landmarks.
    """
    entry: dict[str, Any] = {}
    for key, mean_key, metric in (
        ("dice", "mean_dice", DICE),
        ("landmark_error_mm", "mean_landmark_error_mm", LANDMARKS),
    ):
        values: dict[str, list[float]] = {}
        for row in score_rows("", of_pair, metric):
            for name, value in row.parts.items():
                values.setdefault(name, []).append(value)
        means = {name: mean_of(of_name) for name, of_name in values.items()}
        entry[key] = means
        entry[mean_key] = mean_of(list(means.values())) if means else None
    return entry


def score_rows(model: str, of_pair: Mapping[ScanPair, PairScore], metric: str) -> list[ScanScore]:
    """One row per fixed scan: means over its moving scans."""
    of_scan: dict[str, dict[str, list[float]]] = {}
    for pair, score in of_pair.items():
        by_name = of_scan.setdefault(pair.second, {})
        for name, value in score.parts(metric).items():
            by_name.setdefault(name, []).append(value)
    rows = []
    for scan, by_name in of_scan.items():
        parts = {name: mean_of(values) for name, values in by_name.items()}
        rows.append(ScanScore(scan, model, mean_of(list(parts.values())), parts))
    return rows
