"""What every backbone promises: those of the models folder and a user's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import plugin_cases
import pytest
import torch
from torch import Tensor, nn

from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.nn.contracts import Backbone, encode
from tapct.nn.layers import DropKey
from tapct.types import Tokens

BACKBONES = plugin_cases.cases("models", "models")


@pytest.fixture(scope="module", autouse=True)
def user_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with plugin_cases.user_modules(tmp_path_factory.mktemp("models")):
        yield


def make(name: str, seed: int = 1) -> Any:
    module = plugins.load("models", name)
    model = module.build(module.Config())
    model.init_weights(seed)
    return model


def groups_for(
    patch: tuple[int, int, int],
) -> tuple[list[Tensor], list[Tensor | None], list[tuple[int, int, int]]]:
    """Two groups of crops of a few patches, a mask for the first."""
    grids = [(2, 3, 2), (1, 2, 1)]
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randn(num, *(g * p for g, p in zip(grid, patch, strict=True)), generator=generator)
        for num, grid in zip((2, 3), grids, strict=True)
    ]
    return crops, [torch.rand(2, 12, generator=generator) < 0.5, None], grids


def flat(tokens: list[Tokens]) -> Tensor:
    return torch.cat(
        [part.flatten() for t in tokens for part in (t.cls_BD, t.registers_BRD, t.patches_BND)]
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_gives_tokens_and_finite_gradients_from_its_defaults(name: str) -> None:
    model = make(name)
    crops, masks, grids = groups_for(model.patch)
    results = model(crops, masks, DropKey(0, 0))
    for tokens, crop, grid in zip(results, crops, grids, strict=True):
        num, num_patches = crop.shape[0], grid[0] * grid[1] * grid[2]
        assert tokens.grid == grid
        assert tokens.cls_BD.shape == (num, model.dim)
        assert tokens.patches_BND.shape == (num, num_patches, model.dim)
        assert tokens.registers_BRD.shape[::2] == (num, model.dim)
    assert flat(results).isfinite().all() and flat(results).dtype == torch.float32
    (flat(results) * torch.linspace(-1, 1, flat(results).numel())).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in model.parameters()
    )
    assert isinstance(model, Backbone)


@pytest.mark.parametrize("name", BACKBONES)
def test_one_tensor_in_place_of_a_list_of_groups_is_an_error(name: str) -> None:
    """A batch (B, 1, Z, Y, X) would be taken as B groups of one crop."""
    model = make(name)
    crops, _, _ = groups_for(model.patch)
    with pytest.raises(UserError, match=r"one tensor of shape .*call it with \[crops\]"):
        model(crops[0][:, None])


@pytest.mark.parametrize("name", BACKBONES)
def test_the_same_seed_and_key_give_the_same_tokens(name: str) -> None:
    model, twin = make(name), make(name)
    crops, masks, _ = groups_for(model.patch)
    with torch.no_grad():
        one = flat(model(crops, masks, DropKey(0, 3)))
        assert torch.equal(one, flat(twin(crops, masks, DropKey(0, 3))))
        assert torch.equal(one, flat(copy.deepcopy(model)(crops, masks, DropKey(0, 3))))
        twin.init_weights(2)
        assert not torch.equal(one, flat(twin(crops, masks, DropKey(0, 3))))
        plain = flat(model.eval()(crops, masks, DropKey(0, 3)))
        assert torch.equal(plain, flat(model(crops, masks)))


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_count_from_the_input_to_the_norm(name: str) -> None:
    with torch.device("meta"):
        module = plugins.load("models", name)
        model = module.build(module.Config())
    ids = {model.param_group_id(key) for key, _ in model.named_parameters()}
    assert ids == set(range(model.num_blocks + 2))


@pytest.mark.parametrize("name", BACKBONES)
def test_what_a_backbone_answers_fits_the_backbone(name: str) -> None:
    config = plugin_cases.default("models", name)
    module = plugins.load("models", name)
    with torch.device("meta"):
        model: Backbone = module.build(config)
    assert tuple(config.patch) == tuple(model.patch)
    assert all(isinstance(block, nn.Module) for block in model.repeated_blocks())
    exported = model.export_config()
    assert exported is None or isinstance(exported, module.Config)
    shapes = [parameter.shape for parameter in model.parameters()]
    for variant in model.untrained_variants().values():
        with torch.device("meta"):
            assert [p.shape for p in module.build(variant).parameters()] == shapes


@pytest.mark.parametrize("name", BACKBONES)
def test_the_cost_of_a_crop_has_all_tokens_and_parameters(name: str) -> None:
    """tests/plan/test_flops.py compares the FLOPs with what torch counts."""
    model = make(name).eval()
    z, y, x = (2 * side for side in model.patch)
    cost = model.crop_cost((z, y, x))
    if cost is None:
        return
    with torch.no_grad():
        (tokens,) = model([torch.zeros(1, z, y, x)])
    assert cost.tokens == 1 + tokens.registers_BRD.shape[1] + tokens.patches_BND.shape[1]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(layer.parameters for layer in cost.layers) == num_parameters
    assert all(0 < layer.trained_share <= 1 and layer.flops >= 0 for layer in cost.layers)


def answers(name: str, config: Any) -> list[Any]:
    """What the core can learn of a backbone without values."""
    with torch.device("meta"):
        model: Backbone = plugins.load("models", name).build(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    z, y, x = (2 * side for side in model.patch)
    cost = model.crop_cost((z, y, x))
    return [shapes, model.attention, model.needs_spacing, model.num_blocks, cost]


def training_tokens(name: str, config: Any) -> Tensor:
    """Tokens of some training steps, on crops that are no square, with spacing where it counts."""
    model = plugins.load("models", name).build(config)
    model.init_weights(1)
    z, y, x = (side * num for side, num in zip(model.patch, (2, 3, 2), strict=True))
    crop = torch.randn(4, z, y, x, generator=torch.Generator().manual_seed(0))
    spacing_mm = [torch.tensor([[3.0, 0.7, 0.9]]).repeat(4, 1)]
    with torch.no_grad():
        steps = [
            flat(encode(model, [crop], [None], DropKey(0, step), spacing_mm)) for step in range(4)
        ]
    return torch.cat(steps)


def differ(name: str, one: Any, two: Any) -> bool:
    if answers(name, one) != answers(name, two):
        return True
    return not torch.equal(training_tokens(name, one), training_tokens(name, two))


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_field_changes_something(name: str) -> None:
    default = plugin_cases.default("models", name)
    for path in plugin_cases.leaves(default):
        assert any(
            differ(name, base, other)
            for base in plugin_cases.bases(default)
            for other in plugin_cases.others(base, path)
        ), path
