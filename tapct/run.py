"""The whole config of a run, and the wiring of its parts. Only this file sees all of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tapct import __version__, log, plan, plugin, weights
from tapct import config as tapct_config
from tapct.config import Resolved, setting
from tapct.data import loader
from tapct.data.split import held_out_patients
from tapct.data.store import Store
from tapct.engine import checkpoint, loop, optim
from tapct.engine.checkpoint import Checkpoints, Meta
from tapct.eval import runner
from tapct.eval.baselines import with_baselines
from tapct.nn.contracts import Backbone
from tapct.plugin import Plugin
from tapct.ssl.schedules import Schedules
from tapct.ssl.student_teacher import StudentTeacher, build_backbone
from tapct.types import HUContract, UserError
from tapct.views import masks, recipe


@dataclass(frozen=True)
class DataConfig:
    """Which scans a run learns from."""

    store: Path = setting(Path("data/store"), "folder written by `tapct pack`")
    held_out: float = setting(
        0.0, "share of patients kept out of pretraining, on which `tapct eval` tests", ge=0.0, lt=1.0
    )
    loader: loader.Config = field(default_factory=loader.Config)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made of; one section per part of tapct."""

    out: Path = setting(Path("runs/default"), "run folder")
    seed: int = setting(0, "of weights, sampler, views and masks", ge=0)
    device: str = setting("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    data: DataConfig = field(default_factory=DataConfig)
    contract: HUContract = field(default_factory=HUContract)
    views: recipe.Config = field(default_factory=recipe.Config)
    masks: masks.Config = field(default_factory=masks.Config)
    model: Plugin = plugin.section("models", "vit", "backbone of student and teacher")
    losses: tuple[Plugin, ...] = plugin.table("losses", ("dino", "ibot", "koleo"), "terms that are summed")
    optim: optim.Config = field(default_factory=optim.Config)
    train: loop.Config = field(default_factory=loop.Config)
    checkpoint: checkpoint.Config = field(default_factory=checkpoint.Config)
    log: log.Config = field(default_factory=log.Config)
    eval: runner.Config = field(default_factory=runner.Config)

    def __post_init__(self) -> None:
        deepest = self.views.slices_needed()
        if self.data.loader.slab_depth < deepest:
            raise UserError(
                f"data.loader.slab_depth {self.data.loader.slab_depth} is less than the {deepest:g} slices that the "
                "deepest view needs, so every view would be filled up with air; raise it"
            )
        patch = getattr(self.model.config, "patch", (1, 1, 1))
        for name in ("global_window", "local_window"):
            window = getattr(self.views, name)
            if any(size % side for size, side in zip(window, patch, strict=True)):
                raise UserError(
                    f"views.{name} {list(window)} is no multiple of model.patch {list(patch)} along every axis; "
                    "change one of them"
                )
        samples = self.train.global_batch // self.train.accumulation
        if samples < 2 and any(loss.name == "koleo" for loss in self.losses):
            raise UserError(
                f"KoLeo compares the samples of a micro-batch, which holds {samples} at train.global_batch "
                f"{self.train.global_batch} and train.accumulation {self.train.accumulation}; raise it, or set "
                "losses.koleo=null"
            )


# What may differ when a run goes on: where and how it runs, not what it computes.
HARMLESS = ("out", "device", "data.store", "checkpoint.", "log.", "eval.", "train.resume")
HARMLESS_LOADER = ("data.loader.workers", "data.loader.backend", "data.loader.prefetch")


def pick_device(name: str) -> torch.device:
    """The device of a run.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU here; set device=cpu, or run where `nvidia-smi` lists one")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def train(resolved: Resolved) -> loop.Stop:
    """Pretrain as the config says, going on from the newest whole checkpoint of the run folder.

    Returns:
        How the run ended.
    Raises:
        UserError: data, config or disk do not allow it.
    """
    config: RunConfig = resolved.value
    device = pick_device(config.device)
    store = Store(config.data.store)
    hidden = held_out_patients([scan.patient for scan in store.scans], config.data.held_out, config.seed)
    rows = [i for i, scan in enumerate(store.scans) if scan.patient not in hidden]
    if not rows:
        raise UserError(f"data.held_out {config.data.held_out} leaves no scan of {len(store)} to train on; lower it")

    checkpoints = Checkpoints(config.out / "checkpoints", config.checkpoint.keep)
    found = find_start(config, checkpoints, resolved)
    torch.manual_seed(config.seed)  # for plug-ins that draw without a key; a checkpoint brings its own state back
    pair = StudentTeacher(config.model, config.losses, config.seed).to(device)
    updater = optim.Updater(pair, config.optim)
    start = 0
    if found is not None:
        checkpoint.load(found, pair, updater.optimizer)
        meta = checkpoint.read_meta(found)
        start = meta.step
        if meta.data_digest != store.digest:
            raise UserError(
                f"{found} was trained on another archive (digest {meta.data_digest[:12]}, now {store.digest[:12]}); "
                "point data.store at the old one, or start a new run with another out="
            )
        checkpoints.announce(found)
        log.say(f"going on from {found} at step {start} of {config.train.steps}")
    if start >= config.train.steps:
        log.say(f"{config.out} has all its {config.train.steps} steps; nothing to train")
        return loop.Stop(start)
    write_run_files(config.out, resolved, store)

    def save(step: int) -> Path:
        meta = Meta(step, step * config.train.global_batch, resolved.to_dict(), store.digest)
        return checkpoints.save(meta, pair, updater.optimizer)

    views_recipe = loop.Recipe(config.views, config.masks, config.contract, pair.student.backbone.patch, config.seed)
    batches = loader.build(
        config.data.loader,
        store,
        seed=config.seed,
        rank=0,
        world=1,
        accumulation=config.train.accumulation,
        global_batch=config.train.global_batch,
        start_step=start,
        pin=device.type == "cuda",
        rows=rows,
    )
    try:
        with log.MetricsWriter(config.out, config.log, start_step=start) as writer, log.TrainProgress(
            config.train.steps, start, config.log.every
        ) as progress:

            def record(row: dict[str, float]) -> None:
                writer.write(row)
                progress.update(row)

            trainer = loop.Trainer(
                pair,
                updater,
                Schedules(config.optim, config.train.steps, config.train.global_batch),
                config.train,
                views_recipe,
                loop.Hooks(record, save),
                config.log.every,
                config.checkpoint.every,
            )
            return trainer.run(batches, start)
    finally:
        batches.close()


def find_start(config: RunConfig, checkpoints: Checkpoints, resolved: Resolved) -> Path | None:
    """The checkpoint to go on from, or None for a new run; damaged ones are named and passed over.

    Raises:
        UserError: train.resume=must finds none, =never finds one, or the config no longer fits it.
    """
    found, complaints = checkpoints.newest_whole()
    for complaint in complaints:
        log.say(complaint)
    if config.train.resume == "never" and checkpoints.finished():
        raise UserError(f"{config.out} holds checkpoints and train.resume=never; choose another out= or remove it")
    if config.train.resume == "must" and found is None:
        raise UserError(f"train.resume=must, but {checkpoints.folder} holds no whole checkpoint")
    if found is None and complaints:
        raise UserError(f"every checkpoint of {config.out} is damaged; choose another out= to start anew")
    if found is not None:
        changed = changed_keys(checkpoint.read_meta(found).config, resolved.to_dict())
        if changed:
            key, old, new = changed[0]
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise UserError(
                f"{key} was {old} when {found} was written and is {new} now{more}; a run keeps what shapes its curve. "
                "Set it back, or choose another out="
            )
    return found


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Leaves that differ between two resolved configs and shape the curve: (dotted key, old, new)."""
    before, after = flatten(old), flatten(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [(key, before.get(key), after.get(key)) for key in keys if not key.startswith(HARMLESS + HARMLESS_LOADER)]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys; lists are leaves. Goes through JSON, so that tuples equal lists."""
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(tree, default=str)).items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


@dataclass(frozen=True)
class Trained:
    """A finished or stopped run, read back.

    Args:
        resolved: its config with overrides.
        backbone: the teacher's, in eval mode, on the run's device.
        meta: of the checkpoint that it comes from.
    """

    resolved: Resolved
    backbone: Backbone
    meta: Meta


def open_run(folder: Path, overrides: Sequence[str] = ()) -> Trained:
    """Read the teacher of the newest whole checkpoint of a run.

    Args:
        folder: run folder.
        overrides: only keys that do not shape the weights.
    Raises:
        UserError: not a run folder, no whole checkpoint, or an override that would need another training.
    """
    if not (folder / "config.yaml").is_file():
        hint = f"`tapct train CONFIG out={folder}` makes one"
        raise UserError(f"{folder} is not a run folder: it has no config.yaml; {hint}")
    trained_with = tapct_config.load_config(RunConfig, folder / "config.yaml", [])
    resolved = tapct_config.load_config(RunConfig, folder / "config.yaml", overrides)
    for key, old, new in changed_keys(trained_with.to_dict(), resolved.to_dict()):
        free = "only eval.*, device and data.store can change here"
        raise UserError(f"{key}={new}: the run was trained with {old}; {free}")
    found, complaints = Checkpoints(folder / "checkpoints", keep=1).newest_whole()
    for complaint in complaints:
        log.say(complaint)
    if found is None:
        raise UserError(f"{folder} holds no whole checkpoint yet; train first")
    config: RunConfig = resolved.value
    backbone = build_backbone(config.model, config.seed)
    backbone.load_state_dict(load_file(found / "teacher.safetensors"))
    backbone = backbone.to(pick_device(config.device)).requires_grad_(False).eval()
    return Trained(resolved, backbone, checkpoint.read_meta(found))


def evaluate(folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Judge a run's frozen features beside its baselines; writes RUN/eval.

    Patients that `data.held_out` kept out of pretraining are the test side; without any, `eval.test_share` splits.
    """
    trained = open_run(folder, overrides)
    config: RunConfig = trained.resolved.value
    store = Store(config.data.store)
    hidden = held_out_patients([scan.patient for scan in store.scans], config.data.held_out, config.seed)
    with log.progress_bar("eval") as progress:
        results = runner.evaluate(
            with_baselines(trained.backbone, config.model, config.seed),
            store.scans,
            store.root,
            config.eval,
            contract=config.contract,
            out=folder / "eval",
            held_out=hidden,
            device=pick_device(config.device),
            progress=progress,
        )
    return results


def export(folder: Path, out: Path | None = None) -> Path:
    """Write a run's teacher for `tapct.load_pretrained`; RUN/export by default."""
    trained = open_run(folder)
    config: RunConfig = trained.resolved.value
    target = out or folder / "export"
    meta = trained.meta
    provenance = {"run": folder.name, "step": meta.step, "samples": meta.samples, "data": meta.data_digest}
    weights.save_export(target, trained.backbone, config.model, config.contract, config.eval.preprocess, provenance)
    return target


def make_plan(config: RunConfig) -> plan.Plan:
    """Tokens, parameters and FLOPs of a config."""
    uses = []
    for loss in config.losses:
        if hasattr(loss.config, "head"):
            shared = getattr(loss.config, "share_dino_head", False)
            sinkhorn = loss.config.targets.kind == "sinkhorn"
            uses.append(plan.HeadUse(loss.name, loss.config.head, sinkhorn, owns_head=not shared))
    return plan.tables(
        config.model.config,
        num_globals=config.views.num_globals,
        global_window=config.views.global_window,
        num_locals=config.views.num_locals,
        local_window=config.views.local_window,
        head_uses=uses,
        masked_share=config.masks.probability * sum(config.masks.ratio) / 2,
        global_batch=config.train.global_batch,
    )


def write_run_files(out: Path, resolved: Resolved, store: Store) -> None:
    """config.yaml and run.json: what was run, on what, with which versions."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.replace_text(out / "config.yaml", resolved.to_yaml())
    packages = ("torch", "numpy", "nibabel", "SimpleITK", "pydicom", "blosc2")
    about = {
        "command": " ".join(sys.argv),
        "versions": {
            "tapct": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "git_revision": git_revision(),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "gpu": gpu_name()},
        "manifest": {
            "digest": store.digest,
            "scans": len(store),
            "accepted": store.summary.get("accepted", len(store)),
            "refused": {reason: count for reason, count in store.summary.items() if reason != "accepted"},
        },
    }
    checkpoint.replace_text(out / "run.json", json.dumps(about, indent=1))


def gpu_name() -> str:
    """Name of the first GPU, or empty."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def git_revision() -> str:
    """Revision of the source tree that tapct is imported from, `+` for local changes; empty outside of git."""
    folder = Path(tapct_config.__file__).resolve().parent
    if (folder / "REVISION").is_file():  # a copy for a SLURM job, which may lie in a tree that has moved on
        return (folder / "REVISION").read_text(encoding="utf-8").strip()
    try:
        ask = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
