"""results.csv: the numbers of one evaluation or of several as a table, one row per number.

docs/evaluation.md, "results.csv", describes the columns.
"""

from __future__ import annotations

import csv
import io
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tapct.base import files
from tapct.eval.intervals import Interval
from tapct.eval.results.json_file import Evaluation
from tapct.eval.results.task_section import TaskSection
from tapct.eval.scores import ScanScore
from tapct.eval.statistics import PatientEstimate, Statistics

if TYPE_CHECKING:  # the report reads results without loading torch
    import torch

ALL = "all"  # in the columns part and scan: a value over all parts or all scans
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class RowOrigin:
    """The columns that are the same for all numbers of an evaluation.

    Args:
        seed: random seed of the evaluation.
        step: finished steps of the weights; empty where unknown.
        run: name of the run or of the export.
        dataset: name of the data set.
        commit: revision of tapct.
        command: command line.
        machine: processor, and GPU.
        seconds: wall time of the whole evaluation.
    """

    seed: int
    step: int | str
    run: str
    dataset: str
    commit: str
    command: str
    machine: str
    seconds: float


@dataclass(frozen=True)
class TableRow:
    """One number.

    Args:
        origin: what is the same for all numbers of an evaluation.
        task: task name.
        model: model name.
        metric: metric name.
        value: the number; NaN where it does not exist.
        part: part of the task, e.g. an organ, or `all`.
        scan: scan ID, or `all`.
        minus: name of the model that is subtracted; empty where the value is that of one model.
        low: lower end of the 95 % interval over patients; NaN where there is none.
        high: its upper end.
        p: two-sided p-value of a difference; NaN where there is none.
        p_holm: the same, adjusted for the number of models.
        n_scans: scans with a value; 0 where unknown.
        n_patients: their patients; 0 where unknown.
    """

    origin: RowOrigin
    task: str
    model: str
    metric: str
    value: float
    part: str = ALL
    scan: str = ALL
    minus: str = ""
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    n_scans: int = 0
    n_patients: int = 0


_OWN = (
    *("task", "model", "minus", "part", "metric", "scan", "value", "low", "high", "p", "p_holm"),
    *("n_scans", "n_patients"),
)
COLUMNS = (*_OWN, *(field.name for field in fields(RowOrigin)))


def machine(device: torch.device) -> str:
    """Processor of this machine, and the GPU where features are computed on one."""
    import torch

    names = [_processor()]
    if device.type == "cuda":
        names.append(torch.cuda.get_device_name(device))
    return ", ".join(names)


def _processor() -> str:
    """Model name of the processor, as lscpu prints it."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def rows_of(
    evaluation: Evaluation, *, run: str = "", command: str = "", seed: int | None = None
) -> list[TableRow]:
    """The numbers of one evaluation.

    Args:
        evaluation: content of results.json.
        run: name of the run in the table; empty takes that of the results.
        command: command line in the table; empty takes that of the results.
        seed: seed in the table, e.g. that of pretraining; None takes that of the evaluation.
    """
    origin = evaluation.origin
    weights, data = origin.weights, origin.data
    columns = RowOrigin(
        evaluation.seed if seed is None else seed,
        "" if weights is None or weights.step is None else weights.step,
        run or ("" if weights is None else weights.run),
        "" if data is None else data.name,
        origin.git_revision,
        command or origin.command,
        origin.machine,
        evaluation.seconds,
    )
    rows: list[TableRow] = []
    for task, section in evaluation.tasks.items():
        rows += _task_rows(task, section, columns)
    return rows


def _task_rows(task: str, section: TaskSection, origin: RowOrigin) -> list[TableRow]:
    headline, results = section.headline, section.results
    metrics = section.statistics.metrics if section.statistics is not None else ()
    rows: list[TableRow] = []
    if headline.metric not in {one.metric for one in metrics}:
        for model, value in headline.values.items():
            rows.append(TableRow(origin, task, model, headline.metric, value))
    for one in metrics:
        for part, found in {ALL: one.whole, **one.parts}.items():
            for row in _statistics_rows(origin, task, one.metric, found):
                rows.append(replace(row, part=part))
    rows += _scan_rows(origin, task, headline.metric, results.scans)
    for further in results.further:
        rows += _scan_rows(origin, task, further.metric, further.scans)
    return rows


def _statistics_rows(
    origin: RowOrigin, task: str, metric: str, found: Statistics
) -> Iterator[TableRow]:
    for one in found.models:
        row = TableRow(origin, task, one.model, metric, one.estimate.value)
        yield _with_interval(row, one.estimate)
    for pair in found.differences:
        row = TableRow(
            origin, task, pair.reference, metric, pair.estimate.value,
            minus=pair.other, p=pair.p, p_holm=pair.p_holm,
        )  # fmt: skip
        yield _with_interval(row, pair.estimate)


def _with_interval(row: TableRow, estimate: PatientEstimate) -> TableRow:
    interval = estimate.interval or Interval(math.nan, math.nan)
    return replace(
        row,
        low=interval.low,
        high=interval.high,
        n_scans=estimate.num_scans,
        n_patients=estimate.num_patients,
    )


def _scan_rows(
    origin: RowOrigin, task: str, metric: str, scans: Sequence[ScanScore]
) -> list[TableRow]:
    rows = []
    for score in scans:
        for part, value in {ALL: score.value, **score.parts}.items():
            rows.append(
                TableRow(
                    origin,
                    task,
                    score.model,
                    metric,
                    value,
                    part=part,
                    scan=score.scan,
                    n_scans=1,
                    n_patients=1,
                )  # fmt: skip
            )
    return rows


def write_csv(path: Path, rows: Iterable[TableRow], extra: Mapping[str, str] | None = None) -> None:
    """Write a table, whole or not at all; a number that does not exist is an empty cell.

    Args:
        path: file to write.
        rows: numbers, of one evaluation or of several.
        extra: further columns with one value for all rows, e.g. the name of a benchmark; they come
            first.
    """
    extra = extra or {}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*extra, *COLUMNS))
    for row in rows:
        own = [getattr(row, name) for name in _OWN]
        shared = [getattr(row.origin, field.name) for field in fields(RowOrigin)]
        writer.writerow([*extra.values(), *map(_cell, [*own, *shared])])
    files.write_atomically(path, out.getvalue())


def _cell(value: object) -> object:
    """A number with seven digits; empty where it does not exist."""
    if isinstance(value, float):
        return f"{value:.7g}" if math.isfinite(value) else ""
    return value
