"""On a real SLURM: an index and a pack as arrays, of which one element is killed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scan_files import make_ct, save_scan

from tapct.data.index.build import build_manifest
from tapct.data.manifest import Manifest
from tapct.data.packed.store import Store

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PATIENCE_SECONDS = 900  # on a machine with other work
SHORT = ("--parts", "3", "--time", "10", "--cpus-per-task", "1")


def submit(*words: object) -> list[str]:
    """Submit arrays; ids of all jobs, the last one last."""
    known = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tapct", "submit", *map(str, words), *SHORT]
    printed = subprocess.run(command, env=known, capture_output=True, text=True, check=True)
    return re.findall(r"^(?:array|job) (\d+):", printed.stdout, re.MULTILINE)


def wait_for(job: str) -> None:
    """Wait until a job has left the queue."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        queue = ["squeue", "--noheader", "--jobs", job]
        if not subprocess.run(queue, capture_output=True, text=True, check=False).stdout.strip():
            return
        time.sleep(0.5)
    pytest.fail(f"job {job} has not ended")


@pytest.mark.slow
def test_arrays_with_a_lost_element_give_what_one_process_gives(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(9):
        save_scan(tmp_path / "scans" / f"c{seed}.nii.gz", make_ct((12, 32, 32), seed))
    first, _, last = submit("index", "scans", "--out", "archive")
    subprocess.run(["scancel", f"{first}_1"], check=True)
    wait_for(last)
    submit("index", "scans", "--out", "archive")  # harmless
    shutil.copy(tmp_path / "archive" / ".patient_key", tmp_path)
    alone = build_manifest(tmp_path / "scans", tmp_path / "m.parquet")
    found = Manifest.read(tmp_path / "archive")
    assert found.digest == alone.digest
    assert [row.patient for row in found.rows] == [row.patient for row in alone.rows]
    first, last = submit("pack", "archive", "--out", "store")
    subprocess.run(["scancel", f"{first}_2"], check=True)
    wait_for(last)
    store = Store(tmp_path / "store")
    assert len(store) == len(alone.accepted)
    for number in range(len(store)):
        store.verify(number)
