"""A pretrained backbone as the encoder of a segmentation network: feature maps at several
resolutions, as the decoders of MONAI and nnU-Net take them.

    level 0 (finest)    early block    upsampled most    + convolution of the input, at stride 1
    ...
    last level          last block     grid of patches

All blocks of a vision transformer have the grid of the patches. As in UNETR, early blocks are
upsampled by transposed convolutions to finer grids. From one level to the next finer one, each side
of a voxel of the grid is divided by 2, or by its smallest prime factor if it is odd; a side of 1
stays. A patch of (4, 8, 8) gives the strides (1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8).

Axes: B crops, C channels of a level, D channels of the backbone, Z Y X voxels.
Source: UNETR, Hatamizadeh et al. 2022, arXiv:2103.10504.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from tapct.base.exits import UserError
from tapct.base.geometry import Size3, times
from tapct.nn.contracts import Backbone, encode_blocks
from tapct.weights.pretrained import Pretrained


class PyramidEncoder(nn.Module):
    """Feature maps of several blocks, from the finest level to the coarsest.

    Args:
        backbone: result of `tapct.load_pretrained`, or a backbone.
        channels: channels of the levels, from the finest to the coarsest, e.g. (16, 32, 64, 128).
        blocks: block of each level, counted from 0; None: evenly spaced, the last one at the
            coarsest level.
    Attributes:
        strides_zyx: voxels of the input along (z, y, x) that a point of each level stands for.
        factors: factor along (z, y, x) from each level to the next coarser one, one fewer than
            levels.
        output_channels, strides, kernel_sizes, conv_op, conv_bias, norm_op, norm_op_kwargs,
            dropout_op, dropout_op_kwargs, nonlin, nonlin_kwargs: what the `UNetDecoder` of nnU-Net
            reads from its encoder.
    Raises:
        UserError: the patch has fewer levels, or a block does not exist.
    """

    def __init__(
        self,
        backbone: Pretrained | nn.Module,
        channels: Sequence[int],
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone.model if isinstance(backbone, Pretrained) else backbone
        if not isinstance(self.backbone, Backbone):
            raise UserError(
                f"{type(backbone).__name__} is no backbone; give the result of "
                "tapct.load_pretrained"
            )
        num, num_blocks = len(channels), self.backbone.num_blocks
        if blocks is None:
            blocks = [-(-(level + 1) * num_blocks // num) - 1 for level in range(num)]
        if not num or len(blocks) != num:
            raise UserError(
                f"there are {num} channels and {len(blocks)} blocks; give one of each per level"
            )
        self.backbone.check_blocks(blocks)
        self.blocks = tuple(blocks)
        self.channels = tuple(channels)
        self.strides_zyx = level_strides(self.backbone.patch, num)
        self.factors = [_ratio(b, a) for a, b in zip(self.strides_zyx, self.strides_zyx[1:])]
        self.levels = nn.ModuleList(self._level(level) for level in range(num))
        self.stem: nn.Module | None = None
        if self.strides_zyx[0] == (1, 1, 1):
            self.stem = nn.Conv3d(1, channels[0], 3, padding=1)
        self._describe_for_nnunet()

    def _level(self, level: int) -> nn.Sequential:
        """Layers from the grid of the patches to the grid of a level."""
        width = cast(int, self.backbone.dim)
        layers: list[nn.Module] = []
        for finer in reversed(range(level, len(self.channels) - 1)):
            factor, channels = self.factors[finer], self.channels[finer]
            layers.append(nn.ConvTranspose3d(width, channels, factor, stride=factor))
            layers += [nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU(inplace=True)]
            width = channels
        layers.append(nn.Conv3d(width, self.channels[level], 1))
        return nn.Sequential(*layers)

    def _describe_for_nnunet(self) -> None:
        """Attributes under the names of nnU-Net's encoders."""
        self.output_channels = list(self.channels)
        self.strides = [self.strides_zyx[0], *self.factors]
        self.kernel_sizes = [(3, 3, 3)] * len(self.channels)
        self.conv_op, self.conv_bias = nn.Conv3d, True
        self.norm_op, self.norm_op_kwargs = nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}
        self.dropout_op, self.dropout_op_kwargs = None, None
        self.nonlin, self.nonlin_kwargs = nn.LeakyReLU, {"inplace": True}

    def forward(self, crops: Tensor, spacing_mm: Tensor | None = None) -> list[Tensor]:
        """Feature maps of crops.

        Args:
            crops: float32 (B, 1, Z, Y, X) after `contract.normalise`, each side a multiple of the
                patch.
            spacing_mm: float32 (B, 3), voxel spacing along (z, y, x); only for a backbone in mm.
        Returns:
            One (B, C, Z / stride, Y / stride, X / stride) per level, the finest first.
        Raises:
            UserError: another shape.
        """
        if crops.ndim != 5 or crops.shape[1] != 1:
            raise UserError(f"crops are {tuple(crops.shape)}; give (B, 1, Z, Y, X)")
        spacings = None if spacing_mm is None else [spacing_mm]
        found = encode_blocks(self.backbone, [crops[:, 0]], sorted(set(self.blocks)), spacings)
        maps = []
        for block, layers in zip(self.blocks, self.levels, strict=True):
            tokens = found[block][0]
            map_BDzyx = tokens.patches_BND.transpose(1, 2).unflatten(2, tuple(tokens.grid))
            maps.append(layers(map_BDzyx))
        if self.stem is not None:
            maps[0] = maps[0] + self.stem(crops)
        return maps


def level_strides(patch: Size3, num_levels: int) -> list[Size3]:
    """Voxels along (z, y, x) of a point of each level, from the finest to the patch.

    Raises:
        UserError: the patch cannot be divided so often.
    """
    strides = [patch]
    while len(strides) < num_levels and max(strides[0]) > 1:
        z, y, x = (side // _smallest_factor(side) for side in strides[0])
        strides.insert(0, (z, y, x))
    if len(strides) < num_levels:
        raise UserError(
            f"a patch of {times(patch)} voxels gives {len(strides)} levels, and {num_levels} were "
            "asked for; give fewer channels"
        )
    return strides


def _smallest_factor(side: int) -> int:
    """Smallest prime factor; 1 for 1."""
    return next((n for n in range(2, side + 1) if side % n == 0), 1)


def _ratio(coarse: Size3, fine: Size3) -> Size3:
    z, y, x = (a // b for a, b in zip(coarse, fine, strict=True))
    return z, y, x
