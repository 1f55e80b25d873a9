"""The parts of the page about training: losses, health, schedules and time, as charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tapct.base import metric_names
from tapct.base.console import duration
from tapct.config import plugins
from tapct.report.charts import Curve, ReferenceLine, area_chart, line_chart, share_bar
from tapct.report.history import History, prototypes_ln
from tapct.ssl.health import TermReading

SECONDS = {
    "data": "data",
    "views": "views",
    "forward_backward": "forward and backward",
    "optimizer": "optimizer and EMA",
}
SCHEDULES = {  # metric -> title, unit
    "lr": ("Learning rate", ""),
    "wd": ("Weight decay", ""),
    "momentum": ("Teacher momentum", ""),
    "teacher_temp": ("Teacher temperature", ""),
}
HEALTH = {  # metric -> title, unit, factor
    "rankme": ("RankMe: effective rank of the features", "", 1.0),
    "teacher_student_cosine": ("Cosine of teacher and student CLS", "", 1.0),
    "cls_std": ("Spread of CLS: std of unit vectors", "0 = collapsed", 1.0),
    "patch_norm_outliers": ("Patch tokens with outlying norm", "%", 100.0),
}
TERM_HEALTH = (
    "ln_k_minus_ce",
    "information",
    "marginal_entropy",
    "target_entropy",
    "prototypes_used",
)


def label_of(name: str) -> str:
    """The last part of a metric's name, for people."""
    loss, _, rest = name.partition("_")
    return f"{plugins.title('losses', loss)} {rest}".strip().replace("_", " ")


def curve(
    history: History, name: str, label: str = "", factor: float = 1.0, smooth: bool = True
) -> Curve | None:
    """A metric as a curve; None when it was never written. Beside its name stands the number that
    the rest of the page shows; the last value where it is not smoothed.
    """
    x, y = history.column(name)
    end = history.recent(name) * factor if smooth else None
    return Curve(label, x, y * factor, smooth, end=end) if len(x) else None


def curves(history: History, names: Mapping[str, str], factor: float = 1.0) -> list[Curve]:
    """Metrics (name -> label) as curves, without those that were never written."""
    drawn = (curve(history, name, label, factor) for name, label in names.items())
    return [one for one in drawn if one is not None]


def terms(history: History) -> list[str]:
    """Losses that report the information of their targets."""
    return [
        metric_names.loss_with_targets(name)
        for name in history.names("health/")
        if metric_names.loss_with_targets(name)
    ]


def readings(history: History) -> list[TermReading]:
    """Recent health of each prototype loss."""

    def recent(term: str, what: str) -> float:
        return history.recent(metric_names.target_health(term, what))

    health_of_terms = []
    for term in terms(history):
        ln_k, marginal = prototypes_ln(history, term), recent(term, "marginal_entropy")
        bound = ln_k if math.isfinite(ln_k) else marginal  # the marginal entropy is at most ln K
        health_of_terms.append(
            TermReading(
                label_of(term),
                recent(term, "ln_k_minus_ce"),
                marginal,
                recent(term, "target_entropy"),
                bound,
            )
        )
    return health_of_terms


def losses(history: History) -> str:
    """Charts of the total, of each term as optimised, and of the plain cross-entropies."""
    charts = []
    for name in ["loss/total", *(name for name in history.names("loss/") if name != "loss/total")]:
        one = curve(history, name)
        if one:
            kind = label_of(name.removeprefix("loss/"))
            charts.append(
                line_chart("Total loss" if kind == "total" else f"{kind}, weighted", "nats", [one])
            )
    groups: dict[str, dict[str, str]] = {}
    for name in history.names("ce/"):
        kind = name.removeprefix("ce/")
        groups.setdefault(kind.split("_")[0], {})[name] = label_of(kind)
    for term, names in groups.items():
        ln_k = prototypes_ln(history, term)
        references = []
        if math.isfinite(ln_k):
            references = [ReferenceLine(f"ln K = {ln_k:.3f}: nothing learned", ln_k)]
        charts.append(
            line_chart(
                f"{label_of(term)} cross-entropy",
                "nats per pair, no weight",
                curves(history, names),
                references=references,
            )
        )
    return _grid(charts)


def health(history: History) -> str:
    """Charts that show whether the run learns."""
    prototype_terms, charts = terms(history), []
    for what, title, unit, factor in (
        ("information", "Information of the targets", "nats", 1.0),
        ("ln_k_minus_ce", "ln K \u2212 cross-entropy", "nats", 1.0),
        ("prototypes_used", "Prototypes in use", "%", 100.0),
    ):
        lines = curves(
            history, {f"health/{term}_{what}": label_of(term) for term in prototype_terms}, factor
        )
        if lines:
            references = []
            if unit == "nats":
                at_zero = "stuck or collapsed" if what == "information" else "stuck"
                references = [ReferenceLine(at_zero, 0.0)]
            charts.append(line_chart(title, unit, lines, references=references, zero=True))
    for term in prototype_terms:
        names = {
            f"health/{term}_marginal_entropy": "of the mean target",
            f"health/{term}_target_entropy": "mean of the targets",
        }
        lines = curves(history, names)
        if lines:
            ln_k = prototypes_ln(history, term)
            references = [ReferenceLine("ln K", ln_k)] if math.isfinite(ln_k) else []
            paired = len(lines) == 2 and np.array_equal(lines[0].x, lines[1].x)
            charts.append(
                line_chart(
                    f"{label_of(term)} target entropies",
                    "nats; the gap is the information",
                    lines,
                    references=references,
                    band=paired,
                )
            )
    shown = {f"health/{term}_{what}" for term in prototype_terms for what in TERM_HEALTH}
    for name in history.names("health/"):
        key = name.removeprefix("health/")
        title, unit, factor = HEALTH.get(key, (label_of(key), "", 1.0))
        one = curve(history, name, "", factor)
        if one and name not in shown:
            charts.append(
                line_chart(title, unit, [one], zero=key in ("cls_std", "patch_norm_outliers"))
            )
    norms = curves(
        history,
        {name: label_of(name.removeprefix("grad_norm/")) for name in history.names("grad_norm/")},
    )
    if norms:
        charts.append(line_chart("Gradient norm before clipping", "", norms, zero=True))
    return _grid(charts)


def schedules(history: History) -> str:
    """Charts of what the schedules set."""
    charts = (
        (curve(history, name, "", smooth=False), title, unit)
        for name, (title, unit) in SCHEDULES.items()
    )
    return _grid(
        [
            line_chart(title, unit, [one], zero=title == "Learning rate")
            for one, title, unit in charts
            if one
        ]
    )


def timing(history: History) -> str:
    """Charts of the time of a step, by part."""
    names = [name for name in history.names("seconds/") if name != "seconds/step"]
    names.sort(
        key=lambda name: (
            list(SECONDS).index(key) if (key := name.removeprefix("seconds/")) in SECONDS else 99
        )
    )
    parts = curves(
        history,
        {
            name: SECONDS.get(
                name.removeprefix("seconds/"), label_of(name.removeprefix("seconds/"))
            )
            for name in names
        },
    )
    whole = curve(history, "seconds/step")
    if whole and parts and all(np.array_equal(one.x, whole.x) for one in parts):
        rest = whole.y - np.sum([one.y for one in parts], axis=0)
        if np.nanmedian(rest) > 0.01 * np.nanmedian(whole.y):
            parts.append(Curve("the rest", whole.x, rest.clip(min=0.0)))
    if not parts:
        return _grid([])
    medians = [
        (one.label, float(np.nanmedian(one.y)) if np.isfinite(one.y).any() else 0.0)
        for one in parts
    ]
    charts = []
    if all(np.array_equal(one.x, parts[0].x) for one in parts):
        charts.append(area_chart("Time of a step", "s, stacked", parts))
    speed = curve(history, "samples_per_second")
    if speed:
        charts.append(line_chart("Throughput", "samples per second", [speed], zero=True))
    totals = {one.label: duration(float(np.nansum(one.y))) for one in parts}
    bar = f"<h3>Time budget of the median step</h3>{share_bar(medians, totals)}"
    return f'<div class="charts">{"".join(charts)}<div>{bar}</div></div>'


def _grid(charts: Sequence[str]) -> str:
    if not charts:
        return '<p class="missing">The run logged none of these numbers.</p>'
    return f'<div class="charts">{"".join(charts)}</div>'
