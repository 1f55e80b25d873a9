"""Evaluation of frozen backbones: scans in, `results.json` and pictures out.

Scans are read one at a time and each is seen by every model before the next, so memory holds one
scan however many there are. Train scans are passed once, decoders are fitted, then test scans are
passed once.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tapct.base import files
from tapct.base.exits import UserError
from tapct.config import plugins, setting, to_dict
from tapct.config.plugins import Plugin
from tapct.eval import pictures, scans
from tapct.eval.baselines import NamedModel
from tapct.eval.features import DenseFeatures, PatchGrid, Prepared, Preprocess, features_of, prepare
from tapct.eval.scans import LabelledScan, ScanRow, Split
from tapct.types import HUContract

SCHEMA = 1


@dataclass(frozen=True)
class During:
    """Evaluation while training goes on."""

    every: int = setting(
        0,
        "steps between evaluations during training, at checkpoints of these steps and the last; "
        "0: none",
        ge=0,
    )
    how: str = setting(
        "process", "a process beside the first rank, or a SLURM job", choices=("process", "job")
    )
    device: str = setting(
        "cpu", "of a `process`, beside ranks that fill their GPUs; empty: as `device` says"
    )
    wait_s: float = setting(
        600.0,
        "in a SLURM job, which ends with training what runs beside it: seconds that the first "
        "rank then waits for the "
        "evaluation of a `process`",
        ge=0.0,
    )
    sbatch: tuple[str, ...] = setting(
        (), "options of sbatch for a `job`, e.g. --partition=gpu --gres=gpu:1 --time=60"
    )


@dataclass(frozen=True)
class Config:
    """Settings of one evaluation of frozen features."""

    task: Plugin = plugins.section(
        "eval.tasks", "segmentation", "what the frozen features are judged by"
    )
    preprocess: Preprocess = dataclasses.field(
        default_factory=Preprocess,
        metadata={"doc": "how whole scans are brought before the backbone"},
    )
    only: tuple[str, ...] = setting(
        (), "patterns of the scans' paths that count, e.g. `ts_body/*`; empty: all"
    )
    test_share: float = setting(
        0.5, "share of the patients that is held out, at least one", gt=0, lt=1
    )
    max_scans: int = setting(0, "most labelled scans, train and test together; 0 takes all", ge=0)
    seed: int = setting(0, "of the split and of the choice of training patches")
    num_blocks: int = setting(
        8, "slabs along z that a scan is cut into when there is one patient only", ge=2
    )
    block_gap: int = setting(
        2, "patch slices between two such slabs that belong to neither side", ge=0
    )
    num_pictures: int = setting(2, "test scans that get an overlay and a PCA picture", ge=0)
    batch: int = setting(8, "windows per forward call", ge=1)
    during: During = dataclasses.field(
        default_factory=During, metadata={"doc": "evaluation while training goes on"}
    )


@dataclass(frozen=True)
class _Seen:
    """One scan of one side with what is common to all models."""

    scan: LabelledScan
    prepared: Prepared
    truth: Any


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
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Judge frozen backbones side by side on the same scans, windows, grid and labels.

    Args:
        models: at least one, on `device`, all with the same patch; the first one leads in the
            pictures.
        rows: accepted scans; only those with labels count.
        root: folder that the rows' paths are relative to.
        contract: HU to network input.
        out: folder for `results.json` and `overlays/*.png`; made if missing, `results.json` is
            replaced atomically.
        preprocess: instead of the config's, e.g. the one stored in an export.
        held_out: patients kept out of pretraining: the test side where labelled scans lie on both
            sides.
        progress: called with (scans done, scans in all).
    Returns:
        What `results.json` holds.
    Raises:
        UserError: no labels, models that differ in patch, windows off the patch grid.
    """
    began = time.perf_counter()
    preprocess = preprocess or config.preprocess
    patch = _common_patch(models)
    preprocess.check_patch(patch)
    split = scans.split_by_patient(
        scans.matching(rows, config.only),
        test_share=config.test_share,
        max_scans=config.max_scans,
        seed=config.seed,
        held_out=held_out,
    )
    build_task = plugins.load("eval.tasks", config.task.name).build
    task = build_task(config.task.config, seed=config.seed, num_train=len(split.train))
    run = _Run(
        config, split, root, contract, preprocess, patch, torch.device(device), task, progress
    )
    for seen in run.scans(test=False):
        for model in models:
            task.learn(model.name, run.features(model, seen), seen.truth)
    task.fit()
    overlays, pca = [], []
    for number, seen in enumerate(run.scans(test=True)):
        dense = {model.name: run.features(model, seen) for model in models}
        predictions = {
            name: task.judge(name, features, seen.truth) for name, features in dense.items()
        }
        if number < config.num_pictures:
            overlay, picture = _draw(out, task, seen, dense, predictions)
            overlays.append(overlay)
            pca.append(picture)
    results = {**run.describe(), **task.results(), "overlays": overlays, "pca": pca}
    results["seconds"] = round(time.perf_counter() - began, 2)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    files.write_atomically(out / "results.json", text)
    return results


@dataclass(frozen=True)
class _Run:
    config: Config
    split: Split
    root: Path
    contract: HUContract
    preprocess: Preprocess
    patch: tuple[int, int, int]
    device: torch.device
    task: Any
    progress: Callable[[int, int], None] | None

    def describe(self) -> dict[str, Any]:
        """What `results.json` says of how it was made."""
        return {
            "schema": SCHEMA,
            "task": self.config.task.name,
            "task_config": to_dict(self.config.task.config),
            "preprocess": to_dict(self.preprocess),
            "patch": list(self.patch),
            "seed": self.config.seed,
            "split": _describe(self.split),
        }

    def scans(self, *, test: bool) -> Iterator[_Seen]:
        """Read, prepare and label the scans of one side, one at a time."""
        rows = self.split.test if test else self.split.train
        total = len(self.split.train) + len(self.split.test)
        for number, row in enumerate(rows, start=1):
            scan = scans.read_labelled(row, self.root)
            volume = scan.volume
            prepared = prepare(
                volume.hu_ZYX,
                self.contract,
                self.preprocess,
                self.patch,
                self.device,
                volume.spacing_mm,
            )
            truth = self.task.truth(
                scan, prepared.grid, self._in_play(prepared.grid, scan.id, test=test)
            )
            yield _Seen(scan, prepared, truth)
            if self.progress:
                self.progress(number + (len(self.split.train) if test else 0), total)

    def features(self, model: NamedModel, seen: _Seen) -> DenseFeatures:
        return features_of(model.model, seen.prepared, self.preprocess, batch=self.config.batch)

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


def _common_patch(models: Sequence[NamedModel]) -> tuple[int, int, int]:
    patches = {tuple(int(side) for side in model.model.patch): model.name for model in models}  # type: ignore[union-attr]
    if len(patches) != 1:
        found = (
            ", ".join(f"{name} {'x'.join(map(str, patch))}" for patch, name in patches.items())
            or "none"
        )
        raise UserError(
            f"models of one evaluation must share one patch, got {found}. Evaluate them in "
            "separate runs."
        )
    z, y, x = next(iter(patches))
    return z, y, x


def _describe(split: Split) -> dict[str, Any]:
    described: dict[str, Any] = {
        "mode": split.mode,
        "held_out_from_pretraining": split.held_out,
        "train": [row.id for row in split.train],
        "test": [row.id for row in split.test],
    }
    if split.mode == scans.BLOCKS:
        described["note"] = scans.BLOCKS_NOTE
    return described


def _draw(
    out: Path, task: Any, seen: _Seen, dense: dict[str, DenseFeatures], predictions: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Overlay and PCA picture of one test scan; returns their entries in the results."""
    volume, name = seen.scan.volume, seen.scan.id
    overlay, pca = f"overlays/{name}.png", f"overlays/{name}_pca.png"
    caption = task.draw(out / overlay, seen.truth, predictions)
    at = task.slices_of_interest(seen.truth)
    columns = [(model.replace("_", " "), features) for model, features in dense.items()]
    pictures.draw_pca(out / pca, volume.hu_ZYX, volume.spacing_mm, columns, at)
    return (
        {"scan": name, "file": overlay, "caption": caption},
        {
            "scan": name,
            "file": pca,
            "caption": f"first three principal components of the patch features of {name}",
        },
    )
