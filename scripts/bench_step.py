"""Seconds of a whole training step (views, masks, student, teacher, losses, optimizer, EMA) beside this machine's GEMM.

    python scripts/bench_step.py                                  # the quickstart's step
    python scripts/bench_step.py configs/tap_s_3d.yaml train.global_batch=2 --steps 3 --json out.json

Scans are made up in memory, so no archive is needed and no disk is measured. FLOPs are those of `tapct plan`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tapct import config as configs
from tapct import provenance, run
from tapct.engine import loop, metrics, optim
from tapct.ssl.schedules import Schedules
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Batch

WARM_UP = 2


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the best of some square matrix products."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        (a @ a).flatten()[0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def batches(config: run.RunConfig, in_plane: int) -> Iterator[tuple[Batch, ...]]:
    """Made-up slabs: air around a noisy disc of soft tissue."""
    per_micro, depth = config.train.global_batch // config.train.accumulation, config.data.loader.slab_depth
    draw = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, in_plane), torch.linspace(-1, 1, in_plane), indexing="ij")
    noise = 30 * torch.randn(per_micro, depth, in_plane, in_plane, generator=draw)
    hu_BZYX = torch.where(y**2 + x**2 < 0.7, 40 + noise, -1000 + noise).to(torch.int16)
    first = 0
    while True:
        step = []
        for _ in range(config.train.accumulation):
            sample_B = torch.arange(first, first + per_micro)
            extent_B3 = torch.tensor([[depth, in_plane, in_plane]]).expand(per_micro, 3).contiguous()
            zero_B = torch.zeros(per_micro, dtype=torch.int64)
            step.append(Batch(hu_BZYX, extent_B3, torch.ones(per_micro, 3), sample_B, zero_B, zero_B))
            first += per_micro
        yield tuple(step)


def measure(config: run.RunConfig, steps: int, in_plane: int) -> dict[str, object]:
    """Run some steps and put their seconds beside the GEMM rate of the same minute."""
    device = run.pick_device(config.device)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    pair = StudentTeacher(config.model, config.losses, config.seed, device=device)
    rows: list[metrics.Record] = []
    recipe = loop.Recipe(config.views, config.masks, config.contract, pair.student.backbone.patch, config.seed)
    trainer = loop.Trainer(
        pair,
        optim.Updater(pair, config.optim),
        Schedules(config.optim, config.train.steps, config.train.global_batch),
        config.train,
        recipe,
        loop.Hooks(rows.append, lambda step, last: None),
        log_every=1,
        save_every=config.train.steps,
    )
    feed, rates = batches(config, in_plane), [gemm_rate(device, dtype)]
    pair.train()
    for step in range(WARM_UP + steps):
        trainer.optimizer_step(step, feed)
        trainer.flush()
    rates.append(gemm_rate(device, dtype))
    rows = rows[WARM_UP:]
    seconds = statistics.median(row["seconds/step"] for row in rows)
    flops = run.make_plan(config).flops_per_step
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "device": provenance.gpu_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "precision": config.train.precision,
        "global_batch": config.train.global_batch,
        "seconds": seconds,
        "seconds_min_max": [min(row["seconds/step"] for row in rows), max(row["seconds/step"] for row in rows)],
        "stages": {
            name: statistics.median(row[f"seconds/{name}"] for row in rows)
            for name in ("views", "forward_backward", "optimizer")
        },
        "model_flops": flops,
        "flops_per_second": flops / seconds,
        "gemm_flops_per_second": max(rates),
        "gemm_share": flops / seconds / max(rates),
        "peak_memory_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG key=value", help="default configs/smoke.yaml")
    parser.add_argument("--steps", type=int, default=20, help=f"measured steps, after {WARM_UP} to warm up")
    parser.add_argument("--in-plane", type=int, default=256, help="in-plane size of the made-up scans")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    file = Path(options.words[0]) if options.words and "=" not in options.words[0] else Path("configs/smoke.yaml")
    resolved = configs.load_config(run.RunConfig, file, [word for word in options.words if "=" in word])
    found = measure(resolved.value, options.steps, options.in_plane)
    stages = "  ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in found["stages"].items())
    print(f"{file}: {found['device']}, torch {found['torch']}, {found['precision']}, batch {found['global_batch']}")
    print(f"step          {found['seconds']:.3f} s   {stages}")
    print(f"model         {found['model_flops'] / 1e9:.1f} GFLOP a step, {found['flops_per_second'] / 1e9:.1f} GFLOP/s")
    print(f"GEMM          {found['gemm_flops_per_second'] / 1e9:.1f} GFLOP/s, best of this run")
    print(f"share of GEMM {found['gemm_share']:.1%}")
    print(f"peak memory   {found['peak_memory_bytes'] / 1e9:.2f} GB")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
