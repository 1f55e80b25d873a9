"""Time the making of views and masks, beside simple implementations and a memory copy.

    python scripts/bench_views.py --json views.json
    python scripts/bench_views.py --device cuda --repeats 20 --batch 64

Views are compared with a trilinear gather (`grid_sample`) of the same crops, which has neither
anti-aliasing nor blur nor ops, and with a gather followed by a dense 9x9x9 blur (`conv3d`) of the
views that are blurred. The case "all blurred" blurs every view.
Masks of 64 crops of 3x28x28 tokens are drawn at once. They are compared with the usual sampler,
which draws blocks into a numpy array, crop by crop, until enough tokens are masked. Half of the
crops are masked, as by default, and then all of them. The implementations take turns, and the
shortest time of each counts. Masks are also drawn call after call, since the loop in between evicts
their data from the caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arguments
import mask_statistics
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tapct.base import exits
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
    "published, all blurred": (1, (24, 512, 512), recipe.Config(blur_p=(1.0, 1.0, 1.0)), (4, 8, 8)),
}
BLUR = 9  # voxels of the dense blur along each axis
MASK_CROPS, MASK_GRID = 64, (3, 28, 28)


def make_batch(num: int, slab: tuple[int, int, int], device: torch.device) -> Batch:
    """Noise about water inside an ellipse, air outside: what is in it does not matter for the
    time.
    """
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, slab[1]), torch.linspace(-1, 1, slab[2]), indexing="ij"
    )
    hu = torch.where((y / 0.7) ** 2 + (x / 0.9) ** 2 < 1, 40, -1000) + torch.randint(
        -20, 20, (num, *slab)
    )
    number = torch.arange(num)
    extent = torch.tensor([slab] * num)
    batch = Batch(
        hu.to(torch.int16), extent, torch.ones(num, 3), number, number, torch.zeros_like(number)
    )
    return batch.to(device)


def dense_blur(view_B1ZYX: Tensor, sigma: float) -> Tensor:
    """A Gaussian of 9x9x9 weights, each of which is multiplied."""
    line = torch.exp(
        -0.5 * ((torch.arange(BLUR, device=view_B1ZYX.device) - BLUR // 2) / sigma) ** 2
    )
    kernel_ZYX = line[:, None, None] * line[:, None] * line
    padded = F.pad(view_B1ZYX, [BLUR // 2] * 6, mode="replicate")
    return F.conv3d(padded, (kernel_ZYX / kernel_ZYX.sum())[None, None])


def gather(batch: Batch, config: recipe.Config, blur: bool) -> list[Tensor]:
    """The same crops by `grid_sample`, from a float copy of the slabs; blurred as often as the
    config asks for.
    """
    slab_B1ZYX = CONTRACT.normalise(batch.hu_BZYX)[:, None]
    cells = boxes.body_cells(batch.hu_BZYX, CONTRACT)
    size = torch.tensor(batch.hu_BZYX.shape[1:], device=batch.hu_BZYX.device)
    views = []
    for kind, num in (("global", config.num_globals), ("local", config.num_locals)):
        rule = config.rule(kind)  # type: ignore[arg-type]
        extent_B3, sample_B = batch.extent_B3, batch.sample_B
        crops = boxes.draw(rule, kind, num, cells, extent_B3, sample_B, 0)  # type: ignore[arg-type]
        scale, centre = crops.length_VB3 / size, (2 * crops.start_VB3 + crops.length_VB3) / size - 1
        for view in range(num):
            theta = torch.diag_embed(scale[view].flip(1))
            theta = torch.cat([theta, centre[view].flip(1)[:, :, None]], dim=2)
            grid = F.affine_grid(theta, [len(theta), 1, *rule.window], align_corners=False)
            crop_B1ZYX = F.grid_sample(slab_B1ZYX, grid, align_corners=False)
            group = 2 if kind == "local" else min(view, 1)
            # the share of blurred views in a long run: of 8 locals at 0.5 every other one
            if blur and math.floor((view + 1) * config.blur_p[group]) > math.floor(
                view * config.blur_p[group]
            ):
                crop_B1ZYX = dense_blur(crop_B1ZYX, sum(config.blur_sigma) / 2)
            views.append(crop_B1ZYX)
    return views


def classic_mask(
    count: int, grid: tuple[int, int, int], rule: masks.Config, draw: random.Random
) -> np.ndarray:
    """Blocks of one crop, token after token, until `count` tokens are masked or ten proposals in a
    row fail.
    """
    mask_ZYX = np.zeros(grid, dtype=bool)
    low, high = (math.log(edge) for edge in rule.aspect)
    done, failed = 0, 0
    while count - done >= rule.min_tokens and failed < 10:
        volume = draw.uniform(rule.min_tokens, count - done)
        height_width, depth_height = (math.exp(draw.uniform(low, high)) for _ in range(2))
        depth = min(max(round((volume * height_width * depth_height**2) ** (1 / 3)), 1), grid[0])
        height = max(round(math.sqrt(volume / depth * height_width)), 1)
        width = max(round(math.sqrt(volume / depth / height_width)), 1)
        if height > grid[1] or width > grid[2]:
            failed += 1
            continue
        z0, y0, x0 = (
            draw.randint(0, size - side)
            for size, side in zip(grid, (depth, height, width), strict=True)
        )
        fresh = 0
        for z in range(z0, z0 + depth):
            for y in range(y0, y0 + height):
                for x in range(x0, x0 + width):
                    if not mask_ZYX[z, y, x] and done + fresh < count:
                        mask_ZYX[z, y, x] = True
                        fresh += 1
        done, failed = done + fresh, 0 if fresh else failed + 1
    return mask_ZYX


def classic_masks(
    counts: list[int], grid: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of all crops, their indices and weights, as a collate function makes them."""
    draw, rule = random.Random(0), masks.Config()
    masked_CN = torch.stack(
        [torch.from_numpy(classic_mask(n, grid, rule, draw)).flatten() for n in counts]
    )
    weight_CN = (1.0 / masked_CN.sum(1).clamp(min=1))[:, None].expand_as(masked_CN)
    index_M, weight_M = masked_CN.flatten().nonzero().flatten(), weight_CN[masked_CN]
    return masked_CN.to(device), index_M.to(device), weight_M.to(device)


@dataclasses.dataclass(frozen=True)
class Clock:
    """How times are taken.

    Args:
        device: on which the work is done.
        repeat: calls of each.
        now: seconds.
    """

    device: torch.device
    repeat: int
    now: Callable[[], float]

    def best_ms(self, works: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Least time of one call of each in ms, in turns, after a call of warm-up: a busy machine
        only ever adds.
        """
        best = dict.fromkeys(works, math.inf)
        for i in range(self.repeat + 1):
            for name, work in works.items():
                start = self.now()
                work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if i:
                    best[name] = min(best[name], (self.now() - start) * 1e3)
        return best


def measure(name: str, batch_size: int | None, clock: Clock) -> dict[str, Any]:
    """All numbers of one case."""
    num, slab, config, patch = CASES[name]
    batch = make_batch(batch_size or num, slab, clock.device)
    num = len(batch.sample_B)
    copy = torch.empty_like(batch.hu_BZYX)
    best = clock.best_ms(
        {
            "views": lambda: recipe.make_views(batch, config, CONTRACT, 0, patch),
            "gather": lambda: gather(batch, config, blur=False),
            "blurred": lambda: gather(batch, config, blur=True),
            "copy": lambda: copy.copy_(batch.hu_BZYX),
        }
    )
    slab_bytes = batch.hu_BZYX.numel() * 2
    return {
        "case": name,
        "samples": num,
        "views_ms": round(best["views"], 3),
        "gather_ms": round(best["gather"], 3),
        "gather_and_dense_blur_ms": round(best["blurred"], 3),
        "copy_of_slabs_ms": round(best["copy"], 3),
        "copy_GB_per_s": round(2 * slab_bytes / best["copy"] / 1e6, 2),
        "views_over_gather": round(best["views"] / best["gather"], 3),
        "views_over_copy": round(best["views"] / best["copy"], 2),
        "times_as_fast_as_gather_and_dense_blur": round(best["blurred"] / best["views"], 2),
    }


def measure_masks(probability: float, clock: Clock) -> dict[str, Any]:
    """Masks of one micro-batch, and what they look like."""
    device = clock.device
    num_tokens, samples = math.prod(MASK_GRID), torch.arange(MASK_CROPS // 2, device=device)
    rule = masks.Config(probability=probability)
    counts = masks.counts(rule, num_crops_global=MASK_CROPS, num_tokens=num_tokens, seed=0, step=0)
    in_scan = torch.ones(2, MASK_CROPS // 2, num_tokens, dtype=torch.bool, device=device)
    often = dataclasses.replace(clock, repeat=10 * clock.repeat)  # they take a millisecond
    ours = {"ours": lambda: masks.draw(counts, MASK_GRID, in_scan, samples, rule, 0)}
    classic = {"classic": lambda: classic_masks(counts, MASK_GRID, device)}
    best, alone = (
        often.best_ms({**ours, **classic}),
        {**often.best_ms(ours), **clock.best_ms(classic)},
    )
    short = 1 - int(classic_masks(counts, MASK_GRID, device)[0].sum()) / sum(counts)
    return {
        "crops": MASK_CROPS,
        "masked_crops": sum(count > 0 for count in counts),
        "grid": MASK_GRID,
        "masks_ms": round(best["ours"], 3),
        "classic_loop_ms": round(best["classic"], 3),
        "times_as_fast_as_classic_loop": round(best["classic"] / best["ours"], 2),
        "masks_call_after_call_ms": round(alone["ours"], 3),
        "times_as_fast_call_after_call": round(alone["classic"] / alone["ours"], 2),
        "classic_loop_falls_short_by": round(short, 4),
        "statistics": dataclasses.asdict(
            mask_statistics.statistics(counts, MASK_GRID, in_scan, samples, rule, 0)
        ),
    }


def main() -> None:
    """Run the cases and print, and write, one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None, help="JSON file to write the figures to")
    parser.add_argument("--device", type=arguments.device, default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--repeats",
        type=arguments.positive,
        default=10,
        help="calls; the fastest counts, default 10",
    )
    parser.add_argument(
        "--batch",
        type=arguments.positive,
        default=None,
        help="samples per batch; default: the number of each case",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure processor time of this thread; on a busy machine, with one thread",
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    clock = Clock(device, args.repeats, time.thread_time if args.cpu_time else time.perf_counter)
    side = 2048
    square = torch.rand(side, side, device=device)
    gemm_ms = clock.best_ms({"gemm": lambda: square @ square})["gemm"]
    out = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "gemm_float32_GFLOP_per_s": round(2 * side**3 / gemm_ms / 1e6, 1),
        "cases": [measure(name, args.batch, clock) for name in CASES],
        "masks": [
            measure_masks(probability, clock) for probability in (masks.Config().probability, 1.0)
        ],
    }
    print(json.dumps(out, indent=1))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
