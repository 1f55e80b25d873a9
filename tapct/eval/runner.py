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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import tapct
from tapct.base import console
from tapct.base.exits import UserError
from tapct.config import plugins, setting, to_dict
from tapct.config.plugins import Plugin
from tapct.data.store import Store
from tapct.eval import pictures, scans
from tapct.eval.baselines import NamedModel
from tapct.eval.contract import DEFAULT_TASKS, Labels, Task
from tapct.eval.features import DenseFeatures, PatchGrid, Prepared, Preprocess, features_of, prepare
from tapct.eval.results import Evaluation, Picture, SplitRecord, TaskSection
from tapct.eval.scans import LabelledScan, ScanLabels, ScanRow, Split
from tapct.run_folder import EvaluationFolder
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
    seed: int = setting(0, "random seed of the split and of the choice of training patches")
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
    scan_labels: ScanLabels | None = None,
    command: str = "",
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
        scan_labels: values for scans as a whole, for tasks that need `Labels.SCAN`.
        command: command line, kept in the results.
        device: device that scans are prepared on.
        progress: called with (scans done, scans in all).
    Returns:
        What `results.json` holds.
    Raises:
        UserError: no task, no usable scan, models that differ in patch, windows off the patch grid.
    """
    began = time.perf_counter()
    preprocess = preprocess or config.preprocess
    patch = _common_patch(models)
    preprocess.check_patch(patch)
    rows = scans.matching(rows, config.only)
    tasks = _build_tasks(config)
    rows_of_task = _usable_rows(tasks, rows, scan_labels)
    split = scans.split_for_tasks(
        list(rows_of_task.values()),
        test_share=config.test_share,
        max_scans=config.max_scans,
        seed=config.seed,
        held_out=held_out,
    )
    run = _Run(
        config=config,
        split=split,
        store=store,
        contract=contract,
        preprocess=preprocess,
        patch=patch,
        device=torch.device(device),
        task_runs=[_begin(name, tasks[name], rows_of_task[name], split) for name in rows_of_task],
        scan_labels=scan_labels or {},
        progress=progress,
    )
    _learn(run, models)
    album = _test(run, models, out)
    evaluation = Evaluation(
        tasks=_sections(run, models, num_rows=len(rows), album=album),
        split=_record(split),
        preprocess=to_dict(preprocess),
        patch=patch,
        seed=config.seed,
        pca=tuple(album.pca),
        versions=_versions(),
        command=command,
        seconds=round(time.perf_counter() - began, 2),
    )
    evaluation.write(out)
    return evaluation


def _learn(run: _Run, models: Sequence[NamedModel]) -> None:
    """Read the training scans once, for all models and tasks, and fit the tasks."""
    for scan in run.prepared_scans(test=False):
        for model in models:
            dense = run.features(model, scan)
            for name, truth in scan.truths.items():
                run.task(name).learn(model.name, dense, truth)
    for task_run in run.task_runs:
        task_run.task.fit()


def _test(run: _Run, models: Sequence[NamedModel], out: Path) -> _Album:
    """Read the test scans once; returns the pictures of the first few."""
    album = _Album(out)
    for number, scan in enumerate(run.prepared_scans(test=True)):
        gets_pictures = number < run.config.num_pictures
        outputs = _Outputs()
        for model in models:
            dense = run.features(model, scan)
            for name, truth in scan.truths.items():
                prediction = run.task(name).judge(model.name, dense, truth)
                if gets_pictures:
                    outputs.predictions.setdefault(name, {})[model.name] = prediction
            if gets_pictures:
                outputs.dense[model.name] = dense
        if gets_pictures:
            album.add(run, scan, outputs)
    return album


@dataclass(frozen=True)
class _TaskRun:
    """A task and the scans that it can use.

    Args:
        name: name of the task's plug-in.
        task: the task.
        scan_ids: IDs of the scans that have the labels it needs.
        num_train: number of them that it learns from.
        num_test: number of them that it evaluates.
    """

    name: str
    task: Task[Any, Any]
    scan_ids: frozenset[str]
    num_train: int
    num_test: int


@dataclass(frozen=True)
class _PreparedScan:
    """One scan, with everything that is the same for all models.

    Args:
        labelled: voxels and labels.
        prepared: input of the backbones.
        truths: task name -> what its `truth` returned.
    """

    labelled: LabelledScan
    prepared: Prepared
    truths: Mapping[str, Any]


@dataclass(frozen=True)
class _Outputs:
    """Features and predictions of one test scan, kept until its pictures are drawn."""

    dense: dict[str, DenseFeatures] = dataclasses.field(default_factory=dict)
    predictions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """The inputs of one evaluation; arguments as of `evaluate`."""

    config: Config
    split: Split
    store: Store
    contract: HUContract
    preprocess: Preprocess
    patch: tuple[int, int, int]
    device: torch.device
    task_runs: Sequence[_TaskRun]
    scan_labels: ScanLabels
    progress: Callable[[int, int], None] | None

    def task(self, name: str) -> Task[Any, Any]:
        return next(task_run.task for task_run in self.task_runs if task_run.name == name)

    def prepared_scans(self, *, test: bool) -> Iterator[_PreparedScan]:
        """Read and prepare the test scans, or else the training scans, one at a time."""
        rows = self.split.test if test else self.split.train
        num_before = len(self.split.train) if test else 0
        total = len(self.split.train) + len(self.split.test)
        for number, row in enumerate(rows, start=1):
            task_runs = [each for each in self.task_runs if row.id in each.scan_ids]
            need_map = [each.task.labels in (Labels.VOXELS, Labels.PAIRS) for each in task_runs]
            labelled = scans.read_scan(
                row,
                self.store,
                with_labels=any(need_map),
                scan_labels=self.scan_labels.get(row.id),
            )
            volume = labelled.volume
            prepared = prepare(
                volume.hu_ZYX,
                self.contract,
                self.preprocess,
                self.patch,
                self.device,
                volume.spacing_mm,
            )
            in_play_Z = self._in_play(prepared.grid, labelled.id, test=test)
            truths = {}
            for task_run in task_runs:
                truth = task_run.task.truth(labelled, prepared.grid, in_play_Z)
                truths[task_run.name] = truth
            yield _PreparedScan(labelled, prepared, truths)
            if self.progress:
                self.progress(num_before + number, total)

    def features(self, model: NamedModel, scan: _PreparedScan) -> DenseFeatures:
        return features_of(model.model, scan.prepared, self.preprocess, batch=self.config.batch)

    def _in_play(self, grid: PatchGrid, scan_id: str, *, test: bool) -> np.ndarray:
        """Slices of patches that this side of the split may use: bool (Z,)."""
        if self.split.mode == scans.PATIENTS:
            return np.ones(grid.shape[0], dtype=bool)
        return scans.block_slices(
            grid.shape[0],
            test=test,
            num_blocks=self.config.num_blocks,
            gap=self.config.block_gap,
            scan_id=scan_id,
        )


class _Album:
    """Draws the pictures of test scans and keeps their entries for the results.

    Args:
        out: folder of results.json.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, EvaluationFolder(out).pictures
        self.of_task: dict[str, list[Picture]] = {}
        self.pca: list[Picture] = []

    def add(self, run: _Run, scan: _PreparedScan, outputs: _Outputs) -> None:
        """Draw one picture per task and one of the features of all models."""
        scan_id, volume = scan.labelled.id, scan.labelled.volume
        slices: tuple[int, int] | None = None  # axial and coronal slice of the feature picture
        for name, truth in scan.truths.items():
            task, file = run.task(name), self.folder / name / f"{scan_id}.png"
            caption = task.draw(file, truth, outputs.predictions[name])
            if caption:
                picture = Picture(scan_id, self.below_out(file), caption)
                self.of_task.setdefault(name, []).append(picture)
            # the first task that names slices decides
            slices = slices or task.slices_of_interest(truth)
        if slices is None:
            depth, height, _ = volume.hu_ZYX.shape
            slices = (depth // 2, height // 2)
        file = self.folder / f"{scan_id}_features.png"
        columns = [(name.replace("_", " "), dense) for name, dense in outputs.dense.items()]
        pictures.draw_pca(file, volume.hu_ZYX, volume.spacing_mm, columns, slices)
        caption = f"first three principal components of the patch features of {scan_id}"
        self.pca.append(Picture(scan_id, self.below_out(file), caption))

    def below_out(self, file: Path) -> str:
        """Path of a picture as results.json holds it."""
        return file.relative_to(self.out).as_posix()


def _build_tasks(config: Config) -> dict[str, Task[Any, Any]]:
    """Build the tasks of a config by name, in its order.

    Raises:
        UserError: no task is on, or what a module builds is no task.
    """
    if not config.tasks:
        raise UserError(f"eval.tasks has no task; write e.g. eval.tasks.{DEFAULT_TASKS[0]}={{}}")
    tasks: dict[str, Task[Any, Any]] = {}
    for plugin in config.tasks:
        task = plugins.load("eval.tasks", plugin.name).build(plugin.config, seed=config.seed)
        if not isinstance(task, Task) or not isinstance(getattr(task, "labels", None), Labels):
            raise UserError(
                f"task {plugin.name}: build() returned a {type(task).__name__}; it must return an "
                "object of a class that derives from tapct.extend.Task and sets `labels`"
            )
        tasks[plugin.name] = task
    return tasks


def _usable_rows(
    tasks: Mapping[str, Task[Any, Any]], rows: Sequence[ScanRow], scan_labels: ScanLabels | None
) -> dict[str, list[ScanRow]]:
    """Task name -> the scans that it can use. A task without any is left out, and a line about it
    is printed.

    Raises:
        UserError: no task has a scan.
    """
    rows_of_task: dict[str, list[ScanRow]] = {}
    missing: list[str] = []
    for name, task in tasks.items():
        chosen = scans.usable(rows, task.labels, scan_labels)
        what = scans.what_is_missing(task.labels)
        if not chosen:
            how = scans.how_to_label(task.labels)
            missing.append(f"{name}: none of the {len(rows)} accepted scans has a {what}: {how}")
            continue
        if len(chosen) < len(rows):
            num = len(rows) - len(chosen)
            console.say(f"{name}: {num} of {len(rows)} scans have no {what} and are skipped")
        rows_of_task[name] = chosen
    if not rows_of_task:
        raise UserError("; ".join(missing))
    for line in missing:
        console.say(f"{line}. The task is skipped")
    return rows_of_task


def _begin(name: str, task: Task[Any, Any], rows: Sequence[ScanRow], split: Split) -> _TaskRun:
    """Start a task on the scans of the split that it can use.

    Args:
        name: name of the task's plug-in.
        task: the task.
        rows: scans that it can use.
        split: training and test scans of all tasks.
    Raises:
        UserError: it can use no training scan or no test scan, or it cannot work within one
            patient.
    """
    scan_ids = frozenset(row.id for row in rows)
    num_train = sum(row.id in scan_ids for row in split.train)
    num_test = sum(row.id in scan_ids for row in split.test)
    if not num_train or not num_test:
        raise UserError(
            f"task {name} has {num_train} training and {num_test} test scans; it needs one of "
            "each. Raise eval.max_scans, change eval.test_share, or switch the task off with "
            f"eval.tasks[{name}]=null"
        )
    if split.mode == scans.BLOCKS and task.labels in (Labels.SCAN, Labels.PAIRS):
        raise UserError(
            f"task {name} needs labelled scans of several patients, but all of its scans are of "
            "one patient. Index scans of a second patient, or switch the task off "
            f"with eval.tasks[{name}]=null"
        )
    task.begin(num_train)
    return _TaskRun(name, task, scan_ids, num_train, num_test)


def _sections(
    run: _Run, models: Sequence[NamedModel], num_rows: int, album: _Album
) -> dict[str, TaskSection]:
    """Task name -> its results, checked against its contract.

    Args:
        run: evaluation whose test scans have been read.
        models: models that were evaluated.
        num_rows: number of accepted scans, usable or not.
        album: pictures of the test scans.
    Raises:
        UserError: a headline has values for a model that was not evaluated.
    """
    settings = {plugin.name: to_dict(plugin.config) for plugin in run.config.tasks}
    sections: dict[str, TaskSection] = {}
    for task_run in run.task_runs:
        results, headline = task_run.task.results(), task_run.task.headline()
        unknown = set(headline.values) - {model.name for model in models}
        if unknown:
            raise UserError(
                f"task {task_run.name}: its headline has values for {', '.join(sorted(unknown))}; "
                f"the models are {', '.join(model.name for model in models)}"
            )
        sections[task_run.name] = TaskSection(
            config=settings[task_run.name],
            labels=task_run.task.labels.value,
            num_train=task_run.num_train,
            num_test=task_run.num_test,
            skipped=num_rows - len(task_run.scan_ids),
            headline=headline,
            results=results,
            pictures=tuple(album.of_task.get(task_run.name, ())),
        )
    return sections


def _record(split: Split) -> SplitRecord:
    return SplitRecord(
        mode=split.mode,
        held_out_from_pretraining=split.held_out,
        train=tuple(row.id for row in split.train),
        test=tuple(row.id for row in split.test),
        note=scans.BLOCKS_NOTE if split.mode == scans.BLOCKS else "",
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
