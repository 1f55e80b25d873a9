"""The linear decoder, its truth on the patch grid, and Dice, against slow loops and scipy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, optimize, special

from tapct.base.exits import UserError
from tapct.eval.features.dense import BlockFeatures, DenseFeatures, PatchGrid, WindowVectors
from tapct.eval.heads.decoder import SoftDice, fit_decoder
from tapct.eval.heads.minibatch_decoder import fit_head
from tapct.eval.labels.truth import OUTSIDE, patch_truth
from tapct.eval.organs.dice import dice_from_confusion
from tapct.eval.organs.label_fractions import Draw, LabelFractions, patients_of_draw
from tapct.eval.results.old_formats import curve_of
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.scores import OWN_MODEL
from tapct.eval.tasks.segmentation import Config, build
from tapct.types import IGNORE_LABEL, LabelMap, Volume

SPACING = (2.0, 1.0, 1.0)


def labelled(labels_ZYX, hu_ZYX=None, names=(), scan_id="a") -> LabelledScan:
    labels_ZYX = np.asarray(labels_ZYX, dtype=np.uint16)
    hu_ZYX = np.zeros(labels_ZYX.shape, np.int16) if hu_ZYX is None else hu_ZYX
    return LabelledScan(
        scan_id, Volume(hu_ZYX, SPACING), LabelMap(labels_ZYX, SPACING, names=tuple(names))
    )


def everywhere(grid: PatchGrid) -> np.ndarray:
    return np.ones(grid.shape[0], dtype=bool)


@pytest.mark.parametrize(
    ("patch", "resized", "original"),
    [
        ((2, 4, 4), (6, 16, 16), (6, 16, 16)),
        ((4, 8, 8), (10, 24, 24), (10, 50, 47)),
        ((1, 2, 2), (3, 30, 30), (3, 9, 11)),
    ],
)
def test_shares_equal_counting_voxels_one_by_one(patch, resized, original):
    labels = np.random.default_rng(0).choice([0, 3, 7, 500], size=original)
    grid = PatchGrid(patch, resized, original)
    truth = patch_truth(labelled(labels), grid, body_labelled=True, in_play_Z=everywhere(grid))
    split = [-(-r // o) for r, o in zip(resized, original, strict=True)]
    counts = np.zeros((*grid.shape, 4))
    for fine in itertools.product(*(range(o * s) for o, s in zip(original, split, strict=True))):
        voxel = tuple(f // s for f, s in zip(fine, split, strict=True))
        cell = tuple(
            int((f + 0.5) / s * r / o / p)
            for f, s, r, o, p in zip(fine, split, resized, original, patch, strict=True)
        )
        counts[cell][[0, 3, 7, 500].index(labels[voxel])] += 1
    assert truth.values == (0, 3, 7, 500)
    expected = counts.reshape(-1, 4)
    assert expected.sum(1).min() > 0
    np.testing.assert_allclose(
        truth.shares_NV, expected / expected.sum(1, keepdims=True), atol=1e-6
    )


def test_air_around_the_patient_is_outside_and_air_in_the_lung_is_not():
    hu = np.full((2, 32, 32), -1000, dtype=np.int16)
    hu[:, 6:26, 6:26] = 40
    hu[:, 12:20, 12:20] = -950  # emphysema: as dark as air, enclosed
    grid = PatchGrid((2, 2, 2), (2, 32, 32), (2, 32, 32))
    truth = patch_truth(
        labelled(np.zeros_like(hu), hu), grid, body_labelled=False, in_play_Z=everywhere(grid)
    )
    connected, _ = ndimage.label(hu[0] < -900)
    expected = (connected == connected[0, 0]).reshape(16, 2, 16, 2).mean((1, 3))
    assert truth.values == (OUTSIDE, 0)
    np.testing.assert_allclose(truth.shares_NV[:, 0].reshape(16, 16), expected, atol=1e-6)
    np.testing.assert_allclose(truth.shares_NV.sum(1), 1, atol=1e-6)


def test_outside_is_not_derived_where_the_body_has_a_label():
    hu = np.full((2, 8, 8), -1000, dtype=np.int16)
    labels = np.zeros_like(hu)
    labels[:, 4:] = 1
    labels[:, 6:, 6:] = 2
    task = build(Config(), seed=0)
    grid = PatchGrid((2, 2, 2), (2, 8, 8), (2, 8, 8))
    truth = task.truth(labelled(labels, hu, [(1, "body"), (2, "liver")]), grid, everywhere(grid))
    assert truth.values == (0, 1, 2)
    task.learn("m", DenseFeatures(torch.randn(3, 1, 4, 4), torch.zeros(3), grid), truth)
    task.fit()
    assert task.classes == ("outside", "body", "liver")
    np.testing.assert_array_equal(task.class_labels(truth), labels)


def test_sampling_keeps_rare_labels_and_its_weights_count_every_patch():
    labels = np.zeros((4, 40, 40), dtype=int)
    labels[0, :2, :2] = 5
    labels[1:3] = 2
    grid = PatchGrid((1, 1, 1), labels.shape, labels.shape)
    truth = patch_truth(labelled(labels), grid, body_labelled=True, in_play_Z=everywhere(grid))
    index, weight = truth.sample(100, seed=1)
    chosen = labels.reshape(-1)[index]
    assert len(index) <= 100
    assert len(set(index.tolist())) == len(index)
    assert (chosen == 5).sum() == 4
    for value in (0, 2, 5):
        assert weight[torch.from_numpy(chosen == value)].sum() == pytest.approx(
            (labels == value).sum(), rel=1e-5
        )
    again, _ = truth.sample(100, seed=1)
    other, _ = truth.sample(100, seed=2)
    assert torch.equal(index, again)
    assert not torch.equal(index, other)


def test_only_slices_in_play_are_sampled():
    labels = np.random.default_rng(0).integers(0, 3, (4, 8, 8))
    grid = PatchGrid((1, 1, 1), labels.shape, labels.shape)
    in_play = np.array([True, False, False, True])
    index, weight = patch_truth(
        labelled(labels), grid, body_labelled=True, in_play_Z=in_play
    ).sample(10**6, seed=0)
    assert set((index // 64).tolist()) == {0, 3}
    assert torch.equal(weight, torch.ones(128))


def test_voxels_to_ignore_count_in_no_share_and_in_no_sample():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 3], size=(4, 16, 16))
    labels[rng.random(labels.shape) < 0.3] = IGNORE_LABEL
    labels[:2, :4, :4] = IGNORE_LABEL  # the first patch, all of it
    hu = np.where(rng.random(labels.shape) < 0.9, 40, -1000).astype(np.int16)
    grid = PatchGrid((2, 4, 4), labels.shape, labels.shape)
    for body_labelled, values in ((True, (0, 3)), (False, (OUTSIDE, 0, 3))):
        truth = patch_truth(
            labelled(labels, hu), grid, body_labelled=body_labelled, in_play_Z=everywhere(grid)
        )
        assert truth.values == values
        cells = labels.reshape(2, 2, 4, 4, 4, 4).transpose(0, 2, 4, 1, 3, 5).reshape(32, -1)
        for number, cell in enumerate(cells):
            known = cell[cell != IGNORE_LABEL]
            share = (known == 3).mean() if len(known) else 0
            assert truth.shares_NV[number, -1] == pytest.approx(share, abs=1e-6)
            assert truth.shares_NV[number].sum() == pytest.approx(float(len(known) > 0), abs=1e-6)
        index, weight = truth.sample(10**6, seed=0)
        assert index.tolist() == list(range(1, 32)) and weight.sum() == 31


def test_air_spreads_through_voxels_to_ignore():
    hu = np.full((2, 32, 32), -1000, dtype=np.int16)
    hu[:, 8:24, 8:24] = 40
    labels = np.zeros(hu.shape, int)
    labels[:, :4], labels[:, -4:], labels[:, :, :4] = (IGNORE_LABEL,) * 3
    labels[:, :, -4:] = IGNORE_LABEL  # the whole border
    grid = PatchGrid((2, 2, 2), hu.shape, hu.shape)
    truth = patch_truth(labelled(labels, hu), grid, body_labelled=False, in_play_Z=everywhere(grid))
    expected = (hu[0] < -900) & (labels[0] == 0)
    np.testing.assert_array_equal(
        truth.shares_NV[:, 0].reshape(16, 16), expected.reshape(16, 2, 16, 2).mean((1, 3))
    )


@pytest.mark.parametrize("value", [0, 1, 2])
def test_dice_is_the_same_whatever_the_ignored_voxels_would_be(value):
    """A quarter of the test scan is ignored: Dice is that of the other three."""
    task = build(Config(), seed=0)
    scan, grid, dense = scene(1, "train")
    task.learn("m", dense, task.truth(scan, grid, everywhere(grid)))
    task.fit()
    scan, grid, dense = scene(3, "test")
    labels = scan.labels.labels_ZYX.copy()
    labels[:6, :16] = IGNORE_LABEL
    prediction = task.judge(
        "m", dense, task.truth(labelled(labels, scan_id="cut"), grid, everywhere(grid))
    ).classes_ZYX
    dice = {score.scan: score.parts for score in task.results().scans}["cut"]
    counted = labels != IGNORE_LABEL
    for organ in (1, 2):
        truth, found = labels[counted] == organ, prediction[counted] == organ + 1
        assert dice[f"label {organ}"] == pytest.approx(
            2 * (truth & found).sum() / (truth.sum() + found.sum())
        )
    changed = dense.features_DZYX.clone()
    changed[:, :3, :4] = torch.from_numpy(np.random.default_rng(9).normal(size=(600, 5)))[
        value
    ].float()[:, None, None, None]
    other = DenseFeatures(changed, dense.cls_D, grid)
    truth = task.truth(labelled(labels, scan_id="other"), grid, everywhere(grid))
    task.judge("m", other, truth)
    scores = {score.scan: score.parts for score in task.results().scans}
    patch = {scan: task._dice["patch", "m"][scan] for scan in ("cut", "other")}
    assert patch["other"] == patch["cut"]
    near_border = {organ: abs(scores["other"][organ] - dice[organ]) for organ in dice}
    assert max(near_border.values()) < 0.05  # logits are interpolated across the border


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_decoder_reaches_the_optimum_that_scipy_finds(scale):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) * scale + 5 * scale
    target = rng.dirichlet([0.3, 0.3, 0.3], size=300) * rng.uniform(0.5, 3, (300, 1)) * [1, 1, 0.1]
    l2 = 1e-2
    balanced = target / target.sum(0) / 3
    share = balanced.sum(1)
    mean = share @ x
    std = np.sqrt(share @ (x - mean) ** 2)

    def objective(flat):
        weight, bias = flat[:18].reshape(6, 3), flat[18:]
        log_p = special.log_softmax((x - mean) / std @ weight + bias, axis=1)
        return -(balanced * log_p).sum() + l2 / 2 * (weight**2).sum()

    best = optimize.minimize(
        objective, np.zeros(21), method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15}
    )
    expected = (x - mean) / std @ best.x[:18].reshape(6, 3) + best.x[18:]
    decoder = fit_decoder(
        torch.from_numpy(x).float(), torch.from_numpy(target).float(), l2=l2, steps=100
    )
    got = (torch.from_numpy(x).float() @ decoder.weight_DC + decoder.bias_C).numpy()
    np.testing.assert_allclose(special.softmax(got, 1), special.softmax(expected, 1), atol=2e-3)


def test_decoder_does_not_care_for_the_scale_of_features_nor_for_how_common_a_class_is():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator)
    target = torch.nn.functional.one_hot(
        (x[:, 0] + 0.3 * torch.randn(400, generator=generator) > 0).long(), 2
    ).float()
    one = fit_decoder(x, target, l2=1e-3, steps=60)
    scaled = fit_decoder(x * 50 - 7, target * torch.tensor([1.0, 20.0]), l2=1e-3, steps=60)
    first = (x @ one.weight_DC + one.bias_C).softmax(1)
    torch.testing.assert_close(
        first, ((x * 50 - 7) @ scaled.weight_DC + scaled.bias_C).softmax(1), atol=2e-3, rtol=0
    )


def test_a_constant_channel_and_an_absent_class_do_no_harm():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 4.0
    target = torch.zeros(50, 3)
    target[torch.arange(50), (x[:, 0] > 0).long() * 2] = 1
    decoder = fit_decoder(x, target, l2=1e-3, steps=40)
    logits = x @ decoder.weight_DC + decoder.bias_C
    assert torch.isfinite(logits).all()
    assert ((logits.argmax(1) == 2) == (x[:, 0] > 0)).float().mean() > 0.95


def test_dice_equals_scipys_dissimilarity():
    from scipy.spatial.distance import dice as dissimilarity

    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 4, 500), rng.integers(0, 4, 500)
    confusion = np.zeros((4, 4))
    for t, p in zip(truth, prediction, strict=True):
        confusion[t, p] += 1
    for k in range(4):
        assert dice_from_confusion(confusion, k) == pytest.approx(
            1 - dissimilarity(truth == k, prediction == k)
        )
    assert np.isnan(dice_from_confusion(np.zeros((2, 2)), 0))


def scene(
    seed: int, scan_id: str, values=(0, 1, 2), names=()
) -> tuple[LabelledScan, PatchGrid, DenseFeatures]:
    """A scan of blocks of organs, and features that nearly distinguish them."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(values, size=(6, 8, 8), p=None)
    labels = coarse.repeat(2, 0).repeat(4, 1).repeat(4, 2)
    hu = np.zeros(labels.shape, np.int16)
    grid = PatchGrid((2, 4, 4), labels.shape, labels.shape)
    centres = np.random.default_rng(9).normal(size=(600, 5))
    features = centres[coarse] + 0.45 * rng.normal(size=(6, 8, 8, 5))
    dense = DenseFeatures(
        torch.from_numpy(features).float().permute(3, 0, 1, 2), torch.zeros(5), grid
    )
    return labelled(labels, hu, names, scan_id), grid, dense


@pytest.mark.parametrize("resolution", ["patch", "voxel"])
def test_dice_of_a_test_scan_equals_a_slow_count(resolution):
    task = build(Config(resolution=resolution), seed=0)
    for number in (1, 2):
        scan, grid, dense = scene(number, f"train{number}")
        task.learn("m", dense, task.truth(scan, grid, everywhere(grid)))
    task.fit()
    assert task.organs == ("label 1", "label 2")
    scan, grid, dense = scene(3, "test")
    in_play = np.array([True, True, False, True, True, True])
    truth = task.truth(scan, grid, in_play)
    prediction = task.judge("m", dense, truth).classes_ZYX
    results = task.results()
    logits_NC = task._decoders["m"].decoder.logits_NC(dense.tokens_ND())
    logits = logits_NC.T.unflatten(1, grid.shape)
    np.testing.assert_array_equal(prediction, grid.to_voxels(logits).argmax(0).numpy())
    labels = scan.labels.labels_ZYX
    voxels = [
        (int(labels[at]), int(prediction[at]))
        for at in itertools.product(*map(range, labels.shape))
        if in_play[at[0] // 2]
    ]
    patches = [
        (int(labels[2 * z, 4 * y, 4 * x]), int(logits[:, z, y, x].argmax()))
        for z, y, x in itertools.product(range(6), range(8), range(8))
        if in_play[z]
    ]
    for name, pairs in (("voxel", voxels), ("patch", patches)):
        for organ in (1, 2):
            hit = sum(t == organ and p == organ + 1 for t, p in pairs)
            size = sum(t == organ for t, _ in pairs) + sum(p == organ + 1 for _, p in pairs)
            assert results.models["m"][f"dice_{name}"][f"label {organ}"] == pytest.approx(
                2 * hit / size
            )
    found = results.models["m"]
    assert found["mean_dice"] == found[f"mean_dice_{resolution}"]
    assert found["mean_dice"] == pytest.approx(np.mean([*found["dice"].values()]))
    assert [(score.scan, score.parts) for score in results.scans] == [("test", found["dice"])]
    assert results.scans[0].value == pytest.approx(found["mean_dice"])
    assert found["mean_dice_patch"] > 0.8
    headline = task.headline()
    assert headline.values == {"m": found["mean_dice"]}
    assert (headline.metric, headline.direction) == ("mean Dice", "higher")
    assert f"at {resolution} resolution" in headline.meaning
    assert results.breakdown is not None
    assert results.breakdown.values == {organ: {"m": dice} for organ, dice in found["dice"].items()}


def test_mean_dice_is_over_scans_that_have_the_organ_then_over_organs():
    task = build(Config(), seed=0)
    scan, grid, dense = scene(1, "train")
    task.learn("m", dense, task.truth(scan, grid, everywhere(grid)))
    task.fit()
    for number, values in ((2, (0, 1, 2)), (3, (0, 1))):
        scan, grid, dense = scene(number, f"test{number}", values)
        task.judge("m", dense, task.truth(scan, grid, everywhere(grid)))
    found = task.results().models["m"]
    per_scan = {score.scan: score.parts for score in task.results().scans}
    assert set(per_scan["test3"]) == {"label 1"}
    first = np.mean([per_scan[name]["label 1"] for name in ("test2", "test3")])
    second = per_scan["test2"]["label 2"]
    assert found["dice"] == pytest.approx({"label 1": first, "label 2": second})
    assert found["mean_dice"] == pytest.approx((first + second) / 2)


def test_classes_follow_names_where_label_values_differ_between_scans():
    task = build(Config(), seed=0)
    for number, names in (
        (1, [(1, "liver"), (2, "spleen")]),
        (2, [(1, "spleen"), (2, "liver"), (3, "table")]),
    ):
        scan, grid, dense = scene(
            number, f"s{number}", (0, 1, 2) if number == 1 else (0, 1, 2, 3), names
        )
        task.learn("m", dense, task.truth(scan, grid, everywhere(grid)))
    task.fit()
    assert task.classes == ("outside", "body", "liver", "spleen")
    scan, grid, _ = scene(
        3, "s3", (0, 1, 2, 3, 500), [(1, "spleen"), (2, "liver"), (3, "table"), (500, "never seen")]
    )
    classes = task.class_labels(task.truth(scan, grid, everywhere(grid)))
    for value, index in ((0, 1), (1, 3), (2, 2), (3, 0), (500, 1)):
        assert set(classes[scan.labels.labels_ZYX == value]) == {index}


def test_a_label_outside_the_slices_in_play_is_no_class():
    task = build(Config(), seed=0)
    labels = np.zeros((4, 8, 8), int)
    labels[:2, :4], labels[2:, 4:] = 1, 2
    grid = PatchGrid((2, 4, 4), labels.shape, labels.shape)
    dense = DenseFeatures(torch.randn(3, *grid.shape), torch.zeros(3), grid)
    task.learn("m", dense, task.truth(labelled(labels), grid, np.array([True, False])))
    task.fit()
    assert task.organs == ("label 1",)
    task.judge("m", dense, task.truth(labelled(labels, scan_id="b"), grid, np.array([False, True])))
    with pytest.raises(
        UserError, match=r"none of the organs.*\(label 1\) occurs in the test scans"
    ):
        task.results()


def test_organs_can_be_chosen_by_name_or_value():
    for organs, expected in (
        (("spleen",), ("spleen",)),
        (("1",), ("liver",)),
        ((), ("liver", "spleen")),
    ):
        task = build(Config(organs=organs), seed=0)
        scan, grid, dense = scene(1, "s", names=[(1, "liver"), (2, "spleen")])
        task.learn("m", dense, task.truth(scan, grid, everywhere(grid)))
        task.fit()
        assert task.organs == expected
    task = build(Config(organs=("pancreas",)), seed=0)
    task.learn("m", dense, task.truth(scan, grid, everywhere(grid)))
    with pytest.raises(
        UserError, match=r"no organ label.*eval.tasks.segmentation.organs, which is \[pancreas\]"
    ):
        task.fit()


def test_every_model_is_trained_on_the_same_patches():
    task = build(Config(max_tokens=60), seed=0)
    scan, grid, dense = scene(1, "s")
    truth = task.truth(scan, grid, everywhere(grid))
    task.learn("one", dense, truth)
    task.learn("two", DenseFeatures(dense.features_DZYX * 2, dense.cls_D, grid), truth)
    one, two = (task._kept[name][0].features_KD for name in ("one", "two"))
    assert len(one) <= 60
    torch.testing.assert_close(one * 2, two)


def evaluated(config: Config, names, values=(0, 1, 2, 3), tested=None, model="m"):
    """A task after one training and one test scan with the same labels."""
    task = build(config, seed=0)
    scan, grid, dense = scene(1, "train", values, names)
    task.learn(model, dense, task.truth(scan, grid, everywhere(grid)))
    task.fit()
    scan, grid, dense = scene(2, "test", tested or values, names)
    task.judge(model, dense, task.truth(scan, grid, everywhere(grid)))
    return task


def test_a_network_that_finds_no_organ_gets_one_line_of_advice(monkeypatch, capsys) -> None:
    for found, lines in (({"liver": 0.004}, 1), ({"liver": 0.2}, 0)):
        task = evaluated(Config(), [(3, "liver")], model="pretrained")
        monkeypatch.setattr(task, "_mean_by_organ", lambda _, found=found: found)
        task.results()
        task.headline()
        assert capsys.readouterr().err.count("raise eval.preprocess.size_yx") == lines


@pytest.mark.parametrize(
    ("config", "names", "organs", "words"),
    [
        (
            Config(),
            [(1, "Body"), (2, "Couch"), (3, "liver")],
            ["liver"],
            "mean of 1 organ: liver; left out: Body, Couch",
        ),
        (
            Config(body=("1",), outside=("2",)),
            (),
            ["label 3"],
            "mean of 1 organ: label 3; left out: label 1 (set as body by its number; it has no "
            "name), label 2 (set as outside by its number; it has no name); a label without a name "
            "may be the body or the table: see eval.tasks.segmentation.body and outside",
        ),
        (
            Config(body=("1",)),
            [(1, "torso"), (2, "spleen"), (3, "liver")],
            ["spleen", "liver"],
            "mean of 2 organs: spleen, liver; left out: torso",
        ),
        (
            Config(organs=("SPLEEN",)),
            [(1, "body"), (2, "spleen"), (3, "liver")],
            ["spleen"],
            "mean of 1 organ: spleen; left out: body, liver",
        ),
    ],
)
def test_the_mean_leaves_out_body_and_table_and_lists_its_organs(config, names, organs, words):
    task = evaluated(config, names)
    dice = task.results().models["m"]["dice"]
    assert list(dice) == organs
    assert task.headline().mean_of == words
    assert task.headline().values["m"] == pytest.approx(np.mean(list(dice.values())))


def test_a_body_by_number_makes_label_0_the_air_outside():
    scan, grid, _ = scene(1, "s", (0, 1, 2))
    by_number = build(Config(body=("1",)), seed=0).truth(scan, grid, everywhere(grid))
    assert OUTSIDE not in by_number.values


def test_organs_that_one_side_lacks_are_listed_as_left_out():
    names = [(1, "liver"), (2, "spleen"), (3, "aorta")]
    line = evaluated(Config(), names, (0, 1, 2), (0, 1, 3)).headline().mean_of
    assert line == (
        "mean of 1 organ: liver; left out: spleen (in no test scan), aorta (in no training scan)"
    )


def test_settings_that_must_name_a_label_are_those_that_are_not_defaults():
    config = Config(body=("body", "torso"), organs=("1",), tolerances=("liver=2",))
    named = build(config, seed=0).named_labels()
    assert named == {
        "organs": ("1",),
        "outside": (),
        "body": ("torso",),
        "tolerances": ("liver",),
    }


def test_the_dice_term_and_its_derivative_equal_autograd():
    torch.manual_seed(0)
    target_KC = torch.rand(50, 4) * torch.tensor([10.0, 1.0, 1.0, 0.0])
    logits_CK = torch.randn(4, 50, requires_grad=True)
    p_CK = logits_CK.softmax(0)
    dice = [
        2
        * (target_KC[:, c] * p_CK[c]).sum()
        / ((target_KC.sum(1) * p_CK[c]).sum() + target_KC[:, c].sum())
        for c in (1, 2)
    ]
    expected = 3 * (1 - sum(dice) / 2)
    expected.backward()
    error_CK = torch.zeros(4, 50)
    value = SoftDice(target_KC, [1, 2], 3.0).add(p_CK.detach(), error_CK)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(error_CK, logits_CK.grad, atol=1e-7, rtol=1e-4)


def test_the_soft_dice_finds_a_small_organ_that_equal_weights_drown():
    rng = np.random.default_rng(0)
    organ = torch.from_numpy(rng.random(20000) < 0.01)
    x = torch.from_numpy(rng.normal(size=(20000, 3))).float()
    x[:, 0] += 2.5 * organ
    target = torch.stack([~organ, organ], 1).float()

    def dice(**settings) -> float:
        decoder = fit_decoder(x, target, l2=1e-6, steps=100, **settings)
        found = decoder.logits_NC(x).argmax(1) == 1
        return 2 * float((found & organ).sum()) / float(found.sum() + organ.sum())

    # the best threshold on the one channel that separates the organ
    thresholds = np.linspace(0, 5, 200)
    best = max(
        2 * float(((x[:, 0] > t) & organ).sum()) / float((x[:, 0] > t).sum() + organ.sum())
        for t in thresholds
    )
    balanced = dice(class_power=1.0)
    ours = dice(class_power=0.5, dice_weight=1.0, dice_classes=[1])
    assert balanced < 0.5 * best
    assert ours > 0.9 * best


@pytest.mark.parametrize("head", ["bn_linear", "mlp"])
def test_a_head_finds_organs_and_takes_the_better_learning_rate(head):
    task = build(Config(head=head, lr=(1e-12, 1e-2), steps=20, hidden=16), seed=0)
    for number in range(1, 6):
        scan, grid, dense = scene(number, f"train{number}")
        task.learn("m", dense, task.truth(scan, grid, everywhere(grid)))
    task.fit()
    scan, grid, dense = scene(9, "test")
    task.judge("m", dense, task.truth(scan, grid, everywhere(grid)))
    found = task.results().models["m"]
    assert found["lr"] == 1e-2
    assert found["mean_dice_patch"] > 0.8


def test_a_label_fraction_fits_the_decoder_to_all_scans_of_the_drawn_patients():
    """Four patients, of whom the first two have two scans."""
    scenes = []
    for number, patient in enumerate(("p1", "p1", "p2", "p2", "p3", "p4"), 1):
        scan, grid, dense = scene(number, f"train{number}")
        scenes.append((replace(scan, patient=patient), grid, dense))
    whole = build(Config(fractions=(1, 3), draws=3, steps=20), seed=0)
    for scan, grid, dense in scenes:
        whole.learn("m", dense, whole.truth(scan, grid, everywhere(grid)))
    whole.fit()
    scan, grid, dense = scene(9, "test")
    whole.judge("m", dense, whole.truth(scan, grid, everywhere(grid)))
    results = whole.results().models["m"]
    unit, curve = curve_of(results)
    assert unit == "patient" and curve is results["dice_by_num_patients"]
    assert {num: len(draws) for num, draws in curve.items()} == {"1": 3, "3": 3}
    patients = ["p1", "p2", "p3", "p4"]
    for draw in range(3):
        drawn = patients_of_draw(patients, 1, draw, 0)
        assert len(drawn) == 1 and drawn <= patients_of_draw(patients[::-1], 3, draw, 0)
        alone = build(Config(steps=20, max_tokens=whole.config.max_tokens), seed=0)
        for one_scan, one_grid, one_dense in scenes:
            if one_scan.patient in drawn:
                truth = alone.truth(one_scan, one_grid, everywhere(one_grid))
                alone.learn("m", one_dense, truth)
        assert len(alone._kept["m"]) == (2 if drawn & {"p1", "p2"} else 1)
        alone.fit()
        alone.judge("m", dense, alone.truth(scan, grid, everywhere(grid)))
        assert alone.results().models["m"]["mean_dice"] == pytest.approx(curve["1"][draw])


def test_the_curve_has_the_dice_of_single_scans():
    trains = [scene(number, f"train{number}") for number in (1, 2, 5)]
    tests = [scene(3, "t"), scene(4, "u")]
    results = task_after(trains, tests, fractions=(1, 2), draws=3).results()
    one, two = results.further
    assert (one.metric, two.metric) == (
        "mean Dice with 1 labelled patient",
        "mean Dice with 2 labelled patients",
    )
    for metric, num in ((one, "1"), (two, "2")):
        assert [(row.scan, row.model) for row in metric.scans] == [("t", "m"), ("u", "m")]
        by_organ = [
            np.mean([row.parts[organ] for row in metric.scans]) for organ in ("label 1", "label 2")
        ]
        curve = results.models["m"]["dice_by_num_patients"][num]
        assert len(curve) == 3 and np.mean(by_organ) == pytest.approx(np.mean(curve))


def test_an_organ_smaller_than_a_patch_is_not_reported_as_absent_from_training():
    scan, grid, dense = scene(1, "a")
    labels = scan.label_map.labels_ZYX.copy()
    labels[0, 0, 0] = 7
    trains, tests = ([(labelled(labels, scan_id=name), grid, dense)] for name in ("a", "t"))
    task = task_after(trains, tests, resolution="patch")
    assert "label 7 (in no training patch that was kept)" in task.headline().mean_of


def test_models_of_different_patches_are_compared_on_the_same_organs():
    """On patches: a small organ is most of a fine patch, but of no coarse one."""
    labels = np.ones((2, 8, 8), dtype=np.uint16)
    labels[:, :4, :4] = 2
    labels[1, 7, 7] = 3
    names = [(1, "body"), (2, "liver"), (3, "spleen")]
    train, test = (labelled(labels, None, names, scan_id) for scan_id in ("a", "t"))
    task = build(Config(resolution="patch", steps=5), seed=0)
    task.begin(1)
    grids = {
        "coarse": PatchGrid((1, 2, 2), (2, 8, 8), (2, 8, 8)),
        "fine": PatchGrid((1, 1, 1), (2, 8, 8), (2, 8, 8)),
    }
    for model, grid in grids.items():
        dense = DenseFeatures(torch.randn(3, *grid.shape), torch.zeros(3), grid)
        task.learn(model, dense, task.truth(train, grid, everywhere(grid)))
    task.fit()
    for model, grid in grids.items():
        dense = DenseFeatures(torch.randn(3, *grid.shape), torch.zeros(3), grid)
        task.judge(model, dense, task.truth(test, grid, everywhere(grid)))
    results = task.results()
    assert set(results.models["fine"]["dice"]) == {"liver", "spleen"}
    for entry in results.models.values():
        assert entry["mean_dice"] == entry["dice"]["liver"]
        assert set(entry["dice_voxel"]) == {"liver", "spleen"}
    assert all(set(score.parts) == {"liver"} for score in results.scans)
    line = task.headline().mean_of
    assert line.startswith("mean of 1 organ: liver; left out:")
    assert "spleen (not in the patches of every model)" in line


def test_label_fractions_above_the_number_of_patients_are_left_out_with_a_line(capsys):
    task = build(Config(fractions=(1, 2, 5), draws=1, steps=5), seed=0)
    for number in (1, 2):
        scan, grid, dense = scene(number, f"train{number}")
        task.learn("m", dense, task.truth(scan, grid, everywhere(grid)))
    task.fit()
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "label fractions: 2, 5 left out, because there are 2 training patients" in printed
    assert [draw for draw, _ in task._few_labels.decoders("m")] == [Draw(1, 0)]


def test_the_curve_of_earlier_results_counts_scans():
    assert curve_of({"dice_by_num_scans": {"5": [0.5]}}) == ("scan", {"5": [0.5]})
    assert curve_of({"mean_dice": 0.5}) == ("scan", {})


def test_last4_reads_the_channels_of_several_blocks():
    scan, grid, dense = scene(1, "train")
    task = build(Config(blocks="last4"), seed=0)
    assert task.blocks(12) == (8, 9, 10, 11)
    assert task.blocks(2) == (0, 1)
    block = BlockFeatures(dense.features_DZYX * 2, None)
    both = replace(dense, blocks={0: block, 1: BlockFeatures(dense.features_DZYX, None)})
    task.learn("m", both, task.truth(scan, grid, everywhere(grid)))
    kept = task._kept["m"][0].features_KD
    torch.testing.assert_close(kept[:, :5], 2 * kept[:, 5:])


def test_the_decoder_reads_the_class_tokens_around_a_patch():
    """Patches without any information: only the class tokens distinguish the two organs."""

    def known(scan, grid, dense):
        z, y, x = grid.shape
        empty = torch.zeros(1, *grid.shape)
        # one window per patch, whose class token is the truth of the patch
        start = [[i, j, k] for i in range(z) for j in range(y) for k in range(x)]
        start_W3 = torch.tensor(start) * torch.tensor(grid.patch)
        cls_WD = dense.tokens_ND()
        windows = WindowVectors(cls_WD, cls_WD, cls_WD, cls_WD, cls_WD[:, None][:, :0], start_W3)
        blocks = {0: BlockFeatures(empty, windows)}
        return DenseFeatures(empty, cls_WD.mean(0), grid, blocks, grid.patch)

    means = {}
    for context in ("none", "cls"):
        task = build(Config(context=context), seed=0)
        task.begin(3)
        for number in (1, 2, 3):
            scan, grid, dense = scene(number, "train")
            task.learn(
                OWN_MODEL, known(scan, grid, dense), task.truth(scan, grid, everywhere(grid))
            )
        task.fit()
        scan, grid, dense = scene(4, "test")
        task.judge(OWN_MODEL, known(scan, grid, dense), task.truth(scan, grid, everywhere(grid)))
        means[context] = task.headline().values[OWN_MODEL]
    assert means["cls"] > means["none"] + 0.3, means


def test_an_organ_that_only_one_model_has_kept_is_a_class():
    task = build(Config(max_tokens=2000), seed=0)
    scan, grid, dense = scene(1, "train", values=(0, 1))
    task.learn("coarse", dense, task.truth(scan, grid, everywhere(grid)))
    scan, grid, dense = scene(2, "train", values=(0, 1, 2))
    task.learn("fine", dense, task.truth(scan, grid, everywhere(grid)))
    task.fit()
    assert task.organs == ("label 1", "label 2")


def test_a_draw_without_a_tested_organ_is_left_out_of_the_curve():
    task = build(Config(), seed=0)
    task.organs = ("liver",)
    few = LabelFractions((1,), 2, seed=0)
    few.add("m", Draw(1, 0), "s", {})
    few.add("m", Draw(1, 1), "s", {"liver": 0.5})
    assert few.curve("m", task._mean_by_organ) == {"1": [0.5]}


def test_a_head_is_fitted_to_a_single_patch():
    settings = {"weight_decay": 0.0, "class_power": 0.5, "dice_weight": 1.0, "dice_classes": [1]}
    features, target = torch.randn(1, 3), torch.tensor([[0.0, 1.0]])
    head = fit_head("bn_linear", features, target, lr=1e-2, steps=20, hidden=4, seed=0, **settings)
    assert head.logits_NC(features).argmax(1).tolist() == [1]


def task_after(trains, tests, **settings):
    """The task after the training and test scans."""
    task = build(Config(steps=10, **settings), seed=0)
    task.begin(len(trains))
    for scan, grid, dense in trains:
        task.learn("m", dense, task.truth(scan, grid, everywhere(grid)))
    task.fit()
    for scan, grid, dense in tests:
        truth = task.truth(scan, grid, everywhere(grid))
        prediction = task.judge("m", dense, truth)
        if settings.get("predictions"):
            task.label_map(truth, prediction)
    return task


def with_labels(one, edit, scan_id):
    """A scene with changed labels."""
    scan, grid, dense = one
    labels = edit(scan.label_map.labels_ZYX.copy())
    return labelled(labels, scan.volume.hu_ZYX, scan.label_map.names, scan_id), grid, dense


def ignored(labels_ZYX):
    return np.full_like(labels_ZYX, IGNORE_LABEL)


@pytest.mark.parametrize("resolution", ["patch", "voxel"])
def test_a_scan_that_nobody_has_labelled_changes_no_number(resolution):
    train, test = scene(1, "a"), scene(3, "t")
    plain = task_after([train], [test], resolution=resolution, max_tokens=400)
    # as many patches of the labelled scan as without the other one
    more = task_after(
        [train, with_labels(scene(2, "b"), ignored, "b")],
        [test, with_labels(test, ignored, "t2")],
        resolution=resolution,
        max_tokens=800,
    )
    assert more.headline().values == plain.headline().values
    of_scan = {score.scan: score for score in more.results().scans}
    assert np.isnan(of_scan["t2"].value) and not of_scan["t2"].parts


def test_training_scans_without_any_labelled_voxel_are_an_error_of_one_line():
    with pytest.raises(
        UserError, match=r"no organ label occurs .* \(they have: no labelled voxel\)"
    ):
        task_after([with_labels(scene(1, "a"), ignored, "a")], [])


def test_patients_without_labelled_voxels_are_not_drawn():
    trains = [scene(1, "a"), with_labels(scene(2, "b"), ignored, "b"), scene(5, "c")]
    curve = task_after(trains, [scene(3, "t")], fractions=(1, 2), draws=6)
    assert set(curve.results().models["m"]["dice_by_num_patients"]) == {"1"}  # of two patients
    assert min(curve.results().models["m"]["dice_by_num_patients"]["1"]) > 0.5


def test_organs_that_scans_number_differently_have_values_of_their_own_in_predictions():
    first = scene(1, "a", names=[(1, "liver"), (2, "spleen")])
    other = with_labels(scene(2, "b"), lambda labels: labels, "b")
    other = (
        labelled(other[0].label_map.labels_ZYX, names=[(1, "spleen"), (2, "aorta")], scan_id="b"),
        *other[1:],
    )
    task = task_after([first, other], [], predictions=True)
    scan, grid, dense = scene(3, "t", names=[(1, "liver"), (2, "spleen")])
    truth = task.truth(scan, grid, everywhere(grid))
    prediction = task.judge("m", dense, truth)
    written = task.label_map(truth, prediction)
    assert sorted(name for _, name in written.names) == ["aorta", "liver", "spleen"]
    assert len({value for value, _ in written.names}) == 3
    for value, name in written.names:
        np.testing.assert_array_equal(
            written.labels_ZYX == value, prediction.classes_ZYX == task.classes.index(name)
        )


def test_the_body_of_a_prediction_has_the_value_of_its_own_label():
    """Label 1 is an organ that is not among `organs` and so counts as body; label 2 is the body."""
    names = [(1, "spleen"), (2, "body"), (3, "liver")]
    train = scene(1, "a", values=(0, 1, 2, 3), names=names)
    task = task_after([train], [], organs=("liver",), predictions=True)
    scan, grid, dense = scene(3, "t", values=(0, 1, 2, 3), names=names)
    truth = task.truth(scan, grid, everywhere(grid))
    written = task.label_map(truth, task.judge("m", dense, truth))
    assert written.names == ((2, "body"), (3, "liver"))
    assert set(np.unique(written.labels_ZYX)) == {0, 2, 3}
