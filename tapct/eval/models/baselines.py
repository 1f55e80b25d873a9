"""What a pretrained backbone must beat: untrained backbones, the raw HU of each patch, and the mere
position of a patch in the body.

Axes: B crops, N patches, D channels, Z Y X voxels or patches.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tapct.base import console
from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.config.plugins import Plugin
from tapct.eval.features.prepared import Prepared
from tapct.eval.models.evaluated import NamedModel
from tapct.eval.scans.body import TISSUE_ABOVE_HU, thick_tissue
from tapct.eval.scores import OWN_MODEL
from tapct.nn.contracts import Backbone
from tapct.ssl.student_teacher import build_backbone
from tapct.types import HUContract, Tokens

UNTRAINED, RAW_HU, POSITION = "untrained", "raw_hu", "position"
WIDER = {"random_2x": 2, "random_4x": 4}  # name -> factor on the channels
NAMES = (UNTRAINED, RAW_HU, POSITION, *WIDER)
DEFAULTS = (UNTRAINED, RAW_HU, POSITION)  # without those that cost many times a forward pass


class RawPatches(nn.Module):
    """The voxels of a patch as its features: normalised HU in (z, y, x) order, no learning at all.

    Args:
        patch: voxels (z, y, x).
    """

    def __init__(self, patch: Sequence[int]) -> None:
        super().__init__()
        z, y, x = patch
        self.patch = (z, y, x)
        self.dim = math.prod(patch)

    def forward(self, crops: Sequence[Tensor]) -> list[Tokens]:
        """Crops (B, Z, Y, X) -> one `Tokens` each; the class token is the mean patch."""
        return [self._tokens(crop_BZYX) for crop_BZYX in crops]

    def _tokens(self, crop_BZYX: Tensor) -> Tokens:
        pz, py, px = self.patch
        cells = crop_BZYX.unflatten(3, (-1, px)).unflatten(2, (-1, py)).unflatten(1, (-1, pz))
        grid = (cells.shape[1], cells.shape[3], cells.shape[5])
        patches_BND = cells.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        return Tokens(patches_BND.mean(1), patches_BND[:, :0], patches_BND, grid)


class PositionFeatures(nn.Module):
    """Where a patch lies in the body, and nothing else: what a model can know without the image.

    The features are z, y and x of the patch centre in the bounding box of the body, -1 and 1 at its
    faces, their squares and their products: a linear decoder on them can draw any ellipsoid.

    Args:
        patch: voxels (z, y, x).
        contract: HU to network input, which finds the body in a prepared scan.
    """

    dim = 9

    def __init__(self, patch: Sequence[int], contract: HUContract) -> None:
        super().__init__()
        z, y, x = patch
        self.patch = (z, y, x)
        self.contract = contract

    def body_box(self, prepared: Prepared) -> Tensor:
        """Bounding box of the body in voxels of the prepared scan: float32 (2, 3), first voxel and
        end along (z, y, x); the whole scan where there is no tissue.

        Only thick tissue counts, since a table is thin and a patient is not.
        """
        depth, height, width = prepared.grid.resized
        scan_ZYX = prepared.input_ZYX[:depth, :height, :width]
        threshold = (TISSUE_ABOVE_HU - self.contract.mean) / self.contract.std
        body_ZYX = thick_tissue((scan_ZYX > threshold).cpu().numpy())
        if not body_ZYX.any():
            return torch.tensor([[0.0, 0.0, 0.0], [depth, height, width]])
        low, high = [], []
        for others in ((1, 2), (0, 2), (0, 1)):
            voxels = np.flatnonzero(body_ZYX.any(axis=others))
            low.append(float(voxels[0]))
            high.append(float(voxels[-1]) + 1)
        return torch.tensor([low, high])

    def forward(self, places: Sequence[Tensor]) -> list[Tokens]:
        """Places of patches (B, Z, Y, X, 3) in the box of the body -> one `Tokens` each; the class
        token is the mean patch.
        """
        return [self._tokens(place_BZYX3) for place_BZYX3 in places]

    def _tokens(self, place_BZYX3: Tensor) -> Tokens:
        place_BN3 = place_BZYX3.flatten(1, 3)
        z, y, x = place_BN3.unbind(-1)
        products = torch.stack([z * y, z * x, y * x], dim=-1)
        patches_BND = torch.cat([place_BN3, place_BN3.square(), products], dim=-1)
        _, gz, gy, gx, _ = place_BZYX3.shape
        return Tokens(patches_BND.mean(1), patches_BND[:, :0], patches_BND, (gz, gy, gx))


def check_names(names: Sequence[str]) -> None:
    """Raise UserError where a name of `eval.baselines` is that of no baseline."""
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"eval.baselines names {name!r}, which is no baseline: {hint}there are "
                f"{', '.join(NAMES)}"
            )
        if names.count(name) > 1:
            raise UserError(f"eval.baselines names {name} twice; remove one of them")


def with_baselines(
    pretrained: Backbone,
    section: Plugin,
    seed: int,
    names: Sequence[str] = NAMES,
    contract: HUContract | None = None,
) -> tuple[NamedModel, ...]:
    """The pretrained backbone and what it is compared with.

    `untrained` starts from the weights that training started from. A backbone may name variants of
    its config to show untrained too; the ViT's `untrained_layerscale1` is a random network that
    does mix its tokens. Weights of untrained backbones are made only when features are missing.

    Args:
        section: the backbone's plug-in section.
        seed: random seed of the initial weights in training.
        names: baselines, from `NAMES`.
        contract: HU to network input; None for that of `HUContract`.
    Returns:
        pretrained, then the baselines in the order of `NAMES`; untrained_VARIANT follow untrained.
    """
    check_names(names)
    device = next(pretrained.parameters()).device
    models = [NamedModel(OWN_MODEL, pretrained)]
    if UNTRAINED in names:
        models.append(_untrained(UNTRAINED, section, seed, device))
        for variant, config in pretrained.untrained_variants().items():
            name = f"{UNTRAINED}_{variant}"
            models.append(_untrained(name, Plugin(section.name, config), seed, device))
    if RAW_HU in names:
        models.append(NamedModel(RAW_HU, RawPatches(pretrained.patch)))
    if POSITION in names:
        position = PositionFeatures(pretrained.patch, contract or HUContract())
        models.append(NamedModel(POSITION, position))
    for name, factor in WIDER.items():
        if name not in names:
            continue
        config = pretrained.wider(factor)
        if config is None:
            console.say(
                f"{name}: the backbone {section.name} has no wider variant (Backbone.wider); the "
                "baseline is left out"
            )
            continue
        models.append(_untrained(name, Plugin(section.name, config), seed, device))
    return tuple(models)


def _untrained(name: str, section: Plugin, seed: int, device: torch.device) -> NamedModel:
    """A backbone with the initial weights of a run, which are made when they are needed."""

    def load() -> nn.Module:
        return build_backbone(section, seed).to(device).requires_grad_(False).eval()

    with torch.device("meta"):
        outline: nn.Module = plugins.load("models", section.name).build(section.config)
    weights = f"initial weights of {section.name}, seed {seed}"
    return NamedModel(name, outline, load=load, weights=weights)
