"""The part of the page on frozen features: headline tables, pictures of tasks and features.

All names and sentences about a metric come from the task's headline; nothing here knows a task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

from tapct.base.counted import counted
from tapct.eval.results.json_file import Evaluation, TaskSection, shown, title_of
from tapct.eval.results.saved import SavedEvaluation
from tapct.eval.scores import OWN_MODEL, Breakdown, Headline
from tapct.report import fractions, statistics
from tapct.report.markup import number, slug, text
from tapct.report.pictures import pictures
from tapct.report.tables import head, number_cell, row, table, with_minus
from tapct.report.volumes import viewers

OPEN_ROWS = 20  # a longer breakdown starts folded
VIEWER = (
    "The first test scans at reduced resolution, as radiologists view them: the patient's right "
    "(R) is on the left of axial and coronal slices, A is the front, S the head. The slider moves "
    "all panels; arrow keys move it by one slice. Feature colours are the first three principal "
    "components of the patch features of one model on one scan: equal colours mean similar "
    "features, but colours of two panels cannot be compared."
)
LABELS = "Left organs are hatched; a click on a name hides an organ."
MODEL_NAMES = {
    "pretrained": "pretrained, frozen",
    "untrained": "untrained, frozen",
    "untrained_layerscale1": "untrained, LayerScale 1",
    "raw_hu": "raw HU patches",
}


def name_of(model: str) -> str:
    """Name of a model for people."""
    return MODEL_NAMES.get(model, model.replace("_", " "))


def signed(value: float) -> str:
    """A lead with its sign and a real minus; a dash where it is unknown."""
    if not math.isfinite(value):
        return "\u2013"
    return ("+" if value >= 0 else "\u2212") + shown(abs(value))


def coloured(lead: float) -> str:
    """A lead as HTML, green where the pretrained model is better and red where it is worse."""
    if not math.isfinite(lead):
        return signed(lead)
    return f'<span class="{"up" if lead >= 0 else "down"}">{signed(lead)}</span>'


def tiles(evaluation: Evaluation | None) -> list[tuple[str, str, str]]:
    """Title, value and note (HTML) of one key number per task."""
    cells: list[tuple[str, str, str]] = []
    for name, section in (evaluation.tasks if evaluation else {}).items():
        lead = section.headline.lead()
        if not math.isfinite(lead.own):
            continue
        note = f"{coloured(lead.gain)} over {text(name_of(lead.baseline))}" if lead.baseline else ""
        value = with_minus(shown(lead.own))
        cells.append((f"{title_of(name)}: {section.headline.metric}", value, note))
    return cells


def headline_table(section: TaskSection, name: str) -> str:
    """Headline value of every model as a bar, with one tick per test scan.

    Args:
        section: results of a task.
        name: short name of the task.
    """
    headline = section.headline
    low, high = _bar_range(section)
    found = statistics.headline_statistics(section)
    estimates = {one.model: one.estimate for one in found.models} if found is not None else {}

    def percent(value: float) -> float:
        return 100 * min(max((value - low) / (high - low), 0.0), 1.0)

    rows = []
    for model, value in headline.values.items():
        ticks = ""
        for score in section.results.scans:
            if score.model == model and math.isfinite(score.value):
                ticks += f'<i style="left:{percent(score.value):.1f}%"></i>'
        width = percent(value) if math.isfinite(value) else 0.0
        first = "first" if model == OWN_MODEL else ""
        certainty = ""
        if found is not None:
            estimate = estimates.get(model)
            certainty = statistics.interval_cell(estimate) + statistics.numbers_cell(estimate)
        bar = f'<td class="track"><div><span style="width:{width:.1f}%"></span>{ticks}</div></td>'
        rows.append(row(name_of(model), [bar, number_cell(shown(value)), certainty], first))
    tick = "; a tick is one test scan" if section.results.scans else ""
    what = f"{text(headline.metric)}, {low:.4g} to {high:.4g}, {headline.direction} is better"
    heads = [head("model"), f'<th class="track-head">{what}{tick}</th>']
    heads.append(head("value", is_number=True))
    if found is not None:
        heads += [head("95 % interval", is_number=True), head("n", is_number=True)]
    return table(f"{name}-models", heads, rows, "models")


def _bar_range(section: TaskSection) -> tuple[float, float]:
    """Values at the left and the right end of the bars."""
    if section.headline.range is not None:
        return section.headline.range
    values = [*section.headline.values.values(), *(s.value for s in section.results.scans)]
    known = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(0.0, *known), max(0.0, *known)
    return (low, high) if low < high else (0.0, 1.0)


def breakdown_table(section: TaskSection, name: str) -> str:
    """The headline metric by class: one row each, the value and the interval of each model, and
    the lead.

    Args:
        section: results of a task with a breakdown.
        name: short name of the task.
    """
    headline, parts = section.headline, section.results.breakdown
    assert parts is not None
    models = list(headline.values)
    low, high = headline.range or (0.0, max(_known(parts), default=1.0) or 1.0)
    estimates = statistics.estimates_of_parts(section)
    rows = []
    for part, values in parts.values.items():
        of_row = {model: values.get(model, math.nan) for model in models}
        lead = Headline(headline.metric, of_row, headline.direction, headline.meaning).lead()
        known = [value for value in of_row.values() if math.isfinite(value)]
        best = (max if headline.direction == "higher" else min)(known, default=math.nan)
        cells = []
        for model, value in of_row.items():
            cells.append(_part_cell(value, low, high, is_best=value == best))
            if estimates:
                cells.append(statistics.interval_cell(estimates.get(part, {}).get(model)))
        cells.append(f'<td class="n">{coloured(lead.gain)}</td>')
        rows.append(row(str(part).replace("_", " "), cells))
    heads = [head(parts.row)]
    for model in models:
        heads.append(head(name_of(model), is_number=True))
        heads += [head("95 % interval", is_number=True)] if estimates else []
    heads.append(head("lead over best baseline", is_number=True))
    opened = " open" if len(rows) <= OPEN_ROWS else ""
    return (
        f"<details{opened}><summary>{text(parts.title)} ({len(rows)})</summary>"
        f"{table(f'{name}-{slug(parts.row)}', heads, rows, 'breakdown')}</details>"
    )


def _part_cell(value: float, low: float, high: float, *, is_best: bool) -> str:
    """A value with a bar behind it."""
    if not math.isfinite(value):
        return number_cell("\u2013")
    width = 100 * min(max((value - low) / (high - low), 0.0), 1.0)
    css = "n best" if is_best else "n"
    return f'<td class="{css}" style="--v:{width:.1f}%">{with_minus(shown(value))}</td>'


def scans_table(section: TaskSection, name: str) -> str:
    """The headline metric on each test scan: of each model, and of the pretrained one by part;
    empty where the task has no values of single scans.

    Args:
        section: results of a task.
        name: short name of the task.
    """
    scores = section.results.scans
    if not scores:
        return ""
    models = [one for one in section.headline.values if any(s.model == one for s in scores)]
    has_values = any(math.isfinite(score.value) for score in scores)
    own = {score.scan: score.parts for score in scores if score.model == OWN_MODEL}
    parts = list(dict.fromkeys(chain.from_iterable(own.values())))
    value_of = {(score.scan, score.model): score.value for score in scores}
    rows = []
    for scan in dict.fromkeys(score.scan for score in scores):
        cells = []
        for model in models if has_values else []:
            cells.append(number_cell(shown(value_of.get((scan, model), math.nan))))
        for part in parts:
            cells.append(number_cell(shown(own.get(scan, {}).get(part, math.nan))))
        rows.append(row(scan, cells))
    heads = [head("scan")]
    if has_values:
        heads += [head(name_of(model), is_number=True) for model in models]
    heads += [head(f"{str(part).replace('_', ' ')}", is_number=True) for part in parts]
    of_parts = f"; the last {len(parts)} columns are of the pretrained model" if parts else ""
    return (
        f"<details><summary>Each test scan ({len(rows)}){of_parts}</summary>"
        f"{table(f'{name}-scans', heads, rows, 'per-scan')}</details>"
    )


def _known(table: Breakdown) -> list[float]:
    return [v for values in table.values.values() for v in values.values() if math.isfinite(v)]


def scans_sentence(section: TaskSection, evaluation: Evaluation) -> str:
    """How many scans were used, how they were split, and what a reader must know about it."""
    split = evaluation.split
    by = f", split by {text(split.mode)}" if split.mode else ""
    skipped = ""
    if section.skipped:
        skipped = f" Skipped for lack of labels: {counted(section.skipped, 'scan')}."
    note = f" <b>Caveat: {text(split.caveat)}.</b>" if split.caveat else ""
    train, test = counted(section.num_train, "scan"), counted(section.num_test, "scan")
    return f"Learned from {train}, evaluated on {test}{by}.{skipped}{note}"


def evaluation_part(
    found: Sequence[SavedEvaluation],
    shown_one: SavedEvaluation | None,
    command: str,
    share: float = 1.0,
) -> str:
    """The whole part.

    Args:
        found: evaluations of the run.
        shown_one: the one of them that is shown; None where none is of the run's own data set.
        command: command that makes it.
        share: part of the room for pictures that it may take.
    """
    rest = others([one for one in found if one is not shown_one])
    evaluation = shown_one.evaluation if shown_one else None
    if shown_one is None or evaluation is None or not evaluation.tasks:
        reason = "results.json is not there"
        if shown_one is not None:
            reason = shown_one.why_not or "no task was evaluated"
        return (
            f'<p class="missing">No evaluation yet ({text(reason)}). <code>{text(command)}</code> '
            f"makes it.</p>{rest}"
        )
    parts = [f'<p class="muted">Evaluated on {text(shown_one.title)}.</p>']
    parts += [task_part(name, one, evaluation) for name, one in evaluation.tasks.items()]
    for line in evaluation.missing_lines():
        parts.append(f'<p class="missing">{text(line[0].upper() + line[1:])}</p>')
    parts.append(picture_part(shown_one, evaluation, share))
    if evaluation.seconds > 0:
        seconds = number(evaluation.seconds, 3)
        parts.append(f'<p class="muted">The evaluation took {seconds} s.</p>')
    return "".join(parts) + rest


def task_part(name: str, section: TaskSection, evaluation: Evaluation) -> str:
    """The numbers of one task.

    Args:
        name: task name.
        section: its results.
        evaluation: evaluation that it is part of.
    """
    headline, short = section.headline, slug(title_of(name))
    names = {model: name_of(model) for model in headline.values}
    by_class = ""
    if section.results.breakdown is not None and section.results.breakdown.values:
        by_class = breakdown_table(section, short)
    mean_of = f" {text(headline.mean_of[:1].upper() + headline.mean_of[1:])}."
    differences = statistics.differences_table(section, names, short)
    beside = differences + fractions.chart(section, names)
    values = f"<div>{headline_table(section, short)}{statistics.sentence(section)}</div>"
    return (
        f"<h3>{text(title_of(name))}</h3>"
        f"<p>{text(headline.meaning)}{mean_of if headline.mean_of else ''} "
        f"{scans_sentence(section, evaluation)}</p>"
        f'<div class="two">{values}<div>{beside}</div></div>'
        f"{by_class}{statistics.further_table(section, names, short)}{scans_table(section, short)}"
    )


def picture_part(shown_one: SavedEvaluation, evaluation: Evaluation, share: float) -> str:
    """Slices of test scans to move through, then the pictures of the tasks and of the features.

    Args:
        shown_one: evaluation that is shown.
        evaluation: its content.
        share: part of the room for pictures that it may take.
    """
    folder = shown_one.folder.path
    sets = {title_of(name): one.pictures for name, one in evaluation.tasks.items() if one.pictures}
    part_of_each = share / (len(sets) + bool(evaluation.pca) or 1)
    shown_sets, slices = "", ""
    for title, entries in sets.items():
        shown_sets += f"<h3>{text(title)}: pictures</h3>{pictures(folder, entries, part_of_each)}"
    of_features = ""
    if evaluation.pca:
        of_features = pictures(folder, evaluation.pca, part_of_each)
    if evaluation.volumes:
        slices = viewers(folder, evaluation.volumes, share)
        of_labels = f" {LABELS}" if 'class="organ"' in slices else ""
        slices = f'<h3>Test scans</h3><p class="muted">{VIEWER}{of_labels}</p>{slices}'
        of_features = (
            f"<details><summary>Pictures of the patch features</summary>{of_features}</details>"
        )
    elif of_features:
        of_features = f"<h3>Patch features</h3>{of_features}"
    return f"{slices}{of_features}{shown_sets}"


def others(found: Sequence[SavedEvaluation]) -> str:
    """Table of the evaluations on other data sets: headline of each task and caveat."""
    rows = []
    for one in found:
        if one.evaluation is None:
            values, caveat = "", one.why_not
        else:
            values, caveat = _headlines(one.evaluation), one.evaluation.split.caveat
        rows.append(row(one.title, [f"<td>{text(values)}</td>", f"<td>{text(caveat)}</td>"]))
    if not rows:
        return ""
    heads = [head(title) for title in ("data set", "pretrained", "caveat")]
    return (
        "<h3>Evaluations on other data sets</h3>"
        '<p class="muted"><code>tapct report RUN --data NAME</code> shows one of them.</p>'
        f"{table('other-evaluations', heads, rows, 'facts')}"
    )


def _headlines(evaluation: Evaluation) -> str:
    """The headline of the pretrained model in each task, as one text."""
    parts = []
    for name, section in evaluation.tasks.items():
        own = shown(section.headline.lead().own)
        parts.append(f"{title_of(name)}: {section.headline.metric} {own}")
    return "; ".join(parts)
