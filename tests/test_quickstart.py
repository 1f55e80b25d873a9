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


@pytest.mark.parametrize(
    ("step_s", "spent_s", "after_s", "steps"),
    [
        (0.069, 21, 21, 1700),  # measured on machine A of docs/benchmarks.md
        (0.142, 41, 35, 1600),  # on machine B, with less and with more work beside it
        (0.180, 41, 47, 1200),
        (0.220, 60, 60, 850),
    ],
)
def test_the_number_of_steps_lets_the_quickstart_end_in_six_minutes(
    step_s: float, spent_s: float, after_s: float, steps: int
) -> None:
    quickstart = load_quickstart()
    chosen = quickstart.chosen_steps(step_s, spent_s, wanted=1700)
    assert chosen == steps
    assert spent_s + chosen * step_s + after_s < 360
    assert quickstart.chosen_steps(step_s, spent_s, wanted=100) == 100


def test_even_the_slowest_machine_trains_for_some_steps() -> None:
    assert load_quickstart().chosen_steps(3.0, 100, wanted=1700) == 200


def test_a_run_that_has_been_started_keeps_its_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart = load_quickstart()
    monkeypatch.setattr(quickstart, "seconds_of_a_step", lambda config: 0.2)
    words = [f"out={tmp_path}"]
    resolved = config.load_config(RunConfig, ROOT / quickstart.SMOKE, words)
    assert quickstart.steps_for_this_machine(resolved, 40) == ["train.steps=1050"]
    assert "0.200 s a step on this machine: 1050 training steps, to end within 6" in (
        " ".join(capsys.readouterr().out.split())
    )
    (tmp_path / "config.yaml").write_text(
        (ROOT / quickstart.SMOKE).read_text().replace("steps: 1700", "steps: 640")
    )
    assert quickstart.steps_for_this_machine(resolved, 40) == ["train.steps=640"]


def test_steps_of_the_command_line_are_not_changed() -> None:
    quickstart = load_quickstart()
    assert quickstart.options_of(["--steps", "300"]).steps == 300
    assert quickstart.sets_steps(["seed=1", "train.steps=5"])
    assert not quickstart.sets_steps(["seed=1"])


@pytest.mark.slow
def test_the_rate_is_measured_without_a_store(tmp_path: Path) -> None:
    quickstart = load_quickstart()
    found = config.load_config(RunConfig, ROOT / quickstart.SMOKE, ["device=cpu"]).value
    assert 0.005 < quickstart.seconds_of_a_step(found) < 30
