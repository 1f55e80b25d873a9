"""Every way by which weights come in, against a vision transformer that shares no code with tapct.

python tests/weights_parity.py        prints the table of largest differences
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foreign_weights as foreign
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

import tapct
from tapct.run import importing

Write = Callable[[Path], Path]  # writes into a folder, returns the source


@dataclass(frozen=True)
class Way:
    """One way in.

    Args:
        name: for people.
        write: writes the weights.
        images: input of the written-out network, (B, 1, [Z,] Y, X); it gets three equal channels
            where its kernel has three.
        tensors: its weights, under DINOv2's names.
        arguments: of `load_pretrained`.
        encode: further arguments of `foreign_weights.encode`.
    """

    name: str
    write: Write
    images: Tensor
    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    encode: dict[str, Any]


def file_of(tensors: Any, name: str = "model.safetensors", **facts: Any) -> Write:
    """Writes tensors as a file, and config.json beside it where there are facts."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
        else:
            torch.save(tensors, folder / name)
        if facts:
            (folder / "config.json").write_text(json.dumps(facts))
            return folder
        return folder / name

    return write


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def image(*shape: int) -> Tensor:
    return torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(3))


def ways() -> list[Way]:
    """All ways in, with native and with other input sizes."""
    rgb: dict[str, Any] = {"allow": "inflated"}
    no_mask: dict[str, Any] = {"allow": "inflated,missing"}
    plain = foreign.dinov2()
    registers = foreign.dinov2(registers=4)
    gated = foreign.dinov2(registers=4, swiglu=True)
    published = foreign.dinov2((1, 4, 8, 8), 3 * 28 * 28, registers=4)
    v3 = foreign.without_key_bias(foreign.dinov2((3, 16, 16), None, registers=4))
    teacher = {
        "teacher": prefixed(foreign.as_chunks(plain), "backbone.")
        | {"dino_head.mlp.0.weight": torch.zeros(4, foreign.DIM)},
        "iteration": 7,
    }
    whole = {
        "model": prefixed(plain, "teacher.backbone.")
        | prefixed(foreign.dinov2(seed=9), "student.backbone.")
    }
    v3_teacher = {"teacher": prefixed(foreign.as_dinov3(v3), "backbone.")}
    tap_ct: dict[str, Any] = {"architectures": ["TAPCTModel"], "model_type": "tapct"}
    hf: dict[str, Any] = {"model_type": "dinov2", "image_size": 56, "num_attention_heads": 2}
    square, wide, small = image(56, 56), image(28, 70), image(12, 48, 64)
    resize = {"native": (4, 4), "scale_offset": 0.1}
    by_size = {"native": (4, 4)}
    v3_allow = {"allow": "inflated,unexpected"}
    v3_way = {"eps": 1e-5, "rotary": True}
    from_3d = {"native": (3, 28, 28)}
    return [
        Way("TAP-CT folder, prefix model.", file_of(prefixed(published, "model."), **tap_ct),
            small, published, {}, from_3d),
        Way("TAP-CT folder, no prefix, more slices", file_of(published, **tap_ct),
            image(20, 40, 24), published, {}, from_3d),
        Way("DINOv2 .safetensors, native", file_of(plain), square, plain, rgb, {}),
        Way("DINOv2 .pth, other image size, pos_offset 0.1", file_of(plain, "a.pth"), wide, plain,
            rgb, resize),
        Way("DINOv2 teacher .pth, chunks", file_of(teacher, "b.pth"), wide, plain, rgb, resize),
        Way("DINOv2 student and teacher .pth", file_of(whole, "c.pth"), square, plain, rgb, {}),
        Way("DINOv2 with registers", file_of(registers), wide, registers, rgb, by_size),
        Way("timm, DINOv2", file_of(foreign.as_timm(plain)), square, plain, no_mask, {}),
        Way("timm, DINOv2 with registers", file_of(foreign.as_timm(registers)), wide, registers,
            no_mask, by_size),
        Way("timm, SwiGLU and registers", file_of(foreign.as_timm(gated)), square, gated,
            no_mask, {}),
        Way("transformers Dinov2 folder", file_of(foreign.as_transformers(plain), **hf), wide,
            plain, rgb, by_size),
        Way("transformers, SwiGLU, registers", file_of(foreign.as_transformers(gated), **hf),
            square, gated, rgb, {}),
        Way("DINOv3 teacher .pth", file_of(v3_teacher, "d.pth"), image(48, 80), v3, v3_allow,
            v3_way),
        Way("transformers DINOv3", file_of(foreign.as_transformers_v3(v3)), image(48, 80), v3, rgb,
            v3_way),
        Way("export made by tapct import", imported(file_of(published, **tap_ct)), small,
            published, {}, from_3d),
        *inflated_ways(plain),
    ]  # fmt: skip


def imported(write: Write) -> Write:
    """Writes the export that `tapct import` makes of weights."""

    def write_export(folder: Path) -> Path:
        importing.import_weights(write(folder / "theirs"), folder / "ours")
        return folder / "ours"

    return write_export


def inflated_ways(plain: dict[str, Tensor]) -> list[Way]:
    """A 2D backbone as a 3D one, on crops of one layer of patches that are constant along z."""
    ways = []
    for rule in ("mean", "centre"):
        settings = ["model.patch=[4,14,14]", "model.window=[12,56,56]"]
        settings += ["preprocess.window=[4,56,56]", "preprocess.stride=[4,56,56]"]
        arguments = {"settings": settings, "allow": "inflated", "inflate": rule}
        name = f"2D to 3D, {rule}, constant along z"
        ways.append(Way(name, file_of(plain), image(56, 56), plain, arguments, {}))
    return ways


def largest_difference(way: Way, folder: Path) -> tuple[float, tuple[int, ...]]:
    """Between the two networks, over class and patch tokens; and the shape of the patch tokens."""
    loaded = tapct.load_pretrained(way.write(folder), **way.arguments)
    crops = way.images[:, 0] if way.images.ndim == 5 else way.images
    if way.images.ndim == 4:
        crops = crops.expand(-1, loaded.section.config.patch[0], -1, -1)
    with torch.no_grad():
        tokens = loaded(crops)
    repeats = way.tensors["patch_embed.proj.weight"].shape[1]
    images = way.images.repeat_interleave(repeats, dim=1)
    cls_BD, patches_BND = foreign.encode(way.tensors, images, **way.encode)
    difference = max(
        float((tokens.cls_BD - cls_BD).abs().max()),
        float((tokens.patches_BND - patches_BND).abs().max()),
    )
    return difference, tuple(tokens.patches_BND.shape)


def main() -> None:
    print(f"torch {torch.__version__}, safetensors {safetensors.__version__}, ", end="")
    print(f"tapct {tapct.__version__}, Python {sys.version.split()[0]}; float32 against float64")
    print(f"{'way in':<46} {'input':>16} {'patch tokens':>16} {'largest difference':>20}")
    for number, way in enumerate(ways()):
        with tempfile.TemporaryDirectory() as folder:
            difference, shape = largest_difference(way, Path(folder) / str(number))
        size = "x".join(map(str, way.images.shape))
        tokens = "x".join(map(str, shape))
        print(f"{way.name:<46} {size:>16} {tokens:>16} {difference:>20.1e}")


if __name__ == "__main__":
    main()
