"""Measure time and memory of the ways to get the features of a whole scan.

    python scripts/bench_embed.py                      # 192x512x512, a network of 64 channels
    python scripts/bench_embed.py --slices 96 384      # how the memory depends on the slices
    python scripts/bench_embed.py --size 512           # features at full resolution

Each way runs in a process of its own, with one thread. `memory` is the peak above the loaded model.
The scan is made in memory, so that no reader counts. Next to it, the same process runs the network
alone on as many windows; the ratio is the time of the way over that of the network.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import arguments
import numpy as np
import torch

from tapct.base import exits
from tapct.config.plugins import Plugin
from tapct.eval.features.extraction import patch_of
from tapct.eval.features.prepared import prepare
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.features.windows import Windows
from tapct.models import vit
from tapct.run.embed.many_scans import encoder_of
from tapct.run.embed.named_scans import NamedScan
from tapct.run.embed.scan_vector import VectorChoice, vector_of
from tapct.run.embed.zarr_features import write_zarr
from tapct.types import HUContract, Volume
from tapct.weights.card import FeatureSettings
from tapct.weights.embedding import Embedding
from tapct.weights.pretrained import Pretrained

MIB = 1 << 20
BATCH = 8  # windows of a call, as `tapct embed` has it
WAYS = {
    "embed": "`model.embed`",
    "slice": "`model.embed`, then `to_voxels()[:, 96]`",
    "voxels": "`model.embed`, then the voxels of 4 channels, slab by slab",
    "vector": "one vector (`--scan`)",
    "zarr": "`--format zarr`",
}


def scan_of(slices: int, side: int) -> Volume:
    """A scan with noise, without a copy in another dtype."""
    hu_ZYX = np.empty((slices, side, side), np.int16)
    draw = np.random.default_rng(0)
    for z in range(slices):
        hu_ZYX[z] = draw.integers(-1000, 400, (side, side), dtype=np.int16)
    return Volume(hu_ZYX, (1.5, 0.8, 0.8))


def model_of(dim: int, size: int) -> Pretrained:
    """A network of two blocks at the published window and patch."""
    config = vit.Config(dim=dim, depth=2, heads=max(1, dim // 64))
    preprocess = Preprocess(size_yx=(size, size))
    settings = FeatureSettings(Plugin("vit", config), HUContract(), preprocess)
    return Pretrained(vit.build(config), settings, {})


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(way: str, model: Pretrained, volume: Volume, folder: Path) -> None:
    """One way to get features of a scan."""
    encoder = encoder_of(model, torch.device("cpu"))
    if way == "vector":
        vector_of(encoder, NamedScan("x", None), volume, VectorChoice())  # type: ignore[arg-type]
    elif way == "zarr":
        write_zarr(folder, encoder, volume, {})
    else:
        features: Embedding = model.embed(volume)
        if way == "slice":
            assert features.to_voxels()[:, len(volume.hu_ZYX) // 2].shape[1] == 512
        if way == "voxels":
            voxels = features.to_voxels()
            for start in range(len(volume.hu_ZYX)):
                assert voxels[:4, start].shape[1:] == volume.hu_ZYX.shape[1:]


def network_alone(model: Pretrained, volume: Volume) -> float:
    """Seconds of the network on as many windows as the scan has, of random voxels."""
    patch = patch_of(model.model)
    prepared = prepare(volume.hu_ZYX, model.contract, model.preprocess, patch, "cpu")
    left = sum(1 for _ in Windows.of(prepared, model.preprocess).corners())
    crops = torch.randn(BATCH, *model.preprocess.window)
    began = time.perf_counter()
    with torch.no_grad():
        while left > 0:
            model.model([crops[:left]])
            left -= BATCH
    return time.perf_counter() - began


def measure(way: str, slices: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of one way; runs in a process of its own."""
    torch.set_num_threads(1)
    model = model_of(args.dim, args.size)
    model.model([torch.zeros(1, *model.preprocess.window)])  # what a first call loads
    before = peak()
    volume = scan_of(slices, 512)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work(way, model, volume, Path(folder) / "x.zarr")
    seconds, memory = time.perf_counter() - began, peak() - before
    alone = network_alone(model, volume)
    grid = -(-slices // 4), args.size // 8, args.size // 8
    return {
        "way": way,
        "slices": slices,
        "seconds": round(seconds, 1),
        "of_network": round(seconds / alone, 2),
        "memory_mib": round(memory / MIB),
        "scan_mib": round(volume.hu_ZYX.nbytes / MIB),
        "input_mib": round(4 * slices * args.size**2 / MIB),
        "features_mib": round(4 * args.dim * int(np.prod(grid)) / MIB),
    }


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    number = arguments.positive
    parser.add_argument(
        "--slices", type=number, nargs="+", default=[192], help="slices of the scans, default 192"
    )
    parser.add_argument(
        "--size", type=number, default=224, help="in-plane size after the resize, default 224"
    )
    parser.add_argument("--dim", type=number, default=64, help="channels of a token, default 64")
    parser.add_argument(
        "--ways",
        nargs="+",
        default=list(WAYS),
        choices=list(WAYS),
        metavar="WAY",
        help=f"ways to measure: {', '.join(WAYS)}",
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    rows = []
    print("| way | slices | seconds | of the network | memory in MiB | scan | input | features |")
    print("|---|---|---|---|---|---|---|---|")
    for way in args.ways:
        for slices in args.slices:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (way, slices, args))
            rows.append(row)
            print(
                f"| {WAYS[way]} | {slices} | {row['seconds']} | {row['of_network']} | "
                f"{row['memory_mib']} | "
                f"{row['scan_mib']} | {row['input_mib']} | {row['features_mib']} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
