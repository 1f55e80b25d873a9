"""A sweep on this machine: the folders of a sweep on SLURM, some runs at a time, ranked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_slurm import config as config  # fixtures
from fake_slurm import store as store
from shell import Shell
from shell import shell as shell

from tapct.cluster import folders, local_sweep
from tapct.config import load_config
from tapct.run.config import RunConfig
from tapct.run_folder import RunFolder

# a Python that writes what a run would leave: it is given "-m tapct train CONFIG"
TRAINS = """#!/bin/bash
run="$(dirname "$(dirname "$(dirname "${@: -1}")")")"
echo "$OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES $TAPCT_IN_SWEEP" > "$run/environment"
echo "{\\"step\\": 4, \\"loss/total\\": 2.5}" > "$run/metrics.jsonl"
case "$run" in *seed=2*) echo "error: no more room"; exit 2 ;; esac
"""


# it ends the sweep, and saves when it is stopped
STOPS = """#!/bin/bash
run="$(dirname "$(dirname "$(dirname "${@: -1}")")")"
sleep 30 & sleeper=$!
trap 'kill $sleeper; echo > "$run/saved"; exit 0' TERM
kill -TERM $PPID
wait
"""


def test_settings_with_several_values_are_swept() -> None:
    words = ["optim.lr=1e-3,3e-3", "views.global_area=[0.1,0.2]", "out=a", "seed=1"]
    assert local_sweep.divided(words) == (words[1:], words[:1])


def test_two_runs_may_make_their_common_parents_at_the_same_time(tmp_path: Path) -> None:
    places = [tmp_path / str(number) / "run" for number in range(50)]
    for place in places:
        barrier = threading.Barrier(4)

        def make(name: str, place: Path = place, barrier: threading.Barrier = barrier) -> Path:
            with contextlib.ExitStack() as undo:
                barrier.wait()
                made = folders.make_new_folder(place / name / "jobs", "job", undo)
                undo.pop_all()
            return made

        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(make, ("a", "b", "c", "a")))
        assert len({*made}) == 4 and all(folder.is_dir() for folder in made)


def test_a_sweep_trains_every_combination_in_its_folder(
    config: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(TRAINS)
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = ("optim.lr=1e-3,2e-3", "seed=1,2", "losses.koleo=null", "--parallel", "2")
    code, out, err = shell("sweep", config, *words)
    assert code == 1, err
    assert "failed: run/lr=1e-3,seed=2: no more room" in out
    assert "compare: tapct compare run/*=*" in out and "the runs were not evaluated" in out
    for lr in ("1e-3", "2e-3"):
        run = Path(f"run/lr={lr},seed=1")
        (place,) = (run / "jobs").iterdir()
        resolved = load_config(RunConfig, place / "config.yaml", []).value
        assert (resolved.optim.lr, resolved.seed, resolved.out) == (float(lr), 1, run)
        threads, card, in_sweep = (run / "environment").read_text().split()
        assert int(threads) >= 1 and card in ("4", "5") and in_sweep == "1"


def test_sigterm_lets_the_runs_save_and_starts_no_further_one(
    config: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(STOPS)
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.setattr(os, "_exit", sys.exit)
    code, _, _ = shell("sweep", config, "seed=1,2", "losses.koleo=null")
    assert code == 143
    assert Path("run/seed=1/saved").exists() and not Path("run/seed=2").exists()


def test_what_cannot_run_is_refused_before_anything_starts(config: Path, shell: Shell) -> None:
    assert "several values" in shell.bad("sweep", config, "seed=1")
    assert "optim.lr" in shell.bad("sweep", config, "optim.lr=1e-3,fast")
    assert not Path("run").exists()
    assert shell.good("sweep", config, "seed=1,2", "--dry-run").split() == [
        "run/seed=1",
        "run/seed=2",
    ]
    assert not Path("run").exists()


def record(run: Path, value: float | None, direction: str, loss: float) -> Path:
    """A run with an evaluated headline."""
    run.mkdir()
    RunFolder(run).metrics.write_text(json.dumps({"step": 8, "loss/total": loss}) + "\n")
    if value is not None:
        content = {
            "task": "segmentation",
            "metric": "dice",
            "direction": direction,
            "people": "test patients",
            "best": None if math.isnan(value) else 8,
            "values": [{"step": 8, "value": None if math.isnan(value) else value}],
        }
        RunFolder(run).best.parent.mkdir()
        RunFolder(run).best.write_text(json.dumps(content))
    return run


@pytest.mark.parametrize(("direction", "order"), [("higher", "bacde"), ("lower", "cabde")])
def test_runs_are_ranked_by_their_evaluated_headline(
    tmp_path: Path, direction: str, order: str
) -> None:
    runs = [
        record(tmp_path / "a", 0.5, direction, loss=1.0),
        record(tmp_path / "b", 0.7, direction, loss=9.0),
        record(tmp_path / "c", 0.2, direction, loss=0.1),
        record(tmp_path / "e", None, direction, loss=3.0),
        record(tmp_path / "d", math.nan, direction, loss=2.0),
    ]
    rows = local_sweep.ranked(runs)
    expected = order if direction == "higher" else "cabde"
    assert [row.run.name for row in rows] == list(expected)
