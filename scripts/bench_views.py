"""Time the making of views against a memory copy and against a trilinear gather of the same crops.

    python scripts/bench_views.py --json views.json [--device cuda] [--repeat 10] [--batch 64]

The gather (`grid_sample`) neither anti-aliases nor blurs nor does any op: it is what a simple code would do at least.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tapct.types import Batch, HUContract
from tapct.views import boxes, masks, recipe

CONTRACT = HUContract()
CASES: dict[str, tuple[int, tuple[int, int, int], recipe.Config, tuple[int, int, int]]] = {
    "small": (
        8,
        (16, 256, 256),
        recipe.Config(
            global_window=(8, 64, 64),
            global_area=(0.3, 1.0),
            local_window=(8, 32, 32),
            local_area=(0.06, 0.25),
            num_locals=4,
            blur_sigma=(0.1, 1.2),
        ),
        (4, 8, 8),
    ),
    "published": (1, (24, 512, 512), recipe.Config(), (4, 8, 8)),
}


def make_batch(num: int, slab: tuple[int, int, int], device: torch.device) -> Batch:
    """Noise about water inside an ellipse, air outside: what is in it does not matter for the time."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, slab[1]), torch.linspace(-1, 1, slab[2]), indexing="ij")
    hu = torch.where((y / 0.7) ** 2 + (x / 0.9) ** 2 < 1, 40, -1000) + torch.randint(-20, 20, (num, *slab))
    number = torch.arange(num)
    extent = torch.tensor([slab] * num)
    batch = Batch(hu.to(torch.int16), extent, torch.ones(num, 3), number, number, torch.zeros_like(number))
    return batch.to(device)


def gather(batch: Batch, config: recipe.Config) -> list[Tensor]:
    """The same crops by `grid_sample`, from a float copy of the slabs."""
    slab_B1ZYX = CONTRACT.normalise(batch.hu_BZYX)[:, None]
    cells = boxes.body_cells(batch.hu_BZYX, CONTRACT)
    size = torch.tensor(batch.hu_BZYX.shape[1:], device=batch.hu_BZYX.device)
    views = []
    for kind, num in (("global", config.num_globals), ("local", config.num_locals)):
        rule = config.rule(kind)  # type: ignore[arg-type]
        crops = boxes.draw(rule, kind, num, cells, batch.extent_B3, batch.sample_B, 0)  # type: ignore[arg-type]
        scale, centre = crops.length_VB3 / size, (2 * crops.start_VB3 + crops.length_VB3) / size - 1
        for view in range(num):
            theta = torch.diag_embed(scale[view].flip(1))
            theta = torch.cat([theta, centre[view].flip(1)[:, :, None]], dim=2)
            grid = F.affine_grid(theta, [len(theta), 1, *rule.window], align_corners=False)
            views.append(F.grid_sample(slab_B1ZYX, grid, align_corners=False))
    return views


def best_ms(work: Callable[[], Any], repeat: int, device: torch.device) -> float:
    """Least wall time of one call in ms, after two calls of warm-up: a busy machine only ever adds."""
    times = []
    for i in range(repeat + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def measure(name: str, repeat: int, batch_size: int | None, device: torch.device) -> dict[str, Any]:
    """All numbers of one case."""
    num, slab, config, patch = CASES[name]
    batch = make_batch(batch_size or num, slab, device)
    num = len(batch.sample_B)
    copy = torch.empty_like(batch.hu_BZYX)
    views = recipe.make_views(batch, config, CONTRACT, 0, patch)
    grid = tuple(size // p for size, p in zip(config.global_window, patch, strict=True))
    tokens = grid[0] * grid[1] * grid[2]
    counts = masks.counts(masks.Config(), num_crops_global=2 * num, num_tokens=tokens, seed=0, step=0)
    in_scan = views.global_in_scan_VBN
    views_ms = best_ms(lambda: recipe.make_views(batch, config, CONTRACT, 0, patch), repeat, device)
    masks_ms = best_ms(lambda: masks.draw(counts, grid, in_scan, batch.sample_B, masks.Config(), 0), repeat, device)  # type: ignore[arg-type]
    gather_ms = best_ms(lambda: gather(batch, config), repeat, device)
    copy_ms = best_ms(lambda: copy.copy_(batch.hu_BZYX), repeat, device)
    slab_bytes = batch.hu_BZYX.numel() * 2
    return {
        "case": name,
        "samples": num,
        "views_ms": round(views_ms, 3),
        "masks_ms": round(masks_ms, 3),
        "gather_ms": round(gather_ms, 3),
        "copy_of_slabs_ms": round(copy_ms, 3),
        "copy_GB_per_s": round(2 * slab_bytes / copy_ms / 1e6, 2),
        "views_over_gather": round(views_ms / gather_ms, 3),
        "views_over_copy": round(views_ms / copy_ms, 2),
    }


def main() -> None:
    """Run the cases and print, and write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="where the numbers go")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--batch", type=int, default=None, help="samples, instead of the case's own number")
    args = parser.parse_args()
    device = torch.device(args.device)
    side = 2048
    square = torch.rand(side, side, device=device)
    gemm_ms = best_ms(lambda: square @ square, 5, device)
    out = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "gemm_float32_GFLOP_per_s": round(2 * side**3 / gemm_ms / 1e6, 1),
        "cases": [measure(name, args.repeat, args.batch, device) for name in CASES],
    }
    print(json.dumps(out, indent=1))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
