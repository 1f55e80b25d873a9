"""What every backbone in the models folder promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tapct.config import plugins
from tapct.nn.layers import DropKey
from tapct.types import Tokens

BACKBONES = plugins.available("models")


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
