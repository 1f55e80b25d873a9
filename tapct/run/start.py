"""What must hold where and when a run starts: its device, run folder, weights and data.

`tapct train` and `tapct train --print-config` make the same checks, the latter without writing
anything and, where `data.store` does not exist yet, without those of the data.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tapct.base import files
from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.config import Resolved, plugins
from tapct.data import split
from tapct.data.store import Store
from tapct.distributed.device import pick_device
from tapct.engine import initial, trackers
from tapct.eval import scans, task_runs
from tapct.nn.backends import GPU_ONLY
from tapct.nn.contracts import Backbone
from tapct.run import background_eval
from tapct.run.config import RunConfig
from tapct.run.resume import check_resume

MOST_LABEL_MAPS = 20  # read to find a label that a setting names; a right one is in the first


def check_start(resolved: Resolved, allow_change: bool) -> None:
    """Refuse a run that cannot start on this machine; nothing is written.

    Args:
        resolved: config of the run.
        allow_change: whether to resume even though settings that affect training have changed.
    Raises:
        UserError: device, run folder, checkpoint, initial weights or a package do not allow it.
    """
    config: RunConfig = resolved.value
    check_machine(config, pick_device(config.device))
    check_resume(resolved, allow_change)
    check_networks(config)


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
        weights = initial.read(initial.locate(Path(config.train.init)))
        initial.compare(weights, backbone, config.train.init_allow)


def data_warnings(config: RunConfig, store: Store, rows: Sequence[int]) -> Iterator[str]:
    """Settings that this store makes pointless, one line each.

    Args:
        config: config of the run.
        store: packed archive.
        rows: rows of the store that are trained on.
    """
    batch, num = config.train.global_batch, len(rows)
    named = counted(num, "scan")
    if batch > num:
        times = -(-batch // num)
        yield (
            f"train.global_batch {batch} is more than the {named} that {store.path} has for "
            f"training: a step holds a scan up to {times} times, so losses that compare samples "
            "compare a scan with itself"
        )
    if config.data.held_out > 0 and num == len(store):
        people = [scan.patient for scan in store.scans]
        problem = split.imbalance(people, config.data.held_out, config.data.split_seed)
        if problem:
            yield problem
    loader = config.data.loader
    if loader.on_error == "skip" and loader.max_skips >= num:
        yield (
            f"data.loader.max_skips {loader.max_skips} is not less than the {named} for training: "
            "the run would not stop if every scan were damaged"
        )
    deepest = max(store.scans[row].shape_ZYX[0] for row in rows)
    needed = config.views.slices_needed()
    if needed > deepest:
        yield (
            f"views.global_window or views.local_window needs {needed:g} slices, and the deepest "
            f"scan of {store.path} has {deepest}: views of that depth are always filled up with air"
        )
    during, tasks = config.eval.during, {}
    if config.eval.tasks:
        tasks = task_runs.build_tasks(config.eval.tasks, config.eval.seed)
    can_use = {name: scans.usable(store.scans, task.labels) for name, task in tasks.items()}
    if during.every and not any(can_use.values()):
        yield (
            f"eval.during.every {during.every}: no scan of {store.path} has the labels that "
            "eval.tasks needs, so every evaluation will fail; set eval.during.every=0"
        )
    yield from background_eval.doubts(during)
    for name, task in tasks.items():
        try:
            task_runs.check_label_settings(name, task, can_use[name][:MOST_LABEL_MAPS], store)
        except UserError as error:
            yield f"{error}; `tapct eval` would refuse it"
