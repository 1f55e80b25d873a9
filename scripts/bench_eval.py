"""What an evaluation costs: one task against several tasks, each from an empty feature cache.

The features of all models are computed once for all tasks, so that several tasks should cost little
more than one. Both evaluations run in this process, one after the other, on the same scans. Printed
are wall and processor seconds per scan, the seconds of each part of the features, the size of the
cache per scan, and the ratio of several tasks to one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import arguments

from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import write_atomically
from tapct.eval.results.json_file import Evaluation
from tapct.run import finished
from tapct.run.model_source import open_model

TASKS = ("segmentation", "classification", "knn", "matching", "registration")


@dataclass(frozen=True)
class Measured:
    """The cost of one evaluation.

    Args:
        tasks: tasks that it evaluated.
        wall_s: wall time in seconds.
        cpu_s: processor time in seconds, of all threads.
        num_scans: scans.
        parts_s: seconds of each part of the features.
        cache_bytes: bytes of the features.
    """

    tasks: tuple[str, ...]
    wall_s: float
    cpu_s: float
    num_scans: int
    parts_s: dict[str, float]
    cache_bytes: int


def options_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench_eval.py", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, checkpoint or export")
    parser.add_argument(
        "--tasks",
        default=",".join(TASKS),
        help="names of tasks with commas between them; the first one is also evaluated alone; "
        "tasks that the config lacks get their default settings; default %(default)s",
    )
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    options = options_of(words)
    tasks = tuple(options.tasks.split(","))
    if len(set(tasks)) < 2 or len(set(tasks)) != len(tasks) or "" in tasks:
        raise UserError(
            f"--tasks {options.tasks!r}: give two different tasks or more, with commas between them"
        )
    one = measured(options.run, tasks[:1], options.overrides)
    several = measured(options.run, tasks, options.overrides)
    for found in (one, several):
        console.say_line(line_of(found))
    ratios = {
        "wall": several.wall_s / one.wall_s,
        "processor": several.cpu_s / one.cpu_s,
    }
    console.say_line(
        f"{len(tasks)} tasks cost {ratios['processor']:.2f} x one in processor time, "
        f"{ratios['wall']:.2f} x in wall time"
    )
    if options.json is not None:
        content = {"one": asdict(one), "several": asdict(several), "ratios": ratios}
        write_atomically(options.json, json.dumps(content, indent=1) + "\n")


def measured(run: Path, tasks: tuple[str, ...], overrides: list[str]) -> Measured:
    """Evaluate some tasks from an empty cache.

    Args:
        run: run folder, checkpoint or export.
        tasks: names of the tasks.
        overrides: changes of the config.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [f"eval.cache.path={folder}/features", "eval.num_pictures=0", *overrides]
        on = {task.name for task in open_model(run, words).config.eval.tasks}
        words += [f"eval.tasks.{name}=null" for name in sorted(on - set(tasks))]
        words += [f"eval.tasks.{name}={{}}" for name in tasks if name not in on]
        model = open_model(run, words)
        began, cpu_began = time.perf_counter(), sum(os.times()[:4])
        found = finished.evaluate_model(model, out=Path(folder) / "results").evaluation
        wall_s, cpu_s = time.perf_counter() - began, sum(os.times()[:4]) - cpu_began
    return _measured(tasks, found, wall_s, cpu_s)


def _measured(tasks: tuple[str, ...], found: Evaluation, wall_s: float, cpu_s: float) -> Measured:
    assert found.cost is not None
    missing = set(tasks) - set(found.tasks)
    if missing:
        raise UserError(
            f"the data have no labels for {', '.join(sorted(missing))}; choose other --tasks, or "
            "give eval.scan_labels and eval.landmarks"
        )
    cost = found.cost
    return Measured(tasks, wall_s, cpu_s, cost.num_scans, dict(cost.seconds), cost.features_bytes)


def line_of(found: Measured) -> str:
    """The cost per scan as one line."""
    num = found.num_scans
    parts = ", ".join(f"{name} {value / num:.3f}" for name, value in found.parts_s.items())
    return (
        f"{len(found.tasks)} task{'s' * (len(found.tasks) > 1)}: {num} scans, "
        f"{found.cpu_s / num:.3f} s of processor and {found.wall_s / num:.3f} s per scan "
        f"(features: {parts}); {found.cache_bytes / num / 1e6:.2f} MB per scan in the cache"
    )


if __name__ == "__main__":
    arguments.run(main)
