"""The number that a run has for a metric at its end: one window for every place that shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence

LAST_STEPS = 20


def last_mean(steps: Sequence[float], values: Sequence[float], last_step: float) -> float:
    """Mean of a metric over the last `LAST_STEPS` steps of a run; its newest value where it is
    written more rarely.

    Args:
        steps: steps at which it was written, ascending.
        values: its value at each of these steps.
        last_step: last step of the run.
    Returns:
        NaN where it was never written or a value is not finite.
    """
    if not len(values):
        return math.nan
    first = len(steps)
    while first and steps[first - 1] > last_step - LAST_STEPS:
        first -= 1
    recent = values[first:] if first < len(values) else values[-1:]
    return float(sum(recent) / len(recent))


def window_in_words(num_steps: int) -> str:
    """The averaging window in words, e.g. `mean of the last 20 steps`.

    Args:
        num_steps: number of steps of the run.
    """
    num = min(LAST_STEPS, num_steps)
    return "value of the only step" if num == 1 else f"mean of the last {num} steps"
