"""`tapct report RUN RUN2 ...`: several runs on one page, first compared, then one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tapct.report import compare, compare_page, page, summary
from tapct.report.document import document, save
from tapct.report.markup import slug, text
from tapct.run_folder import RunFolder

MOST_BYTES = 14_000_000  # of the runs on a page, so that it stays below 15 MB with its scripts


def render(folders: Sequence[Path], data: str = "", reload_s: float = 0.0) -> str:
    """The page's HTML.

    Args:
        folders: run folders; one that is none is left out with a note.
        data: name of the data set whose evaluations are shown; empty for each run's own.
        reload_s: seconds after which the page loads itself again; 0: it does not.
    Raises:
        UserError: no run is left, or none was evaluated on the data set.
    """
    comparison = compare.read(folders, data=data)
    compared = compare_page.sections(comparison)
    verdicts, links, parts, histories = "", '<a href="#curves">Curves</a>', "", {}
    left = MOST_BYTES - len(compared)
    for number, one in enumerate(comparison.runs):
        run = page.read_run(one.folder, data if one.saved is not None else "")
        histories[one.name] = run.history
        anchor, name = f"run-{number}-{slug(one.name)}", text(one.name)
        current = summary.verdict_of(run.history, run.config)
        box = summary.verdict_box(current, evaluated=one.evaluated is not None)
        verdicts += f'<div><h3><a href="#{anchor}">{name}</a></h3>{box}</div>'
        links += f'<a href="#{anchor}">{name}</a>'
        whole = _whole_run(run, anchor, 1 / len(comparison.runs))
        if len(whole) > left:
            whole = (
                '<p class="missing">Left out, so that the page stays below '
                f"15 MB: <code>tapct report {text(one.folder)}</code> shows "
                "it.</p>"
            )
        left -= len(whole)
        parts += f'<details class="run" id="{anchor}"><summary>{name}</summary>{whole}</details>'
    num = len(comparison.runs)
    title = "1 run" if num == 1 else f"{num} runs"
    return document(
        f"{title} of tapct",
        f'<header><h1>{title} side by side</h1><p class="muted">Pretraining runs of tapct: '
        f"volumetric DINOv2 on CT.</p>{page.reload_box(reload_s)}</header>"
        f'<div class="verdicts">{verdicts}</div><nav>{links}</nav>'
        f"{compared}<h2>Each run</h2>{parts}{page.footer(histories)}",
    )


def _whole_run(run: page.RunPage, anchor: str, share: float) -> str:
    """Everything about one run, with links to its parts.

    Args:
        run: run to show.
        anchor: beginning of the names of its anchors.
        share: part of the room for pictures that it may take.
    """
    contents, html = page.body(page.sections(run, share), f"{anchor}-")
    return f"{page.top(run)}<nav>{contents}</nav>{html}"


def write(
    folders: Sequence[Path], out: Path | None = None, data: str = "", reload_s: float = 0.0
) -> Path:
    """Write a page, whole or not at all, and return its path.

    Args:
        folders: run folders.
        out: file to write; None for a file in the current folder, with the name that a page has in
            its run folder.
        data: name of the data set whose evaluations are shown; empty for each run's own.
        reload_s: seconds after which the page loads itself again; 0: it does not.
    Raises:
        UserError: no run is left, none was evaluated on the data set, or no room to write.
    """
    return save(render(folders, data, reload_s), out or RunFolder(Path()).report)
