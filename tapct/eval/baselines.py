"""What a pretrained backbone must beat: the same backbone untrained, and the raw HU of each patch.

Axes: B crops, N patches, D channels, Z Y X voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tapct.config.plugins import Plugin
from tapct.nn.contracts import Backbone
from tapct.ssl.student_teacher import build_backbone
from tapct.types import Tokens


@dataclass(frozen=True)
class NamedModel:
    """A frozen backbone under the name that results carry. Every model of one evaluation has the
    same patch.
    """

    name: str
    model: nn.Module


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


def with_baselines(pretrained: Backbone, section: Plugin, seed: int) -> tuple[NamedModel, ...]:
    """The pretrained backbone and what it is compared with.

    `untrained` starts from the weights that training started from. A backbone may name variants of
    its config to show untrained too; the ViT's `untrained_layerscale1` is a random network that
    does mix its tokens.

    Args:
        section: the backbone's plug-in section.
        seed: of the initial weights in training.
    Returns:
        pretrained, untrained, untrained_NAME for each variant, raw_hu.
    """
    device = next(pretrained.parameters()).device
    models = [
        NamedModel("pretrained", pretrained),
        NamedModel("untrained", _untrained(section, seed).to(device)),
    ]
    for name, config in pretrained.untrained_variants().items():
        variant = _untrained(Plugin(section.name, config), seed).to(device)
        models.append(NamedModel(f"untrained_{name}", variant))
    return (*models, NamedModel("raw_hu", RawPatches(pretrained.patch)))


def _untrained(section: Plugin, seed: int) -> nn.Module:
    return build_backbone(section, seed).requires_grad_(False).eval()
