"""Warn during training when a run stops learning: a verdict over a moving window of steps, logged
when it changes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

from tapct.base import metric_names
from tapct.engine.metrics import Record
from tapct.ssl.health import STATES, TOO_EARLY, TermReading, verdict_at
from tapct.ssl.step import StepOutput

# Steps that one verdict covers: this share of the run, within these bounds. More than the report's
# window, since a line is logged when the verdict changes.
WINDOW_SHARE, WINDOW_LEAST, WINDOW_MOST = 0.1, 20, 200
FIRST_BAD = "not following"  # in STATES; the states before it need no warning


def window_of(total_steps: int) -> int:
    """Steps that one verdict covers in a run of this length."""
    return min(WINDOW_MOST, max(WINDOW_LEAST, round(WINDOW_SHARE * total_steps)))


def ln_prototypes(output: StepOutput) -> dict[str, float]:
    """ln K of every loss that reports its targets, without asking the device."""
    reported = [result.targets for result in output.results if result.targets is not None]
    return {targets.name: math.log(len(targets.sums.mass_K)) for targets in reported}


class Vitals:
    """Watches the records of a run as they are fetched, on the first rank.

    There is no verdict in the first `health.MIN_STEPS` steps, before the learning rate has warmed
    up, nor before a whole window of steps has passed since then or since the run was resumed; after
    a line, a window passes without one.

    Args:
        warmup_steps: warm-up steps of the learning rate.
        window: steps that one verdict covers.
    """

    def __init__(self, warmup_steps: int, window: int) -> None:
        self.warmup_steps = warmup_steps
        self.rows: deque[Record] = deque(maxlen=window)
        self.logged = ""  # the bad state that the log names already
        self.silent_until = 0.0

    def update(self, records: Sequence[Record], ln_k: Mapping[str, float]) -> str:
        """The line to log after these records; empty when nothing has changed.

        Args:
            records: records of the steps since the last call, in order.
            ln_k: ln K of each prototype loss, by the name under which its health is logged.
        """
        self.rows.extend(record for record in records if record["step"] > self.warmup_steps)
        if len(self.rows) < (self.rows.maxlen or 0) or self.rows[-1]["step"] < self.silent_until:
            return ""
        readings = [self.reading(name, ln_k[name]) for name in ln_k]
        known = [reading for reading in readings if reading is not None]
        now = verdict_at(known, int(self.rows[-1]["step"]), self.warmup_steps)
        if now.state == TOO_EARLY:
            return ""
        state = now.state if STATES.index(now.state) >= STATES.index(FIRST_BAD) else ""
        if state == self.logged:
            return ""
        before, self.logged = self.logged, state
        first, last = self.rows[0]["step"], self.rows[-1]["step"]
        self.silent_until = last + len(self.rows)
        steps = f"health, steps {first:.0f} to {last:.0f}"
        if not state:
            return f"{steps}: no longer {before} but {now.state}. {now.words}"
        return f"{steps}: {state}. {now.words}. {now.next_step}"

    def reading(self, name: str, ln_k: float) -> TermReading | None:
        """Means of one prototype loss over the window; None where it had no target in any step of
        it.
        """
        wanted = (
            metric_names.LN_K_MINUS_CE,
            metric_names.MARGINAL_ENTROPY,
            metric_names.TARGET_ENTROPY,
        )
        keys = [metric_names.target_health(name, reading) for reading in wanted]
        rows = []
        for record in self.rows:
            if not all(key in record for key in keys):
                continue
            row = [record[key] for key in keys]
            # such numbers are those of a step without any target, e.g. without a masked patch
            is_empty = row[1] == row[2] == 0.0 and math.isclose(row[0], ln_k)
            if not is_empty:
                rows.append(row)
        if not rows:
            return None
        gained, marginal, target = (statistics.fmean(column) for column in zip(*rows, strict=True))
        return TermReading(name, gained, marginal, target, ln_k)
