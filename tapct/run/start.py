"""What must hold where and when a run starts: its device, run folder, weights and data.

`tapct train` and `tapct train --print-config` make the same checks, the latter without writing
anything and, where `data.store` does not exist yet, without those of the data.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tapct.base import files
from tapct.base.counted import counted
from tapct.base.exits import SharedError, UserError
from tapct.config import Resolved, plugins
from tapct.data.packed.store import Store
from tapct.data.packed.store_group import AnyStore, StoreGroup
from tapct.distributed.device import pick_device
from tapct.engine import trackers
from tapct.eval.passes import task_runs
from tapct.eval.scans.usable import Labels, ScanRow, usable
from tapct.nn.backends import GPU_ONLY
from tapct.nn.contracts import Backbone
from tapct.run import background_eval
from tapct.run.config import RunConfig
from tapct.run.resume import check_archive, check_resume
from tapct.run.training_data import TrainingData, choose, evaluated_store
from tapct.weights import initial

MOST_LABEL_MAPS = 20  # read to find a label that a setting names; a right one is in the first


def check_start(
    resolved: Resolved, allow_change: bool, say: Callable[[str], object]
) -> Path | None:
    """Refuse a run that cannot start on this machine; nothing is written.

    Args:
        resolved: config of the run.
        allow_change: whether to resume even though settings that affect training have changed.
        say: function that prints a line, e.g. on a damaged checkpoint that is skipped.
    Returns:
        The checkpoint that it would resume from; None for a new run.
    Raises:
        UserError: device, run folder, checkpoint, initial weights or a package do not allow it.
    """
    config: RunConfig = resolved.value
    check_machine(config, pick_device(config.device))
    saved = check_resume(resolved, allow_change, say)
    check_networks(config)
    return saved


def check_machine(config: RunConfig, device: torch.device) -> None:
    """Raise UserError where this machine cannot run a config on a device, or cannot write the run
    folder.
    """
    attention = getattr(config.model.config, "attention", "")
    if device.type == "cpu" and attention in GPU_ONLY:
        raise UserError(
            f"model.attention={attention} needs a GPU, and this run works on the CPU; set "
            "model.attention=auto or sdpa"
        )
    check_run_folder(config.out)
    check_packages(config.log)


def check_run_folder(out: Path) -> None:
    """Raise UserError where a run folder cannot be made or written."""
    present = next(
        folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists()
    )
    if not present.is_dir():
        raise UserError(f"out={out}: {present} is a file and not a folder; choose another out=")
    if not os.access(present, os.W_OK | os.X_OK):
        raise UserError(
            f"out={out}: you have no permission to write in {present}; choose another out="
        )


def check_packages(log: trackers.Config) -> None:
    """Raise UserError where something is missing that the section `log` needs."""
    wanted = {"tensorboard": log.tensorboard, "wandb": log.wandb.mode != "disabled"}
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            off = {"tensorboard": "log.tensorboard=false", "wandb": "log.wandb.mode=disabled"}
            raise UserError(
                f"log: the package {package} is not installed; install it, or set {off[package]}"
            )
    if wanted["wandb"] and files.home_folder() is None:
        raise UserError(
            f"log.wandb.mode={log.wandb.mode}: wandb needs a home folder, and there is none here; "
            "set the environment variable HOME, or log.wandb.mode=disabled"
        )


def check_networks(config: RunConfig) -> None:
    """Build the backbone without values, and compare it with the weights of `train.init`.

    Raises:
        UserError: the backbone cannot be built, or the weights do not exist or do not fit.
    """
    module = plugins.load("models", config.model.name)
    try:
        with torch.device("meta"):
            backbone: Backbone = module.build(config.model.config)
    except (RuntimeError, NotImplementedError):  # its constructor reads values, so it gets them
        backbone = module.build(config.model.config)
    if config.train.recompute and not backbone.repeated_blocks():
        raise UserError(
            f"train.recompute={config.train.recompute}: this backbone has no repeated blocks to "
            "compute again; set it to 0"
        )
    if config.train.init:
        initial.check(config.train, backbone)


def training_data(config: RunConfig, store: AnyStore, saved: Path | None) -> TrainingData:
    """The scans of a store that a run is trained on.

    Args:
        config: config of the run, with the split version that it began with.
        store: packed archive, or several.
        saved: checkpoint that the run resumes from; None for a new run.
    Raises:
        SharedError: there is none, or the checkpoint was trained on another archive or selection.
    """
    try:
        data = choose(config.data, store, config.seed)
        if saved is not None:
            check_archive(saved, data.digest, config.data.on_change)
    except UserError as error:
        raise SharedError(str(error)) from error
    return data


def training_rows(config: RunConfig, store: AnyStore, saved: Path | None) -> np.ndarray:
    """The rows of `training_data`."""
    return training_data(config, store, saved).rows


def data_warnings(
    config: RunConfig,
    store: AnyStore,
    rows: np.ndarray,
    saved: Path | None = None,
    digest: str | None = None,
) -> Iterator[str]:
    """What this store makes pointless or doubtful, one line each.

    Args:
        config: config of the run, with the split version that it began with.
        store: packed archive.
        rows: rows of the store that are trained on, from `training_rows`.
        saved: checkpoint that the run resumes from; None for a new run.
        digest: digest of the training data; None where it is that of the store.
    """
    if saved is not None:
        changed = check_archive(saved, digest or store.digest, config.data.on_change)
        if changed:
            yield changed
    yield from doubts_about_batch(config, store, rows)
    yield from doubts_about_patients(config, store, rows)
    evaluated = evaluated_store(store)
    if saved is None:  # it cannot be changed when a run is resumed
        yield from doubts_about_test_patients(config, evaluated)
    for stage in config.resolved_stages():
        for line in doubts_about_scans(stage.config, store, rows):
            yield stage.with_name(line)
    yield from doubts_about_evaluation(config, evaluated)


def doubts_about_batch(config: RunConfig, store: AnyStore, rows: np.ndarray) -> Iterator[str]:
    """A batch that holds a scan more than once."""
    batch, num = config.train.global_batch, len(rows)
    if batch > num:
        yield (
            f"train.global_batch {batch} is more than the {counted(num, 'scan')} that {store.path} "
            f"has for training: a step holds a scan up to {-(-batch // num)} times, so losses that "
            "compare samples compare a scan with itself"
        )


def doubts_about_patients(config: RunConfig, store: AnyStore, rows: np.ndarray) -> Iterator[str]:
    """Patients for whom the split cannot hold."""
    data = config.data
    held_out = data.held_out_mask(store.scans, config.seed)
    if data.held_out > 0 and (held_out.all() or not held_out.any()):
        problem = data.one_sided(store.scans.column("patient").to_pylist(), config.seed)
        if problem:
            yield problem
    numbers = store.scans.patient_numbers()[rows]
    are_apart = isinstance(store, StoreGroup) and not data.join_patients
    if len(rows) > 1 and not are_apart and (numbers == numbers[0]).all():
        yield (
            f"all {len(rows)} scans for training are of one patient; if they are not, index again "
            "with another --patient-regex or --patient-column"
        )
    guessed = store.num_guessed_patients()
    if data.held_out > 0 and guessed:
        yield (
            f"data.held_out {data.held_out:g} divides patients, and the patients of "
            f"{guessed} of {counted(len(store), 'scan')} were guessed from file names: check them "
            "in the output of `tapct index`, or give it --patient-regex or --patient-column"
        )


def doubts_about_test_patients(config: RunConfig, store: Store) -> Iterator[str]:
    """Labels of a store of which no patient is held out for evaluation."""
    labelled = np.unique(store.scans.labelled().patient_numbers())
    if config.data.held_out == 0 and len(labelled) > 1:
        yield (
            f"data.held_out is 0, so pretraining sees all patients of {store.path}, also the "
            f"{len(labelled)} that have label maps: `tapct eval` will test on patients of "
            "pretraining. data.held_out=0.2 keeps about a fifth of the patients as test patients; "
            "it can only be set before training"
        )


def doubts_about_scans(config: RunConfig, store: AnyStore, rows: np.ndarray) -> Iterator[str]:
    """Scans that are too few or too short for the settings of one stage."""
    loader, num = config.data.loader, len(rows)
    if loader.on_error == "skip" and loader.max_skips >= num:
        yield (
            f"data.loader.max_skips {loader.max_skips} is not less than the "
            f"{counted(num, 'scan')} for training: the run would not stop if every scan were "
            "damaged"
        )
    depths = store.scans.depths()[rows]
    needed = config.views.slices_needed()
    windows = f"views.global_window or views.local_window needs {needed:g} slices"
    num_short = int((depths < needed).sum())
    if num_short == num:
        yield (
            f"{windows}, and the deepest scan of {store.path} has {depths.max()}: views of that "
            "depth are always filled up with air"
        )
    elif 2 * num_short > num:
        yield (
            f"{windows}, and {num_short} of the {num} scans for training have fewer: their views "
            "of that depth are filled up with air"
        )


def doubts_about_evaluation(config: RunConfig, store: Store) -> Iterator[str]:
    """Evaluations that will fail, or whose test patients will not be the held-out ones."""
    during, tasks = config.eval.during, {}
    if config.eval.tasks:
        tasks = task_runs.build_tasks(config.eval.tasks, config.eval.seed)
    can_use = {name: _usable(store, task.labels) for name, task in tasks.items()}
    if during.every and not any(can_use.values()):
        yield (
            f"eval.during.every {during.every}: no scan of {store.path} has the labels that "
            "eval.tasks needs, so every evaluation will fail; set eval.during.every=0"
        )
    yield from background_eval.doubts(during)
    patients = {row.patient for rows in can_use.values() for row in rows}
    if config.data.split_version == 1:  # the rule chooses among all patients
        patients = set(store.scans.column("patient").to_pylist())
    held_out = config.data.held_out_patients(patients, config.seed)
    holds_out_some = bool(config.data.held_out_mask(store.scans, config.seed).any())
    for name, rows in can_use.items():
        people = {row.patient for row in rows}
        num = len(people & held_out)
        if holds_out_some and people and num in (0, len(people)):
            yield (
                f"data.held_out {config.data.held_out:g} holds out {'none' if num == 0 else 'all'} "
                f"of the {counted(len(people), 'patient')} that the task {name} can use, so `tapct "
                "eval` will test on patients of pretraining; set another data.split_seed"
            )
        num_tested = num if holds_out_some and 0 < num < len(people) else len(people)
        if during.every and config.eval.validation_share and num_tested == 1:
            yield (
                f"eval.validation_share {config.eval.validation_share:g}: the task {name} has 1 "
                "test patient, who cannot be divided into validation and test patients, so every "
                "evaluation will fail; set eval.validation_share=0"
            )
    for name, task in tasks.items():
        try:
            task_runs.check_label_settings(name, task, can_use[name][:MOST_LABEL_MAPS], store)
        except UserError as error:
            yield f"{error}; `tapct eval` would refuse it"


def _usable(store: Store, labels: Labels) -> list[ScanRow]:
    """The scans that have the labels a task needs, as far as the store shows it."""
    rows: Sequence[ScanRow] = store.scans
    if labels in (Labels.VOXELS, Labels.PAIRS):
        rows = store.scans.labelled()
    elif labels is not Labels.NONE:  # tables are not read here
        rows = ()
    return usable(rows, labels)
