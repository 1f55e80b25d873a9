"""A long run does not grow: its memory stays what it was after the first thousands of steps."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import make_store, write_config

STEPS = 20_000
FROM, TO = 0.2, 0.95  # parts of the run between which memory is compared


def resident_bytes(pid: int) -> int:
    """Memory of a process that is neither shared nor swapped out."""
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = (line.split() for line in fields if line.startswith("Private_"))
    return sum(int(words[1]) * 1024 for words in private)


def last_step(path: Path) -> int:
    """Step of the last whole row; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 10_000))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if len(lines) > 1 else 0


def samples_of_memory(folder: Path, store: Path, steps: int) -> dict[int, int]:
    """Memory of a training process by the step that it has reached."""
    config = write_config(folder, store)
    words = ["train.steps=" + str(steps), "checkpoint.every=1000000", "log.every=50"]
    small = ["train.global_batch=1", "losses.koleo=null", "data.loader.workers=0"]
    small += ["model.depth=1", "views.num_locals=0"]  # a step of 10 to 20 ms on an idle core
    command = [sys.executable, "-m", "tapct", "train", str(config), *words, *small]
    known = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=known, stdout=subprocess.DEVNULL)
    found: dict[int, int] = {}
    while process.poll() is None:
        step = last_step(folder / "run" / "metrics.jsonl")
        if step < TO * steps:
            found[step] = resident_bytes(process.pid)
        time.sleep(0.2)
    assert process.returncode == 0
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_steps(tmp_path: Path) -> None:
    found = samples_of_memory(tmp_path, make_store(tmp_path / "archive"), STEPS)
    middle = (FROM + TO) / 2 * STEPS
    early = [size for step, size in found.items() if FROM * STEPS <= step < middle]
    late = [size for step, size in found.items() if step >= middle]
    assert len(early) > 10 and len(late) > 10
    before, after = statistics.median(early), statistics.median(late)
    print(f"steps {min(found)} to {max(found)}: {len(early)} and {len(late)} samples of memory")
    print(f"median {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB ({after / before - 1:+.2%})")
    assert after < 1.01 * before
