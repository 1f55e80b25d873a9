"""Probes of a config and a store: `python -m tapct.doctor.site KIND ARGUMENTS`."""

from __future__ import annotations

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tapct import config as configs
from tapct import run
from tapct.data.store import Store
from tapct.doctor.answers import answer
from tapct.doctor.facts import Reads, Settings
from tapct.types import UserError

READ_SECONDS = 1.5


def settings(path: str, overrides: list[str]) -> Settings:
    """What the config says of its machine. Raises: UserError."""
    config: run.RunConfig = configs.load_config(run.RunConfig, Path(path), overrides).value
    return Settings(
        str(config.out),
        str(config.data.store),
        config.data.loader.slab_depth,
        config.data.loader.workers,
        config.log.wandb.mode,
        config.device,
        config.train.precision,
    )


def reads(path: str, depth: int, workers: int) -> Reads:
    """Read random slabs as the loader does, for a moment. Raises: UserError."""
    store, threads = Store(path), max(1, workers)
    if not store.scans:
        raise UserError(f"{path} holds no scan; pack an archive that has some")
    draw = random.Random()  # another place each time, so that the disk is asked and not only the page cache
    end = time.perf_counter() + READ_SECONDS

    def read(seed: float) -> tuple[int, int]:
        own, slabs, size = random.Random(seed), 0, 0
        while slabs == 0 or time.perf_counter() < end:
            scan = own.randrange(len(store))
            deep = store.scans[scan].shape_ZYX[0]
            start = own.randrange(max(1, deep - depth + 1))
            size += store.read_slab(scan, start, min(deep, start + depth)).nbytes
            slabs += 1
        return slabs, size

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(read, [draw.random() for _ in range(threads)]))
    seconds = time.perf_counter() - begin
    slabs, size = (sum(column) for column in zip(*found, strict=True))
    return Reads(len(store), slabs / seconds, size / seconds, threads, depth)


def main(arguments: dict[str, Any]) -> None:
    """Read the config if there is one, then from the store if there is one."""
    found = Settings()
    if arguments["config"]:
        found = answer("settings", lambda: settings(arguments["config"], arguments["overrides"]))
    place = arguments["store"] or (found.store if found else "")
    if place:
        asked = found or Settings()
        answer("reads", lambda: reads(place, asked.slab_depth, asked.workers))


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
