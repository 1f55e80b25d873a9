"""The quickstart's choices that a whole run on one machine would not show."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tapct import config, run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("cpuinfo", "precision"),
    [
        ("flags : fpu avx2 avx512_bf16", "bf16"),
        ("flags : fpu amx_bf16 amx_tile", "bf16"),
        ("Features : fp asimd bf16 i8mm", "bf16"),
        ("flags : fpu avx2 avx512f", "fp32"),
    ],
)
def test_a_cpu_without_bf16_trains_in_fp32(cpuinfo: str, precision: str) -> None:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    assert spec is not None and spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    words = quickstart.words_without_bf16(cpuinfo)
    train = config.load_config(run.RunConfig, ROOT / quickstart.SMOKE, words).value.train
    assert train.precision == precision
    whole = config.load_config(run.RunConfig, ROOT / quickstart.SMOKE, []).value.train
    assert (train.steps < whole.steps) == (precision == "fp32")
