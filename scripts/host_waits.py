"""Host waits of one training step of every shipped config, on a fake GPU: a Markdown table.

    python scripts/host_waits.py                   # all configs of configs/
    python scripts/host_waits.py configs/smoke.yaml

Sizes are smaller (2 blocks of width 64, 2 samples), all other settings are those of the config.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tapct.base import exits
from tapct.config import load_config
from tapct.doctor.host_waits import host_waits
from tapct.run.config import RunConfig

SHRUNK = ("model.depth=2", "model.dim=64", "model.heads=1")


def main() -> None:
    """Print one row per config, and the places of the waits below the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", type=Path, help="default: all shipped ones")
    files = parser.parse_args().configs or sorted(Path("configs").glob("*.yaml"))
    print("| config | operations on the GPU | host waits |\n|---|---|---|")
    places = []
    for file in files:
        found = host_waits(load_config(RunConfig, file, list(SHRUNK)).value)
        number = sum(count for _, _, count in found.waits)
        print(f"| {file.stem} | {found.operations} | {number} |", flush=True)
        places += [f"{file.stem}: {line}" for line in found.lines()]
    print("\n".join(places))


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
