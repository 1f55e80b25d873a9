"""The tables of intervals and paired differences on the pages."""

from __future__ import annotations

import math

from tapct.base.counted import counted
from tapct.eval.results.task_section import TaskSection
from tapct.eval.results.terminal import between, p_text, shown, with_sign
from tapct.eval.statistics import MIN_PATIENTS, PatientEstimate, Statistics
from tapct.report.markup import text
from tapct.report.tables import head, number_cell, row, table

OPEN_ROWS = 12  # a longer table starts folded
MINUS = str.maketrans({"-": "\u2212"})


def headline_statistics(section: TaskSection) -> Statistics | None:
    """Statistics of the headline of a task; None where there are none."""
    found = section.statistics
    metric = found.of(section.headline.metric) if found is not None else None
    return None if metric is None else metric.whole


def interval_cell(estimate: PatientEstimate | None, *, sign: bool = False) -> str:
    """A cell with an interval, or with the reason against one when the pointer is on it."""
    if estimate is None or estimate.interval is None:
        why = estimate.why_none if estimate is not None else ""
        return f'<td class="n" title="{text(why)}">\u2013</td>'
    found = between(estimate.interval, sign=sign).translate(MINUS)
    return f'<td class="n interval">{text(found)}</td>'


def numbers_cell(estimate: PatientEstimate | None) -> str:
    """A cell with the numbers of scans and patients of a value."""
    if estimate is None:
        return '<td class="n">\u2013</td>'
    return f'<td class="n interval">{estimate.num_scans} / {estimate.num_patients}</td>'


def sentence(section: TaskSection) -> str:
    """What the intervals are, or why there are none, as HTML; empty for earlier versions."""
    if section.statistics is None:
        return ""
    found = headline_statistics(section)
    if found is None:
        return f'<p class="muted">No interval: {text(section.statistics.why_none)}.</p>'
    few = [one for one in found.models if one.estimate.num_patients < MIN_PATIENTS]
    if few:
        num = counted(few[0].estimate.num_patients, "patient")
        ticks = "the ticks in the bars are the single scans" if section.results.scans else ""
        return (
            f'<p class="muted">No interval, because there are only {num} (at least {MIN_PATIENTS} '
            f"are needed){'; ' if ticks else ''}{ticks}.</p>"
        )
    if all(one.estimate.interval is None for one in found.models):
        reasons = dict.fromkeys(one.estimate.why_none for one in found.models)
        return f'<p class="muted">No interval: {text("; ".join(reasons))}.</p>'
    unknown = ""
    if found.num_unknown:
        scans = counted(found.num_unknown, "scan")
        unknown = f" The patient of {scans} is unknown; each counts as a patient of its own."
    return (
        '<p class="muted">Intervals hold the true value with a probability of about 95 %; they are '
        f"computed from {found.num_resamples} resamples of patients. n: test scans / patients."
        f"{unknown}</p>"
    )


def estimates_of_parts(section: TaskSection) -> dict[str, dict[str, PatientEstimate]]:
    """Part -> model -> estimate of the headline; empty where no part has an interval."""
    found = section.statistics.of(section.headline.metric) if section.statistics else None
    estimates: dict[str, dict[str, PatientEstimate]] = {}
    for part, of_part in (found.parts if found is not None else {}).items():
        estimates[part] = {one.model: one.estimate for one in of_part.models}
    all_of_them = [one for of_part in estimates.values() for one in of_part.values()]
    return estimates if any(one.interval is not None for one in all_of_them) else {}


def differences_table(section: TaskSection, names: dict[str, str], name: str) -> str:
    """The pretrained model minus each other model, paired by patient; empty without intervals.

    Args:
        section: results of a task.
        names: names of models for people.
        name: short name of the task.
    """
    found = headline_statistics(section)
    pairs = found.differences if found is not None else ()
    if not any(pair.estimate.interval is not None for pair in pairs):
        return ""
    rows = []
    for pair in pairs:
        difference = with_sign(pair.estimate.value).translate(MINUS)
        cells = [number_cell(difference), interval_cell(pair.estimate, sign=True)]
        cells += [number_cell(p_text(pair.p)), number_cell(p_text(pair.p_holm))]
        cells.append(numbers_cell(pair.estimate))
        rows.append(row(names.get(pair.other, pair.other), cells))
    reference = names.get(pairs[0].reference, pairs[0].reference)
    num = max(pair.num_comparisons for pair in pairs)
    titles = ("difference", "95 % interval", "p", f"p, adjusted for {num} (Holm)", "n")
    heads = [head(f"{reference}, minus"), *(head(title, is_number=True) for title in titles)]
    return table(f"{name}-differences", heads, rows, "differences")


def further_table(section: TaskSection, names: dict[str, str], name: str) -> str:
    """The metrics beside the headline: one row per metric and model; empty where there are none.

    Args:
        section: results of a task.
        names: names of models for people.
        name: short name of the task.
    """
    if section.statistics is None:
        return ""
    notes, rows = "", []
    for one in section.results.further:
        found = section.statistics.of(one.metric)
        if found is None:
            continue
        notes += (
            f"<li>{text(one.metric)}, {text(one.direction)} is better: {text(one.meaning)}</li>"
        )
        estimates = {own.model: own.estimate for own in found.whole.models}
        for model in section.headline.values:
            estimate = estimates.get(model)
            value = shown(estimate.value if estimate is not None else math.nan)
            cells = [f"<td>{text(names.get(model, model))}</td>", number_cell(value)]
            cells += [interval_cell(estimate), numbers_cell(estimate)]
            rows.append(row(one.metric, cells))
    if not rows:
        return ""
    heads = [head("metric"), head("model")]
    heads += [head(title, is_number=True) for title in ("value", "95 % interval", "n")]
    opened = " open" if len(rows) <= OPEN_ROWS else ""
    return (
        f"<details{opened}><summary>Further metrics ({len(rows)})</summary>"
        f'{table(f"{name}-further-metrics", heads, rows, "differences")}<ul class="notes">{notes}'
        "</ul></details>"
    )
