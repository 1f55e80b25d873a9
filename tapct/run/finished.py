"""What is done with a run that has trained: read its teacher, judge it, export it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tapct import config as tapct_config
from tapct.base import console
from tapct.base.exits import UserError
from tapct.config import Resolved
from tapct.data.patients import held_out_patients
from tapct.data.store import Store
from tapct.distributed.device import flush_denormals, pick_device
from tapct.engine import checkpoint
from tapct.engine.checkpoint import Checkpoints, Meta
from tapct.eval import runner
from tapct.eval.baselines import with_baselines
from tapct.nn.contracts import Backbone
from tapct.run import background_eval
from tapct.run.config import RunConfig
from tapct.run.resume import changed_keys
from tapct.ssl.student_teacher import build_backbone
from tapct.weights.export import save_export


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


def open_run(folder: Path, overrides: Sequence[str] = (), step: int | None = None) -> Trained:
    """Read the teacher of a run.

    Args:
        folder: run folder.
        overrides: only keys that do not shape the weights.
        step: of the checkpoint; None: the newest whole one.
    Raises:
        UserError: not a run folder, no such checkpoint, or an override that would need another
            training.
    """
    if not (folder / "config.yaml").is_file():
        hint = f"`tapct train CONFIG out={folder}` makes one"
        raise UserError(f"{folder} is not a run folder: it has no config.yaml; {hint}")
    trained_with = tapct_config.load_config(RunConfig, folder / "config.yaml", [])
    resolved = tapct_config.load_config(RunConfig, folder / "config.yaml", overrides)
    for key, old, new in changed_keys(trained_with.to_dict(), resolved.to_dict()):
        free = "only eval.*, device, model.attention and data.store can change here"
        raise UserError(f"{key}={new}: the run was trained with {old}; {free}")
    found = newest_teacher(folder) if step is None else teacher_of_step(folder, step)
    config: RunConfig = resolved.value
    backbone = build_backbone(config.model, config.seed)
    backbone.load_state_dict(load_file(found / "teacher.safetensors"))
    backbone = backbone.to(pick_device(config.device)).requires_grad_(False).eval()
    return Trained(resolved, backbone, checkpoint.read_meta(found))


def newest_teacher(folder: Path) -> Path:
    """Folder of the newest whole checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    found, complaints = Checkpoints(folder / "checkpoints", keep=1).newest_whole()
    for complaint in complaints:
        console.say(complaint)
    if found is None:
        raise UserError(f"{folder} holds no whole checkpoint yet; train first")
    return found


def teacher_of_step(folder: Path, step: int) -> Path:
    """Folder with the teacher of a step: kept for its evaluation during training, or a whole
    checkpoint.

    Raises:
        UserError: there is none.
    """
    name = f"step_{step:08d}"
    if (background_eval.steps_folder(folder) / name / "teacher.safetensors").is_file():
        return background_eval.steps_folder(folder) / name
    wanted = folder / "checkpoints" / name
    complaint = checkpoint.damage(wanted) if wanted.is_dir() else "it is not there"
    if complaint is not None:
        finished = Checkpoints(folder / "checkpoints", keep=1).finished()
        there = ", ".join(str(checkpoint.step_of(path)) for path in finished) or "none"
        raise UserError(
            f"{folder} has no whole checkpoint of step {step} ({complaint}); there are: {there}"
        )
    return wanted


def evaluate(
    folder: Path, overrides: Sequence[str] = (), step: int | None = None
) -> dict[str, Any]:
    """Judge a run's frozen features beside its baselines; writes RUN/eval, or
    RUN/eval/steps/step_... for one step.

    Patients that `data.held_out` kept out of pretraining are the test side; without any,
    `eval.test_share` splits.
    """
    flush_denormals()  # before the first tensor
    trained = open_run(folder, overrides, step)
    out = (
        folder / "eval"
        if step is None
        else background_eval.steps_folder(folder) / f"step_{step:08d}"
    )
    config: RunConfig = trained.resolved.value
    store = Store(config.data.store)
    hidden = held_out_patients(
        [scan.patient for scan in store.scans], config.data.held_out, config.seed
    )
    with console.progress_bar("eval") as progress:
        results = runner.evaluate(
            with_baselines(trained.backbone, config.model, config.seed),
            store.scans,
            store.root,
            config.eval,
            contract=config.contract,
            out=out,
            held_out=hidden,
            device=pick_device(config.device),
            progress=progress,
        )
    if step is not None:
        (out / "teacher.safetensors").unlink(missing_ok=True)  # was kept from rotation for this
    return results


def export(folder: Path, out: Path | None = None) -> Path:
    """Write a run's teacher for `tapct.load_pretrained`; RUN/export by default."""
    trained = open_run(folder)
    config: RunConfig = trained.resolved.value
    target = out or folder / "export"
    meta = trained.meta
    provenance = {
        "run": folder.name,
        "step": meta.step,
        "samples": meta.samples,
        "data": meta.data_digest,
    }
    portable = trained.backbone.export_config()
    section = config.model if portable is None else replace(config.model, config=portable)
    save_export(
        target, trained.backbone, section, config.contract, config.eval.preprocess, provenance
    )
    return target
