"""A small untrained network as an export, for tests of what is done with one."""

from __future__ import annotations

from pathlib import Path

import torch

from tapct.config.plugins import Plugin
from tapct.eval.features.preprocess import Preprocess
from tapct.models import vit
from tapct.types import HUContract
from tapct.weights.card import FeatureSettings
from tapct.weights.export import save_export

VIT = vit.Config(window=(2, 8, 8), patch=(2, 4, 4), dim=8, depth=2, heads=1, registers=1)


def tiny_export(folder: Path, seed: int = 0) -> Path:
    """Write the export of a network with random weights; returns its folder."""
    torch.manual_seed(seed)
    settings = FeatureSettings(
        Plugin("vit", VIT), HUContract(), Preprocess((16, 16), (2, 8, 8), (2, 8, 8))
    )
    model = vit.build(VIT)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_export(folder, model, settings, {"run": "tiny", "step": 1})
    return folder
