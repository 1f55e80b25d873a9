from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from tapct.base import rng
from tapct.base.exits import UserError
from tapct.views import masks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))
import mask_statistics

CONFIG = masks.Config()
GRIDS = [(3, 28, 28), (2, 8, 8), (1, 14, 14), (3, 2, 2), (1, 1, 1), (6, 6, 6)]


def draw(
    counts: list[int],
    grid: tuple[int, int, int],
    samples: list[int],
    config: masks.Config = CONFIG,
    seed: int = 0,
    in_scan: torch.Tensor | None = None,
) -> Any:
    num = math.prod(grid)
    views = len(counts) // len(samples)
    everywhere = torch.ones(views, len(samples), num, dtype=torch.bool)
    in_scan = everywhere if in_scan is None else in_scan
    return masks.draw(counts, grid, in_scan, torch.tensor(samples), config, seed)


def choice(
    counts: list[int], grid: tuple[int, int, int], config: masks.Config = CONFIG, seed: int = 0
) -> masks.Choice:
    """Of one view of samples 0, 1, ..., all in the scan."""
    everywhere = torch.ones(1, len(counts), math.prod(grid), dtype=torch.bool)
    return masks.choose(np.array(counts), grid, everywhere, torch.arange(len(counts)), config, seed)


def boxes(made: masks.Choice, grid: tuple[int, int, int], block: int) -> np.ndarray:
    """Sides (P, 3) of a block, from the tokens that it covers; it covers all of its bounding
    box.
    """
    sides = []
    for covered in ((made.word_PN >> block) & 1).reshape(-1, *grid).numpy():
        (box,) = ndimage.find_objects(covered.astype(int))
        assert covered[box].all()
        sides.append([line.stop - line.start for line in box])
    return np.array(sides)


def numbers_of(sample: int, view: int, seed: int) -> Iterator[float]:
    """What a mask is drawn from: hashes of Python integers, cut into four, the lowest bits
    first.
    """
    for part in range(20):
        word = rng.hash_int(seed, "mask", sample * 2**20 + view * 2**8 + part)
        for cut in range(4):
            bits = (word >> (16 * cut)) & 0xFFFF
            yield (bits - 2**16 if bits >= 2**15 else bits) / 2**16 + 0.5


def slow_mask(
    count: int,
    grid: tuple[int, int, int],
    in_scan: np.ndarray,
    sample: int,
    view: int,
    config: masks.Config,
    seed: int,
) -> np.ndarray:
    """One crop, block after block and token after token."""
    drawn = list(numbers_of(sample, view, seed))
    shape, place = (np.array(drawn[i * 39 : (i + 1) * 39]).reshape(3, 13).T for i in range(2))
    low, high = (math.log(edge) for edge in config.aspect)
    masked, left = np.zeros(math.prod(grid), dtype=bool), float(count)
    for (share, *ratios), where in zip(shape, place, strict=True):
        volume = config.min_tokens + max(left - config.min_tokens, 0) * share
        left -= left * share * (1 - masks.OVERLAP * count / len(masked))
        height_width, depth_height = (math.exp(low + (high - low) * ratio) for ratio in ratios)
        depth = min(
            max(round((volume * height_width / depth_height) ** (1 / 3) * depth_height), 1), grid[0]
        )
        height = min(max(round(math.sqrt(volume / depth * height_width)), 1), grid[1])
        width = min(max(round(math.sqrt(volume / depth / height_width)), 1), grid[2])
        starts = [
            int(u * (size - side + 1))
            for u, size, side in zip(where, grid, (depth, height, width), strict=True)
        ]
        for token in range(len(masked) if count >= config.min_tokens else 0):
            at = np.unravel_index(token, grid)
            inside = all(
                0 <= a - b < side
                for a, b, side in zip(at, starts, (depth, height, width), strict=True)
            )
            if inside and in_scan[token] and masked.sum() < count:
                masked[token] = True
    for free in ((~masked & in_scan).nonzero()[0], (~masked & ~in_scan).nonzero()[0]):
        missing = min(count - masked.sum(), len(free))
        start = int(drawn[78] * len(free))
        masked[np.roll(free, -start)[:missing]] = True
    return masked


@pytest.mark.parametrize("grid", [(3, 14, 14), (1, 9, 7), (2, 4, 40)])
def test_masks_are_those_of_a_loop_over_crops_blocks_and_tokens(grid: tuple[int, int, int]) -> None:
    num, config = math.prod(grid), replace(CONFIG, min_tokens=6)
    counts, samples = (
        [0, 5, 6, num // 10, num // 4, num // 2, num // 2 + 7, num - 3, num, 1],
        [7, 10**9, 2, 12345, 3],
    )
    in_scan = torch.ones(2, 5, num, dtype=torch.bool)
    in_scan[0, 4, num // 3 :] = False
    in_scan[1, 1:3, : num // 2] = False
    drawn = draw(counts, grid, samples, config, 11, in_scan).masked_VBN.flatten(0, 1).numpy()
    for crop, count in enumerate(counts):
        view, sample = crop // 5, samples[crop % 5]
        want = slow_mask(count, grid, in_scan[view, crop % 5].numpy(), sample, view, config, 11)
        assert np.array_equal(drawn[crop], want), (grid, crop)


def test_a_grid_of_more_tokens_than_an_int16_counts() -> None:
    grid = (8, 66, 66)
    drawn = draw([34000, 17000], grid, [3, 4]).masked_VBN[0]
    assert drawn.sum(1).tolist() == [34000, 17000]
    want = slow_mask(9, grid, np.ones(34848, dtype=bool), 5, 0, CONFIG, 0)
    assert np.array_equal(draw([9], grid, [5]).masked_VBN[0, 0].numpy(), want)


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
        {0, 1, 2, 3, 4, 5, num // 10, num // 3, num // 2, int(num * 0.9), num - 1, num}
        & set(range(num + 1))
    )
    drawn = draw(counts * 2, grid, list(range(len(counts))))
    assert drawn.masked_VBN.shape == (2, len(counts), num) and drawn.masked_VBN.dtype == torch.bool
    assert drawn.masked_VBN.sum(2).flatten().tolist() == counts * 2


def test_index_and_weight_follow_the_mask_in_order() -> None:
    counts = [10, 0, 64, 3]
    drawn = draw(counts, (2, 8, 8), [4, 9])
    flat = drawn.masked_VBN.flatten()
    assert (
        torch.equal(drawn.index_M, flat.nonzero().squeeze(1)) and drawn.index_M.dtype == torch.int64
    )
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


@pytest.mark.parametrize(
    ("grid", "least"), [((3, 28, 28), 0.97), ((2, 8, 8), 0.97), ((1, 14, 14), 0.97)]
)
def test_most_masked_tokens_come_from_blocks(grid: tuple[int, int, int], least: float) -> None:
    for ratio in (0.1, 0.3, 0.5):
        counts = [int(math.prod(grid) * ratio)] * 200
        blocked = mask_statistics.in_blocks_PN(choice(counts, grid))
        assert blocked.sum() / sum(counts) > least
        final = draw(counts, grid, list(range(200))).masked_VBN[0]
        assert torch.equal(final & blocked, blocked)  # topping up only adds


def test_masks_are_clumped_and_every_token_has_its_chance() -> None:
    grid, num = (3, 28, 28), 2352
    drawn = draw([num // 3] * 600, grid, list(range(600))).masked_VBN[0].unflatten(1, grid).float()
    neighbours = (drawn[..., 1:] * drawn[..., :-1]).mean() / drawn.mean()
    assert neighbours > 0.75  # single draws would give 1 / 3
    share = drawn.mean(0)
    assert (
        0.003 < share.min() and share.max() < 0.75
    )  # a block rarely reaches a corner, and never forgets one
    sizes = [np.bincount(ndimage.label(m)[0].ravel())[1:].max() for m in drawn[:50].numpy()]
    assert np.median(sizes) > 0.4 * num / 3


def test_block_sides_keep_volume_and_aspect_inside_a_large_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    volume = 2000 + 20000 * torch.rand(3000, generator=generator)
    low, high = math.log(0.3), math.log(1 / 0.3)
    height_width, depth_height = (
        torch.exp(low + (high - low) * torch.rand(3000, generator=generator)) for _ in "ab"
    )
    depth, height, width = masks.block_sides(volume, height_width, depth_height, (500, 500, 500))
    assert (depth * height * width / volume).log().abs().max() < 0.25  # whole tokens
    assert ((height / width) / height_width).log().abs().max() < 0.25
    assert ((depth / height) / depth_height).log().abs().max() < 0.25
    for side in (depth, height, width):
        assert torch.equal(side, side.round()) and side.min() >= 1


def test_statistics_are_those_of_the_bounding_boxes() -> None:
    grid, counts = (2, 60, 60), [1700] * 100
    measured = mask_statistics.statistics(
        counts, grid, torch.ones(1, 100, 7200, dtype=torch.bool), torch.arange(100), CONFIG, 3
    )
    made = choice(counts, grid, seed=3)
    union, placed = np.zeros((100, 7200), dtype=bool), []
    for block in range(masks.ROUNDS):
        more = union | ((made.word_PN >> block) & 1).bool().numpy()
        placed.append(boxes(made, grid, block)[(union.sum(1) < 1700) | (more.sum(1) <= 1700)])
        union = more
    depth, height, width = np.concatenate(placed).T
    assert measured.blocks == len(depth) / 100
    assert measured.share_in_blocks == pytest.approx(np.minimum(union.sum(1), 1700).mean() / 1700)
    for name, values in [
        ("volume", depth * height * width),
        ("height_width", height / width),
        ("depth_height", depth / height),
    ]:
        assert getattr(measured, name) == pytest.approx(np.quantile(values, [0.05, 0.5, 0.95]))


def test_statistics_of_the_published_grid() -> None:
    counts = masks.counts(CONFIG, num_crops_global=128, num_tokens=2352, seed=0, step=0)
    in_scan = torch.ones(2, 64, 2352, dtype=torch.bool)
    measured = mask_statistics.statistics(counts, (3, 28, 28), in_scan, torch.arange(64), CONFIG, 0)
    assert measured.share_in_blocks > 0.98 and 3 < measured.blocks <= masks.ROUNDS
    assert measured.volume[0] >= 3 and measured.volume[2] < 2352 * 0.5 * 1.2
    assert measured.height_width[0] * measured.height_width[2] == pytest.approx(
        1, abs=0.15
    )  # log-uniform: as tall as wide
    with pytest.raises(ValueError, match="mask more tokens"):
        mask_statistics.statistics([0, 3], (3, 28, 28), in_scan[:, :1], torch.arange(1), CONFIG, 0)


@pytest.mark.parametrize("grid", [(1, 14, 14), (3, 28, 28)])
def test_a_shallow_grid_keeps_the_volume_and_the_in_plane_aspect(
    grid: tuple[int, int, int],
) -> None:
    volume = torch.full((1000,), 0.25 * math.prod(grid))
    height_width = torch.logspace(-0.25, 0.25, 1000)
    depth, height, width = masks.block_sides(volume, height_width, torch.ones(1000), grid)
    assert (depth == grid[0]).all() and (height <= grid[1]).all() and (width <= grid[2]).all()
    assert abs((depth * height * width / volume).log()).max() < 0.3
    assert ((height / width) / height_width).log().abs().max() < 0.3


def test_drawn_aspects_are_log_uniform_in_the_declared_range() -> None:
    config, grid = replace(CONFIG, aspect=(0.3, 1 / 0.3), min_tokens=400), (1, 60, 60)
    _, height, width = (
        torch.from_numpy(boxes(choice([420] * 600, grid, config, 3), grid, 0)).double().T
    )
    log_aspect = (height / width).log()
    low, high = math.log(0.3), math.log(1 / 0.3)
    assert log_aspect.min() > low - 0.15 and log_aspect.max() < high + 0.15
    bins = np.histogram(log_aspect.numpy(), bins=6, range=(low - 0.1, high + 0.1))[0]
    assert bins.min() > 0.6 * bins.max() * 0.8 and abs(log_aspect.mean()) < 0.1


CHANGES: dict[str, Any] = {
    "probability": 0.25,
    "ratio": (0.3, 0.6),
    "min_tokens": 40,
    "aspect": (1.0, 1.0),
}


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
    assert torch.equal(host.masked_VBN, device.masked_VBN.cpu())
    assert torch.equal(host.index_M, device.index_M.cpu())
    assert torch.equal(host.weight_M, device.weight_M.cpu())
