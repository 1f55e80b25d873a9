"""What `tapct plan` measures on this machine: the rate of matrix products, and facts of a store."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from tapct.data.packed.store import INDEX_NAME, Store
from tapct.plan.scale import StoreFacts

STORE_SAMPLE = 256  # a store may hold a million scans; about this number of files is read


def gemm_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of the fastest of some square matrix products.

    Args:
        device: device to measure.
        dtype: type of the matrices.
        repeats: number of products after the one that warms up.
    """
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def store_facts(path: Path) -> StoreFacts | None:
    """Facts about reading from a store, taken from some of its scans.

    Args:
        path: folder of the store.
    Returns:
        None where there is no store, or an empty one.
    """
    if not (path / INDEX_NAME).is_file():
        return None
    store = Store(path)
    sample = range(0, len(store), max(1, len(store) // STORE_SAMPLE))
    int16_bytes = stored_bytes = in_plane = 0
    for index in sample:
        shape_ZYX = store.scans[index].shape_ZYX
        in_plane += math.prod(shape_ZYX[1:])
        int16_bytes += 2 * math.prod(shape_ZYX)
        file = store.file(index)
        if file.is_file():
            stored_bytes += file.stat().st_size
    if not int16_bytes:
        return None
    return StoreFacts(len(store), in_plane / len(sample), stored_bytes / int16_bytes)
