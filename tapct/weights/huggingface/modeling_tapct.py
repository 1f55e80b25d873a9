"""A vision transformer for 3D computed tomography (CT), to be loaded by Hugging Face transformers.

    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor(hu)            # Hounsfield units, (depth, height, width), see the model card
    output = model(**inputs)          # the whole scan at once
    scan = model.embed(**inputs)      # the same scan by sliding windows, as in evaluation

FOLDER holds this file, `image_processing_tapct.py`, `config.json`, `preprocessor_config.json` and
`model.safetensors`. They need PyTorch and transformers, and no other package.

The network is that of DINOv2, with patches of voxels in place of patches of pixels:

    tokens = [CLS, registers, one token per patch] + learned positions
    tokens = tokens + scale(attention(norm(tokens)))      in every block
    tokens = tokens + scale(mlp(norm(tokens)))
    tokens = norm(tokens)

`last_hidden_state` holds the patch tokens only, (B, N, C). Patch n lies in row-major order along
(depth, height, width), so `last_hidden_state.transpose(1, 2).unflatten(2, grid)` is a feature map.
`pooler_output` is the CLS token, (B, C). With `output_hidden_states=True`, `hidden_states` holds
the patch tokens after every block, each through the final norm; the last entry equals
`last_hidden_state`. Attention is PyTorch's scaled_dot_product_attention without a mask: its memory
grows linearly with the number of tokens on CPUs and GPUs.

Axes in names: B batch, N patches, T tokens (CLS, registers and patches), C channels, H heads,
D H W depth, height and width in voxels, d h w the same in patches.
Source: DINOv2, arXiv:2304.07193; registers, arXiv:2309.16588; TAP-CT, arXiv:2512.00872.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


class TAPCTConfig(PretrainedConfig):
    """Sizes and switches of the network.

    Args:
        image_size: voxels (depth, height, width) of a window. Learned positions belong to this
            size; for other inputs they are interpolated.
        patch_size: voxels (depth, height, width) of a patch.
        num_channels: channels of a voxel.
        hidden_size: channels C of a token.
        num_hidden_layers: number of transformer blocks.
        num_attention_heads: number of attention heads.
        intermediate_size: width of the hidden layer of the feed-forward network.
        feed_forward: "mlp" (two linear layers, GELU) or "swiglu" (gated, three linear layers).
        num_register_tokens: number of register tokens.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qk_norm: whether queries and keys are normalised in every head.
        layer_scale: whether residual branches are multiplied by a learned gain per channel.
        layer_norm_eps: epsilon of the layer norms of tokens.
        positions: "learned" (added to the tokens), "rope" (rotary, in attention) or "both".
        position_resize: interpolation of learned positions, "cubic" or "linear".
        position_offset: offset that is added to the number of patches along an axis when learned
            positions are interpolated.
        rope_coordinates: unit of rotary positions: "normalised" (-1 to 1 along each axis of the
            input), "voxel", or "mm" (then the model needs `spacing_mm`).
        rope_axes: axes that rotary positions work on, 0 depth, 1 height, 2 width.
        rope_base: ratio that the periods of rotary positions span.
        rope_shortest: shortest period, in the unit of the coordinates.
        window_size: voxels (depth, height, width) of the sliding window in `embed`.
        window_stride: step of the sliding window in voxels.
        window_refine: cells per patch (depth, height, width) of the feature map of `embed`. Where
            it is above 1, the stride places windows between the patches of the others, and a cell
            is the mean over all patches that cover it.
        window_border_weight: weight of the outermost patches of a window in `embed`; 1 is the plain
            mean over windows.
        pad_value: value of air after the processor; `embed` pads small scans with it.
    """

    model_type = "tapct"

    def __init__(
        self,
        image_size: Sequence[int] = (12, 224, 224),
        patch_size: Sequence[int] = (4, 8, 8),
        num_channels: int = 1,
        hidden_size: int = 384,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        intermediate_size: int = 1536,
        feed_forward: str = "mlp",
        num_register_tokens: int = 4,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: bool = True,
        layer_norm_eps: float = 1e-6,
        positions: str = "learned",
        position_resize: str = "cubic",
        position_offset: float = 0.0,
        rope_coordinates: str = "normalised",
        rope_axes: Sequence[int] = (0, 1, 2),
        rope_base: float = 100.0,
        rope_shortest: float = 1.0,
        window_size: Sequence[int] = (12, 224, 224),
        window_stride: Sequence[int] = (8, 112, 112),
        window_refine: Sequence[int] = (1, 1, 1),
        window_border_weight: float = 1.0,
        pad_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.image_size = list(image_size)
        self.patch_size = list(patch_size)
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.feed_forward = feed_forward
        self.num_register_tokens = num_register_tokens
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.layer_scale = layer_scale
        self.layer_norm_eps = layer_norm_eps
        self.positions = positions
        self.position_resize = position_resize
        self.position_offset = position_offset
        self.rope_coordinates = rope_coordinates
        self.rope_axes = list(rope_axes)
        self.rope_base = rope_base
        self.rope_shortest = rope_shortest
        self.window_size = list(window_size)
        self.window_stride = list(window_stride)
        self.window_refine = list(window_refine)
        self.window_border_weight = window_border_weight
        self.pad_value = pad_value
        super().__init__(**kwargs)


@dataclass
class TAPCTScanOutput(ModelOutput):
    """Features of whole scans, from `TAPCTModel.embed`.

    Args:
        feature_map: (B, C, d, h, w), one vector per patch, averaged over overlapping windows.
        pooler_output: (B, C), mean CLS token of the windows.
    """

    feature_map: Tensor | None = None
    pooler_output: Tensor | None = None


# --- positions ---


def resize_matrix(n_in: int, n_out: int, mode: str, offset: float, like: Tensor) -> Tensor:
    """Matrix (n_out, n_in) that interpolates one axis from `n_in` to `n_out` points.

    Point i lies at (i + 0.5) / n of the axis, and the border value continues outside, as in
    `torch.nn.functional.interpolate(size=n_out, align_corners=False)`, which has no cubic mode in
    3D. For n_out = n_in the matrix is the identity. With an offset, n_out + offset takes the place
    of n_out in the position of the points.
    """
    point = torch.arange(n_out, device=like.device, dtype=like.dtype)
    centre = (point + 0.5) * (n_in / (n_out + offset)) - 0.5
    reach = 2 if mode == "cubic" else 1
    tap = torch.arange(1 - reach, reach + 1, device=like.device)
    index = centre.floor().long()[:, None] + tap  # (n_out, taps)
    distance = (centre[:, None] - index).abs()
    if mode == "cubic":  # Keys' kernel with a = -0.75, as in PyTorch's bicubic mode
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        weight = torch.where(distance <= 1, near, far)
    else:
        weight = (1 - distance).clamp(min=0)
    column = torch.arange(n_in, device=like.device)
    is_tap = index.clamp(0, n_in - 1)[:, :, None] == column  # (n_out, taps, n_in)
    return (is_tap * weight[:, :, None]).sum(1)


def resize_positions(
    positions_NC: Tensor, native: Sequence[int], grid: Sequence[int], mode: str, offset: float
) -> Tensor:
    """Learned positions of the native grid, interpolated to another grid: (d*h*w, C).

    torch.export may leave the grid free, and a comparison with the native grid would fix it. An
    exported graph therefore always interpolates, which changes nothing at the native grid.
    """
    if not torch.compiler.is_exporting():
        if list(native) == list(grid):
            return positions_NC
    elif offset:
        raise ValueError("a model with position_offset cannot be exported by torch.export")
    table = positions_NC.float().unflatten(0, tuple(native))  # (d, h, w, C)
    for axis in range(3):
        # an axis that keeps its size does not move, except for height and width together
        moved = (1, 2) if axis > 0 else (0,)
        moves = bool(offset) and any(native[other] != grid[other] for other in moved)
        shift = offset if moves else 0.0
        matrix = resize_matrix(native[axis], grid[axis], mode, shift, table)
        table = torch.tensordot(matrix, table, dims=([1], [axis])).movedim(0, axis)
    return table.flatten(0, 2).to(positions_NC.dtype)


def rotary_tables(
    config: TAPCTConfig, grid: Sequence[int], spacing_mm_B3: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of all tokens, (B or 1, 1, T, pairs of channels).

    The angle of a patch is 2 pi coordinate / period, with its own periods for each axis. CLS and
    registers are not rotated.
    """
    head_channels = config.hidden_size // config.num_attention_heads
    num_periods = head_channels // (2 * len(config.rope_axes))  # two channels in a pair
    exponent = torch.arange(num_periods, device=like.device, dtype=torch.float32) / num_periods
    period = config.rope_shortest * config.rope_base**exponent
    angles = []
    for axis in config.rope_axes:
        n, side = grid[axis], config.patch_size[axis]
        # patch centres, relative to the centre of the input
        place = torch.arange(n, device=like.device, dtype=torch.float32)[None] + (0.5 - n / 2)
        if config.rope_coordinates == "normalised":
            place = place * 2 / n
        elif config.rope_coordinates == "voxel":
            place = place * side
        elif spacing_mm_B3 is None:
            raise ValueError(
                "this model works in mm: pass spacing_mm, (B, 3), the voxel spacing of the input "
                "along (depth, height, width); the processor returns it if it is given the scan's"
            )
        else:
            place = place * side * spacing_mm_B3[:, axis, None].float()
        angle = 2 * math.pi * place[..., None] / period  # (B or 1, n, periods)
        shape = [angle.shape[0], 1, 1, 1, num_periods]
        shape[1 + axis] = n
        angles.append(angle.view(shape).expand(-1, *grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(1, 3)
    angle = F.pad(angle, (0, 0, 1 + config.num_register_tokens, 0))  # angle 0: not rotated
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (j, j + P) by their angles; channels after 2 P stay as they are."""
    pairs = cos.shape[-1]
    a, b, rest = x_BHTC.float().split([pairs, pairs, x_BHTC.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x_BHTC.dtype)


# --- layers; the names of parameters are those of DINOv2 ---


class TAPCTPatchEmbed(nn.Module):
    """A convolution whose stride is its kernel size: one token per patch.

    It is computed as one matrix product over the voxels of each patch, which is faster on a CPU and
    leaves all sizes free in torch.export; `self.proj(x).flatten(2).transpose(1, 2)` is equal.
    """

    def __init__(self, config: TAPCTConfig) -> None:
        super().__init__()
        d, h, w = config.patch_size
        self.proj = nn.Conv3d(config.num_channels, config.hidden_size, (d, h, w), stride=(d, h, w))

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """(B, channels, D, H, W) -> (B, N, C)."""
        batch, channels, depth, height, width = x_BCDHW.shape
        pd, ph, pw = self.proj.kernel_size
        d, h, w = depth // pd, height // ph, width // pw
        split = x_BCDHW.reshape(batch, channels, d, pd, h, ph, w, pw)
        voxels = split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, d * h * w, -1)
        return F.linear(voxels, self.proj.weight.flatten(1), self.proj.bias)


class TAPCTAttention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, config: TAPCTConfig) -> None:
        super().__init__()
        dim, heads = config.hidden_size, config.num_attention_heads
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=1e-6) if config.qk_norm else nn.Identity()

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        qkv = self.qkv(x_BTC).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, C / H)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class TAPCTMlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, config: TAPCTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class TAPCTSwiGLU(nn.Module):
    """Gated feed-forward network: w3(silu(a) * b) with (a, b) = w12(x)."""

    def __init__(self, config: TAPCTConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class TAPCTLayerScale(nn.Module):
    """A learned gain per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return x * self.gamma


class TAPCTBlock(nn.Module):
    """Attention and feed-forward network, each on a residual branch."""

    def __init__(self, config: TAPCTConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = TAPCTAttention(config)
        self.ls1 = TAPCTLayerScale(dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = TAPCTSwiGLU(config) if config.feed_forward == "swiglu" else TAPCTMlp(config)
        self.ls2 = TAPCTLayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_BTC = x_BTC + self.ls1(self.attn(self.norm1(x_BTC), rotation))
        return x_BTC + self.ls2(self.mlp(self.norm2(x_BTC)))


class TAPCTVisionTransformer(nn.Module):
    """The network; `TAPCTModel` gives it the interface of transformers."""

    def __init__(self, config: TAPCTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.native_grid = [s // p for s, p in zip(config.image_size, config.patch_size)]
        self.patch_embed = TAPCTPatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = self.pos_embed = None
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, dim))
        if config.positions != "rope":  # one position for CLS, then one per patch
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.native_grid), dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # used in pretraining only
        self.blocks = nn.ModuleList(TAPCTBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def grid_of(self, x: Tensor) -> list[int]:
        """Patches (d, h, w) of an input (B, channels, D, H, W).

        Raises:
            ValueError: another shape, or sizes that are no multiples of the patch.
        """
        channels, patch = self.config.num_channels, self.config.patch_size
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(
                f"pixel_values is {tuple(x.shape)}; give (B, {channels}, D, H, W): one crop is "
                f"crop[None, None]"
            )
        if any(size < side or size % side for size, side in zip(x.shape[2:], patch)):
            raise ValueError(
                f"pixel_values is {tuple(x.shape)}: depth, height and width must be multiples of "
                f"the patch {tuple(patch)}; the processor pads a scan with air"
            )
        if not x.is_floating_point():
            raise ValueError(f"pixel_values is {x.dtype}; give the output of the processor, not HU")
        return [size // side for size, side in zip(x.shape[2:], patch)]

    def forward(
        self, x: Tensor, spacing_mm_B3: Tensor | None = None, all_blocks: bool = False
    ) -> list[Tensor]:
        """Tokens (B, T, C) after the last block, or after every block, through the final norm."""
        grid = self.grid_of(x)
        patches = self.patch_embed(x)
        cls: Tensor = self.cls_token
        if self.pos_embed is not None:
            cls = cls + self.pos_embed[:, :1]
            patches = patches + resize_positions(
                self.pos_embed[0, 1:],
                self.native_grid,
                grid,
                self.config.position_resize,
                self.config.position_offset,
            )
        tokens = [cls.expand(x.shape[0], -1, -1)]
        if self.register_tokens is not None:
            tokens.append(self.register_tokens.expand(x.shape[0], -1, -1))
        x_BTC = torch.cat([*tokens, patches], dim=1)
        rotation = None
        if self.config.positions != "learned":
            rotation = rotary_tables(self.config, grid, spacing_mm_B3, x_BTC)
        found = []
        for block in self.blocks:
            x_BTC = block(x_BTC, rotation)
            if all_blocks or block is self.blocks[-1]:
                found.append(self.norm(x_BTC))
        return found


class TAPCTModel(PreTrainedModel):
    """The pretrained network: CT in, one feature vector per patch and one per input out."""

    config_class = TAPCTConfig
    base_model_prefix = "tapct"
    main_input_name = "pixel_values"
    _no_split_modules = ["TAPCTBlock"]
    _supports_sdpa = True

    def __init__(self, config: TAPCTConfig) -> None:
        super().__init__(config)
        self.model = TAPCTVisionTransformer(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load weights; arguments as in `PreTrainedModel.from_pretrained`.

        transformers only reports weights that are missing in the file, and leaves random
        numbers in their place; with `ignore_mismatched_sizes=True`, also in the place of weights of
        another shape. Here they are an error.

        Raises:
            ValueError: the file lacks weights of the model, has weights that it does not know, or
                weights of another shape.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        # a mismatch is a name, or a name and two shapes
        mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
        found = {
            "missing": info["missing_keys"],
            "unexpected": info["unexpected_keys"],
            "mismatched": mismatched,
        }
        for what, keys in found.items():
            if names := sorted(keys):
                raise ValueError(
                    f"the weights do not fit config.json: {len(names)} {what} tensors, "
                    f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}. Copy the complete "
                    "folder again."
                )
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values as in DINOv2, for a model that is made from a config."""
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, TAPCTLayerScale):
            nn.init.constant_(module.gamma, 1e-5)
        elif isinstance(module, TAPCTVisionTransformer):
            nn.init.zeros_(module.mask_token)
            nn.init.normal_(module.cls_token, std=0.02 if module.pos_embed is None else 1e-6)
            if module.register_tokens is not None:
                nn.init.normal_(module.register_tokens, std=1e-6)
            if module.pos_embed is not None:
                nn.init.trunc_normal_(module.pos_embed, std=0.02)

    def forward(
        self,
        pixel_values: Tensor,
        spacing_mm: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Features of a batch of crops or scans.

        Args:
            pixel_values: output of the processor, (B, 1, D, H, W); every size is free, as long as
                depth, height and width are multiples of the patch.
            spacing_mm: voxel spacing of the input along (depth, height, width), (B, 3); only a
                model with `rope_coordinates: mm` reads it.
            output_hidden_states: whether to return the patch tokens of every block.
            return_dict: False for a tuple.
        Raises:
            ValueError: a wrong shape, or no spacing for a model that works in mm.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        found = self.model(pixel_values, spacing_mm, bool(output_hidden_states))
        num_prefix = 1 + self.config.num_register_tokens
        output = BaseModelOutputWithPooling(
            last_hidden_state=found[-1][:, num_prefix:],
            pooler_output=found[-1][:, 0],
            hidden_states=tuple(tokens[:, num_prefix:] for tokens in found)
            if output_hidden_states
            else None,
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def embed(
        self, pixel_values: Tensor, spacing_mm: Tensor | None = None, batch_size: int = 4
    ) -> TAPCTScanOutput:
        """Features of whole scans by windows of the size that the model was trained on.

        Windows overlap by `window_stride`; the features of a patch are the weighted mean over the
        windows that contain it. Memory does not grow with the number of windows.

        Args:
            pixel_values: output of the processor, (B, 1, D, H, W).
            spacing_mm: as in `forward`.
            batch_size: windows per forward pass, at least 1.
        Raises:
            ValueError: as in `forward`; or `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1 window per forward pass")
        window, refine = self.config.window_size, self.config.window_refine
        cell = [side // parts for side, parts in zip(self.config.patch_size, refine)]
        d, h, w = (side * parts for side, parts in zip(self.model.grid_of(pixel_values), refine))
        device = next(self.parameters()).device
        missing = [max(n - size, 0) for size, n in zip(pixel_values.shape[2:], window)]
        far_ends = [side for amount in reversed(missing) for side in (0, amount)]
        scans = F.pad(pixel_values, far_ends, value=self.config.pad_value)
        corners = self._corners(scans.shape)
        weight = self._window_weight().to(device)
        weight_of_cells = _repeated(weight, refine)
        grid = [size // side for size, side in zip(scans.shape[2:], cell)]
        total = torch.zeros(len(scans), *grid, self.config.hidden_size, device=device)
        weights = torch.zeros(len(scans), *grid, 1, device=device)
        cls_sum = torch.zeros(len(scans), self.config.hidden_size, device=device)
        for first in range(0, len(corners), batch_size):
            some = corners[first : first + batch_size]
            crops = torch.stack([scans[_box(scan, at, window)] for scan, at in some])
            spacings = None
            if spacing_mm is not None:
                spacings = spacing_mm[[scan for scan, _ in some]].to(device)
            found = self(crops.to(device, self.dtype), spacing_mm=spacings)
            maps = found.last_hidden_state.float().unflatten(1, tuple(weight.shape[:3]))
            for number, (scan, at) in enumerate(some):
                place = [voxel // side for voxel, side in zip(at, cell)]
                box = (scan, *_box(scan, place, weight_of_cells.shape[:3])[2:])
                total[box] += _repeated(maps[number] * weight, refine)
                weights[box] += weight_of_cells
                cls_sum[scan] += found.pooler_output[number].float()
        mean = (total / weights)[:, :d, :h, :w]  # patches of the padding are left out
        return TAPCTScanOutput(
            feature_map=mean.permute(0, 4, 1, 2, 3),
            pooler_output=cls_sum * len(scans) / len(corners),
        )

    def _corners(self, shape: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        """Scan and first voxel (depth, height, width) of every window of a batch."""
        starts = []
        for size, n, stride in zip(shape[2:], self.config.window_size, self.config.window_stride):
            along = list(range(0, size - n + 1, stride))
            if along[-1] + n < size:
                along.append(size - n)  # the last window ends at the border
            starts.append(along)
        return [(scan, at) for scan in range(shape[0]) for at in itertools.product(*starts)]

    def _window_weight(self) -> Tensor:
        """Weight of every patch of a window, (d, h, w, 1): 1 at the centre, falling linearly to
        `window_border_weight` at both ends of each axis.
        """
        product = torch.ones(1)
        for side, patch in zip(self.config.window_size, self.config.patch_size):
            n = side // patch
            from_centre = (2 * torch.arange(n) - (n - 1)).abs() / max(n - 1, 1)
            along = 1 - (1 - self.config.window_border_weight) * from_centre
            product = product[..., None] * along
        return product[0, ..., None]


def _repeated(patches: Tensor, refine: Sequence[int]) -> Tensor:
    """The value of a patch (d, h, w, channels) for each of its cells."""
    for axis, parts in enumerate(refine):
        if parts > 1:
            patches = patches.repeat_interleave(parts, axis)
    return patches


def _box(scan: int, start: Sequence[int], size: Sequence[int]) -> tuple[Any, ...]:
    """Index of a box in one scan of a batch (B, channels, D, H, W)."""
    return (scan, slice(None), *(slice(at, at + n) for at, n in zip(start, size)))
