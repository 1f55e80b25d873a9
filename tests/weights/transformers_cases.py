"""Small networks as folders for transformers, and what tapct computes with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tapct.config.plugins import Plugin
from tapct.eval.features.preprocess import Preprocess
from tapct.models import vit
from tapct.nn import rope
from tapct.types import HUContract, Volume
from tapct.weights.card import FeatureSettings
from tapct.weights.huggingface.folder import save_folder
from tapct.weights.huggingface.model_card import ModelFacts
from tapct.weights.pretrained import Pretrained

LEARNED = vit.Config(
    window=(4, 16, 24), patch=(2, 4, 4), dim=24, depth=2, heads=2, registers=2, drop_path=0.3
)
CONFIGS = {
    "learned": LEARNED,
    "rope": replace(
        LEARNED, positions="rope", ffn="swiglu", qk_norm=True, layer_scale=None, mlp_ratio=3.0
    ),
    "offset": replace(LEARNED, pos_offset=0.1, norm_eps=1e-5),
    "plane": replace(LEARNED, positions="rope", rope=rope.Config(axes="yx", coordinates="voxel")),
    "both": replace(
        LEARNED,
        positions="both",
        pos_resize="linear",
        registers=0,
        qkv_bias=False,
        rope=rope.Config(coordinates="mm", base=50.0),
    ),
}
CONTRACT = HUContract(-900.0, 700.0, -50.0, 300.0)
PREPROCESS = Preprocess((32, 40), (4, 16, 24), (2, 8, 12), 0.5)
SHAPES = {  # (B, Z, Y, X)
    "native": (2, 4, 16, 24),
    "deeper": (1, 10, 16, 24),
    "wider": (1, 4, 20, 36),
    "smaller": (3, 2, 4, 8),
}
SPACING_MM = (2.5, 0.8, 0.9)


def network(config: vit.Config, seed: int = 0) -> vit.VisionTransformer:
    """A network whose every parameter has an effect."""
    model = vit.build(config)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=draw)
    return model.requires_grad_(False).eval()


def settings_of(config: vit.Config) -> FeatureSettings:
    return FeatureSettings(Plugin("vit", config), CONTRACT, PREPROCESS)


def write(folder: Path, name: str) -> Pretrained:
    """Write a folder for transformers; returns the same network in tapct."""
    config = CONFIGS[name]
    model = network(config)
    save_folder(folder, model, settings_of(config), ModelFacts(name))
    return Pretrained(model, settings_of(config), {})


def volume(seed: int = 0) -> Volume:
    hu = np.random.default_rng(seed).integers(-1200, 1500, (7, 45, 37)).astype(np.int16)
    return Volume(hu, SPACING_MM)


@dataclass(frozen=True)
class Expected:
    """What tapct computes from a crop.

    Args:
        crops: input (B, Z, Y, X).
        spacing_mm: of every crop, (B, 3).
        patches: patch tokens of every block, each (B, N, D).
        cls: class token after the last block, (B, D).
    """

    crops: torch.Tensor
    spacing_mm: torch.Tensor
    patches: list[torch.Tensor]
    cls: torch.Tensor


def expected(model: vit.VisionTransformer, shape: tuple[int, ...]) -> Expected:
    crops = torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))
    spacing_mm = torch.tensor([SPACING_MM]) * torch.linspace(1, 2, shape[0])[:, None]
    found = model.tokens_of_blocks([crops], range(model.num_blocks), [spacing_mm])
    tokens = [found[block][0] for block in range(model.num_blocks)]
    return Expected(crops, spacing_mm, [each.patches_BND for each in tokens], tokens[-1].cls_BD)
