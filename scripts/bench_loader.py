"""Measure how fast slabs are read from a store, beside the same slabs in memory-mapped .npy files.

    python scripts/bench_loader.py --json bench_loader.json
    python scripts/bench_loader.py --store /data/store --depth 24    # your scans, no .npy reference

The scans are synthetic: a body with organs and the correlated noise of a soft kernel, air outside.
All files are in the page cache, so decompression and copying are measured, not the disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import blosc2
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from tapct.base import exits
from tapct.base.files import write_atomically
from tapct.data.loading import loader
from tapct.data.loading.slabs import draw_slab
from tapct.data.packed.packed_scan import encode
from tapct.data.packed.store import INDEX_NAME, Store, StoredScan, index_bytes
from tapct.types import Volume

CASES = {"24x512x512": ((96, 512, 512), 24), "16x256x256": ((96, 256, 256), 16)}
NUM_SCANS, BATCH, LEVEL = 4, 4, 1
WORKERS = (0, 1, 2)


def make_scan(shape_ZYX: tuple[int, int, int], seed: int) -> np.ndarray:
    """int16 HU: an elliptic body of fat, soft tissue and lung, noise of 15 HU, air around it."""
    rng = np.random.default_rng(seed)
    z, y, x = shape_ZYX
    organs = gaussian_filter(rng.normal(size=(z // 4, y // 8, x // 8)), 3)
    organs = organs.repeat(4, 0).repeat(8, 1).repeat(8, 2) / organs.std()
    hu_ZYX = np.select([organs < -1.0, organs < 0], [-850.0, -100.0], 40.0)
    noise = gaussian_filter(rng.normal(size=shape_ZYX).astype(np.float32), (0, 0.8, 0.8))
    hu_ZYX = gaussian_filter(hu_ZYX, (0, 1, 1)) + noise * (15 / noise.std())
    grid_y, grid_x = np.mgrid[-1 : 1 : y * 1j, -1 : 1 : x * 1j]
    hu_ZYX[:, (grid_y / 0.7) ** 2 + (grid_x / 0.9) ** 2 > 1] = -1000
    return np.clip(np.rint(hu_ZYX), -1024, 3000).astype(np.int16)


def write_store(folder: Path, scans: list[np.ndarray], level: int) -> Store:
    folder.mkdir()
    rows = []
    for i, hu_ZYX in enumerate(scans):
        frame, meta = encode(Volume(hu_ZYX, (1.0, 1.0, 1.0)), f"scan{i}", level)
        write_atomically(folder / f"scan{i}.b2nd", frame)
        rows.append(StoredScan(meta.id, meta.shape_ZYX, meta.spacing_mm, "", "", "", meta.checksum))
    write_atomically(folder / INDEX_NAME, index_bytes(rows, ""))
    return Store(folder)


Reader = Callable[[int], None]  # reads a number of steps


@contextmanager
def from_loader(store: Store, depth: int, workers: int) -> Iterator[Reader]:
    config = loader.Config(slab_depth=depth, workers=workers)
    with loader.build(config, store, seed=0, global_batch=BATCH) as batches:

        def read(num_steps: int) -> None:
            for _ in range(num_steps):
                next(batches)

        yield read


@contextmanager
def from_npy(files: list[Path], store: Store, depth: int) -> Iterator[Reader]:
    """The same slabs of the same samples into the same batches, in this thread."""
    maps, steps = [np.load(file, mmap_mode="r") for file in files], itertools.count()

    def read(num_steps: int) -> None:
        for step in itertools.islice(steps, num_steps):
            slabs = [
                draw_slab(sample, store, 0, depth)
                for sample in range(step * BATCH, (step + 1) * BATCH)
            ]
            hu_BZYX = torch.empty((BATCH, depth, *maps[0].shape[1:]), dtype=torch.int16).numpy()
            for b, slab in enumerate(slabs):
                hu_BZYX[b] = maps[slab.scan][slab.start : slab.start + slab.depth]

    yield read


def measure(
    readers: dict[str, Reader], num_steps: int, rounds: int = 4
) -> dict[str, dict[str, float]]:
    """Best samples per second of each, in turns, and processor time per sample (this process, all
    threads).
    """
    rates: dict[str, list[float]] = {name: [] for name in readers}
    cpu_ms: dict[str, list[float]] = {name: [] for name in readers}
    for _, (name, read) in itertools.product(range(rounds), readers.items()):
        read(3)  # consumes what was read ahead before the clock started
        started, cpu_started = time.perf_counter(), time.process_time()
        read(num_steps)
        rates[name].append(num_steps * BATCH / (time.perf_counter() - started))
        cpu_ms[name].append(1e3 * (time.process_time() - cpu_started) / (num_steps * BATCH))
    return {
        name: {"samples_per_s": max(rates[name]), "cpu_ms": min(cpu_ms[name])} for name in readers
    }


def show(found: dict[str, dict[str, float]]) -> None:
    reference = found.get("npy")
    for name, row in found.items():
        line = (
            f"  {name:>10}: {row['samples_per_s']:8.1f} samples/s, {row['cpu_ms']:6.2f} ms of "
            "processor time per sample"
        )
        if reference is not None:
            row["over_npy"] = row["samples_per_s"] / reference["samples_per_s"]
            line += f"; {row['over_npy']:.2f} x the rate of npy"
        print(line)


def read_at(store: Store, depth: int, z0: int) -> np.ndarray:
    return store.read_slab(0, z0, z0 + depth)


def levels(scan_ZYX: np.ndarray, depth: int, folder: Path) -> dict[str, Any]:
    """Size, packing rate and read time of one scan by level, against a copy of the slab from .npy;
    processor time.
    """
    np.save(folder / "level.npy", scan_ZYX)
    mapped = np.load(folder / "level.npy", mmap_mode="r")
    starts = [int(z) for z in np.random.default_rng(0).integers(0, len(scan_ZYX) - depth + 1, 40)]

    def cpu_ms(read: Callable[[int], Any]) -> float:
        started = time.process_time()
        for z0 in starts:
            read(z0)
        return 1e3 * (time.process_time() - started) / len(starts)

    found: dict[str, Any] = {}
    for level in (1, 3, 5):
        started = time.process_time()
        store = write_store(folder / f"level{level}", [scan_ZYX], level)
        seconds = time.process_time() - started
        store.read_slab(0, 0, depth)
        npy_ms = cpu_ms(lambda z: np.array(mapped[z : z + depth]))
        read_ms = cpu_ms(partial(read_at, store, depth))
        found[str(level)] = {
            "size_ratio": store.file(0).stat().st_size / scan_ZYX.nbytes,
            "pack_MB_per_cpu_s": scan_ZYX.nbytes / seconds / 1e6,
            "read_cpu_ms": read_ms,
            "npy_cpu_ms": npy_ms,
            "read_over_npy": read_ms / npy_ms,
        }
    return found


def run_case(name: str, folder: Path, num_steps: int) -> dict[str, Any]:
    shape_ZYX, depth = CASES[name]
    scans = [make_scan(shape_ZYX, seed) for seed in range(NUM_SCANS)]
    files = [folder / f"{i}.npy" for i in range(NUM_SCANS)]
    for file, scan_ZYX in zip(files, scans):
        np.save(file, scan_ZYX)
    store = write_store(folder / "store", scans, LEVEL)
    print(f"\nslab {name}, batch {BATCH}")
    with ExitStack() as stack:
        readers = {"npy": stack.enter_context(from_npy(files, store, depth))}
        for workers in WORKERS:
            readers[f"{workers} threads"] = stack.enter_context(from_loader(store, depth, workers))
        found = measure(readers, num_steps)
    show(found)
    case: dict[str, Any] = {"loader": found, "levels": levels(scans[0], depth, folder)}
    for level, row in case["levels"].items():
        print(
            f"  level {level}: size {row['size_ratio']:.3f}, pack {row['pack_MB_per_cpu_s']:.0f} "
            "MB per second of processor time, "
            f"slab {row['read_cpu_ms']:.1f} ms = {row['read_over_npy']:.1f} x npy"
        )
    return case


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    parser.add_argument(
        "--steps",
        type=arguments.positive,
        default=20,
        help="steps of each measurement, default %(default)s",
    )
    parser.add_argument("--store", type=Path, help="store to measure instead of synthetic scans")
    parser.add_argument(
        "--depth",
        type=arguments.positive,
        default=24,
        help="slices per slab of --store, default %(default)s",
    )
    options = parser.parse_args()
    result: dict[str, Any] = {
        "machine": {
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
        },
        "versions": {
            "blosc2": blosc2.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "cases": {},
    }
    if options.store:
        store = Store(options.store)
        with ExitStack() as stack:
            readers = {
                f"{workers} threads": stack.enter_context(
                    from_loader(store, options.depth, workers)
                )
                for workers in WORKERS
            }
            found = measure(readers, options.steps)
        show(found)
        result["cases"][str(options.store)] = {"loader": found}
    else:
        for name in CASES:
            with tempfile.TemporaryDirectory() as folder:
                result["cases"][name] = run_case(name, Path(folder), options.steps)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
