"""The sizes of a vision transformer, read off the shapes of its tensors and from a config.json that
came with them.

| size | where it is read |
|---|---|
| dim, depth, registers, patch, channels of the input, feed-forward | shapes and names |
| heads | config.json; else heads of 64 channels, as in DINOv2 and TAP-CT |
| window, for which the positions are learned | config.json; else see `position_grid` |
| norm_eps | config.json; else 1e-5 for DINOv3, and 1e-6 |

Axes: D channels, N patches, R registers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tapct.base.exits import UserError
from tapct.base.geometry import Grid, Size3, patch_grid, times
from tapct.nn.layers import swiglu_hidden
from tapct.weights.card import DEFAULT_BACKBONE

HEAD_DIM = 64  # channels of a head in ViT-S, -B, -L and -g
TAP_CT_WINDOW: Size3 = (12, 224, 224)  # of the published 3D models
TAP_CT_PATCH: Size3 = (4, 8, 8)
GELU = ("gelu", "gelu_python")
NUM_HEADS = ("num_attention_heads", "num_heads", "heads")
WINDOWS = ("image_size", "img_size", "window_size", "window")
EPS = ("layer_norm_eps", "norm_eps")


@dataclass(frozen=True)
class TokenLayout:
    """How tokens and patches of a backbone are laid out.

    Args:
        patch: voxels (z, y, x) of a patch; one slice for a 2D backbone.
        channels: channels of a voxel.
        is_2d: whether the patch embedding is a 2D convolution.
        grid: patches (z, y, x) that its positions are learned for; None where it learns none, or
            where the grid is not known.
    """

    patch: Size3
    channels: int
    is_2d: bool
    grid: Grid | None


def layout_of(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], window: Size3 | None, source: str
) -> TokenLayout | None:
    """The layout of a backbone; None without a patch embedding that is known.

    Args:
        tensors: tensors of the backbone under DINOv2's names.
        facts: config.json beside them; empty without.
        window: voxels that the positions are learned for; None where the user gives none.
        source: name of the file, for error lines.
    Raises:
        UserError: the window does not fit the number of positions.
    """
    kernel = tensors.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim not in (4, 5):
        return None
    is_2d = kernel.ndim == 4
    sides = [int(side) for side in kernel.shape[2:]]
    patch: Size3 = (1, sides[0], sides[1]) if is_2d else (sides[0], sides[1], sides[2])
    grid = None
    if "pos_embed" in tensors:
        rows = int(tensors["pos_embed"].shape[-2])
        counts = [rows - 1, rows, rows - 1 - _registers(tensors)]
        if window is not None:
            grid = patch_grid(window, patch, "the window of the weights", "give another window")
            if math.prod(grid) not in counts:
                raise UserError(
                    f"{source} has {rows} rows of positions, and the window {times(window)} in "
                    f"patches of {times(patch)} has {math.prod(grid)} and one for CLS; give the "
                    "window that its positions were learned for"
                )
        else:
            is_tap_ct = "TAPCTModel" in facts.get("architectures", ())
            grid = _stated_grid(facts, patch, is_2d, counts)
            grid = grid or position_grid(counts, patch, is_2d, is_tap_ct)
    return TokenLayout(patch, int(kernel.shape[1]), is_2d, grid)


def position_grid(counts: Sequence[int], patch: Size3, is_2d: bool, is_tap_ct: bool) -> Grid | None:
    """The grid of learned positions without a window; None where it cannot be known.

    The grid of a 2D backbone is a square, as in DINOv2's code. A 3D backbone is taken for one of
    TAP-CT, whose windows have 224 x 224 voxels in their plane, if config.json names its class, if
    it has one layer of patches, or if it has the patch and the number of positions of the published
    3D models.

    Args:
        counts: numbers of patches that the rows may stand for, beside rows for CLS and registers.
        patch: voxels (z, y, x) of a patch.
        is_2d: whether the patch embedding is a 2D convolution.
        is_tap_ct: whether a config.json names the class of the published models.
    """
    _, height, width = TAP_CT_WINDOW
    rows, columns = height // patch[1], width // patch[2]
    in_plane = rows * columns
    for count in counts:
        if is_2d:
            side = math.isqrt(max(count, 0))
            if side and side * side == count:
                return (1, side, side)
            continue
        fits = height % patch[1] == 0 and width % patch[2] == 0 and in_plane > 0
        if not fits or count < in_plane or count % in_plane:
            continue
        published = patch == TAP_CT_PATCH and count == 3 * in_plane
        if is_tap_ct or published or count == in_plane:
            return (count // in_plane, rows, columns)
    return None


def with_cls_row(tensors: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Tensors whose positions have one row for CLS and one for each patch.

    A missing row for CLS becomes 0, as in timm's models with registers. Rows for registers are
    added to the registers: the sum is all that the network sees.
    """
    changed = dict(tensors)
    pos_1ND = tensors["pos_embed"]
    if pos_1ND.ndim == 2:
        pos_1ND = pos_1ND[None]
    num_patches = math.prod(grid)
    extra = pos_1ND.shape[1] - num_patches
    if extra == 0:
        pos_1ND = torch.cat([torch.zeros_like(pos_1ND[:, :1]), pos_1ND], dim=1)
    elif extra > 1:
        changed["register_tokens"] = changed["register_tokens"] + pos_1ND[:, 1:extra]
        pos_1ND = torch.cat([pos_1ND[:, :1], pos_1ND[:, extra:]], dim=1)
    changed["pos_embed"] = pos_1ND
    return changed


def vit_sizes(
    tensors: Mapping[str, Tensor], layout: TokenLayout, facts: Mapping[str, Any], dialect: str
) -> dict[str, Any]:
    """Keys of the model section `vit` for a backbone of another project, with one channel.

    Args:
        tensors: tensors of the backbone under DINOv2's names.
        layout: from `layout_of`.
        facts: config.json beside them; empty without.
        dialect: title of the dialect of the names.
    Raises:
        UserError: its activation is not GELU, or a size cannot be read.
    """
    activation = facts.get("hidden_act", "gelu")
    is_gated = "blocks.0.mlp.w12.weight" in tensors
    if not is_gated and activation not in GELU:
        raise UserError(
            f"config.json names the activation {activation!r}; tapct's vit has GELU alone"
        )
    if "cls_norm.weight" in tensors:
        raise UserError(
            "these weights have a layer norm for CLS alone (cls_norm), as DINOv3's 7B model; "
            "tapct's vit has one norm for all tokens, so its features would differ"
        )
    dim = int(tensors["patch_embed.proj.weight"].shape[0])
    blocks = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if m]
    is_v3 = "rope_embed.periods" in tensors or dialect.endswith("DINOv3")
    sizes: dict[str, Any] = {
        "name": DEFAULT_BACKBONE,
        "patch": list(layout.patch),
        "dim": dim,
        "depth": 1 + max(blocks, default=0),
        "heads": stated_heads(facts) or max(1, dim // HEAD_DIM),
        "registers": _registers(tensors),
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        "drop_path": 0.0,
        "norm_eps": _number_of(facts, EPS) or (1e-5 if is_v3 else 1e-6),
        **_feed_forward(tensors, dim, is_gated),
    }
    grid = layout.grid
    if is_v3:
        grid = grid or _grid_of_224(layout.patch)
        sizes |= {"positions": "rope", "rope": {"axes": "yx", **_periods(tensors)}}
    if grid is None and "pos_embed" not in tensors:  # no table of positions that it must fit
        window = _window_of(facts, layout.is_2d)
        grid = None if window is None else patch_grid(window, layout.patch, "image_size")
    if grid is None:
        raise UserError(
            "the window that the positions of these weights were learned for is not known; give "
            "it (option --window, or window=...)"
        )
    sizes["window"] = [n * side for n, side in zip(grid, layout.patch, strict=True)]
    has_no_registers = "register_tokens" not in tensors
    if layout.is_2d:
        # DINOv2's own code; the others resize to a size, without an offset
        sizes["pos_offset"] = 0.1 if dialect == "DINOv2" and has_no_registers else 0.0
    else:
        sizes["pos_resize"] = "linear"
    return sizes


def stated_heads(facts: Mapping[str, Any]) -> int | None:
    """Attention heads in a config.json; None where it names none."""
    heads = _number_of(facts, NUM_HEADS)
    return heads if isinstance(heads, int) else None


def _periods(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Keys of `model.rope` for the periods that a DINOv3 file states; empty where they are the
    defaults, but for rounding.
    """
    period_P = tensors.get("rope_embed.periods")
    if period_P is None or period_P.numel() < 2:
        return {}
    period_P = period_P.double()
    num = len(period_P)
    default_P = 100.0 ** (torch.arange(num, dtype=torch.float64) / num)
    if torch.allclose(period_P, default_P, rtol=0.01):  # they may be stored in bfloat16
        return {}
    base = float(period_P[-1] / period_P[0]) ** (num / (num - 1))
    return {"base": base, "shortest": float(period_P[0])}


def _feed_forward(tensors: Mapping[str, Tensor], dim: int, is_gated: bool) -> dict[str, Any]:
    """Keys of the feed-forward network."""
    if not is_gated:
        first = tensors.get("blocks.0.mlp.fc1.weight")
        return {"mlp_ratio": 4.0 if first is None else first.shape[0] / dim}
    width = int(tensors["blocks.0.mlp.w12.weight"].shape[0]) // 2
    ratio = 1.5 * width / dim
    if swiglu_hidden(int(dim * ratio)) != width:
        ratio = (1.5 * width + 1) / dim  # int() may have lost one
    return {"ffn": "swiglu", "mlp_ratio": ratio}


def _registers(tensors: Mapping[str, Tensor]) -> int:
    return int(tensors["register_tokens"].shape[-2]) if "register_tokens" in tensors else 0


def _grid_of_224(patch: Size3) -> Grid:
    return (1, 224 // patch[1], 224 // patch[2])


def _number_of(facts: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The first of several keys that holds a number; None without."""
    for key in keys:
        value = facts.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return None


def _stated_grid(
    facts: Mapping[str, Any], patch: Size3, is_2d: bool, counts: Sequence[int]
) -> Grid | None:
    """The grid of the window in a config.json; None where it has none that fits the positions."""
    window = _window_of(facts, is_2d)
    if window is None or any(size % side for size, side in zip(window, patch, strict=True)):
        return None
    grid = patch_grid(window, patch, "the window in config.json")
    return grid if math.prod(grid) in counts else None


def _window_of(facts: Mapping[str, Any], is_2d: bool) -> Size3 | None:
    """The window in a config.json; None where it names none, or one of another dimension."""
    for key in WINDOWS:
        value = facts.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and is_2d:
            return (1, value, value)
        if isinstance(value, list) and all(isinstance(side, int) for side in value):
            if len(value) == 3:
                return (value[0], value[1], value[2])
            if len(value) == 2 and is_2d:
                return (1, value[0], value[1])
    return None
