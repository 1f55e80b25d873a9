"""The parts of the page about what a run was: its scans, its config, its origin, and the commands
that repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tapct.config.flat import flatten_to_text
from tapct.config.yamlfile import from_text
from tapct.eval.results.old_formats import config_with_task_table
from tapct.eval.results.saved import SavedEvaluation
from tapct.report.markup import number, text
from tapct.report.tables import head, number_cell, row, table


def scans(manifest: Mapping[str, Any], samples: float) -> str:
    """Counts of accepted and refused scans with the reasons, and how often each was seen.

    Args:
        manifest: `manifest` of run.json; empty where it is unknown.
        samples: crops of training so far.
    """
    if "accepted" not in manifest:
        known = (
            f"The run's store holds {number(manifest['scans'])} scans. "
            if "scans" in manifest
            else ""
        )
        return (
            f'<p class="missing">{known}Which scans were refused, and why: '
            "<code>tapct index DIR</code> lists them.</p>"
        )
    accepted = int(manifest["accepted"])
    reasons = {reason: int(count) for reason, count in manifest.get("refused", {}).items()}
    refused = sum(reasons.values())
    most = max(accepted, *reasons.values(), 1)
    counts = [("accepted", accepted)]
    counts += sorted(reasons.items(), key=lambda pair: -pair[1])
    rows = []
    for name, count in counts:
        width = f"{100 * count / most:.1f}%"
        bar = f'<td class="track"><div><span style="width:{width}"></span></div></td>'
        css = "first" if name == "accepted" else ""
        rows.append(row(name.replace("_", " "), [bar, number_cell(number(count))], css))
    heads = [head("scans"), '<th class="track-head"></th>', head("count", is_number=True)]
    sentence = (
        f"{number(accepted + refused)} scans were found, {number(accepted)} accepted, "
        f"{number(refused)} refused."
    )
    num = int(manifest.get("scans", accepted))
    if samples and num:
        sentence += (
            f" The store holds {number(num)} scans; the run has drawn {number(int(samples))} "
            f"samples, that is {number(samples / num, 3)} per scan if none is held out."
        )
    return f"<p>{sentence}</p>{table('scans', heads, rows, 'models')}"


def provenance(facts: Mapping[str, Any], why_not: str) -> str:
    """Table of all other facts in run.json."""
    if not facts:
        return f'<p class="missing">Unknown: {text(why_not)}.</p>'
    rows = [row(key, [f"<td>{text(value)}</td>"]) for key, value in flatten_to_text(facts).items()]
    return table("provenance", [head("fact"), head("value")], rows, "facts")


def config(path: Path) -> str:
    """The resolved configuration, folded away."""
    if not path.is_file():
        return f'<p class="missing">{text(path.name)} is not there; tapct train writes it.</p>'
    body = text(path.read_text(encoding="utf-8", errors="replace"))
    return (
        f"<details><summary>Resolved configuration of the run</summary><pre>{body}</pre></details>"
    )


def read_config(path: Path) -> dict[str, str] | None:
    """The config of a run as dotted key -> text; None where it cannot be read."""
    try:
        tree = from_text(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return None
    return flatten_to_text(config_with_task_table(tree)) if isinstance(tree, dict) else None


def repeat(command: object, shown: SavedEvaluation | None, run_dir: Path) -> str:
    """The commands that made the run, its evaluation and this page.

    Args:
        command: `command` of run.json, a text or a list of words.
        shown: evaluation that is shown; None without one.
        run_dir: run folder.
    """
    words = command if isinstance(command, str) else ""
    if isinstance(command, list):
        words = " ".join(str(word) for word in command)
    lines = [("train", words or "unknown: run.json does not have it")]
    evaluation = shown.evaluation if shown is not None else None
    if evaluation is not None:
        lines.append(("evaluate", evaluation.origin.command or f"tapct eval {run_dir}"))
    lines.append(("this page", f"tapct report {run_dir}"))
    items = "".join(f"<dt>{name}</dt><dd><code>{text(line)}</code></dd>" for name, line in lines)
    return (
        f'<dl class="commands">{items}</dl><p class="muted">The resolved configuration holds every '
        "setting: saved as a file, it can be given to <code>tapct train</code>. Absolute paths in "
        "the command of an evaluation are replaced by a hash.</p>"
    )
