"""The headlines of a run over its evaluated steps: charts, rows of a table, and what a reader must
know about the best step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tapct.base.counted import counted
from tapct.eval.intervals import Interval
from tapct.eval.results import over_steps
from tapct.eval.results.json_file import shown, title_of
from tapct.eval.results.over_steps import OPTIMISTIC, StepCurve
from tapct.eval.results.terminal import between
from tapct.report.charts import Curve, line_chart
from tapct.report.markup import text

BLANK = "\u2013"


@dataclass(frozen=True)
class EvaluatedSteps:
    """The headlines of a run over its evaluated steps.

    Args:
        curves: task -> headline, for tasks with something to show: two steps, or one on validation
            patients, which no other table shows.
        left_out: one line per reason why steps are not shown.
    """

    curves: Mapping[str, StepCurve] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def read(run: Path) -> EvaluatedSteps:
    """Read the evaluated steps of a run."""
    found = over_steps.read(run)
    if len(found.evaluations) + len(found.unreadable) < 2 and not found.on_validation:
        return EvaluatedSteps()
    curves: dict[str, StepCurve] = {}
    lines: list[str] = []
    for task in found.tasks():
        curve = found.curve(task)
        if curve is None:
            lines += found.lines_without_curve(task)
            continue
        lines += curve.lines_left_out()
        if len(curve.values) > 1 or curve.on_validation:
            curves[task] = curve
    return EvaluatedSteps(curves, tuple(lines))


def chart(task: str, curves: Sequence[tuple[str, int, StepCurve]]) -> str:
    """The headline of one task over the steps, of one run or several.

    Args:
        task: task name.
        curves: label, style and values of each run; at least one.
    """
    first = curves[0][2]
    lines = []
    for label, style, curve in curves:
        best = curve.best
        ends = []
        for one in curve.values:
            interval = one.interval or Interval(math.nan, math.nan)
            ends.append((interval.low, interval.high))
        lines.append(
            Curve(
                label,
                np.array([float(one.step) for one in curve.values]),
                np.array([one.value for one in curve.values]),
                smooth=False,
                style=style,
                end=None if best is None else best.value,
                intervals=np.array(ends, np.float64),
                ring=None if best is None else float(best.step),
            )
        )
    people = {curve.people for _, _, curve in curves}
    where = f" on {people.pop()}" if len(people) == 1 else ""
    name = f"{title_of(task)}: {first.metric}{where}"
    return line_chart(name, f"{first.direction} is better", lines)


def charts(runs: Sequence[tuple[str, Mapping[str, StepCurve]]]) -> str:
    """One chart per task, with the curves of several runs.

    Args:
        runs: for each run its label, and task -> headline over the steps.
    """
    html = ""
    for task in dict.fromkeys(task for _, curves in runs for task in curves):
        of_task = []
        for i, (label, curves) in enumerate(runs):
            if task in curves:
                of_task.append((label, i, curves[task]))
        html += chart(task, of_task)
    return html


def part(run: Path, command: str) -> str:
    """The part of the page of a run, as HTML; empty without evaluations of several steps.

    Args:
        run: run folder.
        command: command that evaluates the best step.
    """
    found = read(run)
    curves, lines_left_out = found.curves, list(found.left_out)
    if not curves:
        items = "".join(f"<li>{text(line)}</li>" for line in lines_left_out)
        return f"<h3>Evaluated steps</h3><ul>{items}</ul>" if items else ""
    sentences = [best_line(curve) for curve in curves.values()]
    sentences += lines_left_out
    first = next(iter(curves.values()))
    note = f"<b>Caveat: {text(OPTIMISTIC)}.</b>"
    if first.on_validation:
        note = f"<code>{text(command)}</code> evaluates the best step on the test patients."
    drawn = charts([("pretrained", curves)])
    lines = "".join(f"<li>{text(line)}</li>" for line in sentences)
    return (
        '<h3>Evaluated steps</h3><p class="muted">Vertical lines are 95 % intervals over patients; '
        f'a ring marks the best step. {note}</p><div class="charts">{drawn}</div><ul>{lines}</ul>'
    )


def best_line(curve: StepCurve) -> str:
    """The best step of one task with its value, as a sentence without its full stop."""
    num = counted(len(curve.values), "evaluated step")
    if curve.best is None:
        return f"{title_of(curve.task)}: {curve.metric} is no number after any of {num}"
    best = curve.best
    value = f"{shown(best.value)} {between(best.interval)}".rstrip()
    return (
        f"{title_of(curve.task)}: best of {num} is step {best.step}, {curve.metric} {value} on the "
        f"{curve.people}"
    )


def rows(runs: Sequence[Mapping[str, StepCurve]]) -> list[tuple[str, list[str]]]:
    """Rows of the table of several runs: the best step of each task, its value and its interval.

    Args:
        runs: for each run, task -> headline over the steps.
    """
    found: list[tuple[str, list[str]]] = []
    for task in dict.fromkeys(task for curves in runs for task in curves):
        steps, values, intervals, counts = [], [], [], []
        for curves in runs:
            curve = curves.get(task)
            best = curve.best if curve is not None else None
            counts.append(str(len(curve.values)) if curve is not None else BLANK)
            steps.append(BLANK if best is None else str(best.step))
            values.append(BLANK if best is None else shown(best.value))
            intervals.append((between(best.interval) if best is not None else "") or BLANK)
        title = title_of(task)
        metric = next(curves[task].metric for curves in runs if task in curves)
        people = {curves[task].people for curves in runs if task in curves}
        where = f" on {people.pop()}" if len(people) == 1 else ""
        found.append((f"{title}: evaluated steps", counts))
        found.append((f"{title}: best step", steps))
        found.append((f"{title}: {metric} of the best step{where}", values))
        if any(interval != BLANK for interval in intervals):
            found.append((f"{title}: 95 % interval of the best step", intervals))
    return found


def notes(name: str, found: EvaluatedSteps) -> list[str]:
    """What a reader of several runs must know about the best step of one of them.

    Args:
        name: name of the run.
        found: its evaluated steps.
    """
    lines, curves = list(found.left_out), found.curves
    if any(not curve.on_validation for curve in curves.values()):
        lines.append(OPTIMISTIC)
    elif curves:
        lines.append(
            "the best step is chosen on the validation patients; `tapct eval RUN --step best` "
            "evaluates it on the test patients"
        )
    return [f"{name}: {line}" for line in lines]
