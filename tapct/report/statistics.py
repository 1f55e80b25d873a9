"""The tables of intervals and paired differences on the pages."""

from __future__ import annotations

import math

from tapct.base.counted import counted
from tapct.eval.statistics import MIN_PATIENTS, PatientEstimate, Statistics
from tapct.eval.task_section import TaskSection
from tapct.eval.terminal import between, p_text, shown, with_sign
from tapct.report.plots import text

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


def differences_table(section: TaskSection, names: dict[str, str]) -> str:
    """The pretrained model minus each other model, paired by patient; empty without intervals.

    Args:
        section: results of a task.
        names: names of models for people.
    """
    found = headline_statistics(section)
    pairs = found.differences if found is not None else ()
    if not any(pair.estimate.interval is not None for pair in pairs):
        return ""
    rows = ""
    for pair in pairs:
        difference = with_sign(pair.estimate.value).translate(MINUS)
        rows += (
            f"<tr><th>{text(names.get(pair.other, pair.other))}</th>"
            f'<td class="n">{text(difference)}</td>{interval_cell(pair.estimate, sign=True)}'
            f'<td class="n">{text(p_text(pair.p))}</td>'
            f'<td class="n">{text(p_text(pair.p_holm))}</td>{numbers_cell(pair.estimate)}</tr>'
        )
    reference = text(names.get(pairs[0].reference, pairs[0].reference))
    num = max(pair.num_comparisons for pair in pairs)
    return (
        f'<div class="scroll"><table class="differences"><thead><tr><th>{reference}, minus</th>'
        '<th class="n">difference</th><th class="n">95 % interval</th><th class="n">p</th>'
        f'<th class="n">p, adjusted for {num} (Holm)</th><th class="n">n</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def further_table(section: TaskSection, names: dict[str, str]) -> str:
    """The metrics beside the headline: one row per model; empty where there are none."""
    if section.statistics is None:
        return ""
    columns = []
    for one in section.results.further:
        found = section.statistics.of(one.metric)
        if found is not None:
            columns.append((one, {own.model: own.estimate for own in found.whole.models}))
    if not columns:
        return ""
    heads, notes = "", ""
    for one, _ in columns:
        heads += (
            f'<th class="n">{text(one.metric)}, {text(one.direction)} is better</th>'
            '<th class="n">95 % interval</th>'
        )
        notes += f" {text(one.meaning)}"
    rows = ""
    for model in section.headline.values:
        cells = ""
        for _, estimates in columns:
            estimate = estimates.get(model)
            value = shown(estimate.value if estimate is not None else math.nan)
            cells += f'<td class="n">{text(value)}</td>{interval_cell(estimate)}'
        rows += f"<tr><th>{text(names.get(model, model))}</th>{cells}</tr>"
    return (
        f'<p class="muted">{notes.strip()}</p><div class="scroll"><table class="differences">'
        f"<thead><tr><th>model</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
