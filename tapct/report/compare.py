"""`tapct compare RUN...`: runs side by side, in a table for the terminal and on a page.

Losses and health are means over the last 20 steps of a run, as in its report. A number that a run
does not have is blank.
A folder that is no run, or that is given twice, is left out and reported.
"""

from __future__ import annotations

import difflib
import fnmatch
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tapct.base.exits import UserError
from tapct.base.paths import near_path
from tapct.eval.results import json_file, saved
from tapct.eval.results.json_file import Evaluation
from tapct.eval.results.over_steps import StepCurve
from tapct.eval.results.saved import SavedEvaluation
from tapct.eval.results.terminal import between, p_text
from tapct.eval.scores import OWN_MODEL
from tapct.report import evaluation, facts, statistics, step_values, summary
from tapct.report.history import History, read_history
from tapct.report.markup import number
from tapct.report.paired_runs import paired
from tapct.report.training import label_of
from tapct.run_folder import RunFolder

BLANK = "\u2013"
NAMES_A_RUN = ("out",)  # differs between any two runs and shows nothing
# settings that do not affect training; they come last in the table
BOOKKEEPING_SECTIONS = (
    "data.loader.",
    "checkpoint.",
    "log.",
    "eval.",
)
BOOKKEEPING = ("device", "data.store", "train.resume")
LABEL_KEYS, LABEL_LENGTH = 4, 60  # a legend that would be longer shows the names of the runs
# any terminal can show these
TERMINAL = str.maketrans({"\u2013": "-", "\u2212": "-", "\u2009": " "})
FOLD, COLUMN = 32, 15  # widest first column and widest column of a run in the terminal


def is_bookkeeping(key: str) -> bool:
    """Whether a setting does not affect training. `data.stores`, the archives and their shares,
    does; `data.store` is the place of one.
    """
    return key in BOOKKEEPING or key.startswith(BOOKKEEPING_SECTIONS)


@dataclass(frozen=True)
class Run:
    """One run, read.

    Args:
        folder: as it was given.
        name: the shortest end of its path that no other run has.
        history: its metrics.
        config: dotted key -> value as text; empty where config.yaml cannot be read.
        saved: its evaluation; None if there is none on the data set that is shown.
        curves: task -> headline over the evaluated steps, on the run's own data set; empty where
            another data set is shown.
    """

    folder: Path
    name: str
    history: History
    config: Mapping[str, str]
    saved: SavedEvaluation | None
    curves: Mapping[str, StepCurve] = field(default_factory=dict)

    @property
    def evaluated(self) -> Evaluation | None:
        """Content of results.json; None if it cannot be used."""
        return self.saved.evaluation if self.saved else None


@dataclass(frozen=True)
class Comparison:
    """Runs that are shown side by side.

    Args:
        runs: at least one.
        metrics: metrics that are drawn and stand in the table.
        keys: keys of the config in which the runs differ.
        notes: one line for each folder or file that was left out or not found.
    """

    runs: tuple[Run, ...]
    metrics: tuple[str, ...]
    keys: tuple[str, ...]
    notes: tuple[str, ...]


def read(folders: Sequence[Path], wanted: Sequence[str] = (), data: str = "") -> Comparison:
    """Read the runs.

    Args:
        folders: run folders; one that is none, or that comes a second time, is left out with a
            note.
        wanted: metrics to show, by name or pattern (`health/*`); none shows losses and health.
        data: name of the data set whose evaluations are shown; empty for each run's own.
    Raises:
        UserError: no run is left, a wanted metric is in none of them, or no run was evaluated on
            the data set.
    """
    notes: list[str] = []
    histories: dict[Path, History] = {}
    for folder in folders:
        place = folder.resolve()
        if place in histories:
            notes.append(f"{folder} is given twice; it is shown once")
            continue
        try:
            histories[place] = _history(folder, notes)
        except UserError as error:
            notes.append(f"left out: {error}")
    if not histories:
        raise UserError("; ".join(notes) or "no run folder was given; tapct compare runs/A runs/B")
    evaluations = {place: saved.find(place) for place in histories}
    saved.check_wanted([one for found in evaluations.values() for one in found], data)
    runs = []
    for place, name in zip(histories, short_names(list(histories)), strict=True):
        config = _config(place, name, notes)
        chosen = _evaluation(evaluations[place], name, data, notes)
        steps = step_values.EvaluatedSteps() if data else step_values.read(place)
        notes += step_values.notes(name, steps)
        runs.append(Run(place, name, histories[place], config, chosen, steps.curves))
    notes += _pairing_notes(runs)
    keys = differing_keys([run.config for run in runs])
    return Comparison(tuple(runs), _metrics(runs, wanted), keys, tuple(notes))


def _history(folder: Path, notes: list[str]) -> History:
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder} is not a run folder")
        raise UserError(f"{folder} is not there{near_path(folder)}")
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
            f"{folder}: {history.unreadable} unreadable lines of metrics.jsonl were skipped"
        )
    return history


def _config(place: Path, name: str, notes: list[str]) -> Mapping[str, str]:
    path = RunFolder(place).config
    config = facts.read_config(path)
    if config is None:
        notes.append(
            f"{name}: config.yaml is {'damaged' if path.is_file() else 'not there'}; its settings "
            "are blank"
        )
    return config or {}


def _evaluation(
    found: list[SavedEvaluation], name: str, data: str, notes: list[str]
) -> SavedEvaluation | None:
    """The evaluation of a run that is shown; its caveat, and evaluations that are not shown, become
    notes.
    """
    chosen = saved.pick(found, data)
    if chosen is not None and chosen.evaluation is None:
        notes.append(f"{name}: {chosen.why_not}; its evaluation is blank")
    elif chosen is not None and chosen.evaluation is not None:
        caveat = chosen.evaluation.split.caveat
        notes += [f"{name}: {caveat}"] if caveat else []
    others = ", ".join(one.title for one in found if one is not chosen)
    if others:
        notes.append(f"{name} was also evaluated on {others}; --data NAME shows one of them")
    return chosen


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

    Keys that affect training come first, then where and how the run was made.
    """
    known = [config for config in configs if config]
    keys = dict.fromkeys(key for config in known for key in config)
    differing = [
        key
        for key in keys
        if key not in NAMES_A_RUN and len({config.get(key) for config in known}) > 1
    ]
    return tuple(sorted(differing, key=is_bookkeeping))


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


def title(metric: str) -> tuple[str, str, float]:
    """A metric for people: title, unit, factor."""
    kind, _, rest = metric.partition("/")
    if metric == "loss/total":
        return "Total loss", "nats", 1.0
    if kind == "loss":
        return f"{label_of(rest)} loss, weighted", "nats", 1.0
    if kind == "ce":
        return f"{label_of(rest)} cross-entropy", "nats", 1.0
    for end, name in (("_ln_k_minus_ce", "ln K \u2212 CE"), ("_information", "information")):
        if kind == "health" and rest.endswith(end):
            return f"{label_of(rest.removesuffix(end))} {name}", "nats", 1.0
    if metric == "health/rankme":
        return "RankMe", "", 1.0
    if metric in ("seconds/step", "step"):
        return {"seconds/step": ("Seconds per step", "s", 1.0), "step": ("Steps", "", 1.0)}[metric]
    return (label_of(rest) or metric).capitalize(), "s" if kind == "seconds" else "", 1.0


Row = tuple[str, list[str]]


def numbers(comparison: Comparison) -> list[Row]:
    """Rows of the table above the config: a name and one cell per run."""
    runs = comparison.runs
    rows: list[Row] = [
        ("Steps", [number(int(run.history.column("step")[1][-1])) for run in runs]),
        ("Verdict", [summary.verdict_of(run.history, run.config).state for run in runs]),
    ]
    for metric in comparison.metrics:
        if metric in ("step", "seconds/step"):
            continue
        name, _, factor = title(metric)
        cells = []
        for run in runs:
            has_it = metric in run.history.columns
            cells.append(number(run.history.recent(metric) * factor) if has_it else BLANK)
        rows.append((name, cells))
    rows.append(("Seconds per step, median", [_typical_seconds(run.history) for run in runs]))
    return rows + _evaluation_rows(runs) + step_values.rows([run.curves for run in runs])


def _evaluation_rows(runs: Sequence[Run]) -> list[Row]:
    """Two rows per task that any run was evaluated with: its headline and its lead."""
    tasks: dict[str, str] = {}  # name -> what its first row is called
    for run in runs:
        for name, section in (run.evaluated.tasks if run.evaluated else {}).items():
            headline = section.headline
            better = f"{headline.direction} is better"
            tasks.setdefault(name, f"{json_file.title_of(name)}: {headline.metric}, {better}")
    if not tasks:
        return [("Evaluation of frozen features", [BLANK for _ in runs])]
    rows: list[Row] = [("Evaluated on", [run.saved.title if run.saved else BLANK for run in runs])]
    for name, row_name in tasks.items():
        values, gains = [], []
        for run in runs:
            evaluated = run.evaluated.tasks.get(name) if run.evaluated else None
            lead = evaluated.headline.lead() if evaluated else None
            known = lead is not None and math.isfinite(lead.own)
            values.append(json_file.shown(lead.own) if lead and known else BLANK)
            gains.append(evaluation.signed(lead.gain) if lead and known else BLANK)
        rows.append((row_name, values))
        rows.append((f"{json_file.title_of(name)}: lead over the best baseline", gains))
        rows += _interval_rows(runs, name)
    return rows


def _interval_rows(runs: Sequence[Run], task: str) -> list[Row]:
    """Interval of each run in one task, and the paired difference to the first run that has it."""
    title_of_task = json_file.title_of(task)
    intervals: list[str] = []
    for run in runs:
        section = run.evaluated.tasks.get(task) if run.evaluated else None
        found = statistics.headline_statistics(section) if section else None
        own = [one for one in found.models if one.model == OWN_MODEL] if found else []
        intervals.append(between(own[0].estimate.interval) if own else "")
    rows: list[Row] = []
    if any(intervals):
        cells = [interval or BLANK for interval in intervals]
        rows.append((f"{title_of_task}: 95 % interval", cells))
    pairs = paired([(run.name, run.evaluated) for run in runs], task)
    if pairs is None or not pairs.differences:
        return rows
    gaps, ends, chances, adjusted = [], [], [], []
    for run in runs:
        pair = pairs.differences.get(run.name)
        value = pair.estimate.value if pair else math.nan
        gaps.append(evaluation.signed(value))
        ends.append((between(pair.estimate.interval, sign=True) if pair else "") or BLANK)
        chances.append(p_text(pair.p) if pair else BLANK)
        adjusted.append(p_text(pair.p_holm) if pair else BLANK)
    rows.append((f"{title_of_task}: minus {pairs.first}", gaps))
    if any(end != BLANK for end in ends):
        rows.append((f"{title_of_task}: 95 % interval of the difference", ends))
        rows.append((f"{title_of_task}: p of the difference", chances))
        if len(pairs.differences) > 1:
            num = len(pairs.differences)
            rows.append((f"{title_of_task}: p, adjusted for {num} (Holm)", adjusted))
    return rows


def _pairing_notes(runs: Sequence[Run]) -> list[str]:
    """Why runs that were evaluated with the same task have no paired difference."""
    notes = []
    tasks = dict.fromkeys(
        name for run in runs for name in (run.evaluated.tasks if run.evaluated else {})
    )
    for task in tasks:
        pairs = paired([(run.name, run.evaluated) for run in runs], task)
        if pairs is None:
            continue
        for name, reason in pairs.why_not.items():
            notes.append(f"{name}: no paired difference to {pairs.first} in {task}: {reason}")
    return notes


def _typical_seconds(history: History) -> str:
    seconds = history.typical_seconds()
    return number(seconds, 3) if math.isfinite(seconds) else BLANK


def settings(comparison: Comparison) -> list[Row]:
    """Rows of the config: only keys in which the runs differ."""
    return [
        (key, [run.config.get(key, BLANK) for run in comparison.runs]) for key in comparison.keys
    ]


def labels(comparison: Comparison) -> list[str]:
    """Names of the runs in a legend: the settings in which they differ where these are short, else
    the names of their folders.
    """
    runs = comparison.runs
    keys = [key for key in comparison.keys if not is_bookkeeping(key)]
    if not 0 < len(keys) <= LABEL_KEYS:
        return [run.name for run in runs]
    ends = Counter(key.rpartition(".")[2] for key in keys)
    short = {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in keys}
    by_settings = []
    for run in runs:
        by_settings.append(", ".join(f"{short[key]} {run.config.get(key, BLANK)}" for key in keys))
    if len(set(by_settings)) == len(runs) and max(map(len, by_settings)) <= LABEL_LENGTH:
        return by_settings
    return [run.name for run in runs]


def render_text(comparison: Comparison, width: int) -> str:
    """The table for a terminal, in as many blocks of runs as its width needs."""
    rows, keys = numbers(comparison), settings(comparison)
    first = min(FOLD, max(len(name) for name, _ in [*rows, *keys]), max(width - COLUMN, 8))
    widest = max(len(cell) for _, cells in [*rows, *keys] for cell in cells)
    column = min(COLUMN, max(widest, *(len(run.name) for run in comparison.runs)))
    together = max(1, (width - first - 1) // (column + 1))
    shown = io.StringIO()
    out = Console(file=shown, width=width, color_system=None, emoji=False)
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
