"""Tables of a benchmark with several runs: as text, and as CSV with one row per number."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapct.base.files import write_atomically
from tapct.base.paths import command_line
from tapct.eval.results.json_file import Evaluation
from tapct.eval.results.seed_statistics import RunSection, over_runs
from tapct.eval.results.task_statistics import MetricStatistics
from tapct.eval.statistics import PatientEstimate, Statistics

COLUMNS = (
    *("task", "metric", "part", "model", "seed", "value", "low", "high", "p", "p_holm"),
    *("n_scans", "n_people", "commit", "machine", "command", "cpu_seconds"),
)
ALL = "all"  # in the columns part and seed
MOST_PARTS = 8  # columns of parts in the text; the CSV file has all


@dataclass(frozen=True)
class Run:
    """One run of a benchmark and what it cost.

    Args:
        seed: random seed of the run.
        evaluation: its results.
        cpu_s: processor time of pretraining, of all threads.
        wall_s: wall time of pretraining.
        trouble: verdict of the report on pretraining, in words; empty where it is a good one.
    """

    seed: int
    evaluation: Evaluation
    cpu_s: float
    wall_s: float
    trouble: str = ""


@dataclass(frozen=True)
class MetricTable:
    """The numbers of one metric of a task.

    Args:
        task: name of the task.
        found: statistics over all runs.
        by_seed: seed -> statistics of its run; empty where a seed has several runs (folds).
    """

    task: str
    found: MetricStatistics
    by_seed: Mapping[int, MetricStatistics]


def tables_of(runs: Sequence[Run], patient_of: Mapping[str, str]) -> list[MetricTable]:
    """The statistics of all metrics of all tasks.

    Args:
        runs: runs of all seeds and folds.
        patient_of: scan ID -> patient.
    """
    tables = []
    seeds = [run.seed for run in runs]
    for task in runs[0].evaluation.tasks:
        sections = [RunSection(run.seed, run.evaluation.tasks[task]) for run in runs]
        for found in over_runs(sections, patient_of, seed=0):
            by_seed = {}
            for one in sections if len(set(seeds)) == len(seeds) else ():
                own = one.section.statistics
                of_metric = None if own is None else own.of(found.metric)
                if of_metric is not None:
                    by_seed[one.seed] = of_metric
            tables.append(MetricTable(task, found, by_seed))
    return tables


def rendered(tables: Sequence[MetricTable], runs: Sequence[Run]) -> str:
    """The tables as text: values, then the differences to the pretrained network."""
    lines: list[str] = []
    for table in tables:
        lines += [*_metric_lines(table), ""]
    cpu = [run.cpu_s / 60 for run in runs]
    wall = [run.wall_s / 60 for run in runs]
    lines.append(
        f"pretraining: {len(runs)} runs, {np.mean(cpu):.1f} CPU minutes each (most "
        f"{max(cpu):.1f}), {np.mean(wall):.1f} minutes of wall time; {processor()}"
    )
    # a table of a run that was stuck in one loss looks like any other
    lines += [
        f"warning: pretraining of seed {run.seed}: {run.trouble}" for run in runs if run.trouble
    ]
    return "\n".join(lines)


def _metric_lines(table: MetricTable) -> Iterator[str]:
    found = table.found
    parts = dict(list(found.parts.items())[:MOST_PARTS])
    yield f"{table.task}: {found.metric} ({found.direction} is better)"
    header = f"{'model':<24}{'mean':>7}  {'95 % interval':<16}{'sd of seeds':>12}"
    yield header + "".join(f"{name[:13]:>14}" for name in parts)
    values = [{one.model: one.estimate.value for one in part.models} for part in parts.values()]
    for one in found.whole.models:
        columns = "".join(f"{of_part.get(one.model, math.nan):>14.3f}" for of_part in values)
        yield (
            f"{one.model:<24}{one.estimate.value:>7.3f}  {interval_of(one.estimate):<16}"
            f"{one.seed_sd:>12.3f}{columns}"
        )
    for pair in found.whole.differences:
        line = f"{pair.reference} - {pair.other:<20} {pair.estimate.value:+.3f}"
        if pair.estimate.interval is not None:
            line += f" {interval_of(pair.estimate)}"
        if math.isfinite(pair.p):
            line += f"  p = {pair.p:.2g}, Holm {pair.p_holm:.2g}"
        yield line
    first = found.whole.models[0].estimate
    people = f" of {first.num_patients} people" if first.num_patients else ""
    yield f"n = {first.num_scans} scans{people}"
    if first.why_none:
        yield f"no interval: {first.why_none}"
    if len(found.parts) > len(parts):
        yield f"{len(found.parts) - len(parts)} more parts are in the CSV file"


def interval_of(estimate: PatientEstimate) -> str:
    """An interval as text; a dash where there is none."""
    if estimate.interval is None:
        return "-"
    return f"[{estimate.interval.low:.3f}, {estimate.interval.high:.3f}]"


def write_csv(file: Path, script: str, tables: Sequence[MetricTable], runs: Sequence[Run]) -> None:
    """One row per number: task, metric, part, model, seed (or `all`), value, interval, n, origin.

    Args:
        file: file to write, whole or not at all.
        script: path of the script, for the command.
        tables: numbers.
        runs: runs of all seeds and folds.
    """
    origin = {
        # the revisions that evaluated: a finished run may be of an earlier one
        "commit": " ".join(sorted({run.evaluation.origin.git_revision for run in runs})),
        "machine": processor(),
        "command": command_line([script, *sys.argv[1:]]),
        "cpu_seconds": round(float(np.mean([run.cpu_s for run in runs])), 1),
    }
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        for row in csv_rows(table, list(dict.fromkeys(run.seed for run in runs))):
            writer.writerow({**row, **origin})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, out.getvalue())


def csv_rows(table: MetricTable, seeds: Sequence[int]) -> Iterator[dict[str, object]]:
    """Rows of one metric: each model and difference over all seeds, then by seed."""
    for part, found in {ALL: table.found.whole, **table.found.parts}.items():
        common = {"task": table.task, "metric": table.found.metric, "part": part}
        for row in _statistics_rows(found):
            yield {**common, "seed": ALL, **row}
        for place, seed in enumerate(seeds):
            own = table.by_seed.get(seed)
            if own is not None:
                for row in _statistics_rows({ALL: own.whole, **own.parts}[part]):
                    yield {**common, "seed": seed, **row}
                continue
            for one in found.models:  # folds, and numbers that are known for whole runs alone
                if place < len(one.by_seed):
                    value = f"{one.by_seed[place]:.6g}"
                    yield {**common, "seed": seed, "model": one.model, "value": value}


def _statistics_rows(found: Statistics) -> Iterator[dict[str, object]]:
    for one in found.models:
        yield {"model": one.model, **_cells(one.estimate)}
    for pair in found.differences:
        row = {"model": f"{pair.reference} - {pair.other}", **_cells(pair.estimate)}
        if math.isfinite(pair.p):
            row |= {"p": f"{pair.p:.4g}", "p_holm": f"{pair.p_holm:.4g}"}
        yield row


def _cells(estimate: PatientEstimate) -> dict[str, object]:
    interval = estimate.interval
    return {
        "value": f"{estimate.value:.6g}",
        "low": "" if interval is None else f"{interval.low:.6g}",
        "high": "" if interval is None else f"{interval.high:.6g}",
        "n_scans": estimate.num_scans,
        "n_people": estimate.num_patients or "",
    }


def processor() -> str:
    """Name of the processor and number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    name = platform.machine()
    if cpuinfo.is_file():
        facts = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()]
        keys = [line.partition(":")[0].strip() for line in cpuinfo.read_text().splitlines()]
        found = dict(zip(reversed(keys), reversed(facts)))
        name = f"{found.get('model name', name)} model {found.get('model', '?')}"
    return f"{name}, {os.cpu_count()} cores"
