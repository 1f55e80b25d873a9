"""Read what a run left in its folder: metrics as columns, JSON files, with patience for a cut last
line.
"""

from __future__ import annotations

import functools
import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tapct.base import jsonl
from tapct.base.exits import UserError
from tapct.base.recent import last_mean

Column = tuple[np.ndarray, np.ndarray]  # steps at which a metric was written, its values; float64


@dataclass(frozen=True)
class History:
    """The metrics of a run by step, later writings of a step replacing earlier ones.

    Args:
        columns: name -> steps (ascending) and values, NaN where the value is null or no number.
        num_steps: finished steps that left a line.
        unreadable: lines that were no JSON object with a step (a killed run leaves one).
    """

    columns: dict[str, Column]
    num_steps: int
    unreadable: int

    def names(self, prefix: str) -> list[str]:
        """Metric names that start with `prefix`, in order of first appearance."""
        return [name for name in self.columns if name.startswith(prefix)]

    def column(self, name: str) -> Column:
        """Steps and values of a metric; empty when it was never written."""
        return self.columns.get(name, (np.zeros(0), np.zeros(0)))

    @property
    def last_step(self) -> int:
        """The last finished step."""
        return int(self.column("step")[1][-1])

    def recent(self, name: str) -> float:
        """The number that every page and table shows for a metric of the run, see `base/recent.py`;
        NaN where it was never written.
        """
        steps, values = self.column(name)
        return last_mean(steps.tolist(), values.tolist(), self.last_step)

    def typical_seconds(self) -> float:
        """Seconds per step: median over the run; NaN where there is none."""
        seconds = self.column("seconds/step")[1]
        return float(np.nanmedian(seconds)) if np.isfinite(seconds).any() else math.nan


def read_history(path: Path) -> History:
    """Read metrics.jsonl, row by row: a run of 125,000 steps has 200 MB of them.

    Raises:
        UserError: no such file, or no finished step in it.
    """
    found: dict[str, _Column] = {}
    newest: dict[float, int] = {}  # step -> number of its last row
    num_rows = unreadable = 0
    for row in jsonl.each(path, "step"):
        if row is None or not _is_number(row["step"]):
            unreadable += 1
            continue
        newest[row["step"]] = num_rows
        for name, value in row.items():
            column = found.get(name)
            if column is None:
                column = found[name] = _Column()
            column.rows.append(num_rows)
            column.values.append(value if _is_number(value) else math.nan)
        num_rows += 1
    if not newest:
        what = "holds no finished step" if path.is_file() else "is missing"
        raise UserError(
            f"{path} {what}: there is nothing to report yet. Train first: tapct train CONFIG."
        )
    steps = np.full(num_rows, np.nan)
    steps[list(newest.values())] = list(newest)  # rows that a later one replaces stay NaN
    columns = {}
    for name, column in found.items():
        at = steps[np.frombuffer(column.rows, np.int64)]
        values, kept = np.frombuffer(column.values, np.float64), ~np.isnan(at)
        order = np.argsort(at[kept], kind="stable")
        columns[name] = (at[kept][order], values[kept][order])
    kept_columns = {name: column for name, column in columns.items() if len(column[0])}
    return History(kept_columns, len(newest), unreadable)


class _Column:
    """The values of a metric while its file is read.

    Args:
        rows: number of the row of each value.
        values: the values, NaN where a value is no number.
    """

    def __init__(self) -> None:
        self.rows, self.values = array("q"), array("d")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """An object from a JSON file, and in words why it is empty (empty words when it is not)."""
    if not path.is_file():
        return {}, f"{path.name} is not there"
    found = jsonl.parse(path.read_text(encoding="utf-8", errors="replace"))
    return (
        ({}, f"{path.name} is damaged: it holds no JSON object") if found is None else (found, "")
    )


def prototypes_ln(history: History, term: str) -> float:
    """ln K of one prototype loss, from what was logged; NaN when the log does not give it.

    ln K - CE is logged with CE the mean over all pairs, and so are the means of its groups (e.g.
    ce/dino_global and ce/dino_local). So (ln K - CE) = ln K - sum_i a_i ce_i with fixed shares a_i
    that add up to 1: a linear system in ln K and the shares, solved over the steps and believed
        only if it holds.
    """
    groups = [
        name
        for name in history.names("ce/")
        if name == f"ce/{term}" or name.startswith(f"ce/{term}_")
    ]
    found = [history.column(name) for name in (f"health/{term}_ln_k_minus_ce", *groups)]
    steps = functools.reduce(np.intersect1d, (steps for steps, _ in found))
    table = np.column_stack([values[np.isin(at, steps)] for at, values in found])
    table = table[np.isfinite(table).all(1)]
    if not groups or not len(table):
        return math.nan
    gap, last, others = table[:, 0], table[:, -1], table[:, 1:-1]
    system = np.column_stack([np.ones(len(gap)), last[:, None] - others])
    target = gap + last
    solution = np.linalg.lstsq(system, target, rcond=None)[0]
    fits = bool(np.abs(system @ solution - target).max() < 5e-3)
    shares = bool((solution[1:] > -0.05).all() and solution[1:].sum() < 1.05)
    determined = len(table) > 2 * system.shape[1] or system.shape[1] == 1
    return float(solution[0]) if fits and shares and determined else math.nan
