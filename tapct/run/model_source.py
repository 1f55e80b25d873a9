"""Where an evaluated model comes from: a run, a checkpoint or an export.

| path | settings of the evaluation | results |
|---|---|---|
| run folder, or a checkpoint in one | those of the run | RUN/eval/DATASET/step_00000500 |
| checkpoint without its run folder | those that it holds | NAME-eval/DATASET/weights-1a2b3c4d |
| export | defaults, and those in its card | NAME-eval/DATASET/weights-1a2b3c4d |

The folder NAME-eval lies beside the folder NAME of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import nn

from tapct.base import console, files
from tapct.base.exits import UserError
from tapct.base.paths import near_path
from tapct.config import Resolved, from_dict, load_config, plugins, setting, to_dict
from tapct.config.plugins import Plugin
from tapct.data.packed.trained_on import TrainedOn
from tapct.distributed.device import pick_device, prepare_cpu
from tapct.engine import checkpoint
from tapct.engine.checkpoint import Checkpoints, Meta
from tapct.eval import runner
from tapct.eval.results.json_file import EvaluatedWeights
from tapct.eval.results.saved import dataset_name
from tapct.nn.contracts import Backbone
from tapct.run import best_step, lineage
from tapct.run.best_step import BEST, BestStep
from tapct.run.config import DataConfig, RunConfig
from tapct.run.old_configs import upgraded
from tapct.run.resume import changed_keys
from tapct.run_folder import (
    CheckpointFolder,
    EvaluationFolder,
    ExportFolder,
    RunFolder,
    evaluations_beside,
    has_step_name,
    step_of,
)
from tapct.ssl.student_teacher import build_backbone
from tapct.types import HUContract
from tapct.weights.card import is_own_card
from tapct.weights.export import scans_of_export
from tapct.weights.pretrained import load_pretrained

FREE = "only eval.*, device, model.attention and data.store can change here"
FIXED = "model.* and contract.* belong to the weights; of them only model.attention can change"
DIGITS = 8  # of the hash of the weights in the name of a folder


@dataclass(frozen=True)
class EvaluationConfig:
    """The settings of an evaluation: a part of `RunConfig`, with the same keys."""

    seed: int = setting(0, "random seed of the untrained baselines", ge=0, lt=2**63)
    device: str = setting(
        "auto", "auto: a GPU if there is one, else the CPU", choices=("auto", "cpu", "cuda")
    )
    data: DataConfig = field(default_factory=DataConfig)
    contract: HUContract = field(default_factory=HUContract)
    model: Plugin = plugins.section("models", "vit", "backbone")
    eval: runner.Config = field(default_factory=runner.Config)

    @classmethod
    def of_run(cls, config: RunConfig) -> EvaluationConfig:
        """The settings with which a run is evaluated."""
        return cls(
            config.seed, config.device, config.data, config.contract, config.model, config.eval
        )


@dataclass(frozen=True)
class Model:
    """A frozen backbone and what an evaluation must know about it.

    Args:
        backbone: backbone in eval mode, on the device of the config.
        config: settings of the evaluation.
        weights: weights, as results.json describes them.
        trained_on: scans that the weights have been trained on; incomplete where they are unknown.
        evaluations: parent of the results, one folder per data set.
        run: run folder that the weights lie in; None for weights without one.
        chosen_on: IDs of the scans by which its step was chosen as the best one; empty where the
            user named the step.
    """

    backbone: Backbone
    config: EvaluationConfig
    weights: EvaluatedWeights
    trained_on: TrainedOn
    evaluations: Path
    run: Path | None = None
    chosen_on: frozenset[str] = frozenset()

    def folder_of(self, dataset: str) -> EvaluationFolder:
        """The folder of the results on a data set, unless the user names another one."""
        if self.run is not None:
            assert self.weights.step is not None, "a run knows the step of its weights"
            return RunFolder(self.run).evaluation(dataset, self.weights.step)
        name = f"weights-{self.weights.sha256[:DIGITS]}"
        return EvaluationFolder(self.evaluations / dataset / name)

    def dataset_name(self, store: Path, digest: str) -> str:
        """The name of a data set among the results of this model; see `eval/results/saved.py`."""
        return dataset_name(self.evaluations, store, digest)


@dataclass(frozen=True)
class Trained:
    """A finished or stopped run, read back.

    Args:
        resolved: its config with overrides.
        backbone: backbone of the teacher, in eval mode, on the run's device.
        meta: facts about the checkpoint that it comes from.
        sha256: hash of the file with its weights.
        best: best step of the run, where its weights were asked for; else None.
    """

    resolved: Resolved
    backbone: Backbone
    meta: Meta
    sha256: str
    best: BestStep | None = None


def open_model(
    path: Path,
    overrides: Sequence[str] = (),
    step: int | str | None = None,
    custom_code: bool = False,
) -> Model:
    """Read the model that a path means.

    Args:
        path: run folder, checkpoint folder or export folder.
        overrides: key=value, only keys that do not affect the weights.
        step: step of the checkpoint of a run, or `best`, see `best_step.py`; None takes the newest
            whole one.
        custom_code: whether an export may name a backbone from a module outside tapct, which is
            then imported.
    Raises:
        UserError: nothing of that kind is there, it is damaged, or an override does not fit.
    """
    prepare_cpu()  # before the first tensor
    is_run = RunFolder(path).config.is_file()
    if step is not None and not is_run and path.exists():
        raise UserError(
            f"--step {step}: only a run folder holds the weights of several steps, and {path} is "
            "none; leave --step out, or give the run folder"
        )
    if not is_run and has_step_name(path) and CheckpointFolder(path).meta.is_file():
        for run in path.absolute().parents[1:3]:  # RUN/checkpoints/STEP or RUN/eval/DATASET/STEP
            if RunFolder(run).config.is_file():
                return model_of_run(run, overrides, teacher_of_step(run, step_of(path)))
        return model_of_checkpoint(path, overrides)
    if not is_run and ExportFolder(path).card.is_file():
        return model_of_export(path, overrides, custom_code)
    if not is_run:
        raise UserError(no_model(path))
    if step == BEST:
        return best_model_of_run(path, overrides)
    return model_of_run(path, overrides, teacher_folder(path, step))


def best_model_of_run(run: Path, overrides: Sequence[str]) -> Model:
    """The teacher of the best step of a run; arguments as in `model_of_run`."""
    # a task that the user names here is taken instead of the one in the run's config
    best = best_step.find(run, _config_of(run, overrides).value.eval.during.best)
    saved = teacher_of_step(run, best.value.step)
    model = model_of_run(run, overrides, saved)
    best.check_weights(model.weights.sha256, saved)
    console.say(best.line)
    return replace(model, chosen_on=best.curve.scans)


def no_model(path: Path) -> str:
    """The error line for a path that is no model."""
    kinds = (
        "give a run folder, e.g. runs/smoke, a checkpoint in it, or a folder of `tapct export` or "
        "`tapct import`"
    )
    if not path.exists():
        return f"{path} does not exist{near_path(path)}; {kinds}"
    if path.is_file():
        return f"{path} is a file, which does not hold all that the features depend on; {kinds}"
    return (
        f"{path} is neither a run folder, a checkpoint nor an export: it has no config.yaml, no "
        f"teacher.safetensors and no config.json; {kinds}"
    )


def model_of_run(run: Path, overrides: Sequence[str], saved: Path) -> Model:
    """The teacher of a run.

    Args:
        run: run folder.
        overrides: key=value, as in `open_model`.
        saved: folder with the teacher, as `teacher_folder` returns it.
    """
    trained = read_run(run, overrides, saved)
    meta = trained.meta
    weights = EvaluatedWeights(
        run.resolve().name, meta.step, meta.samples, trained.sha256, meta.data_digest
    )
    return Model(
        trained.backbone,
        EvaluationConfig.of_run(trained.resolved.value),
        weights,
        lineage.scans_of_run(run, meta.step),
        RunFolder(run).evaluations,
        run,
    )


def model_of_checkpoint(saved: Path, overrides: Sequence[str]) -> Model:
    """The teacher of a checkpoint that lies outside of its run folder.

    The scans of pretraining are unknown: the list of them is in the run folder.
    """
    complaint = checkpoint.damage(saved)
    if complaint is not None:
        raise UserError(f"{saved} is damaged: {complaint}")
    meta = checkpoint.read_meta(saved)
    config = config_of_weights(upgraded(meta.config), overrides, str(saved))
    backbone, sha256 = read_teacher(config.model, config.seed, config.device, saved)
    reason = f"the checkpoint {saved.name} lies outside of its run folder, which lists the scans"
    weights = EvaluatedWeights(
        saved.name, meta.step, meta.samples, sha256, meta.data_digest, "checkpoint"
    )
    return Model(
        backbone,
        config,
        weights,
        TrainedOn(unknown=(f"{reason} of pretraining",)),
        evaluations_beside(saved),
    )


def model_of_export(folder: Path, overrides: Sequence[str], custom_code: bool) -> Model:
    """The backbone of an export."""
    if not is_own_card(folder):
        raise UserError(
            f"{ExportFolder(folder).card} is not a tapct export; make one of these weights with "
            f"`tapct import {folder} --out FOLDER`"
        )
    pretrained = load_pretrained(folder, custom_code=custom_code)
    settings, about = pretrained.settings, pretrained.provenance
    card = {
        "contract": to_dict(settings.hu_contract),
        "model": to_dict(settings)["model"],
        "eval": {"preprocess": to_dict(settings.preprocess)},
    }
    config = config_of_weights(card, overrides, str(ExportFolder(folder).card))
    backbone: nn.Module = pretrained.model
    if config.model != settings.model:  # another model.attention
        backbone = build_backbone(config.model, config.seed)
        backbone.load_state_dict(pretrained.model.state_dict())
    weights = EvaluatedWeights(
        str(about.get("run") or folder.resolve().name),
        whole_number(about.get("step")),
        whole_number(about.get("samples")),
        files.sha256(ExportFolder(folder).weights),
        str(about.get("data", "")),
        "export",
    )
    return Model(
        frozen(backbone, config.device),
        config,
        weights,
        scans_of_export(folder),
        evaluations_beside(folder),
        chosen_on=scans_chosen_on(about),
    )


def scans_chosen_on(provenance: Mapping[str, Any]) -> frozenset[str]:
    """IDs of the scans by which the step of an export was chosen, from its card; empty where the
    user named the step.
    """
    scans = provenance.get("chosen_on")
    return frozenset(map(str, scans)) if isinstance(scans, list) else frozenset()


def whole_number(value: Any) -> int | None:
    """A number of a card; None where it holds none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def config_of_weights(
    known: dict[str, Any], overrides: Sequence[str], source: str
) -> EvaluationConfig:
    """The settings for weights outside of a run folder.

    Args:
        known: sections of the config that the weights bring along.
        overrides: key=value; all keys but those that the weights depend on.
        source: file that `known` comes from, for error lines.
    Raises:
        UserError: an override changes what the weights depend on, or is wrong.
    """
    names = EvaluationConfig.__dataclass_fields__
    overrides = naming_one_store(overrides)
    own = {name: section for name, section in known.items() if name in names}
    config: EvaluationConfig = from_dict(EvaluationConfig, own, source, overrides)
    before: EvaluationConfig = from_dict(EvaluationConfig, own, source)
    for key, old, new in changed_keys(to_dict(before), to_dict(config)):
        if key.startswith(("model.", "contract.")):
            raise UserError(f"{key}={new}: the weights were trained with {old}; {FIXED}")
    return config


def open_run(folder: Path, overrides: Sequence[str] = (), step: int | str | None = None) -> Trained:
    """Read the teacher of a run.

    Args:
        folder: run folder.
        overrides: key=value, only keys that do not affect the weights.
        step: step of the checkpoint, or `best`; None takes the newest whole one.
    Raises:
        UserError: not a run folder, no such checkpoint, or an override that would need another
            training.
    """
    if not RunFolder(folder).config.is_file():
        hint = f"`tapct train CONFIG out={folder}` makes one"
        problem = "is not a run folder: it has no config.yaml"
        if not folder.exists():
            near = near_path(folder)
            problem = f"does not exist{near}; give the folder of a run, e.g. runs/smoke"
        raise UserError(f"{folder} {problem}; {hint}")
    if step != BEST:
        return read_run(folder, overrides, teacher_folder(folder, step))
    best = best_step.find(folder, _config_of(folder, overrides).value.eval.during.best)
    saved = teacher_of_step(folder, best.value.step)
    trained = read_run(folder, overrides, saved)
    best.check_weights(trained.sha256, saved)
    console.say(best.line)
    return replace(trained, best=best)


def read_run(folder: Path, overrides: Sequence[str], saved: Path) -> Trained:
    """Read a teacher with the config of its run; arguments as in `model_of_run`."""
    trained_with = _config_of(folder, [])
    resolved = _config_of(folder, overrides)
    for key, old, new in changed_keys(trained_with.to_dict(), resolved.to_dict()):
        raise UserError(f"{key}={new}: the run was trained with {old}; {FREE}")
    config: RunConfig = resolved.value
    backbone, sha256 = read_teacher(config.model, config.seed, config.device, saved)
    return Trained(resolved, backbone, checkpoint.read_meta(saved), sha256)


def read_teacher(section: Plugin, seed: int, device: str, saved: Path) -> tuple[Backbone, str]:
    """The teacher's backbone in a folder, frozen, and the hash of its file.

    Args:
        section: section of the backbone.
        seed: random seed of the run.
        device: setting `device`.
        saved: folder with the teacher.
    """
    backbone = build_backbone(section, seed)
    teacher = CheckpointFolder(saved).teacher
    backbone.load_state_dict(load_file(teacher))
    return frozen(backbone, device), files.sha256(teacher)


def frozen(backbone: nn.Module, device: str) -> Backbone:
    """A backbone on a device, in eval mode and without gradients."""
    frozen_backbone = backbone.to(pick_device(device)).requires_grad_(False).eval()
    return cast(Backbone, frozen_backbone)


def _config_of(folder: Path, overrides: Sequence[str]) -> Resolved:
    words = naming_one_store(overrides)
    return load_config(RunConfig, RunFolder(folder).config, words, upgrade=upgraded)


def naming_one_store(overrides: Sequence[str]) -> list[str]:
    """The overrides of an evaluation, in which `data.store` also replaces the archives of a run
    that was trained on several.
    """
    if any(word.startswith("data.store=") for word in overrides):
        return [*overrides, "data.stores=[]"]
    return list(overrides)


def teacher_folder(run: Path, step: int | str | None) -> Path:
    """The folder with the teacher of a step, or of the newest whole checkpoint without a step."""
    if step is None:
        return newest_teacher(run)
    assert isinstance(step, int), "the best step is looked up before"
    return teacher_of_step(run, step)


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
