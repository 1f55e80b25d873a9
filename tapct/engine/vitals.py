"""A run that has gone bad is told while it trains: the verdict over a moving window of steps, said
when it changes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

from tapct.engine.metrics import Record
from tapct.ssl.health import STATES, TermReading, verdict
from tapct.ssl.step import StepOutput

WINDOW_SHARE, WINDOW_LEAST, WINDOW_MOST = (
    0.1,
    20,
    200,
)  # steps that a verdict is over; the report's share and most
FIRST_BAD = "not following"  # in STATES; what stands before it is no reason to speak


def window_of(total_steps: int) -> int:
    """Steps that are judged together in a run of this length."""
    return min(WINDOW_MOST, max(WINDOW_LEAST, round(WINDOW_SHARE * total_steps)))


def ln_prototypes(output: StepOutput) -> dict[str, float]:
    """ln K of every loss that tells of its targets, without asking the device."""
    found = [result.targets for result in output.results if result.targets is not None]
    return {targets.name: math.log(len(targets.sums.mass_K)) for targets in found}


class Vitals:
    """Judges the records of a run as they are fetched, on the first rank.

    Nothing is judged before the learning rate has warmed up, nor before a whole window of steps has
    passed since then or since the run went on; and after a word there is a window of silence.

    Args:
        warmup_steps: of the learning rate.
        window: steps that are judged together.
    """

    def __init__(self, warmup_steps: int, window: int) -> None:
        self.warmup_steps = warmup_steps
        self.rows: deque[Record] = deque(maxlen=window)
        self.told = ""  # the bad state that people know of
        self.silent_until = 0.0

    def look(self, records: Sequence[Record], ln_k: Mapping[str, float]) -> str:
        """The line to say after these records; empty when nothing has changed.

        Args:
            records: of the steps since the last look, in order.
            ln_k: of each prototype loss, by the name under which its health is logged.
        """
        self.rows.extend(record for record in records if record["step"] > self.warmup_steps)
        if len(self.rows) < (self.rows.maxlen or 0) or self.rows[-1]["step"] < self.silent_until:
            return ""
        readings = [
            reading for name in ln_k if (reading := self.reading(name, ln_k[name])) is not None
        ]
        found = verdict(readings)
        state = found.state if STATES.index(found.state) >= STATES.index(FIRST_BAD) else ""
        if state == self.told:
            return ""
        before, self.told = self.told, state
        first, last = self.rows[0]["step"], self.rows[-1]["step"]
        self.silent_until = last + len(self.rows)
        steps = f"health, steps {first:.0f} to {last:.0f}"
        if not state:
            return f"{steps}: no longer {before} but {found.state}. {found.words}"
        return f"{steps}: {state}. {found.words}. {found.next_move}"

    def reading(self, name: str, ln_k: float) -> TermReading | None:
        """Means of one prototype loss over the window; None where it had no target in any step of
        it.
        """
        keys = [
            f"health/{name}_{what}"
            for what in ("ln_k_minus_ce", "marginal_entropy", "target_entropy")
        ]
        rows = [[row[key] for key in keys] for row in self.rows if all(key in row for key in keys)]
        rows = [
            row for row in rows if not (row[1] == row[2] == 0.0 and math.isclose(row[0], ln_k))
        ]  # no patch masked
        if not rows:
            return None
        gained, marginal, target = (statistics.fmean(column) for column in zip(*rows, strict=True))
        return TermReading(name, gained, marginal, target, ln_k)
