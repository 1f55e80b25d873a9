"""Nearest neighbours equal a loop over all pairs; retrieval equals scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tapct.base.exits import UserError
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.heads import neighbours
from tapct.eval.results import task_statistics
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.tasks import patch_knn
from tapct.types import LabelMap, Volume


def brute_force(query_QD, known_ND, labels, k, num_classes, temperature, forbidden=None):
    """Probabilities of the vote, one pair at a time."""
    rows = []
    for q, query in enumerate(query_QD):
        pairs = []
        for n, known in enumerate(known_ND):
            if forbidden is not None and forbidden[q][n]:
                continue
            cosine = float(query @ known / np.linalg.norm(query) / np.linalg.norm(known))
            pairs.append((cosine, labels[n]))
        votes = np.zeros(num_classes)
        for cosine, label in sorted(pairs, reverse=True)[:k]:
            votes[label] += math.exp(cosine / temperature)
        rows.append(votes / votes.sum())
    return np.array(rows)


@pytest.mark.parametrize("k", [1, 4, 500])
@pytest.mark.parametrize("with_forbidden", [False, True])
def test_the_vote_equals_brute_force(
    monkeypatch: pytest.MonkeyPatch, k: int, with_forbidden: bool
) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", 3)
    rng = np.random.default_rng(0)
    query_QD, known_ND = rng.normal(size=(7, 5)), rng.normal(size=(20, 5))
    labels = rng.integers(3, size=20)
    forbidden = rng.random((7, 20)) < 0.4 if with_forbidden else None
    unit_QD, unit_ND = (
        neighbours.unit(torch.from_numpy(one).float()) for one in (query_QD, known_ND)
    )
    blocked = None if forbidden is None else torch.from_numpy(forbidden)
    similarity_QK, number_QK = neighbours.nearest(unit_QD, unit_ND, k, blocked)
    voted = neighbours.vote(similarity_QK, torch.from_numpy(labels)[number_QK], k, 3, 0.07)
    expected = brute_force(query_QD, known_ND, labels, k, 3, 0.07, forbidden)
    assert voted.numpy() == pytest.approx(expected, abs=1e-5)


def test_nobody_votes_where_all_are_forbidden() -> None:
    unit = neighbours.unit(torch.ones(2, 3))
    similarity, number = neighbours.nearest(unit, unit, 2, torch.ones(2, 2, dtype=torch.bool))
    voted = neighbours.vote(similarity, torch.tensor([0, 1])[number], 2, 2, 0.07)
    assert (voted == 0.5).all()


def test_the_retrieval_equals_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(1)
    similarity_N, is_relevant_N = rng.random(30), rng.random(30) < 0.3
    order = np.argsort(-similarity_N)
    value = neighbours.average_precision(is_relevant_N[order])
    assert value == pytest.approx(average_precision_score(is_relevant_N, similarity_N))
    assert math.isnan(neighbours.average_precision(np.zeros(3, dtype=bool)))
    found = neighbours.precision_at(np.array([True, False, True, True]), (1, 2, 10))
    assert found == {1: 1.0, 2: 0.5, 10: 0.75}


# --- patches ---

GRID = PatchGrid((1, 2, 2), (2, 8, 8), (2, 8, 8))  # 2 x 4 x 4 patches
IN_PLAY_Z = np.ones(2, dtype=bool)


def scan_of(number: int, organ: str = "liver") -> LabelledScan:
    labels = np.ones(GRID.original, np.uint16)  # body
    labels[0, :4, :6] = 2
    labels[1, 4:, 2:] = 3
    hu_ZYX, spacing_mm = np.zeros(GRID.original, np.int16), (1.0, 1.0, 1.0)
    names = ((1, "body"), (2, organ), (3, "spleen"))
    label_map = LabelMap(labels, spacing_mm, names=names)
    return LabelledScan(f"s{number}", Volume(hu_ZYX, spacing_mm), label_map, f"p{number}")


def features_of(scan: LabelledScan) -> DenseFeatures:
    rng = np.random.default_rng(int(scan.id[1:]))
    label_N = scan.label_map.labels_ZYX[:, ::2, ::2].reshape(-1)
    features_DN = rng.normal(0, 0.8, size=(4, 32)) + np.eye(4)[label_N].T
    features_DZYX = torch.from_numpy(features_DN).float().unflatten(1, GRID.shape)
    return DenseFeatures(features_DZYX, torch.zeros(4), GRID)


def test_organs_of_patches_equal_brute_force() -> None:
    task = patch_knn.build(patch_knn.Config(k=(3, 200)), seed=0)
    task.begin(3)
    known, labels = [], []
    for number in range(3):
        scan = scan_of(number)
        dense = features_of(scan)
        task.learn("m", dense, task.truth(scan, GRID, IN_PLAY_Z))
        known.append(dense.tokens_ND().numpy())
        labels.append(scan.label_map.labels_ZYX[:, ::2, ::2].reshape(-1) - 1)
    task.fit()
    assert task.classes == ("body", "liver", "spleen")
    known_ND, label_N = np.concatenate(known), np.concatenate(labels)
    hits: dict[int, list[list[bool]]] = {k: [[], [], []] for k in (3, 200)}
    for number in (3, 4):
        scan = scan_of(number)
        task.judge("m", features_of(scan), task.truth(scan, GRID, IN_PLAY_Z))
        truth_N = scan.label_map.labels_ZYX[:, ::2, ::2].reshape(-1) - 1
        for k in hits:
            voted = brute_force(
                features_of(scan).tokens_ND().numpy(), known_ND, label_N, k, 3, 0.07
            )
            for own, truth in zip(voted.argmax(1), truth_N, strict=True):
                hits[k][truth].append(own == truth)
    entry = task.results().models["m"]
    for k, of_class in hits.items():
        expected = np.mean([np.mean(one) for one in of_class])
        assert entry["by_k"][str(k)] == pytest.approx(expected)
    best = max(entry["validation_by_k"].values())
    assert entry["validation_by_k"][str(entry["k"])] == best
    assert (entry["num_queries"], entry["num_known"]) == (64, 96)


def test_a_model_with_smaller_patches_may_see_organs_that_others_do_not() -> None:
    labels = np.ones(GRID.original, np.uint16)
    labels[:, :4, :4] = 2
    labels[1, 7, 7] = 3  # one voxel: most of a patch of 1x1, a part of one of 2x2
    names = ((1, "body"), (2, "liver"), (3, "spleen"))
    hu_ZYX, spacing_mm = np.zeros(GRID.original, np.int16), (1.0, 1.0, 1.0)
    scan = LabelledScan(
        "s0", Volume(hu_ZYX, spacing_mm), LabelMap(labels, spacing_mm, names=names), "p0"
    )
    task = patch_knn.build(patch_knn.Config(), seed=0)
    for model, grid in (("coarse", GRID), ("fine", PatchGrid((1, 1, 1), (2, 8, 8), (2, 8, 8)))):
        features_DZYX = torch.randn(4, *grid.shape, generator=torch.Generator().manual_seed(0))
        dense = DenseFeatures(features_DZYX, torch.zeros(4), grid)
        task.learn(model, dense, task.truth(scan, grid, IN_PLAY_Z))
    task.fit()
    assert task.classes == ("body", "liver", "spleen")


def test_models_of_different_patches_are_compared_on_the_same_classes() -> None:
    """The spleen is most of a fine patch, but of no coarse one: only one model can be asked."""
    labels = np.ones(GRID.original, np.uint16)
    labels[:, :4, :4] = 2
    labels[1, 7, 7] = 3
    names = ((1, "body"), (2, "liver"), (3, "spleen"), (4, "heart"))
    hu_ZYX, spacing_mm = np.zeros(GRID.original, np.int16), (1.0, 1.0, 1.0)
    volume = Volume(hu_ZYX, spacing_mm)
    scans = [
        LabelledScan(f"s{number}", volume, LabelMap(labels, spacing_mm, names=names), f"p{number}")
        for number in range(2)
    ]
    task = patch_knn.build(patch_knn.Config(k=(1,)), seed=0)
    grids = {"coarse": GRID, "fine": PatchGrid((1, 1, 1), (2, 8, 8), (2, 8, 8))}

    def dense_of(grid: PatchGrid) -> DenseFeatures:
        generator = torch.Generator().manual_seed(len(grid.shape) + grid.shape[1])
        return DenseFeatures(torch.randn(4, *grid.shape, generator=generator), torch.zeros(4), grid)

    for model, grid in grids.items():
        task.learn(model, dense_of(grid), task.truth(scans[0], grid, IN_PLAY_Z))
    task.fit()
    for model, grid in grids.items():
        task.judge(model, dense_of(grid), task.truth(scans[1], grid, IN_PLAY_Z))
    results = task.results()
    assert set(results.models["coarse"]["recall"]) == {"body", "liver"}
    assert set(results.models["fine"]["recall"]) == {"body", "liver", "spleen"}
    for entry in results.models.values():
        expected = np.mean([entry["recall"]["body"], entry["recall"]["liver"]])
        assert entry["balanced_accuracy"] == entry["by_k"]["1"] == pytest.approx(expected)
    assert all(set(score.parts) == {"body", "liver"} for score in results.scans)
    headline = task.headline()
    assert headline.mean_of == (
        "mean of the recall of 2 classes: body, liver; left out: spleen (not in the test patches "
        "of every model)"
    )
    # the rows of scans give the headline, so it has intervals
    patient_of = {scan.id: scan.patient for scan in scans}
    found = task_statistics.of_task(results, headline, {}, patient_of, seed=0)
    assert found.why_none == ""


def test_the_line_of_the_classes_names_every_organ_that_is_left_out() -> None:
    task = patch_knn.build(patch_knn.Config(k=(1,)), seed=0)
    labels = np.ones(GRID.original, np.uint16)
    labels[:, :4, :4] = 2
    labels[1, 7, 7] = 3  # a part of a patch
    labels[1, 4:6, 4:6] = 4
    labels[0, 4:6, 4:6] = 6
    hu_ZYX, spacing_mm = np.zeros(GRID.original, np.int16), (1.0, 1.0, 1.0)
    names = ((1, "body"), (2, "liver"), (3, "spleen"), (4, "heart"), (5, "aorta"), (6, "lung"))
    one = LabelledScan(
        "s0", Volume(hu_ZYX, spacing_mm), LabelMap(labels, spacing_mm, names=names), "p0"
    )
    labels_of_test = np.where(labels == 4, 1, labels)
    labels_of_test[0, 6, 6] = 5
    labels_of_test[0, 4:6, 4:6] = 1
    labels_of_test[0, 4, 4] = 6  # a part of a patch
    label_map = LabelMap(labels_of_test, spacing_mm, names=names)
    other = LabelledScan("s1", Volume(hu_ZYX, spacing_mm), label_map, "p1")
    dense = features_of(scan_of(0))
    task.learn("m", dense, task.truth(one, GRID, IN_PLAY_Z))
    task.fit()
    task.judge("m", dense, task.truth(other, GRID, IN_PLAY_Z))
    assert task.headline().mean_of == (
        "mean of the recall of 2 classes: body, liver; left out: aorta (in no training scan), "
        "heart (in no test scan), lung (no test patch is mostly of it), spleen (no training patch "
        "is mostly of it)"
    )


def test_organs_that_no_training_scan_has_are_not_counted() -> None:
    task = patch_knn.build(patch_knn.Config(), seed=0)
    task.learn("m", features_of(scan_of(0)), task.truth(scan_of(0), GRID, IN_PLAY_Z))
    task.fit()
    scan = scan_of(1, organ="kidney")
    task.judge("m", features_of(scan), task.truth(scan, GRID, IN_PLAY_Z))
    assert set(task.results().models["m"]["recall"]) == {"body", "spleen"}
    only_body = patch_knn.build(patch_knn.Config(organs=("heart",)), seed=0)
    only_body.learn("m", features_of(scan), only_body.truth(scan, GRID, IN_PLAY_Z))
    with pytest.raises(UserError, match="no training patch is mostly of an organ .they are body"):
        only_body.fit()
