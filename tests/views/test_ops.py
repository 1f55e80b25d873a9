from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.types import HUContract
from tapct.views.key import ViewKey

CONTRACT = HUContract()
MM = (3.0, 0.7, 0.9)  # of a voxel (z, y, x)


def key_of(kind: Any, view: int, num: int, seed: int = 0, first: int = 0) -> ViewKey:
    return ViewKey(
        seed, torch.arange(first, first + num), kind, view, CONTRACT, torch.tensor([MM] * num)
    )


def views_of(num: int) -> torch.Tensor:
    """HU from air to the top of the window, the same in every sample."""
    return (
        torch.linspace(CONTRACT.clip_low, CONTRACT.clip_high, 2 * 3 * 4)
        .view(1, 2, 3, 4)
        .repeat(num, 1, 1, 1)
    )


def run(name: str, key: ViewKey, view: torch.Tensor, **changed: Any) -> torch.Tensor:
    module = plugins.load("views.ops", name)
    before = view.clone()
    out = module.build(replace(module.Config(), **changed))(view, key)
    assert torch.equal(view, before)  # the input is left alone
    return out


def test_gain_is_a_uniform_factor_about_air() -> None:
    out = run("gain", key_of("local", 0, 3000), views_of(3000), p=(1.0, 1.0, 1.0))
    factor = (out - CONTRACT.clip_low) / (views_of(1) - CONTRACT.clip_low)
    assert (out[:, 0, 0, 0] == CONTRACT.clip_low).all()  # air stays air
    assert (factor[:, 1, 2, 3, None] - factor.flatten(1)[:, 1:]).abs().max() < 1e-4
    assert (
        stats.kstest(factor[:, 1, 2, 3].double().numpy(), stats.uniform(0.8, 0.4).cdf).pvalue > 1e-4
    )


def test_gamma_bends_the_middle_and_keeps_both_ends() -> None:
    out = run(
        "gamma", key_of("local", 0, 500), views_of(500), p=(1.0, 1.0, 1.0), exponent=(2.0, 2.0)
    )
    unit = (views_of(1).double() - CONTRACT.clip_low) / (CONTRACT.clip_high - CONTRACT.clip_low)
    want = CONTRACT.clip_low + unit**2 * (CONTRACT.clip_high - CONTRACT.clip_low)
    assert (out - want).abs().max() < 1e-2
    ratio = (out - CONTRACT.clip_low)[0].flatten()[1:] / (
        views_of(1) - CONTRACT.clip_low
    ).flatten()[1:]
    assert ratio.max() - ratio.min() > 0.5  # not a gain in disguise


def test_noise_is_white_with_the_declared_width() -> None:
    flat = torch.zeros(20, 8, 32, 32)
    out = run("noise", key_of("local", 0, 20), flat, p=(1.0, 1.0, 1.0), sigma_hu=(20.0, 20.0))
    assert abs(out.std() - 20) < 0.3 and abs(out.mean()) < 0.3
    for axis in (1, 2, 3):
        left, right = (
            out.narrow(axis, 0, out.shape[axis] - 1),
            out.narrow(axis, 1, out.shape[axis] - 1),
        )
        assert abs((left * right).mean() / 400) < 0.02
    assert abs((out[:-1] * out[1:]).mean() / 400) < 0.02  # nor the same in two samples
    drawn = run(
        "noise",
        key_of("local", 0, 400),
        torch.zeros(400, 2, 16, 16),
        p=(1.0, 1.0, 1.0),
        sigma_hu=(0.0, 30.0),
    )
    assert (
        stats.kstest(drawn.flatten(1).std(1).double().numpy(), stats.uniform(0, 30).cdf).pvalue
        > 1e-4
    )


def test_window_jitter_narrows_the_window_and_keeps_air() -> None:
    out = run(
        "window_jitter",
        key_of("local", 0, 300),
        views_of(300),
        p=(1.0, 1.0, 1.0),
        low_hu=100.0,
        high_hu=400.0,
    )
    assert (out[:, 0, 0, 0] == CONTRACT.clip_low).all() and (
        out[:, 1, 2, 3] == CONTRACT.clip_high
    ).all()
    flat, view = out.flatten(1), views_of(1).flatten()
    middle = slice(5, 14)  # untouched by either end
    slope = (flat[:, 13] - flat[:, 5]) / (view[13] - view[5])
    width = CONTRACT.clip_high - CONTRACT.clip_low
    assert (
        (slope >= 1).all() and (slope <= width / (width - 500) + 1e-5).all() and slope.max() > 1.2
    )
    line = flat[:, 5, None] + slope[:, None] * (view[middle] - view[5])
    assert (flat[:, middle] - line).abs().max() < 1e-2


def test_bounds_the_wrong_way_round_are_refused() -> None:
    for name, field in (("gain", "factor"), ("gamma", "exponent"), ("noise", "sigma_hu")):
        with pytest.raises(UserError, match=field):
            plugins.load("views.ops", name).Config(**{field: (1.2, 0.8)})
    with pytest.raises(UserError, match="window_jitter"):
        plugins.load("views.ops", "window_jitter").Config(low_hu=900.0)


@pytest.mark.parametrize(("height", "width"), [(20, 31), (24, 16)])
def test_rotation_is_the_one_of_scipy_in_mm_with_a_mirrored_border(height: int, width: int) -> None:
    view, key = 500 * torch.rand(5, 2, height, width), key_of("local", 0, 5)
    out = run("rotation", key, view, p=(1.0, 1.0, 1.0), degrees=(-60.0, 60.0))
    angles = torch.deg2rad(key.uniform("rotation angle", -60.0, 60.0).flatten().double())
    centre, mm = np.array([height - 1, width - 1]) / 2, np.array(MM[1:])
    for plain, turned, angle in zip(
        view.double().numpy(), out.numpy(), angles.tolist(), strict=True
    ):
        back = np.array(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        )  # of (y, x)
        matrix = back * mm / mm[:, None]  # pixel -> mm, turned back, mm -> pixel
        for z in range(2):
            wanted = ndimage.affine_transform(
                plain[z], matrix, centre - matrix @ centre, order=1, mode="reflect"
            )
            assert np.abs(turned[z] - wanted).max() < 0.05  # HU


def test_rotation_turns_x_towards_y_by_quarters_and_keeps_what_is_constant() -> None:
    key = replace(key_of("global", 0, 3), mm_B3=torch.ones(3, 3))
    view = torch.rand(3, 2, 12, 12)
    out = run("rotation", key, view, p=(1.0, 1.0, 1.0), degrees=(90.0, 90.0))
    torch.testing.assert_close(out, view.rot90(1, (3, 2)), atol=1e-5, rtol=0)
    out = run("rotation", key, torch.full((3, 2, 12, 17), -300.0), p=(1.0, 1.0, 1.0))
    torch.testing.assert_close(out, torch.full_like(out, -300.0), atol=1e-3, rtol=0)
    with pytest.raises(
        UserError, match=r"rotation.degrees is \(5.0, -5.0\): the lower end comes first"
    ):
        plugins.load("views.ops", "rotation").Config(degrees=(5.0, -5.0))
