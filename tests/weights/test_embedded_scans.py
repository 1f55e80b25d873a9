"""Features in Python: what `embed` and `forward` take, where the features lie, several blocks."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from scan_files import make_ct, write_nifti
from tiny_export import VIT, tiny_export

import tapct
from tapct.base.exits import UserError
from tapct.eval.features.dense import PatchGrid
from tapct.models import vit
from tapct.types import HUContract, Refused, Volume
from tapct.weights.pretrained import Pretrained
from tapct.weights.voxel_features import VoxelFeatures

SHAPE, SPACING = (9, 24, 28), (2.5, 0.7, 0.8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return tapct.load_pretrained(tiny_export(tmp_path_factory.mktemp("model") / "export"))


def crops(*shape: int) -> torch.Tensor:
    """Normalised crops."""
    return torch.rand(*shape) * 4 - 2


def test_a_path_a_volume_an_array_and_a_tensor_give_the_same(
    model: Pretrained, tmp_path: Path
) -> None:
    hu = make_ct(SHAPE)
    path = write_nifti(tmp_path / "scan.nii.gz", hu)
    want = model.embed(tapct.read_volume(path))
    for found in (
        model.embed(path),
        model.embed(str(path)),
        model.embed(hu, spacing_mm=SPACING),
        model.embed(hu.astype(np.float64), spacing_mm=list(SPACING)),
        model.embed(torch.from_numpy(hu).bfloat16().float().round(), spacing_mm=SPACING),
        model.embed(torch.from_numpy(hu), spacing_mm=torch.tensor(SPACING)),
    ):
        np.testing.assert_allclose(found.features_DZYX, want.features_DZYX, atol=0.02)
        assert found.spacing_mm == pytest.approx(want.spacing_mm)
    found = model.embed(hu, spacing_mm=SPACING)
    assert np.array_equal(found.features_DZYX, want.features_DZYX)


def stored(path: Path, hu_ZYX: np.ndarray, axes: tuple[int, int, int], flips: str) -> Path:
    """A scan whose file holds the axes in another order and direction, at the same place."""
    image = SimpleITK.GetImageFromArray(hu_ZYX)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((-10.0, 20.0, -300.0))
    image = SimpleITK.PermuteAxes(image, axes)
    image = SimpleITK.Flip(image, [axis in flips for axis in "xyz"])
    SimpleITK.WriteImage(image, str(path))
    return path


def test_an_embedding_is_shown_by_its_shapes(model: Pretrained) -> None:
    shown = repr(model.embed(make_ct(SHAPE), spacing_mm=SPACING))
    assert "features_DZYX=(" in shown and "array" not in shown and len(shown) < 200


def test_two_orientations_of_a_file_give_equal_features_at_equal_positions(
    model: Pretrained, tmp_path: Path
) -> None:
    hu = make_ct(SHAPE)
    upright = model.embed(stored(tmp_path / "a.nii.gz", hu, (0, 1, 2), ""))
    turned = model.embed(stored(tmp_path / "b.nii.gz", hu, (2, 0, 1), "xz"))
    np.testing.assert_array_equal(upright.features_DZYX, turned.features_DZYX)
    np.testing.assert_allclose(upright.centres_mm, turned.centres_mm, atol=1e-4)
    assert upright.features_DZYX.std() > 0.1 and np.ptp(upright.centres_mm[..., 0]) > 10


def test_centres_are_where_simpleitk_places_them(model: Pretrained, tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(make_ct(SHAPE))
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((-10.0, 20.0, -300.0))
    angle = np.radians(12)
    turned = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    image.SetDirection(np.ravel(turned).tolist())
    SimpleITK.WriteImage(image, str(tmp_path / "oblique.nrrd"))
    features = model.embed(tmp_path / "oblique.nrrd")
    assert features.centres_mm.shape == (*features.features_DZYX.shape[1:], 3)
    for z, y, x in ((0, 0, 0), (4, 3, 1), (1, 0, 3)):
        # a patch is 2x4x4 voxels of a scan that was resized to 9x16x16
        index = [
            (i + 0.5) * side * size / resized - 0.5
            for i, side, size, resized in zip((x, y, z), (4, 4, 2), SHAPE[::-1], (16, 16, 9))
        ]
        want = image.TransformContinuousIndexToPhysicalPoint(index)
        np.testing.assert_allclose(features.centres_mm[z, y, x], want, atol=1e-4)
    np.testing.assert_allclose(features.origin_mm, features.centres_mm[0, 0, 0])


def test_voxels_equal_the_upsampled_features_in_every_part(model: Pretrained) -> None:
    features = model.embed(make_ct(SHAPE), spacing_mm=SPACING)
    want = features.grid.to_voxels(torch.from_numpy(features.features_DZYX)).numpy()
    voxels = features.to_voxels()
    assert voxels.shape == want.shape == (8, *SHAPE) and voxels.nbytes == want.nbytes
    for index in (
        ..., 3, -1, (slice(None), 4), (..., 5), (2, 8, 23, 27), (slice(1, 8, 3), slice(None, 4)),
        (slice(None), slice(7, 2, -2), 3, slice(5, 9)), (slice(0, 0), 1), (0, ..., slice(3)),
    ):  # fmt: skip
        np.testing.assert_allclose(voxels[index], want[index], atol=1e-5)
        assert voxels[index].shape == want[index].shape
    np.testing.assert_allclose(np.asarray(voxels), want, atol=1e-5)
    slabs = list(voxels.slabs(max_bytes=50_000))
    assert [first for first, _, _ in slabs] == [0, 2, 4, 6, 8]
    np.testing.assert_allclose(np.concatenate([slab for *_, slab in slabs], 1), want, atol=1e-5)
    for wrong in ([1, 2], np.arange(3), (0, 0, 0, 0, 0), None, True, "z"):
        with pytest.raises(UserError, match="integers and slices"):
            voxels[wrong]
    with pytest.raises(IndexError, match="index 9 along z"):
        voxels[0, 9]


def test_voxels_are_computed_where_they_are_read() -> None:
    grid = PatchGrid((4, 8, 8), (64, 128, 128), (64, 256, 256))
    features = np.random.default_rng(0).random((96, *grid.shape), np.float32)
    tracemalloc.start()
    try:
        voxels = VoxelFeatures(features, grid)
        assert voxels.nbytes == 96 * 64 * 256 * 256 * 4  # 1.6 GB
        for index in ((slice(None), 30), (5,), (slice(None), 3, 4, 5), (0, slice(None), 7)):
            part = voxels[index]
            assert tracemalloc.get_traced_memory()[1] < part.nbytes + (32 << 20)
            tracemalloc.reset_peak()
            del part
    finally:
        tracemalloc.stop()


def test_blocks_are_those_that_were_asked_for(model: Pretrained) -> None:
    hu = make_ct(SHAPE)
    last, both = (model.embed(hu, spacing_mm=SPACING, blocks=n) for n in (1, [0, 1]))
    assert list(last.block) == [1] and list(both.block) == [0, 1] and len(both.block) == 2
    assert both.block[-1] is both.features_DZYX and 0 in both.block and 0 not in last.block
    np.testing.assert_array_equal(both.block[1], last.block[1])
    assert not np.allclose(both.block[0], both.block[1])
    dense = model.dense(Volume(hu, SPACING))
    np.testing.assert_array_equal(both.block[1], dense.features_DZYX.numpy())
    assert both.to_voxels(0)[0, 0, 0, 0] == pytest.approx(both.block[0][0, 0, 0, 0])
    assert set(both.arrays()) - set(last.arrays()) == {"block_0_DZYX"}
    with pytest.raises(UserError, match=r"block 0 was not computed, only 1; .*blocks=\[0\]"):
        last.block[0]
    with pytest.raises(UserError, match="block 2 does not exist"):
        both.block[2]


def test_intermediate_layers_are_those_of_dinov2(model: Pretrained) -> None:
    x, seen = crops(3, 1, 4, 8, 12), {}
    for number, block in enumerate(model.model.blocks):
        block.register_forward_hook(lambda _, __, out, n=number: seen.update({n: out}))
    try:
        with torch.no_grad():
            (last,) = model.get_intermediate_layers(x)
            raw = model.get_intermediate_layers(x, 2, norm=False, return_class_token=True)
            both = model.get_intermediate_layers(x, [1, 0], return_class_token=True)
            maps = model.get_intermediate_layers(x, n=[0], reshape=True)
    finally:
        for block in model.model.blocks:
            block._forward_hooks.clear()
    grid = (2, 2, 3)
    for number in (0, 1):
        tokens_BTD = seen[number].unflatten(0, (3, -1)) if seen[number].ndim == 2 else seen[number]
        assert tokens_BTD.shape == (3, 1 + VIT.registers + 12, VIT.dim)
        for found, want in ((raw, tokens_BTD), (both, model.model.norm(tokens_BTD))):
            patches_BND, cls_BD = found[number]
            torch.testing.assert_close(cls_BD, want[:, 0])
            torch.testing.assert_close(patches_BND, want[:, 1 + VIT.registers :])
    assert torch.equal(last, both[1][0])
    torch.testing.assert_close(last, model(x[:, 0]).patches_BND)
    assert maps[0].shape == (3, VIT.dim, *grid)
    assert torch.equal(maps[0][1, :, 1, 0, 2], both[0][0][1, 6 + 2])


@pytest.mark.parametrize("n", [0, 3, -1, [2], [-1], [0, 0], [], True, "last", [0.5]])
def test_blocks_that_do_not_exist_are_one_line(model: Pretrained, n: Any) -> None:
    with pytest.raises(UserError, match="block"):
        model.get_intermediate_layers(crops(1, 2, 8, 8), n)


HU = make_ct(SHAPE)


@pytest.mark.parametrize(
    ("scan", "spacing", "words"),
    [
        (HU, None, "an array has no spacing"),
        (HU[None], SPACING, r"1x9x24x28; rule: one scan \(Z, Y, X\); .*squeeze"),
        (HU[None, None], SPACING, "squeeze"),
        (HU[..., None], SPACING, "squeeze"),
        (np.stack([HU, HU]), SPACING, "once per scan"),
        (HU[0], SPACING, "24x28; rule: one scan"),
        (HU[:0], SPACING, "0x24x28"),
        (HU > 0, SPACING, "array of bool"),
        (HU.astype(complex), SPACING, "array of complex128"),
        (HU.tolist(), SPACING, "got list"),
        (HU, (2.5, 0.7), r"give three numbers \(z, y, x\)"),
        (HU, 2.5, "give three numbers"),
        (HU, (2.5, 0.7, 0.0), "each from 0.05 to 50 mm"),
        (HU, (2.5, 0.7, np.nan), "each from 0.05 to 50 mm"),
        (HU, (0.8, 0.8, 2.5), r"looks like \(x, y, z\)"),
        (HU.transpose(2, 1, 0), (0.8, 0.8, 2.5), r"looks like \(x, y, z\)"),
        (make_ct((9, 24, 300)), (0.7, 0.8, 5.0), "1500 mm wide"),
        (HU / 1000, SPACING, "no CT in HU.*without normalisation"),
        ((HU - HU.mean()) / HU.std(), SPACING, "no CT in HU"),
        (HU.astype(np.int32) + 1024, SPACING, "no CT in HU.*subtract 1024"),
        (np.where(HU > 0, 3, 0), SPACING, "labels and not a scan"),
        (np.full(SHAPE, -1000), SPACING, "every voxel is -1000"),
        (np.where(HU > 600, np.nan, HU), SPACING, "NaN"),
        (np.clip(HU, 0, 255).astype(np.uint8), SPACING, "air or fat below zero|no CT in HU"),
        (Volume(HU, SPACING), SPACING, "leave it out"),
        (Volume(HU.astype(np.float32), SPACING), None, "is float32; rule: int16"),
        (Volume(HU[None], SPACING), None, "1x9x24x28"),
        (Volume(HU, (0.0, 1.0, 1.0)), None, "each from 0.05 to 50 mm"),
        (Volume(torch.from_numpy(HU), SPACING), None, "give a NumPy array"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_scan_is_one_line(
    model: Pretrained, scan: Any, spacing: Any, words: str
) -> None:
    with pytest.raises((UserError, Refused), match=words) as error:
        model.embed(scan, spacing_mm=spacing)
    assert "\n" not in str(error.value)


def test_a_box_within_a_body_and_unusual_spacings_are_scans(model: Pretrained) -> None:
    body = np.random.default_rng(0).normal(40, 60, (6, 16, 16))  # no air, but fat
    assert model.embed(body, spacing_mm=(0.7, 0.7, 0.7)).cls_D.shape == (8,)
    assert model.embed(HU, spacing_mm=(0.5, 0.9, 0.9)).cls_D.shape == (8,)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (crops(2, 2, 8, 8)[0], r"give normalised HU as \(B, Z, Y, X\)"),
        (crops(2, 3, 2, 8, 8), r"give normalised HU as \(B, Z, Y, X\)"),
        (crops(1, 2, 1, 2, 8, 8), r"give normalised HU as"),
        ([crops(1, 2, 8, 8)], "crops are a list"),
        (crops(1, 2, 8, 8).numpy(), "crops are a ndarray"),
        (torch.from_numpy(HU[None, :8, :, :24]), "int16, so they are not normalised"),
        (torch.from_numpy(HU[None, :8, :, :24]).float(), "Give contract.normalise"),
        ((torch.from_numpy(HU[None, :8, :, :24]) + 86.8) * 3 / 322.6, "Give contract.normalise"),
        (crops(1, 2, 8, 8) * torch.nan, "values from nan"),
        (crops(0, 2, 8, 8), "without a voxel"),
        (crops(1, 3, 8, 8), "multiple|no whole number|patch"),
    ],
)
def test_crops_that_are_not_what_forward_takes_are_one_line(
    model: Pretrained, given: Any, words: str
) -> None:
    for call in (model, model.get_intermediate_layers):
        with pytest.raises(UserError, match=words):
            call(given)


@pytest.mark.parametrize(
    "given",
    [
        crops(3, 1, 2, 8, 8),
        [crops(3, 1, 2, 8, 8)],
        [crops(2, 8, 8)],
        [torch.zeros(1, 2, 8, 8, dtype=torch.int16)],
        [np.zeros((1, 2, 8, 8), np.float32)],
    ],
)
def test_the_backbone_takes_groups_of_normalised_crops_alone(model: Pretrained, given: Any) -> None:
    with pytest.raises(UserError, match="crops"):
        model.model(given)
    with pytest.raises(UserError, match="crops"):
        model.model.tokens_of_blocks(given, [1])


def test_a_backbone_in_mm_takes_one_spacing_per_crop() -> None:
    config = vit.Config(
        window=(2, 8, 8), patch=(2, 4, 4), dim=12, depth=1, heads=1, positions="rope",
        layer_scale=1.0, rope=vit.rope.Config(coordinates="mm"),
    )  # fmt: skip
    backbone = vit.build(config)
    settings: Any = type("Settings", (), {"hu_contract": HUContract()})()
    model = Pretrained(backbone, settings, {})
    given = crops(2, 4, 8, 8)
    one = model(given, spacing_mm=(5, 1, 1)).patches_BND
    each = model(given, spacing_mm=[[5, 1, 1], [2, 1, 1]]).patches_BND
    assert torch.equal(one[0], each[0]) and not torch.equal(one[1], each[1])
    for wrong in ((5, 1), [[5, 1, 1]] * 3, (5, 0, 1), (5, float("nan"), 1)):
        with pytest.raises(UserError, match="spacing_mm is"):
            model(given, spacing_mm=wrong)
    with pytest.raises(UserError, match="spacing"):
        model(given)
    with pytest.raises(UserError, match=r"list of one tensor \(B, 3\)"):
        backbone([given], spacing_mm=torch.ones(2, 3))  # the first row would be that of all crops
