"""Evaluation of frozen backbones: scans in, `results.json` and pictures out.

Scans are read one at a time, and every model and task works on a scan before the next one is read.
So memory holds one scan and the features of one model at a time; for a test scan that gets
pictures, the features of all models. The training scans are read once, then the tasks are fitted,
then the test scans are read once.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import tapct
from tapct.base.exits import UserError
from tapct.base.paths import without_absolute_paths
from tapct.config import plugins, setting, to_dict
from tapct.config.plugins import Plugin
from tapct.data.store import Store
from tapct.eval import scans
from tapct.eval.album import Album, Outputs
from tapct.eval.baselines import NamedModel
from tapct.eval.contract import DEFAULT_TASKS
from tapct.eval.features import Preprocess, features_of
from tapct.eval.held_out import HeldOut, no_list
from tapct.eval.reader import Blocks, ScanReader
from tapct.eval.results import Evaluation, Origin, SplitRecord, TaskSection
from tapct.eval.scans import ScanRow, Split, TableLabels
from tapct.eval.task_runs import TaskRun, begin, build_tasks, check_label_settings, usable_rows
from tapct.types import HUContract


@dataclass(frozen=True)
class During:
    """Evaluation while training runs."""

    every: int = setting(
        0,
        "steps between evaluations during training; the checkpoints of these steps and the "
        "last one are evaluated; 0: no evaluation",
        ge=0,
    )
    how: str = setting(
        "process",
        "`process` starts a process beside the first rank, `job` submits a SLURM job",
        choices=("process", "job"),
    )
    device: str = setting(
        "cpu",
        "device of a `process`; cpu leaves the GPUs to training; empty: the run's `device`",
        choices=("", "auto", "cpu", "cuda"),
    )
    wait_s: float = setting(
        600.0,
        "in a SLURM job: how long, in seconds, the first rank waits at the end of training for "
        "a running `process`; the end of the job would otherwise end it",
        ge=0.0,
    )
    sbatch: tuple[str, ...] = setting(
        (), "options of sbatch for a `job`, e.g. --partition=gpu --gres=gpu:1 --time=60"
    )


@dataclass(frozen=True)
class Config:
    """Settings of one evaluation of frozen features."""

    # keys of earlier versions -> what to write now
    renamed: ClassVar[Mapping[str, str]] = {
        "task": "is now the table eval.tasks: write `eval: {tasks: {NAME: {...}}}` in YAML, "
        "eval.tasks.NAME.key=value or 'eval.tasks[my.module].key=value' as an override, and "
        f"eval.tasks.{DEFAULT_TASKS[0]}=null to switch the default task off"
    }

    tasks: tuple[Plugin, ...] = plugins.table(
        "eval.tasks", DEFAULT_TASKS, "benchmarks of the frozen features, all in one pass"
    )
    preprocess: Preprocess = dataclasses.field(
        default_factory=Preprocess,
        metadata={"doc": "how whole scans are prepared for the backbone"},
    )
    only: tuple[str, ...] = setting(
        (), "patterns that the paths of evaluated scans must match, e.g. `ts_body/*`; empty: all"
    )
    test_share: float = setting(
        0.5, "share of the patients that are test patients; at least one patient", gt=0, lt=1
    )
    max_scans: int = setting(0, "maximum number of scans, train and test together; 0: all", ge=0)
    seed: int = setting(
        0, "random seed of the split and of the choice of training patches", ge=0, lt=2**63
    )
    num_blocks: int = setting(
        8,
        "number of slabs along z that a scan is divided into if all scans are of one patient",
        ge=2,
    )
    block_gap: int = setting(2, "number of patch slices that are left out between two slabs", ge=0)
    num_pictures: int = setting(
        2, "number of test scans with pictures of each task and of the patch features", ge=0
    )
    batch: int = setting(8, "windows per forward call", ge=1)
    scan_labels: str = setting(
        "",
        "CSV file with values for scans as a whole: a column `path`, `case_id` or `id`, and one "
        "column per target; empty: none",
    )
    landmarks: str = setting(
        "",
        "CSV file with named points: a column `path`, `case_id` or `id`, a column `name`, and "
        "z_mm, y_mm, x_mm (LPS) or z_voxel, y_voxel, x_voxel; empty: none",
    )
    split_column: str = setting(
        "auto",
        "column of `scan_labels` with the official split (train, val or test); auto: `split`, or "
        "else `fold0`, where there is one; none: the scans are divided by patient",
    )
    during: During = dataclasses.field(
        default_factory=During, metadata={"doc": "evaluation while training runs"}
    )


def evaluate(
    models: Sequence[NamedModel],
    rows: Sequence[ScanRow],
    store: Store,
    config: Config,
    *,
    contract: HUContract,
    out: Path,
    preprocess: Preprocess | None = None,
    held_out: Collection[str] = (),
    check_held_out: Callable[[Sequence[ScanRow]], HeldOut] = no_list,
    tables: TableLabels | None = None,
    origin: Origin | None = None,
    max_skips: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate frozen backbones on the same scans, windows, grid and labels.

    Args:
        models: at least one, on `device`, all with the same patch; the first one comes first in
            the pictures.
        rows: accepted scans; each task uses those that have the labels it needs.
        store: packed scans and labels, which are all that is read.
        config: tasks, split and preprocessing.
        contract: HU to network input.
        out: folder for `results.json` and `pictures/`; made if missing, `results.json` is
            replaced atomically.
        preprocess: preprocessing instead of the config's, e.g. the one stored in an export.
        held_out: patients kept out of pretraining. If some of the usable scans are theirs and some
            are not, these patients are the test set; else patients are drawn by `test_share`.
        check_held_out: function that finds the test scans that were trained on.
        tables: labels that come from tables, for tasks that need `Labels.SCAN` or
            `Labels.LANDMARKS`, and the official split if there is one.
        origin: data, weights and command, kept in the results.
        max_skips: largest number of scans that are skipped because they cannot be read.
        device: device that scans are prepared on.
        progress: called with (scans done, scans in all).
    Returns:
        What `results.json` holds.
    Raises:
        UserError: no task, no usable scan, a setting that names an unknown label, models that
            differ in patch, windows off the patch grid, or too many scans that cannot be read.
    """
    began = time.perf_counter()
    preprocess = preprocess or config.preprocess
    patch = _common_patch(models)
    preprocess.check_patch(patch)
    rows = scans.matching(rows, config.only)
    tables = tables or TableLabels()
    task_runs, split = _plan(config, rows, store, held_out, tables)
    reader = ScanReader(
        split,
        store,
        task_runs,
        tables,
        contract=contract,
        preprocess=preprocess,
        patch=patch,
        device=torch.device(device),
        blocks=Blocks(config.num_blocks, config.block_gap),
        max_skips=max_skips,
        progress=progress,
    )
    _learn(reader, models, config)
    album = _test(reader, models, config, out)
    evaluation = Evaluation(
        tasks=_sections(config, reader, models, num_rows=len(rows), album=album),
        split=_record(reader, check_held_out),
        preprocess=to_dict(preprocess),
        patch=patch,
        seed=config.seed,
        pca=tuple(album.pca),
        origin=dataclasses.replace(origin or Origin(), versions=_versions()),
        seconds=round(time.perf_counter() - began, 2),
    )
    evaluation.write(out)
    return evaluation


def _plan(
    config: Config,
    rows: Sequence[ScanRow],
    store: Store,
    held_out: Collection[str],
    tables: TableLabels,
) -> tuple[list[TaskRun], Split]:
    """The tasks that have scans, begun, and the split of the scans; arguments as of `evaluate`."""
    tasks = build_tasks(config.tasks, config.seed)
    rows_of_task = usable_rows(tasks, rows, tables)
    for name, chosen in rows_of_task.items():
        check_label_settings(name, tasks[name], chosen, store)
    split = scans.split_for_tasks(
        list(rows_of_task.values()),
        test_share=config.test_share,
        max_scans=config.max_scans,
        seed=config.seed,
        held_out=held_out,
        sides=tables.sides,
    )
    return [begin(name, tasks[name], rows_of_task[name], split) for name in rows_of_task], split


def _learn(reader: ScanReader, models: Sequence[NamedModel], config: Config) -> None:
    """Read the training scans once, for all models and tasks, and fit the tasks."""
    tasks = {each.name: each.task for each in reader.task_runs}
    for scan in reader.train():
        for model in models:
            dense = features_of(model.model, scan.prepared, reader.preprocess, batch=config.batch)
            for name, truth in scan.truths.items():
                tasks[name].learn(model.name, dense, truth)
    for task in tasks.values():
        task.fit()


def _test(reader: ScanReader, models: Sequence[NamedModel], config: Config, out: Path) -> Album:
    """Read the test scans once; returns the pictures of the first few."""
    album, tasks = Album(out), {each.name: each.task for each in reader.task_runs}
    for number, scan in enumerate(reader.test()):
        gets_pictures = number < config.num_pictures
        outputs = Outputs()
        for model in models:
            dense = features_of(model.model, scan.prepared, reader.preprocess, batch=config.batch)
            for name, truth in scan.truths.items():
                prediction = tasks[name].judge(model.name, dense, truth)
                if gets_pictures:
                    outputs.predictions.setdefault(name, {})[model.name] = prediction
            if gets_pictures:
                outputs.dense[model.name] = dense
        if gets_pictures:
            album.add(scan.labelled, scan.truths, tasks, outputs)
    return album


def _sections(
    config: Config,
    reader: ScanReader,
    models: Sequence[NamedModel],
    num_rows: int,
    album: Album,
) -> dict[str, TaskSection]:
    """Task name -> its results, checked against its contract.

    Args:
        config: settings of the evaluation.
        reader: reader whose test scans have been read.
        models: models that were evaluated.
        num_rows: number of accepted scans, usable or not.
        album: pictures of the test scans.
    Raises:
        UserError: a headline has values for a model that was not evaluated.
    """
    settings = {plugin.name: to_dict(plugin.config) for plugin in config.tasks}
    sections: dict[str, TaskSection] = {}
    for task_run in reader.task_runs:
        results, headline = task_run.checked_results([model.name for model in models])
        sections[task_run.name] = TaskSection(
            config=without_absolute_paths(settings[task_run.name]),
            labels=task_run.task.labels.value,
            num_train=task_run.count(reader.read_rows("train")),
            num_test=task_run.count(reader.read_rows("test")),
            skipped=num_rows - len(task_run.scan_ids),
            headline=headline,
            results=results,
            pictures=tuple(album.of_task.get(task_run.name, ())),
        )
    return sections


def _record(
    reader: ScanReader, check_held_out: Callable[[Sequence[ScanRow]], HeldOut]
) -> SplitRecord:
    train, test = reader.read_rows("train"), reader.read_rows("test")
    return SplitRecord(
        mode=reader.split.mode,
        held_out=check_held_out(test),
        train=tuple(row.id for row in train),
        test=tuple(row.id for row in test),
        unread=tuple(reader.unread),
    )


def _versions() -> dict[str, str]:
    return {
        "tapct": tapct.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def _common_patch(models: Sequence[NamedModel]) -> tuple[int, int, int]:
    patches: dict[tuple[int, ...], str] = {}
    for model in models:
        sides: Sequence[int] = model.model.patch  # type: ignore[assignment]
        patches[tuple(int(side) for side in sides)] = model.name
    if len(patches) != 1:
        named = [f"{name} {'x'.join(map(str, patch))}" for patch, name in patches.items()]
        raise UserError(
            f"models of one evaluation must share one patch, got {', '.join(named) or 'none'}. "
            "Evaluate them in separate runs."
        )
    z, y, x = next(iter(patches))
    return z, y, x
