"""Evaluation of frozen backbones: scans in, `results.json` and pictures out.

Scans are read one at a time and each is seen by every model and task before the next, so memory
holds one scan however many there are. Training scans are passed once, tasks are fitted, then test
scans are passed once.
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
    root: Path,
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
        root: folder that the rows' paths are relative to.
        config: tasks, split and preprocessing.
        contract: HU to network input.
        out: folder for `results.json` and `pictures/`; made if missing, `results.json` is
            replaced atomically.
        preprocess: preprocessing instead of the config's, e.g. the one stored in an export.
        held_out: patients kept out of pretraining: the test side where usable scans lie on both
            sides.
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
    usable = _usable_scans(tasks, rows, scan_labels)
    split = scans.split_for_tasks(
        list(usable.values()),
        test_share=config.test_share,
        max_scans=config.max_scans,
        seed=config.seed,
        held_out=held_out,
    )
    running = [_begin(name, tasks[name], chosen, split) for name, chosen in usable.items()]
    run = _Run(
        config, split, root, contract, preprocess, patch, torch.device(device), running, progress
    )
    _learn(run, models, scan_labels)
    drawn = _test(run, models, scan_labels, out)
    settings = {plugin.name: to_dict(plugin.config) for plugin in config.tasks}
    sections = {}
    for one in running:
        skipped = len(rows) - len(usable[one.name])
        pictures_of = tuple(drawn.of_task.get(one.name, ()))
        sections[one.name] = _section(one, models, settings[one.name], skipped, pictures_of)
    evaluation = Evaluation(
        sections,
        _record(split),
        to_dict(preprocess),
        patch,
        config.seed,
        tuple(drawn.pca),
        _versions(),
        command,
        round(time.perf_counter() - began, 2),
    )
    evaluation.write(out)
    return evaluation


def _learn(run: _Run, models: Sequence[NamedModel], scan_labels: ScanLabels | None) -> None:
    """Pass over the training scans once, for all models and tasks, and fit the tasks."""
    for scan in run.scans(test=False, scan_labels=scan_labels):
        for model in models:
            dense = run.features(model, scan)
            for name, truth in scan.truths.items():
                run.task(name).learn(model.name, dense, truth)
    for one in run.tasks:
        one.task.fit()


def _test(
    run: _Run, models: Sequence[NamedModel], scan_labels: ScanLabels | None, out: Path
) -> _Drawn:
    """Pass over the test scans once; returns the pictures of the first few."""
    drawn = _Drawn(out)
    for number, scan in enumerate(run.scans(test=True, scan_labels=scan_labels)):
        is_drawn = number < run.config.num_pictures
        outputs = _Outputs()
        for model in models:
            dense = run.features(model, scan)
            for name, truth in scan.truths.items():
                prediction = run.task(name).judge(model.name, dense, truth)
                if is_drawn:
                    outputs.predictions.setdefault(name, {})[model.name] = prediction
            if is_drawn:
                outputs.dense[model.name] = dense
        if is_drawn:
            drawn.draw(run, scan, outputs)
    return drawn


@dataclass(frozen=True)
class _RunningTask:
    """A task with the scans that it can use."""

    name: str
    task: Task[Any, Any]
    usable: frozenset[str]
    num_train: int
    num_test: int


@dataclass(frozen=True)
class _PreparedScan:
    """One scan of one side, with what is common to all models."""

    scan: LabelledScan
    prepared: Prepared
    truths: Mapping[str, Any]


@dataclass(frozen=True)
class _Outputs:
    """Features and predictions of one test scan, kept until its pictures are drawn."""

    dense: dict[str, DenseFeatures] = dataclasses.field(default_factory=dict)
    predictions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    config: Config
    split: Split
    root: Path
    contract: HUContract
    preprocess: Preprocess
    patch: tuple[int, int, int]
    device: torch.device
    tasks: Sequence[_RunningTask]
    progress: Callable[[int, int], None] | None

    def task(self, name: str) -> Task[Any, Any]:
        return next(one.task for one in self.tasks if one.name == name)

    def scans(self, *, test: bool, scan_labels: ScanLabels | None) -> Iterator[_PreparedScan]:
        """Read, prepare and label the scans of one side, one at a time."""
        rows = self.split.test if test else self.split.train
        total = len(self.split.train) + len(self.split.test)
        for number, row in enumerate(rows, start=1):
            tasks = [one for one in self.tasks if row.id in one.usable]
            with_labels = any(one.task.labels in (Labels.VOXELS, Labels.PAIRS) for one in tasks)
            values = (scan_labels or {}).get(row.id)
            scan = scans.read_scan(row, self.root, with_labels=with_labels, scan_labels=values)
            volume = scan.volume
            prepared = prepare(
                volume.hu_ZYX,
                self.contract,
                self.preprocess,
                self.patch,
                self.device,
                volume.spacing_mm,
            )
            in_play_Z = self._in_play(prepared.grid, scan.id, test=test)
            truths = {one.name: one.task.truth(scan, prepared.grid, in_play_Z) for one in tasks}
            yield _PreparedScan(scan, prepared, truths)
            if self.progress:
                self.progress(number + (len(self.split.train) if test else 0), total)

    def features(self, model: NamedModel, scan: _PreparedScan) -> DenseFeatures:
        return features_of(model.model, scan.prepared, self.preprocess, batch=self.config.batch)

    def _in_play(self, grid: PatchGrid, scan_id: str, *, test: bool) -> np.ndarray:
        if self.split.mode == scans.PATIENTS:
            return np.ones(grid.shape[0], dtype=bool)
        return scans.block_slices(
            grid.shape[0],
            test=test,
            num_blocks=self.config.num_blocks,
            gap=self.config.block_gap,
            scan_id=scan_id,
        )


class _Drawn:
    """Draws the pictures of test scans and keeps their entries in the results.

    Args:
        out: folder of results.json.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, EvaluationFolder(out).pictures
        self.of_task: dict[str, list[Picture]] = {}
        self.pca: list[Picture] = []

    def draw(self, run: _Run, scan: _PreparedScan, outputs: _Outputs) -> None:
        """Draw one picture per task and one of the features of all models."""
        scan_id, at = scan.scan.id, None
        for name, truth in scan.truths.items():
            task, file = run.task(name), self.folder / name / f"{scan_id}.png"
            caption = task.draw(file, truth, outputs.predictions[name])
            if caption:
                picture = Picture(scan_id, self.below_out(file), caption)
                self.of_task.setdefault(name, []).append(picture)
            at = at or task.slices_of_interest(truth)
        volume, file = scan.scan.volume, self.folder / f"{scan_id}_features.png"
        depth, height, _ = volume.hu_ZYX.shape
        columns = [(name.replace("_", " "), dense) for name, dense in outputs.dense.items()]
        at = at or (depth // 2, height // 2)
        pictures.draw_pca(file, volume.hu_ZYX, volume.spacing_mm, columns, at)
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


def _usable_scans(
    tasks: Mapping[str, Task[Any, Any]], rows: Sequence[ScanRow], scan_labels: ScanLabels | None
) -> dict[str, list[ScanRow]]:
    """The scans that each task can use; a task without any is left out, and that is printed.

    Raises:
        UserError: no task has a scan.
    """
    usable: dict[str, list[ScanRow]] = {}
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
        usable[name] = chosen
    if not usable:
        raise UserError("; ".join(missing))
    for line in missing:
        console.say(f"{line}. The task is skipped")
    return usable


def _begin(
    name: str, task: Task[Any, Any], chosen: Sequence[ScanRow], split: Split
) -> _RunningTask:
    """Start a task on its share of the split.

    Raises:
        UserError: one side has none of its scans, or it cannot work within one patient.
    """
    usable = frozenset(row.id for row in chosen)
    num_train, num_test = (
        sum(row.id in usable for row in side) for side in (split.train, split.test)
    )
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
    return _RunningTask(name, task, usable, num_train, num_test)


def _section(
    one: _RunningTask,
    models: Sequence[NamedModel],
    settings: Mapping[str, Any],
    skipped: int,
    drawn: tuple[Picture, ...],
) -> TaskSection:
    """The results of a task, checked against its contract."""
    results, headline = one.task.results(), one.task.headline()
    strange = set(headline.values) - {model.name for model in models}
    if strange:
        raise UserError(
            f"task {one.name}: its headline has values for {', '.join(sorted(strange))}; the "
            f"models are {', '.join(model.name for model in models)}"
        )
    labels = one.task.labels.value
    return TaskSection(
        settings, labels, one.num_train, one.num_test, skipped, headline, results, drawn
    )


def _record(split: Split) -> SplitRecord:
    return SplitRecord(
        split.mode,
        split.held_out,
        tuple(row.id for row in split.train),
        tuple(row.id for row in split.test),
        scans.BLOCKS_NOTE if split.mode == scans.BLOCKS else "",
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
