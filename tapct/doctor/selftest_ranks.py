"""Ranks of a self-test, in processes of their own: `python -m tapct.doctor.selftest_ranks JSON`.

Every rank takes the same steps as one process would; the first one prints its losses.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tapct.base import ranks
from tapct.distributed.device import pick_device, prepare_cpu
from tapct.distributed.world import join_ranks
from tapct.doctor import short_run
from tapct.doctor.machine import last_line
from tapct.run.rules import load_run_config

SECONDS = 400.0  # after which the ranks are ended
MARK = "@losses "
BLOCKS = 2  # of the config with which computations are compared
SAMPLES = 4  # of a step; two ranks get two each


Losses = dict[str, list[dict[str, float]]]  # precision -> losses of each step


def losses_of(
    path: Path, overrides: Sequence[str], lengths: Mapping[str, int], kind: str, num_ranks: int
) -> Losses | str:
    """Losses of runs on several ranks of this machine, or the reason why there are none.

    Args:
        path, overrides: config and settings.
        lengths: train.precision of each run and its number of steps.
        kind: cpu or cuda.
        num_ranks: number of ranks.
    """
    settings = [*overrides, f"device={kind}"]
    asked = json.dumps({"config": str(path), "overrides": settings, "lengths": dict(lengths)})
    package = str(Path(__file__).resolve().parents[2])
    common = {
        **ranks.without_place(os.environ),
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
    processes = []
    for rank in range(num_ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tapct.doctor.selftest_ranks", asked],
                env={**common, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        return f"the ranks did not end within {SECONDS:g} s"
    finally:
        for process in processes:
            process.kill()
    for out, _ in outputs:
        for line in out.splitlines():
            if line.startswith(MARK):
                found: Losses = json.loads(line.removeprefix(MARK))
                return found
    reasons = [last_line(err) for _, err in outputs]
    return f"the ranks ended without a result: {next(filter(None, reasons), 'no message')}"


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port: int = tried.getsockname()[1]
        return port


def main(asked: dict[str, Any]) -> None:
    """Take the steps of all runs as one rank; the first rank prints the losses."""
    prepare_cpu()
    config = load_run_config(Path(asked["config"]), asked["overrides"]).value
    small = short_run.comparable_over_ranks(short_run.shrunk(config, SAMPLES, BLOCKS))
    place = ranks.from_environment(os.environ)
    device = pick_device(config.device, place.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with join_ranks(place, device, config.parallel) as world:
        found = {}
        for precision, steps in asked["lengths"].items():
            run = short_run.start(short_run.with_precision(small, precision), world)
            found[precision] = run.losses(steps)
    if place.is_first:
        print(f"\n{MARK}{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
