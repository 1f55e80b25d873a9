"""What every op on views promises: those of the ops folder and a user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import plugin_cases
import pytest
import torch
from torch import Tensor

from tapct.config import plugins
from tapct.types import HUContract
from tapct.views.key import ViewKey

OPS = plugin_cases.cases("views.ops", "ops")
CONTRACT = HUContract()
MM = (3.0, 0.7, 0.9)  # of a voxel (z, y, x)
GROUPS = (("global", 0), ("global", 1), ("local", 0))


@pytest.fixture(scope="module", autouse=True)
def user_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with plugin_cases.user_modules(tmp_path_factory.mktemp("ops")):
        yield


def key_of(kind: Any, view: int, num: int, seed: int = 0, first: int = 0) -> ViewKey:
    samples = torch.arange(first, first + num)
    return ViewKey(seed, samples, kind, view, CONTRACT, torch.tensor([MM] * num))


def views_of(num: int) -> Tensor:
    """HU from air to the top of the window, the same in every sample."""
    ramp = torch.linspace(CONTRACT.clip_low, CONTRACT.clip_high, 2 * 3 * 4)
    return ramp.view(1, 2, 3, 4).repeat(num, 1, 1, 1)


def always(name: str) -> Any:
    """The default config of an op, but it happens in every view."""
    config = plugin_cases.default("views.ops", name)
    return dataclasses.replace(config, p=(1.0, 1.0, 1.0)) if hasattr(config, "p") else config


def run(name: str, config: Any, key: ViewKey) -> Tensor:
    view = views_of(len(key.sample_B))
    before = view.clone()
    out: Tensor = plugins.load("views.ops", name).build(config)(view, key)
    assert torch.equal(view, before), "the input is left alone"
    return out


def moved(one: Tensor, two: Tensor, hu: float) -> Tensor:
    """Samples of which a voxel differs by more than `hu`."""
    return (one - two).abs().amax((1, 2, 3)) > hu


@pytest.mark.parametrize("name", OPS)
def test_an_op_keeps_shape_and_type_and_gives_finite_hu(name: str) -> None:
    out = run(name, always(name), key_of("local", 3, 6))
    assert out.shape == (6, 2, 3, 4) and out.dtype == torch.float32
    assert out.isfinite().all()
    assert moved(out, views_of(6), 1e-3).all()


@pytest.mark.parametrize("name", OPS)
def test_the_same_key_gives_the_same_view_in_any_batch_and_another_key_another(name: str) -> None:
    config = always(name)
    one = run(name, config, key_of("local", 3, 6))
    torch.manual_seed(5)
    assert torch.equal(one, run(name, config, key_of("local", 3, 6)))
    part = run(name, config, key_of("local", 3, 2, first=3))
    assert torch.equal(one[3:5], part)
    for other in (key_of("local", 2, 6), key_of("global", 3, 6), key_of("local", 3, 6, seed=1)):
        assert moved(one, run(name, config, other), 0.0).all()


@pytest.mark.parametrize("name", OPS)
def test_an_op_happens_as_often_as_declared_in_each_group(name: str) -> None:
    config = always(name)
    if not hasattr(config, "p"):
        return
    num, p = 1500, (0.0, 0.3, 1.0)
    config = dataclasses.replace(config, p=p)
    for (kind, view), chance in zip(GROUPS, p, strict=True):
        happened = moved(run(name, config, key_of(kind, view, num)), views_of(num), 1e-3)
        spread = 4 * (chance * (1 - chance) / num) ** 0.5
        assert abs(happened.double().mean() - chance) < spread + 1e-3


@pytest.mark.parametrize("name", OPS)
def test_every_field_changes_every_view_by_a_tenth_of_a_hu(name: str) -> None:
    config = always(name)
    for path in plugin_cases.leaves(config):
        if path == ("p",):
            continue  # counted by the test above
        assert any(
            moved(
                run(name, base, key_of("local", 0, 4)), run(name, other, key_of("local", 0, 4)), 0.1
            ).all()
            for base in plugin_cases.bases(config)
            for other in plugin_cases.others(base, path)
        ), path


@pytest.mark.parametrize("name", OPS)
def test_an_op_does_not_wait_for_the_device(name: str) -> None:
    """On meta tensors `.item()`, and an `if` on a tensor, are errors."""
    with torch.device("meta"):
        key = ViewKey(0, torch.arange(4), "local", 0, CONTRACT, torch.ones(4, 3))
        out = plugins.load("views.ops", name).build(always(name))(torch.empty(4, 2, 3, 4), key)
    assert out.is_meta and out.shape == (4, 2, 3, 4)
