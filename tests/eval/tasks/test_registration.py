"""Registration by patches with alike features, with maps that are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pairs import GRID, SPACING_MM, Row, dense_of, position_features, position_map

from tapct.base.exits import UserError
from tapct.data.phantom import archive as phantom
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.pairs.correspondence import PatchFrame, ScanFeatures, mutual_correspondences
from tapct.eval.pairs.propagation import dice_of_labels, warp
from tapct.eval.pairs.thumbnail import Thumbnail
from tapct.eval.pairs.transform import Affine, Transform, fit_transform, translation
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.scans.usable import Labels
from tapct.eval.tasks import matching, registration
from tapct.types import AIR_HU, IGNORE_LABEL, LabelMap, Volume

MATRIX = np.array([[1.02, 0.03, -0.02], [-0.04, 0.97, 0.05], [0.01, -0.03, 1.03]])
OFFSET = np.array([1.0, -2.0, 1.5])
PLAY = np.ones(GRID.shape[0], bool)


def known(points: np.ndarray) -> np.ndarray:
    """The map from the fixed to the moving scan."""
    return points @ MATRIX.T + OFFSET


def known_back(points: np.ndarray) -> np.ndarray:
    return (points - OFFSET) @ np.linalg.inv(MATRIX).T


def everything(grid: PatchGrid = GRID) -> PatchFrame:
    return PatchFrame(grid, SPACING_MM, np.arange(int(np.prod(grid.shape))))


# --- maps from correspondences ---


def test_an_affine_map_is_recovered_exactly_although_half_of_the_points_are_wrong() -> None:
    rng = np.random.default_rng(0)
    fixed = rng.uniform(0, 300, (200, 3))
    moving = known(fixed)
    moving[:100] = rng.uniform(0, 300, (100, 3))
    found = fit_transform(fixed, moving, inlier_mm=20, width_mm=0, seed=0)
    assert found is not None
    np.testing.assert_allclose(found.affine.matrix_33, MATRIX, atol=1e-6)
    np.testing.assert_allclose(found(fixed), known(fixed), atol=1e-6)


@pytest.mark.parametrize("size", [(12, 28, 32), (8, 20, 20)], ids=["whole", "crop"])
def test_an_affine_map_is_recovered_from_features(size: tuple[int, int, int]) -> None:
    """Also where the moving scan is a crop, so that most patches have no partner."""
    whole, crop = everything(), everything(PatchGrid((2, 4, 4), size, size))
    fixed = position_features(whole, lambda mm: mm)
    corner = np.array([3.0, 5.0, 4.0]) if size != GRID.original else np.zeros(3)
    moving = position_features(crop, lambda mm: known_back(mm + corner))
    found = mutual_correspondences(fixed, moving, np.arange(len(whole.kept_N)), cycle_patches=1)
    transform = fit_transform(found.fixed_P3, found.moving_P3, inlier_mm=10, width_mm=30, seed=0)
    assert transform is not None
    points = np.random.default_rng(1).uniform(6, 20, (50, 3))
    errors = np.linalg.norm(transform(points) - (known(points) - corner), axis=1)
    assert errors.max() < 1e-2


def test_a_shift_by_whole_patches_is_recovered_to_a_millionth_of_a_mm() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((64, *GRID.shape), generator=generator)
    frame = everything()
    fixed, moving = (ScanFeatures.of(torch.roll(features, shift, 3), frame) for shift in (0, 1))
    found = mutual_correspondences(fixed, moving, np.arange(len(frame.kept_N)), cycle_patches=0)
    transform = fit_transform(found.fixed_P3, found.moving_P3, inlier_mm=5, width_mm=0, seed=0)
    assert transform is not None
    moved = transform(frame.centre_N3) - frame.centre_N3
    np.testing.assert_allclose(moved, np.tile([0, 0, 4.0], (len(moved), 1)), atol=1e-6)


def test_too_few_or_mirrored_points_are_no_map() -> None:
    points = np.random.default_rng(0).uniform(0, 300, (40, 3))
    assert fit_transform(points[:3], points[:3], inlier_mm=20, width_mm=0, seed=0) is None
    mirrored = fit_transform(points, points * [1, 1, -1], inlier_mm=5, width_mm=0, seed=0)
    assert mirrored is None or np.linalg.det(mirrored.affine.matrix_33) > 0


def test_points_of_one_plane_leave_the_other_direction_alone() -> None:
    points = np.random.default_rng(0).uniform(0, 300, (40, 3)) * [0, 1, 1]
    found = fit_transform(points, points + [3, 0, 0], inlier_mm=20, width_mm=0, seed=0)
    assert found is not None
    np.testing.assert_allclose(found(np.array([[50.0, 5, 5]])), [[53.0, 5, 5]], atol=1e-4)


def test_the_field_is_the_damped_mean_of_residuals() -> None:
    at, residual = np.array([[10.0, 10, 10], [40, 10, 10]]), np.array([[4.0, 0, 0], [0, 2, 0]])
    weight = np.array([1.0, 0.5])
    transform = Transform(Affine(np.eye(3), np.zeros(3)), at, residual, weight, 20.0)
    point = np.array([20.0, 12, 9])
    kernel = [w * math.exp(-((point - a) ** 2).sum() / 800) for a, w in zip(at, weight)]
    expected = sum(k * r for k, r in zip(kernel, residual)) / (1 + sum(kernel))
    np.testing.assert_allclose(transform(point[None])[0] - point, expected, atol=1e-12)
    assert np.abs(transform.field(np.array([[900.0, 0, 0]]))).max() < 1e-9
    assert np.array_equal(transform.without_field()(point[None])[0], point)


def test_the_map_on_a_lattice_is_the_map_at_its_points() -> None:
    rng = np.random.default_rng(0)
    transform = Transform(
        Affine(MATRIX, OFFSET), rng.uniform(0, 40, (30, 3)), rng.normal(0, 2, (30, 3)),
        np.ones(30), 40.0,
    )  # fmt: skip
    shape, spacing = (3, 5, 4), (10.0, 8.0, 9.0)
    for z, moved in transform.on_lattice(shape, spacing):
        index = np.stack(np.meshgrid([z], range(5), range(4), indexing="ij"), -1)[0]
        exact = transform((index * spacing).reshape(-1, 3)).reshape(5, 4, 3)
        # the field is linear between nodes
        assert np.abs(np.moveaxis(moved, 0, -1) - exact).max() < 0.15


# --- labels ---


def test_labels_are_moved_by_whole_voxels_and_dice_is_that_of_the_sets() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (4, 8, 8)).astype(np.uint16)
    hu = labels.astype(np.int16) * 100
    moving = Thumbnail(hu, (2.0, 1.0, 1.0), labels)
    fixed = Thumbnail(hu, (2.0, 1.0, 1.0), labels)
    shift = translation(np.array([0, 0, 2.0]))
    warped = warp(labels, 0, shift, moving, fixed)
    assert np.array_equal(warped[:, :, :6], labels[:, :, 2:])
    assert (warped[:, :, 6:] == 0).all()
    assert (warp(hu, AIR_HU, shift, moving, fixed)[:, :, 6:] == AIR_HU).all()
    found = dice_of_labels(warped, labels, (1, 2, 3))
    assert set(found) == {1, 2}  # the fixed scan does not have the third organ
    for organ, value in found.items():
        a, b = warped == organ, labels == organ
        assert value == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_voxels_that_nobody_has_labelled_do_not_count() -> None:
    fixed = np.array([[[1, 1, IGNORE_LABEL, 0]]], np.uint16)
    warped = np.array([[[1, 0, 1, IGNORE_LABEL]]], np.uint16)
    assert dice_of_labels(warped, fixed, (1,)) == {1: pytest.approx(2 / 3)}


# --- the task ---


def scan_of(name: str, patient: str, labels: np.ndarray, **points: Any) -> LabelledScan:
    label_map = LabelMap(labels, SPACING_MM, names=((1, "liver"), (2, "spleen"), (3, "body")))
    volume = Volume(np.full(GRID.original, 40, np.int16), SPACING_MM)
    return LabelledScan(name, volume, label_map, patient, landmarks_mm=points)


def anatomy(move_mm: float) -> tuple[np.ndarray, DenseFeatures]:
    """Two organs, and features that show where in the body a patch lies; moved to the left."""
    mm = np.moveaxis(np.indices(GRID.original), 0, -1) * SPACING_MM - [0, 0, move_mm]
    labels = np.full(GRID.original, 3, np.uint16)
    labels[np.linalg.norm(mm - [12, 10, 10], axis=-1) < 5] = 1
    labels[np.linalg.norm(mm - [10, 20, 16], axis=-1) < 5] = 2
    frame = everything()
    rows = position_map(frame.centre_N3 - [0, 0, move_mm])
    features = torch.from_numpy(rows.T.reshape(4, *GRID.shape)).float()
    return labels, dense_of(features)


def run(moves_mm: list[float], **settings: Any) -> tuple[registration.Registration, Any, Any]:
    """Test scans of one patient, each moved by its own distance; no training pair."""
    task = registration.build(registration.Config(inlier_mm=5.0, **settings), seed=0)
    rows = [Row(f"s{number}", "p") for number in range(len(moves_mm))]
    task.begin(1)
    task.expect_scans([Row("t", "t")], rows)
    labels, dense = anatomy(0)
    task.learn("pretrained", dense, task.truth(scan_of("t", "t", labels), GRID, PLAY))
    task.fit()
    last = truth = None
    for row, move in zip(rows, moves_mm, strict=True):
        labels, dense = anatomy(move)
        point = {"top": (12.0, 10.0, 10.0 + move)}
        truth = task.truth(scan_of(row.id, "p", labels, **point), GRID, PLAY)
        last = task.judge("pretrained", dense, truth)
    return task, truth, last


def test_a_moved_patient_is_registered_and_the_identity_stands_beside(tmp_path: Path) -> None:
    task, truth, last = run([0.0, 6.0])
    models = task.results().models
    assert list(models) == ["pretrained", "identity"]
    assert models["pretrained"]["mean_dice"] > 0.98 and models["identity"]["mean_dice"] < 0.6
    assert set(models["pretrained"]["dice"]) == {"liver", "spleen"}  # the body is no organ
    assert models["pretrained"]["mean_landmark_error_mm"] < 0.02
    assert models["identity"]["mean_landmark_error_mm"] == pytest.approx(6)
    assert models["pretrained"]["num_failed"] == 0 and models["pretrained"]["num_pairs"] == 2
    headline = task.headline()
    assert headline.lead().baseline == "identity" and headline.lead().gain > 0.3
    assert {row.scan for row in task.results().scans} == {"s0", "s1"}
    caption = task.draw(tmp_path / "picture.png", truth, {"pretrained": last})
    assert "scan s0 (moving)" in caption and (tmp_path / "picture.png").is_file()


def test_identical_scans_have_dice_1() -> None:
    task, _, _ = run([0.0, 0.0], transform="affine")
    models = task.results().models
    assert models["pretrained"]["mean_dice"] == models["identity"]["mean_dice"] == 1


def test_landmarks_can_be_the_headline_and_need_no_label_map() -> None:
    task, _, _ = run([0.0, 6.0], metric="landmarks")
    assert task.labels is Labels.LANDMARKS
    headline = task.headline()
    assert headline.direction == "lower" and headline.lead().baseline == "identity"
    assert headline.values["pretrained"] < 0.02 and headline.values["identity"] == pytest.approx(6)
    assert task.results().models["pretrained"]["mean_dice"] is None


def test_features_without_any_agreement_fall_back_to_the_identity() -> None:
    task, _, _ = run([0.0, 0.0], max_patches=3)
    numbers = task.results().models["pretrained"]
    assert numbers["num_failed"] == 2 and numbers["mean_dice"] == 1


def test_scans_of_different_patients_are_paired_where_no_patient_has_two() -> None:
    rows = [Row("a", "p"), Row("b", "q"), Row("c", "r")]
    task = registration.build(registration.Config(), seed=0)
    task.expect_scans([Row("t", "t")], rows)
    assert {pair.second for pair in task._test.pairs} == {"a", "b", "c"}
    with pytest.raises(UserError, match="its 3 test scans have no pair"):
        registration.build(registration.Config(pairs="same_patient"), seed=0).expect_scans(
            [Row("t", "t")], rows
        )


def test_scans_without_a_common_landmark_are_refused_before_features_are_computed() -> None:
    rows = [Row("a", "p"), Row("b", "p"), Row("c", "p")]
    config = registration.Config(metric="landmarks")
    task = registration.build(config, seed=0)
    task.expect_landmarks({"t": {"x"}, "a": {"x"}, "b": {"y"}, "c": {"z"}})
    with pytest.raises(UserError, match="no two test scans of a pair have a landmark in common"):
        task.expect_scans([Row("t", "t")], rows)
    task = registration.build(config, seed=0)
    task.expect_landmarks({"t": {"x"}, "a": {"x"}, "b": {"y"}, "c": {"x"}})
    task.expect_scans([Row("t", "t")], rows)
    assert {(pair.first, pair.second) for pair in task._test.pairs} == {("a", "c"), ("c", "a")}


def test_landmarks_of_different_patients_must_be_named() -> None:
    rows = [Row("a", "p"), Row("b", "q")]
    config = registration.Config(metric="landmarks")
    with pytest.raises(UserError, match=r"needs eval.tasks.registration.names"):
        registration.build(config, seed=0).expect_scans([Row("t", "t")], rows)
    for names, expected in (((), set()), (("carina",), {"carina"})):
        task = registration.build(registration.Config(names=names), seed=0)
        task.expect_scans([Row("t", "t")], rows)
        scan = scan_of("a", "p", anatomy(0)[0], carina=(9.0, 9, 9), lesion=(5.0, 5, 5))
        assert set(task.truth(scan, GRID, PLAY).landmarks) == expected


@pytest.mark.parametrize(
    ("settings", "labels"),
    [({}, Labels.VOXELS), ({"pairs": "same_patient"}, Labels.PAIRS)],
)
def test_a_task_reads_the_labels_that_it_compares(settings: dict[str, Any], labels: Labels) -> None:
    assert registration.build(registration.Config(**settings), seed=0).labels is labels


# --- a known deformation ---


def test_the_followup_of_a_phantom_is_matched_and_registered(tmp_path: Path) -> None:
    """The features are the mean HU of the patches around each patch: they know the anatomy."""
    config = phantom.Config(
        slices=(28, 28), in_plane=(64, 64), slice_mm=(7.0, 7.0), followup_share=1.0, warp_mm=6.0
    )
    cases = [phantom.draw_case(3, number, config) for number in range(2)]
    tasks: list[Any] = [
        matching.build(matching.Config(radius_mm=15.0), seed=0),
        registration.build(registration.Config(), seed=0),
    ]
    for task in tasks:
        task.begin(1)
        task.expect_scans([Row("t", "t")], [Row(case.facts.name, "p") for case in cases])
        scan, dense = phantom_scan(cases[0])
        task.learn(
            "pretrained", dense, task.truth(scan, dense.grid, np.ones(dense.grid.shape[0], bool))
        )
        task.fit()
        for case in cases:
            scan, dense = phantom_scan(case)
            truth = task.truth(scan, dense.grid, np.ones(dense.grid.shape[0], bool))
            last = task.judge("pretrained", dense, truth)
        assert task.draw(tmp_path / "picture.png", truth, {"pretrained": last})
    matched = tasks[0].results().models["pretrained"]
    assert matched["hit_rate_of_points"] > 0.7 and matched["median_error_mm"] < 8
    registered = tasks[1].results().models
    assert registered["pretrained"]["mean_landmark_error_mm"] < 5
    assert registered["identity"]["mean_landmark_error_mm"] > 20
    assert tasks[1].headline().lead().gain > 0.3


def phantom_scan(case: phantom.Case) -> tuple[LabelledScan, DenseFeatures]:
    """A scan of the phantom with its landmarks, and features of it."""
    hu = torch.from_numpy(case.volume.hu_ZYX.astype(np.float32)).clamp(-1000, 400) / 500
    size = (hu.shape[0], hu.shape[1], hu.shape[2])
    mean = torch.nn.functional.avg_pool3d(hu[None, None], (2, 4, 4))
    padded = torch.nn.functional.pad(mean, [2] * 6, mode="replicate")[0, 0]
    around = padded.unfold(0, 5, 1).unfold(1, 5, 1).unfold(2, 5, 1).flatten(3).permute(3, 0, 1, 2)
    dense = DenseFeatures(around, around.flatten(1).mean(1), PatchGrid((2, 4, 4), size, size))
    origin = np.array(case.volume.origin_mm)[::-1]
    points = {}
    for landmark in case.truth.landmarks:
        z, y, x = (np.array(landmark.zyx_mm) - origin).tolist()
        points[landmark.name] = (z, y, x)
    name, patient = case.facts.name, case.facts.patient_id
    return LabelledScan(name, case.volume, case.labels, patient, landmarks_mm=points), dense


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, True),
        ({"blocks": "last"}, True),
        ({"transform": "affine"}, True),
        ({"blocks": "last", "transform": "affine"}, False),
    ],
)
def test_training_scans_are_needed_where_something_is_chosen(
    settings: dict[str, Any], needed: bool
) -> None:
    task = registration.build(registration.Config(**settings), seed=0)
    assert task.needs_training is needed
