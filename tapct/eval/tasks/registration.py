"""Registration without training: a moving scan is brought onto a fixed scan by patches with alike
features, and its labels and landmarks with it.

Mutual nearest patches by cosine similarity give a robust affine map and a smooth field of what it
leaves over (`pairs/transform.py`). The baseline `identity` moves the centre of the body onto that
of the other scan, and nothing else.

Axes: Z Y X voxels of a small copy of a scan; P points; a last axis of 3 is (z, y, x) in mm from the
centre of a scan's first voxel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from tapct.base import rng
from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.config import setting
from tapct.eval.contract import Task
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.labels.organ_classes import BODY, BODY_NAMES, OUTSIDE, OUTSIDE_NAMES, ClassWords
from tapct.eval.pairs import side_by_side
from tapct.eval.pairs.alignment_scores import DICE, LANDMARKS, PairScore, means_of, score_rows
from tapct.eval.pairs.block_choice import BLOCK_SETS, BlockChoice, block_features, candidate_blocks
from tapct.eval.pairs.correspondence import PatchFrame, ScanFeatures, mutual_correspondences
from tapct.eval.pairs.partners import (
    ACROSS_PATIENTS,
    SAME_PATIENT,
    PairedScans,
    ScanPair,
    check_any_pair,
    check_sides,
    pairs_of,
    share_a_name,
)
from tapct.eval.pairs.points import mean_of
from tapct.eval.pairs.propagation import centre_alignment, dice_of_labels, warp
from tapct.eval.pairs.thumbnail import Thumbnail, body_frame
from tapct.eval.pairs.transform import Transform, fit_transform
from tapct.eval.pictures import drawing
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.scans.usable import Labels, ScanRow
from tapct.eval.scores import Breakdown, Headline, ScanScore, TaskResults
from tapct.types import AIR_HU, IGNORE_LABEL

AUTO, BEST, AFFINE, FIELD = "auto", "best", "affine", "field"
IDENTITY = "identity"


@dataclass(frozen=True)
class Config:
    """How scans are registered, and what is measured."""

    metric: str = setting(
        DICE,
        "headline of the task: `dice`: mean Dice between the moved labels of the moving scan and "
        "the labels of the fixed scan; `landmarks`: mean error of the points of `eval.landmarks` "
        "in mm",
        choices=(DICE, LANDMARKS),
    )
    organs: tuple[str, ...] = setting(
        (),
        "names or values of the labels that are compared; empty: all labels except those of the "
        "body and the table",
    )
    names: tuple[str, ...] = setting(
        (),
        "names of the landmarks that are compared. Empty: all for pairs of scans of one patient, "
        "and none for pairs of different patients, because points of one name need not be the "
        "same point in two patients",
    )
    pairs: str = setting(
        AUTO,
        "`same_patient`: any two scans of a patient, in both directions; `across_patients`: scans "
        "of different patients; `auto`: pairs of one patient if the set (training or test) has "
        "such pairs, else pairs of different patients",
        choices=(AUTO, SAME_PATIENT, ACROSS_PATIENTS),
    )
    max_pairs: int = setting(100, "maximum number of pairs of test scans; 0: all", ge=0)
    max_train_pairs: int = setting(
        10,
        "maximum number of pairs of training scans, on which block and transform are chosen",
        ge=1,
    )
    max_patches: int = setting(
        1000, "maximum number of patches of the fixed scan for which a partner is looked for", ge=1
    )
    cycle_patches: int = setting(
        1,
        "a patch of the fixed scan and its nearest patch in the moving scan are a pair if the "
        "search back from there ends at most this number of patches (or cells, see "
        "eval.preprocess.refine) away from the first patch along each axis; 0: only if it ends at "
        "the first patch itself",
        ge=0,
    )
    inlier_mm: float = setting(
        20.0,
        "correspondences are ignored if their residual of the affine map is larger than this, "
        "in mm",
        gt=0,
    )
    transform: str = setting(
        BEST,
        "`affine`: affine map; `field`: affine map and smooth field; `best`: the one of the two "
        "that is better on the training pairs",
        choices=(BEST, AFFINE, FIELD),
    )
    smooth_mm: float = setting(
        40.0, "standard deviation in mm of the Gaussian kernel that smooths the field", gt=0
    )
    label_mm: float = setting(
        2.0,
        "voxel spacing in mm at which label maps are compared; label maps with a smaller "
        "spacing are subsampled",
        gt=0,
    )
    blocks: str = setting(
        "last4",
        "blocks from which the best one on the training patients is chosen: `last`, `last4` or "
        "`all`",
        choices=BLOCK_SETS,
    )


@dataclass(frozen=True)
class RegistrationScan:
    """What is kept of a scan for all models of one patch grid.

    Args:
        scan: scan ID.
        frame: patches of the body.
        thumbnail: small copy; its labels are numbers of organs.
        organs: numbers of the organs that it has.
        landmarks: name -> position.
    """

    scan: str
    frame: PatchFrame
    thumbnail: Thumbnail
    organs: tuple[int, ...]
    landmarks: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Registered:
    """A registered pair, for `draw`.

    Args:
        moving: moving scan.
        transform: the map from the fixed scan to the moving one.
        score: numbers of the pair.
    """

    moving: RegistrationScan
    transform: Transform
    score: PairScore


Entry = tuple[RegistrationScan, ScanFeatures]


class Registration(Task[RegistrationScan, Registered | None]):
    """Register pairs of scans. Kept are the features and small copies of the test scans whose
    partner has not been read yet, and of training scans for the choice of block and transform.
    """

    own_baselines: ClassVar[tuple[str, ...]] = (IDENTITY,)

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed = config, seed
        self.labels = _labels_of(config)
        self.words = ClassWords(config.organs, OUTSIDE_NAMES, BODY_NAMES)
        self.organs: list[str] = []  # organ number - 1 -> name
        self._names_of: Mapping[str, Collection[str]] | None = None  # None: not known before
        self._train: PairedScans[Entry] = PairedScans()
        self._test: PairedScans[Entry] = PairedScans()
        self._choice = BlockChoice()
        self._scores: dict[str, dict[ScanPair, PairScore]] = {}
        self._identity: dict[ScanPair, PairScore] = {}
        self._how = ""  # kind of the test pairs

    def named_labels(self) -> Mapping[str, tuple[str, ...]]:
        """Names of what the headline compares, all of which must occur."""
        if self.config.metric == DICE:
            return {"organs": self.config.organs}
        return {"names": self.config.names}

    @property
    def needs_training(self) -> bool:
        """Whether there may be several blocks or transforms, which are chosen on training pairs."""
        return self.config.blocks != "last" or self.config.transform == BEST

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """The blocks to choose from."""
        return candidate_blocks(self.config.blocks, num_blocks)

    def expect_landmarks(self, names_of: Mapping[str, Collection[str]]) -> None:
        """Keep the names, so that scans without a landmark in common are no pair."""
        self._names_of = names_of

    def expect_scans(self, train: Sequence[ScanRow], test: Sequence[ScanRow]) -> None:
        """Find the pairs of either side.

        Raises:
            UserError: the test scans have no pair, no pair has a landmark in common, or no
                landmark is named for scans of different patients.
        """
        check_sides("registration", train, test)
        train_how, train_pairs = self._pairs(train, self.config.max_train_pairs)
        self._how, pairs = self._pairs(test, self.config.max_pairs)
        if self.config.metric == LANDMARKS and not self.config.names:
            if self._how == ACROSS_PATIENTS:
                raise UserError(
                    "eval.tasks.registration.metric=landmarks compares scans of different patients "
                    "here and needs eval.tasks.registration.names: list the points that are the "
                    "same in all patients, e.g. [carina]"
                )
            if train_how == ACROSS_PATIENTS:  # nothing to compare on the training side
                train_pairs = []
        self._train = PairedScans(train_pairs)
        self._test = PairedScans(pairs)
        if not pairs and pairs_of(test, self._how, 1):
            raise UserError(_nothing_in_common("a landmark"))
        if not pairs:
            raise UserError(
                f"task registration: its {len(test)} test scans have no pair with "
                f"eval.tasks.registration.pairs={self.config.pairs}. Use auto, raise "
                "eval.max_scans or eval.test_share, or switch the task off with "
                "eval.tasks.registration=null"
            )

    def _pairs(self, rows: Sequence[ScanRow], most: int) -> tuple[str, list[ScanPair]]:
        """The kind of the pairs of one side, and the pairs."""
        how = self.config.pairs
        if how == AUTO:
            how = SAME_PATIENT if pairs_of(rows, SAME_PATIENT, most) else ACROSS_PATIENTS
        if self._names_of is None:
            return how, pairs_of(rows, how, most)
        return how, pairs_of(rows, how, most, share_a_name(self._names_of, self.config.names))

    def truth(self, scan: LabelledScan, grid: PatchGrid, in_play_Z: np.ndarray) -> RegistrationScan:
        """A small copy of the scan and the patches of its body; the same for all models."""
        needs_labels = self.config.metric == DICE
        thumbnail = Thumbnail.of(scan, self.config.label_mm, with_labels=needs_labels)
        organs: tuple[int, ...] = ()
        if thumbnail.labels_ZYX is not None:
            organ_of = self._organ_numbers(thumbnail.labels_ZYX, dict(thumbnail.names))
            thumbnail = dataclasses.replace(thumbnail, labels_ZYX=organ_of[thumbnail.labels_ZYX])
            organs = tuple(sorted({*organ_of.tolist()} - {0, IGNORE_LABEL}))
        wanted, may_use_all = self.config.names, self._how == SAME_PATIENT
        landmarks = {
            name: np.array(at)
            for name, at in sorted(scan.landmarks_mm.items())
            if name in wanted or (may_use_all and not wanted)
        }
        frame = body_frame(thumbnail, grid, scan.spacing_mm)
        return RegistrationScan(scan.id, frame, thumbnail, organs, landmarks)

    def _organ_numbers(self, labels_ZYX: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
        """Number of the organ of each label value, uint16: the same in all scans; 0 where a value
        is no organ or is not in this scan.
        """
        table = np.zeros(IGNORE_LABEL + 1, dtype=np.uint16)
        table[IGNORE_LABEL] = IGNORE_LABEL
        for value in np.flatnonzero(np.bincount(labels_ZYX.reshape(-1))).tolist():
            name = self.words.class_of(value, names)
            if value in (0, IGNORE_LABEL) or name in (OUTSIDE, BODY):
                continue
            if name not in self.organs:
                self.organs.append(name)
            table[value] = 1 + self.organs.index(name)
        return table

    def learn(self, model: str, dense: DenseFeatures, truth: RegistrationScan) -> None:
        """Register the training pairs with each block, where there is something to choose."""
        candidates = block_features(dense, self.config.blocks)
        self._choice.add_candidates(model, candidates)
        options = (AFFINE, FIELD) if self.config.transform == BEST else (self.config.transform,)
        if len(candidates) * len(options) < 2 or not self._train.has_partner(truth.scan):
            return
        for block, features_DZYX in candidates.items():
            entry = (truth, ScanFeatures.of(features_DZYX, truth.frame))
            for pair, moving, fixed in self._train.add((model, block), truth.scan, entry):
                found = self._register(pair, moving, fixed)
                for option in options:
                    score, _ = self._evaluated(_limited(found, option), moving[0], fixed[0])
                    value = score.mean(self.config.metric)
                    if math.isfinite(value):
                        sign = 1 if self.config.metric == DICE else -1
                        self._choice.add_score(model, block, sign * value, option)

    def fit(self) -> None:
        """Choose block and transform of each model."""
        self._choice.fit()
        self._train = PairedScans()

    def judge(self, model: str, dense: DenseFeatures, truth: RegistrationScan) -> Registered | None:
        """Register the pairs of which this scan is the last one that is read."""
        if not self._test.has_partner(truth.scan):
            return None
        features_DZYX = self._choice.features(model, dense)
        entry = (truth, ScanFeatures.of(features_DZYX, truth.frame))
        last: Registered | None = None
        for pair, moving, fixed in self._test.add(model, truth.scan, entry):
            if pair not in self._identity:
                self._identity[pair], _ = self._evaluated(None, moving[0], fixed[0])
            found = _limited(self._register(pair, moving, fixed), self._transform_of(model))
            score, transform = self._evaluated(found, moving[0], fixed[0])
            self._scores.setdefault(model, {})[pair] = score
            if pair.second == truth.scan:
                last = Registered(moving[0], transform, score)
        return last

    def _transform_of(self, model: str) -> str:
        """The transform that is used: the chosen one, or `field` where there was no choice."""
        chosen = self._choice.option(model) or self.config.transform
        return FIELD if chosen == BEST else str(chosen)

    def _register(self, pair: ScanPair, moving: Entry, fixed: Entry) -> Transform | None:
        """Affine map and field from the fixed to the moving scan; None where it fails."""
        config, frame = self.config, fixed[0].frame
        draw_N = rng.uniform(
            self.seed,
            "registration patches",
            rng.purpose_id(pair.second),
            torch.from_numpy(frame.kept_N),
        ).numpy()
        chosen = np.sort(np.argsort(draw_N, kind="stable")[: config.max_patches])
        found = mutual_correspondences(
            fixed[1], moving[1], chosen, cycle_patches=config.cycle_patches
        )
        return fit_transform(
            found.fixed_P3,
            found.moving_P3,
            inlier_mm=config.inlier_mm,
            width_mm=config.smooth_mm,
            seed=self.seed,
        )

    def _evaluated(
        self, found: Transform | None, moving: RegistrationScan, fixed: RegistrationScan
    ) -> tuple[PairScore, Transform]:
        """The numbers of one pair, and its map; None is evaluated as the identity."""
        transform = found or centre_alignment(moving.thumbnail, fixed.thumbnail)
        dice = {}
        moving_ZYX, fixed_ZYX = moving.thumbnail.labels_ZYX, fixed.thumbnail.labels_ZYX
        if moving_ZYX is not None and fixed_ZYX is not None:
            warped_ZYX = warp(moving_ZYX, 0, transform, moving.thumbnail, fixed.thumbnail)
            numbers = dice_of_labels(warped_ZYX, fixed_ZYX, moving.organs)
            dice = {self.organs[organ - 1]: value for organ, value in numbers.items()}
        names = [name for name in fixed.landmarks if name in moving.landmarks]
        errors = {}
        if names:
            mapped = transform(np.array([fixed.landmarks[name] for name in names]))
            for name, place in zip(names, mapped, strict=True):
                errors[name] = float(np.linalg.norm(place - moving.landmarks[name]))
        num_used = len(found.at_K3) if found else 0
        return PairScore(dice, errors, num_used, failed=found is None), transform

    def results(self) -> TaskResults:
        """Dice and landmark errors; means go over the moving scans of a fixed scan, over the fixed
        scans, then over organs or landmarks.

        Raises:
            UserError: no pair has an organ or a landmark in common, or no pair could be read.
        """
        check_any_pair("registration", self._scores)
        models: dict[str, dict[str, Any]] = {}
        rows: list[ScanScore] = []
        table: dict[str, dict[str, float]] = {}
        for model, of_pair in {**self._scores, IDENTITY: self._identity}.items():
            entry = means_of(of_pair)
            if model != IDENTITY:
                entry.update(
                    num_correspondences=mean_of([score.num_used for score in of_pair.values()]),
                    num_failed=sum(score.failed for score in of_pair.values()),
                    transform=self._transform_of(model),
                    **self._choice.record(model, _metric_name(self.config.metric)),
                )
            found = entry["landmark_error_mm"]
            entry.update(
                num_pairs=len(of_pair),
                pairs=self._how,
                landmarks_not_found=[name for name in self.config.names if name not in found],
            )
            models[model] = entry
            parts = entry["dice" if self.config.metric == DICE else "landmark_error_mm"]
            if not parts:
                what = "an organ" if self.config.metric == DICE else "a landmark"
                raise UserError(_nothing_in_common(what))
            for name, value in parts.items():
                table.setdefault(name, {})[model] = value
            rows += score_rows(model, of_pair, self.config.metric)
        what = "organ" if self.config.metric == DICE else "landmark"
        title = f"{'Dice' if self.config.metric == DICE else 'Error in mm'} of each {what}"
        breakdown = Breakdown(title, what, table) if table else None
        return TaskResults(models, tuple(rows), breakdown, mean_over_parts=True)

    def headline(self) -> Headline:
        """Return the mean Dice or the mean landmark error."""
        results = self.results()
        names = list(results.breakdown.values) if results.breakdown else []
        listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        num_pairs = len(self._identity)
        patients = "the same patient" if self._how == SAME_PATIENT else "different patients"
        pairs = f"{counted(num_pairs, 'pair')} of scans of {patients}: {listed}"
        how = "brought onto another scan by patches with alike frozen features, without training"
        if self.config.metric == DICE:
            values = {model: entry["mean_dice"] for model, entry in results.models.items()}
            meaning = f"Dice of the labels of a scan that is {how}."
            mean_of_what = f"mean of {counted(len(names), 'organ')} in {pairs}"
            return Headline("mean Dice", values, "higher", meaning, (0.0, 1.0), mean_of_what)
        values = {model: entry["mean_landmark_error_mm"] for model, entry in results.models.items()}
        meaning = f"Distance in mm of the landmarks of a scan that is {how}."
        mean_of_what = f"mean of {counted(len(names), 'landmark')} in {pairs}"
        return Headline(_metric_name(LANDMARKS), values, "lower", meaning, None, mean_of_what)

    def slices_of_interest(self, truth: RegistrationScan) -> tuple[int, int] | None:
        """The slices of the scan that show most organs, where labels are compared."""
        if truth.thumbnail.labels_ZYX is None or not self.organs:
            return None
        at = self._slices_of_thumbnail(truth.thumbnail)
        steps = np.array(truth.thumbnail.spacing_mm) / truth.frame.spacing_mm
        return round(at[0] * steps[0]), round(at[1] * steps[1])

    def _slices_of_thumbnail(self, thumbnail: Thumbnail) -> tuple[int, int]:
        if thumbnail.labels_ZYX is None or not (thumbnail.labels_ZYX % IGNORE_LABEL).any():
            return thumbnail.hu_ZYX.shape[0] // 2, thumbnail.hu_ZYX.shape[1] // 2
        return drawing.richest_slices(thumbnail.labels_ZYX, range(1, len(self.organs) + 1))

    def draw(
        self, path: Path, truth: RegistrationScan, predictions: Mapping[str, Registered | None]
    ) -> str:
        """Write a picture of one pair: the fixed scan, the moving scan with its centre aligned, and
        the moving scan as each model warps it, with the outlines of labels; returns its caption.
        """
        found = {model: one for model, one in predictions.items() if one is not None}
        if not found:
            return ""
        fixed, moving = truth.thumbnail, next(iter(found.values())).moving
        score, centred = self._evaluated(None, moving, truth)
        columns = [
            side_by_side.LabelledPicture(
                "fixed", fixed.hu_ZYX, _outlined(fixed.labels_ZYX, fixed), side_by_side.FIXED
            ),
            self._column("moving, identity", Registered(moving, centred, score), fixed),
        ]
        for model, one in found.items():
            columns.append(self._column(model.replace("_", " "), one, fixed))
        at = self._slices_of_thumbnail(fixed)
        side_by_side.draw_registration(path, fixed, columns, at)
        return (
            f"test scan {truth.scan} (fixed) and scan {moving.scan} (moving): with the centre of "
            "its body aligned, and as each model warps it; outlines: labels of the scan shown"
        )

    def _column(
        self, name: str, found: Registered, fixed: Thumbnail
    ) -> side_by_side.LabelledPicture:
        value, scan = found.score.mean(self.config.metric), found.moving.thumbnail
        number = f"Dice {value:.2f}" if self.config.metric == DICE else f"{value:.0f} mm"
        title = f"{name}  {number}" if math.isfinite(value) else name
        hu_ZYX = warp(scan.hu_ZYX, AIR_HU, found.transform, scan, fixed)
        shown_ZYX = warp(_outlined(scan.labels_ZYX, scan), 0, found.transform, scan, fixed)
        return side_by_side.LabelledPicture(title, hu_ZYX, shown_ZYX, side_by_side.MOVED)


def _labels_of(config: Config) -> Labels:
    if config.metric == LANDMARKS:
        return Labels.LANDMARKS
    return Labels.PAIRS if config.pairs == SAME_PATIENT else Labels.VOXELS


def _nothing_in_common(what: str) -> str:
    """The error line where no pair of test scans can be compared."""
    return (
        f"task registration: no two test scans of a pair have {what} in common; check the label "
        "maps or eval.landmarks, use another eval.seed, or switch the task off with "
        "eval.tasks.registration=null"
    )


def _metric_name(metric: str) -> str:
    return "mean Dice" if metric == DICE else "mean landmark error in mm"


def _limited(found: Transform | None, option: str) -> Transform | None:
    """The affine map alone where the option is `affine`."""
    return found.without_field() if found and option == AFFINE else found


def _outlined(labels_ZYX: np.ndarray | None, scan: Thumbnail) -> np.ndarray:
    if labels_ZYX is None:
        return np.zeros(scan.hu_ZYX.shape, np.uint16)
    return np.where(labels_ZYX == IGNORE_LABEL, 0, labels_ZYX)


def build(config: Config, *, seed: int) -> Registration:
    """Make the task of one evaluation.

    Args:
        config: settings of the registration.
        seed: random seed of the patches and of the hypotheses of the affine map.
    """
    return Registration(config, seed)
