"""Charts as inline SVG: no requests, any theme, readable from a phone to a print; values under the
pointer by theme.js.

Knows nothing of the project: curves in, HTML out. Colours are the CSS variables --c0 .. --c6 of the
    page.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 460, 232  # user units of a chart; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 8, 36
NUM_COLOURS = 7
MAX_BUCKETS = 280  # curves longer than twice this are decimated
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
        end: value shown beside its name; None: the last one that is drawn.
        intervals: float64 (n, 2), ends of a vertical line through each point, NaN without one;
            each point is then drawn as a dot. None draws neither.
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


@dataclass(frozen=True)
class Frame:
    """Data range of a chart."""

    x0: float
    x1: float
    y0: float
    y1: float

    def px(self, x: np.ndarray) -> np.ndarray:
        """Data x -> user units."""
        return LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def py(self, y: np.ndarray) -> np.ndarray:
        """Data y -> user units."""
        return TOP + (self.y1 - y) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def dash_of(i: int) -> str:
    """Dash pattern of curve i; a colour that comes round again gets another one."""
    return DASHES[(i + i // NUM_COLOURS) % NUM_COLOURS]


def _styles(curves: Sequence[Curve]) -> list[int]:
    return [i if curve.style is None else curve.style for i, curve in enumerate(curves)]


def text(value: object) -> str:
    """Any value as HTML text, escaped."""
    return html.escape(str(value), quote=True)


def number(value: float, digits: int = 4) -> str:
    """A number for people: `digits` significant ones, short exponents, thin spaces in large counts,
    a real minus.
    """
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or (value == int(value) and 1e4 <= abs(value) < 1e15):
        shown = f"{int(value):,}".replace(",", "\u2009") if abs(value) >= 1e4 else str(value)
    elif value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        shown = f"{mantissa}e{int(exponent)}"
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value != 0 else 0
        shown = f"{value:.{min(decimals, digits)}f}"
    return shown.replace("-", "\u2212", 1) if value < 0 else shown


def ticks(low: float, high: float, count: int = 5) -> np.ndarray:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about `count` of
    them.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step


def tick_labels(values: np.ndarray) -> list[str]:
    """Labels with equal decimals; thousands as k, tiny ones with an exponent."""
    step = (
        float(values[1] - values[0])
        if len(values) > 1
        else float(abs(values[0]))
        if len(values)
        else 1.0
    )
    largest = float(np.abs(values).max(initial=0.0))
    unit, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    if 0 < largest < 1e-2:
        exponent = math.floor(math.log10(largest))
        unit, suffix = 10.0**exponent, f"e\u2212{-exponent}"
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9)) if step > 0 else 0
    return [
        "0" if abs(v) < step * 1e-6 else f"{v / unit:.{decimals}f}{suffix}".replace("-", "\u2212")
        for v in values
    ]


def rolling_mean(y: np.ndarray, half: int) -> np.ndarray:
    """Mean over up to 2 * half + 1 neighbours, skipping what is not finite.

    The window is symmetric at the start, where curves are steep, and looks back at the end, where
    they are noisy.
    """
    finite = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(y))
    reach = np.minimum(index, half)
    low, high = index - reach, np.minimum(index + reach, len(y) - 1) + 1
    number_ = count[high] - count[low]
    return np.where(number_ > 0, (total[high] - total[low]) / np.maximum(number_, 1), np.nan)


def _edges(n: int, buckets: int) -> np.ndarray:
    return np.linspace(0, n, min(buckets, n) + 1).astype(int)


def decimate_extremes(
    x: np.ndarray, y: np.ndarray, buckets: int = MAX_BUCKETS
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest point of each bucket, in order of x: a spike of one step stays visible."""
    if len(x) <= 2 * buckets:
        return x, y
    keep: list[int] = []
    for low, high in itertools.pairwise(_edges(len(x), buckets)):
        part = y[low:high]
        finite = np.flatnonzero(np.isfinite(part))
        found = (
            {int(finite[part[finite].argmin()]), int(finite[part[finite].argmax()])}
            if len(finite)
            else {0}
        )
        keep += [int(low) + i for i in sorted(found)]
    return x[keep], y[keep]


def decimate_means(
    x: np.ndarray, y: np.ndarray, buckets: int = MAX_BUCKETS
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each bucket's finite values, at the bucket's mean x; first and last point are kept as
    they are.
    """
    if len(x) <= 2 * buckets:
        return x, y
    edges = _edges(len(x), buckets)
    size, finite = np.diff(edges), np.isfinite(y)
    count = np.add.reduceat(finite, edges[:-1])
    total = np.add.reduceat(np.where(finite, y, 0.0), edges[:-1])
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    middle = np.add.reduceat(x, edges[:-1]) / size
    return np.concatenate([x[:1], middle, x[-1:]]), np.concatenate([y[:1], mean, y[-1:]])


def decimate_medians(
    x: np.ndarray, y: np.ndarray, buckets: int = MAX_BUCKETS
) -> tuple[np.ndarray, np.ndarray]:
    """Median of each bucket's finite values (0 without any), at the bucket's mean x: single slow
    steps drop out.
    """
    if len(x) <= buckets:
        return x, np.nan_to_num(y)
    edges = _edges(len(x), buckets)
    parts = [y[low:high][np.isfinite(y[low:high])] for low, high in itertools.pairwise(edges)]
    middle = np.add.reduceat(x, edges[:-1]) / np.diff(edges)
    return middle, np.array([np.median(part) if len(part) else 0.0 for part in parts])


def smoothed(curve: Curve) -> np.ndarray:
    """The curve as it is drawn in front."""
    half = min(len(curve.y) // 60, 100) if curve.smooth else 0
    return rolling_mean(curve.y, half) if half else curve.y


def _range(
    curves: Sequence[Curve],
    fronts: Sequence[np.ndarray],
    references: Sequence[ReferenceLine],
    zero: bool,
) -> Frame:
    """Fit the smoothed curves and the raw ones but for rare spikes, which leave the frame (and are
    marked there).
    """
    values = [
        np.array([line.y for line in references if math.isfinite(line.y)] + ([0.0] if zero else []))
    ]
    raws = [curve.y[np.isfinite(curve.y)] for curve in curves]
    for raw, front in zip(raws, fronts, strict=True):
        values += [front[np.isfinite(front)], np.percentile(raw, [0.5, 99.5]) if len(raw) else raw]
    for curve in curves:
        if curve.intervals is not None:
            values.append(curve.intervals[np.isfinite(curve.intervals)])
    flat, raw = np.concatenate(values), np.concatenate(raws)
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 1.0)
    if len(raw):
        slack = 0.4 * (high - low)
        low = float(raw.min()) if low - slack <= raw.min() < low else low
        high = float(raw.max()) if high < raw.max() <= high + slack else high
    constant = high - low <= 1e-6 * max(abs(low), abs(high))
    pad = (0.5 * abs(high) or 1.0) if constant else 0.06 * (high - low)
    x = np.concatenate([curve.x for curve in curves])
    x0, x1 = float(x.min()), float(x.max())
    y0 = 0.0 if zero and low >= 0 else low - pad
    room = (
        0.1 * (high - low)
        if any(line.y > high - 0.05 * (high - low) for line in references)
        else 0.0
    )  # for its label
    return Frame(x0, x1 if x1 > x0 else x0 + 1, y0, high + max(pad, room))


def _path(frame: Frame, x: np.ndarray, y: np.ndarray) -> str:
    """SVG path; what is not finite is a gap."""
    points = np.stack([frame.px(x), frame.py(y)], 1).round(1)
    parts, pen = [], "M"
    for px, py in points.tolist():
        if not math.isfinite(py):
            pen = "M"
            continue
        parts.append(f"{pen}{px:g} {py:g}")
        pen = "L"
    return "".join(parts)


def _axes(frame: Frame, x_label: str) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    y_ticks, x_ticks = ticks(frame.y0, frame.y1, 5), ticks(frame.x0, frame.x1, 5)
    parts = []
    for value, label in zip(frame.py(y_ticks), tick_labels(y_ticks), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT} {value:.1f}H{right}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{value + 4:.1f}" '
            f'text-anchor="end">{label}</text>'
        )
    for value, label in zip(frame.px(x_ticks), tick_labels(x_ticks), strict=True):
        anchor = "end" if value > right - 12 else "middle"
        parts.append(f'<path class="axis" d="M{value:.1f} {bottom}v4"/>')
        parts.append(
            f'<text class="tick" x="{value:.1f}" y="{bottom + 16}" '
            f'text-anchor="{anchor}">{label}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    middle = (LEFT + right) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{HEIGHT - 5}" '
        f'text-anchor="middle">{text(x_label)}</text>'
    )
    return "".join(parts)


def _references(frame: Frame, references: Sequence[ReferenceLine]) -> str:
    parts = []
    for line in references:
        y = float(frame.py(np.array(line.y)))
        parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="rule-label" x="{WIDTH - RIGHT - 3}" y="{y - 4:.1f}" text-anchor="end">'
            f"{text(line.label)}</text>"
        )
    return "".join(parts)


def _marks(frame: Frame, curve: Curve, colour: int) -> str:
    """Triangles where the raw curve leaves the frame, crosses where it is not finite; at most one
    of a kind each.
    """
    parts, peak = [], np.where(np.isfinite(curve.y), curve.y, -np.inf)
    if len(peak) and peak.max() > frame.y1:
        at = int(peak.argmax())
        x, title = (
            float(frame.px(curve.x[at])),
            f"{curve.label}: {number(float(peak[at]))} at {number(float(curve.x[at]))}",
        )
        parts.append(
            f'<path class="mark" style="fill:var(--c{colour})" d="M{x - 4:.1f} {TOP + 7}h8l-4 '
            f'-7z"><title>{text(title)}'
            "</title></path>"
        )
    broken = np.flatnonzero(~np.isfinite(curve.y))
    if len(broken):
        x = float(frame.px(curve.x[broken[0]]))
        title = (
            f"{curve.label}: not finite at {len(broken)} points, first at "
            f"{number(float(curve.x[broken[0]]))}"
        )
        d = f"M{x - 4:.1f} {TOP + 2}l8 8m0 -8l-8 8"
        parts.append(f'<path class="broken" d="{d}"><title>{text(title)}</title></path>')
    return "".join(parts)


def _points(frame: Frame, curve: Curve, colour: int) -> str:
    """A dot and an interval at each point of a curve that has intervals, and its ring."""
    if curve.intervals is None:
        return ""
    parts, stroke = [], f"stroke:var(--c{colour})"
    x, y, ends = frame.px(curve.x), frame.py(curve.y), frame.py(curve.intervals)
    for i in range(len(x)):
        if not TOP <= y[i] <= HEIGHT - BOTTOM:  # not finite, or a spike, which is marked
            continue
        if np.isfinite(ends[i]).all():
            line = f"M{x[i]:.1f} {ends[i, 0]:.1f}V{ends[i, 1]:.1f}"
            parts.append(f'<path class="interval" style="{stroke};opacity:.45" d="{line}"/>')
        at = f'cx="{x[i]:.1f}" cy="{y[i]:.1f}"'
        parts.append(f'<circle r="2.5" style="fill:var(--c{colour})" {at}/>')
        if curve.x[i] == curve.ring:
            title = (
                f"{curve.label}: best, {number(float(curve.y[i]))} at {number(float(curve.x[i]))}"
            )
            parts.append(
                f'<circle class="ring" r="6" style="fill:none;{stroke};stroke-width:2" {at}>'
                f"<title>{text(title)}</title></circle>"
            )
    return "".join(parts)


def _legend(curves: Sequence[Curve], fronts: Sequence[np.ndarray], area: bool) -> str:
    items = []
    for i, curve, front in zip(_styles(curves), curves, fronts, strict=True):
        colour, dash = i % NUM_COLOURS, dash_of(i)
        key = (
            '<svg class="key" viewBox="0 0 22 10" aria-hidden="true"><path d="M0 5H22" '
            f'style="stroke:var(--c{colour});'
            f'stroke-width:{9 if area else 2.4}" stroke-dasharray="{"" if area else dash}"/></svg>'
        )
        broken = int((~np.isfinite(curve.y)).sum())
        note = (
            f' <em class="broken-note">not finite at {broken} of {len(curve.y)}</em>'
            if broken
            else ""
        )
        last = front[np.isfinite(front)]
        if curve.end is not None:
            value = number(curve.end)
        else:
            value = number(float(last[-1])) if len(last) else "\u2013"
        items.append(
            f'<span class="item">{key}{text(curve.label)} <b class="val">{value}</b>{note}</span>'
        )
    return f'<div class="legend"><span class="at"></span>{"".join(items)}</div>'


def _hover(frame: Frame, fronts: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    """Data for the pointer's readout, as JSON: numbers and null alone, so it cannot end its script
    element.
    """
    series = [
        {
            "x": x.round(1).tolist(),
            "y": [float(f"{v:.5g}") if math.isfinite(v) else None for v in y.tolist()],
        }
        for x, y in fronts
    ]
    payload = {"frame": [frame.x0, frame.x1, LEFT, WIDTH - RIGHT, WIDTH], "series": series}
    return f'<script type="application/json">{json.dumps(payload, separators=(",", ":"))}</script>'


def _figure(title: str, unit: str, legend: str, body: str, hover: str) -> str:
    shown = f' <span class="unit">{text(unit)}</span>' if unit else ""
    cursor = f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/>'
    return (
        f'<figure class="chart"><figcaption><b>{text(title)}</b>{shown}</figcaption>{legend}'
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(title)}">{body}{cursor}</svg>'
        f"{hover}</figure>"
    )


def line_chart(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    references: Sequence[ReferenceLine] = (),
    zero: bool = False,
    band: bool = False,
    x_label: str = "optimizer step",
) -> str:
    """A chart of curves over x.

    Args:
        title: what is shown; `unit` stands beside it.
        curves: at least one, each with at least one point.
        references: horizontal reference lines, within the range.
        zero: let the range reach 0.
        band: shade the space between the first two curves (which share x).
    Returns:
        One `<figure>`.
    """
    fronts = [smoothed(curve) for curve in curves]
    frame = _range(curves, fronts, references, zero)
    drawn = [decimate_means(curve.x, front) for curve, front in zip(curves, fronts, strict=True)]
    box = f"{WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}"
    width, height = box.split()
    clip = (
        f'<svg x="{LEFT}" y="{TOP}" width="{width}" height="{height}" viewBox="{LEFT} {TOP} {box}">'
    )
    parts = [_axes(frame, x_label), clip]
    if band and len(curves) > 1:
        outline = [np.concatenate([drawn[0][i], drawn[1][i][::-1]]) for i in (0, 1)]
        finite = np.isfinite(outline[1])
        parts.append(
            f'<path class="band" d="{_path(frame, outline[0][finite], outline[1][finite])}Z"/>'
        )
    styles = _styles(curves)
    for i, curve, front in zip(styles, curves, fronts, strict=True):
        if front is not curve.y:
            raw = _path(frame, *decimate_extremes(curve.x, curve.y))
            parts.append(f'<path class="raw" style="stroke:var(--c{i % NUM_COLOURS})" d="{raw}"/>')
    for i, (x, y) in zip(styles, drawn, strict=True):
        style = f'style="stroke:var(--c{i % NUM_COLOURS})" stroke-dasharray="{dash_of(i)}"'
        parts.append(f'<path class="line" {style} d="{_path(frame, x, y)}"/>')
        if len(x) == 1 and np.isfinite(y[0]):
            at = f'cx="{float(frame.px(x)[0]):.1f}" cy="{float(frame.py(y)[0]):.1f}"'
            parts.append(f'<circle r="3.5" style="fill:var(--c{i % NUM_COLOURS})" {at}/>')
    parts.append("</svg>" + _references(frame, references))
    # not clipped: the ring of the last step would lose its right half
    parts += [
        _points(frame, curve, i % NUM_COLOURS) for i, curve in zip(styles, curves, strict=True)
    ]
    parts += [
        _marks(frame, curve, i % NUM_COLOURS) for i, curve in zip(styles, curves, strict=True)
    ]
    return _figure(
        title, unit, _legend(curves, fronts, area=False), "".join(parts), _hover(frame, drawn)
    )


def area_chart(
    title: str, unit: str, curves: Sequence[Curve], *, x_label: str = "optimizer step"
) -> str:
    """Curves that share x and are >= 0, stacked as running medians; the first one lies at the
    bottom.
    """
    drawn = [decimate_medians(curve.x, curve.y, MAX_BUCKETS // 4) for curve in curves]
    fronts = [y for _, y in drawn]
    stack = np.cumsum([y for _, y in drawn], axis=0)
    x = drawn[0][0]
    top = float(np.percentile(stack[-1], 99)) * 1.12 or 1.0
    frame = Frame(float(x[0]), float(x[-1]) if x[-1] > x[0] else float(x[0]) + 1, 0.0, top)
    parts, floor = [_axes(frame, x_label)], np.zeros_like(stack[0])
    for i, ceiling in enumerate(stack):
        outline = np.concatenate([x, x[::-1]]), np.concatenate([ceiling, floor[::-1]]).clip(max=top)
        parts.append(
            f'<path class="area" style="fill:var(--c{i % NUM_COLOURS})" '
            f'd="{_path(frame, *outline)}Z"/>'
        )
        floor = ceiling
    return _figure(
        title, unit, _legend(curves, fronts, area=True), "".join(parts), _hover(frame, drawn)
    )


def share_bar(parts: Sequence[tuple[str, float]], unit: str) -> str:
    """One bar that splits into its parts (values >= 0), with a small table."""
    total = sum(value for _, value in parts) or 1.0
    cells = "".join(
        f'<span style="width:{100 * value / total:.2f}%;'
        f'background:var(--c{i % NUM_COLOURS})"></span>'
        for i, (_, value) in enumerate(parts)
    )
    rows = "".join(
        '<tr><th><i class="swatch" '
        f'style="background:var(--c{i % NUM_COLOURS})"></i>{text(label)}</th>'
        f"<td>{number(value, 3)} {text(unit)}</td><td>{100 * value / total:.1f} %</td></tr>"
        for i, (label, value) in enumerate(parts)
    )
    return f'<div class="share" aria-hidden="true">{cells}</div><table class="plain">{rows}</table>'
