"""The numbers of a task as lines for a terminal of 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tapct.base.counted import counted
from tapct.eval.intervals import Interval
from tapct.eval.statistics import MIN_PATIENTS, PatientEstimate, Statistics

if TYPE_CHECKING:
    from tapct.eval.results.task_section import TaskSection
    from tapct.eval.scores import ScanScore

WIDTH = 80
NAME = 24  # width of a model's name without statistics
MOST_SCANS = 12  # that are listed where there are too few patients; results.csv has all


def title_of(task: str) -> str:
    """Heading of a task: `mylab.tasks.lung_depth` becomes `Lung depth`."""
    return task.rpartition(".")[2].replace("_", " ").capitalize()


def shown(value: float) -> str:
    """A headline value with three decimals, or three digits where that would hide it."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.3g}"


def with_sign(value: float) -> str:
    """The same with its sign, for differences."""
    return f"+{shown(value)}" if value >= 0 else shown(value)


def between(interval: Interval | None, *, sign: bool = False) -> str:
    """An interval, e.g. `[0.380, 0.441]`; empty where there is none."""
    if interval is None:
        return ""
    show = with_sign if sign else shown
    return f"[{show(interval.low)}, {show(interval.high)}]"


def numbers_of(estimate: PatientEstimate) -> str:
    """Numbers of scans and patients, e.g. `n = 24 scans of 24 patients`."""
    scans, patients = estimate.num_scans, estimate.num_patients
    return f"n = {counted(scans, 'scan')} of {counted(patients, 'patient')}"


def p_text(p: float) -> str:
    """A p-value with two digits."""
    return f"{p:.2g}" if math.isfinite(p) else "–"


def task_lines(section: TaskSection) -> list[str]:
    """The headline of every model with its interval, the differences of the pretrained model to
    the others, and what the numbers are means of.
    """
    headline, statistics = section.headline, section.statistics
    found = statistics.of(headline.metric) if statistics is not None else None
    if found is None:
        lines = [
            f"{model:<{NAME}} {headline.metric} {shown(value)}"
            for model, value in headline.values.items()
        ]
        if statistics is not None:
            lines.append(f"no interval: {statistics.why_none}")
    else:
        lines = _model_lines(headline.metric, found.whole)
        lines += _few_lines(section.results.scans, found.whole)
        lines += _difference_lines(found.whole)
    if headline.mean_of:
        lines.append(headline.mean_of)
    for one in section.results.further:
        further = statistics.of(one.metric) if statistics is not None else None
        if further is not None:
            lines.append(f"{one.metric} ({one.direction} is better): {one.meaning}")
            lines += _model_lines(one.metric, further.whole)
    return lines


def _model_lines(metric: str, found: Statistics) -> list[str]:
    """One line per model; the numbers of scans go into a line of their own where they make the
    lines too long and are the same for all models.
    """
    width = max(len(one.model) for one in found.models)
    lines = []
    for one in found.models:
        interval = between(one.estimate.interval)
        value = f"{shown(one.estimate.value)} {interval}".rstrip()
        lines.append(f"{one.model:<{width}}  {metric} {value}")
    numbers = [numbers_of(one.estimate) for one in found.models]
    longest = max(len(line) for line in lines)
    too_long = longest + 2 + max(map(len, numbers)) > WIDTH
    if too_long and len(set(numbers)) == 1:
        return [*lines, numbers[0]]
    return [f"{line:<{longest}}  {number}" for line, number in zip(lines, numbers, strict=True)]


def _difference_lines(found: Statistics) -> list[str]:
    """One line per model that the pretrained model is compared with."""
    tested = [pair for pair in found.differences if pair.estimate.interval is not None]
    if not tested:
        return []
    width = max(len(f"{pair.reference} - {pair.other}") for pair in tested)
    lines = []
    for pair in tested:
        names = f"{pair.reference} - {pair.other}"
        interval = between(pair.estimate.interval, sign=True)
        line = f"{names:<{width}} {with_sign(pair.estimate.value)} {interval}"
        if math.isfinite(pair.p):
            line += f" p = {p_text(pair.p)}"
            line += f" ({p_text(pair.p_holm)})" if pair.num_comparisons > 1 else ""
        lines.append(line)
    num = tested[0].num_comparisons
    lines.append("95 % intervals over patients; differences are paired by patient")
    if num > 1:
        lines.append(f"(p) is adjusted for {num} comparisons (Holm)")
    if found.num_unknown:
        scans = counted(found.num_unknown, "scan")
        lines.append(f"patient unknown, counted as one patient per scan: {scans}")
    return lines


def _few_lines(scans: Sequence[ScanScore], found: Statistics) -> list[str]:
    """Why there is no interval, and the values of the scans where there are too few patients."""
    reasons = {one.estimate.why_none for one in found.models if one.estimate.why_none}
    lines = []
    for reason in sorted(reasons):
        models = [one.model for one in found.models if one.estimate.why_none == reason]
        whose = "" if len(models) == len(found.models) else f" of {', '.join(models)}"
        lines += textwrap.wrap(f"no interval{whose}: {reason}", WIDTH)
    if not any(one.estimate.num_patients < MIN_PATIENTS for one in found.models):
        return lines
    names = list(dict.fromkeys(score.scan for score in scans))
    kept = names[:MOST_SCANS]
    more = f" and {len(names) - len(kept)} more, see results.csv" if len(names) > len(kept) else ""
    lines += textwrap.wrap(f"scans: {', '.join(kept)}{more}", WIDTH, subsequent_indent="  ")
    value_of = {(score.model, score.scan): score.value for score in scans}
    width = max(len(one.model) for one in found.models)
    for one in found.models:
        values = [shown(value_of.get((one.model, name), math.nan)) for name in kept]
        text = f"  {one.model:<{width}}  {' '.join(values)}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * (width + 4))
    return lines
