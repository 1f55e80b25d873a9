"""The quickstart's choices that a whole run on one machine would not show."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_archive

from tapct import config
from tapct.data import manifest
from tapct.data.patients.key import KEY_VARIABLE
from tapct.run.config import RunConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])


def load_quickstart() -> Any:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    quickstart = load_quickstart()
    words = quickstart.overrides_without_bf16(cpuinfo)
    train = config.load_config(RunConfig, ROOT / quickstart.SMOKE, words).value.train
    assert train.precision == precision
    whole = config.load_config(RunConfig, ROOT / quickstart.SMOKE, []).value.train
    assert (train.steps < whole.steps) == (precision == "fp32")


def test_the_phantom_is_also_classified_and_matched(tmp_path: Path) -> None:
    quickstart = load_quickstart()
    assert quickstart.phantom_tasks(tmp_path) == []  # an archive of an earlier version
    for name in ("scan_labels.csv", "landmarks.csv"):
        (tmp_path / name).touch()
    words = quickstart.phantom_tasks(tmp_path)
    found = config.load_config(RunConfig, ROOT / quickstart.SMOKE, words).value.eval
    assert [task.name for task in found.tasks] == ["segmentation", "classification", "matching"]
    assert found.scan_labels == str(tmp_path / "scan_labels.csv")


class EnoughError(Exception):
    """Ends a quickstart when the archive is indexed."""


def test_the_patients_of_the_phantom_have_the_same_names_everywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def enough(*_: Any, **__: Any) -> None:
        raise EnoughError

    quickstart = load_quickstart()
    monkeypatch.setattr(quickstart, "make_phantom", make_archive)
    monkeypatch.setattr(quickstart.pack, "pack", enough)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    patients = []
    for place in ("here", "there"):
        with pytest.raises(EnoughError):
            quickstart.main(["--work", str(tmp_path / place)])
        rows = manifest.Manifest.read(tmp_path / place / "manifest.parquet").accepted
        patients.append([(row.path, row.patient) for row in rows])
    assert patients[0] == patients[1] and len(patients[0]) == 4
