"""Scripts refuse what they cannot do in one line, as tapct does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "bench_step.py configs/smok.yaml",
            "configs/smok.yaml: no such config file; did you mean configs/smoke.yaml?",
        ),
        ("bench_prototypes.py --rows 0", "argument --rows: '0' is no whole number above 0"),
        (
            "ablation.py {empty} full --seeds 0 --out {empty}/out",
            "full, seed 0: {empty} holds no store.parquet",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: str, told: str) -> None:
    line = words.format(empty=tmp_path).split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / line[0]), *line[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {told.format(empty=tmp_path)}" in done.stderr.splitlines()[-1]
