"""Evaluation while training goes on: never in its way, of the right weights, and in words when it cannot be."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import config_of, make_store, numbers_of

from tapct import during, run, trained
from tapct.engine import loop
from tapct.types import UserError

QUICK = ("eval.task.steps=5", "eval.max_scans=2", "eval.num_pictures=0")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def wait_for(path: Path, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not path.is_file():
        log = path.parent / "log.txt"
        assert time.monotonic() < end, log.read_text() if log.is_file() else "never started"
        time.sleep(0.1)


def test_checkpoints_that_are_due_are_judged_beside_training(tmp_path: Path, store: Path) -> None:
    # saved at once: a run as short as this is over before a save in the background is
    words = ("eval.during.every=8", "checkpoint.keep=1", "checkpoint.asynchronous=false", *QUICK)
    resolved = config_of(tmp_path, store, *words)
    assert run.train(resolved) == loop.Stop(12)
    folder = during.steps_folder(tmp_path / "run") / "step_00000008"
    wait_for(folder / "results.json")
    assert not (folder / "teacher.safetensors").exists(), "kept only until it is judged"
    beside = json.loads((folder / "results.json").read_text())

    # the same weights, judged by hand in a run that keeps them
    assert run.train(config_of(tmp_path / "b", store, "checkpoint.keep=3", *QUICK)) == loop.Stop(12)
    by_hand = trained.evaluate(tmp_path / "b" / "run", [], step=8)
    assert beside["models"] == json.loads(json.dumps(by_hand["models"]))
    assert numbers_of(tmp_path / "run") == numbers_of(tmp_path / "b" / "run"), "training does not notice"


def test_the_teacher_is_kept_from_rotation_and_a_busy_evaluation_is_not_joined(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 30\n")
    slow.chmod(slow.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr("sys.executable", str(slow))
    words = ("eval.during.every=4", "checkpoint.keep=1", "checkpoint.asynchronous=false", *QUICK)
    began = time.monotonic()
    assert run.train(config_of(tmp_path, store, *words)) == loop.Stop(12)
    assert time.monotonic() - began < 20, "training waited"
    assert "step 8 is not evaluated: the evaluation before it is still running" in capsys.readouterr().out
    kept = load_file(during.steps_folder(tmp_path / "run") / "step_00000004" / "teacher.safetensors")
    assert not (tmp_path / "run" / "checkpoints" / "step_00000004").exists() and len(kept) > 10


def test_a_job_is_handed_to_sbatch_with_its_options(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    told = tmp_path / "told"
    (programs / "sbatch").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\nenv | grep -c "^SLURM_" >> {told}\necho 77\n'
    )
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    words = ("eval.during.every=12", "eval.during.how=job", "eval.during.sbatch=[--partition=gpu,--time=60]")
    assert run.train(config_of(tmp_path, store, *words)) == loop.Stop(12)
    lines = told.read_text().splitlines()
    assert "--partition=gpu" in lines and "--time=60" in lines and lines[-1] == "0", "of this job nothing is handed on"
    wrapped = next(line for line in lines if line.startswith("--wrap="))
    assert f"-m tapct eval {tmp_path}/run --step=12" in wrapped
    assert "evaluation of step 12: job 77" in capsys.readouterr().out


def test_sbatch_that_fails_or_is_not_there_is_a_line_and_no_end(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ("eval.during.every=12", "eval.during.how=job")
    assert run.train(config_of(tmp_path, store, *words)) == loop.Stop(12)
    assert "step 12 is not evaluated: [Errno 2] No such file or directory: 'sbatch'" in capsys.readouterr().out


def test_a_step_that_is_not_there_is_one_line(tmp_path: Path, store: Path) -> None:
    run.train(config_of(tmp_path, store))
    with pytest.raises(UserError, match=r"has no whole checkpoint of step 5 \(it is not there\); there are: 8, 12"):
        trained.evaluate(tmp_path / "run", [], step=5)
