"""`tapct report RUN`: one self-contained HTML page about one run.

Everything is inside the page: data of the charts as JSON, pictures and voxels as data URLs, scripts
and styles as text. Its content security policy forbids requests. A part that the run does not have
yet is named, with the command that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapct.base.exits import UserError
from tapct.base.paths import near_path
from tapct.base.recent import window_in_words
from tapct.eval.results import saved
from tapct.eval.results.saved import SavedEvaluation
from tapct.report import evaluation, facts, step_values, summary, training
from tapct.report.document import document, save
from tapct.report.history import History, read_history, read_json
from tapct.report.markup import slug, text
from tapct.report.series import MAX_GROUPS
from tapct.run_folder import RunFolder

LEADS = {  # title -> what a reader should know before looking
    "Losses": "Each term as it is optimised, and the plain cross-entropies, which can be read "
    "without knowing the weights.",
    "Health": "A falling loss alone does not show learning: the loss of a run that learns nothing "
    "falls to ln K, and a run with collapsed targets has the lowest loss of all. The number to "
    "watch is the information of the targets: the entropy of their mean minus the mean of their "
    "entropies.",
    "Time": "Wall time of a step on the process that writes the log.",
}
FIRST_CURVES = "Losses"
CURVE_TOOLS = (
    '<div class="curve-tools"><label>Smoothing <input type="range" id="smoothing" min="0" max="7" '
    'value="4" aria-valuetext="mean over 3 % of the run"></label> <output id="smoothing-value">'
    'mean over 3 % of the run</output> <span class="muted">Drag over a chart to zoom into steps, '
    "double-click to leave; with the keyboard: arrows, +, \u2212, Escape, l for a logarithmic "
    "axis.</span></div>"
)


@dataclass(frozen=True)
class RunPage:
    """A run folder, read.

    Args:
        path: the folder as it was given.
        history: its metrics.
        config: dotted key -> value as text; empty where it cannot be read.
        facts: content of run.json; empty where it cannot be read.
        why_no_facts: reason why they are empty.
        found: its evaluations.
        shown: the one that is shown; None where there is none.
    """

    path: Path
    history: History
    config: Mapping[str, str]
    facts: Mapping[str, Any]
    why_no_facts: str
    found: list[SavedEvaluation]
    shown: SavedEvaluation | None


def read_run(run_dir: Path, data: str = "") -> RunPage:
    """Read a run folder.

    Args:
        run_dir: run folder.
        data: name of the data set whose evaluation is shown; empty for the run's own.
    Raises:
        UserError: no run folder, no finished step in it, or no evaluation on that data set.
    """
    if not run_dir.is_dir():
        raise UserError(
            f"run folder {run_dir} is not there{near_path(run_dir)}; give the folder of a run, "
            "e.g. runs/NAME"
        )
    folder = RunFolder(run_dir)
    if not folder.metrics.exists() and (runs := _runs_in(run_dir)):
        raise UserError(
            f"{run_dir} is not a run folder, but a folder of runs: give one or several of them, "
            f"e.g. {runs[0]}"
        )
    history = read_history(folder.metrics)
    about, no_facts = read_json(folder.provenance)
    found = saved.find(run_dir)
    saved.check_wanted(found, data)
    shown = saved.pick(found, data)
    config = facts.read_config(folder.config) or {}
    return RunPage(run_dir, history, config, about, no_facts, found, shown)


def _runs_in(folder: Path) -> list[Path]:
    """The run folders directly below a folder, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{RunFolder(folder).metrics.name}"))


def top(run: RunPage) -> str:
    """The verdict and the key numbers."""
    evaluated = run.shown.evaluation if run.shown else None
    current = summary.verdict_of(run.history, run.config)
    box = summary.verdict_box(current, evaluated=evaluated is not None)
    return box + summary.tiles(run.history, evaluated)


def sections(run: RunPage, share: float = 1.0) -> dict[str, str]:
    """The parts of the page by their titles, as HTML.

    Args:
        run: run to show.
        share: part of the room for pictures that this run may take.
    """
    of_run = run.facts.get("manifest")
    manifest: dict[str, Any] = of_run if isinstance(of_run, dict) else {}
    others = {key: value for key, value in run.facts.items() if key != "manifest" or not manifest}
    others |= {
        f"manifest.{key}": manifest[key] for key in ("digest", "path", "root") if key in manifest
    }
    history, folder = run.history, RunFolder(run.path)
    samples = history.column("samples")[1]
    return {
        "Frozen features": evaluation.evaluation_part(
            run.found, run.shown, f"tapct eval {run.path}", share
        )
        + step_values.part(run.path, f"tapct eval {run.path} --step best"),
        "Losses": training.losses(history),
        "Health": training.health(history),
        "Schedules": training.schedules(history),
        "Time": training.timing(history),
        "Scans": facts.scans(manifest, float(samples[-1]) if len(samples) else 0.0),
        "Configuration": facts.config(folder.config),
        "Provenance": facts.provenance(others, run.why_no_facts),
        "Repeat": facts.repeat(run.facts.get("command"), run.shown, run.path),
    }


def body(parts: Mapping[str, str], prefix: str = "") -> tuple[str, str]:
    """Links to the parts of a run, and the parts, as HTML.

    Args:
        parts: title -> HTML.
        prefix: beginning of the names of anchors, for a page with several runs.
    """
    links, html = "", ""
    for title, part in parts.items():
        anchor = prefix + slug(title)
        lead = f'<p class="muted">{text(LEADS[title])}</p>' if title in LEADS else ""
        links += f'<a href="#{anchor}">{title}</a>'
        tools = CURVE_TOOLS if title == FIRST_CURVES and not prefix else ""
        html += f'<section><h2 id="{anchor}">{title}</h2>{lead}{tools}{part}</section>'
    return links, html


def footer(histories: Mapping[str, History]) -> str:
    """How the curves are drawn, and what could not be read.

    Args:
        histories: name of a run -> its metrics.
    """
    most = max(history.num_steps for history in histories.values())
    grouped = ""
    if most > 2 * MAX_GROUPS:
        size = -(-most // MAX_GROUPS)
        grouped = (
            f" A curve of more than {2 * MAX_GROUPS} points is drawn as {MAX_GROUPS} groups of "
            f"consecutive points, here of up to {size} steps: the line is the mean of a group, the "
            "band reaches from its lowest to its highest value, so a spike of one step stays "
            "visible."
        )
    cut = "".join(
        f" {history.unreadable} unreadable lines of metrics.jsonl were left out of {text(name)}."
        for name, history in histories.items()
        if history.unreadable
    )
    window = window_in_words(most)
    return (
        "<footer>Thin lines are raw values, thick ones rolling means. The number beside the name "
        f"of a thick line is the {window}. A triangle marks a value above the chart, a cross one "
        f"that is not finite.{grouped}{cut}</footer>"
    )


def render(run_dir: Path, data: str = "", reload_s: float = 0.0) -> str:
    """The page's HTML.

    Args:
        run_dir: run folder.
        data: name of the data set whose evaluation is shown; empty for the run's own.
        reload_s: seconds after which the page loads itself again; 0: it does not.
    Raises:
        UserError: no run folder, no finished step in it, or no evaluation on that data set.
    """
    run = read_run(run_dir, data)
    name = run_dir.resolve().name
    links, parts = body(sections(run))
    return document(
        f"{name}: tapct run",
        f'<header><h1>{text(name)}</h1><p class="muted">Pretraining run of tapct: volumetric '
        f"DINOv2 on CT.</p>{reload_box(reload_s)}</header>{top(run)}<nav>{links}</nav>"
        f"{parts}{footer({name: run.history})}",
    )


def reload_box(seconds: float) -> str:
    """The box that switches the loading of a page that is written again; empty without it."""
    if not seconds:
        return ""
    return (
        f'<label class="reload"><input type="checkbox" id="reload" checked data-seconds="'
        f'{seconds:g}"> load this page again every {seconds:g} s, unless it is being used</label>'
        f'<noscript><meta http-equiv="refresh" content="{seconds:g}"></noscript>'
    )


def write(run_dir: Path, data: str = "", out: Path | None = None, reload_s: float = 0.0) -> Path:
    """Write a page, whole or not at all, and return its path.

    Args:
        run_dir: folder of a run, with metrics.jsonl and whatever else there is by now.
        data: name of the data set whose evaluation is shown; empty for the run's own.
        out: file to write; None for RUN/report.html.
        reload_s: seconds after which the page loads itself again; 0: it does not.
    Raises:
        UserError: no run folder, no finished step in it, no evaluation on that data set, or no room
            to write.
    """
    return save(render(run_dir, data, reload_s), out or RunFolder(run_dir).report)
