"""Use a run that has trained: read its teacher, evaluate its features, export its weights."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from tapct import config as tapct_config
from tapct.base import console, files
from tapct.base.exits import UserError
from tapct.base.paths import command_line
from tapct.config import Resolved
from tapct.data.store import Store, labels_digest
from tapct.distributed.device import flush_denormals, pick_device
from tapct.engine import checkpoint
from tapct.engine.checkpoint import Checkpoints, Meta
from tapct.eval import held_out, runner
from tapct.eval.baselines import with_baselines
from tapct.eval.label_tables import read_tables
from tapct.eval.results import EvaluatedData, EvaluatedWeights, Evaluation, Origin
from tapct.eval.saved import dataset_name, link_newest
from tapct.nn.contracts import Backbone
from tapct.run import lineage
from tapct.run.config import RunConfig
from tapct.run.old_configs import upgraded
from tapct.run.provenance import git_revision
from tapct.run.resume import changed_keys
from tapct.run_folder import CheckpointFolder, RunFolder, step_of
from tapct.ssl.student_teacher import build_backbone
from tapct.weights.card import FeatureSettings
from tapct.weights.export import save_export


@dataclass(frozen=True)
class Trained:
    """A finished or stopped run, read back.

    Args:
        resolved: its config with overrides.
        backbone: backbone of the teacher, in eval mode, on the run's device.
        meta: facts about the checkpoint that it comes from.
        sha256: hash of the file with its weights.
    """

    resolved: Resolved
    backbone: Backbone
    meta: Meta
    sha256: str

    def weights(self, folder: Path) -> EvaluatedWeights:
        """The weights of the run in a folder, as results.json describes them."""
        meta = self.meta
        name = folder.resolve().name
        return EvaluatedWeights(name, meta.step, meta.samples, self.sha256, meta.data_digest)


def open_run(folder: Path, overrides: Sequence[str] = (), step: int | None = None) -> Trained:
    """Read the teacher of a run.

    Args:
        folder: run folder.
        overrides: key=value, only keys that do not affect the weights.
        step: step of the checkpoint; None takes the newest whole one.
    Raises:
        UserError: not a run folder, no such checkpoint, or an override that would need another
            training.
    """
    if not RunFolder(folder).config.is_file():
        hint = f"`tapct train CONFIG out={folder}` makes one"
        problem = "is not a run folder: it has no config.yaml"
        if not folder.exists():
            problem = "does not exist; give the folder of a run, e.g. runs/smoke"
        raise UserError(f"{folder} {problem}; {hint}")
    trained_with = _config_of(folder, [])
    resolved = _config_of(folder, overrides)
    for key, old, new in changed_keys(trained_with.to_dict(), resolved.to_dict()):
        free = "only eval.*, device, model.attention and data.store can change here"
        raise UserError(f"{key}={new}: the run was trained with {old}; {free}")
    saved = newest_teacher(folder) if step is None else teacher_of_step(folder, step)
    config: RunConfig = resolved.value
    backbone = build_backbone(config.model, config.seed)
    teacher = CheckpointFolder(saved).teacher
    backbone.load_state_dict(load_file(teacher))
    backbone = backbone.to(pick_device(config.device)).requires_grad_(False).eval()
    return Trained(resolved, backbone, checkpoint.read_meta(saved), files.sha256(teacher))


def _config_of(folder: Path, overrides: Sequence[str]) -> Resolved:
    return tapct_config.load_config(
        RunConfig, RunFolder(folder).config, overrides, upgrade=upgraded
    )


def newest_teacher(folder: Path) -> Path:
    """Return the folder of the newest whole checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    newest, complaints = Checkpoints(RunFolder(folder).checkpoints.path, keep=1).newest_whole()
    for complaint in complaints:
        console.say(complaint)
    if newest is None:
        raise UserError(f"{folder} holds no whole checkpoint yet; train first")
    return newest


def teacher_of_step(folder: Path, step: int) -> Path:
    """Return the folder with the teacher of a step: kept for its evaluation during training, or a
    whole checkpoint.

    Raises:
        UserError: there is none.
    """
    for _, kept in RunFolder(folder).evaluations_of_steps():
        if step_of(kept.path) == step and kept.teacher.is_file():
            return kept.path
    wanted = RunFolder(folder).checkpoints.step(step).path
    complaint = checkpoint.damage(wanted) if wanted.is_dir() else "it is not there"
    if complaint is not None:
        finished = Checkpoints(RunFolder(folder).checkpoints.path, keep=1).finished()
        there = ", ".join(str(step_of(path)) for path in finished) or "none"
        raise UserError(
            f"{folder} has no whole checkpoint of step {step} ({complaint}); there are: {there}"
        )
    return wanted


def evaluate(
    folder: Path, overrides: Sequence[str] = (), step: int | None = None, command: str = ""
) -> Evaluation:
    """Evaluate a run's frozen features beside its baselines.

    Writes RUN/eval/DATASET/step_..., see `eval/saved.py`. Patients that `data.held_out` kept out of
    pretraining are the test side; without any, `eval.test_share` splits.

    Args:
        folder: run folder.
        overrides: key=value, as in `open_run`.
        step: step of the checkpoint; None takes the newest whole one.
        command: command line for results.json; empty takes this process's own.
    """
    flush_denormals()  # before the first tensor
    trained = open_run(folder, overrides, step)
    config: RunConfig = trained.resolved.value
    store = Store(config.data.store)
    hidden = config.data.held_out_patients([scan.patient for scan in store.scans], config.seed)
    name = dataset_name(folder, store.path, store.digest)
    out = RunFolder(folder).evaluation(name, trained.meta.step)
    reading = config.data.loader
    tables = read_tables(
        store, config.eval.scan_labels, config.eval.landmarks, config.eval.split_column
    )
    with console.progress_bar("eval") as progress:
        evaluation = runner.evaluate(
            with_baselines(trained.backbone, config.model, config.seed),
            store.scans,
            store,
            config.eval,
            contract=config.contract,
            out=out.path,
            held_out=hidden,
            check_held_out=partial(
                held_out.check,
                rows=store.scans,
                digests={scan.id: scan.checksum for scan in store.scans},
                patient_key=store.patient_key,
                trained_on=lineage.scans_of_run(folder, trained.meta.step),
            ),
            tables=tables,
            origin=Origin(
                EvaluatedData(
                    name,
                    store.manifest_digest,
                    store.digest,
                    labels_digest(store.scans),
                    len(store),
                    tables.digest,
                ),
                trained.weights(folder),
                command_line(shlex.split(command) if command else sys.argv),
                git_revision(),
            ),
            max_skips=reading.max_skips if reading.on_error == "skip" else 0,
            device=pick_device(config.device),
            progress=progress,
        )
    # it was kept from rotation for this evaluation
    out.teacher.unlink(missing_ok=True)
    link_newest(folder)
    return evaluation


def export(folder: Path, out: Path | None = None) -> Path:
    """Write a run's teacher for `tapct.load_pretrained`; RUN/export by default."""
    trained = open_run(folder)
    config: RunConfig = trained.resolved.value
    target = out or RunFolder(folder).export.path
    meta = trained.meta
    provenance = {
        "run": folder.name,
        "step": meta.step,
        "samples": meta.samples,
        "data": meta.data_digest,
    }
    portable = trained.backbone.export_config()  # weights do not depend on the attention back-end
    section = config.model if portable is None else replace(config.model, config=portable)
    settings = FeatureSettings(section, config.contract, config.eval.preprocess)
    scans = lineage.scans_of_run(folder, meta.step)
    save_export(target, trained.backbone, settings, provenance, scans)
    return target
