"""Dense features: windows, averaging and the way back to voxels, against slow loops."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tapct.base.exits import UserError
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.features.extraction import dense_features, features_of
from tapct.eval.features.prepared import prepare
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.features.windows import axis_weight, window_starts
from tapct.eval.models.baselines import RawPatches
from tapct.models import vit
from tapct.nn import rope
from tapct.types import AIR_HU, HUContract, Tokens

PATCH = (2, 4, 4)
CONTRACT = HUContract()


def small_vit() -> nn.Module:
    config = vit.Config(
        window=(4, 16, 16), patch=PATCH, dim=16, depth=2, heads=2, registers=2, layer_scale=1.0
    )
    model = vit.build(config)
    model.init_weights(3)
    return model.requires_grad_(False)


def scan(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 1500, shape).astype(np.int16)


def slow_features(model: nn.Module, hu_ZYX: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """One window at a time, one token at a time, in numpy, at native in-plane size."""
    depth, height, width = hu_ZYX.shape
    window, stride = preprocess.window, preprocess.stride
    cell = [p // parts for p, parts in zip(PATCH, preprocess.refine, strict=True)]
    size = [max(-(-n // p) * p, w) for n, p, w in zip(hu_ZYX.shape, PATCH, window, strict=True)]
    padded = np.full(size, AIR_HU, dtype=np.float64)
    padded[:depth, :height, :width] = hu_ZYX
    normal = ((np.clip(padded, -1008, 822) - CONTRACT.mean) / CONTRACT.std).astype(np.float32)
    cells = [s // side for s, side in zip(size, cell, strict=True)]
    per_window = [w // p for w, p in zip(window, PATCH, strict=True)]
    total, weight = np.zeros((*cells, 16)), np.zeros(cells)
    starts = []
    for n, w, s in zip(size, window, stride, strict=True):
        at = [0]
        while at[-1] + w < n:
            at.append(min(at[-1] + s, n - w))
        starts.append(at)
    for z, y, x in itertools.product(*starts):
        crop = normal[z : z + window[0], y : y + window[1], x : x + window[2]]
        patches = model([torch.from_numpy(crop)[None]])[0].patches_BND[0].double().numpy()
        for token, (i, j, k) in zip(
            patches, itertools.product(*map(range, per_window)), strict=True
        ):
            here = 1.0
            for index, count in ((i, per_window[0]), (j, per_window[1]), (k, per_window[2])):
                reach = (count - 1) / 2
                here *= 1 - (1 - preprocess.border_weight) * (
                    abs(index - reach) / reach if reach else 0
                )
            first = [
                (at + i * p) // side
                for at, i, p, side in zip((z, y, x), (i, j, k), PATCH, cell, strict=True)
            ]
            for more in itertools.product(*map(range, preprocess.refine)):
                at_cell = tuple(a + m for a, m in zip(first, more, strict=True))
                total[at_cell] += here * token
                weight[at_cell] += here
    mean = total / weight[..., None]
    gz, gy, gx = (-(-n // side) for n, side in zip(hu_ZYX.shape, cell, strict=True))
    return np.moveaxis(mean[:gz, :gy, :gx], 3, 0)


@pytest.mark.parametrize(
    ("shape", "window", "stride", "border_weight"),
    [
        ((9, 26, 33), (4, 16, 16), (2, 8, 8), 1.0),
        ((9, 26, 33), (4, 16, 16), (4, 8, 12), 0.25),
        ((3, 10, 40), (4, 16, 16), (4, 16, 16), 0.5),  # shorter than the window along z and y
        ((8, 16, 16), (4, 16, 16), (2, 4, 4), 1.0),
    ],
)
def test_dense_features_equal_a_loop_over_windows_and_tokens(shape, window, stride, border_weight):
    model, hu_ZYX = small_vit(), scan(shape)
    preprocess = Preprocess((0, 0), window, stride, border_weight)
    dense = dense_features(model, hu_ZYX, CONTRACT, preprocess, batch=5)
    np.testing.assert_allclose(
        dense.features_DZYX.numpy(), slow_features(model, hu_ZYX, preprocess), atol=2e-5
    )


@pytest.mark.parametrize(
    ("shape", "stride", "refine", "border_weight"),
    [
        ((9, 26, 33), (4, 6, 10), (1, 2, 2), 1.0),
        ((9, 26, 33), (3, 8, 6), (2, 1, 2), 0.25),
        ((7, 10, 40), (4, 5, 3), (1, 4, 4), 0.5),
    ],
)
def test_windows_between_patches_equal_the_loop(shape, stride, refine, border_weight):
    model, hu_ZYX = small_vit(), scan(shape)
    preprocess = Preprocess((0, 0), (4, 16, 16), stride, border_weight, refine=refine)
    dense = dense_features(model, hu_ZYX, CONTRACT, preprocess, batch=5)
    np.testing.assert_allclose(
        dense.features_DZYX.numpy(), slow_features(model, hu_ZYX, preprocess), atol=2e-5
    )


def test_a_point_smaller_than_a_patch_is_found_in_its_cell():
    """Cells of half a patch, and windows at each of them: the mean over the patches that cover a
    cell is largest where they all contain the point.
    """
    preprocess = Preprocess((0, 0), (4, 16, 16), (4, 2, 2), refine=(1, 2, 2))
    hu_ZYX = np.full((4, 40, 40), -1000, np.int16)
    hu_ZYX[:, 18:20, 22:24] = 800
    dense = dense_features(RawPatches(PATCH), hu_ZYX, CONTRACT, preprocess)
    brightness = dense.features_DZYX.mean((0, 1))
    assert np.unravel_index(int(brightness.argmax()), brightness.shape) == (9, 11)
    _, y, x = dense.grid.centre_mm((0, 9, 11), (1.0, 1.0, 1.0))
    assert (y, x) == (18.5, 22.5)  # the centre of voxels 18, 19 and 22, 23


@pytest.mark.parametrize(
    ("stride", "refine", "line"),
    [
        ((4, 16, 16), (1, 2, 2), "refine is 2 along y, but with a stride of 16 .* stride of 14"),
        ((4, 14, 15), (1, 2, 2), "preprocess.stride 4x14x15 is no multiple .* along x"),
        ((4, 16, 16), (1, 1, 3), "refine is 3 along x, which does not divide a patch of 4"),
    ],
)
def test_cells_that_no_window_can_fill_are_one_line_for_people(stride, refine, line):
    preprocess = Preprocess((0, 0), (4, 16, 16), stride, refine=refine)
    with pytest.raises(UserError, match=line):
        dense_features(RawPatches(PATCH), scan((4, 16, 16)), CONTRACT, preprocess)


def test_the_number_of_windows_per_call_changes_nothing():
    model, hu_ZYX = small_vit(), scan((10, 30, 30))
    preprocess = Preprocess((24, 24), (4, 16, 16), (2, 8, 8))
    one, many = (dense_features(model, hu_ZYX, CONTRACT, preprocess, batch=n) for n in (1, 64))
    torch.testing.assert_close(one.features_DZYX, many.features_DZYX, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.cls_D, many.cls_D, atol=1e-5, rtol=0)


def test_class_token_is_the_mean_over_windows():
    model, hu_ZYX = small_vit(), scan((8, 16, 16))
    preprocess = Preprocess((0, 0), (4, 16, 16), (4, 16, 16))
    normal = CONTRACT.normalise(torch.from_numpy(hu_ZYX))
    expected = model([torch.stack([normal[:4], normal[4:]])])[0].cls_BD.mean(0)
    dense = dense_features(model, hu_ZYX, CONTRACT, preprocess)
    torch.testing.assert_close(dense.cls_D, expected, atol=1e-5, rtol=0)


def test_model_is_left_in_the_mode_it_was_in_and_runs_in_eval_mode():
    class Spy(RawPatches):
        def forward(self, crops):
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(crops)

    for training in (True, False):
        model = Spy(PATCH).train(training)
        dense = dense_features(
            model, scan((4, 16, 16)), CONTRACT, Preprocess((0, 0), (4, 16, 16), (4, 16, 16))
        )
        assert model.training is training
        assert not dense.features_DZYX.is_inference()  # a decoder is trained on it


def test_a_model_in_mm_receives_the_spacing_of_the_resized_voxels():
    config = vit.Config(
        window=(4, 16, 16), patch=PATCH, dim=16, depth=2, heads=2, positions="rope", layer_scale=1.0
    )
    model = vit.build(dataclasses.replace(config, rope=rope.Config(coordinates="mm")))
    hu_ZYX, preprocess = scan((8, 32, 64)), Preprocess((16, 16), (4, 16, 16), (4, 16, 16))
    dense = dense_features(model, hu_ZYX, CONTRACT, preprocess, spacing_mm=(3.0, 1.0, 0.5))
    prepared = prepare(hu_ZYX, CONTRACT, preprocess, PATCH, spacing_mm=(3.0, 1.0, 0.5))
    assert prepared.spacing_mm == pytest.approx((3.0, 2.0, 2.0))
    crops = torch.stack([prepared.input_ZYX[:4], prepared.input_ZYX[4:]])
    expected = model([crops], spacing_mm=[torch.tensor([[3.0, 2.0, 2.0]]).expand(2, 3)])[
        0
    ].cls_BD.mean(0)
    torch.testing.assert_close(dense.cls_D, expected, atol=1e-5, rtol=0)
    other = dense_features(model, hu_ZYX, CONTRACT, preprocess, spacing_mm=(3.0, 1.0, 1.0))
    assert not torch.allclose(dense.cls_D, other.cls_D, atol=1e-5)
    with pytest.raises(UserError, match="spacing of these crops was not given"):
        dense_features(model, hu_ZYX, CONTRACT, preprocess)


def test_raw_patches_hold_the_voxels_of_their_patch():
    crop = torch.arange(4 * 8 * 8, dtype=torch.float32).reshape(1, 4, 8, 8)
    tokens = RawPatches(PATCH)([crop])[0]
    assert isinstance(tokens, Tokens)
    assert tokens.grid == (2, 2, 2)
    for number, (z, y, x) in enumerate(itertools.product(range(2), repeat=3)):
        expected = crop[0, 2 * z : 2 * z + 2, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].flatten()
        torch.testing.assert_close(tokens.patches_BND[0, number], expected)


def test_padding_is_air_and_the_clip_comes_before_the_resize():
    hu_ZYX = np.full((3, 16, 16), 3000, dtype=np.int16)
    hu_ZYX[:, :, :8] = -1024
    prepared = prepare(hu_ZYX, CONTRACT, Preprocess((8, 8), (4, 8, 8), (4, 8, 8)), PATCH)
    assert prepared.input_ZYX.shape == (4, 8, 8)
    hu = prepared.input_ZYX * CONTRACT.std + CONTRACT.mean
    torch.testing.assert_close(hu[3], torch.full((8, 8), -1008.0), atol=1e-2, rtol=0)
    assert (
        hu[:3, :, 3:5].max() < 823
    )  # 3000 HU unclipped would still be above the window after averaging with air
    torch.testing.assert_close(
        hu[0, 2:6, 5], torch.full((4,), 822.0), atol=0.1, rtol=0
    )  # tissue away from borders
    assert float(hu[0, 4, 3:5].mean()) == pytest.approx((822 - 1008) / 2, abs=2)


@pytest.mark.parametrize(
    ("name", "mode"), [("linear", "bilinear"), ("cubic", "bicubic"), ("area", "area")]
)
@pytest.mark.parametrize("clip", ["before_resize", "after_resize"])
def test_the_resize_and_the_clip_of_another_project_are_those_of_torch_in_its_order(
    name: str, mode: str, clip: str
) -> None:
    hu_ZYX = scan((4, 32, 48))
    preprocess = Preprocess((16, 24), (4, 16, 24), (4, 16, 24), resize=name, clip=clip)
    hu = torch.from_numpy(hu_ZYX).float()
    if clip == "before_resize":
        hu = hu.clamp(-1008, 822)
    resized = torch.nn.functional.interpolate(hu[:, None], size=(16, 24), mode=mode)[:, 0]
    want = (resized.clamp(-1008, 822) - CONTRACT.mean) / CONTRACT.std
    got = prepare(hu_ZYX, CONTRACT, preprocess, PATCH).input_ZYX
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_the_order_of_clip_and_resize_matters_at_metal() -> None:
    hu_ZYX = np.full((2, 16, 16), 0, dtype=np.int16)
    hu_ZYX[:, :, :8] = 3000
    sizes = ((8, 8), (2, 8, 8), (2, 8, 8))
    first, second = (
        prepare(hu_ZYX, CONTRACT, Preprocess(*sizes, clip=clip), PATCH).input_ZYX
        for clip in ("before_resize", "after_resize")
    )
    assert float(second[0, 4, 4]) > float(first[0, 4, 4]) + 0.1


def test_padding_may_be_air_that_is_not_clipped() -> None:
    hu_ZYX = scan((3, 16, 16))
    sizes = ((0, 0), (4, 16, 16), (4, 16, 16))
    clipped, raw = (
        prepare(hu_ZYX, CONTRACT, Preprocess(*sizes, pad=pad), PATCH).input_ZYX
        for pad in ("clipped", "raw")
    )
    assert torch.equal(clipped[:3], raw[:3])
    assert float(clipped[3, 0, 0]) == pytest.approx((-1008 - CONTRACT.mean) / CONTRACT.std)
    assert float(raw[3, 0, 0]) == pytest.approx((-1024 - CONTRACT.mean) / CONTRACT.std)


def ramp(shape, spacing_mm) -> np.ndarray:
    """HU that grow linearly with the place in mm along each axis, from the edge of the scan."""
    z, y, x = ((np.arange(n) + 0.5) * mm for n, mm in zip(shape, spacing_mm, strict=True))
    return (3 * z[:, None, None] + 2 * y[:, None] + x).round().astype(np.int16)


@pytest.mark.parametrize("clip", ["before_resize", "after_resize"])
@pytest.mark.parametrize("wanted", [(2.0, 1.0, 1.0), (0.0, 1.5, 0.7), (5.0, 0.0, 2.0)])
def test_a_scan_is_resized_to_a_spacing_on_every_axis(wanted, clip) -> None:
    """A voxel holds the HU at its own place in mm, whatever the spacing of the scan."""
    spacing_mm, shape, size_yx = (3.0, 0.9, 0.8), (20, 60, 70), (50, 48)
    preprocess = Preprocess(size_yx, (4, 16, 16), (4, 16, 16), clip=clip, spacing_mm=wanted)
    prepared = prepare(ramp(shape, spacing_mm), CONTRACT, preprocess, PATCH, spacing_mm=spacing_mm)
    for axis, mm in enumerate(wanted):
        expected = (20, *size_yx)[axis] if not mm else round(shape[axis] * spacing_mm[axis] / mm)
        assert prepared.grid.resized[axis] == expected
    depth, height, width = prepared.grid.resized
    hu = prepared.input_ZYX[:depth, :height, :width] * CONTRACT.std + CONTRACT.mean
    extent = np.array(shape) * spacing_mm
    place = ramp((depth, height, width), extent / (depth, height, width))
    inner = (slice(2, -2), slice(4, -4), slice(4, -4))
    np.testing.assert_allclose(hu.numpy()[inner], place[inner], atol=1.5)  # HU are rounded
    np.testing.assert_allclose(prepared.spacing_mm, extent / (depth, height, width), rtol=1e-12)


def test_windows_of_a_spacing_have_one_size_in_mm() -> None:
    """The same body at another spacing has the same grid, and the same patches in mm."""
    wanted = (4.0, 2.0, 2.0)
    preprocess = Preprocess((0, 0), (4, 16, 16), (4, 16, 16), spacing_mm=wanted)
    fine, coarse = (2.0, 0.5, 0.5), (4.0, 1.0, 1.0)
    one = PatchGrid.of_scan((24, 256, 256), preprocess, PATCH, fine)
    other = PatchGrid.of_scan((12, 128, 128), preprocess, PATCH, coarse)
    assert one.resized == other.resized == (12, 64, 64)
    assert one.spacing_mm(fine) == other.spacing_mm(coarse) == (8.0, 8.0, 8.0)
    model = RawPatches(PATCH)
    found = [
        dense_features(model, ramp(shape, mm), CONTRACT, preprocess, spacing_mm=mm).features_DZYX[
            :, 1:-1, 1:-1, 1:-1
        ]
        for shape, mm in (((24, 256, 256), fine), ((12, 128, 128), coarse))
    ]
    assert float((found[0] - found[1]).abs().max()) * CONTRACT.std < 1.5


def test_a_spacing_that_cannot_be_is_one_line() -> None:
    for wanted in ((0.01, 1.0, 1.0), (60.0, 0.0, 0.0)):
        with pytest.raises(UserError, match="rule: 0, or from 0.05 to 50 mm"):
            Preprocess(spacing_mm=wanted)
    preprocess = Preprocess((32, 32), (4, 16, 16), (4, 16, 16), spacing_mm=(0.0, 1.0, 1.0))
    with pytest.raises(UserError, match="the spacing of this scan was not given"):
        prepare(scan((4, 16, 16)), CONTRACT, preprocess, PATCH)


def test_a_scan_at_its_own_size_is_not_resampled():
    hu_ZYX = scan((5, 12, 20))
    prepared = prepare(hu_ZYX, CONTRACT, Preprocess((12, 20), (4, 8, 8), (4, 8, 8)), PATCH)
    assert torch.equal(prepared.input_ZYX[:5], CONTRACT.normalise(torch.from_numpy(hu_ZYX)))


def test_resizing_slab_by_slab_equals_resizing_at_once(monkeypatch):
    hu_ZYX = scan((7, 32, 32))
    preprocess = Preprocess((16, 24), (4, 16, 16), (4, 16, 16))
    whole = prepare(hu_ZYX, CONTRACT, preprocess, PATCH)
    monkeypatch.setattr("tapct.eval.features.prepared._SLAB_BYTES", 4 * 32 * 32 * 2)
    slabs = prepare(hu_ZYX, CONTRACT, preprocess, PATCH)
    torch.testing.assert_close(slabs.input_ZYX, whole.input_ZYX, atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_windows_cover_every_voxel_and_stay_inside(size, window, stride):
    stride, size = min(stride, window), max(size, window)
    starts = window_starts(size, window, stride)
    covered = np.zeros(size, dtype=int)
    for start in starts:
        assert 0 <= start <= size - window
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize(
    ("patch", "resized", "original"),
    [
        ((2, 4, 4), (7, 24, 24), (7, 24, 24)),
        ((4, 8, 8), (9, 20, 33), (9, 50, 31)),
        ((1, 3, 5), (1, 3, 11), (1, 9, 4)),
    ],
)
def test_upsampling_equals_numpy_interpolation_along_each_axis(patch, resized, original):
    grid = PatchGrid(patch, resized, original)
    maps = np.random.default_rng(1).normal(size=(2, *grid.shape))
    expected = maps
    for axis in range(3):
        patch_centres_in_resized = patch[axis] * (np.arange(grid.shape[axis]) + 0.5)
        voxel_centres_in_resized = (
            (np.arange(original[axis]) + 0.5) * resized[axis] / original[axis]
        )
        expected = np.apply_along_axis(
            lambda line, at=voxel_centres_in_resized, known=patch_centres_in_resized: np.interp(at,
            known, line),
            axis + 1, expected,
        )  # fmt: skip
    got = grid.to_voxels(torch.from_numpy(maps).float())
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


def test_upsampling_equals_torch_trilinear_where_patches_fill_the_scan():
    grid = PatchGrid((2, 4, 8), (8, 16, 24), (8, 16, 24))
    maps = torch.randn(3, *grid.shape, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.interpolate(
        maps[None], scale_factor=(2, 4, 8), mode="trilinear", align_corners=False
    )[0]
    torch.testing.assert_close(grid.to_voxels(maps), expected, atol=1e-5, rtol=1e-5)


def test_constant_features_stay_constant_up_to_the_border():
    grid = PatchGrid((4, 8, 8), (10, 30, 30), (10, 51, 47))
    assert grid.shape == (3, 4, 4)
    torch.testing.assert_close(
        grid.to_voxels(torch.full((2, 3, 4, 4), 1.7)),
        torch.full((2, 10, 51, 47), 1.7),
        atol=1e-5,
        rtol=0,
    )


def test_argmax_in_slabs_equals_argmax_at_once(monkeypatch):
    grid = PatchGrid((2, 4, 4), (11, 16, 16), (11, 30, 30))
    maps = torch.randn(5, *grid.shape, generator=torch.Generator().manual_seed(2))
    expected = grid.to_voxels(maps).argmax(0).numpy()
    monkeypatch.setattr("tapct.eval.features.dense._SLAB_BYTES", 1)
    got = grid.argmax_voxels(maps)
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("num_classes", [1, 2, 300])
def test_the_first_of_equal_maps_is_the_largest(num_classes):
    grid = PatchGrid((1, 1, 1), (2, 3, 4), (2, 3, 4))  # a voxel is a patch, so equal maps stay so
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (num_classes, 2, 3, 4))).float()
    np.testing.assert_array_equal(grid.argmax_voxels(maps), maps.numpy().argmax(0))


def test_every_part_of_a_scan_lies_in_the_patch_that_holds_its_centre():
    grid = PatchGrid((4, 8, 8), (10, 30, 30), (10, 50, 47))
    for axis, num in ((0, 10), (1, 50), (2, 47), (2, 94)):
        patch_of = grid.patch_of_voxel(axis, num)
        for i in range(num):
            assert patch_of[i] == int((i + 0.5) * grid.resized[axis] / num / grid.patch[axis])


def test_spacing_of_the_grid_follows_the_resize():
    grid = PatchGrid((4, 8, 8), (96, 128, 128), (96, 256, 512))
    assert grid.spacing_mm((2.5, 0.8, 0.4)) == pytest.approx((10.0, 12.8, 12.8))


def test_tokens_are_rows_in_raster_order():
    features = torch.randn(3, 2, 4, 5)
    dense = DenseFeatures(features, torch.zeros(3), PatchGrid((1, 1, 1), (2, 4, 5), (2, 4, 5)))
    torch.testing.assert_close(dense.tokens_ND()[1 * 20 + 2 * 5 + 3], features[:, 1, 2, 3])


def test_weight_falls_from_centre_to_border():
    torch.testing.assert_close(axis_weight(5, 0.2), torch.tensor([0.2, 0.6, 1.0, 0.6, 0.2]))
    torch.testing.assert_close(axis_weight(1, 0.2), torch.ones(1))


def test_windows_off_the_patch_grid_are_one_line_for_people():
    hu_ZYX = scan((4, 16, 16))
    with pytest.raises(
        UserError, match="preprocess.window .*x10x.* is no multiple of the patch .* along y"
    ):
        dense_features(
            RawPatches(PATCH), hu_ZYX, CONTRACT, Preprocess((0, 0), (4, 10, 16), (4, 4, 16))
        )
    with pytest.raises(
        UserError, match="preprocess.stride .*x6 is no multiple of the patch .* along x"
    ):
        dense_features(
            RawPatches(PATCH), hu_ZYX, CONTRACT, Preprocess((0, 0), (4, 16, 16), (4, 16, 6))
        )
    with pytest.raises(UserError, match=r"preprocess.stride is 8 along z.*skipped"):
        Preprocess((0, 0), (4, 16, 16), (8, 16, 16))


def test_prepared_scan_serves_several_models():
    hu_ZYX, preprocess = scan((6, 20, 20)), Preprocess((16, 16), (4, 16, 16), (2, 8, 8))
    prepared = prepare(hu_ZYX, CONTRACT, preprocess, PATCH)
    before = prepared.input_ZYX.clone()
    for model in (small_vit(), RawPatches(PATCH)):
        shared = features_of(model, prepared, preprocess)
        alone = dense_features(model, hu_ZYX, CONTRACT, preprocess)
        assert torch.equal(shared.features_DZYX, alone.features_DZYX)
    assert torch.equal(prepared.input_ZYX, before)
