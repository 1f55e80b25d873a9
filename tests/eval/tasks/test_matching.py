"""Matching of points in two scans, with features whose best places are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pairs import GRID, SPACING_MM, Row, dense_of, position_features, rolled, scan_with

from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.eval.features.dense import DenseFeatures
from tapct.eval.pairs.correspondence import PatchFrame, ScanFeatures, find_places, similarity_PN
from tapct.eval.pairs.partners import PairedScans, ScanPair, pairs_of, share_a_name
from tapct.eval.pairs.points import label_points
from tapct.eval.passes.task_runs import begin
from tapct.eval.scans.labelled_scan import TableLabels
from tapct.eval.scans.train_test import PATIENTS, Split, patients_together
from tapct.eval.scans.usable import Labels
from tapct.eval.tasks import matching
from tapct.types import LabelMap

ALL = PatchFrame(GRID, SPACING_MM, np.arange(int(np.prod(GRID.shape))))


def random_features(seed: int, channels: int = 128) -> torch.Tensor:
    """Features without any smoothness; with many channels, no two patches look alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((channels, *GRID.shape), generator=generator)


def kept(features_DZYX: torch.Tensor, frame: PatchFrame = ALL) -> ScanFeatures:
    return ScanFeatures.of(features_DZYX, frame)


# --- places ---


def test_the_places_are_those_of_a_search_through_all_patches() -> None:
    target, query_PD = kept(random_features(0, 5)), torch.randn(4, 5, dtype=torch.float64)
    frame, num, apart_mm = target.frame, 3, 9.0
    places, similarity = find_places(query_PD, target, num=num, apart_mm=apart_mm)
    rows = target.rows_ND.double().numpy()
    for point, query in enumerate(query_PD.numpy()):
        cosine = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
        np.testing.assert_allclose(similarity[point].numpy(), cosine, atol=1e-5)
        taken: list[int] = []
        for slot in np.argsort(-cosine):
            away = [np.linalg.norm(frame.centre_N3[slot] - frame.centre_N3[t]) for t in taken]
            if all(distance > apart_mm for distance in away):
                taken.append(int(slot))
        for found, slot in zip(places.mm_PK3[point], taken[:num], strict=True):
            moved = np.abs(frame.to_patches(found) - frame.index_N3[slot])
            assert (moved <= 1).all()  # refined around this patch


def test_a_place_between_patches_is_the_best_of_a_fine_grid() -> None:
    """Interpolated features, built a second time with torch's own interpolation."""
    target, query_D = kept(random_features(1, 5)), torch.randn(5, dtype=torch.float64)
    places, similarity = find_places(query_D[None], target, num=1, apart_mm=1)
    index = target.frame.index_N3[int(similarity.argmax())]
    stored_DZYX = target.rows_ND.double().T.reshape(1, 5, *GRID.shape)
    steps = np.linspace(-1, 1, 17)
    offsets = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    at = index + offsets
    at = at[((at >= 0) & (at <= np.array(GRID.shape) - 1)).all(1)]
    scaled = torch.from_numpy(2 * at / (np.array(GRID.shape) - 1) - 1)[:, [2, 1, 0]]
    sampled = torch.nn.functional.grid_sample(
        stored_DZYX, scaled[None, None, None], align_corners=True
    )[0, :, 0, 0]
    cosine = torch.nn.functional.cosine_similarity(sampled, query_D[:, None], dim=0)
    assert places.similarity_PK[0, 0] >= float(cosine.max()) - 1e-9


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, -2, 1)])
def test_a_shift_by_whole_patches_is_found_to_a_millionth_of_a_mm(shift: Sequence[int]) -> None:
    features = random_features(2)
    moved = kept(torch.roll(features, tuple(shift), (1, 2, 3)))
    index = np.array([[2, 3, 3], [1, 4, 2], [3, 2, 4]])
    query = kept(features).at(ALL.to_mm(index))
    places, _ = find_places(query, moved, num=1, apart_mm=1)
    np.testing.assert_allclose(places.mm_PK3[:, 0], ALL.to_mm(index + shift), atol=1e-6)


def test_an_affine_map_is_found_between_patch_centres() -> None:
    matrix = np.array([[1.02, 0.03, -0.02], [-0.04, 0.97, 0.05], [0.01, -0.03, 1.03]])
    offset = np.array([1.0, -2, 1.5])
    first = position_features(ALL, lambda mm: mm)
    second = position_features(ALL, lambda mm: (mm - offset) @ np.linalg.inv(matrix).T)
    from_mm = np.array([[14.0, 14, 17], [11, 17, 12], [17.3, 12.1, 15.9]])
    places, _ = find_places(first.at(from_mm), second, num=1, apart_mm=5)
    np.testing.assert_allclose(places.mm_PK3[:, 0], from_mm @ matrix.T + offset, atol=1e-2)


def test_in_the_same_scan_a_point_leads_back_to_itself() -> None:
    features = kept(random_features(3))
    from_mm = np.array([[14.0, 14, 17], [4.2, 9.9, 21.5]])
    places, _ = find_places(features.at(from_mm), features, num=1, apart_mm=5)
    np.testing.assert_allclose(places.mm_PK3[:, 0], from_mm, atol=1e-2)


def test_patches_that_are_not_kept_are_neither_found_nor_interpolated() -> None:
    inside = PatchFrame(GRID, SPACING_MM, np.flatnonzero(ALL.index_N3[:, 2] < 4))
    features = random_features(4)
    features[:, :, :, 4:] = 100.0
    target = kept(features, inside)
    border_mm = ALL.to_mm(np.array([[2.0, 3, 3.4]]))
    expected = features[:, 2, 3, 3].double()
    found = target.at(border_mm)[0]
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-6)
    places, similarity = find_places(expected[None], target, num=2, apart_mm=5)
    assert similarity.shape[1] == len(inside.kept_N)
    assert (inside.to_patches(places.mm_PK3[0])[:, 2] <= 3 + 1e-9).all()


def test_large_features_stay_finite_in_half_precision() -> None:
    target = kept(random_features(5) * 1e6)
    assert torch.isfinite(target.rows_ND).all() and target.rows_ND.dtype == torch.float16
    assert float(similarity_PN(target.at(ALL.centre_N3[:1]), target)[0, 0]) > 0.999


# --- pairs ---


def test_pairs_of_one_patient_go_both_ways_and_end_with_the_last_scan() -> None:
    rows = [Row("a", "p"), Row("b", "q"), Row("c", "p"), Row("d", "p"), Row("e", "")]
    pairs = pairs_of(rows, "same_patient", 0)
    assert {(pair.first, pair.second) for pair in pairs} == {
        ("a", "c"), ("c", "a"), ("a", "d"), ("d", "a"), ("c", "d"), ("d", "c")
    }  # fmt: skip
    assert pairs[:2] == pairs_of(rows, "same_patient", 2) == pairs_of(rows[:3], "same_patient", 0)


def test_across_patients_each_scan_has_one_partner_of_another_patient() -> None:
    rows = [Row("a", "p"), Row("b", "p"), Row("c", "q"), Row("d", "r")]
    pairs = pairs_of(rows, "across_patients", 0)
    patient = {row.id: row.patient for row in rows}
    assert sorted(pair.second for pair in pairs) == ["a", "b", "c", "d"]
    assert all(patient[pair.first] != patient[pair.second] for pair in pairs)
    assert ScanPair("b", "c") in pairs and ScanPair("c", "d") in pairs
    assert pairs_of(rows[:2], "across_patients", 0) == []


def test_scans_without_a_common_landmark_are_no_pair() -> None:
    """They would fill `max_pairs`, and count in the number of pairs of the results."""
    rows = [Row("a", "p"), Row("b", "p"), Row("c", "p"), Row("d", "q"), Row("e", "q")]
    names_of = {"a": {"x"}, "b": {"x", "y"}, "c": {"y"}, "d": {"x"}, "e": {"z"}}
    common = share_a_name(names_of, ())
    found = {(pair.first, pair.second) for pair in pairs_of(rows, "same_patient", 0, common)}
    assert found == {("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")}
    only_y = share_a_name(names_of, ["y"])
    found = {(pair.first, pair.second) for pair in pairs_of(rows, "same_patient", 0, only_y)}
    assert found == {("b", "c"), ("c", "b")}
    # d follows b, the last scan before it that has a point of the same name
    across = pairs_of(rows, "across_patients", 0, common)
    assert ScanPair("b", "d") in across and all("e" not in (p.first, p.second) for p in across)


def test_a_scan_is_kept_until_its_last_pair_is_complete() -> None:
    rows = [Row(f"s{n}", f"p{n // 2}") for n in range(10)]
    store: PairedScans[str] = PairedScans(pairs_of(rows, "same_patient", 0))
    complete = [pair for row in rows for pair, _, _ in store.add("model", row.id, row.id)]
    assert set(complete) == set(store.pairs) and store.most_kept == 2
    assert store.add("model", "s1", "again") == [] and not store.has_partner("x")
    ring: PairedScans[str] = PairedScans(pairs_of(rows, "across_patients", 0))
    for row in rows:
        for pair, first, second in ring.add("model", row.id, row.id):
            assert (first, second) == (pair.first, pair.second)
    assert ring.most_kept <= 4  # neighbours, and those at the beginning that wait for the last one


def test_test_scans_of_one_patient_follow_one_another() -> None:
    rows = tuple(Row(n, p) for n, p in (("a", "p"), ("b", "q"), ("c", "r"), ("d", "q"), ("e", "")))
    split = patients_together(Split(PATIENTS, rows, rows))
    assert [row.id for row in split.test] == ["b", "d", "a", "c", "e"] and split.train == rows


# --- the task ---


def run(
    features: dict[str, torch.Tensor], scans: list[Any], **settings: Any
) -> tuple[matching.Matching, Any]:
    """The scans as test scans, without any training pair."""
    task = matching.build(matching.Config(**settings), seed=0)
    task.begin(1)
    rows = [Row(scan.id, scan.patient) for scan in scans]
    task.expect_scans([Row("t", "t")], rows)
    play = np.ones(GRID.shape[0], bool)
    one = scan_with("t", "t", {"x": (9.0, 9.0, 9.0)}, scans[0].labels)
    task.learn("m", dense_of(random_features(9)), task.truth(one, GRID, play))
    task.fit()
    last = None
    for scan in scans:
        last = task.judge("m", dense_of(features[scan.id]), task.truth(scan, GRID, play))
    return task, last


def test_identical_scans_have_no_error_and_a_cycle_without_error() -> None:
    points = {"a": (10.0, 12.0, 12.0), "b": (14.0, 9.0, 17.0)}
    scans = [scan_with(name, "p", points) for name in ("s1", "s2")]
    task, _ = run({name: random_features(0) for name in ("s1", "s2")}, scans)
    numbers = task.results().models["m"]
    assert numbers["hit_rate"] == numbers["hit_rate_of_points_top"] == 1
    assert numbers["error_mm"] < 1e-2 and numbers["cycle_mm"] < 1e-2
    assert numbers["num_points"] == 4 and numbers["num_pairs"] == 2


def test_only_a_place_within_the_radius_is_a_hit() -> None:
    """The second scan is moved by one patch (4 mm), and its points are not."""
    points = {"a": (10.0, 12.0, 12.0)}
    scans = [scan_with(name, "p", points) for name in ("s1", "s2")]
    features = {"s1": random_features(0), "s2": rolled(random_features(0), 1)}
    for radius_mm, rate in ((3.9, 0.0), (4.1, 1.0)):
        task, _ = run(features, scans, radius_mm=radius_mm)
        numbers = task.results().models["m"]
        assert numbers["hit_rate"] == rate
        assert numbers["error_mm"] == pytest.approx(4, abs=1e-2)
        assert task.headline().values == {"m": rate}
    assert {row.scan: row.parts for row in task.results().scans} == {
        "s1": {"a": 1.0}, "s2": {"a": 1.0}
    }  # fmt: skip


def test_a_place_inside_a_lesion_is_a_hit_and_parts_of_a_label_are_points_of_their_own() -> None:
    labels = np.zeros(GRID.original, np.uint16)
    labels[4:8, 8:24, 8:12] = 5  # long: its ends are far from its centre
    labels[4:8, 20:24, 24:28] = 5
    labels[0, 0, 0] = 5  # a speck
    scan = scan_with("s1", "p", {}, LabelMap(labels, SPACING_MM, names=((5, "lesion"),)))
    points = label_points(scan, ())["lesion"]
    assert len(points.mm_P3) == len(points.regions) == 2
    np.testing.assert_allclose(points.mm_P3[0], (np.array([5.5, 15.5, 9.5]) * SPACING_MM))
    end = np.array([5, 23, 9]) * np.array(SPACING_MM)
    assert points.error_mm(end) > 5 and points.is_hit(end, 5) and not points.is_hit(end + 9, 5)
    assert label_points(scan, ("5",)).keys() == {"lesion"} and not label_points(scan, ("6",))


def test_label_parts_are_found_in_the_other_scan(tmp_path: Path) -> None:
    labels = np.zeros(GRID.original, np.uint16)
    labels[4:8, 8:16, 8:16] = 5
    scans = []
    for number, shift in enumerate((0, 4)):
        moved = LabelMap(np.roll(labels, shift, 2), SPACING_MM, names=((5, "lesion"),))
        scans.append(scan_with(f"s{number}", "p", {}, moved))
    features = {"s0": random_features(0), "s1": rolled(random_features(0), 1)}
    task, found = run(features, scans, points="labels", radius_mm=1.0)
    assert task.labels is Labels.PAIRS
    assert task.results().models["m"]["error_mm"] < 1e-2
    assert task.headline().values == {"m": 1.0}
    truth = task.truth(scans[1], GRID, np.ones(GRID.shape[0], bool))
    caption = task.draw(tmp_path / "picture.png", truth, {"m": found})
    assert "scan s0" in caption and (tmp_path / "picture.png").is_file()


def test_the_block_with_more_hits_on_the_training_patients_is_chosen() -> None:
    points = {"a": (10.0, 12.0, 12.0), "b": (14.0, 9.0, 17.0)}
    task = matching.build(matching.Config(radius_mm=2.0), seed=0)
    rows = [Row(f"s{n}", f"p{n // 2}") for n in range(4)]
    task.begin(2)
    task.expect_scans(rows[:2], rows[2:])
    play = np.ones(GRID.shape[0], bool)

    def dense(number: int) -> DenseFeatures:
        """Block 0 is the same in all scans, block 1 is noise."""
        return dense_of(random_features(0), random_features(100 + number))

    for number in range(2):
        scan = scan_with(f"s{number}", "p0", points)
        task.learn("m", dense(number), task.truth(scan, GRID, play))
    task.fit()
    for number in range(2, 4):
        scan = scan_with(f"s{number}", "p1", points)
        task.judge("m", dense(number), task.truth(scan, GRID, play))
    numbers = task.results().models["m"]
    assert numbers["block"] == 0 and numbers["hit_rate"] == 1
    assert numbers["choice"]["num_scores"] == 4
    assert numbers["choice"]["means"]["block 0"] > numbers["choice"]["means"]["block 1"]


def test_landmarks_in_test_scans_alone_suffice_where_no_block_is_chosen() -> None:
    split = Split(PATIENTS, (), (Row("s1", "p"), Row("s2", "p")))
    choosing = matching.build(matching.Config(), seed=0)
    with pytest.raises(UserError, match="has 0 training and 2 test scans; it needs one of each"):
        begin("matching", choosing, split.test, split, TableLabels())
    task = matching.build(matching.Config(blocks="last"), seed=0)
    landmarks = {name: {"a": (10.0, 12.0, 12.0)} for name in ("s1", "s2")}
    begin("matching", task, split.test, split, TableLabels(landmarks=landmarks))
    task.fit()
    play = np.ones(GRID.shape[0], bool)
    for scan in (scan_with(name, "p", {"a": (10.0, 12.0, 12.0)}) for name in ("s1", "s2")):
        task.judge("m", dense_of(random_features(0)), task.truth(scan, GRID, play))
    assert task.results().models["m"]["hit_rate"] == 1
    none = Split(PATIENTS, split.test, ())
    with pytest.raises(UserError, match="has 2 training and 0 test scans; it needs a test scan"):
        begin("matching", task, none.train, none, TableLabels())


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({}, Labels.LANDMARKS),
        ({"points": "labels"}, Labels.PAIRS),
        ({"points": "labels", "pairs": "across_patients", "names": ("x",)}, Labels.VOXELS),
    ],
)
def test_a_task_reads_the_labels_that_its_points_need(
    settings: dict[str, Any], labels: Labels
) -> None:
    assert matching.build(matching.Config(**settings), seed=0).labels is labels


def test_bad_settings_and_scans_are_one_line() -> None:
    config = matching.Config(pairs="across_patients")
    with pytest.raises(UserError, match=r"across_patients needs eval.tasks.matching.names"):
        matching.build(config, seed=0)
    task = matching.build(matching.Config(), seed=0)
    with pytest.raises(UserError, match=r"none of its 2 test scans has a partner"):
        task.expect_scans([Row("a", "p")], [Row("b", "q"), Row("c", "r")])
    with pytest.raises(UserError, match="all of its scans are of one patient"):
        task.expect_scans([Row("a", "p"), Row("b", "p")], [Row("a", "p"), Row("b", "p")])
    scans = [scan_with("s1", "p", {"a": (9.0, 9, 9)}), scan_with("s2", "p", {"b": (9.0, 9, 9)})]
    task, _ = run({scan.id: random_features(0) for scan in scans}, scans)
    with pytest.raises(
        UserError, match="no two test scans of a pair have a point of the same name"
    ):
        task.results()
    task = matching.build(matching.Config(), seed=0)
    task.expect_landmarks({"t": {"a"}, "s1": {"a"}, "s2": {"b"}})  # before features are computed
    with pytest.raises(
        UserError, match="no two test scans of a pair have a point of the same name"
    ):
        task.expect_scans([Row("t", "t")], [Row("s1", "p"), Row("s2", "p")])
    task = matching.build(matching.Config(), seed=0)
    task.expect_scans([Row("t", "t")], [Row("a", "p"), Row("b", "p")])
    with pytest.raises(UserError, match="at least one scan could not be read"):
        task.results()


def test_the_defaults_are_a_plugin() -> None:
    assert plugins.load("eval.tasks", "matching").Config() == matching.Config()
