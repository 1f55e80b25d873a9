"""The N-D vision transformer: one backbone for slices (2D), slabs (2.5D) and volumes (3D), by the
size of its patch.

    patches  = unfold(crop) W + b                    all groups of crops in one matrix product
    patches  = mask_token where masked                          before positions are added
    tokens   = [CLS + pos_0, registers, patches + pos_1..N]     no pos with `positions: rope`
    tokens   = tokens + drop(scale(attention(norm(tokens))))    in every block
    tokens   = tokens + drop(scale(mlp(norm(tokens))))
    features = norm(tokens)

Attention works within each crop; everything else works on the packed tokens of all crops. Rotary
positions rotate the queries and keys of attention. Parameter names are DINOv2's. With `positions:
rope` there is no `pos_embed`: CLS has no position, and starts with the standard deviation that a
learned position would give it (0.02).

Axes: B crops of one group (all of one size), N patches of one crop, P voxels of one patch, R
registers, D channels, T packed tokens of all crops of all groups, S rows of the kept crops or
tokens of one crop.
Source: Dosovitskiy et al. 2021, arXiv:2010.11929; DINOv2, arXiv:2304.07193; registers,
    arXiv:2309.16588.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct.base.exits import UserError
from tapct.base.geometry import Grid, Size3, patch_grid
from tapct.config import setting
from tapct.nn import init, rope
from tapct.nn.attention import Attention
from tapct.nn.backends import BACKENDS, GPU_ONLY, Span, Spans
from tapct.nn.contracts import Backbone, CropCost, LayerCost, check_groups
from tapct.nn.layers import (
    DropKey,
    LayerScale,
    Mlp,
    NoScale,
    Subset,
    SwiGLU,
    draw_subsets,
    swiglu_hidden,
)
from tapct.nn.norm import LayerNorm
from tapct.nn.posembed import resize_positions
from tapct.nn.rope import Rotation
from tapct.types import Tokens

# Rows of `tapct plan` and the parameters in each; the first pattern that fits a name decides.
PARTS = {
    "patch embedding": r"patch_embed\.",
    "tokens": r"(cls_token|register_tokens|mask_token)$",
    "positions": r"pos_embed$",
    "attention": r"blocks\.\d+\.attn\.",
    "feed-forward": r"blocks\.\d+\.mlp\.",
    "norms and scales": r"",
}


@dataclass(frozen=True)
class Config:
    """Sizes and switches of the backbone; the defaults are TAP-S-3D."""

    window: tuple[int, int, int] = setting(
        (12, 224, 224),
        "size of a crop in voxels (z, y, x) for which the learned positions are used without "
        "resizing; arXiv:2512.00872",
        ge=1,
    )
    patch: tuple[int, int, int] = setting(
        (4, 8, 8), "voxels (z, y, x) of one patch; arXiv:2512.00872", ge=1
    )
    in_chans: int = setting(
        1, "channels of a voxel; training needs 1, because views have one channel", ge=1
    )
    dim: int = setting(384, "channels D of a token (ViT-S 384, ViT-B 768)", ge=1)
    depth: int = setting(12, "number of transformer blocks", ge=1)
    heads: int = setting(6, "number of attention heads; D / heads is 64 in ViT-S and ViT-B", ge=1)
    mlp_ratio: float = setting(
        4.0,
        "hidden width of the feed-forward network divided by D; swiglu uses 2/3 of this width",
        gt=0.0,
    )
    ffn: str = setting(
        "mlp", "feed-forward network: mlp (two linear layers) or swiglu", choices=("mlp", "swiglu")
    )
    qkv_bias: bool = setting(True, "bias of the query-key-value projection; DINOv2")
    qk_norm: bool = setting(
        False, "layer norm of each head's queries and keys; arXiv:2302.05442 (ViT-22B)"
    )
    registers: int = setting(4, "number of register tokens R; arXiv:2309.16588", ge=0)
    layer_scale: float | None = setting(
        1e-5,
        "LayerScale: initial gain of every residual branch; null or 0: no LayerScale; DINOv2",
        ge=0.0,
    )
    norm_eps: float = setting(
        1e-6, "epsilon of the layer norms of the tokens; DINOv2: 1e-6, DINOv3: 1e-5", gt=0.0
    )
    drop_path: float = setting(
        0.1,
        "stochastic depth: share of crops that skip a residual branch in training; the TAP configs",
        ge=0.0,
        lt=1.0,
    )
    drop_path_rounding: str = setting(
        "stochastic",
        "how the number of kept crops is rounded: stochastic rounds at random, so that the "
        "mean is exact; dinov2 rounds down (of 2 crops at 0.1 it keeps only 1)",
        choices=("stochastic", "dinov2"),
    )
    positions: str = setting(
        "learned",
        "how a patch gets its position: learned: learned vectors are added to the tokens "
        "(DINOv2); rope: queries and keys are rotated by angles that depend on the position "
        "(DINOv3); both",
        choices=("learned", "rope", "both"),
    )
    pos_resize: str = setting(
        "cubic",
        "interpolation by which learned positions are resized to other crop sizes; DINOv2: cubic; "
        "published TAP-CT weights: linear",
        choices=("cubic", "linear"),
    )
    pos_offset: float = setting(
        0.0,
        "offset that is added to the number of patches along an axis when learned positions are "
        "resized (`interpolate_offset` of DINOv2); DINOv2 without registers: 0.1",
        ge=0.0,
        lt=1.0,
    )
    rope: rope.Config = field(default_factory=rope.Config)
    attention: str = setting(
        "sdpa",
        "attention back-end: sdpa works on every device, varlen and xformers only on a GPU; auto "
        "uses the first of varlen, xformers and sdpa that works on the device with train.precision",
        choices=tuple(BACKENDS),
    )

    def __post_init__(self) -> None:
        patch_grid(self.window, self.patch, "model.window")
        if self.dim % self.heads:
            raise UserError(
                f"model.dim {self.dim} is no multiple of model.heads {self.heads}; change one of "
                "them"
            )
        hidden = int(self.dim * self.mlp_ratio)
        if (swiglu_hidden(hidden) if self.ffn == "swiglu" else hidden) < 1:
            raise UserError(
                f"model.mlp_ratio {self.mlp_ratio:g} times model.dim {self.dim} is less than one "
                "channel; raise one of them"
            )
        if not self.uses_rope and self.rope != rope.Config():
            raise UserError(
                "model.rope is set, but model.positions=learned reads none of it; choose rope or "
                "both"
            )
        if self.uses_rope and not rope.pairs_per_axis(self.rope, self.dim // self.heads):
            least = self.rope.channels_per_period
            raise UserError(
                f"model.positions={self.positions} needs heads of at least {least} "
                f"channels, and model.dim {self.dim} over model.heads {self.heads} gives "
                f"{self.dim // self.heads}; use fewer heads"
            )

    @property
    def uses_rope(self) -> bool:
        """Whether rotary positions rotate queries and keys."""
        return self.positions != "learned"

    @property
    def grid(self) -> Grid:
        """Patches of `model.window` along (z, y, x)."""
        return patch_grid(self.window, self.patch, "model.window")


class PatchEmbed(nn.Module):
    """Patch embedding: a convolution whose stride is its kernel size, as one matrix product.

    Plain form: self.proj(crops[:, None]).flatten(2).transpose(1, 2). The convolution holds the
    parameters under DINOv2's name and is never called: one product over the unfolded crops of all
    groups is faster, and tests/models/test_vit.py compares the two.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch = config.patch
        self.in_chans = config.in_chans
        self.proj = nn.Conv3d(config.in_chans, config.dim, config.patch, stride=config.patch)

    def grid_of(self, crops: Tensor) -> Grid:
        """Patches along (z, y, x) of a group of crops.

        Raises:
            UserError: the crops have other axes than expected, or their size is no multiple of the
                patch.
        """
        want = "(B, Z, Y, X)" if self.in_chans == 1 else f"(B, {self.in_chans}, Z, Y, X)"
        if crops.ndim != want.count(",") + 1 or (
            self.in_chans > 1 and crops.shape[1] != self.in_chans
        ):
            raise UserError(
                f"crops of shape {tuple(crops.shape)}: this backbone takes {want}; reshape them"
            )
        return patch_grid(
            crops.shape[-3:], self.patch, "crop", "change the view's window or the patch"
        )

    def unfold(self, crops: Tensor) -> Tensor:
        """Crops (B, Z, Y, X) or (B, C, Z, Y, X) -> rows of voxels (B*N, C*P), patches in (z, y, x)
        raster order.
        """
        grid = self.grid_of(crops)
        num_crops, (gz, gy, gx), (pz, py, px) = crops.shape[0], grid, self.patch
        # (B, C, gz, pz, gy, py, gx, px) -> (B, gz, gy, gx, C, pz, py, px) -> (B*N, C*P)
        split = crops.reshape(num_crops, self.in_chans, gz, pz, gy, py, gx, px)
        return split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(num_crops * math.prod(grid), -1)

    def forward(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Groups of crops -> one (B, N, D) per group."""
        rows = [self.unfold(crops) for crops in groups]
        weight = self.proj.weight.flatten(1)
        packed = torch.cat(rows) if len(rows) > 1 else rows[0]
        embedded = F.linear(packed.to(weight.dtype), weight, self.proj.bias)
        # shape[0] and not len(): torch.export keeps a free number of crops as a symbol
        parts = embedded.split([part.shape[0] for part in rows])
        return [
            part.unflatten(0, (crops.shape[0], -1))
            for part, crops in zip(parts, groups, strict=True)
        ]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each on a residual branch with LayerScale and stochastic
    depth.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        scale = config.layer_scale
        self.norm1 = LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(dim, config.heads, config.qkv_bias, config.attention, config.qk_norm)
        self.ls1 = LayerScale(dim) if scale else NoScale()
        self.norm2 = LayerNorm(dim, eps=config.norm_eps)
        self.mlp = SwiGLU(dim, hidden) if config.ffn == "swiglu" else Mlp(dim, hidden)
        self.ls2 = LayerScale(dim) if scale else NoScale()

    def forward(
        self,
        x_TD: Tensor,
        spans: Spans,
        subsets: tuple[Subset | None, Subset | None] = (None, None),
        rotation: Rotation | None = None,
    ) -> Tensor:
        """One block over the packed tokens.

        Args:
            x_TD: tokens of all crops, packed as `spans` say.
            spans: runs of crops of equal length.
            subsets: crops that go through attention, and through the feed-forward; None: all.
            rotation: rotation of all T tokens; None without rotary positions.
        """
        # x = x + drop(scale(attn(norm(x)))), then the same with the mlp. `drop` is stochastic
        # depth: the branch works on the rows of the kept crops alone and is added to these rows.
        # `deferred`: the rows are normalised later, inside the next linear layer, which gives the
        # same numbers with less memory (nn/lean.py).
        attention_subset, mlp_subset = subsets
        if attention_subset is None:
            x_TD = x_TD + self.ls1(self.attn(self.norm1.deferred(x_TD), spans, rotation))
        else:
            kept_SD, kept_spans = attention_subset.take(x_TD), attention_subset.spans
            kept_rotation = None
            if rotation is not None:
                kept_rotation = rotation.take(attention_subset.row_S)
            attended_SD = self.attn(self.norm1.deferred(kept_SD), kept_spans, kept_rotation)
            x_TD = attention_subset.add(x_TD, self.ls1(attended_SD))
        if mlp_subset is None:
            return x_TD + self.ls2(self.mlp(self.norm2.deferred(x_TD)))
        kept_SD = mlp_subset.take(x_TD)
        return mlp_subset.add(x_TD, self.ls2(self.mlp(self.norm2.deferred(kept_SD))))


class VisionTransformer(Backbone):
    """The backbone; starts as `init_weights(0)` leaves it, on a meta device without values.

    Args:
        config: sizes and switches.
    """

    register_tokens: nn.Parameter | None
    pos_embed: nn.Parameter | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.patch = config.patch
        self.attention = config.attention
        self.position_grid = None if config.positions == "rope" else config.grid
        self.num_blocks = config.depth
        self.needs_spacing = config.uses_rope and config.rope.coordinates == "mm"
        device = torch.get_default_device()
        with torch.device("meta"):  # the layers' own initialisation is skipped
            self.patch_embed = PatchEmbed(config)
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
            register_tokens = pos_embed = None
            if config.registers:
                register_tokens = nn.Parameter(torch.empty(1, config.registers, config.dim))
            if config.positions != "rope":
                pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(config.grid), config.dim))
            self.register_parameter("register_tokens", register_tokens)
            self.register_parameter("pos_embed", pos_embed)
            self.mask_token = nn.Parameter(torch.empty(1, config.dim))
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.to_empty(device=device)
        if device.type != "meta":
            self.init_weights(0)

    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        key: DropKey | None = None,
        spacing_mm: Sequence[Tensor] | None = None,
    ) -> list[Tokens]:
        """Encode groups of crops in one packed pass.

        Args:
            crops: groups, each (B, Z, Y, X) of one size, float32, normalised; (B, C, Z, Y, X) where
                in_chans > 1.
            masks: per group bool (B, N), True where the mask token replaces the patch; None: no
                masks.
            key: key of stochastic depth and of drawn coordinates; nothing is drawn with None or in
                eval mode.
            spacing_mm: per group float32 (B, 3), mm per voxel along (z, y, x); needed only for
                coordinates in mm.
        Returns:
            One `Tokens` per group, after the final norm.
        Raises:
            UserError: `crops` is no list of groups, a crop has other axes or is no multiple of the
                patch, or coordinates in mm lack the spacing.
        """
        last = self.num_blocks - 1
        return self._tokens_after((last,), crops, masks, key, spacing_mm)[last]

    def tokens_of_blocks(
        self,
        crops: Sequence[Tensor],
        blocks: Sequence[int],
        spacing_mm: Sequence[Tensor] | None = None,
    ) -> dict[int, list[Tokens]]:
        """Tokens after several blocks in one pass, each through the final norm; blocks behind the
        last one that is asked for are not computed. See `Backbone.tokens_of_blocks`.
        """
        self.check_blocks(blocks)
        return self._tokens_after(blocks, crops, None, None, spacing_mm)

    def tokens_before_norm(
        self,
        crops: Sequence[Tensor],
        blocks: Sequence[int],
        spacing_mm: Sequence[Tensor] | None = None,
    ) -> dict[int, list[Tokens]]:
        """`tokens_of_blocks` without the final norm."""
        self.check_blocks(blocks)
        return self._tokens_after(blocks, crops, None, None, spacing_mm, norm=False)

    def _tokens_after(
        self,
        wanted: Sequence[int],
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None,
        key: DropKey | None,
        spacing_mm: Sequence[Tensor] | None,
        norm: bool = True,
    ) -> dict[int, list[Tokens]]:
        """Block -> tokens of every group after the final norm; arguments as in `forward`.

        Args:
            wanted: numbers of the blocks.
            norm: whether the final norm is applied.
        """
        check_groups(crops)
        grids = [self.patch_embed.grid_of(group) for group in crops]
        x_TD, spans = self._embed(crops, masks or [None] * len(crops), grids)
        rotation = None
        if self.config.uses_rope:
            rotation = self._rotation(spans, grids, key, spacing_mm, x_TD.device)
        # two residual branches per block
        subsets: list[Subset | None] = [None] * (2 * self.num_blocks)
        if key is not None and self.training and self.config.drop_path > 0:
            subsets = draw_subsets(
                spans,
                branches=len(subsets),
                drop=self.config.drop_path,
                rounding=self.config.drop_path_rounding,
                key=key,
                device=x_TD.device,
            )
        found: dict[int, list[Tokens]] = {}
        for index, block in enumerate(self.blocks):
            x_TD = block(x_TD, spans, (subsets[2 * index], subsets[2 * index + 1]), rotation)
            if index in wanted:
                tokens_TD = self.norm(x_TD) if norm else x_TD
                parts = tokens_TD.split([span.rows for span in spans])
                found[index] = [
                    self._unpack(part, span, grid)
                    for part, span, grid in zip(parts, spans, grids, strict=True)
                ]
            if index >= max(wanted):
                break
        return found

    def _embed(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], grids: Sequence[Grid]
    ) -> tuple[Tensor, Spans]:
        """Tokens of all groups with their positions: (T, D), and how they are packed."""
        cls_11D: Tensor = self.cls_token
        if self.pos_embed is not None:
            cls_11D = cls_11D + self.pos_embed[:, :1]
        packed, spans = [], []
        for patches_BND, mask_BN, grid in zip(self.patch_embed(crops), masks, grids, strict=True):
            num_crops = patches_BND.shape[0]
            if mask_BN is not None:
                assert mask_BN.shape == patches_BND.shape[:2], (
                    f"mask {mask_BN.shape} for patches {patches_BND.shape}"
                )
                patches_BND = torch.where(
                    mask_BN[..., None], self.mask_token.to(patches_BND.dtype), patches_BND
                )
            tokens = [cls_11D.expand(num_crops, -1, -1)]
            if self.register_tokens is not None:
                tokens.append(self.register_tokens.expand(num_crops, -1, -1))
            tokens.append(self._place(patches_BND, grid))
            # `_place` returns float32, so all tokens are float32 from here on: the residual stream
            # sums 2 * depth branches, and bf16 would lose the small ones
            x_BSD = torch.cat(tokens, dim=1)
            packed.append(x_BSD.flatten(0, 1))
            spans.append(Span(num_crops, x_BSD.shape[1]))
        return torch.cat(packed) if len(packed) > 1 else packed[0], tuple(spans)

    def _place(self, patches_BND: Tensor, grid: Grid) -> Tensor:
        """Patches with their learned positions, where there are any; float32 or wider."""
        if self.pos_embed is None:
            return patches_BND.to(torch.promote_types(patches_BND.dtype, torch.float32))
        return patches_BND + self.resized_positions(self.pos_embed[0, 1:], self.config.grid, grid)

    def resized_positions(self, pos_ND: Tensor, native: Grid, grid: Grid) -> Tensor:
        """Learned positions for another grid; see `Backbone.resized_positions`."""
        config = self.config
        return resize_positions(pos_ND, native, grid, config.pos_resize, config.pos_offset)

    def _rotation(
        self,
        spans: Spans,
        grids: Sequence[Grid],
        key: DropKey | None,
        spacing_mm: Sequence[Tensor] | None,
        device: torch.device,
    ) -> Rotation:
        """Rotation of the queries and keys of all packed tokens; never waits for the device."""
        config = self.config
        if self.needs_spacing and spacing_mm is None:
            raise UserError(
                "model.rope.coordinates=mm: the spacing of these crops was not given; pass "
                "spacing_mm"
            )
        groups = []
        for group, (span, grid) in enumerate(zip(spans, grids, strict=True)):
            spacing_mm_B3 = scale_B3 = None
            if self.needs_spacing and spacing_mm is not None:
                spacing_mm_B3 = spacing_mm[group]
                if tuple(spacing_mm_B3.shape) != (span.crops, 3):
                    raise UserError(
                        f"spacing_mm of a group of {span.crops} crops is "
                        f"{tuple(spacing_mm_B3.shape)}; rule: a list of one tensor (B, 3) per group"
                    )
            if key is not None and self.training:
                counters = (key.step, key.micro, key.rank, group)
                scale_B3 = rope.draw_scales(
                    config.rope, span.crops, seed=key.seed, counters=counters, device=device
                )
            groups.append(
                rope.group_rotation(
                    config.rope,
                    config.dim // config.heads,
                    grid=grid,
                    patch=config.patch,
                    num_crops=span.crops,
                    num_prefix=1 + config.registers,
                    spacing_mm_B3=spacing_mm_B3,
                    scale_B3=scale_B3,
                    device=device,
                )
            )
        return rope.join(groups)

    def _unpack(self, x_TD: Tensor, span: Span, grid: Grid) -> Tokens:
        """The tokens of one group by their role."""
        sizes = [1, self.config.registers, math.prod(grid)]
        cls_B1D, registers_BRD, patches_BND = x_TD.unflatten(0, (span.crops, span.tokens)).split(
            sizes, dim=1
        )
        return Tokens(cls_B1D.squeeze(1), registers_BRD, patches_BND, grid)

    def crop_cost(self, window: Size3) -> CropCost:
        """Parameters and FLOPs by part; see `Backbone.crop_cost`."""
        config, dim = self.config, self.dim
        num_patches = math.prod(patch_grid(window, self.patch, "window"))
        tokens = 1 + config.registers + num_patches
        parameters: Counter[str] = Counter()
        for name, parameter in self.named_parameters():
            part = next(part for part, pattern in PARTS.items() if re.match(pattern, name))
            parameters[part] += parameter.numel()

        # qkv and output projection, then scores and their mixture of values
        attention = config.depth * tokens * (8.0 * dim * dim + 4.0 * tokens * dim)
        hidden = int(dim * config.mlp_ratio)
        # SwiGLU has three matrices of a narrower width, the MLP two
        widths = 3 * swiglu_hidden(hidden) if config.ffn == "swiglu" else 2 * hidden
        feed_forward = config.depth * tokens * 2.0 * dim * widths
        kept = 1 - config.drop_path
        embedding = 2.0 * math.prod(window) * config.in_chans * dim
        layers = (
            LayerCost("patch embedding", parameters["patch embedding"], embedding),
            LayerCost("tokens", parameters["tokens"], 0.0),
            LayerCost("positions", parameters["positions"], 0.0),
            LayerCost("attention", parameters["attention"], attention, kept),
            LayerCost("feed-forward", parameters["feed-forward"], feed_forward, kept),
            LayerCost("norms and scales", parameters["norms and scales"], 0.0),
        )
        return CropCost(tokens, layers)

    def export_config(self) -> Config:
        """The config with an attention back-end that works on every machine."""
        if self.config.attention in GPU_ONLY:
            return replace(self.config, attention="auto")
        return self.config

    def transformers_config(self) -> dict[str, Any]:
        """Sizes and switches for transformers; see `Backbone.transformers_config`."""
        config = self.config
        hidden = int(config.dim * config.mlp_ratio)
        return {
            "image_size": list(config.window),
            "patch_size": list(config.patch),
            "num_channels": config.in_chans,
            "hidden_size": config.dim,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "intermediate_size": swiglu_hidden(hidden) if config.ffn == "swiglu" else hidden,
            "feed_forward": config.ffn,
            "num_register_tokens": config.registers,
            "qkv_bias": config.qkv_bias,
            "qk_norm": config.qk_norm,
            "layer_scale": bool(config.layer_scale),
            "layer_norm_eps": config.norm_eps,
            "positions": config.positions,
            "position_resize": config.pos_resize,
            "position_offset": config.pos_offset,
            "rope_coordinates": config.rope.coordinates,
            "rope_axes": list(rope.AXES[config.rope.axes]),
            "rope_base": config.rope.base,
            "rope_shortest": rope.shortest_period(config.rope),
        }

    def untrained_variants(self) -> dict[str, Config]:
        """A variant with LayerScale gains of 1.

        The default gains are so small that an untrained block hardly changes its input.
        """
        if self.config.layer_scale in (None, 0, 1):
            return {}
        return {"layerscale1": replace(self.config, layer_scale=1.0)}

    def wider(self, factor: int) -> Config:
        """`factor` times the channels and heads, so that a head keeps its width.

        LayerScale, where there is one, starts at 1: with smaller gains an untrained network hardly
        mixes its tokens, and would be a weak baseline.
        """
        return replace(
            self.config,
            dim=factor * self.config.dim,
            heads=factor * self.config.heads,
            layer_scale=1.0 if self.config.layer_scale else self.config.layer_scale,
        )

    def param_group_id(self, name: str) -> int:
        """Number of a parameter's layer, for layer-wise learning rates.

        Args:
            name: dotted name within this module, e.g. `blocks.3.attn.qkv.weight`.
        Returns:
            0 for embeddings and tokens, i + 1 for block i (from 0), and one more than the last
            block for the final norm.
        """
        block = re.match(r"blocks\.(\d+)\.", name)
        if block:
            return int(block[1]) + 1
        return self.num_blocks + 1 if name.startswith("norm.") else 0

    def init_weights(self, seed: int) -> None:
        """Set every parameter from (seed, its name), as DINOv2 does.

        | parameter | initial values |
        |---|---|
        | weights of linear layers, learned positions | truncated normal, standard deviation 0.02 |
        | biases, mask token | 0 |
        | register tokens; class token with a learned position | normal, 1e-6 |
        | class token without a learned position | normal, 0.02 |
        | weights of norms | 1 |
        | LayerScale | `layer_scale` of the config |
        | patch embedding | uniform, as PyTorch's convolution |
        """
        patch_voxels = self.config.in_chans * math.prod(self.patch)
        for name, parameter in self.named_parameters():
            if name.startswith("patch_embed."):
                init.uniform_fan_in(parameter, patch_voxels, seed, name)
            elif name == "cls_token" and self.pos_embed is None:
                init.normal(parameter, 0.02, seed, name)
            elif name in ("cls_token", "register_tokens"):
                init.normal(parameter, 1e-6, seed, name)
            elif name.endswith(".gamma"):
                init.constant(parameter, self.config.layer_scale or 1.0)
            elif name == "mask_token" or name.endswith(".bias"):
                init.constant(parameter, 0.0)
            elif re.search(r"norm\d?\.weight$", name):
                init.constant(parameter, 1.0)
            else:
                init.trunc_normal(parameter, 0.02, seed, name)


def build(config: Config) -> VisionTransformer:
    """Make the backbone."""
    return VisionTransformer(config)
