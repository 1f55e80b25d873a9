"""What the passes over the scans found, in the parts of which results.json is made."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

import tapct
from tapct.base import console
from tapct.base.paths import without_absolute_paths
from tapct.config import to_dict
from tapct.config.plugins import Plugin
from tapct.eval.features.stopwatch import PARTS
from tapct.eval.passes.album import Album
from tapct.eval.passes.reader import ScanReader
from tapct.eval.results import json_file, task_statistics
from tapct.eval.results.json_file import Cost, EvaluatedBackbone, SplitRecord, TaskSection
from tapct.eval.scans.held_out import HeldOut
from tapct.eval.scans.usable import ScanRow


def cost_of(reader: ScanReader) -> Cost:
    """What the features cost; a cache that could be too small is printed."""
    features = reader.features
    num_scans, num_models = len(reader.rows()), len(features.models)
    caveat = features.cache.caveat()
    if caveat:
        console.say(caveat)
    return Cost(
        {part: round(features.stopwatch.seconds[part], 3) for part in PARTS},
        num_scans,
        features.num_extracted,
        max(0, num_scans * num_models - features.num_extracted),
        features.cache.used_bytes(),
        features.cache.size(),
    )


def backbones_of(
    reader: ScanReader, check_others: Mapping[str, Callable[[Sequence[ScanRow]], HeldOut]]
) -> dict[str, EvaluatedBackbone]:
    """Model name -> how it was run."""
    test, found = reader.read_rows("test"), {}
    for model in reader.features.models:
        check = check_others.get(model.name)
        found[model.name] = EvaluatedBackbone(
            model.patch,
            model.blocks,
            to_dict(model.preprocess),
            dataclasses.asdict(model.contract),
            model.key.text,
            None if check is None else check(test).value,
        )
    return found


def sections_of(
    tasks: Sequence[Plugin], reader: ScanReader, num_rows: int, album: Album, seed: int
) -> tuple[dict[str, TaskSection], dict[str, str]]:
    """Task name -> its results, checked against its contract; and the tasks without a result, with
    the reason: those that have failed before, and those whose results are not valid. The work on
    the others is not lost, therefore this is an error only if no task has one.

    Args:
        tasks: tasks with their settings.
        reader: reader whose test scans have been read.
        num_rows: number of accepted scans, usable or not.
        album: pictures of the test scans.
        seed: random seed of the statistics.
    Raises:
        Exception: no task has a result; the error of the last one.
    """
    settings = {plugin.name: to_dict(plugin.config) for plugin in tasks}
    names = [model.name for model in reader.features.models]
    patient_of = {row.id: row.patient for row in reader.read_rows("test")}
    sections: dict[str, TaskSection] = {}
    for task_run in reader.task_runs:
        with reader.failures.caught(task_run.name, "results(), headline() or predicted_scans()"):
            results, headline = task_run.checked_results(names)
            predicted = task_run.task.predicted_scans()
            section = TaskSection(
                config=without_absolute_paths(settings[task_run.name]),
                labels=task_run.task.labels.value,
                num_train=task_run.count(reader.read_rows("train")),
                num_test=task_run.count(reader.read_rows("test")),
                skipped=num_rows - len(task_run.scan_ids),
                headline=headline,
                results=results,
                pictures=tuple(album.of_task.get(task_run.name, ())),
                statistics=task_statistics.of_task(results, headline, predicted, patient_of, seed),
            )
            json_file.check_writable(section)
            sections[task_run.name] = section
    return sections, without_absolute_paths(reader.failures.reasons)


def split_record(
    reader: ScanReader,
    check_held_out: Callable[[Sequence[ScanRow]], HeldOut],
    on_validation: bool,
    chosen_on: Collection[str],
) -> SplitRecord:
    """Which scans were used for what; arguments as of `runner.evaluate`."""
    train, test = reader.read_rows("train"), reader.read_rows("test")
    return SplitRecord(
        mode=reader.split.mode,
        held_out=check_held_out(test),
        train=tuple(row.id for row in train),
        test=tuple(row.id for row in test),
        unread=tuple(reader.unread),
        test_patients=_first_scans(test),
        on_validation=on_validation,
        num_chosen_on=len({row.id for row in test}.intersection(chosen_on)),
    )


def _first_scans(rows: Sequence[ScanRow]) -> tuple[str, ...]:
    """For each scan, the first scan ID of the same patient; empty where the patient is unknown. The
    results show in this way which scans are of one patient, and hold no hash of a patient.
    """
    first: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row.id):
        first.setdefault(row.patient, row.id)
    return tuple(first[row.patient] if row.patient else "" for row in rows)


def versions() -> dict[str, str]:
    """Package -> version, of those that numbers depend on."""
    return {
        "tapct": tapct.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
