from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from scipy import stats

from tapct.types import HUContract
from tapct.views import boxes
from tapct.views.boxes import Rule

RULE = Rule((8, 32, 32), (0.1, 0.6), (3 / 4, 4 / 3), (1.0, 1.0), 0.0, 4, (0.0, 0.0, 0.0))


def draw(
    rule: Rule,
    num: int,
    extent: tuple[int, int, int],
    cells: torch.Tensor | None = None,
    seed: int = 0,
) -> boxes.Boxes:
    cells = torch.ones(1, 4, 8, 8) if cells is None else cells
    extent_B3 = torch.tensor([extent]).expand(num, 3)
    return boxes.draw(
        rule, "local", 2, cells.expand(num, -1, -1, -1), extent_B3, torch.arange(num), seed
    )


def share_of(drawn: boxes.Boxes, cells: torch.Tensor) -> torch.Tensor:
    """Share of body in each drawn box, (V, B)."""
    cells = cells.expand(drawn.start_VB3.shape[1], -1, -1, -1)
    share = boxes.body_share(cells, drawn.start_VB3[:, :, None], drawn.length_VB3[:, :, None])
    return share.squeeze(2)


@pytest.mark.parametrize("extent", [(16, 64, 64), (16, 60, 90), (16, 512, 512)])
def test_boxes_lie_in_the_scan_with_the_declared_area_and_aspect(
    extent: tuple[int, int, int],
) -> None:
    drawn = draw(RULE, 4000, extent)
    depth, height, width = extent
    start, length = drawn.start_VB3, drawn.length_VB3
    assert (start >= 0).all() and (start + length <= torch.tensor(extent) + 1e-3).all()
    area = (length[..., 1] * length[..., 2] / (height * width)).flatten().double()
    assert stats.kstest(area.numpy(), stats.uniform(0.1, 0.5).cdf).pvalue > 1e-4
    if height == width:  # no aspect is cut off: 0.6 * 4 / 3 < 1
        log_aspect = (length[..., 1] / length[..., 2]).log().flatten().double()
        low, high = torch.tensor([3 / 4, 4 / 3]).log().tolist()
        assert stats.kstest(log_aspect.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-4
    for axis, size in ((1, height), (2, width)):
        place = (start[..., axis] / (size - length[..., axis])).flatten().double()
        assert stats.kstest(place.numpy(), "uniform").pvalue > 1e-4


def test_area_one_takes_the_whole_plane_of_any_scan() -> None:
    for extent in ((8, 64, 64), (8, 40, 120)):
        drawn = draw(replace(RULE, area=(1.0, 1.0)), 50, extent)
        assert torch.allclose(
            drawn.length_VB3, torch.tensor([8.0, *extent[1:]]).expand(2, 50, 3), rtol=1e-5
        )
        assert drawn.start_VB3[..., 1:].abs().max() < 1e-3


def test_z_windows_are_whole_slices_and_reach_every_start_evenly() -> None:
    start_z = draw(RULE, 4500, (16, 64, 64)).start_VB3[..., 0].flatten()
    assert torch.equal(start_z, start_z.round())
    counted = torch.bincount(start_z.long())
    assert len(counted) == 16 - 8 + 1 and stats.chisquare(counted.numpy()).pvalue > 1e-4


def test_a_scan_shorter_than_the_window_starts_at_its_first_slice() -> None:
    drawn = draw(RULE, 20, (5, 64, 64))
    assert (drawn.start_VB3[..., 0] == 0).all() and (drawn.length_VB3[..., 0] == 8).all()


def test_z_zoom_changes_the_depth_that_is_read() -> None:
    drawn = draw(replace(RULE, z_zoom=(0.5, 2.0)), 2000, (32, 64, 64))
    length = drawn.length_VB3[..., 0]
    assert (
        length.min() >= 4 and length.max() <= 16.001 and length.min() < 4.1 and length.max() > 15.6
    )
    assert (drawn.start_VB3[..., 0] + length <= 32.001).all()


def test_views_samples_kinds_and_seeds_draw_apart() -> None:
    first = draw(RULE, 50, (16, 64, 64))
    assert (first.start_VB3[0] != first.start_VB3[1]).any(1).all()
    assert first.start_VB3[0, :, 1].unique().numel() == 50
    other_seed = draw(RULE, 50, (16, 64, 64), seed=1)
    assert (first.start_VB3[..., 1] != other_seed.start_VB3[..., 1]).all()
    extent_B3 = torch.tensor([[16, 64, 64]]).expand(50, 3)
    cells = torch.ones(50, 4, 8, 8)
    other_kind = boxes.draw(RULE, "global", 2, cells, extent_B3, torch.arange(50), 0)
    assert (first.start_VB3[..., 1] != other_kind.start_VB3[..., 1]).all()


def test_flips_happen_as_often_as_declared() -> None:
    flips = (
        draw(replace(RULE, flip_p=(0.0, 0.25, 1.0)), 4000, (16, 64, 64))
        .flip_VB3.float()
        .mean((0, 1))
    )
    assert flips[0] == 0 and flips[2] == 1 and abs(flips[1] - 0.25) < 0.02


def test_max_length_bounds_every_box() -> None:
    for area, aspect in (
        ((0.1, 0.6), (3 / 4, 4 / 3)),
        ((1.0, 1.0), (0.9, 1.1)),
        ((0.3, 0.9), (2.0, 3.0)),
    ):
        rule = replace(RULE, area=area, aspect=aspect, z_zoom=(0.7, 1.5))
        rules = [rule, replace(rule, region_area=(0.2, 0.5))]
        for rule, extent in itertools.product(rules, ((16, 64, 64), (16, 40, 200), (16, 200, 40))):
            length = draw(rule, 2000, extent).length_VB3.amax((0, 1))
            bound = torch.tensor(boxes.max_length(rule, extent))
            assert (length <= bound * (1 + 1e-5)).all()
            larger = torch.tensor(
                boxes.max_length(rule, (16, 256, 256))
            )  # another scan of the batch may be larger
            assert (length <= larger * (1 + 1e-5)).all()


def test_body_cells_take_lung_for_body_and_padding_for_air() -> None:
    hu = torch.full((1, 8, 20, 24), -3024, dtype=torch.int16)  # scanner padding
    noise = torch.randn(1, 8, 16, 24, generator=torch.Generator().manual_seed(0)) * 20
    hu[:, :, :16] = (noise - 1000).to(torch.int16)
    hu[:, :, :8, :8] = (noise[:, :, :8, :8] * 3 - 860).to(torch.int16)  # lung
    hu[:, :, :8, 8:16] = 40
    cells = boxes.body_cells(hu, HUContract())
    assert cells.shape == (1, 2, 3, 3)
    expected = torch.zeros(3, 3)
    expected[0, :2] = 1
    assert torch.equal(cells[0], expected.expand(2, 3, 3))


def test_body_share_equals_a_count_over_fine_points() -> None:
    cells = (torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    generator = torch.Generator().manual_seed(2)
    start = torch.rand(3, 2, 4, 3, generator=generator) * torch.tensor([6.0, 20.0, 24.0])
    length = (
        torch.rand(3, 2, 4, 3, generator=generator) * torch.tensor([12.0, 20.0, 24.0]) + 1
    )  # may leave the slab
    share = boxes.body_share(cells, start, length)
    points = (torch.arange(60) + 0.5) / 60
    for v in range(3):
        for b in range(2):
            for c in range(4):
                z, y, x = (start[v, b, c, a] + length[v, b, c, a] * points for a in range(3))
                iz, iy, ix = (
                    (p / size).long() for p, size in zip((z, y, x), boxes.CELL, strict=True)
                )
                padded = torch.zeros(20, 20, 20)
                padded[:4, :5, :6] = cells[b]
                counted = padded[iz[:, None, None], iy[:, None], ix].mean()
                assert abs(share[v, b, c] - counted) < 0.02


def test_the_first_place_with_enough_body_is_taken_else_the_best() -> None:
    cells = torch.zeros(1, 4, 8, 8)
    cells[:, :, :, :3] = 1  # body on one side only
    num, extent, rule = 400, (16, 64, 64), replace(RULE, area=(0.1, 0.2), candidates=6)
    tries = [
        draw(replace(rule, candidates=c + 1, body_share_min=2.0), num, extent, cells)
        for c in range(6)
    ]
    view_V1, extent_B3 = torch.arange(2)[:, None], torch.tensor([extent]).float().expand(num, 3)
    whole = boxes._Region(torch.zeros_like(extent_B3), extent_B3)
    places = boxes._starts(rule, "local", view_V1, whole, tries[0].length_VB3, torch.arange(num), 0)
    shares = boxes.body_share(
        cells.expand(num, -1, -1, -1), places, tries[0].length_VB3[:, :, None].expand_as(places)
    )
    chosen = draw(replace(rule, body_share_min=0.4), num, extent, cells)
    fallbacks = later = 0
    for v in range(2):
        for b in range(num):
            row = shares[v, b].tolist()
            want = next(
                (c for c, share in enumerate(row) if share >= 0.4),
                max(range(6), key=row.__getitem__),
            )
            assert torch.equal(chosen.start_VB3[v, b], places[v, b, want])
            fallbacks += max(row) < 0.4
            later += want > 0
    assert fallbacks > 0 and later > 100
    # nothing can hold 2.0: always the best
    torch.testing.assert_close(share_of(tries[5], cells), shares.amax(2))
    without = draw(replace(rule, body_share_min=0.0), num, extent, cells)
    assert share_of(chosen, cells).mean() > share_of(without, cells).mean() + 0.2
    assert torch.equal(
        chosen.length_VB3, without.length_VB3
    )  # the search moves a box, its size stays as declared


def test_all_views_of_a_sample_lie_in_one_region() -> None:
    num, extent = 3000, (16, 64, 96)
    extent_B3, cells = torch.tensor([extent]).expand(num, 3), torch.ones(num, 4, 8, 12)
    rule = replace(RULE, area=(0.05, 0.1), region_area=(0.2, 0.3))
    drawn = [
        boxes.draw(rule, kind, views, cells, extent_B3, torch.arange(num), 0)
        for kind, views in (("global", 2), ("local", 8))
    ]
    start = torch.cat([one.start_VB3 for one in drawn])
    end = start + torch.cat([one.length_VB3 for one in drawn])
    assert (start >= 0).all() and (end <= torch.tensor(extent) + 1e-3).all()
    # ten crops of a sample together take at most the largest region, and mostly more than one crop
    spread = (end.amax(0) - start.amin(0)) / torch.tensor(extent)
    assert (spread[:, 1:] <= 0.3**0.5 + 1e-5).all()
    assert (spread[:, 1] * spread[:, 2]).mean() > 0.15
    # regions reach every part of the slice, and a crop has the area of the rule, not of the region
    middle = ((start + end) / 2).mean(0) / torch.tensor(extent)
    for axis in (1, 2):
        assert middle[:, axis].min() < 0.3 and middle[:, axis].max() > 0.7
    area = drawn[1].length_VB3[..., 1] * drawn[1].length_VB3[..., 2] / (64 * 96)
    uniform = stats.uniform(0.05, 0.05)
    assert stats.kstest(area.flatten().double().numpy(), uniform.cdf).pvalue > 1e-4
    without = boxes.draw(
        replace(rule, region_area=(1.0, 1.0)), "local", 8, cells, extent_B3, torch.arange(num), 0
    )
    other = without.start_VB3.amax(0) - without.start_VB3.amin(0)
    assert (other[:, 1:].mean(0) > 1.5 * 0.3**0.5 * torch.tensor([64.0, 96.0]) * 0.6).all()


def test_a_crop_that_is_larger_than_its_region_takes_the_whole_region() -> None:
    rule = replace(RULE, area=(0.5, 0.6), region_area=(0.25, 0.25), aspect=(1.0, 1.0))
    drawn = draw(rule, 200, (16, 64, 96))
    expected = torch.tensor([8.0, 32.0, 48.0]).expand(2, 200, 3)
    torch.testing.assert_close(drawn.length_VB3, expected)
    assert torch.equal(drawn.start_VB3[0, :, 1:], drawn.start_VB3[1, :, 1:])


def test_a_region_is_drawn_where_the_body_is() -> None:
    cells = torch.zeros(1, 4, 8, 8)
    cells[:, :, :, :3] = 1  # body on one side only
    rule = replace(
        RULE, area=(0.05, 0.05), region_area=(0.1, 0.1), body_share_min=0.5, candidates=1
    )
    single = share_of(draw(rule, 2000, (16, 64, 64), cells), cells)
    tried = share_of(draw(replace(rule, candidates=8), 2000, (16, 64, 64), cells), cells)
    # without candidates, crops hold as much body as the slice does; with them, the region moves
    assert 0.3 < single.mean() < 0.45 and (tried >= 0.5).float().mean() > 0.9
