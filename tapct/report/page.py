"""`tapct report RUN`: one self-contained HTML page about one run.

Everything is inside the page (charts as SVG, pictures as data); its content security policy forbids
requests. A part that the run does not have yet is named, with the command that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tapct.base import files, metric_names
from tapct.base.console import duration
from tapct.base.exits import UserError
from tapct.base.recent import window_in_words
from tapct.config import plugins
from tapct.config.flat import flatten_to_text
from tapct.config.yamlfile import from_text
from tapct.eval import saved
from tapct.eval.old_formats import config_with_task_table
from tapct.eval.results import Evaluation
from tapct.report import evaluation, step_values, theme
from tapct.report.history import History, prototypes_ln, read_history, read_json
from tapct.report.plots import (
    Curve,
    ReferenceLine,
    area_chart,
    line_chart,
    number,
    share_bar,
    text,
)
from tapct.run_folder import RunFolder
from tapct.ssl.health import TermReading, Verdict, verdict_at

STYLE_OF = {
    "alive": "good",
    "faint": "warn",
    "not following": "warn",
    "stuck": "bad",
    "collapsed": "bad",
    "not finite": "bad",
}
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
LEADS = {  # title -> what a reader should know before looking
    "Losses": "Each term as it is optimised, and the plain cross-entropies, which can be read "
    "without knowing the weights.",
    "Health": "A falling loss alone does not show learning: the loss of a run that learns nothing "
    "falls to ln K, and a run with collapsed targets has the lowest loss of all. The number to "
    "watch is the information of the targets: the entropy of their mean minus the mean of their "
    "entropies.",
    "Timing": "Wall time of a step on the process that writes the log.",
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


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


def warmup_steps(config: Mapping[str, str]) -> int:
    """Warm-up steps of the learning rate, from the config of a run as text; 0 where unknown."""
    try:
        return round(float(config["optim.warmup_share"]) * int(config["train.steps"]))
    except (KeyError, ValueError):
        return 0


def verdict_of(history: History, config: Mapping[str, str]) -> Verdict:
    """The verdict on a run at its last step.

    Args:
        history: its metrics.
        config: dotted key -> value as text; empty where it cannot be read.
    """
    return verdict_at(readings(history), history.last_step, warmup_steps(config))


def verdict_box(current: Verdict, evaluated: bool) -> str:
    """The verdict and the next step; a healthy run that has been evaluated needs none."""
    is_fine = evaluated and current.state == "alive"
    step = "" if is_fine else f"<p>Next: {text(current.next_step)}</p>"
    state = f"<p><strong>{text(current.state.capitalize())}</strong></p>"
    return (
        f'<section class="verdict {STYLE_OF.get(current.state, "")}">{state}'
        f"<p>{text(current.words)}.</p>{step}</section>"
    )


def tiles(history: History, evaluated: Evaluation | None) -> str:
    """Key numbers of the run, and one of each evaluation task."""
    step_seconds, total, samples = (
        history.column(name)[1] for name in ("seconds/step", "loss/total", "samples")
    )
    seen = f"{_count(samples[-1])} samples" if len(samples) else ""
    cells: list[tuple[str, str, str]] = [("Steps", _count(history.column("step")[1][-1]), seen)]
    if len(step_seconds):
        cells.append(
            (
                "Seconds per step",
                number(history.typical_seconds(), 3),
                f"median; {duration(float(np.nansum(step_seconds)))} in all",
            )
        )
    if len(total):
        cells.append(
            (
                "Total loss",
                number(history.recent("loss/total")),
                f"first step {number(float(total[0]))}",
            )
        )
    for one in readings(history):
        note = f"nats; ln K \u2212 CE {number(one.ln_k_minus_ce, 3)}"
        cells.append((f"{one.name} information", number(one.information, 3), note))
    cells += evaluation.tiles(evaluated)
    shown = ""
    for name, value, note in cells:
        small = f"<small>{note}</small>" if note else ""
        shown += f'<div class="tile"><dt>{text(name)}</dt><dd>{value}{small}</dd></div>'
    return (
        f'<dl class="tiles">{shown}</dl><p class="muted">Losses and health: '
        f"{window_in_words(history.num_steps)}, or the newest value where one is written more "
        "rarely.</p>"
    )


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
    bar = f"<h3>Median step</h3>{share_bar(medians, 's')}"
    return f'<div class="charts">{"".join(charts)}<div>{bar}</div></div>'


def scans(manifest: Mapping[str, Any], command: str) -> str:
    """Counts of accepted and refused scans, with the reasons."""
    if "accepted" not in manifest:
        known = (
            f"The run's store holds {number(manifest['scans'])} scans. "
            if "scans" in manifest
            else ""
        )
        return (
            f'<p class="missing">{known}Which scans were refused, and why: '
            f"<code>{text(command)}</code> lists them.</p>"
        )
    accepted = int(manifest["accepted"])
    reasons = {reason: int(count) for reason, count in manifest.get("refused", {}).items()}
    refused = sum(reasons.values())
    most = max(accepted, *reasons.values(), 1)
    counts = [("accepted", accepted)]
    counts += sorted(reasons.items(), key=lambda pair: -pair[1])
    body = ""
    for name, count in counts:
        first = ' class="first"' if name == "accepted" else ""
        width = f"{100 * count / most:.1f}%"
        body += (
            f"<tr{first}><th>{text(name.replace('_', ' '))}</th>"
            f'<td class="track"><div><span style="width:{width}"></span></div></td>'
            f'<td class="n">{number(count)}</td></tr>'
        )
    sentence = (
        f"{number(accepted + refused)} scans were found, {number(accepted)} accepted, "
        f"{number(refused)} refused."
    )
    return (
        f'<p>{sentence}</p><div class="scroll"><table '
        f'class="models"><tbody>{body}</tbody></table></div>'
    )


def provenance(facts: Mapping[str, Any], why_not: str) -> str:
    """Table of all other facts in run.json."""
    if not facts:
        return f'<p class="missing">Unknown: {text(why_not)}.</p>'
    rows = "".join(
        f"<tr><th>{text(key)}</th><td>{text(value)}</td></tr>"
        for key, value in flatten_to_text(facts).items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def config(path: Path) -> str:
    """The resolved configuration, folded away."""
    if not path.is_file():
        return f'<p class="missing">{text(path.name)} is not there; tapct train writes it.</p>'
    body = text(path.read_text(encoding="utf-8", errors="replace"))
    return (
        f"<details><summary>Resolved configuration of the run</summary><pre>{body}</pre></details>"
    )


def _count(value: float) -> str:
    return number(int(value)) if math.isfinite(value) else number(value)


def _grid(charts: Sequence[str]) -> str:
    if not charts:
        return '<p class="missing">The run logged none of these numbers.</p>'
    return f'<div class="charts">{"".join(charts)}</div>'


def render(run_dir: Path, data: str = "") -> str:
    """The page's HTML.

    Args:
        run_dir: run folder.
        data: name of the data set whose evaluation is shown; empty for the run's own.
    Raises:
        UserError: no run folder, no finished step in it, or no evaluation on that data set.
    """
    if not run_dir.is_dir():
        raise UserError(
            f"run folder {run_dir} is not there. Give the folder of a run, e.g. runs/NAME."
        )
    folder = RunFolder(run_dir)
    history = read_history(folder.metrics)
    facts, no_facts = read_json(folder.provenance)
    found = saved.find(run_dir)
    saved.check_wanted(found, data)
    shown = saved.pick(found, data)
    manifest: dict[str, Any] = facts["manifest"] if isinstance(facts.get("manifest"), dict) else {}
    others = {key: value for key, value in facts.items() if key != "manifest" or not manifest}
    others |= {
        f"manifest.{key}": manifest[key] for key in ("digest", "path", "root") if key in manifest
    }
    sections = {
        "Frozen features": evaluation.evaluation_part(found, shown, f"tapct eval {run_dir}")
        + step_values.part(run_dir, f"tapct eval {run_dir} --step best"),
        "Losses": losses(history),
        "Health": health(history),
        "Schedules": schedules(history),
        "Timing": timing(history),
        "Scans": scans(manifest, "tapct index DIR"),
        "Configuration": config(folder.config),
        "Provenance": provenance(others, no_facts),
    }
    evaluated = shown.evaluation if shown else None
    current = verdict_of(history, read_config(folder.config) or {})
    top = verdict_box(current, evaluated=evaluated is not None) + tiles(history, evaluated)
    return _page(run_dir.resolve().name, top, sections, history)


def read_config(path: Path) -> dict[str, str] | None:
    """The config of a run as dotted key -> text; None where it cannot be read."""
    try:
        tree = from_text(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return None
    return flatten_to_text(config_with_task_table(tree)) if isinstance(tree, dict) else None


def _page(name: str, top: str, sections: Mapping[str, str], history: History) -> str:
    """The page of a run.

    Args:
        name: name of the run.
        top: verdict and key numbers.
        sections: title -> HTML.
        history: metrics of the run.
    """
    anchors = {title: title.lower().replace(" ", "-") for title in sections}
    links = "".join(f'<a href="#{anchor}">{title}</a>' for title, anchor in anchors.items())
    body = ""
    for title, part in sections.items():
        lead = f'<p class="muted">{text(LEADS[title])}</p>' if title in LEADS else ""
        body += f'<section><h2 id="{anchors[title]}">{title}</h2>{lead}{part}</section>'
    cut = (
        f" {history.unreadable} unreadable lines of metrics.jsonl were left out."
        if history.unreadable
        else ""
    )
    return document(
        f"{name}: tapct run",
        f'<header><h1>{text(name)}</h1><p class="muted">Pretraining run of tapct: volumetric '
        f"DINOv2 on CT.</p></header>{top}<nav>{links}</nav>{body}<footer>Thin lines are raw "
        "values, thick ones rolling means. The number beside the name of a thick line is the "
        f"{window_in_words(history.num_steps)}.{cut}</footer>",
    )


def document(title: str, body: str) -> str:
    """A whole page: style, script and the policy that forbids requests around a body of HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta '
        'http-equiv="Content-Security-Policy"'
        f' content="{POLICY}"><style>{theme.style()}</style></head>'
        f"<body><main>{body}</main><script>{theme.script()}</script></body></html>\n"
    )


def write(run_dir: Path, data: str = "") -> Path:
    """Write RUN/report.html, whole or not at all, and return its path.

    Args:
        run_dir: folder of a run, with metrics.jsonl and whatever else there is by now.
        data: name of the data set whose evaluation is shown; empty for the run's own.
    Raises:
        UserError: no run folder, no finished step in it, no evaluation on that data set, or no room
            to write.
    """
    return save(render(run_dir, data), RunFolder(run_dir).report)


def save(html: str, out: Path) -> Path:
    """Write a page, whole or not at all, and return its path. Raises: UserError."""
    try:
        files.write_atomically(out, html)
    except OSError as error:
        raise UserError(
            f"{out} could not be written: {files.first_cause(error)}. Free space or check the "
            "folder's permissions."
        ) from error
    return out
