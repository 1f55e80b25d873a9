"""Tables of the parameter names that other projects use, and their translation into DINOv2's.

| dialect | where it is used | examples of names |
|---|---|---|
| DINOv2 | facebookresearch/dinov2 and dinov3, TAP-CT, tapct | `blocks.0.attn.qkv.weight` |
| timm | DINOv2 models of timm's vision_transformer | `reg_token`, SwiGLU as `mlp.fc1` |
| transformers | Dinov2Model, Dinov2WithRegistersModel | `encoder.layer.0.layer_scale1` |
| transformers, DINOv3 | DINOv3ViTModel | `layer.0.attention.q_proj`, `mlp.up_proj` |

The names may stand behind any prefix (`model.`, `teacher.backbone.`, `module.`), and in the nested
dicts of a training checkpoint. Only names, shapes and the order of rows are used; they were read in
these projects' public code.

Axes: D channels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tapct.base.exits import UserError

# components that wrappers of a module put into its names
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PATCH_KERNELS = (  # the weight of the patch embedding, by which a backbone is found
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
)
ANY_BLOCK = r"^(?:model\.|encoder\.)?layer\.(\d+)\."


@dataclass(frozen=True)
class Dialect:
    """The names of one project.

    Args:
        title: name of the dialect for people.
        marker: pattern of a name that only this dialect has.
        rules: (pattern, replacement) pairs, applied to every name one after another.
    """

    title: str
    marker: str
    rules: tuple[tuple[str, str], ...]


TRANSFORMERS = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)$", r"patch_embed.proj.\1"),
    (ANY_BLOCK, r"blocks.\1."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"^layernorm\.", "norm."),
)
# gated: `up_proj` is the second half of w12; else it is the first layer of the MLP
GATED = ((r"\.mlp\.up_proj\.", ".mlp.w2."), (r"\.mlp\.down_proj\.", ".mlp.w3."))
PLAIN = ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))
DIALECTS = (
    Dialect("transformers, DINOv3", r"layer\.\d+\.attention\.q_proj\.", TRANSFORMERS),
    Dialect("transformers", r"layer\.\d+\.attention\.attention\.query\.", TRANSFORMERS),
    Dialect("timm", r"^reg_token$", ((r"^reg_token$", "register_tokens"),)),
    Dialect(
        "DINOv2",
        r"^blocks\.\d+\.",
        (
            (r"^storage_tokens$", "register_tokens"),  # DINOv3
            (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, from training with FSDP
        ),
    ),
)
SPLIT = re.compile(r"^(blocks\.\d+\.attn)\.([qkv])\.(weight|bias)$")


@dataclass(frozen=True)
class NamedTensors:
    """The tensors of one backbone under DINOv2's names.

    Args:
        tensors: by name.
        dialect: title of the dialect that the names had.
        prefix: what stood before the names of the backbone.
        set_aside: number of tensors outside of the backbone, by the beginning of their names.
    """

    tensors: Mapping[str, Tensor]
    dialect: str
    prefix: str
    set_aside: Mapping[str, int]


def flatten(tree: Any) -> dict[str, Tensor]:
    """The tensors in nested dicts and lists by their dotted names; other values are left out.

    Raises:
        UserError: two tensors would have the same name.
    """
    found: dict[str, Tensor] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
            if short in found:
                raise UserError(f"two tensors have the name {short}; remove one of them")
            found[short] = value
        elif isinstance(value, Mapping):
            for key, child in value.items():
                visit(f"{name}.{key}" if name else str(key), child)
        elif isinstance(value, list | tuple):
            for index, child in enumerate(value):
                visit(f"{name}.{index}" if name else str(index), child)

    visit("", tree)
    return found


def backbone_of(tensors: Mapping[str, Tensor], source: str) -> NamedTensors:
    """The backbone among the tensors of a file, with its names translated.

    Args:
        tensors: all tensors of the file by dotted name, as from `flatten`.
        source: name of the file, for error lines.
    Raises:
        UserError: the file holds no backbone that is known, or several of which none is the
            teacher's.
    """
    prefix = _prefix(tensors, source)
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    others = Counter(
        ".".join(name.split(".")[:2]) for name in tensors if not name.startswith(prefix)
    )
    dialect = next((d for d in DIALECTS if _has(own, d.marker)), DIALECTS[-1])
    rules = dialect.rules
    if dialect.rules is TRANSFORMERS:
        rules += GATED if _has(own, r"\.mlp\.gate_proj\.") else PLAIN
    renamed: dict[str, Tensor] = {}
    for name, tensor in own.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise UserError(f"{source}: two tensors stand for {name}; remove one of them")
        renamed[name] = tensor
    return NamedTensors(_joined(renamed), dialect.title, prefix, dict(others))


def _has(names: Iterable[str], pattern: str) -> bool:
    return any(re.search(pattern, name) for name in names)


def _prefix(tensors: Iterable[str], source: str) -> str:
    """What stands before the names of the backbone; that of the teacher where there are several."""
    found = sorted(
        {
            name.removesuffix(kernel)
            for name in tensors
            for kernel in PATCH_KERNELS
            if name == kernel or name.endswith(f".{kernel}")
        }
    )
    if not found:
        return ""
    teachers = [prefix for prefix in found if "teacher" in prefix.split(".")]
    chosen = teachers or found
    if len(chosen) > 1:
        raise UserError(
            f"{source} holds {len(found)} backbones ({', '.join(found)}) and not one teacher; save "
            "the tensors of one of them as a .safetensors file"
        )
    return chosen[0]


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that other projects keep in parts, in DINOv2's single ones."""
    joined = dict(tensors)
    _join_queries(joined)
    for name in [name for name in joined if name.endswith(".attn.qkv.bias_mask")]:
        # DINOv3 keeps the bias of the keys at 0 by a mask
        mask, bias = joined.pop(name), name.removesuffix("_mask")
        if bias in joined:
            joined[bias] = torch.where(mask == 0, torch.zeros_like(joined[bias]), joined[bias])
    for name in [name for name in joined if re.search(r"\.mlp\.w1\.(weight|bias)$", name)]:
        second = name.replace(".w1.", ".w2.")
        if second in joined:
            joined[name.replace(".w1.", ".w12.")] = torch.cat(
                [joined.pop(name), joined.pop(second)]
            )
    _name_gated(joined)
    if "mask_token" in joined and joined["mask_token"].ndim == 3:
        joined["mask_token"] = joined["mask_token"].flatten(0, 1)
    return joined


def _join_queries(tensors: dict[str, Tensor]) -> None:
    """Put queries, keys and values of a block into one tensor, in this order; a bias that is not
    there is 0.
    """
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name in list(tensors):
        match = SPLIT.match(name)
        if match:
            parts.setdefault((match[1], match[3]), {})[match[2]] = tensors.pop(name)
    for (attention, kind), by_letter in parts.items():
        some = next(iter(by_letter.values()))
        if kind == "weight" and len(by_letter) < 3:  # the report names what is left over
            for letter, tensor in by_letter.items():
                tensors[f"{attention}.{letter}.{kind}"] = tensor
            continue
        rows = [by_letter.get(letter, torch.zeros_like(some)) for letter in "qkv"]
        tensors[f"{attention}.qkv.{kind}"] = torch.cat(rows)


def _name_gated(tensors: dict[str, Tensor]) -> None:
    """Give SwiGLU its own names where `fc1` has the rows of both halves, as in timm."""
    for name in [name for name in tensors if re.fullmatch(r"blocks\.\d+\.mlp\.fc1\.weight", name)]:
        mlp = name.removesuffix(".fc1.weight")
        out = tensors.get(f"{mlp}.fc2.weight")
        if out is None or tensors[name].shape[0] != 2 * out.shape[1]:
            continue
        for old, new in (("fc1", "w12"), ("fc2", "w3")):
            for kind in ("weight", "bias"):
                if f"{mlp}.{old}.{kind}" in tensors:
                    tensors[f"{mlp}.{new}.{kind}"] = tensors.pop(f"{mlp}.{old}.{kind}")
