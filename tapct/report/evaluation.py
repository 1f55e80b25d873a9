"""The part of the page on frozen features: headline tables, pictures of tasks and features.

All names and sentences about a metric come from the task's headline; nothing here knows a task.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tapct.base.counted import counted
from tapct.eval.contract import OWN_MODEL, Breakdown, Headline
from tapct.eval.results import Evaluation, Picture, TaskSection, shown, title_of
from tapct.eval.saved import SavedEvaluation
from tapct.report import statistics
from tapct.report.plots import number, text

PICTURE_BYTES = 1_700_000  # all pictures together, so that the page stays below 3 MB
MOST_PICTURES = 24
OPEN_ROWS = 20  # a longer breakdown starts folded
MODEL_NAMES = {
    "pretrained": "pretrained, frozen",
    "untrained": "untrained, frozen",
    "untrained_layerscale1": "untrained, LayerScale 1",
    "raw_hu": "raw HU patches",
}
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


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
        cells.append((f"{title_of(name)}: {section.headline.metric}", shown(lead.own), note))
    return cells


def headline_table(section: TaskSection) -> str:
    """Headline value of every model as a bar, with one tick per test scan."""
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
        first = ' class="first"' if model == OWN_MODEL else ""
        certainty = ""
        if found is not None:
            estimate = estimates.get(model)
            certainty = statistics.interval_cell(estimate) + statistics.numbers_cell(estimate)
        rows.append(
            f"<tr{first}><th>{text(name_of(model))}</th>"
            f'<td class="track"><div><span style="width:{width:.1f}%"></span>{ticks}</div></td>'
            f'<td class="n">{shown(value)}</td>{certainty}</tr>'
        )
    tick = "; a tick is one test scan" if section.results.scans else ""
    what = f"{text(headline.metric)}, {low:.4g} to {high:.4g}, {headline.direction} is better"
    more = ""
    if found is not None:
        more = '<th class="n">95 % interval</th><th class="n">n</th>'
    head = f'<tr><th>model</th><th>{what}{tick}</th><th class="n">value</th>{more}</tr>'
    return (
        f'<div class="scroll"><table class="models"><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bar_range(section: TaskSection) -> tuple[float, float]:
    """Values at the left and the right end of the bars."""
    if section.headline.range is not None:
        return section.headline.range
    values = [*section.headline.values.values(), *(s.value for s in section.results.scans)]
    known = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(0.0, *known), max(0.0, *known)
    return (low, high) if low < high else (0.0, 1.0)


def breakdown_table(table: Breakdown, headline: Headline) -> str:
    """The headline metric by class: one row each, one column per model, and the lead."""
    models = list(headline.values)
    low, high = headline.range or (0.0, max(_known(table), default=1.0) or 1.0)
    rows = []
    for row, values in table.values.items():
        of_row = {model: values.get(model, math.nan) for model in models}
        part = Headline(headline.metric, of_row, headline.direction, headline.meaning)
        known = [value for value in of_row.values() if math.isfinite(value)]
        best = (max if headline.direction == "higher" else min)(known, default=math.nan)
        cells = []
        for value in of_row.values():
            if not math.isfinite(value):
                cells.append('<td class="n">\u2013</td>')
                continue
            width = 100 * min(max((value - low) / (high - low), 0.0), 1.0)
            mark = "n best" if value == best else "n"
            cells.append(f'<td class="{mark}" style="--v:{width:.1f}%">{shown(value)}</td>')
        lead = coloured(part.lead().gain)
        name = text(str(row).replace("_", " "))
        rows.append(f'<tr><th>{name}</th>{"".join(cells)}<td class="n">{lead}</td></tr>')
    heads = "".join(f'<th class="n">{text(name_of(model))}</th>' for model in models)
    opened = " open" if len(rows) <= OPEN_ROWS else ""
    return (
        f"<details{opened}><summary>{text(table.title)} ({len(rows)})</summary>"
        f'<div class="scroll"><table class="breakdown"><thead><tr><th>{text(table.row)}</th>'
        f'{heads}<th class="n">lead over best baseline</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
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


def encode(path: Path, budget: int) -> tuple[bytes, str]:
    """Bytes and type of a picture; re-encoded, then made smaller, if it is above its budget.

    Args:
        path: picture file.
        budget: most bytes.
    """
    data = path.read_bytes()
    if len(data) <= budget:
        return data, MIME[path.suffix.lower()]
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    for _ in range(6):
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=88, method=4)
        if buffer.tell() <= budget:
            break
        picture = picture.resize(
            (max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)),
            Image.Resampling.LANCZOS,
        )
    return buffer.getvalue(), "image/webp"


def pictures(folder: Path, entries: Sequence[Picture], share: float) -> str:
    """Pictures inside the page, with captions.

    Args:
        folder: folder that `file` of each entry is relative to; a file outside it is not shown.
        entries: pictures to show.
        share: part of `PICTURE_BYTES` that these pictures may take.
    """
    first = entries[:MOST_PICTURES]
    budget = int(share * PICTURE_BYTES * 0.73 / max(1, len(first)))  # base64 takes 4/3 of the bytes
    parts = []
    for entry in first:
        path = (folder / entry.file).resolve()
        inside = path.is_relative_to(folder.resolve()) and path.suffix.lower() in MIME
        if not inside or not path.is_file():
            missing = text(entry.file or "without a name")
            parts.append(f'<p class="missing">picture {missing} is not there</p>')
            continue
        caption = text(entry.caption)
        if entry.scan and entry.scan not in entry.caption:
            caption = f"{caption.rstrip('.')}. Scan {text(entry.scan)}.".removeprefix(". ")
        data, mime = encode(path, budget)
        source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        parts.append(
            f'<figure><img alt="{caption}" src="{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    more = len(entries) - len(first)
    rest = f'<p class="muted">{more} more in {text(folder.name)}/</p>' if more > 0 else ""
    return f'<div class="pictures">{"".join(parts)}</div>{rest}'


def evaluation_part(
    found: Sequence[SavedEvaluation], shown_one: SavedEvaluation | None, command: str
) -> str:
    """The whole part.

    Args:
        found: evaluations of the run.
        shown_one: the one of them that is shown; None where none is of the run's own data set.
        command: command that makes it.
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
    folder = shown_one.folder.path
    sets = [section.pictures for section in evaluation.tasks.values() if section.pictures]
    num_sets = len(sets) + bool(evaluation.pca)
    parts = [f'<p class="muted">Evaluated on {text(shown_one.title)}.</p>']
    for name, section in evaluation.tasks.items():
        table, headline = section.results.breakdown, section.headline
        names = {model: name_of(model) for model in headline.values}
        by_class = breakdown_table(table, headline) if table and table.values else ""
        mean_of = f" {text(headline.mean_of[:1].upper() + headline.mean_of[1:])}."
        parts.append(
            f"<h3>{text(title_of(name))}</h3>"
            f"<p>{text(headline.meaning)}{mean_of if headline.mean_of else ''} "
            f"{scans_sentence(section, evaluation)}</p>"
            f'<div class="two"><div>{headline_table(section)}{statistics.sentence(section)}</div>'
            f"<div>{statistics.differences_table(section, names)}{by_class}</div></div>"
            f"{statistics.further_table(section, names)}"
        )
        if section.pictures:
            parts.append(pictures(folder, section.pictures, 1 / num_sets))
    if evaluation.pca:
        parts.append(f"<h3>Patch features</h3>{pictures(folder, evaluation.pca, 1 / num_sets)}")
    if evaluation.seconds > 0:
        seconds = number(evaluation.seconds, 3)
        parts.append(f'<p class="muted">The evaluation took {seconds} s.</p>')
    return "".join(parts) + rest


def others(found: Sequence[SavedEvaluation]) -> str:
    """Table of the evaluations on other data sets: headline of each task and caveat."""
    rows = ""
    for one in found:
        if one.evaluation is None:
            values, caveat = "", one.why_not
        else:
            values, caveat = _headlines(one.evaluation), one.evaluation.split.caveat
        rows += f"<tr><th>{text(one.title)}</th><td>{text(values)}</td><td>{text(caveat)}</td></tr>"
    if not rows:
        return ""
    return (
        "<h3>Evaluations on other data sets</h3>"
        '<p class="muted"><code>tapct report RUN --data NAME</code> shows one of them.</p>'
        '<div class="scroll"><table class="facts"><thead><tr><th>data set</th><th>pretrained</th>'
        f"<th>caveat</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _headlines(evaluation: Evaluation) -> str:
    """The headline of the pretrained model in each task, as one text."""
    parts = []
    for name, section in evaluation.tasks.items():
        own = shown(section.headline.lead().own)
        parts.append(f"{title_of(name)}: {section.headline.metric} {own}")
    return "; ".join(parts)
