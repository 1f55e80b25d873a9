from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.config.plugins import Plugin
from tapct.types import AIR_HU, Batch, HUContract, Views
from tapct.views import boxes, recipe, resample
from tapct.views.boxes import Kind
from tapct.views.key import ViewKey

CONTRACT = HUContract()
PATCH = (4, 4, 4)
SMALL = recipe.Config(
    global_window=(8, 16, 16), local_window=(4, 8, 8), num_locals=3, blur_sigma=(0.1, 1.0)
)
NO_OPS: tuple[Plugin, ...] = ()


def make(batch: Batch, config: recipe.Config = SMALL, seed: int = 0) -> Views:
    return recipe.make_views(batch, config, CONTRACT, seed, PATCH)


def test_shapes_are_crop_major_and_types_as_declared(make_batch: Callable[..., Batch]) -> None:
    views = make(make_batch([5, 6]))
    assert (
        views.global_VBZYX.shape == (2, 2, 8, 16, 16) and views.global_VBZYX.dtype == torch.float32
    )
    assert views.local_VBZYX.shape == (3, 2, 4, 8, 8) and views.local_VBZYX.dtype == torch.float32
    assert (
        views.global_in_scan_VBN.shape == (2, 2, 2 * 4 * 4)
        and views.global_in_scan_VBN.dtype == torch.bool
    )
    assert views.global_in_scan_VBN.all()
    low, high = (
        (bound - CONTRACT.mean) / CONTRACT.std for bound in (CONTRACT.clip_low, CONTRACT.clip_high)
    )
    for view in (views.global_VBZYX, views.local_VBZYX):
        assert view.min() >= low - 1e-4 and view.max() <= high + 1e-4 and view.std() > 0.3
    none = make(make_batch([5, 6]), replace(SMALL, num_locals=0))
    assert none.local_VBZYX.shape == (0, 2, 4, 8, 8)


def test_a_sample_gives_the_same_views_in_any_batch(make_batch: Callable[..., Batch]) -> None:
    """Other neighbours, another place in the batch, and more padding because a neighbour is
    larger.
    """
    table = (
        Plugin(name, plugins.load("views.ops", name).Config(p=(1.0, 1.0, 1.0)))
        for name in ("gain", "noise")
    )
    config = replace(SMALL, ops=tuple(table), flip_p=(0.5, 0.5, 0.5))
    alone = make(make_batch([7], [(14, 40, 44)]), config)
    among = make(make_batch([3, 7, 4], [(16, 48, 56), (14, 40, 44), (16, 64, 41)]), config)
    for got, want in (
        (among.global_VBZYX, alone.global_VBZYX),
        (among.local_VBZYX, alone.local_VBZYX),
    ):
        assert (got[:, 1] - want[:, 0]).abs().max() < 1e-4
        assert ((got[:, 0] - got[:, 2]).abs().amax((1, 2, 3)) > 0.1).all()
    assert torch.equal(among.global_in_scan_VBN[:, 1], alone.global_in_scan_VBN[:, 0])


def test_the_same_scan_under_another_sample_number_or_seed_gives_other_views(
    make_batch: Callable[..., Batch],
) -> None:
    batch = make_batch([7])
    views = [make(batch), make(batch, seed=1), make(replace(batch, sample_B=torch.tensor([8])))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        difference = (views[i].global_VBZYX - views[j].global_VBZYX).abs().amax((2, 3, 4))
        assert (difference > 0.1).all()


def test_views_equal_crop_blur_gain_and_z_score_done_by_hand(
    make_batch: Callable[..., Batch],
) -> None:
    config = replace(SMALL, blur_p=(0.0, 0.0, 0.0), flip_p=(0.5, 0.5, 0.5))
    batch = make_batch([1, 2, 3])
    sharp = make(batch, replace(config, ops=NO_OPS))
    rule = config.rule("global")
    cells = boxes.body_cells(batch.hu_BZYX, CONTRACT)
    crops = boxes.draw(rule, "global", 2, cells, batch.extent_B3, batch.sample_B, 0)
    clipped = batch.hu_BZYX.double().clamp(CONTRACT.clip_low, CONTRACT.clip_high)
    for v in range(2):
        for b in range(3):
            z, y, x = (crops.start_VB3[v, b, a] for a in range(3))
            flips = [a for a in range(3) if crops.flip_VB3[v, b, a]]
            points = [
                start + crops.length_VB3[v, b, a] * (torch.arange(n) + 0.5) / n - 0.5
                for a, (start, n) in enumerate(zip((z, y, x), rule.window, strict=True))
            ]
            smooth = ndimage.gaussian_filter(
                clipped[b].numpy(), (0, 1.0, 1.0)
            )  # any low-pass: geometry is at stake
            sampled = ndimage.map_coordinates(
                smooth, np.meshgrid(*points, indexing="ij"), order=1, mode="nearest"
            )
            want = CONTRACT.normalise(torch.from_numpy(np.flip(sampled, tuple(flips)).copy()))
            got = sharp.global_VBZYX[v, b]
            both = torch.stack([got.flatten(), want.flatten()])
            assert torch.corrcoef(both)[0, 1] > 0.97
    gained = make(
        batch,
        replace(
            config,
            ops=(Plugin("gain", plugins.load("views.ops", "gain").Config(p=(1.0, 1.0, 1.0))),),
        ),
    )
    hu, hu_gained = (v.global_VBZYX * CONTRACT.std + CONTRACT.mean for v in (sharp, gained))
    inside = (hu > -900) & (hu_gained < CONTRACT.clip_high - 1)
    factor = (hu_gained - CONTRACT.clip_low) / (hu - CONTRACT.clip_low)
    for v in range(2):
        for b in range(3):
            spread = factor[v, b][inside[v, b]]
            assert spread.max() - spread.min() < 1e-3 and 0.8 <= spread.mean() <= 1.2


def test_the_mm_of_a_view_are_those_of_its_box(make_batch: Callable[..., Batch]) -> None:
    """What a voxel of a view covers of the body: the edge of the box in mm over the voxels of the
    view.
    """
    config = replace(SMALL, z_zoom=(0.5, 2.0))
    spacing = torch.tensor([[5.0, 0.7, 0.8], [1.0, 0.5, 0.9]])
    batch = replace(make_batch([1, 2]), spacing_mm_B3=spacing)
    views = make(batch, config)
    cells = boxes.body_cells(batch.hu_BZYX, CONTRACT)
    kinds: tuple[tuple[Kind, Any], ...] = (
        ("global", views.global_mm_VB3),
        ("local", views.local_mm_VB3),
    )
    for kind, mm_VB3 in kinds:
        rule, num = config.rule(kind), 2 if kind == "global" else 3
        crops = boxes.draw(rule, kind, num, cells, batch.extent_B3, batch.sample_B, 0)
        assert mm_VB3.shape == (num, 2, 3) and mm_VB3.dtype == torch.float32
        for v in range(num):
            for b in range(2):
                want = [
                    crops.length_VB3[v, b, a] * spacing[b, a] / rule.window[a] for a in range(3)
                ]
                assert mm_VB3[v, b].tolist() == pytest.approx([float(mm) for mm in want])
    assert make(batch, replace(config, num_locals=0)).local_mm_VB3.shape == (0, 2, 3)


def test_blur_happens_as_often_as_declared_and_with_the_declared_width(
    make_batch: Callable[..., Batch],
) -> None:
    config = replace(SMALL, blur_p=(1.0, 0.1, 0.5), blur_sigma=(0.1, 2.0))
    sample_B = torch.arange(4000)
    shares = []
    groups: tuple[tuple[Kind, int], ...] = (("global", 0), ("global", 1), ("local", 2))
    for kind, view in groups:
        sigma = recipe._blur_sigma(
            config, ViewKey(0, sample_B, kind, view, CONTRACT, torch.ones(len(sample_B), 3))
        )
        shares.append((sigma > 0).double().mean().item())
        drawn = sigma[sigma > 0]
        assert drawn.min() >= 0.1 and drawn.max() < 2.0 and abs(drawn.mean() - 1.05) < 0.1
    assert shares[0] == 1 and abs(shares[1] - 0.1) < 0.02 and abs(shares[2] - 0.5) < 0.03
    batch = make_batch(list(range(6)))
    plain, blurred = (
        make(batch, replace(SMALL, ops=NO_OPS, blur_sigma=(1.0, 1.0), blur_p=p))
        for p in ((0, 0, 0), (1.0, 0.0, 0.0))
    )
    want = ndimage.gaussian_filter(
        plain.global_VBZYX[0].numpy(), (0, 1, 1, 1), mode="reflect", truncate=8
    )
    assert np.abs(blurred.global_VBZYX[0].numpy() - want).max() < 1e-4
    assert torch.equal(plain.global_VBZYX[1], blurred.global_VBZYX[1])
    assert torch.equal(plain.local_VBZYX, blurred.local_VBZYX)


def test_tokens_wholly_in_padding_are_marked_and_hold_air(make_batch: Callable[..., Batch]) -> None:
    config = replace(SMALL, blur_p=(0.0, 0.0, 0.0), ops=NO_OPS, flip_p=(0.5, 0.0, 0.0))
    batch = make_batch(list(range(12)), [(4, 48, 56)] * 6 + [(5, 48, 56)] * 6)
    views = make(batch, config)
    in_scan = views.global_in_scan_VBN.unflatten(2, (2, 4, 4))
    assert torch.equal(
        in_scan, in_scan[..., :1, :1].expand_as(in_scan)
    )  # in-plane every box lies in the scan
    layers = in_scan[..., 0, 0]
    assert (layers[:, :6].sum(-1) == 1).all() and layers[:, 6:].all()
    assert 0 < layers[:, :6, 0].double().mean() < 1  # a flip in z moves the padding to the front
    air = (CONTRACT.clip_low - CONTRACT.mean) / CONTRACT.std
    halves = views.global_VBZYX[:, :6].unflatten(2, (2, 4))
    empty = (halves - air).abs().amax((3, 4, 5)) < 1e-5
    assert torch.equal(empty, ~layers[:, :6])


def test_local_crops_honour_their_own_depth_and_area(make_batch: Callable[..., Batch]) -> None:
    """The view of z * 40 HU reads whole neighbouring slices, and a smaller area spans less of a
    ramp.
    """
    batch = make_batch([0, 1, 2])
    ramp = torch.arange(16, dtype=torch.int16)[:, None, None] * 40 - 300
    batch.hu_BZYX.copy_(ramp.expand(16, 48, 56))
    config = replace(
        SMALL, blur_p=(0.0, 0.0, 0.0), ops=NO_OPS, global_area=(0.3, 0.3), local_area=(0.2, 0.2)
    )
    views = make(batch, config)
    for view in (views.global_VBZYX, views.local_VBZYX):
        middle = (view * CONTRACT.std + CONTRACT.mean)[:, :, :, 4, 4]
        assert (middle.diff(dim=2) - 40).abs().max() < 1e-2
        assert ((middle + 300) / 40 - ((middle + 300) / 40).round()).abs().max() < 1e-3


CHANGES: dict[str, Any] = {
    "num_globals": 1,
    "global_window": (4, 16, 16),
    "global_area": (0.9, 0.95),
    "num_locals": 2,
    "local_window": (8, 8, 8),
    "local_area": (0.9, 0.95),
    "region_area": (0.3, 0.3),
    "aspect": (2.0, 2.0),
    "z_zoom": (1.5, 1.5),
    "body_share_min": 0.9,
    "candidates": 1,
    "flip_p": (0.0, 1.0, 0.0),
    "blur_sigma": (1.9, 2.0),
    "blur_p": (0.0, 0.0, 0.0),
    "ops": NO_OPS,
}


@pytest.mark.parametrize("field", [f.name for f in fields(recipe.Config)])
def test_every_field_changes_the_views(make_batch: Callable[..., Batch], field: str) -> None:
    base = replace(SMALL, body_share_min=0.8, local_area=(0.05, 0.1))
    batch = make_batch(list(range(8)))
    plain, changed = make(batch, base), make(batch, replace(base, **{field: CHANGES[field]}))
    pairs = [(plain.global_VBZYX, changed.global_VBZYX), (plain.local_VBZYX, changed.local_VBZYX)]
    assert any(a.shape != b.shape or (a - b).abs().max() > 0.05 for a, b in pairs)
    if field.startswith(("global", "num_globals")):
        assert torch.equal(*pairs[1])
    if field.startswith(("local", "num_locals")):
        assert torch.equal(*pairs[0])


def test_bad_values_are_refused_with_their_name(make_batch: Callable[..., Batch]) -> None:
    wrong: Any = (0.9, 0.5)
    for field in ("global_area", "local_area", "region_area", "aspect", "z_zoom", "blur_sigma"):
        with pytest.raises(UserError, match=f"views.{field}"):
            replace(SMALL, **{field: wrong})
    with pytest.raises(UserError, match="views.global_window .* is no multiple of the patch"):
        recipe.make_views(make_batch([0]), SMALL, CONTRACT, 0, (4, 5, 4))


def test_slices_needed_is_the_deepest_read() -> None:
    assert SMALL.slices_needed() == 8 and replace(SMALL, z_zoom=(1.0, 1.5)).slices_needed() == 12
    assert replace(SMALL, local_window=(20, 8, 8)).slices_needed() == 20
    assert replace(SMALL, local_window=(20, 8, 8), num_locals=0).slices_needed() == 8


def test_an_empty_scan_gives_air_and_no_error(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch([0, 1])
    batch.hu_BZYX.fill_(AIR_HU)
    views = make(batch)
    air = (CONTRACT.clip_low - CONTRACT.mean) / CONTRACT.std
    assert torch.allclose(views.global_VBZYX, torch.full_like(views.global_VBZYX, air))
    assert torch.allclose(views.local_VBZYX, torch.full_like(views.local_VBZYX, air))


def test_make_views_runs_the_device_path_to_the_same_views(
    make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch([0, 1, 2], [(16, 48, 56), (7, 40, 30), (16, 64, 33)])
    host = make(batch)
    monkeypatch.setattr(resample, "_HOST", "nothing")
    device = make(batch)
    assert (host.global_VBZYX - device.global_VBZYX).abs().max() < 1e-4
    assert (host.local_VBZYX - device.local_VBZYX).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_on_a_gpu_equal_those_on_the_host_and_never_wait(
    make_batch: Callable[..., Batch],
) -> None:
    batch = make_batch([0, 1, 2], [(16, 48, 56), (7, 40, 30), (16, 64, 33)])
    names = plugins.available("views.ops")
    config = replace(
        SMALL,
        ops=tuple(Plugin(n, plugins.load("views.ops", n).Config(p=(1.0, 1.0, 1.0))) for n in names),
    )
    on_device = batch.to(torch.device("cuda"))
    make(on_device, config)  # the first call compiles and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        device = make(on_device, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = make(batch, config)
    assert (host.global_VBZYX - device.global_VBZYX.cpu()).abs().max() < 1e-3
    assert (host.local_VBZYX - device.local_VBZYX.cpu()).abs().max() < 1e-3
    assert torch.equal(host.global_in_scan_VBN, device.global_in_scan_VBN.cpu())


def test_ops_receive_the_mm_of_their_view(make_batch: Callable[..., Batch]) -> None:
    rotation = plugins.load("views.ops", "rotation")
    turn = rotation.Config(p=(1.0, 1.0, 1.0), degrees=(30.0, 30.0))
    batch = replace(
        make_batch([1, 2]), spacing_mm_B3=torch.tensor([[3.0, 0.5, 1.1], [2.0, 0.9, 0.6]])
    )
    plain = make(batch, replace(SMALL, ops=NO_OPS))
    turned = make(batch, replace(SMALL, ops=(Plugin("rotation", turn),)))
    for kind, views, found, mm_VB3 in (
        ("global", plain.global_VBZYX, turned.global_VBZYX, plain.global_mm_VB3),
        ("local", plain.local_VBZYX, turned.local_VBZYX, plain.local_mm_VB3),
    ):
        for number, view in enumerate(views):
            key = ViewKey(0, batch.sample_B, kind, number, CONTRACT, mm_VB3[number])
            # a mean of neighbours, which commutes with the z-score
            wanted = rotation.build(turn)(view, key)
            torch.testing.assert_close(found[number], wanted, atol=1e-4, rtol=0)
            other = rotation.build(turn)(view, replace(key, mm_B3=key.mm_B3.flip(1)))
            assert (other - wanted).abs().max() > 0.01
