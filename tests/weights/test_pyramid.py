"""The pretrained encoder of a segmentation network: levels, their place in the scan, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers_cases import CONFIGS, LEARNED, network, settings_of

import tapct
from tapct.base.exits import UserError
from tapct.eval.models.baselines import RawPatches
from tapct.weights.pretrained import Pretrained
from tapct.weights.pyramid import PyramidEncoder, level_strides


def encoder(channels: tuple[int, ...] = (4, 6), **options: object) -> PyramidEncoder:
    pretrained = Pretrained(network(LEARNED), settings_of(LEARNED), {})
    return PyramidEncoder(pretrained, channels, **options)  # type: ignore[arg-type]


def test_the_levels_of_the_published_patch() -> None:
    assert level_strides((4, 8, 8), 4) == [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8)]
    assert level_strides((1, 16, 16), 2) == [(1, 8, 8), (1, 16, 16)]
    assert level_strides((6, 15, 7), 3) == [(1, 1, 1), (3, 5, 1), (6, 15, 7)]
    with pytest.raises(UserError, match="2x4x4 voxels gives 3 levels, and 4 were asked for"):
        level_strides((2, 4, 4), 4)


def test_every_level_has_its_size_and_channels() -> None:
    model = encoder((4, 6, 8), blocks=(0, 0, 1))
    maps = model(torch.randn(2, 1, 6, 16, 12))
    assert [tuple(one.shape) for one in maps] == [
        (2, 4, 6, 16, 12), (2, 6, 6, 8, 6), (2, 8, 3, 4, 3)
    ]  # fmt: skip
    assert model.strides_zyx == [(1, 1, 1), (1, 2, 2), (2, 4, 4)]
    assert model.factors == [(1, 2, 2), (2, 2, 2)]


def test_the_coarsest_level_is_a_linear_map_of_the_patch_tokens() -> None:
    model = encoder((4, 6))
    crops = torch.randn(1, 1, 4, 8, 12)
    tokens = model.backbone([crops[:, 0]])[0]
    conv = model.levels[-1][0]
    want = tokens.patches_BND @ conv.weight.flatten(1).T + conv.bias
    found = model(crops)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_change_of_one_patch_is_seen_at_its_place_at_the_finest_level() -> None:
    model = encoder((4, 6, 8))
    for block in model.backbone.blocks:  # without attention, a patch changes no other one
        nn.init.zeros_(block.attn.proj.weight)
    for level in model.levels:  # an instance norm would spread the change over the crop
        for number, layer in enumerate(level):
            if isinstance(layer, nn.InstanceNorm3d):
                level[number] = nn.Identity()
    model.stem = None
    crops = torch.randn(1, 1, 4, 8, 8)
    moved = crops.clone()
    moved[0, 0, 2:4, 4:8, 0:4] += 1  # the patch at z 1, y 1, x 0
    changed = (model(moved)[0] != model(crops)[0]).any(1)[0]
    inside = torch.zeros(4, 8, 8, dtype=torch.bool)
    inside[2:4, 4:8, 0:4] = True
    assert changed[inside].any() and not changed[~inside].any()


def test_a_frozen_backbone_gets_no_gradient_and_a_free_one_does() -> None:
    model = encoder()
    for is_free in (False, True):
        model.backbone.requires_grad_(is_free)
        sum(one.square().sum() for one in model(torch.randn(1, 1, 4, 8, 12))).backward()
        assert all(parameter.grad is not None for parameter in model.levels.parameters())
        gradient = model.backbone.blocks[0].attn.qkv.weight.grad
        assert (gradient is not None) == is_free


def test_a_backbone_in_mm_takes_the_spacing() -> None:
    config = CONFIGS["both"]
    model = PyramidEncoder(network(config), (4, 6))
    crops = torch.randn(2, 1, 4, 8, 12)
    fine, coarse = (model(crops, torch.full((2, 3), mm))[-1] for mm in (0.5, 3.0))
    assert not torch.allclose(fine, coarse)
    with pytest.raises(UserError, match="pass spacing_mm"):
        model(crops)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UserError, match="block 2 does not exist"):
        encoder(blocks=(0, 2))
    with pytest.raises(UserError, match="2 channels and 1 blocks"):
        encoder(blocks=(0,))
    with pytest.raises(UserError, match="RawPatches|Linear is no backbone"):
        PyramidEncoder(nn.Linear(2, 2), (4,))
    with pytest.raises(UserError, match="is no backbone"):
        PyramidEncoder(RawPatches((2, 4, 4)), (4,))
    for shape in ((4, 8, 12), (2, 4, 8, 12), (1, 2, 4, 8, 12)):
        with pytest.raises(UserError, match=r"give \(B, 1, Z, Y, X\)"):
            encoder()(torch.zeros(shape))
    with pytest.raises(UserError, match="no multiple of the patch"):
        encoder()(torch.zeros(1, 1, 3, 8, 12))


def test_it_is_found_in_the_package() -> None:
    assert tapct.PyramidEncoder is PyramidEncoder
