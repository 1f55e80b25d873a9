"""Measure how fast a slab of a packed scan is read, beside the readers of .nii.gz and blosc2 alone.

    python scripts/bench_store.py
    python scripts/bench_store.py --json bench_store.json
    python scripts/bench_store.py --tiles 256,128,64     # chunks that are tiles of slices too

The scan is synthetic CT, 192 x 512 x 512 (scripts/bench_loader.py makes it), the slab has 24 slices
at random places. All files are in the page cache, so decompression and copying are measured, not
the disk. Seconds are processor seconds of one thread, the least of several rounds, so that other
programs on the machine change them little; only the rate of two threads is by the clock.

    nibabel_ratio      seconds of nibabel from .nii.gz over ours: the whole scan is loaded, then
                       the slab is cut, as loaders for training do
    simpleitk_ratio    the same of SimpleITK
    nibabel_slice_ratio, simpleitk_slice_ratio   the same where the reader is asked for the slab
                       alone, so that it decompresses the file at most up to the slab's end
    blosc2_ratio       ours over blosc2's own decompression of the same chunks, which neither reads
                       the file nor compares checksums
    bytes_share        size of the packed scan over that of its int16 voxels

With --tiles there is a second table: stores whose chunks are tiles (`tapct pack --tile`), a slab as
above, and boxes of 24 slices with fewer rows and columns at random places. `bytes` is what is read
of the file over the size of what a whole slab needs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import arguments
import bench_loader
import blosc2
import nibabel
import numpy as np
import SimpleITK

from tapct.base import exits
from tapct.base.files import write_atomically
from tapct.data.packed.packed_scan import CODECS, LZ4, ZSTD, encode, open_packed
from tapct.data.packed.store import INDEX_NAME, Store, StoredScan, index_bytes
from tapct.types import Volume

SHAPE_ZYX, DEPTH = (192, 512, 512), 24
BOX_SIDES = (224, 96)  # rows and columns of a box
SPACING_MM = (1.5, 0.75, 0.75)
BARS = {
    "nibabel_ratio": (">=", 40.0),
    "simpleitk_ratio": (">=", 20.0),
    "blosc2_ratio": ("<=", 1.15),
    "bytes_share": ("<=", 0.50),
    "lz4_GB_per_s": (">=", 2.0),
    "two_threads": (">=", 1.8),
}


def make_store(
    folder: Path, scan_ZYX: np.ndarray, codec: str, level: int, tile: int = 0
) -> tuple[Store, float]:
    """A store of this scan, and the processor seconds of packing it."""
    folder.mkdir()
    started = time.process_time()
    frame, meta = encode(Volume(scan_ZYX, SPACING_MM), "scan0", level, codec, tile)
    seconds = time.process_time() - started
    write_atomically(folder / "scan0.b2nd", frame)
    row = StoredScan(meta.id, meta.shape_ZYX, meta.spacing_mm, "", "", "", meta.checksum)
    write_atomically(folder / INDEX_NAME, index_bytes([row], ""))
    return Store(folder), seconds


def least_seconds(read: Callable[[int], Any], starts: list[int], rounds: int) -> float:
    """Least mean processor seconds of a slab over the rounds."""
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        for z0 in starts:
            read(z0)
        best = min(best, (time.process_time() - began) / len(starts))
    return best


def blosc2_alone(store: Store) -> Callable[[int], Any]:
    """Decompression of the chunks of a slab from memory, by blosc2 and nothing else."""
    array = blosc2.open(str(store.file(0)), mode="r")
    chunks = [array.schunk.get_chunk(c) for c in range(array.schunk.nchunks)]
    step = array.chunks[0]
    num_layers = -(-SHAPE_ZYX[0] // step)
    in_layer = len(chunks) // num_layers  # 1 for chunks of whole slices
    # as the slab has them: chunks of whole slices lie one after the other
    shape = (in_layer * (DEPTH // step + 2), *array.chunks)
    decoded = np.empty(shape, np.int16)

    def read(z0: int) -> None:
        first, last = z0 // step, -(-(z0 + DEPTH) // step)
        for k, chunk in enumerate(chunks[first * in_layer : last * in_layer]):
            blosc2.decompress2(chunk, dst=decoded[k], nthreads=1)

    return read


def beside_blosc2(
    store: Store, slab_ZYX: np.ndarray, starts: list[int], rounds: int
) -> tuple[float, float]:
    """Least seconds of a slab from the store and of blosc2 alone, in turns, so that both see the
    machine in the same state.
    """
    ours, alone, raw = float("inf"), float("inf"), blosc2_alone(store)
    for _ in range(rounds):
        ours = min(ours, least_seconds(lambda z0: store.read_into(0, z0, slab_ZYX), starts, 1))
        alone = min(alone, least_seconds(raw, starts, 1))
    return ours, alone


def tiled(
    folder: Path, scan_ZYX: np.ndarray, starts: list[int], rounds: int, tiles: list[int]
) -> dict[str, Any]:
    """Slabs and boxes of stores whose chunks are whole slices (0) or tiles, by codec and tile."""
    slab_ZYX = np.empty((DEPTH, *SHAPE_ZYX[1:]), np.int16)
    found = {}
    for codec in CODECS:
        for tile in (0, *tiles):
            store, pack_s = make_store(folder / f"{codec}t{tile}", scan_ZYX, codec, 1, tile)
            ours, alone = beside_blosc2(store, slab_ZYX, starts, rounds)
            row: dict[str, Any] = {
                "seconds": ours,
                "blosc2_ratio": ours / alone,
                "bytes_share": store.file(0).stat().st_size / scan_ZYX.nbytes,
                "pack_MB_per_s": scan_ZYX.nbytes / pack_s / 1e6,
            }
            for side in BOX_SIDES:
                seconds, share = boxes(store, scan_ZYX, starts, rounds, side)
                row |= {f"box{side}_s": seconds, f"box{side}_bytes": share}
            found[f"{codec} tile {tile or '-'}"] = row
    return found


def boxes(
    store: Store, scan_ZYX: np.ndarray, starts: list[int], rounds: int, side: int
) -> tuple[float, float]:
    """Seconds of a box of 24 slices, and its bytes over those of its whole slab."""
    rng = np.random.default_rng(side)
    corners = {z0: (z0, *rng.integers(0, SHAPE_ZYX[1] - side + 1, 2).tolist()) for z0 in starts}
    shape_ZYX = (DEPTH, side, side)
    shares = []
    for corner in corners.values():
        place = tuple(slice(a, a + n) for a, n in zip(corner, shape_ZYX))
        np.testing.assert_array_equal(store.read_box(0, corner, shape_ZYX), scan_ZYX[place])
        whole = bytes_of(store, (corner[0], 0, 0), SHAPE_ZYX[1])
        shares.append(bytes_of(store, corner, side) / whole)
    seconds = least_seconds(lambda z0: store.read_box(0, corners[z0], shape_ZYX), starts, rounds)
    return seconds, float(np.mean(shares))


def bytes_of(store: Store, corner_ZYX: tuple[int, int, int], side: int) -> int:
    """Bytes of the chunks that a box of 24 slices touches."""
    _, meta = open_packed(store.file(0))
    sizes = (DEPTH, side, side)
    touched = [
        range(a // n, -(-(a + size) // n))
        for a, size, n in zip(corner_ZYX, sizes, meta.chunk_ZYX, strict=True)
    ]
    numbers = np.ravel_multi_index(np.meshgrid(*touched, indexing="ij"), meta.grid_ZYX)
    return int(meta.byte_ranges_C2[numbers.reshape(-1), 1].sum())


def two_threads(store: Store, starts: list[int], rounds: int) -> float:
    """Rate of two threads over that of one, by the clock; the best of the rounds."""
    best = 0.0
    for _ in range(rounds):
        seconds = []
        for threads in (1, 2):
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda z0: store.read_slab(0, z0, z0 + DEPTH), starts[:threads]))
                began = time.perf_counter()
                list(pool.map(lambda z0: store.read_slab(0, z0, z0 + DEPTH), starts))
                seconds.append(time.perf_counter() - began)
        best = max(best, seconds[0] / seconds[1])
    return best


def measure(folder: Path, rounds: int, tiles: list[int]) -> dict[str, Any]:
    """All figures."""
    scan_ZYX = bench_loader.make_scan(SHAPE_ZYX, 0)
    file = folder / "scan.nii.gz"
    affine = np.diag([SPACING_MM[2], SPACING_MM[1], SPACING_MM[0], 1.0])
    nibabel.save(nibabel.Nifti1Image(scan_ZYX.transpose(2, 1, 0), affine), file)
    rng = np.random.default_rng(0)
    starts = [int(z0) for z0 in rng.integers(0, SHAPE_ZYX[0] - DEPTH + 1, 16)]
    slab_bytes = DEPTH * SHAPE_ZYX[1] * SHAPE_ZYX[2] * 2
    slab_ZYX = np.empty((DEPTH, *SHAPE_ZYX[1:]), np.int16)

    def of_nibabel(z0: int) -> np.ndarray:
        return np.asarray(nibabel.Nifti1Image.from_filename(file).dataobj)[:, :, z0 : z0 + DEPTH]

    def slice_of_nibabel(z0: int) -> np.ndarray:
        return np.asarray(nibabel.Nifti1Image.from_filename(file).dataobj[:, :, z0 : z0 + DEPTH])

    def of_simpleitk(z0: int) -> np.ndarray:
        image = SimpleITK.ReadImage(str(file))  # the view below does not keep it alive
        return np.array(SimpleITK.GetArrayViewFromImage(image)[z0 : z0 + DEPTH])

    def slice_of_simpleitk(z0: int) -> np.ndarray:
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(file))
        reader.SetExtractIndex((0, 0, z0))
        reader.SetExtractSize((SHAPE_ZYX[2], SHAPE_ZYX[1], DEPTH))
        return SimpleITK.GetArrayFromImage(reader.Execute())

    expected = scan_ZYX[starts[0] : starts[0] + DEPTH]
    np.testing.assert_array_equal(of_nibabel(starts[0]).transpose(2, 1, 0), expected)
    np.testing.assert_array_equal(of_simpleitk(starts[0]), expected)
    np.testing.assert_array_equal(slice_of_nibabel(starts[0]).transpose(2, 1, 0), expected)
    np.testing.assert_array_equal(slice_of_simpleitk(starts[0]), expected)
    nibabel_s = least_seconds(of_nibabel, starts[:4], 2)
    nibabel_slice_s = least_seconds(slice_of_nibabel, starts[:4], 2)
    simpleitk_s = least_seconds(of_simpleitk, starts[:4], 2)
    simpleitk_slice_s = least_seconds(slice_of_simpleitk, starts[:4], 2)
    table: dict[str, Any] = {}
    for codec in CODECS:
        for level in (1, 5):
            store, pack_s = make_store(folder / f"{codec}{level}", scan_ZYX, codec, level)
            store.read_into(0, starts[0], slab_ZYX)
            np.testing.assert_array_equal(slab_ZYX, expected)
            ours, alone = beside_blosc2(store, slab_ZYX, starts, rounds)
            table[f"{codec} level {level}"] = {
                "seconds": ours,
                "GB_per_s": slab_bytes / ours / 1e9,
                "blosc2_ratio": ours / alone,
                "bytes_share": store.file(0).stat().st_size / scan_ZYX.nbytes,
                "pack_MB_per_s": scan_ZYX.nbytes / pack_s / 1e6,
            }
    zstd = table[f"{ZSTD} level 1"]
    threads = two_threads(Store(folder / f"{ZSTD}1"), starts, rounds)
    return {
        "nibabel_ratio": nibabel_s / zstd["seconds"],
        "simpleitk_slice_ratio": simpleitk_slice_s / zstd["seconds"],
        "nibabel_slice_ratio": nibabel_slice_s / zstd["seconds"],
        "simpleitk_ratio": simpleitk_s / zstd["seconds"],
        "blosc2_ratio": zstd["blosc2_ratio"],
        "bytes_share": zstd["bytes_share"],
        "lz4_GB_per_s": table[f"{LZ4} level 1"]["GB_per_s"],
        "two_threads": threads,
        "nibabel_s": nibabel_s,
        "nibabel_slice_s": nibabel_slice_s,
        "simpleitk_s": simpleitk_s,
        "simpleitk_slice_s": simpleitk_slice_s,
        "table": table,
        "tiles": tiled(folder, scan_ZYX, starts, rounds, tiles) if tiles else {},
    }


def show(found: dict[str, Any]) -> None:
    """Print the table, then each figure beside its bar."""
    print("codec         read ms  GB/s  x blosc2  share  pack MB/s")
    for name, row in found["table"].items():
        print(
            f"{name:12} {1e3 * row['seconds']:8.1f} {row['GB_per_s']:5.2f} "
            f"{row['blosc2_ratio']:9.3f} {row['bytes_share']:6.3f} {row['pack_MB_per_s']:10.0f}"
        )
    for name, (sign, bar) in BARS.items():
        holds = found[name] >= bar if sign == ">=" else found[name] <= bar
        print(f"{name:22} {found[name]:8.3f}  {sign} {bar:g}  {'yes' if holds else 'NO'}")
    for name in ("nibabel_slice_ratio", "simpleitk_slice_ratio"):
        print(f"{name:22} {found[name]:8.3f}")
    if found["tiles"]:
        sides = "".join(f"  box {side} ms  bytes" for side in BOX_SIDES)
        print(f"codec, tile       slab ms  x blosc2  share  pack MB/s{sides}")
    for name, row in found["tiles"].items():
        boxes = "".join(
            f"{1e3 * row[f'box{side}_s']:12.1f} {row[f'box{side}_bytes']:6.2f}"
            for side in BOX_SIDES
        )
        print(
            f"{name:16} {1e3 * row['seconds']:8.1f} {row['blosc2_ratio']:9.3f} "
            f"{row['bytes_share']:6.3f} {row['pack_MB_per_s']:10.0f}{boxes}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    parser.add_argument(
        "--rounds", type=arguments.positive, default=5, help="rounds, default %(default)s"
    )
    parser.add_argument(
        "--tiles",
        type=arguments.positives_or_none,
        default=[],
        help="rows and columns of chunks that are tiles, with commas between them; default none",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.rounds, options.tiles)
    found["machine"] = {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "blosc2": blosc2.__version__,
    }
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
