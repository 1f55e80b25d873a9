"""The page of `tapct compare`: runs side by side as tables and charts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tapct.base.recent import LAST_STEPS
from tapct.eval.scores import OWN_MODEL
from tapct.report import fractions, step_values
from tapct.report.charts import Curve, ReferenceLine, line_chart, line_key
from tapct.report.compare import Comparison, Row, labels, numbers, settings, title
from tapct.report.document import document, save
from tapct.report.markup import text
from tapct.report.page import CURVE_TOOLS, footer
from tapct.report.tables import head, number_cell, row, table

EXPLAINED = (
    f"Losses and health are means over the last {LAST_STEPS} steps of each run, or the newest "
    "value where one is written more rarely. A falling loss alone does not show learning, and "
    "losses of runs with different settings cannot be compared. The evaluations of the frozen "
    "features can be compared; a positive lead is better than the best baseline. Differences "
    "between runs are paired by patient; intervals are 95 %. In the charts of evaluated steps, a "
    "ring marks the best step."
)


def tables(comparison: Comparison) -> str:
    """The numbers of the runs, and the settings in which they differ."""
    heads = [head("")]
    for i, run in enumerate(comparison.runs):
        # where a long name may break
        name = re.sub(r"([_/.,=-]+)", r"\1<wbr>", text(run.name))
        heads.append(f'<th scope="col" class="n">{line_key(i)}{name}</th>')

    def body(rows: Sequence[Row]) -> list[str]:
        return [row(name, [number_cell(cell) for cell in cells]) for name, cells in rows]

    differing = settings(comparison)
    shown = table("runs", heads, body(numbers(comparison)), "compare", is_sortable=False)
    if not differing:
        return f"{shown}<h3>No setting differs</h3>"
    heads[0] = head("setting")
    of_settings = table("settings", heads, body(differing), "compare")
    return f"{shown}<h3>Settings that differ</h3>{of_settings}"


def charts(comparison: Comparison) -> str:
    """The curves of all runs, one chart per number."""
    named = list(zip(labels(comparison), comparison.runs, strict=True))
    html = step_values.charts([(label, run.curves) for label, run in named])
    tasks = dict.fromkeys(
        task for run in comparison.runs for task in (run.evaluated.tasks if run.evaluated else {})
    )
    for task in tasks:
        lines = []
        for i, (label, run) in enumerate(named):
            if run.evaluated is not None and task in run.evaluated.tasks:
                lines.append((label, i, run.evaluated.tasks[task], OWN_MODEL))
        html += fractions.chart_of(lines)
    return html + "".join(_chart(comparison, metric) for metric in comparison.metrics)


def _chart(comparison: Comparison, metric: str) -> str:
    name, unit, factor = title(metric)
    curves = []
    for i, (label, run) in enumerate(zip(labels(comparison), comparison.runs, strict=True)):
        x, y = run.history.column(metric)
        if len(x):
            is_seconds = metric == "seconds/step"
            end = run.history.typical_seconds() if is_seconds else run.history.recent(metric)
            curves.append(Curve(label, x, y * factor, style=i, end=end * factor))
    lifeless = metric.endswith(("_ln_k_minus_ce", "_information"))
    references = [ReferenceLine("nothing learned", 0.0)] if lifeless else []
    from_zero = lifeless or metric.startswith("seconds/")
    return line_chart(name, unit, curves, references=references, zero=from_zero)


def sections(comparison: Comparison) -> str:
    """What was left out, the tables and the charts, as HTML."""
    notes = "".join(f"<li>{text(note)}</li>" for note in comparison.notes)
    left_out = f'<ul class="missing">{notes}</ul>' if notes else ""
    return (
        f"{left_out}<section>{tables(comparison)}"
        f'<p class="muted">{EXPLAINED}</p></section><section><h2 id="curves">Curves</h2>'
        f'{CURVE_TOOLS}<div class="charts">{charts(comparison)}</div></section>'
    )


def render(comparison: Comparison) -> str:
    """The page's HTML."""
    num = "1 run" if len(comparison.runs) == 1 else f"{len(comparison.runs)} runs"
    return document(
        f"{num} of tapct",
        f'<header><h1>{num} side by side</h1><p class="muted">Pretraining runs of tapct: '
        f"volumetric DINOv2 on CT.</p></header>{sections(comparison)}"
        f"{footer({run.name: run.history for run in comparison.runs})}",
    )


def write(comparison: Comparison, out: Path) -> Path:
    """Write the page, whole or not at all, and return its path. Raises: UserError."""
    return save(render(comparison), out)
