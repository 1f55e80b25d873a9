"""Evaluation of frozen backbones: scans in, `results.json` and pictures out.

    1. features   scans with missing features are read, once for all models, into the feature cache
    2. learn      features of the training scans come from the cache, then the tasks are fitted
    3. evaluate   features of the test scans come from the cache

So a second evaluation with other tasks reads no scan, except where a task needs the HU themselves.
Memory holds the features of one model on one scan at a time, and small ones of the next; for a test
scan that gets pictures, the features of all models.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.base.paths import without_absolute_paths
from tapct.config import plugins, setting, to_dict
from tapct.config.plugins import Plugin
from tapct.data.index.share import WHOLE, Share
from tapct.data.packed.store import Store
from tapct.eval import cache
from tapct.eval.cache import FeatureCache
from tapct.eval.contract import DEFAULT_TASKS
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.labels.prediction_files import PredictionFiles
from tapct.eval.models import baselines
from tapct.eval.models.evaluated import NamedModel, settle
from tapct.eval.passes.album import Album, Outputs
from tapct.eval.passes.fill import Features
from tapct.eval.passes.outcome import backbones_of, cost_of, sections_of, split_record, versions
from tapct.eval.passes.reader import Blocks, ScanReader
from tapct.eval.passes.task_runs import (
    TaskRun,
    begin,
    build_tasks,
    check_label_settings,
    check_model_names,
    usable_rows,
)
from tapct.eval.results.csv_file import machine, rows_of, write_csv
from tapct.eval.results.json_file import Evaluation, Origin
from tapct.eval.results.over_steps import split_settings
from tapct.eval.scans import validation
from tapct.eval.scans.held_out import HeldOut, no_list
from tapct.eval.scans.labelled_scan import TableLabels
from tapct.eval.scans.train_test import Split, patients_together, split_for_tasks
from tapct.eval.scans.usable import ScanRow, of_paths
from tapct.run_folder import EvaluationFolder, features_beside
from tapct.types import HUContract


@dataclass(frozen=True)
class During:
    """Evaluation while training runs."""

    every: int = setting(
        0,
        "number of steps from one evaluation during training to the next; the last checkpoint is "
        "evaluated too; 0: no evaluation",
        ge=0,
    )
    how: str = setting(
        "process",
        "`process` starts a process beside the first rank, `job` submits a SLURM job",
        choices=("process", "job"),
    )
    best: str = setting(
        "",
        "task whose headline chooses the best checkpoint, which is kept; empty: the first task of "
        "eval.tasks",
    )
    device: str = setting(
        "cpu",
        "device of a `process`; cpu leaves the GPUs to training; empty: the run's `device`",
        choices=("", "auto", "cpu", "cuda"),
    )
    wait_s: float = setting(
        600.0,
        "in a job of SLURM, PBS or another scheduler: how many seconds the first rank waits at "
        "the end of training for an evaluation that is still running as a `process`; without this "
        "wait, the evaluation would end with the job",
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
        (),
        "only scans whose path matches one of these patterns are evaluated, e.g. `ts_body/*`; "
        "empty: all scans",
    )
    test_share: float = setting(
        0.5, "share of the patients that are test patients; at least one patient", gt=0, lt=1
    )
    validation_share: float = setting(
        0.0,
        "share of the test patients that become validation patients. Evaluations during training, "
        "by which the best checkpoint is chosen, test on the validation patients; all other "
        "evaluations test on the other test patients. 0: all evaluations test on the same patients",
        ge=0,
        lt=1,
    )
    max_scans: int = setting(0, "maximum number of scans, train and test together; 0: all", ge=0)
    seed: int = setting(
        0, "random seed of the split and of the choice of training patches", ge=0, lt=2**63
    )
    num_blocks: int = setting(
        8,
        "number of parts along z that a scan is divided into if all scans are of one patient",
        ge=2,
    )
    block_gap: int = setting(2, "number of patch slices that are left out between two parts", ge=0)
    num_pictures: int = setting(
        2,
        "number of test scans of which pictures are made, for each task and of the patch features",
        ge=0,
    )
    batch: int = setting(8, "number of windows in one forward pass", ge=1)
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
        "else `fold0`, if the table has one of them; none: the scans are divided by patient",
    )
    baselines: tuple[str, ...] = setting(
        baselines.DEFAULTS,
        f"models that the pretrained one is compared with: {', '.join(baselines.NAMES)}; random_2x "
        "and random_4x have 2 and 4 times the channels, so their features take about 4 and 16 "
        "times as long, once",
    )
    cache: cache.Config = dataclasses.field(
        default_factory=cache.Config, metadata={"doc": "where features are kept"}
    )
    during: During = dataclasses.field(
        default_factory=During, metadata={"doc": "evaluation while training runs"}
    )

    def __post_init__(self) -> None:
        baselines.check_names(self.baselines)


def evaluate(
    models: Sequence[NamedModel],
    rows: Sequence[ScanRow],
    store: Store,
    config: Config,
    *,
    contract: HUContract,
    out: Path,
    preprocess: Preprocess | None = None,
    features: Path | None = None,
    held_out: Collection[str] = (),
    check_held_out: Callable[[Sequence[ScanRow]], HeldOut] = no_list,
    check_others: Mapping[str, Callable[[Sequence[ScanRow]], HeldOut]] | None = None,
    tables: TableLabels | None = None,
    on_validation: bool = False,
    split_seed: int = 0,
    chosen_on: Collection[str] = (),
    origin: Origin | None = None,
    max_skips: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    share: Share = WHOLE,
) -> Evaluation:
    """Evaluate frozen backbones on the same scans and labels.

    Args:
        models: at least one, on `device`; the first one comes first in the pictures. They may
            differ in patch, HU contract and preprocessing.
        rows: accepted scans; each task uses those that have the labels it needs.
        store: packed scans and labels, which are all that is read.
        config: tasks, split and preprocessing.
        contract: HU to network input, of models without their own.
        out: folder for `results.json`, `results.csv` and `pictures/`; made if missing, files are
            replaced atomically.
        preprocess: preprocessing instead of the config's, e.g. the one stored in an export; of
            models without their own.
        features: folder of the feature cache where `config.cache` names none; None for
            OUT/features.
        held_out: patients kept out of pretraining. If some of the usable scans are theirs and some
            are not, these patients are the test set; else patients are drawn by `test_share`.
        check_held_out: function that finds the test scans that were trained on.
        check_others: the same for further models, by name.
        tables: labels that come from tables, for tasks that need `Labels.SCAN` or
            `Labels.LANDMARKS`, and the official split if there is one.
        on_validation: whether to test on the validation patients of `config.validation_share`.
        split_seed: seed by which validation patients are chosen, `data.split_seed`.
        chosen_on: IDs of the scans on which the weights were chosen among those of other steps.
        origin: data, weights and command, kept in the results.
        max_skips: largest number of scans that are skipped because they cannot be read.
        device: device that features are computed on.
        progress: called with (steps done, steps in all): a step is a pair of scan and model whose
            features are computed, or a scan that the tasks have seen.
        share: scans whose features this process computes, for several that compute at once; a last
            call for the whole computes what is left and evaluates.
    Returns:
        What `results.json` holds; a task that has no result is named in `without_result`, and a
        model whose features cannot be computed in `models_without_result`.
    Raises:
        UserError: no task, no usable scan, no task with a result, a setting that names an unknown
            label, windows off the patch grid, features of the first model that are not finite, or
            too many scans that cannot be read.
        Exception: the error of the first model, or of the last task that is left.
        ShareComputed: the features of a share are in the cache.
    """
    began = time.perf_counter()
    preprocess = preprocess or config.preprocess
    rows = of_paths(rows, config.only)
    tables = tables or TableLabels()
    task_runs, split = _plan(
        config, rows, store, held_out, tables, on_validation=on_validation, split_seed=split_seed
    )
    check_model_names(task_runs, [model.name for model in models])
    settled = settle(
        models,
        [(each.name, each.task) for each in task_runs],
        contract=contract,
        preprocess=preprocess,
        device=torch.device(device),
    )
    folder = config.cache.path or features or features_beside(out)
    feature_cache = FeatureCache(folder, config.cache.quota_gb)
    with feature_cache.in_use([model.key for model in settled]):
        found = Features(
            settled, store, feature_cache, batch=config.batch, device=torch.device(device)
        )
        reader = ScanReader(
            split,
            store,
            task_runs,
            tables,
            features=found,
            blocks=Blocks(config.num_blocks, config.block_gap),
            max_skips=max_skips,
        )
        steps = _fill(reader, progress, share)
        failed = {name: without_absolute_paths(why) for name, why in found.failures.reasons.items()}
        if share != WHOLE:
            if failed:
                names = ", ".join(failed)
                raise UserError(
                    "the features of this part are computed, except those of "
                    f"{counted(len(failed), 'model')}: {names}; the lines above give the reasons"
                )
            raise ShareComputed
        _learn(reader, steps)
        album = _test(reader, config, out, steps)
        cost = cost_of(reader)
    sections, without_result = sections_of(
        config.tasks, reader, num_rows=len(rows), album=album, seed=config.seed
    )
    evaluation = Evaluation(
        tasks=sections,
        without_result=without_result,
        models_without_result=failed,
        split=split_record(reader, check_held_out, on_validation, chosen_on),
        preprocess=to_dict(settled[0].preprocess),
        patch=settled[0].patch,
        seed=config.seed,
        pca=tuple(album.pca),
        volumes=tuple(album.volumes),
        origin=dataclasses.replace(
            origin or Origin(), versions=versions(), machine=machine(torch.device(device))
        ),
        seconds=round(time.perf_counter() - began, 2),
        backbones=backbones_of(reader, check_others or {}),
        cost=cost,
        settings=split_settings(to_dict(config)),
    )
    evaluation.write(out)
    write_csv(EvaluationFolder(out).table, rows_of(evaluation))
    return evaluation


class _Steps:
    """Counts the steps of an evaluation for the progress bar."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, num: int = 1) -> None:
        """Count finished steps."""
        self.done += num
        if self.progress:
            self.progress(self.done, self.total)


def _plan(
    config: Config,
    rows: Sequence[ScanRow],
    store: Store,
    held_out: Collection[str],
    tables: TableLabels,
    *,
    on_validation: bool,
    split_seed: int,
) -> tuple[list[TaskRun], Split]:
    """The tasks that have scans, begun, and the split of the scans; arguments as of `evaluate`."""
    tasks = build_tasks(config.tasks, config.seed)
    rows_of_task = usable_rows(tasks, rows, tables)
    for name, chosen in rows_of_task.items():
        check_label_settings(name, tasks[name], chosen, store)
    split = split_for_tasks(
        list(rows_of_task.values()),
        test_share=config.test_share,
        max_scans=config.max_scans,
        seed=config.seed,
        held_out=held_out,
        sides=tables.sides,
    )
    if config.validation_share:
        split = validation.divided(
            split,
            config.validation_share,
            split_seed,
            on_validation=on_validation,
            sides=tables.sides,
        )
    split = patients_together(split)
    begun = [begin(name, tasks[name], rows, split, tables) for name, rows in rows_of_task.items()]
    return begun, split


class ShareComputed(Exception):
    """A share of the features has been computed, and nothing was evaluated."""


def _fill(reader: ScanReader, progress: Callable[[int, int], None] | None, share: Share) -> _Steps:
    """Compute the features of a share of the scans that are missing in the cache."""
    features = reader.features
    wanted = [one for one in features.missing(reader.rows()) if share.has(one.scan.id)]
    num_missing = sum(len(one.blocks) for one in wanted)
    num_scans = len(reader.split.train) + len(reader.split.test)
    steps = _Steps(num_missing + num_scans, progress)
    features.fill(wanted, check=reader.check_skips, done=steps.add)
    features.release()
    return steps


def _learn(reader: ScanReader, steps: _Steps) -> None:
    """Hand the training scans to the tasks, and fit them."""
    failures = reader.failures
    for one in reader.on_side("train"):
        for each in reader.task_runs:
            if each.name in one.truths:
                with failures.caught(each.name, f"learn() of {one.place}"):
                    each.task.learn(one.model.name, one.dense, one.truths[each.name])
        if one.is_last:
            steps.add()
        del one  # its features, before the next ones are read
    for each in reader.task_runs:
        with failures.caught(each.name, "fit()"):
            each.task.fit()


def _test(reader: ScanReader, config: Config, out: Path, steps: _Steps) -> Album:
    """Hand the test scans to the tasks; returns the pictures of the first few."""
    album, failures = Album(out), reader.failures
    label_maps = PredictionFiles(EvaluationFolder(out).predictions, reader.store)
    outputs, number = Outputs(), 0
    for one in reader.on_side("test"):
        gets_pictures = number < config.num_pictures
        for each in reader.task_runs:
            if each.name not in one.truths:
                continue
            task, truth = each.task, one.truths[each.name]
            with failures.caught(each.name, f"judge() of {one.place}"):
                prediction = task.judge(one.model.name, one.dense, truth)
                if gets_pictures:
                    outputs.add(each.name, one, prediction)
            if each.name not in failures.left:
                continue
            with failures.caught(each.name, f"label_map() of {one.place}"):
                labels = task.label_map(truth, prediction)
                if labels is not None:
                    label_maps.write(
                        each.name,
                        one.model.name,
                        one.scan.labelled.id,
                        labels,
                        task.prediction_format,
                    )
        if gets_pictures:
            outputs.dense[one.model.name] = one.dense
        if one.is_last:
            if gets_pictures:
                tasks = {each.name: each.task for each in reader.task_runs}
                album.add(one.scan.labelled, one.scan.truths, tasks, outputs)
            outputs, number = Outputs(), number + 1
            steps.add()
        del one
    label_maps.report()
    if config.num_pictures:
        album.add_results({each.name: each.task for each in reader.task_runs})
    return album
