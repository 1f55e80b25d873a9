"""The label-fraction curve of a task: its headline by the number of labelled patients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tapct.eval.intervals import Interval
from tapct.eval.results import old_formats
from tapct.eval.results.json_file import TaskSection
from tapct.report.charts import Curve, line_chart


def curves(section: TaskSection, model: str) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """The curve of one model.

    Args:
        section: results of a task.
        model: model name.
    Returns:
        What the numbers count (`patient` or `scan`), the numbers, float64 (n); their values,
        float64 (n), means over draws; and the ends of their intervals, float64 (n, 2), NaN without
        one. All are empty for a task or a model without a curve.
    """
    unit, found = old_formats.curve_of(section.results.models.get(model, {}))
    nums, values, ends = [], [], []
    for num, draws in sorted(found.items(), key=lambda pair: int(pair[0])):
        interval = _interval(section, model, old_formats.metric_name(int(num), unit))
        nums.append(float(num))
        values.append(float(np.mean(draws)) if len(draws) else math.nan)
        ends.append((interval.low, interval.high))
    return unit, np.array(nums), np.array(values), np.array(ends).reshape(-1, 2)


def _interval(section: TaskSection, model: str, metric: str) -> Interval:
    """The interval of one point; NaN where there is none."""
    found = section.statistics.of(metric) if section.statistics is not None else None
    for one in found.whole.models if found is not None else ():
        if one.model == model and one.estimate.interval is not None:
            return one.estimate.interval
    return Interval(math.nan, math.nan)


def chart(section: TaskSection, names: Mapping[str, str]) -> str:
    """The curves of all models of a task as a chart; empty without any.

    Args:
        section: results of a task.
        names: names of models for people.
    """
    return chart_of([(name, i, section, model) for i, (model, name) in enumerate(names.items())])


def chart_of(lines: Sequence[tuple[str, int, TaskSection, str]]) -> str:
    """Several curves as a chart; empty without any.

    Args:
        lines: label, style, results of a task and model of each curve.
    """
    drawn, units = [], set()
    for label, style, section, model in lines:
        unit, nums, values, ends = curves(section, model)
        if len(nums):
            drawn.append(Curve(label, nums, values, smooth=False, style=style, intervals=ends))
            units.add(unit)
    if not drawn:
        return ""
    headline = lines[0][2].headline
    unit = units.pop() if len(units) == 1 else "patient or scan"
    title = f"{headline.metric} by labelled {unit}s"
    return line_chart(
        title, f"{headline.direction} is better; vertical lines: 95 % intervals", drawn,
        x_label=f"labelled {unit}s", log_x=True,
    )  # fmt: skip
