"""`tapct compare RUN...`: runs side by side, as a table for the terminal and as one self-contained
page.

A number is the mean over the last 20 steps of its run. What a run does not have is a blank; a
folder that is no run, or one that was given before, is left out and told in one line.
"""

from __future__ import annotations

import difflib
import fnmatch
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tapct.base.exits import UserError
from tapct.config.flat import flatten_to_text
from tapct.report import page
from tapct.report.evaluation import MODEL_WORDS, finite
from tapct.report.history import History, read_history, read_json
from tapct.report.plots import NUM_COLOURS, Curve, Rule, dash_of, line_chart, number, text
from tapct.run_folder import RunFolder
from tapct.ssl.health import verdict

LAST_STEPS = 20
BLANK = "\u2013"
NAMES_A_RUN = ("out",)  # differs between any two runs and says nothing
BOOKKEEPING = (
    "device",
    "data.store",
    "data.loader.",
    "checkpoint.",
    "log.",
    "eval.",
    "train.resume",
)  # told last
LABEL_KEYS, LABEL_LENGTH = 4, 60  # a legend that would be longer shows the names of the runs
TERMINAL = str.maketrans(
    {"\u2013": "-", "\u2212": "-", "\u2009": " "}
)  # any terminal can show these
FOLD, COLUMN = 32, 15  # widest first column and widest column of a run in the terminal


@dataclass(frozen=True)
class Run:
    """One run, read.

    Args:
        folder: as it was given.
        name: the shortest end of its path that no other run has.
        history: its metrics.
        config: dotted key -> value as text; empty where config.yaml cannot be read.
        results: eval/results.json, maybe empty.
    """

    folder: Path
    name: str
    history: History
    config: Mapping[str, str]
    results: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What is shown.

    Args:
        runs: at least one.
        metrics: that are drawn, and told in the table.
        keys: of the config in which the runs differ.
        notes: one line each on what was left out or not found.
    """

    runs: tuple[Run, ...]
    metrics: tuple[str, ...]
    keys: tuple[str, ...]
    notes: tuple[str, ...]


def read(folders: Sequence[Path], wanted: Sequence[str] = ()) -> Comparison:
    """Read the runs.

    Args:
        folders: of runs; one that is none, or that comes a second time, is left out with a note.
        wanted: metrics to show, by name or pattern (`health/*`); none: what tells runs apart.
    Raises:
        UserError: no run is left, or a wanted metric is in none of them.
    """
    notes: list[str] = []
    found: dict[Path, History] = {}
    for folder in folders:
        place = folder.resolve()
        if place in found:
            notes.append(f"{folder} is given twice; it is shown once")
            continue
        try:
            found[place] = _history(folder, notes)
        except UserError as error:
            notes.append(f"left out: {error}")
    if not found:
        raise UserError("; ".join(notes) or "no run folder was given; tapct compare runs/A runs/B")
    runs = tuple(
        Run(place, name, history, _config(place, name, notes), _results(place, name, notes))
        for (place, history), name in zip(found.items(), short_names(list(found)), strict=True)
    )
    return Comparison(
        runs, _metrics(runs, wanted), differing_keys([run.config for run in runs]), tuple(notes)
    )


def _history(folder: Path, notes: list[str]) -> History:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a run folder" if folder.exists() else f"{folder} is not there"
        )
    if not RunFolder(folder).metrics.is_file():
        raise UserError(f"{folder} is not a run folder: it has no metrics.jsonl")
    try:
        history = read_history(RunFolder(folder).metrics)
    except UserError:
        raise UserError(f"{folder} holds no finished step yet") from None
    except OSError as error:
        raise UserError(f"{RunFolder(folder).metrics} cannot be read: {error.strerror}") from error
    if history.unreadable:
        notes.append(
            f"{folder}: {history.unreadable} unreadable lines of metrics.jsonl were passed over"
        )
    return history


def _config(place: Path, name: str, notes: list[str]) -> Mapping[str, str]:
    path = RunFolder(place).config
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        tree = None
    if not isinstance(tree, dict):
        notes.append(
            f"{name}: config.yaml is {'damaged' if path.is_file() else 'not there'}; its settings "
            "are blank"
        )
        return {}
    return flatten_to_text(tree)


def _results(place: Path, name: str, notes: list[str]) -> Mapping[str, Any]:
    path = RunFolder(place).evaluation().results
    try:
        results, why_not = read_json(path)
    except OSError as error:
        results, why_not = {}, f"{path.name} cannot be read: {error.strerror}"
    if path.is_file() and why_not:
        notes.append(f"{name}: {why_not}; its Dice is blank")
    return results


def short_names(places: Sequence[Path]) -> list[str]:
    """For each folder the shortest end of its path that no other has."""
    names = []
    for place in places:
        parts = place.parts
        ends = (Path(*parts[-i:]) for i in range(1, len(parts) + 1))
        others = [other.parts for other in places if other != place]
        end = next(
            (end for end in ends if all(other[-len(end.parts) :] != end.parts for other in others)),
            place,
        )
        names.append(str(end).encode("utf-8", "replace").decode())
    return names


def differing_keys(configs: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Keys whose values are not the same in all configs that could be read; a key that one lacks
    differs.

    What shapes a curve comes first, then where and how it was run.
    """
    known = [config for config in configs if config]
    keys = dict.fromkeys(key for config in known for key in config)
    differing = [
        key
        for key in keys
        if key not in NAMES_A_RUN and len({config.get(key) for config in known}) > 1
    ]
    return tuple(sorted(differing, key=lambda key: key.startswith(BOOKKEEPING)))


def _metrics(runs: Sequence[Run], wanted: Sequence[str]) -> tuple[str, ...]:
    known = list(dict.fromkeys(name for run in runs for name in run.history.columns))
    chosen: list[str] = []
    for pattern in wanted:
        matches = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            near = ", ".join(difflib.get_close_matches(pattern, known, 3, 0.4)) or ", ".join(known)
            raise UserError(f"--metric {pattern}: no run has it; there is {near}")
        chosen += matches
    if not wanted:
        patterns = (
            "loss/total",
            "loss/*",
            "health/*_ln_k_minus_ce",
            "health/*_information",
            "health/rankme",
        )
        chosen = [
            name
            for pattern in (*patterns, "seconds/step")
            for name in fnmatch.filter(known, pattern)
        ]
    return tuple(dict.fromkeys(chosen))


def last_mean(history: History, name: str) -> float | None:
    """Mean of a metric over the last steps of the run; its newest value where it is written more
    rarely.

    Returns:
        None when it was never written, NaN when one of the values is not finite.
    """
    steps, values = history.column(name)
    if not len(values):
        return None
    recent = values[steps > history.column("step")[1][-1] - LAST_STEPS]
    return float(recent.mean()) if len(recent) else float(values[-1])


def dice(results: Mapping[str, Any]) -> tuple[float, float, str] | None:
    """Frozen mean Dice, its lead over the best baseline, and which that is; None without a Dice,
    NaN without a lead.
    """
    models = results.get("models")
    scores = (
        {n: finite(m.get("mean_dice")) for n, m in models.items() if isinstance(m, dict)}
        if models
        else {}
    )
    own = scores.pop("pretrained", math.nan)
    rivals = {name: score for name, score in scores.items() if math.isfinite(score)}
    best = max(rivals, key=lambda name: rivals[name], default="")
    return (
        (own, own - rivals.get(best, math.nan), MODEL_WORDS.get(best, best))
        if math.isfinite(own)
        else None
    )


def title(metric: str) -> tuple[str, str, float]:
    """A metric for people: title, unit, factor."""
    kind, _, rest = metric.partition("/")
    if metric == "loss/total":
        return "Total loss", "nats", 1.0
    if kind == "loss":
        return f"{page.words(rest)} loss, weighted", "nats", 1.0
    if kind == "ce":
        return f"{page.words(rest)} cross-entropy", "nats", 1.0
    for end, words in (("_ln_k_minus_ce", "ln K \u2212 CE"), ("_information", "information")):
        if kind == "health" and rest.endswith(end):
            return f"{page.words(rest.removesuffix(end))} {words}", "nats", 1.0
    if metric == "health/rankme":
        return "RankMe", "", 1.0
    if metric in ("seconds/step", "step"):
        return {"seconds/step": ("Seconds per step", "s", 1.0), "step": ("Steps", "", 1.0)}[metric]
    return (page.words(rest) or metric).capitalize(), "s" if kind == "seconds" else "", 1.0


Row = tuple[str, list[str]]


def numbers(comparison: Comparison) -> list[Row]:
    """Rows of the table above the config: what is told, and one cell per run."""
    runs = comparison.runs
    rows: list[Row] = [
        ("Steps", [number(int(run.history.column("step")[1][-1])) for run in runs]),
        ("Verdict", [verdict(page.readings(run.history)).state for run in runs]),
    ]
    for metric in comparison.metrics:
        if metric in ("step", "seconds/step"):
            continue
        name, _, factor = title(metric)
        values = [last_mean(run.history, metric) for run in runs]
        rows.append(
            (name, [BLANK if value is None else number(value * factor) for value in values])
        )
    rows.append(("Seconds per step, median", [_typical_seconds(run.history) for run in runs]))
    judged = [dice(run.results) for run in runs]
    rows.append(("Frozen Dice", [f"{one[0]:.3f}" if one else BLANK for one in judged]))
    leads = [f"{one[1]:+.3f}" if one and math.isfinite(one[1]) else BLANK for one in judged]
    rows.append(("Dice over the best baseline", [lead.replace("-", "\u2212") for lead in leads]))
    return rows


def _typical_seconds(history: History) -> str:
    seconds = history.column("seconds/step")[1]
    return number(float(np.nanmedian(seconds)), 3) if np.isfinite(seconds).any() else BLANK


def settings(comparison: Comparison) -> list[Row]:
    """Rows of the config: only keys in which the runs differ."""
    return [
        (key, [run.config.get(key, BLANK) for run in comparison.runs]) for key in comparison.keys
    ]


def labels(comparison: Comparison) -> list[str]:
    """What the legend calls the runs: the settings in which they differ where that is short, else
    their names.
    """
    runs, keys = (
        comparison.runs,
        [key for key in comparison.keys if not key.startswith(BOOKKEEPING)],
    )
    if not 0 < len(keys) <= LABEL_KEYS:
        return [run.name for run in runs]
    ends = Counter(key.rpartition(".")[2] for key in keys)
    short = {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in keys}
    told = [", ".join(f"{short[key]} {run.config.get(key, BLANK)}" for key in keys) for run in runs]
    return (
        told
        if len(set(told)) == len(runs) and max(map(len, told)) <= LABEL_LENGTH
        else [run.name for run in runs]
    )


def render_text(comparison: Comparison, width: int) -> str:
    """The table for a terminal, in as many blocks of runs as its width asks for."""
    rows, keys = numbers(comparison), settings(comparison)
    first = min(FOLD, max(len(name) for name, _ in [*rows, *keys]), max(width - COLUMN, 8))
    widest = max(len(cell) for _, cells in [*rows, *keys] for cell in cells)
    column = min(COLUMN, max(widest, *(len(run.name) for run in comparison.runs)))
    together = max(1, (width - first - 1) // (column + 1))
    shown = io.StringIO()
    out = Console(file=shown, width=width, color_system=None)
    for begin in range(0, len(comparison.runs), together):
        block = slice(begin, begin + together)
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("", max_width=first, overflow="fold")
        for run in comparison.runs[block]:
            table.add_column(_cell(run.name), max_width=column, overflow="fold", justify="right")
        for name, cells in [*rows, *([("", [])] if keys else []), *keys]:
            table.add_row(_cell(name), *(_cell(cell) for cell in cells[block]))
        out.print(table)
        out.print()
    return "\n".join(line.rstrip() for line in shown.getvalue().splitlines()).rstrip("\n")


def _cell(content: str) -> Text:
    return Text(content.translate(TERMINAL), overflow="fold")


def _swatch(i: int) -> str:
    return (
        '<svg class="key" viewBox="0 0 22 10" aria-hidden="true"><path d="M0 5H22" '
        'style="stroke:var('
        f'--c{i % NUM_COLOURS});stroke-width:2.4" stroke-dasharray="{dash_of(i)}"/></svg>'
    )


def _table(comparison: Comparison) -> str:
    runs = comparison.runs
    names = [
        re.sub(r"([_/.,=-]+)", r"\1<wbr>", text(run.name)) for run in runs
    ]  # where a long name may break
    heads = "".join(f'<th class="n">{_swatch(i)}{name}</th>' for i, name in enumerate(names))

    def body(rows: Sequence[Row]) -> str:
        cells = [
            (name, "".join(f'<td class="n">{text(one)}</td>' for one in told))
            for name, told in rows
        ]
        return f"<tbody>{''.join(f'<tr><th>{text(name)}</th>{told}</tr>' for name, told in cells)}</tbody>"

    differing = settings(comparison)
    words = "Settings that differ" if differing else "No setting differs"
    between = f'<tbody><tr><th class="between" colspan="{len(runs) + 1}">{words}</th></tr></tbody>'
    return (
        f'<div class="scroll"><table class="compare"><thead><tr><th></th>{heads}</tr></thead>'
        f"{body(numbers(comparison))}{between}{body(differing)}</table></div>"
    )


def _chart(comparison: Comparison, metric: str) -> str:
    name, unit, factor = title(metric)
    curves = []
    for i, (label, run) in enumerate(zip(labels(comparison), comparison.runs, strict=True)):
        x, y = run.history.column(metric)
        if len(x):
            curves.append(Curve(label, x, y * factor, style=i))
    lifeless = metric.endswith(("_ln_k_minus_ce", "_information"))
    rules = [Rule("nothing learned", 0.0)] if lifeless else []
    return line_chart(
        name, unit, curves, rules=rules, zero=lifeless or metric.startswith("seconds/")
    )


def render(comparison: Comparison) -> str:
    """The page's HTML."""
    notes = "".join(f"<li>{text(note)}</li>" for note in comparison.notes)
    charts = "".join(_chart(comparison, metric) for metric in comparison.metrics)
    return page.document(
        f"{len(comparison.runs)} runs of tapct",
        f'<header><h1>{len(comparison.runs)} runs side by side</h1><p class="muted">Pretraining '
        "runs of tapct: "
        "volumetric DINOv2 on CT.</p></header>"
        f"{f'<ul class=missing>{notes}</ul>' if notes else ''}<section>{_table(comparison)}"
        f'<p class="muted">Losses and health: means over the last {LAST_STEPS} steps of each run, '
        "or the newest value "
        "where one is written more rarely. A falling loss proves nothing, and losses of different "
        "settings cannot be "
        "compared; the frozen Dice can.</p></section><section><h2>Curves</h2>"
        f'<div class="charts overlaid">{charts}</div></section><footer>Thin lines are raw values, '
        "thick ones rolling "
        "means; beside a name stands where its thick line ends.</footer>",
    )


def write(comparison: Comparison, out: Path) -> Path:
    """Write the page, whole or not at all, and return its path. Raises: UserError."""
    return page.save(render(comparison), out)
