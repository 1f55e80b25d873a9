"""A whole scan of full size goes through ViT-B in bounded memory; the script that measures it is
what is tested.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_300_slices_of_512x512_in_vit_b_need_less_than_6_gb(tmp_path: Path) -> None:
    line = [sys.executable, "scripts/bench_whole_scan.py", "--json", str(tmp_path / "scan.json")]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scan.json").read_text())
    assert found["input"] == [300, 512, 512] and found["features"] == [768, 75, 64, 64]
    assert found["windows_computed"] == 16 and found["windows"] == 1168
    assert found["features_GB"] + found["memory_before_GB"] < found["peak_memory_GB"] < 6


def test_the_script_counts_the_windows_of_a_scan(tmp_path: Path) -> None:
    """A small scan, of which every window is computed."""
    line = [
        "scripts/bench_whole_scan.py",
        "configs/smoke.yaml",
        "--json",
        str(tmp_path / "scan.json"),
    ]
    shape = ["--shape", "12", "64", "96", "--real", "1000"]
    done = forked.run([*line, *shape], cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scan.json").read_text())
    assert found["features"][1:] == [3, 8, 12]
    assert (
        found["windows"] <= found["windows_computed"] < found["windows"] + found["windows_per_call"]
    )


@pytest.mark.slow
def test_two_scans_of_600_slices_are_written_to_a_cache_in_less_than_4_gb(tmp_path: Path) -> None:
    line = [sys.executable, "scripts/bench_whole_scan.py", "--json", str(tmp_path / "scan.json")]
    line += ["--shape", "600", "512", "512", "--cache", str(tmp_path / "cache")]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scan.json").read_text())
    assert found["features"] == [768, 150, 64, 64] and found["windows_computed"] == 16
    assert found["peak_memory_GB"] < 4
    assert len(list((tmp_path / "cache").glob("*/*.features"))) == 2


def test_the_script_writes_a_small_scan_to_a_cache(tmp_path: Path) -> None:
    line = ["scripts/bench_whole_scan.py", "configs/smoke.yaml", "--real", "1000"]
    line += ["--shape", "12", "64", "96", "--cache", str(tmp_path / "cache")]
    done = forked.run([*line, "--json", str(tmp_path / "scan.json")], cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache").glob("*/*.features"))) == 2
