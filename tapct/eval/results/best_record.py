"""RUN/eval/best.json: the best step of a run by one headline, and the value of every other step.

It is written after each evaluation. `tapct jobs` and the rotation of checkpoints read it, because
it is small; `--step best` reads the results themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapct.base import files
from tapct.eval.results import over_steps
from tapct.eval.results.over_steps import StepCurve
from tapct.run_folder import RunFolder

MOST_TRIES = 20


@dataclass(frozen=True)
class BestRecord:
    """The content of best.json.

    Args:
        task: task name.
        metric: name of its headline.
        direction: `higher` or `lower`, whichever is better.
        people: patients that the values were measured on.
        best: best step; None where no value is a number.
        values: step -> value, in ascending order; NaN where it does not exist.
    """

    task: str
    metric: str
    direction: str
    people: str
    best: int | None
    values: Mapping[int, float]

    @property
    def newest(self) -> int:
        """The newest step that was evaluated."""
        return max(self.values)


def update(run: Path) -> StepCurve | None:
    """Write best.json of a run from its evaluations.

    Returns:
        The values over the steps; None where no evaluation can be used.
    """
    curve = over_steps.read(run).curve()
    for _ in range(MOST_TRIES):
        if curve is None:
            RunFolder(run).best.unlink(missing_ok=True)
        else:
            text = json.dumps(to_json(curve), indent=1, allow_nan=False) + "\n"
            files.write_atomically(RunFolder(run).best, text)
        # Another evaluation may have ended since the results were read, and may have written its
        # record before this one.
        now = over_steps.read(run).curve()
        if _as_text(now) == _as_text(curve):
            break
        curve = now
    return curve


def _as_text(curve: StepCurve | None) -> str:
    return "" if curve is None else json.dumps(to_json(curve))


def to_json(curve: StepCurve) -> dict[str, Any]:
    """The object that is written; NaN becomes null."""
    best = curve.best
    values = []
    for one in curve.values:
        known = math.isfinite(one.value)
        values.append({"step": one.step, "value": one.value if known else None})
    return {
        "task": curve.task,
        "metric": curve.metric,
        "direction": curve.direction,
        "people": curve.people,
        "best": None if best is None else best.step,
        "values": values,
        "left_out": {str(step): reason for step, reason in sorted(curve.left_out.items())},
        "note": "" if curve.on_validation else over_steps.OPTIMISTIC,
    }


def read(run: Path) -> BestRecord | None:
    """Read best.json of a run; None where it is missing or damaged."""
    try:
        content = json.loads(RunFolder(run).best.read_text(encoding="utf-8"))
        values = {
            int(one["step"]): math.nan if one["value"] is None else float(one["value"])
            for one in content["values"]
        }
        best = content["best"]
        if not values or (best is not None and best not in values):
            return None
        return BestRecord(
            str(content["task"]),
            str(content["metric"]),
            str(content["direction"]),
            str(content["people"]),
            best,
            values,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
