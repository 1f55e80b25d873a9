"""The top of the page of a run: the verdict in words and the key numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tapct.base.console import duration
from tapct.base.recent import window_in_words
from tapct.eval.results.json_file import Evaluation
from tapct.report import evaluation
from tapct.report.history import History
from tapct.report.markup import number, text
from tapct.report.training import readings
from tapct.ssl.health import Verdict, verdict_at

STYLE_OF = {
    "alive": "good",
    "faint": "warn",
    "not following": "warn",
    "stuck": "bad",
    "collapsed": "bad",
    "not finite": "bad",
}


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
    seen = f"{count(samples[-1])} samples" if len(samples) else ""
    cells: list[tuple[str, str, str]] = [("Steps", count(history.column("step")[1][-1]), seen)]
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


def count(value: float) -> str:
    """A whole number for people."""
    return number(int(value)) if math.isfinite(value) else number(value)
