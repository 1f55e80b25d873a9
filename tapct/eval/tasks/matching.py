"""Matching: where in a second scan a landmark or a lesion of a first scan lies, by the cosine
similarity of patch features, without any training of a head.

Axes: P points, K places, N kept patches; a last axis of 3 is (z, y, x) in mm from the centre of the
first voxel of a scan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.config import setting
from tapct.eval.contract import Task
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.pairs import side_by_side
from tapct.eval.pairs.block_choice import BLOCK_SETS, BlockChoice, block_features, candidate_blocks
from tapct.eval.pairs.correspondence import PatchFrame, ScanFeatures, find_places
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
from tapct.eval.pairs.points import (
    NamedPoints,
    common_points,
    label_points,
    landmark_points,
    mean_of,
)
from tapct.eval.pairs.thumbnail import Thumbnail, body_frame
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.scans.usable import Labels, ScanRow
from tapct.eval.scores import Breakdown, Headline, ScanScore, TaskResults

LANDMARKS, LABELS = "landmarks", "labels"
THUMBNAIL_MM = 2.5
NO_COMMON_POINT = (
    "task matching: no two test scans of a pair have a point of the same name; check the names of "
    "the points and eval.tasks.matching.names, use another eval.seed, or switch the task off with "
    "eval.tasks.matching=null"
)


@dataclass(frozen=True)
class Config:
    """Which points are looked for, in which scans, and when one counts as found."""

    points: str = setting(
        LANDMARKS,
        "`landmarks`: the points of `eval.landmarks`; `labels`: the centres of the connected parts "
        "of labels, e.g. of lesions",
        choices=(LANDMARKS, LABELS),
    )
    names: tuple[str, ...] = setting(
        (),
        "names of landmarks (with points=landmarks), or names or values of labels (with "
        "points=labels); empty: all landmarks, or all labels except those of the body and the "
        "table",
    )
    pairs: str = setting(
        SAME_PATIENT,
        "`same_patient`: any two scans of a patient, in both directions; `across_patients`: scans "
        "of different patients; `names` must then list the points",
        choices=(SAME_PATIENT, ACROSS_PATIENTS),
    )
    max_pairs: int = setting(
        200, "maximum number of pairs among training scans and among test scans; 0: all", ge=0
    )
    radius_mm: float = setting(
        10.0,
        "maximum distance in mm between a match and the true point for which the match is a hit",
        gt=0,
    )
    top: int = setting(
        5,
        "for `hit_rate_of_points_top`: a point counts as a hit if one of this number of best "
        "matches is a hit; the hit rate of the best match alone is always computed",
        ge=1,
    )
    blocks: str = setting(
        "last4",
        "blocks from which the one with the most hits on the training patients is chosen: `last`, "
        "`last4` or `all`",
        choices=BLOCK_SETS,
    )


@dataclass(frozen=True)
class ScanPoints:
    """What is kept of a scan for all models of one patch grid.

    Args:
        scan: scan ID.
        frame: patches of the body.
        points: name -> points.
        thumbnail: small copy for pictures.
    """

    scan: str
    frame: PatchFrame
    points: Mapping[str, NamedPoints]
    thumbnail: Thumbnail


@dataclass(frozen=True)
class PointMatch:
    """What was found for one point of the first scan.

    Args:
        name: name of the point.
        hit: whether the best place is a hit.
        hit_of_top: whether one of the first `top` places is.
        error_mm: distance of the best place to the nearest true point.
        cycle_mm: distance between the point and the best place that the feature at the place found
            leads back to in the first scan.
        from_3: point in the first scan.
        found_K3: places in the second scan, the best first.
        similarity_N: similarity of the patches of the second scan.
    """

    name: str
    hit: bool
    hit_of_top: bool
    error_mm: float
    cycle_mm: float
    from_3: np.ndarray
    found_K3: np.ndarray
    similarity_N: np.ndarray


@dataclass(frozen=True)
class Found:
    """What was found in a pair of scans, for `draw`.

    Args:
        first: scan of the points.
        second: scan in which they were looked for.
        matches: one per point.
    """

    first: ScanPoints
    second: ScanPoints
    matches: tuple[PointMatch, ...]


def match_points(
    first: ScanPoints,
    second: ScanPoints,
    features: tuple[ScanFeatures, ScanFeatures],
    *,
    top: int,
    radius_mm: float,
) -> list[PointMatch]:
    """Look for the points of the first scan in the second one.

    Args:
        first, second: points of both scans; those whose name both have are looked for.
        features: features of both scans.
        top: number of places per point.
        radius_mm: distance up to which a place is a hit, and least distance of two places.
    """
    names, points = [], []
    for name in common_points(first.points, second.points):
        for point in first.points[name].mm_P3:
            names.append(name)
            points.append(point)
    if not names:
        return []
    from_P3 = np.array(points)
    there, similarity_PN = find_places(
        features[0].at(from_P3), features[1], num=top, apart_mm=radius_mm
    )
    best_P3 = there.mm_PK3[:, 0]
    back, _ = find_places(features[1].at(best_P3), features[0], num=1, apart_mm=radius_mm)
    matches = []
    for number, name in enumerate(names):
        true, found_K3 = second.points[name], there.mm_PK3[number]
        hits = [true.is_hit(place, radius_mm) for place in found_K3]
        matches.append(
            PointMatch(
                name,
                hits[0],
                any(hits),
                true.error_mm(found_K3[0]),
                float(np.linalg.norm(back.mm_PK3[number, 0] - from_P3[number])),
                from_P3[number],
                found_K3,
                similarity_PN[number].cpu().numpy().astype(np.float16),
            )
        )
    return matches


class Matching(Task[ScanPoints, Found | None]):
    """Find points of one scan in another one. Kept are the features of the test scans whose partner
    has not been read yet, and of training scans where there are several blocks to choose from.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.labels = _labels_of(config)
        if config.pairs == ACROSS_PATIENTS and not config.names:
            raise UserError(
                "eval.tasks.matching.pairs=across_patients needs eval.tasks.matching.names: list "
                "the points that are the same in all patients, e.g. [carina]; lesions are not"
            )
        self._names_of: Mapping[str, Collection[str]] | None = None  # None: not known before
        self._train: PairedScans[tuple[ScanPoints, ScanFeatures]] = PairedScans()
        self._test: PairedScans[tuple[ScanPoints, ScanFeatures]] = PairedScans()
        self._choice = BlockChoice()
        self._found: dict[str, dict[ScanPair, list[PointMatch]]] = {}

    def named_labels(self) -> Mapping[str, tuple[str, ...]]:
        """Names of points or labels, all of which must occur."""
        return {"names": self.config.names}

    @property
    def needs_training(self) -> bool:
        """Whether there may be several blocks, of which one is chosen on training pairs."""
        return self.config.blocks != "last"

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """The blocks to choose from."""
        return candidate_blocks(self.config.blocks, num_blocks)

    def expect_landmarks(self, names_of: Mapping[str, Collection[str]]) -> None:
        """Keep the names, so that scans without a point in common are no pair."""
        self._names_of = names_of

    def expect_scans(self, train: Sequence[ScanRow], test: Sequence[ScanRow]) -> None:
        """Find the pairs of either side.

        Raises:
            UserError: the test scans have no pair, or no pair has a point in common.
        """
        check_sides("matching", train, test)
        how, most = self.config.pairs, self.config.max_pairs
        if self._names_of is None:
            train_pairs, test_pairs = pairs_of(train, how, most), pairs_of(test, how, most)
        else:
            fits = share_a_name(self._names_of, self.config.names)
            train_pairs, test_pairs = (pairs_of(side, how, most, fits) for side in (train, test))
        self._train, self._test = PairedScans(train_pairs), PairedScans(test_pairs)
        if not test_pairs and pairs_of(test, how, 1):
            raise UserError(NO_COMMON_POINT)
        if not test_pairs:
            raise UserError(
                f"task matching: none of its {len(test)} test scans has a partner with "
                f"eval.tasks.matching.pairs={how}. Index with a --patient-regex that finds the "
                "patient, use another eval.seed or pairs, or switch the task off with "
                "eval.tasks.matching=null"
            )

    def truth(self, scan: LabelledScan, grid: PatchGrid, in_play_Z: np.ndarray) -> ScanPoints:
        """The points of a scan and the patches of its body; the same for all models."""
        thumbnail = Thumbnail.of(scan, THUMBNAIL_MM)
        find = landmark_points if self.config.points == LANDMARKS else label_points
        points = find(scan, self.config.names)
        return ScanPoints(scan.id, body_frame(thumbnail, grid, scan.spacing_mm), points, thumbnail)

    def learn(self, model: str, dense: DenseFeatures, truth: ScanPoints) -> None:
        """Match the training pairs with each block, where there are several."""
        candidates = block_features(dense, self.config.blocks)
        self._choice.add_candidates(model, candidates)
        if len(candidates) < 2 or not self._train.has_partner(truth.scan):
            return
        for block, features_DZYX in candidates.items():
            entry = (truth, ScanFeatures.of(features_DZYX, truth.frame))
            for _, first, second in self._train.add((model, block), truth.scan, entry):
                for match in self._match(first, second):
                    # a hit counts first; among blocks with as many hits, the error decides
                    score = match.hit - 1e-6 * min(match.error_mm, 1e5)
                    self._choice.add_score(model, block, score)

    def fit(self) -> None:
        """Choose the block of each model."""
        self._choice.fit()
        self._train = PairedScans()

    def judge(self, model: str, dense: DenseFeatures, truth: ScanPoints) -> Found | None:
        """Match the pairs of which this scan is the last one that is read."""
        if not self._test.has_partner(truth.scan):
            return None
        features_DZYX = self._choice.features(model, dense)
        entry = (truth, ScanFeatures.of(features_DZYX, truth.frame))
        last: Found | None = None
        for pair, first, second in self._test.add(model, truth.scan, entry):
            matches = self._match(first, second)
            self._found.setdefault(model, {})[pair] = [
                # the map of similarities is for pictures alone
                dataclasses.replace(match, similarity_N=match.similarity_N[:0])
                for match in matches
            ]
            if pair.second == truth.scan:
                last = Found(first[0], second[0], tuple(matches))
        return last

    def _match(
        self, first: tuple[ScanPoints, ScanFeatures], second: tuple[ScanPoints, ScanFeatures]
    ) -> list[PointMatch]:
        return match_points(
            first[0],
            second[0],
            (first[1], second[1]),
            top=self.config.top,
            radius_mm=self.config.radius_mm,
        )

    def results(self) -> TaskResults:
        """Hit rates and errors. The mean hit rate goes over the points of a name in all pairs with
        the same second scan, then over names, then over scans.

        Raises:
            UserError: no pair has a point in common, or no pair could be read.
        """
        check_any_pair("matching", self._found)
        models: dict[str, dict[str, Any]] = {}
        scores: list[ScanScore] = []
        by_name: dict[str, dict[str, float]] = {}
        for model, of_pair in self._found.items():
            rows = _scan_scores(model, of_pair)
            scores += rows
            matches = [match for matches in of_pair.values() for match in matches]
            if not matches:
                raise UserError(NO_COMMON_POINT)
            models[model] = {
                "hit_rate": mean_of([row.value for row in rows if math.isfinite(row.value)]),
                **_numbers(matches),
                "num_pairs": len(of_pair),
                "names": {name: _numbers(_called(matches, name)) for name in _names(matches)},
                **self._choice.record(model, "hit rate"),
            }
            for name in _names(matches):
                hits = [float(match.hit) for match in _called(matches, name)]
                by_name.setdefault(name, {})[model] = mean_of(hits)
        table = Breakdown("Hit rate of each point", "point", by_name) if by_name else None
        return TaskResults(models, tuple(scores), table)

    def headline(self) -> Headline:
        """Return the share of points whose best place is a hit."""
        results = self.results()
        values = {model: float(entry["hit_rate"]) for model, entry in results.models.items()}
        entries = list(results.models.values())
        inside = " or inside the lesion" if self.config.points == LABELS else ""
        meaning = (
            "Share of points whose most similar place in another scan of "
            f"{'the same patient' if self.config.pairs == SAME_PATIENT else 'another patient'} "
            f"lies within {self.config.radius_mm:g} mm of the true point{inside}, by cosine "
            "similarity of frozen features."
        )
        mean = ""
        if entries:
            names = ", ".join(list(entries[0]["names"])[:12])
            points = counted(entries[0]["num_points"], "point")
            mean = f"mean of {points} in {counted(entries[0]['num_pairs'], 'pair')}: "
            mean += names + (", ..." if len(entries[0]["names"]) > 12 else "")
        return Headline("hit rate", values, "higher", meaning, (0.0, 1.0), mean)

    def slices_of_interest(self, truth: ScanPoints) -> tuple[int, int] | None:
        """The slices through the first point."""
        for points in truth.points.values():
            original = truth.frame.grid.original
            index = np.rint(points.mm_P3[0] / truth.frame.spacing_mm).astype(int)
            z, y, _ = index.clip(0, np.array(original) - 1).tolist()
            return z, y
        return None

    def draw(self, path: Path, truth: ScanPoints, predictions: Mapping[str, Found | None]) -> str:
        """Write a picture of one point: in the first scan, and for each model the similarity map,
        the place found and the true one in this scan; returns its caption.
        """
        found = {model: pair for model, pair in predictions.items() if pair and pair.matches}
        if not found:
            return ""
        chosen = _typical(next(iter(found.values())).matches)
        columns, first = [], next(iter(found.values())).first
        for model, pair in found.items():
            match = pair.matches[chosen]
            true = pair.second.points[match.name].mm_P3
            nearest = true[np.linalg.norm(true - match.found_K3[0], axis=1).argmin()]
            title = f"{model.replace('_', ' ')}  {match.error_mm:.0f} mm"
            columns.append(
                side_by_side.MatchColumn(
                    title,
                    pair.second.thumbnail,
                    pair.second.frame,
                    match.similarity_N.astype(np.float32),
                    match.found_K3,
                    nearest,
                )
            )
        match = next(iter(found.values())).matches[chosen]
        side_by_side.draw_match(path, first.thumbnail, match.from_3, match.name, columns)
        return (
            f"{match.name} of scan {first.scan} (left), looked for in test scan {truth.scan}: "
            "similarity of the patches, cross: place found, circle: true place; the point with the "
            "median error of the first model"
        )


def _labels_of(config: Config) -> Labels:
    if config.points == LANDMARKS:
        return Labels.LANDMARKS
    return Labels.PAIRS if config.pairs == SAME_PATIENT else Labels.VOXELS


def _names(matches: Sequence[PointMatch]) -> list[str]:
    return list(dict.fromkeys(match.name for match in matches))


def _called(matches: Sequence[PointMatch], name: str) -> list[PointMatch]:
    return [match for match in matches if match.name == name]


def _numbers(matches: Sequence[PointMatch]) -> dict[str, Any]:
    """Numbers over some matches, each of which counts the same."""
    return {
        "hit_rate_of_points": mean_of([float(match.hit) for match in matches]),
        "hit_rate_of_points_top": mean_of([float(match.hit_of_top) for match in matches]),
        "error_mm": mean_of([match.error_mm for match in matches]),
        "median_error_mm": float(np.median([match.error_mm for match in matches])),
        "cycle_mm": mean_of([match.cycle_mm for match in matches]),
        "num_points": len(matches),
    }


def _scan_scores(model: str, of_pair: Mapping[ScanPair, Sequence[PointMatch]]) -> list[ScanScore]:
    """One row per second scan: hit rate by name, over all first scans."""
    of_scan: dict[str, dict[str, list[float]]] = {}
    for pair, matches in of_pair.items():
        by_name = of_scan.setdefault(pair.second, {})
        for match in matches:
            by_name.setdefault(match.name, []).append(float(match.hit))
    rows = []
    for scan, by_name in of_scan.items():
        parts = {name: mean_of(hits) for name, hits in by_name.items()}
        rows.append(ScanScore(scan, model, mean_of(list(parts.values())), parts))
    return rows


def _typical(matches: Sequence[PointMatch]) -> int:
    """Number of the match with the median error."""
    order = np.argsort([match.error_mm for match in matches], kind="stable")
    return int(order[len(order) // 2])


def build(config: Config, *, seed: int) -> Matching:
    """Make the task of one evaluation; it draws nothing at random."""
    return Matching(config)
