"""Organ segmentation by a linear decoder on frozen features: one 1x1x1 convolution per model.

Axes: N patches in (z, y, x) raster order, K training patches, D channels, C classes, V label values
of one scan, Z Y X voxels or patches. Class 0 is the air outside, class 1 the rest of the body, then
the organs.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tapct.base import console
from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.config import setting
from tapct.data.readers import dicom_seg
from tapct.eval.contract import Task
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.labels.organ_classes import BODY, OUTSIDE, ClassSettings, is_called, own_values
from tapct.eval.labels.prediction_files import DICOM_SEG, NIFTI
from tapct.eval.labels.truth import PatchTruth, patch_truth
from tapct.eval.metrics import surface
from tapct.eval.metrics.tolerances import check_named, parse
from tapct.eval.organs.dice import CountedVoxels, dice_from_confusion
from tapct.eval.organs.dice_table import by_organ
from tapct.eval.organs.dice_table import headline as headline_of
from tapct.eval.organs.dice_table import section_from_schema_1 as section_from_schema_1
from tapct.eval.organs.fitting import DecoderConfig, FittedDecoder, KeptPatches, fit
from tapct.eval.organs.label_fractions import LabelFractions, labelled_patients
from tapct.eval.organs.surface_scores import Surfaces
from tapct.eval.pictures import drawing
from tapct.eval.pictures.volumes import LabelLayer
from tapct.eval.results.old_formats import BY_PATIENTS
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.scans.usable import Labels
from tapct.eval.scores import OWN_MODEL, Headline, ScanScore, TaskResults
from tapct.types import IGNORE_LABEL, LabelMap

RESOLUTIONS = ("patch", "voxel")
BLOCKS = ("last", "last4")
CONTEXTS = ("none", "cls")
MOST_NAMES = 12  # in the line about the organs of the mean
NOTHING_FOUND = 0.005  # a mean Dice below this is shown as 0.00


@dataclass(frozen=True)
class Config(ClassSettings, DecoderConfig):
    """Settings of the decoder and of its classes."""

    resolution: str = setting(
        "voxel",
        "`voxel`: the decoder learns the share of each label in a patch, and the headline Dice "
        "is computed on the voxels of the scan, to which the logits are upsampled; `patch`: "
        "the decoder learns the majority label of each patch, and the headline Dice is "
        "computed on patches",
        choices=RESOLUTIONS,
    )
    blocks: str = setting(
        "last",
        "`last`: features of the last block; `last4`: features of the last four blocks, one after "
        "the other",
        choices=BLOCKS,
    )
    context: str = setting(
        "none",
        "what the decoder reads beside the features of a patch: `cls` is the class token of the "
        "windows around the patch, interpolated between the centres of the windows; it shows where "
        "in the body the patch lies. `none` is nothing",
        choices=CONTEXTS,
    )
    max_tokens: int = setting(
        49152, "maximum number of training patches of all scans together, stratified by label", ge=1
    )
    fractions: tuple[int, ...] = setting(
        (),
        "numbers of labelled patients for a label-fraction curve, e.g. [1, 5, 10]: for each "
        "number, the decoder is also fitted to the training scans of that number of patients",
        ge=1,
    )
    draws: int = setting(
        5,
        "number of draws of patients for each number in `fractions`; the draws depend only on "
        "`eval.seed`, and in each draw, the patients of a smaller number are among those of a "
        "larger number",
        ge=1,
    )
    surface: bool = setting(
        False,
        "whether NSD and HD95 of each organ and scan are computed too; this takes some seconds "
        "per organ of a large scan and needs the extra `eval`",
    )
    tolerances: tuple[str, ...] = setting(
        (),
        "tolerances of NSD in mm that replace the defaults, each after the name of the organ in "
        "the label maps, e.g. [liver=2,Parotid_L=2.85]",
    )
    predictions: bool = setting(
        False,
        "whether the predicted label map of each test scan and model is written in the geometry of "
        "the original file, to `predictions/` beside `results.json`",
    )
    prediction_format: str = setting(
        NIFTI,
        "format of the predicted label maps: `nifti`, or `dicom_seg`. With `dicom_seg`, DICOM "
        "scans get a DICOM SEG that refers to the original series, and other scans get NIfTI. "
        "`dicom_seg` needs the extra `dicom`, and its files contain the patient data of the series",
        choices=(NIFTI, DICOM_SEG),
    )


@dataclass(frozen=True)
class Prediction:
    """A decoder's prediction: class index (uint16) of every voxel of the scan as read."""

    classes_ZYX: np.ndarray


class Segmentation(Task[PatchTruth, Prediction]):
    """Find organs in frozen features. State grows with the training patches that are kept, never
    with whole scans.
    """

    labels = Labels.VOXELS

    def __init__(self, config: Config, seed: int) -> None:
        self.config = config
        self.prediction_format = config.prediction_format
        self.words = config.words()
        self.seed = seed
        self.tokens_per_scan = config.max_tokens
        self.classes: tuple[str, ...] = ()
        self.organs: tuple[str, ...] = ()
        self._decoders: dict[str, FittedDecoder] = {}
        self._few_labels = LabelFractions(config.fractions, config.draws, seed)
        self._kept: dict[str, list[KeptPatches]] = defaultdict(list)
        self._dice: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        self._left_out: dict[tuple[int, str], str] = {}  # label value, its name -> class
        self._surfaces = Surfaces(parse(config.tolerances))
        self._counted: tuple[PatchTruth, CountedVoxels] | None = None  # of the scan in work
        self._value_of: dict[str, int] = {}  # class -> label value in the training scans
        self._in_training: set[str] = set()  # organs of the training scans
        self._not_learned: set[str] = set()  # organs of test scans that the decoder does not know
        self._is_warned = False

    def named_labels(self) -> Mapping[str, tuple[str, ...]]:
        """Words of the settings that must name a label; the defaults need not."""
        organs = tuple(parse(self.config.tolerances))
        return {**self.config.named_labels(), "tolerances": organs}

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """The last block, or the last four."""
        num = 4 if self.config.blocks == "last4" else 1
        return tuple(range(max(0, num_blocks - num), num_blocks))

    def begin(self, num_train: int) -> None:
        """Divide the training patches equally among the training scans.

        Raises:
            UserError: surface distances or DICOM SEG are wanted and their package is missing, or a
                format of predictions is given and none are wanted.
        """
        if self.config.surface:
            surface.check_installed()
        if self.config.prediction_format == DICOM_SEG:
            if not self.config.predictions:
                raise UserError(
                    "eval.tasks.segmentation.prediction_format is dicom_seg, but no predictions "
                    "are written; set eval.tasks.segmentation.predictions=true too"
                )
            dicom_seg.check_installed()
        self.tokens_per_scan = max(1, self.config.max_tokens // num_train)

    def truth(self, scan: LabelledScan, grid: PatchGrid, in_play_Z: np.ndarray) -> PatchTruth:
        """Count the labels on the patch grid; the same for every model."""
        names = dict(scan.label_map.names)
        body_labelled = self.words.body_labelled(names)
        truth = patch_truth(scan, grid, body_labelled=body_labelled, in_play_Z=in_play_Z)
        for value in truth.values:
            name = self.words.class_of(value, names)
            if value > 0 and name in (OUTSIDE, BODY):
                self._left_out[value, names.get(value, "")] = name
        return truth

    def learn(self, model: str, dense: DenseFeatures, truth: PatchTruth) -> None:
        """Keep the training patches of one scan for one model."""
        self._in_training |= self._organs_of(truth)
        index_K, weight_K = truth.sample(self.tokens_per_scan, self.seed)
        share_KV = torch.from_numpy(truth.shares_NV)[index_K]
        if self.config.resolution == "patch":
            share_KV = F.one_hot(share_KV.argmax(1), share_KV.shape[1]).float()
        features_ND = self._features(dense)
        self._kept[model].append(
            KeptPatches(
                truth.scan.id,
                truth.scan.patient or truth.scan.id,
                features_ND[index_K.to(features_ND.device)],
                share_KV * weight_K[:, None],
                truth.values,
                truth.names(),
            )
        )

    def _features(self, dense: DenseFeatures) -> Tensor:
        """The features that the decoder reads: float32 (N, D) in raster order."""
        parts = [dense.tokens_ND()]
        if self.config.blocks == "last4" and dense.blocks:
            parts = [dense.tokens_ND(block) for block in self.blocks(1 + max(dense.blocks))]
        if self.config.context == "cls":
            parts.append(dense.cls_around_ND())
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def fit(self) -> None:
        """Fit the decoders of each model; classes are those that occur in the training scans.

        Raises:
            UserError: no organ occurs in them, or a tolerance is set for something else.
        """
        self.classes, self.organs = self._find_classes()
        check_named(parse(self.config.tolerances), self.organs)
        num_patients = len(labelled_patients(itertools.chain(*self._kept.values())))
        for model in list(self._kept):
            kept = self._kept.pop(model)
            self._decoders[model] = self._fitted(kept)
            self._few_labels.fit(model, kept, self._fitted)
        self._few_labels.report(num_patients)

    def _fitted(self, kept: Sequence[KeptPatches]) -> FittedDecoder:
        return fit(kept, self.classes, self.organs, self.words, self.config, self.seed)

    def judge(self, model: str, dense: DenseFeatures, truth: PatchTruth) -> Prediction:
        """Predict a test scan and keep its Dice at patches and voxels, over the slices in play."""
        features_ND = self._features(dense)
        logits_NC = self._decoders[model].decoder.logits_NC(features_ND)
        counted = self._counted_voxels(truth)
        prediction_ZYX = counted.predicted(logits_NC)
        voxel = self._confusion(*counted.pairs(prediction_ZYX))
        for draw, few in self._few_labels.decoders(model):
            predicted_ZYX = counted.predicted(few.decoder.logits_NC(features_ND))
            confusion = self._confusion(*counted.pairs(predicted_ZYX))
            self._few_labels.add(model, draw, truth.scan.id, self._organ_dice(confusion))
        open_N = truth.open_N()
        self._not_learned |= self._organs_of(truth) - set(self.classes)
        class_V = self._class_index(truth)[[max(v, 0) for v in truth.values]]
        patch_truth_N = class_V[truth.shares_NV.argmax(1)]
        patch = self._confusion(patch_truth_N[open_N], logits_NC.argmax(1).cpu().numpy()[open_N])
        for resolution, confusion in (("voxel", voxel), ("patch", patch)):
            self._dice.setdefault((resolution, model), {})[truth.scan.id] = self._organ_dice(
                confusion
            )
        if self.config.surface:
            self._surfaces.add(
                model,
                truth.scan.id,
                counted.with_ignored(truth),
                prediction_ZYX,
                {organ: self.classes.index(organ) for organ in self.organs},
                truth.scan.spacing_mm,
            )
        return Prediction(prediction_ZYX)

    def _counted_voxels(self, truth: PatchTruth) -> CountedVoxels:
        """The voxels of a test scan that count; they are found once for all models whose patches
        are equal.
        """
        if self._counted is None or self._counted[0] is not truth:
            self._counted = truth, CountedVoxels(truth, self.class_labels(truth))
        return self._counted[1]

    def label_map(self, truth: PatchTruth, prediction: Prediction) -> LabelMap | None:
        """The predicted classes with the label values of the training scans; 0 is outside, and the
        body where the label maps have no label for it. An organ whose value another organ has too
        gets a free one.
        """
        if not self.config.predictions:
            return None
        value_C = np.array([self._value_of[name] for name in self.classes], dtype=np.uint16)
        named = (*self.organs, BODY) if self._value_of[BODY] else self.organs
        names = tuple(sorted((self._value_of[name], name) for name in named))
        return LabelMap(value_C[prediction.classes_ZYX], truth.scan.spacing_mm, names=names)

    def _organs_of(self, truth: PatchTruth) -> set[str]:
        """The organs in the label map of a scan."""
        names = truth.names()
        return {self.words.class_of(value, names) for value in truth.values} - {OUTSIDE, BODY}

    def _organ_dice(self, confusion_CC: np.ndarray) -> dict[str, float]:
        """Dice of the organs that the scan has."""
        return {
            organ: dice_from_confusion(confusion_CC, self.classes.index(organ))
            for organ in self.organs
            if confusion_CC[self.classes.index(organ)].sum() > 0
        }

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
        return drawing.richest_slices(
            self.class_labels(truth), [self.classes.index(o) for o in self.organs]
        )

    def draw(self, path: Path, truth: PatchTruth, predictions: Mapping[str, Prediction]) -> str:
        """Write a picture of one test scan, CT | truth | each model's prediction; returns its
        caption.
        """
        at, scan = self.slices_of_interest(truth), truth.scan
        panels = [drawing.Panel("CT", None), drawing.Panel("truth", self.class_labels(truth))]
        for model, prediction in predictions.items():
            dice = list(self._dice[self.config.resolution, model][scan.id].values())
            score = f"  Dice {np.mean(dice):.2f}" if dice else ""
            panels.append(drawing.Panel(model.replace("_", " ") + score, prediction.classes_ZYX))
        volume = scan.volume
        drawing.draw_overlay(
            path, volume.hu_ZYX, volume.spacing_mm, panels, self.classes, self.organs, at
        )
        where = f"axial slice {at[0]}, coronal slice {at[1]} of test scan {scan.id}"
        return f"CT, truth and each model's prediction: {where}"

    def layers(
        self, truth: PatchTruth, predictions: Mapping[str, Prediction]
    ) -> Sequence[LabelLayer]:
        """The truth and each model's prediction."""
        names = {self.classes.index(organ): organ for organ in self.organs}
        found = [LabelLayer("truth", self.class_labels(truth), names)]
        for model, prediction in predictions.items():
            found.append(LabelLayer(model.replace("_", " "), prediction.classes_ZYX, names))
        return found

    def results(self) -> TaskResults:
        """Return Dice by organ and scan; means go over the scans that have the organ, then over
        the organs that all models have: on patches, models of different patches would be compared
        on different organs otherwise.

        Raises:
            UserError: no organ of the decoder occurs in the test scans.
        """
        models: dict[str, dict[str, Any]] = {}
        scans: list[ScanScore] = []
        common_of = {resolution: self._common_organs(resolution) for resolution in RESOLUTIONS}
        for (resolution, model), per_scan in self._dice.items():
            dice, common = self._mean_by_organ(per_scan), common_of[resolution]
            mean = float(np.mean([dice[organ] for organ in common])) if common else None
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
                entry[BY_PATIENTS] = self._few_labels.curve(model, self._mean_by_organ)
                entry["lr"] = self._decoders[model].lr
                for scan, of_scan in per_scan.items():
                    parts = {organ: of_scan[organ] for organ in common if organ in of_scan}
                    value = float(np.mean(list(parts.values()))) if parts else float("nan")
                    scans.append(ScanScore(scan, model, value, parts))
        self._warn_of_nothing_found(models)
        dice_of = {model: entry["dice"] for model, entry in models.items()}
        table = by_organ(self.organs, dice_of)
        for model, invented in self._surfaces.invented.items():
            models[model]["num_invented"] = dict(invented)
        further = self._surfaces.metrics() if self.config.surface else ()
        further += self._few_labels.metrics()
        return TaskResults(models, tuple(scans), table, mean_over_parts=True, further=further)

    def _warn_of_nothing_found(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        """Print a line, once, if the decoder of the evaluated model found no organ in any scan."""
        value = models.get(OWN_MODEL, {}).get("mean_dice")
        if value is not None and value < NOTHING_FOUND and not self._is_warned:
            self._is_warned = True
            console.warn(
                f"segmentation: the mean Dice of {OWN_MODEL} is {value:.3f}. If the organs are "
                "smaller than a patch, raise eval.preprocess.size_yx, so that a patch covers fewer "
                "mm, or set eval.preprocess.refine; if few scans are labelled, label more"
            )

    def headline(self) -> Headline:
        """Return the mean Dice over organs, at the resolution of the config."""
        models = self.results().models
        values = {model: float(entry["mean_dice"]) for model, entry in models.items()}
        some = {organ for entry in models.values() for organ in entry["dice"]}
        mean_of = self._mean_of(self._common_organs(self.config.resolution), some)
        return headline_of(values, self.config.resolution, mean_of)

    def _common_organs(self, resolution: str) -> list[str]:
        """The organs that have a Dice in every model, in order."""
        of_models = [
            self._mean_by_organ(per_scan)
            for (of, _), per_scan in self._dice.items()
            if of == resolution
        ]
        if not of_models:
            return []
        return [organ for organ in self.organs if all(organ in dice for dice in of_models)]

    def _mean_of(self, organs: Sequence[str], some: Collection[str]) -> str:
        """What the mean Dice is a mean of, and which labels are not in it.

        Args:
            organs: organs in the mean.
            some: organs that have a Dice in some model.
        """
        left_out = []
        for (value, name), counts_as in sorted(self._left_out.items()):
            by_number = f"label {value} (set as {counts_as} by its number; it has no name)"
            left_out.append(name or by_number)
        for organ in self.organs:
            if organ not in organs:
                why = "not in the patches of every model" if organ in some else "in no test scan"
                left_out.append(f"{organ} ({why})")
        for organ in sorted(self._not_learned):
            # an organ that is much smaller than a patch may be in a scan and in no kept patch
            where = "patch that was kept" if organ in self._in_training else "scan"
            left_out.append(f"{organ} (in no training {where})")
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
        dtype = np.uint16 if num * num <= 1 << 16 else np.uint32
        pairs = truth.astype(dtype) * dtype(num) + prediction.astype(dtype)
        return np.bincount(pairs.reshape(-1), minlength=num * num).reshape(num, num)

    def _find_classes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        present: dict[str, int] = {}  # class -> lowest label value, for the order
        body_value = 0  # a label that counts as body may be an organ that is not among `organs`
        # models may differ in their patches, so one may have kept an organ that another lost
        for kept in itertools.chain(*self._kept.values()):
            for value, mass in zip(kept.values, kept.target_KV.sum(0).tolist(), strict=True):
                if mass > 0:
                    name = self.words.class_of(value, kept.names)
                    present[name] = min(value, present.get(name, value))
                    if is_called(value, kept.names.get(value, ""), self.words.body):
                        body_value = value
        ordered = sorted(present, key=lambda name: (present[name], name))
        organs = tuple(name for name in ordered if name not in (OUTSIDE, BODY))
        if not organs:
            raise UserError(
                f"no organ label occurs in the training scans (they have: "
                f"{', '.join(ordered) or 'no labelled voxel'}). "
                "Check the label maps, or "
                f"eval.tasks.segmentation.organs, which is [{', '.join(self.config.organs)}]."
            )
        self._value_of = {OUTSIDE: 0, BODY: body_value, **own_values(organs, present, body_value)}
        return (OUTSIDE, BODY, *organs), organs

    def _class_index(self, truth: PatchTruth) -> np.ndarray:
        """Table from label value to class index, uint16."""
        names = truth.names()
        table = np.full(max(*truth.values, 0) + 1, self.classes.index(BODY), dtype=np.uint16)
        for value in truth.values:
            name = self.words.class_of(value, names)
            if value >= 0 and name in self.classes:
                table[value] = self.classes.index(name)
        return table


def _listed(names: Sequence[str]) -> str:
    """Names as one text, the last ones as a number where there are many."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def build(config: Config, *, seed: int) -> Segmentation:
    """Make the task of one evaluation.

    Args:
        config: settings of the decoder.
        seed: random seed of the choice of training patches.
    """
    return Segmentation(config, seed)
