"""Facts about a run for the model card of its export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tapct.base.exits import UserError
from tapct.base.geometry import times
from tapct.data.packed.store import Store
from tapct.data.packed.trained_on import TrainedOn
from tapct.eval.results import saved
from tapct.eval.results.json_file import Evaluation
from tapct.run import lineage
from tapct.run.config import RunConfig
from tapct.run.model_source import Trained
from tapct.run_folder import RunFolder
from tapct.weights.huggingface.model_card import ModelFacts


def facts_of(folder: Path, trained: Trained, licence: str) -> ModelFacts:
    """What a model card states about a run.

    Args:
        folder: run folder.
        trained: its teacher.
        licence: SPDX identifier of the licence of the weights; empty where it is not stated.
    """
    meta, config = trained.meta, trained.resolved.value
    trained_on = lineage.scans_of_run(folder, meta.step)
    return ModelFacts(
        name=folder.absolute().name,
        step=meta.step,
        samples=meta.samples,
        trained_on=trained_on,
        data=data_rows(config, meta.data_digest, trained_on),
        recipe=recipe_rows(config, meta.step, meta.samples),
        evaluations=evaluations_of(folder, trained.sha256),
        licence=licence,
        git_revision=_revision(folder),
    )


def recipe_rows(config: RunConfig, step: int, samples: int) -> tuple[tuple[str, str], ...]:
    """The settings of the training that matter most; no paths.

    Args:
        config: config of the run.
        step: finished steps.
        samples: scans drawn, repetitions included.
    """
    views, losses = config.views, config.losses
    of_losses = (f"{one.name} {getattr(one.config, 'weight', 1.0):g}" for one in losses)
    return (
        ("steps", f"{step:,} of {config.train.steps:,}"),
        ("scans per step", f"{config.train.global_batch:,}"),
        ("scans drawn, with repetitions", f"{samples:,}"),
        ("losses and their weights", ", ".join(of_losses)),
        ("global crops", f"{views.num_globals} of {times(views.global_window)} voxels"),
        ("local crops", f"{views.num_locals} of {times(views.local_window)} voxels"),
        ("learning rate", f"{config.optim.lr:g} (scaling: {config.optim.lr_scaling})"),
        ("precision", config.train.precision),
        ("seed", str(config.seed)),
        *((("stages", str(1 + len(config.stages))),) if config.stages else ()),
    )


def data_rows(config: RunConfig, digest: str, trained_on: TrainedOn) -> tuple[tuple[str, str], ...]:
    """What is known about the training data, from the store; only its digest where the store is
    gone or holds other voxels. No name of a folder, scan or patient.

    Args:
        config: config of the run.
        digest: digest of the store that the run was trained on.
        trained_on: scans of pretraining; the others of the store, such as those of held-out
            patients, are left out.
    """
    rows = [("digest of the voxels", digest)]
    try:
        store = Store(config.data.evaluated)
    except (UserError, OSError):
        return tuple(rows)
    if store.digest != digest or not store.scans:
        return tuple(rows)
    seen = {scan.digest for scan in trained_on.from_step}
    scans = [scan for scan in store.scans if scan.checksum in seen]
    if not scans:
        return tuple(rows)
    shapes_N3 = np.array([scan.shape_ZYX for scan in scans])
    spacing_mm_N3 = np.array([scan.spacing_mm for scan in scans])
    rows.append(("slices per scan", _spread(shapes_N3[:, 0], "d")))
    rows.append(("rows", _spread(shapes_N3[:, 1], "d")))
    rows.append(("columns", _spread(shapes_N3[:, 2], "d")))
    rows.append(("distance of slices in mm", _spread(spacing_mm_N3[:, 0], ".2f")))
    rows.append(("size of pixels in mm", _spread(spacing_mm_N3[:, 1:].ravel(), ".2f")))
    refused = {name: num for name, num in store.summary.items() if name != "accepted" and num}
    if refused:
        reasons = ", ".join(f"{name} {num:,}" for name, num in sorted(refused.items()))
        rows.append(("scans refused by the index, by reason", reasons))
    return tuple(rows)


def _spread(values: np.ndarray, form: str) -> str:
    """Median and range."""
    kind = int if form == "d" else float
    low, middle, high = (kind(np.quantile(values, share)) for share in (0, 0.5, 1))
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def evaluations_of(folder: Path, sha256: str) -> tuple[tuple[str, Evaluation], ...]:
    """The evaluations of exactly these weights, by the name of the data set.

    Args:
        folder: run folder.
        sha256: hash of the file with the weights.
    """
    found = []
    for one in saved.find(folder):
        evaluation = one.evaluation
        if evaluation is None or evaluation.origin.weights is None:
            continue
        if evaluation.origin.weights.sha256 == sha256:
            found.append((one.dataset, evaluation))
    return tuple(found)


def _revision(folder: Path) -> str:
    """Revision of tapct that started the run; empty where it is not recorded."""
    try:
        about = json.loads(RunFolder(folder).provenance.read_text(encoding="utf-8"))
        return str(about.get("git_revision", ""))
    except (OSError, ValueError, AttributeError):
        return ""
