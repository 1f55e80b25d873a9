"""Charts for the pages: a legend in HTML and data as JSON, which web/charts.js draws with uPlot.

Knows nothing of the project: curves in, HTML out. Colours are the CSS variables --c0 .. --c6 of the
page; a line also has dashes and an area a hatch, so that neither needs its colour.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tapct.report.markup import number, text
from tapct.report.series import group_medians, grouped

NUM_COLOURS = 7
MOST_MEDIANS = 70  # groups of a stacked chart
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 3")  # a second channel beside colour


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Args:
        label: name in the legend.
        x: float64 (n), ascending.
        y: float64 (n); not finite where the value was not.
        smooth: draw a rolling mean, with the raw curve behind it.
        style: which colour and dashes; None: by its place in the chart.
        end: value shown beside its name; None: the last finite one.
        intervals: float64 (n, 2), ends of a vertical line through each point, NaN without one;
            each point is then drawn as a mark. None draws neither.
        ring: x of a point that gets a ring, such as the best one; None for none.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    smooth: bool = True
    style: int | None = None
    end: float | None = None
    intervals: np.ndarray | None = None
    ring: float | None = None


@dataclass(frozen=True)
class ReferenceLine:
    """A horizontal line at a value that means something, e.g. a bound."""

    label: str
    y: float


def dash_of(i: int) -> str:
    """Dash pattern of curve i; a colour that comes round again gets another one."""
    return DASHES[(i + i // NUM_COLOURS) % NUM_COLOURS]


def line_chart(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    references: Sequence[ReferenceLine] = (),
    zero: bool = False,
    band: bool = False,
    x_label: str = "optimizer step",
    log_x: bool = False,
) -> str:
    """Lines over one x axis.

    Args:
        title: heading of the chart.
        unit: unit of the values; may be empty.
        curves: at least one, each with at least one point.
        references: horizontal lines.
        zero: whether the axis includes 0.
        band: whether the area between the first two curves is filled.
        x_label: name of the x axis; charts with the same name are zoomed together.
        log_x: whether the x axis is logarithmic; then every x > 0.
    """
    styles = [i if curve.style is None else curve.style for i, curve in enumerate(curves)]
    drawn = [_line(curve, i) for curve, i in zip(curves, styles, strict=True)]
    lines = [{"label": one.label, "y": one.y} for one in references if math.isfinite(one.y)]
    content = {"kind": "line", "x_label": x_label, "zero": zero, "band": band, "log_x": log_x}
    content |= {"references": lines, "curves": drawn}
    legend = "".join(_legend_item(curve, i) for curve, i in zip(curves, styles, strict=True))
    return _figure(title, unit, legend, content)


def area_chart(
    title: str, unit: str, curves: Sequence[Curve], *, x_label: str = "optimizer step"
) -> str:
    """Curves that share x and are >= 0, stacked as medians of groups of steps; the first one lies
    at the bottom.
    """
    drawn, legend = [], ""
    for i, curve in enumerate(curves):
        x, y = group_medians(curve.x, curve.y, MOST_MEDIANS)
        drawn.append({"label": curve.label, "style": i, "x": _rounded(x), "mean": _rounded(y)})
        legend += _item(swatch(i), curve.label, number(float(y[-1])), "")
    content = {"kind": "area", "x_label": x_label, "curves": drawn}
    return _figure(title, unit, legend, content)


def share_bar(parts: Sequence[tuple[str, float]], totals: Mapping[str, str]) -> str:
    """One bar that splits into its parts, with a small table.

    Args:
        parts: label and seconds of each part, >= 0.
        totals: label -> time of the whole run as text.
    """
    total = sum(value for _, value in parts) or 1.0
    cells, rows = "", ""
    for i, (label, value) in enumerate(parts):
        share = 100 * value / total
        cells += f'<span class="{_fill(i)}" style="width:{share:.2f}%"></span>'
        rows += (
            f"<tr><th>{swatch(i)}{text(label)}</th>"
            f'<td class="n">{number(value, 3)}</td><td class="n">{share:.1f}</td>'
            f'<td class="n">{text(totals[label])}</td></tr>'
        )
    numbers = "".join(f'<th class="n">{name}</th>' for name in ("s", "%", "whole run"))
    head = f"<tr><th>part</th>{numbers}</tr>"
    return (
        f'<div class="share" aria-hidden="true">{cells}</div><table class="plain sortable" '
        f'data-csv="time"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    )


def line_key(i: int) -> str:
    """The key of line i in a legend or in the head of a table: its colour and its dashes."""
    return (
        '<svg class="key" viewBox="0 0 22 10" aria-hidden="true"><path d="M0 5H22" '
        f'style="stroke:var(--c{i % NUM_COLOURS})" stroke-dasharray="{dash_of(i)}"/></svg>'
    )


def swatch(i: int) -> str:
    """The key of area i: its colour and its hatch."""
    return f'<i class="swatch {_fill(i)}"></i>'


def _fill(i: int) -> str:
    return f"fill{i % NUM_COLOURS}"


def _line(curve: Curve, style: int) -> dict[str, Any]:
    """The data of one line as JSON."""
    found = grouped(curve.x, curve.y)
    one: dict[str, Any] = {"label": curve.label, "style": style, "smooth": curve.smooth}
    one |= {"x": _rounded(found.last, 12), "mean": _rounded(found.mean), "size": found.size}
    if found.size > 1:
        one |= {"first": _rounded(found.first, 12), "low": _rounded(found.low)}
        one |= {"high": _rounded(found.high)}
    broken = curve.x[~np.isfinite(curve.y)]
    if len(broken):
        one |= {"broken": float(broken[0]), "num_broken": len(broken)}
    if curve.intervals is not None:
        one["intervals"] = [_rounded(ends) for ends in curve.intervals]
    if curve.ring is not None:
        one["ring"] = curve.ring
    return one


def _rounded(values: np.ndarray, digits: int = 5) -> list[float | int | None]:
    """Numbers with few digits; None where they are not finite."""
    kept: list[float | int | None] = []
    for value in values.tolist():
        if not math.isfinite(value):
            kept.append(None)
            continue
        short = float(f"{value:.{digits}g}")
        kept.append(int(short) if short == int(short) else short)
    return kept


def _legend_item(curve: Curve, style: int) -> str:
    finite = curve.y[np.isfinite(curve.y)]
    value = "\u2013"
    if curve.end is not None:
        value = number(curve.end)
    elif len(finite):
        value = number(float(finite[-1]))
    num_broken = len(curve.y) - len(finite)
    note = f"not finite at {num_broken} of {len(curve.y)}" if num_broken else ""
    return _item(line_key(style), curve.label, value, note)


def _item(key: str, label: str, value: str, note: str) -> str:
    shown = f' <em class="broken-note">{text(note)}</em>' if note else ""
    return f'<span class="item">{key}{text(label)} <b class="val">{value}</b>{shown}</span>'


def _figure(title: str, unit: str, legend: str, content: dict[str, Any]) -> str:
    shown = f' <span class="unit">{text(unit)}</span>' if unit else ""
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="chart"><figcaption><span>{text(title)}{shown}</span></figcaption>'
        f'<div class="legend">{legend}<span class="at"></span></div><div class="plot"></div>'
        f'<script type="application/json">{data}</script></figure>'
    )
