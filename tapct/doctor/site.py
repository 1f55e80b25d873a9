"""Probes of a config and a store: `python -m tapct.doctor.site KIND ARGUMENTS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tapct import config as configs
from tapct.data import read_rate
from tapct.doctor.answers import answer
from tapct.doctor.facts import Reads, Settings
from tapct.run.config import RunConfig


def settings(path: str, overrides: list[str]) -> Settings:
    """What the config says of its machine. Raises: UserError."""
    config: RunConfig = configs.load_config(RunConfig, Path(path), overrides).value
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
    found = read_rate.measure(path, depth, workers)
    return Reads(found.scans, found.slabs_per_s, found.bytes_per_s, found.threads, depth)


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
