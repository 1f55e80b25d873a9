"""Time and memory of whole training steps, beside the matrix-product rate of the machine.

    python scripts/bench_step.py                       # configs/smoke.yaml, as in the quickstart
    python scripts/bench_step.py configs/tap_s_3d.yaml train.global_batch=2 --steps 3
    python scripts/bench_step.py --compare --steps 2 --warm-up 1

The scans are synthetic and in memory, so no archive is needed and no disk is measured. FLOPs are
those of `tapct plan`.

`--compare` runs configs/bench_vit432.yaml in fp32 and in bf16, each in a process of its own so that
their peaks of memory are separate. It compares them with a published 3D DINO trainer (dinovol),
timed on a machine like A of docs/benchmarks.md: 16 s per step at a fp32 matrix-product rate of 180
GFLOP/s, in 8.5 GB. Those seconds are scaled by the fp32 rate of this machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arguments
import torch

from tapct import config as configs
from tapct.base import exits
from tapct.base.exits import UserError
from tapct.distributed.device import pick_device, prepare_cpu
from tapct.engine import loop, metrics, optim, recompute
from tapct.plan import command
from tapct.plan.measure import gemm_rate
from tapct.run import provenance
from tapct.run.config import RunConfig
from tapct.run.pretrain import stage_settings
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Batch

WARM_UP = 2
PUBLISHED_SECONDS, PUBLISHED_GEMM, PUBLISHED_BYTES = 16.0, 180e9, 8.5e9  # dinovol: fp32, 2 cores
COMPARED = Path("configs/bench_vit432.yaml")


def batches(config: RunConfig, in_plane: int) -> Iterator[tuple[Batch, ...]]:
    """Synthetic slabs: air around a noisy disc of soft tissue."""
    per_micro, depth = (
        config.train.global_batch // config.train.accumulation,
        config.data.loader.slab_depth,
    )
    draw = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, in_plane), torch.linspace(-1, 1, in_plane), indexing="ij"
    )
    noise = 30 * torch.randn(per_micro, depth, in_plane, in_plane, generator=draw)
    hu_BZYX = torch.where(y**2 + x**2 < 0.7, 40 + noise, -1000 + noise).to(torch.int16)
    first = 0
    while True:
        step = []
        for _ in range(config.train.accumulation):
            sample_B = torch.arange(first, first + per_micro)
            extent_B3 = (
                torch.tensor([[depth, in_plane, in_plane]]).expand(per_micro, 3).contiguous()
            )
            zero_B = torch.zeros(per_micro, dtype=torch.int64)
            step.append(
                Batch(hu_BZYX, extent_B3, torch.ones(per_micro, 3), sample_B, zero_B, zero_B)
            )
            first += per_micro
        yield tuple(step)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process, or of its part of the GPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # rusage would count what the parent held when it started this process
        return 1024 * int(
            next(line for line in status.read_text().splitlines() if "VmHWM" in line).split()[1]
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def trainer_of(config: RunConfig, device: torch.device, rows: list[metrics.Record]) -> loop.Trainer:
    """A trainer that writes its records into `rows` and saves nothing."""
    pair = StudentTeacher(config.model, config.losses, config.seed, device=device)
    recompute.recompute_blocks(pair.student.backbone, config.train.recompute)
    stage = stage_settings(config.resolved_stages()[0], pair)
    hooks = loop.Hooks(rows.append, lambda step, last: None)
    cadence = loop.Cadence(log_every=1, save_every=config.train.steps)
    return loop.Trainer(pair, optim.Updater(pair, config.optim), [stage], hooks, cadence)


def measure(config: RunConfig, steps: int, in_plane: int, warm_up: int) -> dict[str, Any]:
    """Run some steps and put their seconds beside the GEMM rate of the same minute."""
    prepare_cpu()  # as `tapct train` does
    device = pick_device(config.device)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    rows: list[metrics.Record] = []
    trainer = trainer_of(config, device, rows)
    feed = batches(config, in_plane)
    rates = {each: [gemm_rate(device, each)] for each in {dtype, torch.float32}}
    trainer.pair.train()
    processor: list[float] = []
    for step in range(warm_up + steps):
        began = time.process_time()
        trainer.optimizer_step(step, feed)
        trainer.flush()
        processor.append(time.process_time() - began)
    for each, found in rates.items():
        found.append(gemm_rate(device, each))
    rows = rows[warm_up:]
    seconds = statistics.median(row["seconds/step"] for row in rows)
    flops, gemm = command.costs_of(config).flops_per_step, max(rates[dtype])
    return {
        "device": provenance.gpu_name()
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "precision": config.train.precision,
        "global_batch": config.train.global_batch,
        "steps": steps,
        "seconds": seconds,
        "seconds_min_max": [
            min(row["seconds/step"] for row in rows),
            max(row["seconds/step"] for row in rows),
        ],
        "processor_seconds": statistics.median(processor[warm_up:]),
        "stages": {
            name: statistics.median(row[f"seconds/{name}"] for row in rows)
            for name in ("views", "forward_backward", "optimizer")
        },
        "model_flops": flops,
        "flops_per_second": flops / seconds,
        "gemm_flops_per_second": gemm,
        "gemm_fp32_flops_per_second": max(rates[torch.float32]),
        "gemm_share": flops / seconds / gemm,
        "peak_memory_bytes": peak_memory(device),
    }


def beside_published(found: dict[str, Any]) -> dict[str, Any]:
    """A measurement of configs/bench_vit432.yaml with the published trainer's figures, scaled to
    this machine.

    Returns:
        `found` with `published_seconds` (at the fp32 GEMM rate found here),
        `published_memory_bytes`, and how many
        times as fast and as small we are: `speed_ratio`, `memory_ratio`.
    """
    seconds = PUBLISHED_SECONDS * PUBLISHED_GEMM / found["gemm_fp32_flops_per_second"]
    return {
        **found,
        "published_seconds": seconds,
        "published_memory_bytes": PUBLISHED_BYTES,
        "speed_ratio": seconds / found["seconds"],
        "memory_ratio": PUBLISHED_BYTES / found["peak_memory_bytes"],
    }


def compare(
    file: Path, overrides: list[str], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Both precisions, each in a process of its own; each is printed as it ends."""
    found = {}
    for mode in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            words = [str(file), *overrides, f"train.precision={mode}", "--json", str(out)]
            sizes = ["--steps", str(options.steps), "--warm-up", str(options.warm_up)]
            sizes += ["--in-plane", str(options.in_plane)]
            ended = subprocess.run(
                [sys.executable, __file__, *words, *sizes], stdout=subprocess.DEVNULL, check=False
            )
            if ended.returncode:
                raise UserError(f"{mode}: the process ended with exit code {ended.returncode}")
            found[mode] = beside_published(json.loads(out.read_text()))
        show(file, found[mode])
        speed, memory = found[mode]["speed_ratio"], found[mode]["memory_ratio"]
        print(
            f"published     {found[mode]['published_seconds']:.2f} s at this GEMM rate, "
            f"{PUBLISHED_BYTES / 1e9:.1f} GB; "
            f"tapct is {speed:.2f} times as fast, with 1/{memory:.2f} of the memory\n",
            flush=True,
        )
    return found


def show(file: Path, found: dict[str, Any]) -> None:
    """Print a measurement."""
    stages = "  ".join(
        f"{name} {seconds * 1000:.0f} ms" for name, seconds in found["stages"].items()
    )
    low, high = found["seconds_min_max"]
    print(
        f"{file}: {found['device']}, torch {found['torch']}, {found['precision']}, batch "
        f"{found['global_batch']}"
    )
    print(
        f"step          {found['seconds']:.3f} s ({low:.3f}-{high:.3f}, {found['steps']} steps)   "
        f"{stages}"
    )
    print(f"processor     {found['processor_seconds']:.3f} s a step, all threads together")
    print(
        f"model         {found['model_flops'] / 1e9:.1f} GFLOP per step, "
        f"{found['flops_per_second'] / 1e9:.1f} GFLOP/s"
    )
    print(f"GEMM          {found['gemm_flops_per_second'] / 1e9:.1f} GFLOP/s, best of this run")
    print(f"share of GEMM {found['gemm_share']:.1%}")
    print(f"peak memory   {found['peak_memory_bytes'] / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG key=value",
        help="config and overrides, default configs/smoke.yaml",
    )
    parser.add_argument(
        "--steps", type=arguments.positive, default=20, help="steps to measure, default %(default)s"
    )
    parser.add_argument(
        "--warm-up",
        type=arguments.whole,
        default=WARM_UP,
        help="steps before the measurement, default %(default)s",
    )
    parser.add_argument(
        "--in-plane",
        type=arguments.positive,
        default=256,
        help="rows and columns of the synthetic scans, default %(default)s",
    )
    parser.add_argument(
        "--compare", action="store_true", help=f"compare {COMPARED} with a published trainer"
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    options = parser.parse_intermixed_args()
    named = options.words and "=" not in options.words[0]
    file = (
        Path(options.words[0])
        if named
        else COMPARED
        if options.compare
        else Path("configs/smoke.yaml")
    )
    overrides = [word for word in options.words if "=" in word]
    found: dict[str, Any]
    if options.compare:
        found = compare(file, overrides, options)
    else:
        config = configs.load_config(RunConfig, file, overrides).value
        found = measure(config, options.steps, options.in_plane, options.warm_up)
        show(file, found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
