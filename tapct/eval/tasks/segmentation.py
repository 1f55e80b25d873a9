"""Organ segmentation by a linear decoder on frozen features: one 1x1x1 convolution per model.

Axes: N patches in (z, y, x) raster order, K training patches, D channels, C classes, V label values
of one scan, Z Y X voxels or patches. Class 0 is the air outside, class 1 the rest of the body, then
the organs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.config import setting
from tapct.eval import pictures
from tapct.eval.contract import Breakdown, Headline, Labels, ScanScore, Task, TaskResults
from tapct.eval.decoder import Decoder, fit_decoder
from tapct.eval.features import DenseFeatures, PatchGrid
from tapct.eval.scans import LabelledScan
from tapct.eval.truth import OUTSIDE, PatchTruth, patch_truth
from tapct.types import IGNORE_LABEL

RESOLUTIONS = ("patch", "voxel")
_OUTSIDE, _BODY = "outside", "body"
OUTSIDE_NAMES = ("table", "couch", "background")
BODY_NAMES = ("body", "body_trunc", "body_extremities", "skin", "external")
MOST_NAMES = 12  # in the line about the organs of the mean


@dataclass(frozen=True)
class Config:
    """Settings of the linear decoder and of its classes."""

    resolution: str = setting(
        "voxel",
        "`voxel`: the decoder learns the share of each label in a patch, and the headline Dice "
        "is computed on the voxels of the scan, to which the logits are upsampled; `patch`: "
        "the decoder learns the majority label of each patch, and the headline Dice is "
        "computed on patches",
        choices=RESOLUTIONS,
    )
    organs: tuple[str, ...] = setting(
        (), "label names or values that count as organs; empty: all; other labels count as body"
    )
    outside: tuple[str, ...] = setting(
        OUTSIDE_NAMES, "label names or values that count as outside (air around the patient)"
    )
    body: tuple[str, ...] = setting(
        BODY_NAMES,
        "label names or values for `inside the body, no organ`; if one of these exists, label 0 "
        "means air",
    )
    max_tokens: int = setting(
        24576, "maximum number of training patches of all scans together, stratified by label", ge=1
    )
    l2: float = setting(
        3e-4,
        "L2 penalty on the decoder weights w for standardised features: l2 / 2 x sum of w^2",
        ge=0,
    )
    steps: int = setting(60, "number of L-BFGS iterations, the same for every model", ge=1)


@dataclass(frozen=True)
class Prediction:
    """A decoder's prediction: class index (uint16) of every voxel of the scan as read."""

    classes_ZYX: np.ndarray


def dice_from_confusion(confusion_CC: np.ndarray, class_index: int) -> float:
    """2 |A and B| / (|A| + |B|) of one class; rows of the confusion matrix are truth, columns
    prediction.
    """
    hit = float(confusion_CC[class_index, class_index])
    total = float(confusion_CC[class_index].sum() + confusion_CC[:, class_index].sum())
    return 2 * hit / total if total else float("nan")


class Segmentation(Task[PatchTruth, Prediction]):
    """Find organs in frozen features. State grows with the training patches that are kept, never
    with whole scans.
    """

    labels = Labels.VOXELS

    def __init__(self, config: Config, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.tokens_per_scan = config.max_tokens
        self.classes: tuple[str, ...] = ()
        self.organs: tuple[str, ...] = ()
        self._decoders: dict[str, Decoder] = {}
        # model -> scan, patch grid and features; models may differ in their patch grid
        self._features: dict[str, list[tuple[str, PatchGrid, Tensor]]] = defaultdict(list)
        self._targets: dict[
            tuple[str, PatchGrid], tuple[Tensor, tuple[int, ...], dict[int, str]]
        ] = {}
        self._dice: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        self._left_out: dict[tuple[int, str], str] = {}  # label value, its name -> class
        self._not_learned: set[str] = set()  # organs of test scans that no training scan has

    def named_labels(self) -> Mapping[str, tuple[str, ...]]:
        """Words of the settings that must name a label; the defaults need not."""
        defaults = {*OUTSIDE_NAMES, *BODY_NAMES}
        found = {}
        for key in ("organs", "outside", "body"):
            words: tuple[str, ...] = getattr(self.config, key)
            found[key] = tuple(word for word in words if word not in defaults)
        return found

    def begin(self, num_train: int) -> None:
        """Divide the training patches equally among the training scans."""
        self.tokens_per_scan = max(1, self.config.max_tokens // num_train)

    def truth(self, scan: LabelledScan, grid: PatchGrid, in_play_Z: np.ndarray) -> PatchTruth:
        """Count the labels on the patch grid; the same for every model."""
        names = dict(scan.label_map.names)
        body_labelled = self._body_labelled(names)
        truth = patch_truth(scan, grid, body_labelled=body_labelled, in_play_Z=in_play_Z)
        for value in truth.values:
            name = self._class_of(value, names)
            if value > 0 and name in (_OUTSIDE, _BODY):
                self._left_out[value, names.get(value, "")] = name
        return truth

    def learn(self, model: str, dense: DenseFeatures, truth: PatchTruth) -> None:
        """Keep the training patches of one scan for one model."""
        index_K, weight_K = truth.sample(self.tokens_per_scan, self.seed)
        features_KD = dense.tokens_ND()[index_K.to(dense.features_DZYX.device)]
        self._features[model].append((truth.scan.id, truth.grid, features_KD))
        if (truth.scan.id, truth.grid) not in self._targets:
            share_KV = torch.from_numpy(truth.shares_NV)[index_K]
            if self.config.resolution == "patch":
                share_KV = F.one_hot(share_KV.argmax(1), share_KV.shape[1]).float()
            self._targets[truth.scan.id, truth.grid] = (
                share_KV * weight_K[:, None],
                truth.values,
                truth.names(),
            )

    def fit(self) -> None:
        """Fit one decoder per model; classes are those that occur in the training scans.

        Raises:
            UserError: no organ occurs in them.
        """
        self.classes, self.organs = self._find_classes()
        targets: dict[tuple[str, PatchGrid], Tensor] = {}
        for of_scan, (target_KV, values, names) in self._targets.items():
            # a label of the scan that lies in none of the patches kept has no mass and no class
            class_names = [self._class_of(value, names) for value in values]
            column_V = torch.tensor(
                [self.classes.index(c if c in self.classes else _BODY) for c in class_names]
            )
            empty_KC = target_KV.new_zeros(len(target_KV), len(self.classes))
            targets[of_scan] = empty_KC.index_add_(1, column_V, target_KV)
        for model, features in self._features.items():
            x_KD = torch.cat([features_KD for _, _, features_KD in features])
            target = torch.cat([targets[scan, grid] for scan, grid, _ in features]).to(x_KD.device)
            self._decoders[model] = fit_decoder(
                x_KD, target, l2=self.config.l2, steps=self.config.steps
            )
        self._features.clear()
        self._targets.clear()

    def judge(self, model: str, dense: DenseFeatures, truth: PatchTruth) -> Prediction:
        """Predict a test scan and keep its Dice at patches and voxels, over the slices in play."""
        logits_CZYX = self._decoders[model].logits_CZYX(dense)
        prediction_ZYX = truth.grid.argmax_voxels(logits_CZYX)
        in_play = truth.in_play_Z[truth.grid.patch_of_voxel(0, truth.grid.original[0])]
        counted_ZYX = truth.scan.label_map.labels_ZYX[in_play] != IGNORE_LABEL
        voxel = self._confusion(
            self.class_labels(truth)[in_play][counted_ZYX], prediction_ZYX[in_play][counted_ZYX]
        )
        open_N = truth.open_N()
        names = truth.names()
        of_scan = {self._class_of(value, names) for value in truth.values}
        self._not_learned |= of_scan - set(self.classes) - {_OUTSIDE, _BODY}
        class_V = self._class_index(truth)[[max(v, 0) for v in truth.values]]
        patch_truth_N = class_V[truth.shares_NV.argmax(1)]
        patch = self._confusion(
            patch_truth_N[open_N], logits_CZYX.flatten(1).argmax(0).cpu().numpy()[open_N]
        )
        for resolution, confusion in (("voxel", voxel), ("patch", patch)):
            self._dice.setdefault((resolution, model), {})[truth.scan.id] = {
                organ: dice_from_confusion(confusion, self.classes.index(organ))
                for organ in self.organs
                if confusion[self.classes.index(organ)].sum() > 0
            }
        return Prediction(prediction_ZYX)

    def class_labels(self, truth: PatchTruth) -> np.ndarray:
        """True class index (uint16) of every voxel; labels that no training scan has count as
        body, voxels with IGNORE_LABEL as label 0 (the metrics leave them out).
        """
        labels_ZYX = truth.scan.label_map.labels_ZYX
        classes_ZYX: np.ndarray = self._class_index(truth)[
            np.where(labels_ZYX == IGNORE_LABEL, 0, labels_ZYX)
        ]
        return classes_ZYX

    def slices_of_interest(self, truth: PatchTruth) -> tuple[int, int]:
        """The axial and the coronal slice that show most organs."""
        return pictures.richest_slices(
            self.class_labels(truth), [self.classes.index(o) for o in self.organs]
        )

    def draw(self, path: Path, truth: PatchTruth, predictions: Mapping[str, Prediction]) -> str:
        """Write a picture of one test scan, CT | truth | each model's prediction; returns its
        caption.
        """
        at, scan = self.slices_of_interest(truth), truth.scan
        panels = [pictures.Panel("CT", None), pictures.Panel("truth", self.class_labels(truth))]
        for model, prediction in predictions.items():
            dice = list(self._dice[self.config.resolution, model][scan.id].values())
            score = f"  Dice {np.mean(dice):.2f}" if dice else ""
            panels.append(pictures.Panel(model.replace("_", " ") + score, prediction.classes_ZYX))
        volume = scan.volume
        pictures.draw_overlay(
            path, volume.hu_ZYX, volume.spacing_mm, panels, self.classes, self.organs, at
        )
        where = f"axial slice {at[0]}, coronal slice {at[1]} of test scan {scan.id}"
        return f"CT, truth and each model's prediction: {where}"

    def results(self) -> TaskResults:
        """Return Dice by organ and scan; means go over the scans that have the organ, then over
        organs.

        Raises:
            UserError: no organ of the decoder occurs in the test scans.
        """
        models: dict[str, dict[str, Any]] = {}
        scans: list[ScanScore] = []
        for (resolution, model), per_scan in self._dice.items():
            dice = self._mean_by_organ(per_scan)
            mean = float(np.mean(list(dice.values()))) if dice else None
            entry = models.setdefault(model, {})
            entry[f"mean_dice_{resolution}"] = mean
            entry[f"dice_{resolution}"] = dice
            if resolution == self.config.resolution:
                if mean is None:
                    raise UserError(
                        f"none of the organs that the decoder learned ({', '.join(self.organs)}) "
                        "occurs in the test scans. Give labels to more scans, or change eval.seed."
                    )
                entry.update(mean_dice=mean, dice=dice)
                for scan, parts in per_scan.items():
                    value = float(np.mean(list(parts.values()))) if parts else float("nan")
                    scans.append(ScanScore(scan, model, value, parts))
        dice_of = {model: entry["dice"] for model, entry in models.items()}
        return TaskResults(models, tuple(scans), _by_organ(self.organs, dice_of))

    def headline(self) -> Headline:
        """Return the mean Dice over organs, at the resolution of the config."""
        models = self.results().models
        values = {model: float(entry["mean_dice"]) for model, entry in models.items()}
        organs = list(dict.fromkeys(organ for entry in models.values() for organ in entry["dice"]))
        return _headline(values, self.config.resolution, self._mean_of(organs))

    def _mean_of(self, organs: Sequence[str]) -> str:
        """What the mean Dice is a mean of, and which labels are not in it.

        Args:
            organs: organs in the mean.
        """
        left_out = []
        for (value, name), counts_as in sorted(self._left_out.items()):
            by_number = f"label {value} (set as {counts_as} by its number; it has no name)"
            left_out.append(name or by_number)
        left_out += [f"{organ} (in no test scan)" for organ in self.organs if organ not in organs]
        left_out += [f"{organ} (in no training scan)" for organ in sorted(self._not_learned)]
        line = f"mean of {counted(len(organs), 'organ')}: {_listed(organs)}"
        if left_out:
            line += f"; left out: {_listed(left_out)}"
        if any(re.fullmatch(r"label \d+", organ) for organ in organs):
            line += (
                "; a label without a name may be the body or the table: see "
                "eval.tasks.segmentation.body and outside"
            )
        return line

    def _mean_by_organ(self, per_scan: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        dice: dict[str, float] = {}
        for organ in self.organs:
            values = [parts[organ] for parts in per_scan.values() if organ in parts]
            if values:
                dice[organ] = float(np.mean(values))
        return dice

    def _confusion(self, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        num = len(self.classes)
        pairs = truth.astype(np.int32) * num + prediction
        return np.bincount(pairs.reshape(-1), minlength=num * num).reshape(num, num)

    def _find_classes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        present: dict[str, int] = {}  # class -> lowest label value, for the order
        for target_KV, values, names in self._targets.values():
            for value, mass in zip(values, target_KV.sum(0).tolist(), strict=True):
                if mass > 0:
                    name = self._class_of(value, names)
                    present[name] = min(value, present.get(name, value))
        ordered = sorted(present, key=lambda name: (present[name], name))
        organs = tuple(name for name in ordered if name not in (_OUTSIDE, _BODY))
        if not organs:
            raise UserError(
                f"no organ label occurs in the training scans (they have: {', '.join(ordered)}). "
                "Check the label maps, or "
                f"eval.tasks.segmentation.organs, which is [{', '.join(self.config.organs)}]."
            )
        return (_OUTSIDE, _BODY, *organs), organs

    def _class_of(self, value: int, names: dict[int, str]) -> str:
        """The class that a label value of one scan belongs to."""
        if value == OUTSIDE:
            return _OUTSIDE
        if value == 0:
            return _OUTSIDE if self._body_labelled(names) else _BODY
        name = names.get(value, f"label {value}")
        if _is_called(value, name, self.config.outside):
            return _OUTSIDE
        if _is_called(value, name, self.config.body):
            return _BODY
        wanted = not self.config.organs or _is_called(value, name, self.config.organs)
        return name if wanted else _BODY

    def _body_labelled(self, names: dict[int, str]) -> bool:
        """True where the body has a label of its own, by name or by number, so that 0 is the air
        outside.
        """
        by_number = any(word.isdigit() for word in self.config.body)
        return by_number or any(
            _is_called(value, name, self.config.body) for value, name in names.items()
        )

    def _class_index(self, truth: PatchTruth) -> np.ndarray:
        """Table from label value to class index, uint16."""
        names = truth.names()
        table = np.full(max(*truth.values, 0) + 1, self.classes.index(_BODY), dtype=np.uint16)
        for value in truth.values:
            name = self._class_of(value, names)
            if value >= 0 and name in self.classes:
                table[value] = self.classes.index(name)
        return table


def _is_called(value: int, name: str, words: Sequence[str]) -> bool:
    """Whether one of the words is the name of a label, in any case, or its value."""
    return any(word.lower() in (name.lower(), str(value)) for word in words)


def _listed(names: Sequence[str]) -> str:
    """Names as one text, the last ones as a number where there are many."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _headline(values: Mapping[str, float], resolution: str, mean_of: str = "") -> Headline:
    meaning = (
        "Dice of a linear decoder on frozen features, mean over organs, counted at "
        f"{resolution} resolution. Everything but the backbone is equal."
    )
    return Headline("mean Dice", values, "higher", meaning, (0.0, 1.0), mean_of)


def _by_organ(
    organs: Sequence[str], dice_of: Mapping[str, Mapping[str, float]]
) -> Breakdown | None:
    """Rows of organs from the Dice of each model; None without any organ."""
    if not organs:
        return None
    values: dict[str, dict[str, float]] = {}
    for organ in organs:
        values[organ] = {model: dice[organ] for model, dice in dice_of.items() if organ in dice}
    return Breakdown("Dice of each organ", "organ", values)


def section_from_schema_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Bring results.json of schema 1, which held this task alone, into the form of schema 2.

    Args:
        content: the whole file.
    Returns:
        The section of this task.
    """
    models: Mapping[str, Any] = content["models"]
    organs = content.get("organs") or []
    if not organs:
        for numbers in models.values():
            organs += [organ for organ in numbers.get("dice", {}) if organ not in organs]
    scans = []
    for model, numbers in models.items():
        for scan, parts in numbers.get("per_scan", {}).items():
            dice = [value for value in parts.values() if isinstance(value, float)]
            mean = float(np.mean(dice)) if dice else float("nan")
            scans.append(asdict(ScanScore(scan, model, mean, parts)))
    means = {model: numbers.get("mean_dice") for model, numbers in models.items()}
    dice_of = {model: numbers.get("dice", {}) for model, numbers in models.items()}
    table = _by_organ(organs, dice_of)
    split = content.get("split", {})
    return {
        "config": content.get("task_config", {}),
        "labels": Labels.VOXELS.value,
        "num_train": len(split.get("train", ())),
        "num_test": len(split.get("test", ())),
        "headline": asdict(_headline(means, content.get("resolution", "voxel"))),
        "models": models,
        "breakdown": None if table is None else asdict(table),
        "scans": scans,
        "pictures": content.get("overlays", []),
    }


def build(config: Config, *, seed: int) -> Segmentation:
    """Make the task of one evaluation.

    Args:
        config: settings of the decoder.
        seed: random seed of the choice of training patches.
    """
    return Segmentation(config, seed)
