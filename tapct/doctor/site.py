"""Probe of a config and a store: `python -m tapct.doctor.site site ARGUMENTS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tapct.data.loading import read_rate
from tapct.doctor.facts import Reads, Settings
from tapct.doctor.probes import report
from tapct.run.config import RunConfig
from tapct.run.rules import load_run_config


def settings(path: str, overrides: list[str]) -> Settings:
    """Read what a config asks of its machine.

    Raises:
        UserError: the config is wrong.
    """
    config: RunConfig = load_run_config(Path(path), overrides).value
    return Settings(
        str(config.out),
        str(config.data.folders[0]),
        config.data.loader.slab_depth,
        config.data.loader.workers,
        config.log.wandb.mode,
        config.device,
        config.train.precision,
    )


def reads(path: str, depth: int, workers: int) -> Reads:
    """Read random slabs as the loader does, for a moment.

    Raises:
        UserError: the folder holds no store.
    """
    rate = read_rate.measure(path, depth, workers)
    return Reads(rate.scans, rate.slabs_per_s, rate.bytes_per_s, rate.threads, depth)


def main(arguments: dict[str, Any]) -> None:
    """Report on the config if there is one, then on the store if there is one."""
    read = None
    if arguments["config"]:
        read = report("settings", lambda: settings(arguments["config"], arguments["overrides"]))
    wanted = read or Settings()
    store = arguments["store"] or wanted.store
    if store:
        report("reads", lambda: reads(store, wanted.slab_depth, wanted.workers))


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
