"""Tiny weights under the names and in the shapes of other projects, and a vision transformer that
is written out from the papers and shares no code with tapct.

Axes: B images, N patches, D channels, H heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

DIM, HEADS, DEPTH = 128, 2, 2  # heads of 64 channels, as all published models have


def dinov2(
    kernel: tuple[int, ...] = (3, 14, 14),
    patches: int | None = 16,
    *,
    registers: int = 0,
    dim: int = DIM,
    depth: int = DEPTH,
    swiglu: bool = False,
    mask_token: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A backbone under DINOv2's names.

    Args:
        kernel: channels and sides of the patch embedding: 2D or 3D.
        patches: number of positions beside that of CLS; None for a network without any.
    """
    draw = torch.Generator().manual_seed(seed)

    def t(*shape: int, mean: float = 0.0, std: float = 0.1) -> Tensor:
        return mean + std * torch.randn(*shape, generator=draw)

    tensors = {"cls_token": t(1, 1, dim)}
    if patches is not None:
        tensors["pos_embed"] = t(1, 1 + patches, dim)
    if registers:
        tensors["register_tokens"] = t(1, registers, dim)
    if mask_token:
        tensors["mask_token"] = t(1, dim)
    tensors["patch_embed.proj.weight"] = t(dim, *kernel, std=math.prod(kernel) ** -0.5)
    tensors["patch_embed.proj.bias"] = t(dim)
    width = (int(4 * dim * 2 / 3) + 7) // 8 * 8
    for block in range(depth):
        one = {"norm1.weight": t(dim, mean=1), "norm1.bias": t(dim)}
        one |= {"attn.qkv.weight": t(3 * dim, dim), "attn.qkv.bias": t(3 * dim)}
        one |= {"attn.proj.weight": t(dim, dim), "attn.proj.bias": t(dim)}
        one |= {"ls1.gamma": t(dim, mean=0.5), "ls2.gamma": t(dim, mean=0.5)}
        one |= {"norm2.weight": t(dim, mean=1), "norm2.bias": t(dim)}
        if swiglu:
            one |= {"mlp.w12.weight": t(2 * width, dim), "mlp.w12.bias": t(2 * width)}
            one |= {"mlp.w3.weight": t(dim, width), "mlp.w3.bias": t(dim)}
        else:
            one |= {"mlp.fc1.weight": t(4 * dim, dim), "mlp.fc1.bias": t(4 * dim)}
            one |= {"mlp.fc2.weight": t(dim, 4 * dim), "mlp.fc2.bias": t(dim)}
        tensors |= {f"blocks.{block}.{name}": value for name, value in one.items()}
    return tensors | {"norm.weight": t(dim, mean=1), "norm.bias": t(dim)}


def as_chunks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a DINOv2 that was trained with FSDP: one chunk for each two blocks."""
    return {
        re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", name): value
        for name, value in tensors.items()
    }


def as_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of timm: no mask token, SwiGLU as fc1 and fc2; with registers, CLS holds its
    position.
    """
    found = {}
    for name, value in tensors.items():
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        found[name.replace("register_tokens", "reg_token")] = value
    found.pop("mask_token", None)
    if "reg_token" in found:
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    return found


def as_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' Dinov2Model and Dinov2WithRegistersModel."""
    names = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    inner = {
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.weights_out",
    }
    found = {}
    for name, value in tensors.items():
        if name in names:
            found[names[name]] = value
            continue
        match = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
        assert match is not None, name
        layer, rest = f"encoder.layer.{match[1]}", match[2]
        if rest.startswith("attn.qkv."):
            kind = rest.rpartition(".")[2]
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"{layer}.attention.attention.{part}.{kind}"] = rows
            continue
        for ours, theirs in inner.items():
            rest = rest.replace(ours, theirs)
        found[f"{layer}.{rest}"] = value
    return found


def as_dinov3(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of DINOv3: storage tokens, a mask that switches the bias of the keys off, periods."""
    found = {}
    for name, value in tensors.items():
        found[name.replace("register_tokens", "storage_tokens")] = value
        if name.endswith("qkv.bias"):
            mask = torch.ones_like(value)
            mask[len(value) // 3 : 2 * len(value) // 3] = 0
            found[f"{name}_mask"] = mask
    return found | {"rope_embed.periods": 100.0 ** (torch.arange(16) / 16)}


def as_transformers_v3(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' DINOv3ViTModel, where the keys have no bias."""
    inner = {
        "attn.proj": "attention.o_proj",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    }
    found = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
        if match is None:
            name = name.replace("patch_embed.proj", "embeddings.patch_embeddings")
            name = re.sub(r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1", name)
            found[name] = value[None] if name == "embeddings.mask_token" else value
            continue
        layer, rest = f"layer.{match[1]}", match[2]
        if rest.startswith("attn.qkv."):
            kind = rest.rpartition(".")[2]
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                if (part, kind) != ("k", "bias"):
                    found[f"{layer}.attention.{part}_proj.{kind}"] = rows
            continue
        for ours, theirs in inner.items():
            rest = rest.replace(ours, theirs)
        found[f"{layer}.{rest}"] = value
    return found


def without_key_bias(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network with a bias of 0 for the keys."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith("qkv.bias")]:
        query, _, value = tensors[name].chunk(3)
        found[name] = torch.cat([query, torch.zeros_like(query), value])
    return found


@torch.no_grad()
def encode(
    tensors: Mapping[str, Tensor],
    images: Tensor,
    *,
    heads: int = HEADS,
    eps: float = 1e-6,
    native: tuple[int, ...] | None = None,
    scale_offset: float | None = None,
    rotary: bool = False,
) -> tuple[Tensor, Tensor]:
    """Class tokens (B, D) and patch tokens (B, N, D), in float64.

    Args:
        tensors: backbone under DINOv2's names.
        images: (B, C, Y, X) or (B, C, Z, Y, X).
        native: grid of the positions; None: that of the images.
        scale_offset: positions are resized by F.interpolate(scale_factor=(n + offset) / native) as
            in DINOv2's code; None: by size.
        rotary: DINOv3's rotary positions.
    """
    p = {name: value.double() for name, value in tensors.items()}
    convolve = F.conv2d if images.ndim == 4 else F.conv3d
    kernel = p["patch_embed.proj.weight"]
    maps = convolve(
        images.double(), kernel, p["patch_embed.proj.bias"], stride=tuple(kernel.shape[2:])
    )
    grid = tuple(maps.shape[2:])
    patches = maps.flatten(2).transpose(1, 2)
    cls = p["cls_token"]
    if "pos_embed" in p:
        cls = cls + p["pos_embed"][:, :1]
        patches = patches + resized(p["pos_embed"][0, 1:], native or grid, grid, scale_offset)
    prefix = [cls]
    if "register_tokens" in p:
        prefix.append(p["register_tokens"])
    start = torch.cat(prefix, dim=1).expand(len(images), -1, -1)
    x = torch.cat([start, patches], dim=1)
    depth = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    for block in range(depth):
        b = {
            name.removeprefix(f"blocks.{block}."): value
            for name, value in p.items()
            if name.startswith(f"blocks.{block}.")
        }
        y = F.layer_norm(x, x.shape[-1:], b["norm1.weight"], b["norm1.bias"], eps)
        q, k, v = (y @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        if rotary:
            q, k = (turned(part, grid, start.shape[1]) for part in (q, k))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        x = x + b["ls1.gamma"] * (y @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        y = F.layer_norm(x, x.shape[-1:], b["norm2.weight"], b["norm2.bias"], eps)
        x = x + b["ls2.gamma"] * feed_forward(y, b)
    x = F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"], eps)
    return x[:, 0], x[:, start.shape[1] :]


def feed_forward(y: Tensor, block: Mapping[str, Tensor]) -> Tensor:
    if "mlp.w12.weight" in block:
        gate, value = (y @ block["mlp.w12.weight"].T + block["mlp.w12.bias"]).chunk(2, dim=-1)
        return (F.silu(gate) * value) @ block["mlp.w3.weight"].T + block["mlp.w3.bias"]
    hidden = F.gelu(y @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
    return hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]


def resized(
    pos_ND: Tensor, native: tuple[int, ...], grid: tuple[int, ...], scale_offset: float | None
) -> Tensor:
    """Positions by torch's own interpolation: bicubic in 2D, trilinear in 3D."""
    if native == grid:
        return pos_ND
    maps = pos_ND.T.reshape(1, -1, *native)
    mode = "bicubic" if len(grid) == 2 else "trilinear"
    if scale_offset is None:
        maps = F.interpolate(maps, size=grid, mode=mode)
    else:
        scale = tuple((n + scale_offset) / m for n, m in zip(grid, native, strict=True))
        maps = F.interpolate(maps, scale_factor=scale, mode=mode)
    assert tuple(maps.shape[2:]) == grid
    return maps.flatten(2)[0].T


def turned(x_BHNC: Tensor, grid: tuple[int, ...], prefix: int) -> Tensor:
    """DINOv3's rotation of queries or keys: sines and cosines of both axes, tiled twice."""
    height, width = grid
    y = (2 * (torch.arange(height) + 0.5) / height - 1).double()
    x = (2 * (torch.arange(width) + 0.5) / width - 1).double()
    place_N2 = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    channels = x_BHNC.shape[-1]
    period = 100.0 ** (2 * torch.arange(channels // 4).double() / (channels // 2))
    angle_NC = (2 * math.pi * place_N2[..., None] / period).flatten(1).tile(2)
    own = x_BHNC[:, :, prefix:]
    first, second = own.chunk(2, dim=-1)
    rotated = own * angle_NC.cos() + torch.cat([-second, first], dim=-1) * angle_NC.sin()
    return torch.cat([x_BHNC[:, :, :prefix], rotated], dim=2)
