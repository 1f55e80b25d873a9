"""NSD and HD95 equal surface-distance, MONAI and a derivation from all pairs of voxels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tapct.base.exits import UserError
from tapct.eval.metrics.surface import (
    Definition,
    Presence,
    SurfaceScore,
    surface_distances,
    surface_score,
)
from tapct.eval.metrics.tolerances import DEFAULT_MM, Tolerance, check_named, parse, tolerance_of
from tapct.types import IGNORE_LABEL

SPACING = (2.5, 0.8, 0.9)


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping balls with some wrong voxels; the first touches the border of the scan."""
    rng = np.random.default_rng(seed)
    grid_3ZYX = np.indices((9, 26, 24)) * np.array(SPACING)[:, None, None, None]
    masks = []
    for _ in range(2):
        center_3 = np.array([8.0, 8.0, 9.0]) + rng.uniform(-2, 2, 3)
        far_ZYX = np.linalg.norm(grid_3ZYX - center_3[:, None, None, None], axis=0)
        masks.append((far_ZYX < rng.uniform(6, 9)) ^ (rng.random(far_ZYX.shape) < 0.002))
    return masks[0], masks[1]


def surface_points_mm(mask: np.ndarray) -> np.ndarray:
    """Centres of the voxels that have a neighbour of six outside, found voxel by voxel."""
    padded = np.pad(mask, 1)
    points = []
    for index in np.argwhere(padded):
        steps = [sign * unit for unit in np.eye(3, dtype=int) for sign in (-1, 1)]
        if not all(padded[tuple(index + step)] for step in steps):
            points.append(index * np.array(SPACING))
    return np.array(points)


@pytest.mark.parametrize("seed", range(3))
def test_voxel_surfaces_equal_the_distances_of_all_pairs(seed: int) -> None:
    true, predicted = blobs(seed)
    points = [surface_points_mm(mask) for mask in (true, predicted)]
    pairs = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    from_truth, from_prediction = pairs.min(1), pairs.min(0)
    found = surface_distances(true, predicted, SPACING, Definition.VOXELS)
    np.testing.assert_allclose(np.sort(found.from_truth_mm_N), np.sort(from_truth), atol=1e-9)
    hd95 = max(np.quantile(from_truth, 0.95), np.quantile(from_prediction, 0.95))
    assert found.hausdorff_mm() == pytest.approx(hd95, abs=1e-9)
    within = (from_truth <= 1.1).sum() + (from_prediction <= 1.1).sum()
    assert found.nsd(1.1) == pytest.approx(within / sum(pairs.shape), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_surfels_equal_surface_distance_on_the_whole_grid(seed: int) -> None:
    import surface_distance

    true, predicted = blobs(seed)
    with pytest.warns(DeprecationWarning, match="scipy.ndimage"):
        found = surface_distance.compute_surface_distances(true, predicted, SPACING)
    score = surface_score(true * 3, predicted * 3, 3, SPACING, 1.1)
    expected = surface_distance.compute_surface_dice_at_tolerance(found, 1.1)
    assert score.nsd == pytest.approx(expected, abs=1e-9)
    expected = surface_distance.compute_robust_hausdorff(found, 95)
    assert score.hd95_mm == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow  # importing MONAI takes 10 s
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_definitions_equal_monai() -> None:
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    for seed in range(3):
        true, predicted = blobs(seed)
        masks = [torch.tensor(mask)[None, None] for mask in (predicted, true)]
        options = {"include_background": True, "spacing": SPACING}
        surfels = monai.compute_surface_dice(*masks, [1.1], use_subvoxels=True, **options)
        voxels = monai.compute_surface_dice(*masks, [1.1], **options)
        hd95 = monai.compute_hausdorff_distance(*masks, percentile=95, **options)
        ours = surface_distances(true, predicted, SPACING, Definition.VOXELS)
        assert ours.nsd(1.1) == pytest.approx(float(voxels), abs=1e-6)
        assert ours.hausdorff_mm() == pytest.approx(float(hd95), abs=1e-6)
        ours = surface_distances(true, predicted, SPACING)
        assert ours.nsd(1.1) == pytest.approx(float(surfels), abs=1e-6)


@pytest.mark.parametrize("definition", Definition)
def test_a_shifted_box_has_the_distance_of_the_shift(definition: Definition) -> None:
    """Two of six faces move by two voxels along x; the other faces move within themselves."""
    true = np.zeros((8, 16, 40), np.uint16)
    true[1:7, 2:14, 4:16] = 1
    predicted = np.roll(true, 2, axis=2)
    score = surface_score(true, predicted, 1, (1.0, 1.0, 1.5), 3.0, definition)
    assert score.hd95_mm == pytest.approx(3.0)
    assert score.nsd == 1.0  # 3 mm is still within 3 mm
    assert surface_score(true, predicted, 1, (1.0, 1.0, 1.5), 2.9, definition).nsd < 1.0


@pytest.mark.parametrize("definition", Definition)
def test_equal_masks_are_perfect_and_the_order_of_the_maps_does_not_matter(
    definition: Definition,
) -> None:
    true, predicted = (mask.astype(np.uint8) for mask in blobs(1))
    same = surface_score(true, true, 1, SPACING, 0.0, definition)
    assert (same.nsd, same.hd95_mm, same.presence) == (1.0, 0.0, Presence.BOTH)
    there = surface_score(true, predicted, 1, SPACING, 1.0, definition)
    back = surface_score(predicted, true, 1, SPACING, 1.0, definition)
    assert there.nsd == pytest.approx(back.nsd) and there.hd95_mm == pytest.approx(back.hd95_mm)


def test_the_rule_for_empty_organs() -> None:
    truth, prediction = np.zeros((2, 4, 6, 8), np.uint8)
    truth[1, 2:4, 3:5] = 1
    prediction[2, 2:4, 3:5] = 2
    diagonal = math.sqrt((4 * 3.0) ** 2 + (6 * 1.0) ** 2 + (8 * 2.0) ** 2)
    spacing = (3.0, 1.0, 2.0)
    missed = surface_score(truth, prediction, 1, spacing, 2.0)
    assert missed == SurfaceScore(0.0, pytest.approx(diagonal), 2.0, Presence.MISSED)
    invented = surface_score(truth, prediction, 2, spacing, 2.0)
    assert math.isnan(invented.nsd) and math.isnan(invented.hd95_mm)
    assert invented.presence is Presence.INVENTED
    assert surface_score(truth, prediction, 7, spacing, 2.0).presence is Presence.NEITHER


def test_a_prediction_where_nobody_has_labelled_is_no_part_of_the_organ() -> None:
    truth = np.zeros((4, 10, 10), np.uint16)
    truth[1:3, 2:6, 2:6] = 1
    prediction = truth.copy()
    prediction[1:3, 7:9, 7:9] = 1
    assert surface_score(truth, prediction, 1, (1, 1, 1), 0.5).nsd < 1
    truth[:, 7:, 7:] = IGNORE_LABEL
    assert surface_score(truth, prediction, 1, (1, 1, 1), 0.5).nsd == 1


@pytest.mark.parametrize(
    ("shape", "spacing", "tolerance", "message"),
    [
        ((4, 4, 5), (1, 1, 1), 1.0, "one grid"),
        ((4, 4, 4), (1, 1), 1.0, "one grid"),
        ((4, 4, 4), (1, 0, 1), 1.0, "above 0"),
        ((4, 4, 4), (1, 1, 1), -1.0, "at least 0"),
    ],
)
def test_bad_input_is_an_error(shape, spacing, tolerance, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        surface_score(np.zeros((4, 4, 4)), np.zeros(shape), 1, spacing, tolerance)


def test_a_missing_package_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "surface_distance", None)
    true, predicted = blobs(0)
    with pytest.raises(UserError, match=r"surface-distance.*pip install .*-e '\.\[eval\]'"):
        surface_distances(true, predicted, SPACING)


@pytest.mark.parametrize(
    ("organ", "mm", "source"),
    [
        ("Parotid_L", 2.85, "Nikolov et al. 2021"),
        ("parotid gland right", 2.85, "Nikolov et al. 2021"),
        ("BrainStem", 2.5, "Nikolov et al. 2021"),
        ("SpinalCord", 2.93, "Nikolov et al. 2021, unverified"),
        ("kidney_left", 3.0, "FLARE22"),
        ("inferior_vena_cava", 2.0, "FLARE22"),
        ("nodule", DEFAULT_MM, "default"),
    ],
)
def test_tolerances_are_found_by_the_name_of_the_organ(organ: str, mm: float, source: str) -> None:
    assert tolerance_of(organ) == Tolerance(mm, source)


def test_the_users_own_tolerance_is_taken_first() -> None:
    found = tolerance_of("liver", {"liver": 1.5})
    assert found == Tolerance(1.5, "set") and str(found) == "1.5 mm (set)"


def test_tolerances_are_read_from_settings() -> None:
    assert parse(["liver=2", "left=right=0.5"]) == {"liver": 2.0, "left=right": 0.5}


def test_a_tolerance_is_set_in_any_case_and_for_an_organ_alone() -> None:
    assert tolerance_of("liver", {"Liver": 1.5}) == Tolerance(1.5, "set")
    check_named({"Liver": 1.5}, ["liver", "spleen"])
    with pytest.raises(UserError, match="names '5', which is no organ .* liver, spleen"):
        check_named({"5": 1.5}, ["liver", "spleen"])


@pytest.mark.parametrize("word", ["liver", "=2", "liver=", "liver=-1", "liver=nan", "liver=2mm"])
def test_a_tolerance_of_another_form_is_an_error(word: str) -> None:
    with pytest.raises(UserError, match="write ORGAN=MM"):
        parse([word])
