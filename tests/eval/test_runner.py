"""A whole evaluation on small phantoms, its results file and its pictures."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from memory_store import MemoryStore
from torso_scans import PATCH, PREPROCESS, VIT, Row, segmentation, torso, torso_of

from tapct.base.exits import UserError
from tapct.config.plugins import Plugin, load
from tapct.data.index.build import build_manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.store import Store
from tapct.eval import cache, runner
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.models.baselines import NamedModel, RawPatches, with_baselines
from tapct.eval.pictures import drawing, volumes
from tapct.eval.results.json_file import from_json
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.types import HUContract, LabelMap

CT = Path(
    os.environ.get("TAPCT_TEST_CT", Path(__file__).resolve().parents[2] / "../shared/data/ct")
)


@pytest.fixture
def rows() -> list[Row]:
    return [Row(f"s{n}", f"p{n}", str(n)) for n in range(6)]


def evaluate(rows, out: Path, *, models=None, store=None, **settings):
    models = models or with_baselines(load("models", "vit").build(VIT), Plugin("vit", VIT), 0)
    config = runner.Config(**{"num_pictures": 0, "tasks": segmentation()} | settings)
    store = store or MemoryStore(rows, torso_of)
    return runner.evaluate(
        models, store.scans, store, config, contract=HUContract(), out=out, preprocess=PREPROCESS
    )


def test_results_hold_what_the_report_reads_and_pictures_exist(rows, tmp_path):
    steps = []
    models = with_baselines(load("models", "vit").build(VIT), Plugin("vit", VIT), 0)
    store = MemoryStore(rows, torso_of)
    results = runner.evaluate(
        models, store.scans, store, runner.Config(num_pictures=1, tasks=segmentation()),
        contract=HUContract(), out=tmp_path, preprocess=PREPROCESS,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == results.to_json()
    assert from_json(results.to_json()) == results
    assert list(tmp_path.glob(".*")) == []
    assert results.to_json()["schema"] == 4
    section = results.tasks["segmentation"]
    assert (section.num_train, section.num_test, section.skipped) == (4, 2, 0)
    assert list(section.results.breakdown.values) == ["liver", "lungs"]
    names = ["pretrained", "untrained", "untrained_layerscale1", "raw_hu", "position", "random_2x",
             "random_4x"]  # fmt: skip
    assert list(section.results.models) == list(section.headline.values) == names
    assert list(results.backbones) == names
    # features of six scans and seven models, then six scans through the task
    assert steps == [(n, 48) for n in range(1, 49)]
    split = results.split
    assert split.mode == "patients"
    assert not set(split.train) & set(split.test)
    for name, found in section.results.models.items():
        assert section.headline.values[name] == found["mean_dice"]
        assert (
            found["mean_dice"]
            == found["mean_dice_voxel"]
            == pytest.approx(np.mean(list(found["dice"].values())))
        )
        scores = [score for score in section.results.scans if score.model == name]
        assert {score.scan for score in scores} == set(split.test)
        assert all(
            0 <= value <= 1 and math.isfinite(value) for value in found["dice_patch"].values()
        )
    assert section.headline.values["raw_hu"] > 0.5  # organs of distinct HU are easy
    assert len(section.pictures) == len(results.pca) == 1
    for entry in (*section.pictures, *results.pca):
        assert entry.scan in split.test
        assert entry.caption
        picture = matplotlib.image.imread(tmp_path / entry.file)
        assert picture[..., :3].std() > 0.05
    (entry,) = results.volumes
    check_volume(volumes.read(tmp_path / entry.file), torso(int(entry.scan[1:])), names)


def check_volume(volume: volumes.ScanVolume, scan: LabelledScan, models: list[str]) -> None:
    """The volume of the report is the scan: small enough to be kept whole."""
    assert volume.step == (1, 1, 1) and volume.spacing_mm == scan.spacing_mm
    labels_ZYX, hu_ZYX = scan.label_map.labels_ZYX, scan.volume.hu_ZYX
    assert [layer.title for layer in volume.labels] == [
        "truth",
        *(m.replace("_", " ") for m in models),
    ]
    truth, *predicted = volume.labels
    by_name = {organ.name: organ for organ in volume.organs[0]}
    assert sorted(by_name) == ["liver", "lungs"]
    for name, value in (("liver", 2), ("lungs", 3)):
        found = truth.classes_ZYX == by_name[name].index
        np.testing.assert_array_equal(found, labels_ZYX == value)
    for hu in (-160, 0, 150):  # the order of grey values is that of HU
        level = volumes.to_levels(np.array(hu))
        assert volume.levels_ZYX[hu_ZYX < hu].max() <= level <= volume.levels_ZYX[hu_ZYX > hu].min()
    assert all(layer.classes_ZYX.shape == labels_ZYX.shape for layer in predicted)
    grid = PatchGrid.of_scan(labels_ZYX.shape, PREPROCESS, PATCH)
    own = volume.features[0]
    assert own.rgb_ZYXC.shape == (*grid.shape, 3)
    for axis in range(3):  # the place of a voxel in patches, as the grid itself computes it
        at = (np.arange(labels_ZYX.shape[axis]) + 0.5) * own.patches_per_voxel[axis] - 0.5
        centres = [grid.centre_mm(np.full(3, i), (1, 1, 1))[axis] for i in range(grid.shape[axis])]
        np.testing.assert_allclose(np.interp(centres, np.arange(len(at)), at), range(len(centres)))


def test_the_same_evaluation_twice_gives_the_same_numbers(rows, tmp_path):
    cheap = {"baselines": ("raw_hu",)}
    one, two = (evaluate(rows, tmp_path / name, seed=3, **cheap) for name in ("one", "two"))
    other = evaluate(rows, tmp_path / "other", seed=4, **cheap)
    assert replace(one, seconds=0) == replace(two, seconds=0)
    assert one.tasks != other.tasks


def test_test_labels_never_reach_the_decoder(rows, tmp_path, monkeypatch):
    test_ids: set[str] = set()

    def spoiled(row):
        scan = torso_of(row)
        if row.id in test_ids:
            labels = np.where(scan.labels.labels_ZYX == 2, 3, scan.labels.labels_ZYX).astype(
                np.uint16
            )
            scan = LabelledScan(
                scan.id,
                scan.source,
                LabelMap(labels, scan.labels.spacing_mm, names=scan.labels.names),
            )
        return scan

    predictions = []
    judge = load("eval.tasks", "segmentation").Segmentation.judge
    monkeypatch.setattr(
        "tapct.eval.tasks.segmentation.Segmentation.judge",
        lambda self, *args: (
            predictions.append(judge(self, *args).classes_ZYX) or judge(self, *args)
        ),
    )
    test_ids.update(evaluate(rows, tmp_path / "clean").split.test)
    clean, predictions[:] = list(predictions), []
    evaluate(rows, tmp_path / "spoiled", store=MemoryStore(rows, spoiled))
    for before, after in zip(clean, predictions, strict=True):
        np.testing.assert_array_equal(before, after)


def test_one_patient_is_called_a_fit(rows, tmp_path):
    results = evaluate([Row("s0", "p", "0")], tmp_path, num_blocks=3, block_gap=1)
    assert results.split.mode == "blocks"
    assert "not generalisation" in results.split.caveat


def test_every_setting_changes_the_results(rows, tmp_path):
    shared = cache.Config(str(tmp_path / "features"))  # the features are the same
    base = evaluate(rows, tmp_path / "base", cache=shared, baselines=())
    for number, change in enumerate(
        [
            {"test_share": 0.75}, {"max_scans": 3}, {"seed": 4},
            {"tasks": segmentation(resolution="patch")},
            {"tasks": segmentation(organs=("liver",))},
            {"tasks": segmentation(outside=("lungs",))},
            {"tasks": segmentation(body=("lungs",))},
            {"tasks": segmentation(max_tokens=60)},
            {"tasks": segmentation(l2=1.0)},
            {"tasks": segmentation(steps=1)},
        ]
    ):  # fmt: skip
        found = evaluate(rows, tmp_path / str(number), cache=shared, baselines=(), **change)
        changed = found.tasks["segmentation"]
        assert changed.results != base.tasks["segmentation"].results, change


@pytest.mark.parametrize("key", ["organs", "outside", "body"])
def test_a_setting_that_names_no_label_is_one_line_before_any_feature(
    rows, tmp_path, monkeypatch, key
):
    monkeypatch.setattr("tapct.eval.runner.Features", None)
    with pytest.raises(
        UserError,
        match=rf"eval.tasks.segmentation.{key} names '7', which is no label of the 6 label maps; "
        "they have 1 body, 2 liver, 3 lungs",
    ):
        evaluate(rows, tmp_path, tasks=segmentation(**{key: ("liver", "7")}))


def test_baselines_share_the_initial_weights_of_training():
    pretrained = load("models", "vit").build(VIT)
    pretrained.init_weights(7)
    models = with_baselines(pretrained, Plugin("vit", VIT), 7)
    named = {model.name: model.loaded() for model in models}
    first, again, scaled = (
        named[n].state_dict() for n in ("pretrained", "untrained", "untrained_layerscale1")
    )
    for key, value in first.items():
        assert torch.equal(value, again[key])
        if key.endswith(".gamma"):
            assert torch.equal(scaled[key], torch.ones_like(value))
        else:
            assert torch.equal(value, scaled[key])


def test_pca_colours_equal_numpys_svd():
    features = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    foreground = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    rows_ND = features.permute(1, 2, 3, 0).flatten(0, 2).double().numpy()
    inside = foreground.flatten().numpy()
    centred = rows_ND - rows_ND[inside].mean(0)
    loadings = np.linalg.svd(centred[inside], full_matrices=False)[2][:3]
    loadings *= np.sign(loadings[np.arange(3), np.abs(loadings).argmax(1)])[:, None]
    scores = centred @ loadings.T
    low, high = np.quantile(scores[inside], [0.01, 0.99], axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1).T.reshape(3, 2, 5, 5)
    np.testing.assert_allclose(
        drawing.pca_colours(features, foreground).numpy(), expected, atol=1e-5
    )


def test_share_of_a_mask_in_each_patch_equals_block_means():
    mask = np.random.default_rng(0).random((4, 8, 12)) > 0.5
    grid = PatchGrid((2, 4, 4), mask.shape, mask.shape)
    dense = DenseFeatures(torch.zeros(1, *grid.shape), torch.zeros(1), grid)
    expected = mask.reshape(2, 2, 2, 4, 3, 4).mean((1, 3, 5))
    np.testing.assert_allclose(drawing.patch_share(mask, dense).numpy(), expected, atol=1e-6)


def test_slices_with_most_organs_are_shown():
    classes = np.zeros((5, 6, 7), np.uint16)
    classes[1, 2] = 1
    classes[3, 4, :4] = 2
    classes[3, 4, 4:] = 3
    assert drawing.richest_slices(classes, [1, 2, 3]) == (3, 4)


def test_every_organ_has_its_own_colour():
    names = ["liver", "lungs", "lung_left", "lung_right", *(f"label {n}" for n in range(60))]
    chosen = drawing.colours(names)
    assert list(chosen) == names
    assert len(set(chosen.values())) == len(names)


@pytest.mark.slow
@pytest.mark.skipif(not CT.exists(), reason=f"no real scans at {CT}")
def test_61_organs_of_a_real_scan(tmp_path):
    for folder, name in (("images", "example_ct"), ("labels", "example_ct_seg62")):
        (tmp_path / folder).mkdir()
        shutil.copy(CT / "ts_body" / f"{name}.nii.gz", tmp_path / folder / "example_ct.nii.gz")
    built = build_manifest(
        tmp_path / "images", tmp_path / "m.parquet", labels=tmp_path / "labels",
        patient_regex=None, min_depth=1,
        workers=1, progress=None,
    )  # fmt: skip
    pack(built, tmp_path / "store")
    store = Store(tmp_path / "store")
    rows = store.scans
    models = [NamedModel("raw_hu", RawPatches((4, 8, 8)))]
    results = runner.evaluate(
        models, rows, store, runner.Config(), contract=HUContract(), out=tmp_path,
        preprocess=Preprocess((128, 128), (8, 64, 64), (8, 64, 64)),
    )  # fmt: skip
    assert results.split.mode == "blocks"
    section = results.tasks["segmentation"]
    assert len(section.results.breakdown.values) > 40
    assert 0.01 < section.headline.values["raw_hu"] < 1
