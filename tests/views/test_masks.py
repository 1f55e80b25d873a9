from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from tapct.types import UserError
from tapct.views import masks

CONFIG = masks.Config()
GRIDS = [(3, 28, 28), (2, 8, 8), (1, 14, 14), (3, 2, 2), (1, 1, 1), (6, 6, 6)]


def draw(
    counts: list[int], grid: tuple[int, int, int], samples: list[int], config: masks.Config = CONFIG, seed: int = 0,
    in_scan: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    num = math.prod(grid)
    views = len(counts) // len(samples)
    everywhere = torch.ones(views, len(samples), num, dtype=torch.bool)
    in_scan = everywhere if in_scan is None else in_scan
    return masks.draw(counts, grid, in_scan, torch.tensor(samples), config, seed)


@pytest.mark.parametrize("num_crops", [1, 2, 3, 16, 100, 257])
@pytest.mark.parametrize("probability", [0.0, 0.29, 0.5, 1.0])
def test_counts_are_those_of_the_formula(num_crops: int, probability: float) -> None:
    config = replace(CONFIG, probability=probability)
    got = masks.counts(config, num_crops_global=num_crops, num_tokens=2352, seed=1, step=7)
    num_masked = math.floor(round(num_crops * probability, 6))
    edges = np.linspace(0.1, 0.5, num_masked + 1)
    want = [0] * (num_crops - num_masked) + [int(2352 * edge + 1e-9) for edge in edges[1:]]
    assert all(isinstance(count, int) for count in got) and sorted(got) == sorted(want)
    if num_masked:
        assert max(got) == 2352 // 2


def test_which_crop_gets_which_count_depends_on_seed_and_step_alone() -> None:
    def at(seed: int, step: int) -> list[int]:
        return masks.counts(CONFIG, num_crops_global=32, num_tokens=196, seed=seed, step=step)

    assert at(0, 3) == at(0, 3)
    assert at(0, 3) != at(0, 4) and at(0, 3) != at(1, 3) and sorted(at(0, 3)) == sorted(at(0, 4))
    chosen = np.array([[count > 0 for count in at(0, step)] for step in range(400)])
    assert np.abs(chosen.mean(0) - 0.5).max() < 0.12  # no crop is favoured
    mean = np.array([at(0, step) for step in range(400)]).mean(0)
    assert mean.std() < 0.1 * mean.mean()


@pytest.mark.parametrize("grid", GRIDS)
def test_counts_are_exact_for_every_grid_and_every_count(grid: tuple[int, int, int]) -> None:
    num = math.prod(grid)
    counts = sorted(
        {0, 1, 2, 3, 4, 5, num // 10, num // 3, num // 2, int(num * 0.9), num - 1, num} & set(range(num + 1))
    )
    drawn = draw(counts * 2, grid, list(range(len(counts))))
    assert drawn.masked_VBN.shape == (2, len(counts), num) and drawn.masked_VBN.dtype == torch.bool
    assert drawn.masked_VBN.sum(2).flatten().tolist() == counts * 2


def test_index_and_weight_follow_the_mask_in_order() -> None:
    counts = [10, 0, 64, 3]
    drawn = draw(counts, (2, 8, 8), [4, 9])
    flat = drawn.masked_VBN.flatten()
    assert torch.equal(drawn.index_M, flat.nonzero().squeeze(1)) and drawn.index_M.dtype == torch.int64
    want = torch.cat([torch.full((count,), 1 / max(count, 1)) for count in counts])
    assert torch.equal(drawn.weight_M, want) and drawn.weight_M.dtype == torch.float32
    none = draw([0, 0, 0, 0], (2, 8, 8), [4, 9])
    assert none.index_M.shape == (0,) and none.weight_M.shape == (0,) and not none.masked_VBN.any()


def test_a_crops_mask_does_not_depend_on_its_batch() -> None:
    grid, count = (3, 28, 28), 700
    among = draw([50, count, 0, 3, 900, 7], grid, [5, 11, 6])
    alone = draw([count, 900], grid, [11])
    assert torch.equal(among.masked_VBN[0, 1], alone.masked_VBN[0, 0])
    assert torch.equal(among.masked_VBN[1, 1], alone.masked_VBN[1, 0])
    same_count = draw([count] * 4, grid, [11, 12]).masked_VBN.flatten(0, 1)
    other_seed = draw([count], grid, [11], seed=1).masked_VBN[0, 0]
    distinct = {tuple(m.tolist()) for m in [*same_count, other_seed]}
    assert len(distinct) == 5  # view, sample and seed all count


def test_single_draws_differ_between_views_samples_and_seeds() -> None:
    """Counts below a block's smallest volume are single draws alone."""
    grid, first = (3, 28, 28), draw([3] * 4, (3, 28, 28), [11, 12]).masked_VBN.flatten(0, 1)
    other_seed = draw([3], grid, [11], seed=1).masked_VBN[0, 0]
    assert len({tuple(m.tolist()) for m in [*first, other_seed]}) == 5


def test_padding_is_masked_last_and_weighs_nothing() -> None:
    grid, num = (2, 8, 8), 128
    in_scan = torch.ones(1, 4, num, dtype=torch.bool)
    in_scan[0, :3, 64:] = False  # the second layer is padding in three of four
    counts = [40, 64, 100, 100]
    drawn = draw(counts, grid, [0, 1, 2, 3], in_scan=in_scan)
    masked = drawn.masked_VBN[0]
    assert masked.sum(1).tolist() == counts
    assert (masked & ~in_scan[0]).sum(1).tolist() == [0, 0, 36, 0]
    crop = drawn.index_M // num
    real = in_scan.flatten()[drawn.index_M]
    for c, real_count in enumerate([40, 64, 64, 100]):
        mine = drawn.weight_M[crop == c]
        assert torch.equal(mine[real[crop == c]], torch.full((real_count,), 1 / real_count))
        assert (mine[~real[crop == c]] == 0).all() and abs(mine.sum() - 1) < 1e-5
    nothing = draw([5], grid, [0], in_scan=torch.zeros(1, 1, num, dtype=torch.bool))
    assert torch.equal(nothing.weight_M, torch.zeros(5)) and nothing.masked_VBN.sum() == 5


@pytest.mark.parametrize(("grid", "least"), [((3, 28, 28), 0.93), ((2, 8, 8), 0.9), ((1, 14, 14), 0.9)])
def test_most_masked_tokens_come_from_blocks(grid: tuple[int, int, int], least: float) -> None:
    num = math.prod(grid)
    samples = torch.arange(200)
    for ratio in (0.1, 0.3, 0.5):
        count_C = torch.full((200,), int(num * ratio))
        in_scan = torch.ones(200, num, dtype=torch.bool)
        blocked = masks.blocks(count_C, grid, in_scan, (torch.zeros_like(samples), samples), CONFIG, 0)
        assert (blocked.sum(1) <= count_C).all()
        assert blocked.sum() / count_C.sum() > least
        final = draw(count_C.tolist(), grid, samples.tolist()).masked_VBN[0]
        assert torch.equal(final & blocked, blocked)  # topping up only adds


def test_masks_are_clumped_and_every_token_has_its_chance() -> None:
    grid, num = (3, 28, 28), 2352
    drawn = draw([num // 3] * 600, grid, list(range(600))).masked_VBN[0].unflatten(1, grid).float()
    neighbours = (drawn[..., 1:] * drawn[..., :-1]).mean() / drawn.mean()
    assert neighbours > 0.75  # single draws would give 1 / 3
    share = drawn.mean(0)
    assert 0.003 < share.min() and share.max() < 0.75  # a block rarely reaches a corner, and never forgets one
    sizes = [np.bincount(ndimage.label(m)[0].ravel())[1:].max() for m in drawn[:50].numpy()]
    assert np.median(sizes) > 0.4 * num / 3


def test_block_sides_keep_volume_and_aspect_inside_a_large_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    volume = 2000 + 20000 * torch.rand(3000, generator=generator)
    low, high = math.log(0.3), math.log(1 / 0.3)
    height_width, depth_height = (torch.exp(low + (high - low) * torch.rand(3000, generator=generator)) for _ in "ab")
    depth, height, width = masks.block_sides(volume, height_width, depth_height, (500, 500, 500))
    assert (depth * height * width / volume).log().abs().max() < 0.25  # whole tokens
    assert ((height / width) / height_width).log().abs().max() < 0.25
    assert ((depth / height) / depth_height).log().abs().max() < 0.25
    for side in (depth, height, width):
        assert torch.equal(side, side.round()) and side.min() >= 1


def test_statistics_of_single_blocks_are_those_of_their_bounding_boxes() -> None:
    grid, num = (1, 60, 60), 3600
    config, counts, samples = replace(CONFIG, min_tokens=400), [420] * 300, torch.arange(300)
    in_scan = torch.ones(1, 300, num, dtype=torch.bool)
    told = masks.statistics(counts, grid, in_scan, samples, config, 3)
    blocked = masks.blocks(torch.tensor(counts), grid, in_scan[0], (torch.zeros_like(samples), samples), config, 3)
    boxes = [ndimage.find_objects(block.reshape(60, 60).astype(int))[0] for block in blocked.numpy()]
    height, width = (np.array([box[axis].stop - box[axis].start for box in boxes]) for axis in (0, 1))
    whole = blocked.sum(1).numpy() == height * width  # a block that was too large lost its last tokens
    assert whole.mean() > 0.4 and told.blocks == 1.0
    assert told.share_in_blocks == pytest.approx(float(blocked.sum()) / sum(counts))
    assert told.height_width == pytest.approx(np.quantile(height / width, [0.05, 0.5, 0.95]), rel=0.05)
    assert told.depth_height == pytest.approx(np.quantile(1 / height, [0.05, 0.5, 0.95]), rel=0.05)
    assert 380 < told.volume[0] < told.volume[1] < told.volume[2] < 460


def test_statistics_of_the_published_grid() -> None:
    counts = masks.counts(CONFIG, num_crops_global=128, num_tokens=2352, seed=0, step=0)
    in_scan = torch.ones(2, 64, 2352, dtype=torch.bool)
    told = masks.statistics(counts, (3, 28, 28), in_scan, torch.arange(64), CONFIG, 0)
    assert told.share_in_blocks > 0.98 and 3 < told.blocks <= masks.ROUNDS
    assert told.volume[0] >= 3 and told.volume[2] < 2352 * 0.5 * 1.2
    assert told.height_width[0] * told.height_width[2] == pytest.approx(1, abs=0.15)  # log-uniform: as tall as wide
    with pytest.raises(ValueError, match="mask more tokens"):
        masks.statistics([0, 3], (3, 28, 28), in_scan[:, :1], torch.arange(1), CONFIG, 0)


@pytest.mark.parametrize("grid", [(1, 14, 14), (3, 28, 28)])
def test_a_shallow_grid_keeps_the_volume_and_the_in_plane_aspect(grid: tuple[int, int, int]) -> None:
    volume = torch.full((1000,), 0.25 * math.prod(grid))
    height_width = torch.logspace(-0.25, 0.25, 1000)
    depth, height, width = masks.block_sides(volume, height_width, torch.ones(1000), grid)
    assert (depth == grid[0]).all() and (height <= grid[1]).all() and (width <= grid[2]).all()
    assert abs((depth * height * width / volume).log()).max() < 0.3
    assert ((height / width) / height_width).log().abs().max() < 0.3


def test_drawn_aspects_are_log_uniform_in_the_declared_range() -> None:
    """A 60 x 60 grid and one block: its bounding box tells the sides."""
    grid, num = (1, 60, 60), 3600
    config = replace(CONFIG, aspect=(0.3, 1 / 0.3), min_tokens=400)
    blocked = masks.blocks(
        torch.full((600,), 420), grid, torch.ones(600, num, dtype=torch.bool),
        (torch.zeros(600, dtype=torch.int64), torch.arange(600)), config, 3,
    ).unflatten(1, grid)[:, 0]  # fmt: skip
    height, width = blocked.any(2).sum(1).double(), blocked.any(1).sum(1).double()
    log_aspect = (height / width).log()
    low, high = math.log(0.3), math.log(1 / 0.3)
    assert log_aspect.min() > low - 0.15 and log_aspect.max() < high + 0.15
    bins = np.histogram(log_aspect.numpy(), bins=6, range=(low - 0.1, high + 0.1))[0]
    assert bins.min() > 0.6 * bins.max() * 0.8 and abs(log_aspect.mean()) < 0.1


CHANGES: dict[str, Any] = {"probability": 0.25, "ratio": (0.3, 0.6), "min_tokens": 40, "aspect": (1.0, 1.0)}


@pytest.mark.parametrize("field", [f.name for f in fields(masks.Config)])
def test_every_field_changes_the_masks(field: str) -> None:
    drawn = []
    for config in (CONFIG, replace(CONFIG, **{field: CHANGES[field]})):
        counts = masks.counts(config, num_crops_global=8, num_tokens=2352, seed=0, step=0)
        drawn.append(draw(counts, (3, 28, 28), [0, 1, 2, 3], config).masked_VBN)
    assert not torch.equal(*drawn)


def test_bounds_the_wrong_way_round_are_refused() -> None:
    wrong: Any = (0.9, 0.5)
    for field in ("ratio", "aspect"):
        with pytest.raises(UserError, match=f"masks.{field}"):
            replace(CONFIG, **{field: wrong})


def test_top_up_is_uniform_over_the_tokens_left() -> None:
    """Counts below a block's smallest volume are single draws alone."""
    drawn = draw([3] * 4000, (1, 5, 5), list(range(4000))).masked_VBN[0]
    assert stats.chisquare(drawn.sum(0).numpy()).pvalue > 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_on_a_gpu_equal_those_on_the_host_and_never_wait() -> None:
    counts = masks.counts(CONFIG, num_crops_global=16, num_tokens=2352, seed=0, step=0)
    in_scan = torch.ones(2, 8, 2352, dtype=torch.bool)
    in_scan[:, 3, 1000:] = False
    arguments = (in_scan.cuda(), torch.arange(8, device="cuda"))
    masks.draw(counts, (3, 28, 28), *arguments, CONFIG, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        device = masks.draw(counts, (3, 28, 28), *arguments, CONFIG, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = masks.draw(counts, (3, 28, 28), in_scan, torch.arange(8), CONFIG, 0)
    assert (host.masked_VBN != device.masked_VBN.cpu()).double().mean() < 0.01  # a side may round the other way
    assert len(host.index_M) == len(device.index_M)
