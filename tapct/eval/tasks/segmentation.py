"""Organ segmentation by a linear decoder on frozen features: one 1x1x1 convolution, the same treatment for every model.

Axes: N patches in (z, y, x) raster order, K training patches, D channels, C classes, V label values of one scan,
Z Y X voxels or patches. Class 0 is the air outside, class 1 the rest of the body, then the organs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tapct.config import setting
from tapct.eval import pictures
from tapct.eval.features import DenseFeatures, PatchGrid
from tapct.eval.scans import LabelledScan
from tapct.eval.truth import OUTSIDE, PatchTruth, patch_truth
from tapct.types import UserError

RESOLUTIONS = ("patch", "voxel")
_OUTSIDE, _BODY = "outside", "body"


@dataclass(frozen=True)
class Config:
    """Settings of the linear decoder and of what counts."""

    resolution: str = setting(
        "voxel", "headline Dice: upsampled logits on the scan's own voxels, or majority labels of patches",
        choices=RESOLUTIONS,
    )
    organs: tuple[str, ...] = setting((), "label names or values that count as organs; empty: all but `context`")
    context: tuple[str, ...] = setting(
        ("table",), "label names or values that the decoder learns as classes of their own but that are not organs"
    )
    body: tuple[str, ...] = setting(
        ("body", "body_trunc", "skin"), "label names that mean `inside the body, no organ`; label 0 is then outside air"
    )
    tokens_per_scan: int = setting(8192, "most training patches of one scan, stratified by label", ge=1)
    l2: float = setting(1e-4, "weight of half the squared decoder weights, on standardised features", ge=0)
    steps: int = setting(150, "L-BFGS iterations, the same for every model", ge=1)


@dataclass(frozen=True)
class Decoder:
    """The fitted linear map, standardisation folded in: logits = features @ weight_DC + bias_C."""

    weight_DC: Tensor
    bias_C: Tensor

    def logits_CZYX(self, dense: DenseFeatures) -> Tensor:
        """Class logits on the patch grid, float32."""
        logits_NC = torch.addmm(self.bias_C, dense.tokens_ND(), self.weight_DC)
        return logits_NC.T.unflatten(1, dense.grid.shape)


@dataclass(frozen=True)
class Prediction:
    """A decoder's answer for one scan: class index (uint16) of every voxel of the scan as read."""

    classes_ZYX: np.ndarray


def fit_decoder(features_KD: Tensor, target_KC: Tensor, *, l2: float, steps: int) -> Decoder:
    """Class-balanced multinomial regression by full-batch L-BFGS; convex, deterministic, same budget for all.

    Minimises the mean over classes of the mean cross-entropy of that class, plus l2 / 2 * |weights|^2.

    Args:
        features_KD: float32, any scale; standardised here by the training statistics.
        target_KC: float32 >= 0, how much of each patch is which class, times how many patches it stands for.
        steps: L-BFGS iterations.
    """
    mass_K1 = target_KC.sum(1, keepdim=True)
    mean_D = (features_KD * mass_K1).sum(0) / mass_K1.sum()
    centred_KD = features_KD - mean_D
    std_D = ((centred_KD.square() * mass_K1).sum(0) / mass_K1.sum()).sqrt()
    std_D = std_D.clamp_min(1e-6 * max(float(std_D.max()), 1e-30))  # a constant channel says nothing: keep it near 0
    x_KD = centred_KD / std_D
    mass_C = target_KC.sum(0)
    balanced_KC = target_KC / (mass_C.clamp_min(1e-12) * int((mass_C > 0).sum()))
    weight_DC = torch.zeros(x_KD.shape[1], target_KC.shape[1], device=x_KD.device, requires_grad=True)
    bias_C = torch.zeros(target_KC.shape[1], device=x_KD.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight_DC, bias_C], max_iter=steps, max_eval=2 * steps, history_size=20, tolerance_grad=1e-7,
        tolerance_change=1e-10, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        log_p_KC = torch.addmm(bias_C, x_KD, weight_DC).log_softmax(1)
        loss = -(balanced_KC * log_p_KC).sum() + 0.5 * l2 * weight_DC.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    with torch.no_grad():
        folded_DC = weight_DC / std_D[:, None]
        return Decoder(folded_DC, bias_C - mean_D @ folded_DC)


def dice_from_confusion(confusion_CC: np.ndarray, class_index: int) -> float:
    """2 |A and B| / (|A| + |B|) of one class; rows of the confusion matrix are truth, columns prediction."""
    hit = float(confusion_CC[class_index, class_index])
    total = float(confusion_CC[class_index].sum() + confusion_CC[:, class_index].sum())
    return 2 * hit / total if total else float("nan")


class Segmentation:
    """The task: `truth` once per scan, `learn` on train scans, `fit`, `judge` on test scans, `results`.

    State grows with the training patches that are kept, never with whole scans.
    """

    def __init__(self, config: Config, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.classes: tuple[str, ...] = ()
        self.organs: tuple[str, ...] = ()
        self._decoders: dict[str, Decoder] = {}
        self._features: dict[str, list[Tensor]] = defaultdict(list)
        self._targets: dict[str, tuple[Tensor, PatchTruth]] = {}
        self._dice: dict[tuple[str, str], dict[str, dict[str, float]]] = {}

    def truth(self, scan: LabelledScan, grid: PatchGrid, in_play_Z: np.ndarray) -> PatchTruth:
        """What the labels say on the patch grid; the same for every model."""
        names = dict(scan.labels.names).values()
        body_labelled = any(name.lower() in self.config.body for name in names)
        return patch_truth(scan, grid, body_labelled=body_labelled, in_play_Z=in_play_Z)

    def learn(self, model: str, dense: DenseFeatures, truth: PatchTruth) -> None:
        """Keep the training patches of one scan for one model."""
        index_K, weight_K = truth.sample(self.config.tokens_per_scan, self.seed)
        self._features[model].append(dense.tokens_ND()[index_K.to(dense.features_DZYX.device)])
        if truth.scan.id not in self._targets:
            self._targets[truth.scan.id] = (torch.from_numpy(truth.shares_NV)[index_K] * weight_K[:, None], truth)

    def fit(self) -> None:
        """Fit one decoder per model; classes are those that occur in the training scans.

        Raises:
            UserError: no organ occurs in them.
        """
        self.classes, self.organs = self._find_classes()
        targets = []
        for target_KV, truth in self._targets.values():
            column_V = torch.tensor([self.classes.index(self._class_of(v, truth.names())) for v in truth.values])
            targets.append(target_KV.new_zeros(len(target_KV), len(self.classes)).index_add_(1, column_V, target_KV))
        target_KC = torch.cat(targets)
        for model, features in self._features.items():
            x_KD = torch.cat(features)
            target = target_KC.to(x_KD.device)
            self._decoders[model] = fit_decoder(x_KD, target, l2=self.config.l2, steps=self.config.steps)
        self._features.clear()
        self._targets.clear()

    def judge(self, model: str, dense: DenseFeatures, truth: PatchTruth) -> Prediction:
        """Predict a test scan and note its Dice at patches and at voxels, in the part that is in play."""
        logits_CZYX = self._decoders[model].logits_CZYX(dense)
        prediction_ZYX = truth.grid.argmax_voxels(logits_CZYX)
        in_play = truth.in_play_Z[truth.grid.patch_of_voxel(0, truth.grid.original[0])]
        voxel = self._confusion(self.class_labels(truth)[in_play], prediction_ZYX[in_play])
        open_N = np.repeat(truth.in_play_Z, truth.grid.shape[1] * truth.grid.shape[2])
        class_V = self._class_index(truth)[[max(v, 0) for v in truth.values]]
        patch_truth_N = class_V[truth.shares_NV.argmax(1)]
        patch = self._confusion(patch_truth_N[open_N], logits_CZYX.flatten(1).argmax(0).cpu().numpy()[open_N])
        for resolution, confusion in (("voxel", voxel), ("patch", patch)):
            self._dice.setdefault((resolution, model), {})[truth.scan.id] = {
                organ: dice_from_confusion(confusion, self.classes.index(organ))
                for organ in self.organs
                if confusion[self.classes.index(organ)].sum() > 0
            }
        return Prediction(prediction_ZYX)

    def class_labels(self, truth: PatchTruth) -> np.ndarray:
        """True class index (uint16) of every voxel; labels that no training scan has count as body."""
        labels: np.ndarray = self._class_index(truth)[truth.scan.labels.labels_ZYX]
        return labels

    def slices_of_interest(self, truth: PatchTruth) -> tuple[int, int]:
        """The axial and the coronal slice that show most organs."""
        return pictures.richest_slices(self.class_labels(truth), [self.classes.index(o) for o in self.organs])

    def draw(self, path: Path, truth: PatchTruth, predictions: Mapping[str, Prediction]) -> str:
        """Write a picture of one test scan, CT | truth | each model's prediction; returns its caption."""
        at, scan = self.slices_of_interest(truth), truth.scan
        panels = [pictures.Panel("CT", None), pictures.Panel("truth", self.class_labels(truth))]
        for model, prediction in predictions.items():
            dice = list(self._dice[self.config.resolution, model][scan.id].values())
            score = f"  Dice {np.mean(dice):.2f}" if dice else ""
            panels.append(pictures.Panel(model.replace("_", " ") + score, prediction.classes_ZYX))
        volume = scan.volume
        pictures.draw_overlay(path, volume.hu_ZYX, volume.spacing_mm, panels, self.classes, self.organs, at)
        return f"CT, truth and each model's prediction: axial slice {at[0]}, coronal slice {at[1]} of test scan {scan.id}"

    def results(self) -> dict[str, Any]:
        """Organs, and per model the Dice by organ and scan: mean over the scans that have the organ, then over organs."""
        models: dict[str, Any] = {}
        for (resolution, model), per_scan in self._dice.items():
            found = {o: [dice[o] for dice in per_scan.values() if o in dice] for o in self.organs}
            dice = {organ: float(np.mean(values)) for organ, values in found.items() if values}
            entry = models.setdefault(model, {})
            mean = float(np.mean(list(dice.values()))) if dice else None
            entry[f"mean_dice_{resolution}"] = mean
            entry[f"dice_{resolution}"] = dice
            if resolution == self.config.resolution:
                entry.update(mean_dice=mean, dice=dice, per_scan=per_scan)
        return {"organs": list(self.organs), "resolution": self.config.resolution, "models": models}

    def _confusion(self, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        num = len(self.classes)
        pairs = truth.astype(np.int32) * num + prediction
        return np.bincount(pairs.reshape(-1), minlength=num * num).reshape(num, num)

    def _find_classes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        present: dict[str, int] = {}  # class -> lowest label value, for the order
        for target_KV, truth in self._targets.values():
            for value, mass in zip(truth.values, target_KV.sum(0).tolist(), strict=True):
                if mass > 0:
                    name = self._class_of(value, truth.names())
                    present[name] = min(value, present.get(name, value))
        ordered = sorted(present, key=lambda name: (present[name], name))
        context = {_OUTSIDE, _BODY, *self.config.context}
        organs = tuple(name for name in ordered if name not in context and name.removeprefix("label ") not in context)
        if not organs:
            raise UserError(
                f"no organ label occurs in the training scans (found: {', '.join(ordered)}). Check the label maps, or "
                f"task.organs, which is [{', '.join(self.config.organs)}]."
            )
        return (_OUTSIDE, _BODY, *(name for name in ordered if name not in (_OUTSIDE, _BODY))), organs

    def _class_of(self, value: int, names: dict[int, str]) -> str:
        """The class that a label value of one scan belongs to."""
        name = names.get(value, f"label {value}")
        body_labelled = any(n.lower() in self.config.body for n in names.values())
        if value == OUTSIDE or (value == 0 and body_labelled):
            return _OUTSIDE
        if value == 0 or name.lower() in self.config.body:
            return _BODY
        wanted = {*self.config.organs, *self.config.context}
        if self.config.organs and name not in wanted and str(value) not in wanted:
            return _BODY
        return name

    def _class_index(self, truth: PatchTruth) -> np.ndarray:
        """Table from label value to class index, uint16."""
        names = truth.names()
        table = np.full(max(*truth.values, 0) + 1, self.classes.index(_BODY), dtype=np.uint16)
        for value in truth.values:
            name = self._class_of(value, names)
            if value >= 0 and name in self.classes:
                table[value] = self.classes.index(name)
        return table


def build(config: Config, *, seed: int) -> Segmentation:
    """The task of one evaluation.

    Args:
        seed: of the choice of training patches.
    """
    return Segmentation(config, seed)
