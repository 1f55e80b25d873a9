"""Features of scans: several scans in a batch, several blocks in one pass, rows finished in z."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tapct.base.exits import UserError
from tapct.base.geometry import Size3, patch_grid
from tapct.eval.features import extraction
from tapct.eval.features.dense import PatchGrid, WindowVectors
from tapct.eval.features.extraction import Extractor, MemorySink, dense_features, features_of
from tapct.eval.features.prepared import Prepared, prepare
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.features.windows import window_starts
from tapct.eval.models.baselines import PositionFeatures, RawPatches
from tapct.models import vit
from tapct.nn.contracts import Backbone
from tapct.types import HUContract, Tokens

PATCH = (2, 4, 4)
CONTRACT = HUContract()
PREPROCESS = Preprocess((0, 0), (4, 16, 16), (2, 8, 8), 0.5)


def small_vit(depth: int = 3) -> vit.VisionTransformer:
    config = vit.Config(
        window=(4, 16, 16), patch=PATCH, dim=16, depth=depth, heads=2, registers=2, layer_scale=1.0
    )
    model = vit.build(config)
    model.init_weights(3)
    return model.requires_grad_(False).eval()


def scan(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 1500, shape).astype(np.int16)


def truncated(model: vit.VisionTransformer, num_blocks: int) -> vit.VisionTransformer:
    """A copy with the first blocks alone, and the same final norm."""
    short = vit.build(dataclasses.replace(model.config, depth=num_blocks))
    short.load_state_dict({key: model.state_dict()[key] for key in short.state_dict()})
    return short.requires_grad_(False).eval()


def test_features_of_every_block_equal_those_of_a_truncated_network():
    model, hu_ZYX = small_vit(), scan((7, 20, 24))
    dense = dense_features(model, hu_ZYX, CONTRACT, PREPROCESS, blocks=(0, 1))
    assert sorted(dense.blocks) == [0, 1, 2]
    for block, found in dense.blocks.items():
        short = dense_features(truncated(model, block + 1), hu_ZYX, CONTRACT, PREPROCESS)
        assert torch.equal(found.features_DZYX, short.features_DZYX)
        assert torch.equal(found.windows.cls_WD.mean(0), short.cls_D)
    assert torch.equal(dense.features_DZYX, dense.blocks[2].features_DZYX)


def test_several_blocks_take_one_pass(monkeypatch: pytest.MonkeyPatch):
    model, calls = small_vit(), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    prepared = prepare(scan((4, 16, 16)), CONTRACT, PREPROCESS, PATCH)
    features_of(model, prepared, PREPROCESS, blocks=(0, 1))
    assert calls == [0, 1, 2]
    calls.clear()
    model.tokens_of_blocks([torch.zeros(1, 4, 16, 16)], (1,))
    assert calls == [0, 1]  # what nobody asked for is not computed


class OneBlock(Backbone):
    """A user's backbone, which offers only what a backbone must."""

    dim, patch, num_blocks = 4, PATCH, 3

    def forward(self, crops: Sequence[Tensor], masks=None, key=None) -> list[Tokens]:
        return RawPatches(PATCH)(crops)

    def param_group_id(self, name: str) -> int:
        return 0

    def init_weights(self, seed: int) -> None:
        """Nothing to set."""


def test_a_backbone_without_blocks_returns_the_last_one_and_refuses_others():
    model, crops = OneBlock(), [torch.randn(1, 4, 16, 16)]
    (found,) = model.tokens_of_blocks(crops, (2,)).values()
    assert torch.equal(found[0].patches_BND, model(crops)[0].patches_BND)
    with pytest.raises(UserError, match=r"OneBlock returns .* last block \(2\) alone, and block 0"):
        model.tokens_of_blocks(crops, (0, 2))
    for backbone in (model, small_vit()):
        with pytest.raises(UserError, match="block 3 does not exist: .* has the blocks 0 to 2"):
            backbone.tokens_of_blocks(crops, (3,))


def test_windows_of_several_scans_share_batches_and_stay_apart():
    model, sizes = small_vit(), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0][0])))
    real = model.tokens_of_blocks

    def counted(crops, blocks, spacing_mm=None):
        sizes.append(len(crops[0]))
        return real(crops, blocks, spacing_mm)

    model.tokens_of_blocks = counted  # type: ignore[method-assign]
    scans = [scan(shape, seed) for seed, shape in enumerate([(4, 16, 16), (6, 18, 16), (3, 9, 30)])]
    extractor, sinks = Extractor(model, PREPROCESS, batch=4), []
    num_windows = 0
    for hu_ZYX in scans:
        prepared = prepare(hu_ZYX, CONTRACT, PREPROCESS, PATCH)
        sinks.append(MemorySink(prepared.grid, torch.device("cpu")))
        extractor.add(prepared, (0, 2), sinks[-1])
    extractor.flush()
    num_windows = sum(len(sink.windows[2].start_W3) for sink in sinks)
    assert set(sizes[:-1]) == {4} and sum(sizes) == num_windows
    for hu_ZYX, sink in zip(scans, sinks, strict=True):
        alone = dense_features(small_vit(), hu_ZYX, CONTRACT, PREPROCESS, batch=1, blocks=(0,))
        for block, found in sink.dense(2, PREPROCESS.window).blocks.items():
            expected = alone.blocks[block]
            torch.testing.assert_close(
                found.features_DZYX, expected.features_DZYX, atol=1e-5, rtol=0
            )
            torch.testing.assert_close(
                found.windows.cls_WD, expected.windows.cls_WD, atol=1e-5, rtol=0
            )


def test_vectors_of_windows_equal_a_loop():
    model, hu_ZYX = small_vit(), scan((6, 16, 24))
    windows = dense_features(model, hu_ZYX, CONTRACT, PREPROCESS, batch=3).blocks[2].windows
    prepared = prepare(hu_ZYX, CONTRACT, PREPROCESS, PATCH)
    corners = [(z, 0, x) for z in (0, 2) for x in (0, 8)]
    assert windows.start_W3.tolist() == [list(corner) for corner in corners]
    for w, (z, _, x) in enumerate(corners):
        tokens = model([prepared.input_ZYX[None, z : z + 4, :16, x : x + 16]])[0]
        patches = tokens.patches_BND[0].double().numpy()
        for name, expected in (
            ("cls_WD", tokens.cls_BD[0]), ("registers_WRD", tokens.registers_BRD[0]),
            ("mean_WD", patches.mean(0)), ("std_WD", patches.std(0)), ("max_WD", patches.max(0)),
        ):  # fmt: skip
            got = getattr(windows, name)[w].numpy()
            np.testing.assert_allclose(got, np.asarray(expected), atol=1e-5)


class Watcher:
    """A sink that notes which rows come, and when."""

    def __init__(self, calls: list[int]) -> None:
        self.calls, self.rows_seen, self.at_call = calls, [], []

    def rows(self, block: int, first: int, rows_ZYXD: Tensor) -> None:
        self.rows_seen += range(first, first + len(rows_ZYXD))
        self.at_call.append(len(self.calls))

    def finish(self, block: int, windows: WindowVectors) -> None:
        self.finished = block


def test_rows_are_finished_as_soon_as_no_later_window_covers_them():
    calls: list[int] = []
    model = RawPatches(PATCH)
    model.register_forward_hook(lambda *_: calls.append(1))
    prepared = prepare(scan((40, 16, 16)), CONTRACT, PREPROCESS, PATCH)
    watcher = Watcher(calls)
    extractor = Extractor(model, PREPROCESS, batch=1)
    extractor.add(prepared, (0,), watcher)
    assert watcher.rows_seen == list(range(20))  # each row once, in order
    assert watcher.at_call == list(range(2, 20)) + [19]  # one window later, and at the end
    assert watcher.finished == 0


def test_a_moving_point_moves_the_features_and_its_place_in_mm():
    """A bright patch of a resized, padded scan is found where the formula puts it."""
    original, size = (9, 40, 60), (20, 30)
    preprocess = Preprocess(size, (4, 16, 16), (2, 8, 8), 0.5)
    spacing_mm = (3.0, 0.8, 0.7)
    grid = PatchGrid.of_scan(original, preprocess, PATCH)
    assert grid.shape == (5, 5, 8)  # 9 slices and 30 columns are no multiple of the patch
    model = RawPatches(PATCH)
    # a patch has 2x8x8 voxels of the scan: resized by one half in-plane
    for at in [(0, 0, 0), (2, 3, 4), (3, 4, 6), (1, 0, 7)]:
        hu_ZYX = np.full(original, -1000, np.int16)
        z, y, x = (slice(i * n, (i + 1) * n) for i, n in zip(at, (2, 8, 8), strict=True))
        hu_ZYX[z, y, x] = 800
        dense = dense_features(model, hu_ZYX, CONTRACT, preprocess)
        brightness = dense.features_DZYX.mean(0)
        assert np.unravel_index(int(brightness.argmax()), brightness.shape) == at
        bright = np.argwhere(hu_ZYX == 800)
        if at[2] < 7:  # the last patch reaches beyond the scan
            centre_mm = bright.mean(0) * spacing_mm
            assert grid.centre_mm(at, spacing_mm) == pytest.approx(tuple(centre_mm))
    one, two = (grid.centre_mm((i, i, i), spacing_mm) for i in (0, 1))
    step = [b - a for a, b in zip(one, two, strict=True)]
    assert step == pytest.approx(list(grid.spacing_mm(spacing_mm)))
    # the way back to voxels agrees: a map of the centre's position, read at a voxel
    for axis in range(3):
        line = torch.tensor(
            [grid.centre_mm((i, i, i), spacing_mm)[axis] for i in range(grid.shape[axis])],
            dtype=torch.float32,
        )
        got = grid.matrix(axis) @ line
        voxel_mm = torch.arange(original[axis]) * spacing_mm[axis]
        inside = (voxel_mm >= line[0]) & (voxel_mm <= line[-1])
        torch.testing.assert_close(got[inside], voxel_mm[inside], atol=1e-4, rtol=0)


def body_scan() -> np.ndarray:
    """A body with a thin table below it."""
    hu_ZYX = np.full((8, 64, 64), -1000, np.int16)
    hu_ZYX[2:, 10:50, 16:56] = 40
    hu_ZYX[:, 58:59, 4:60] = 300
    return hu_ZYX


def test_position_is_the_place_in_the_box_of_the_body_and_its_products():
    preprocess = Preprocess((0, 0), (4, 32, 32), (2, 16, 16), 0.5)
    model = PositionFeatures(PATCH, CONTRACT)
    prepared = prepare(body_scan(), CONTRACT, preprocess, PATCH)
    low, high = model.body_box(prepared).tolist()
    assert (low[0], high[0]) == (2, 8)
    assert low[1:] == pytest.approx([10, 16], abs=1) and high[1:] == pytest.approx([50, 56], abs=1)
    dense = features_of(model, prepared, preprocess, batch=5)
    for z, y, x in [(0, 0, 0), (2, 7, 9), (3, 15, 15)]:
        place = [
            2 * ((i + 0.5) * p - a) / (b - a) - 1
            for i, p, a, b in zip((z, y, x), PATCH, low, high, strict=True)
        ]
        pz, py, px = place
        expected = [*place, *(v * v for v in place), pz * py, pz * px, py * px]
        np.testing.assert_allclose(dense.features_DZYX[:, z, y, x], expected, atol=1e-5)


def test_position_does_not_see_what_is_inside_the_body():
    preprocess = Preprocess((0, 0), (4, 32, 32), (2, 16, 16))
    model, other = PositionFeatures(PATCH, CONTRACT), body_scan()
    other[4:6, 20:30, 20:30] = 500
    one, two = (dense_features(model, hu, CONTRACT, preprocess) for hu in (body_scan(), other))
    assert torch.equal(one.features_DZYX, two.features_DZYX)
    empty = dense_features(model, np.full((4, 32, 32), -1000, np.int16), CONTRACT, preprocess)
    assert empty.features_DZYX[0, :, 0, 0].tolist() == pytest.approx([-0.5, 0.5])


def test_a_failed_call_leaves_the_model_in_its_mode():
    class Broken(RawPatches):
        def forward(self, crops):
            raise RuntimeError("broken")

    model: nn.Module = copy.deepcopy(Broken(PATCH)).train()
    with pytest.raises(RuntimeError, match="broken"):
        dense_features(model, scan((4, 16, 16)), CONTRACT, PREPROCESS)
    assert model.training


def test_memory_does_not_grow_with_the_depth_of_a_scan(monkeypatch: pytest.MonkeyPatch):
    """What waits for the end of a scan is as small as the vectors of its windows."""
    held, real = [], extraction._BlockSums.finish

    def measured(sums: extraction._BlockSums) -> None:
        assert sums.vectors is not None and sums.total_ZYXD is not None
        kept = [getattr(sums.vectors, name) for name in ("cls_WD", "mean_WD", "std_WD", "max_WD")]
        kept.append(sums.vectors.registers_WRD)
        num_bytes = sum(one.untyped_storage().nbytes() for one in kept)
        held.append(num_bytes / sums.num_windows)
        assert len(sums.total_ZYXD) == 2  # one window's depth
        real(sums)

    monkeypatch.setattr(extraction._BlockSums, "finish", measured)
    for depth in (20, 80):
        prepared = prepare(scan((depth, 16, 16)), CONTRACT, PREPROCESS, PATCH)
        features_of(small_vit(), prepared, PREPROCESS, batch=4)
    vectors = 4 * 16 * (1 + 2 + 3)  # bytes: class token, registers, mean, std and max
    assert held == [vectors, vectors]


class CornerModel(nn.Module):
    """A backbone whose class token is the smallest voxel of its window along each of three ramps:
    it shows where the window begins.
    """

    def __init__(self, patch: Size3, width: int) -> None:
        super().__init__()
        self.patch, self.dim, self.width = patch, 3, width

    def forward(self, crops: Sequence[Tensor]) -> list[Tokens]:
        found = []
        for crop_BZYX in crops:
            grid = patch_grid(tuple(crop_BZYX.shape[1:]), self.patch, "window")
            code_B = crop_BZYX[:, 0, 0, 0].round().long()
            yx_B = code_B % self.width**2
            places = (code_B // self.width**2, yx_B // self.width, yx_B % self.width)
            cls_B3 = torch.stack(places, 1).float()
            patches_BN3 = torch.zeros(len(cls_B3), math.prod(grid), 3)
            found.append(Tokens(cls_B3, patches_BN3[:, :0], patches_BN3, grid))
        return found


@pytest.mark.parametrize(
    ("stride", "refine"),
    [
        ((4, 8, 8), (1, 1, 1)),
        ((2, 16, 8), (1, 1, 1)),
        ((4, 12, 4), (1, 2, 2)),
        ((2, 4, 12), (1, 2, 2)),
    ],
)
def test_the_class_token_around_a_patch_is_that_of_the_windows_next_to_it(
    stride: Size3, refine: Size3
) -> None:
    shape, window, patch, width = (10, 30, 44), (4, 16, 16), (2, 8, 8), 64
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    code_ZYX = torch.from_numpy((z * width + y) * width + x).float()
    preprocess = Preprocess(window=window, stride=stride, refine=refine)
    cell = preprocess.cell(patch)
    grid = PatchGrid(cell, shape, shape)
    padded = [-(-n // side) * side for n, side in zip(shape, patch, strict=True)]
    pads = [one for n, full in zip(shape[::-1], padded[::-1]) for one in (0, full - n)]
    prepared = Prepared(nn.functional.pad(code_ZYX, pads), grid)
    dense = features_of(CornerModel(patch, width), prepared, preprocess)
    found_N3 = dense.cls_around_ND()
    # another derivation: a class token is the first voxel of its window, so along each axis the
    # answer is the first voxel of a window that lies around the patch, unless that is no place
    expected = []
    for axis in range(3):
        starts = np.array(window_starts(padded[axis], window[axis], stride[axis]), float)
        centre = (np.arange(grid.shape[axis]) + 0.5) * cell[axis]
        first = centre - window[axis] / 2
        expected.append(np.clip(first, starts[0], starts[-1]))
    expected_ZYX3 = np.stack(np.meshgrid(*expected, indexing="ij"), -1)
    np.testing.assert_allclose(found_N3.numpy(), expected_ZYX3.reshape(-1, 3), atol=1e-4)


def test_class_tokens_around_patches_need_the_windows() -> None:
    dense = dense_features(small_vit(), scan((4, 16, 16), 0), CONTRACT, PREPROCESS)
    assert dense.cls_around_ND().shape == dense.tokens_ND().shape
    with pytest.raises(ValueError, match="features_of"):
        replace(dense, window=None).cls_around_ND()
