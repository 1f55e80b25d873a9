"""Time forward and backward of the backbone, beside the matrix-product rate of the machine.

    python scripts/bench_model.py
    python scripts/bench_model.py --dim 384 --depth 12 --seconds 60 --compile

Columns: variant, milliseconds per pass, GFLOP/s over the FLOPs of the whole pass, and the share of
the float32 GEMM rate (2048 cubed, all cores). The variants take turns, so that other load on the
machine affects all of them alike; the figures are medians. The last lines compare the time that
stochastic depth by subsets saves with the share of crops that it drops.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import arguments
import torch
from torch import Tensor

from tapct.base import exits
from tapct.engine import compiled
from tapct.models import vit
from tapct.nn.layers import DropKey
from tapct.plan import flops

GEMM_SIZE = 2048
Pass = tuple[list[Tensor], list[Tensor | None]]


def forward_flops(config: vit.Config, groups: list[Tensor]) -> float:
    """FLOPs of one forward pass without stochastic depth."""
    with torch.device("meta"):
        backbone = vit.build(config)
    total = 0.0
    for group in groups:
        window = (group.shape[1], group.shape[2], group.shape[3])
        costs = flops.count_costs(
            backbone,
            num_globals=group.shape[0],
            global_window=window,
            num_locals=0,
            local_window=window,
            head_uses=(),
            global_batch=1,
        )
        total += sum(part.teacher_flops for part in costs.parts)
    return total


def train(model: vit.VisionTransformer, passes: list[Pass], key: DropKey | None = None) -> None:
    """Forward and backward of some passes, with a gradient for every token."""
    tokens = [each for crops, masks in passes for each in model(crops, masks, key)]
    torch.stack([each.cls_BD.sum() + each.patches_BND.sum() for each in tokens]).sum().backward()
    model.zero_grad(set_to_none=True)


def variants(
    config: vit.Config, groups: list[Tensor], fast: bool
) -> dict[str, tuple[Callable[[], object], float]]:
    """The variants to time: name -> function of one pass, FLOPs of that pass.

    Args:
        config: backbone.
        groups: crops of each size.
        fast: whether to add a variant with compiled blocks.
    """
    model, some, half = (vit.build(replace(config, drop_path=drop)) for drop in (0.0, 0.1, 0.5))
    masks = [
        torch.rand(group.shape[0], model.patch_embed.unfold(group[:1]).shape[0]) < 0.15
        for group in groups
    ]
    both: Pass = (groups, [masks[0], *[None] * (len(groups) - 1)])
    separate: list[Pass] = [([group], [mask]) for group, mask in zip(*both, strict=True)]
    square = torch.randn(GEMM_SIZE, GEMM_SIZE)
    forward = forward_flops(config, groups)

    def infer() -> None:
        with torch.no_grad():
            model(*both)

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            train(model, [both])

    runs: dict[str, tuple[Callable[[], object], float]] = {}
    if fast:
        quick = vit.build(replace(config, drop_path=0.1))
        for block in quick.blocks:
            compiled.compile_forward(block)
        runs["compiled, drop path 0.1"] = (lambda: train(quick, [both], DropKey(0, 0)), 3 * forward)
    return {
        "GEMM": (lambda: square @ square, 2.0 * GEMM_SIZE**3),
        "packed": (lambda: train(model, [both]), 3 * forward),
        "packed, drop path 0.1": (lambda: train(some, [both], DropKey(0, 0)), 3 * forward),
        "packed, drop path 0.5": (lambda: train(half, [both], DropKey(0, 0)), 3 * forward),
        "group by group": (lambda: train(model, separate), 3 * forward),
        "packed, bf16 autocast": (autocast, 3 * forward),
        "packed, no gradient": (infer, forward),
        **runs,
    }


def main() -> None:
    """Time all variants in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {
        "dim": (128, "width of the tokens, a multiple of 64"),
        "depth": (4, "number of blocks"),
        "globals": (16, "global crops of 8x64x64 voxels"),
        "locals": (16, "local crops of 8x32x32 voxels; 0 for none"),
        "seconds": (20, "time to measure"),
    }
    for name, (default, meaning) in sizes.items():
        kind = arguments.whole if name == "locals" else arguments.positive
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"{meaning}, default {default}"
        )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure processor time instead of wall time; on a busy machine, with one thread",
    )
    parser.add_argument(
        "--compile", action="store_true", help="time compiled blocks too; compiling takes minutes"
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    args = parser.parse_args()
    if args.dim % 64:
        parser.error(f"--dim {args.dim} is not a multiple of 64, the width of an attention head")
    clock = time.process_time if args.cpu_time else time.perf_counter
    config = vit.Config(
        window=(8, 64, 64),
        dim=args.dim,
        depth=args.depth,
        heads=args.dim // 64,
        registers=2,
        layer_scale=1.0,
    )
    groups = [torch.randn(args.globals, 8, 64, 64)] + (
        [torch.randn(args.locals, 8, 32, 32)] if args.locals else []
    )
    runs = variants(config, groups, args.compile)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + args.seconds
    for run, _ in runs.values():
        run()  # warm-up
    while time.perf_counter() < end or len(seconds["GEMM"]) < 3:
        for name, (run, _) in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rate = {name: flops / median[name] for name, (_, flops) in runs.items()}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(seconds['GEMM'])} "
        f"rounds, {args}"
    )
    for name in runs:
        print(
            f"{name:24s} {median[name] * 1e3:9.1f} ms {rate[name] / 1e9:8.1f} GFLOP/s "
            f"{rate[name] / rate['GEMM']:7.1%}"
        )
    saved = {
        drop: 1 - median[f"packed, drop path {drop}"] / median["packed"] for drop in (0.1, 0.5)
    }
    for drop, share in saved.items():
        print(
            f"stochastic depth by subsets drops {drop:.0%} of the crops and saves {share:.1%} of "
            "the time"
        )
    if args.json:
        found = {
            name: {"ms": median[name] * 1e3, "share_of_gemm": rate[name] / rate["GEMM"]}
            for name in runs
        }
        args.json.write_text(
            json.dumps({"variants": found, "time_saved_by_drop_path": saved}, indent=1) + "\n"
        )


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
