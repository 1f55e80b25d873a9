"""Measure the memory that the features of a whole scan need, and estimate their time.

    python scripts/bench_whole_scan.py       # 300x512x512 at its own size, configs/tap_b_3d.yaml
    python scripts/bench_whole_scan.py --size 224 224 --batch 16 --device cuda --json scan.json
    python scripts/bench_whole_scan.py --shape 600 512 512 --cache /tmp/features

The script does what `tapct embed` does, at full size: the scan as int16, the network's input,
windows in batches, features over the whole patch grid, and the copy that is written. With `--cache
FOLDER` it does what `tapct eval` does with two such scans: their features are written to a feature
cache, row by row, while the next scan is prepared. On a CPU all windows would take an hour, so the
backbone computes only the first and the last `--real` calls; constant tokens of the same size
replace the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arguments
import numpy as np
import torch
from torch import Tensor, nn

from tapct import config as configs
from tapct.base import exits
from tapct.config import plugins
from tapct.data.packed.store import StoredScan
from tapct.eval.cache import FeatureCache
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.features.windows import window_starts
from tapct.eval.models.evaluated import NamedModel, settle
from tapct.eval.passes.fill import Features
from tapct.run.config import RunConfig
from tapct.types import HUContract, Tokens, Volume
from tapct.weights.card import FeatureSettings
from tapct.weights.pretrained import Pretrained


class SomeCalls(nn.Module):
    """A backbone that computes only its first and last calls.

    Args:
        backbone: backbone to call.
        num_calls: number of calls that will be made.
        real: number of calls to compute, at the beginning and at the end.
    """

    def __init__(self, backbone: nn.Module, num_calls: int, real: int) -> None:
        super().__init__()
        self.backbone, self.num_calls, self.real = backbone, num_calls, real
        self.patch, self.dim = backbone.patch, backbone.dim
        self.calls = 0
        self.seconds: list[float] = []  # of a window

    def forward(self, groups: list[Tensor]) -> list[Tokens]:
        """The backbone's tokens, or constant ones."""
        self.calls += 1
        crops_BZYX = groups[0]
        if self.real < self.calls <= self.num_calls - self.real:
            grid = tuple(
                size // side for size, side in zip(crops_BZYX.shape[1:], self.patch, strict=True)
            )
            cls_BD = crops_BZYX.new_ones(len(crops_BZYX), self.dim)
            patches_BND = crops_BZYX.new_ones(len(crops_BZYX), math.prod(grid), self.dim)
            return [Tokens(cls_BD, patches_BND[:, :4], patches_BND, grid)]  # type: ignore[arg-type]
        began = time.perf_counter()
        tokens: list[Tokens] = self.backbone(groups)
        if crops_BZYX.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append((time.perf_counter() - began) / len(crops_BZYX))
        return tokens


def peak_bytes() -> int:
    """Peak memory of this process."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Embed one random scan."""
    config = configs.load_config(RunConfig, options.config, []).value
    preprocess = dataclasses.replace(config.eval.preprocess, size_yx=tuple(options.size))
    backbone = (
        plugins.load("models", config.model.name).build(config.model.config).to(options.device)
    )
    depth, height, width = options.shape
    sides = (depth, options.size[0] or height, options.size[1] or width)
    padded = [
        max(math.ceil(s / p) * p, w)
        for s, p, w in zip(sides, backbone.patch, preprocess.window, strict=True)
    ]
    windows = math.prod(
        len(window_starts(*axis)) for axis in zip(padded, preprocess.window, preprocess.stride)
    )
    num_scans = 1 if options.cache is None else 2
    calls = math.ceil(num_scans * windows / options.batch)
    model = SomeCalls(backbone, calls, options.real)
    before = peak_bytes()
    if options.cache is None:
        shape = embed(model, FeatureSettings(model=config.model, preprocess=preprocess), options)
    else:
        shape = fill_cache(model, preprocess, options)
    assert model.calls == calls, (model.calls, calls)
    num_bytes = 4 * math.prod(shape)
    per_window = min(model.seconds)
    on_gpu = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    return {
        "config": str(options.config),
        "scan": list(options.shape),
        "input": padded,
        "features": list(shape),
        "features_GB": round(num_bytes / 1e9, 2),
        "windows": windows,
        "windows_per_call": options.batch,
        "windows_computed": len(model.seconds) * options.batch,
        "seconds_per_window": round(per_window, 3),
        "minutes_for_all_windows": round(per_window * windows / 60, 1),
        "memory_before_GB": round(before / 1e9, 2),
        "peak_memory_GB": round(peak_bytes() / 1e9, 2),
        "peak_over_features": round(peak_bytes() / num_bytes, 2),
        "peak_device_memory_GB": round(on_gpu / 1e9, 2),
    }


def random_scan(seed: int, shape: Sequence[int]) -> Volume:
    """A scan of random HU."""
    hu_ZYX = np.random.default_rng(seed).integers(-1000, 400, tuple(shape), dtype=np.int16)
    return Volume(hu_ZYX, (1.0, 0.7, 0.7))


def embed(
    model: nn.Module, settings: FeatureSettings, options: argparse.Namespace
) -> tuple[int, ...]:
    """Embed one scan; returns the shape of its features."""
    pretrained = Pretrained(model, settings, {})
    embedding = pretrained.embed(random_scan(0, options.shape), batch=options.batch)
    assert np.isfinite(embedding.features_DZYX).all()
    return embedding.features_DZYX.shape


class RandomScans:
    """A store of random scans, which are made when they are read."""

    def __init__(self, num: int, shape: Sequence[int]) -> None:
        z, y, x = shape
        self.scans = tuple(
            StoredScan(f"scan{seed}", (z, y, x), (1.0, 0.7, 0.7), "", "", "", f"{seed:032x}")
            for seed in range(num)
        )

    def index_of(self, scan_id: str) -> int:
        """Number of a scan."""
        return int(scan_id.removeprefix("scan"))

    def read(self, i: int) -> np.ndarray:
        """Voxels of a scan."""
        return random_scan(i, self.scans[i].shape_ZYX).hu_ZYX


def fill_cache(
    model: nn.Module, preprocess: Preprocess, options: argparse.Namespace
) -> tuple[int, ...]:
    """Write the features of two scans to a cache; returns the shape of one scan's features."""
    device = torch.device(options.device)
    named = NamedModel("bench", model)
    (settled,) = settle([named], [], contract=HUContract(), preprocess=preprocess, device=device)
    cache = FeatureCache(options.cache, quota_gb=1000.0)
    store: Any = RandomScans(2, options.shape)
    features = Features([settled], store, cache, batch=options.batch, device=device)
    with cache.in_use([settled.key]):
        wanted = features.missing(store.scans)
        assert len(wanted) == 2, "the cache must be empty"
        features.fill(wanted)
    grid = settled.grid(options.shape, store.scans[0].spacing_mm)
    return (int(model.dim), *grid.shape)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        default=Path("configs/tap_b_3d.yaml"),
        help="default %(default)s",
    )
    parser.add_argument(
        "--shape",
        type=arguments.positive,
        nargs=3,
        default=(300, 512, 512),
        help="slices, rows, columns",
    )
    parser.add_argument(
        "--size",
        type=arguments.whole,
        nargs=2,
        default=(0, 0),
        help="in-plane size, rows and columns; 0: the scan's own",
    )
    parser.add_argument("--batch", type=arguments.positive, default=8, help="windows per call")
    parser.add_argument(
        "--real",
        type=arguments.positive,
        default=1,
        help="calls to compute at the beginning and at the end",
    )
    parser.add_argument("--device", type=arguments.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--cache", type=Path, help="empty folder of a feature cache to write to")
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
