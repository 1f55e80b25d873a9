"""What a task finds: values of scans and parts, the table of results, and the headline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tapct.base.exits import UserError

OWN_MODEL = "pretrained"  # every other model of an evaluation is a baseline
DIRECTIONS = ("higher", "lower")


@dataclass(frozen=True)
class Lead:
    """How the pretrained model compares with the best baseline.

    Args:
        own: headline value of the pretrained model; NaN where unknown.
        gain: improvement over the best baseline, positive is better whatever the direction; NaN
            without a baseline.
        baseline: name of the best baseline; empty without one.
    """

    own: float
    gain: float
    baseline: str


@dataclass(frozen=True)
class Headline:
    """The one number per model that the terminal, the report and `tapct compare` show.

    Args:
        metric: name as it is printed, e.g. `mean Dice`.
        values: model name -> value; NaN where a model has none.
        direction: `higher` or `lower`, whichever is better.
        meaning: one sentence on what the number measures and how.
        range: lowest and highest value that the metric can take, e.g. (0, 1); None where it is
            unbounded.
        mean_of: what the values are means of and what was left out, e.g. `mean of 2 organs: liver,
            spleen`; empty where they are no means over classes.
    """

    metric: str
    values: Mapping[str, float]
    direction: str
    meaning: str
    range: tuple[float, float] | None = None
    mean_of: str = ""

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise UserError(
                f"headline {self.metric!r}: direction is {self.direction!r}, must be one of "
                f"{' or '.join(DIRECTIONS)} (whichever is better)"
            )
        if not self.values:
            raise UserError(
                f"headline {self.metric!r} has no value; give one per model that was evaluated"
            )

    def lead(self) -> Lead:
        """Compare the pretrained model with the best baseline."""
        sign = 1.0 if self.direction == "higher" else -1.0
        own = self.values.get(OWN_MODEL, math.nan)
        best, baseline = math.nan, ""
        for model, value in self.values.items():
            if model == OWN_MODEL or not math.isfinite(value):
                continue
            if not baseline or sign * value > sign * best:
                best, baseline = value, model
        return Lead(own, sign * (own - best), baseline)


@dataclass(frozen=True)
class ScanScore:
    """One model's result on one test scan.

    Args:
        scan: scan ID.
        model: model name.
        value: headline metric on this scan alone; NaN where it does not exist.
        parts: the same metric by part, e.g. by organ; may be empty.
    """

    scan: str
    model: str
    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Breakdown:
    """The headline metric by class, organ or group: one table row each, one column per model.

    Args:
        title: heading of the table, e.g. `Dice of each organ`.
        row: what a row stands for, e.g. `organ`.
        values: row name -> model name -> value; a model without a value is left out.
    """

    title: str
    row: str
    values: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class FurtherMetric:
    """A metric beside the headline, with a value for each test scan, such as NSD beside Dice.

    Args:
        metric: name as it is printed.
        direction: `higher` or `lower`, whichever is better.
        meaning: one sentence on what it measures and how.
        scans: one row per test scan and model.
        range: lowest and highest possible value; None where it is unbounded.
    """

    metric: str
    direction: str
    meaning: str
    scans: tuple[ScanScore, ...]
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class TaskResults:
    """All numbers of a task.

    Args:
        models: model name -> aggregates over the test scans, written to results.json as they are.
        scans: one row per test scan and model.
        breakdown: the headline metric by class; None where the task has no classes.
        mean_over_parts: whether the headline is the mean over parts of the mean over scans, as mean
            Dice over organs is; else it is the mean over scans of `ScanScore.value`. Intervals and
            p-values are computed accordingly.
        further: metrics beside the headline, averaged in the same way.
    """

    models: Mapping[str, Mapping[str, Any]]
    scans: tuple[ScanScore, ...] = ()
    breakdown: Breakdown | None = None
    mean_over_parts: bool = False
    further: tuple[FurtherMetric, ...] = ()
