"""Use a trained model: evaluate its features; export the weights of a run."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tapct.base import console, files
from tapct.base.exits import UserError
from tapct.base.paths import command_line
from tapct.data.index.share import WHOLE, Share
from tapct.data.packed.store import Store, labels_digest
from tapct.data.packed.trained_on import TrainedOn
from tapct.distributed.device import pick_device
from tapct.eval import runner
from tapct.eval.labels.from_tables import read_tables
from tapct.eval.models.baselines import NAMES, with_baselines
from tapct.eval.models.evaluated import NamedModel
from tapct.eval.results import json_file
from tapct.eval.results.json_file import EvaluatedData, EvaluatedWeights, Evaluation, Origin
from tapct.eval.results.saved import link_newest
from tapct.eval.scans import held_out
from tapct.eval.scans.usable import ScanRow
from tapct.eval.scores import OWN_MODEL
from tapct.run import best_step, exported_run, lineage
from tapct.run.config import RunConfig
from tapct.run.model_source import Model, Trained, open_model, open_run
from tapct.run.provenance import git_revision
from tapct.run_folder import EvaluationFolder, RunFolder, features_beside
from tapct.weights.card import FeatureSettings
from tapct.weights.export import save_export
from tapct.weights.huggingface.folder import save_folder

RESERVED = NAMES  # beginnings of the names of baselines, e.g. untrained_layerscale1
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found, and where it is.

    Args:
        evaluation: content of results.json.
        folder: folder of results.json and the pictures.
    """

    evaluation: Evaluation
    folder: Path


def evaluate(
    path: Path,
    overrides: Sequence[str] = (),
    step: int | str | None = None,
    command: str = "",
    on_validation: bool = False,
) -> Evaluation:
    """Evaluate the frozen features of a model beside its baselines; arguments as in
    `evaluate_model`, and the results where it writes them.
    """
    model = open_model(path, overrides, step)
    return evaluate_model(model, command=command, on_validation=on_validation).evaluation


def evaluate_model(
    model: Model,
    *,
    out: Path | None = None,
    command: str = "",
    others: Mapping[str, Model] | None = None,
    on_validation: bool = False,
    share: Share = WHOLE,
) -> Evaluated:
    """Evaluate the frozen features of a model beside its baselines.

    Writes one folder per data set and model, see `model_source.py`, or `out`. Patients that
    `data.held_out` kept out of pretraining are the test side; without any, `eval.test_share`
    splits.

    Args:
        model: model, from `open_model`.
        out: folder of the results; None chooses it.
        command: command line for results.json; empty takes this process's own.
        others: further models in the same table, by name, each with its own HU contract and
            preprocessing.
        on_validation: whether to test on the validation patients of `eval.validation_share`.
        share: as in `runner.evaluate`.
    Raises:
        UserError: there is no store, no scan can be used, there are no validation patients, or
            `out` holds other results.
    """
    config = model.config
    if on_validation and not config.eval.validation_share:
        raise UserError(
            "--validation needs validation patients; set their share of the test patients with "
            "eval.validation_share, for example 0.5"
        )
    store = Store(config.data.evaluated)
    data = evaluated_data(model.dataset_name(store.path, store.digest), store)
    of_step = model.folder_of(data.name)
    folder = of_step.validation if on_validation else of_step
    if out is not None:
        folder = EvaluationFolder(out)
    if out is not None:
        check_out(out, data, model.weights)
    arguments = shlex.split(command) if command else sys.argv
    patients = [scan.patient for scan in store.scans]
    reading = config.data.loader
    tables = read_tables(
        store, config.eval.scan_labels, config.eval.landmarks, config.eval.split_column
    )
    others = others or {}
    models = _models_of_table(model, others)
    with console.progress_bar("eval") as progress:
        evaluation = runner.evaluate(
            models,
            store.scans,
            store,
            config.eval,
            contract=config.contract,
            out=folder.path,
            features=features_beside(model.evaluations),
            held_out=config.data.held_out_patients(patients, config.seed),
            check_held_out=held_out_check(store, model.trained_on),
            check_others={
                name: held_out_check(store, other.trained_on) for name, other in others.items()
            },
            tables=tables,
            on_validation=on_validation,
            split_seed=config.data.split_seed,
            chosen_on=model.chosen_on,
            origin=Origin(
                replace(data, tables=tables.digest),
                model.weights,
                command_line(arguments),
                git_revision(),
            ),
            max_skips=reading.max_skips if reading.on_error == "skip" else 0,
            device=pick_device(config.device),
            progress=progress,
            share=share,
        )
    if model.run is not None and out is None:
        best_step.settle(model.run, of_step)
        link_newest(model.run)
    return Evaluated(evaluation, folder.path)


def _models_of_table(model: Model, others: Mapping[str, Model]) -> list[NamedModel]:
    """The evaluated model, the others and the baselines, in the order of the table."""
    config = model.config
    own, *baselines = with_baselines(
        model.backbone, config.model, config.seed, config.eval.baselines, config.contract
    )
    return [own, *(_named(name, other) for name, other in others.items()), *baselines]


def open_others(texts: Sequence[str], device: str, custom_code: bool = False) -> dict[str, Model]:
    """Read the models of `--models NAME=PATH`.

    Args:
        texts: NAME=PATH each.
        device: setting `device`.
        custom_code: whether an export may name a backbone from a module outside tapct.
    Returns:
        Name -> model.
    Raises:
        UserError: a text has another form, a name is taken, or a path is no model.
    """
    models: dict[str, Model] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path or not _NAME.fullmatch(name):
            raise UserError(
                f"--models {text}: write NAME=PATH, e.g. tap_b=models/tap_b; NAME has letters, "
                "digits, dots, _ and - only"
            )
        if name in models or name == OWN_MODEL or name.startswith(RESERVED):
            raise UserError(
                f"--models {text}: the name {name} is taken by another row of the table; choose "
                "another one"
            )
        models[name] = open_model(
            files.expand_path(path), [f"device={device}"], custom_code=custom_code
        )
    return models


def _named(name: str, model: Model) -> NamedModel:
    config = model.config
    return NamedModel(name, model.backbone, config.contract, config.eval.preprocess)


def evaluated_data(name: str, store: Store) -> EvaluatedData:
    """The data set of an evaluation, as results.json describes it."""
    return EvaluatedData(
        name, store.manifest_digest, store.digest, labels_digest(store.scans), len(store)
    )


def held_out_check(
    store: Store, scans: TrainedOn
) -> Callable[[Sequence[ScanRow]], held_out.HeldOut]:
    """The function that compares test scans of a store with the scans of pretraining."""
    return partial(
        held_out.check,
        rows=store.scans,
        digests={scan.id: scan.checksum for scan in store.scans},
        patient_key=store.patient_key,
        trained_on=scans,
        patient_rules={scan.id: scan.patient_from for scan in store.scans},
    )


def check_out(out: Path, data: EvaluatedData, weights: EvaluatedWeights) -> None:
    """Refuse a folder of the user's choice that is none, or that holds other results.

    Raises:
        UserError: it is a file, or its results are of other data or weights, or are not readable.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if not EvaluationFolder(out).results.exists():
        return
    known, why_not = json_file.read(out)
    if known is None:
        raise UserError(f"--out {out}: {why_not}; give another folder, or remove the file")
    other = known.origin
    same_data = other.data is not None and (other.data.store, other.data.labels) == (
        data.store,
        data.labels,
    )
    same_weights = other.weights is not None and other.weights.sha256 == weights.sha256
    if not (same_data and same_weights):
        what = "weights" if same_data else "data"
        raise UserError(f"--out {out} holds the results of other {what}; give another folder")


def export(folder: Path, out: Path | None = None, step: int | str | None = None) -> Path:
    """Write a run's teacher for `tapct.load_pretrained`; RUN/export by default.

    Args:
        folder: run folder.
        out: folder to write.
        step: step of the checkpoint, or `best`; None takes the newest whole one.
    """
    trained = open_run(folder, step=step)
    target = out or RunFolder(folder).export.path
    meta = trained.meta
    provenance = {
        "run": folder.name,
        "step": meta.step,
        "samples": meta.samples,
        "data": meta.data_digest,
    }
    if trained.best is not None:
        curve = trained.best.curve
        provenance["chosen_by"] = f"best {curve.metric} of {curve.task} on the {curve.people}"
        provenance["chosen_on"] = sorted(curve.scans)
    scans = lineage.scans_of_run(folder, meta.step)
    save_export(target, trained.backbone, _settings_of(trained), provenance, scans)
    return target


def export_for_transformers(
    folder: Path, out: Path, licence: str = "", step: int | str | None = None
) -> Path:
    """Write a run's teacher as a folder that Hugging Face transformers loads without tapct.

    Args:
        folder: run folder.
        out: folder to write.
        licence: SPDX identifier of the licence of the weights; empty where it is not stated.
        step: as in `export`.
    """
    trained = open_run(folder, step=step)
    facts = exported_run.facts_of(folder, trained, licence)
    save_folder(out, trained.backbone, _settings_of(trained), facts)
    return out


def _settings_of(trained: Trained) -> FeatureSettings:
    """All that the features of a run's teacher depend on, for any machine."""
    config: RunConfig = trained.resolved.value
    portable = trained.backbone.export_config()  # weights do not depend on the attention back-end
    section = config.model if portable is None else replace(config.model, config=portable)
    return FeatureSettings(section, config.contract, config.eval.preprocess)
