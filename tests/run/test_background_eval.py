"""Evaluation during training: it never delays training, uses the right weights, and reports when it
cannot run.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from forked import python_from_nest as python_from_nest  # a fixture
from safetensors.torch import load_file
from tiny_run import config_of, evaluation_of, make_store, numbers_of

from tapct.base import signals
from tapct.base.exits import UserError
from tapct.engine import loop
from tapct.engine.stop import job_deadline
from tapct.eval.runner import During
from tapct.run import background_eval, finished, pretrain
from tapct.run_folder import RunFolder

QUICK = ("eval.tasks.segmentation.steps=5", "eval.max_scans=2", "eval.num_pictures=0")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def wait_for(path: Path, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not path.is_file():
        log = path.parent / "log.txt"
        assert time.monotonic() < end, log.read_text() if log.is_file() else "never started"
        time.sleep(0.1)


def test_checkpoints_that_are_due_are_evaluated_beside_training(
    tmp_path: Path, store: Path, python_from_nest: None
) -> None:
    # saved at once: a run as short as this is over before a save in the background is
    words = ("eval.during.every=8", "checkpoint.keep=1", "checkpoint.asynchronous=false", *QUICK)
    resolved = config_of(tmp_path, store, *words)
    assert pretrain.train(resolved) == loop.Stop(12)
    folder = evaluation_of(tmp_path / "run", 8).path
    wait_for(folder / "results.json")
    wait_for(RunFolder(tmp_path / "run").best)
    beside = json.loads((folder / "results.json").read_text())

    # the same weights, evaluated by hand in a run that keeps them
    assert pretrain.train(
        config_of(tmp_path / "b", store, "checkpoint.keep=3", *QUICK)
    ) == loop.Stop(12)
    by_hand = finished.evaluate(tmp_path / "b" / "run", [], step=8)
    assert beside["tasks"] == by_hand.to_json()["tasks"]
    assert numbers_of(tmp_path / "run") == numbers_of(tmp_path / "b" / "run"), (
        "training does not notice"
    )


def test_what_is_evaluated_is_kept_from_rotation_and_a_busy_evaluation_is_not_joined(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 30\n")
    slow.chmod(slow.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr("sys.executable", str(slow))
    words = ("eval.during.every=4", "checkpoint.keep=1", "checkpoint.asynchronous=false", *QUICK)
    began = time.monotonic()
    assert pretrain.train(config_of(tmp_path, store, *words)) == loop.Stop(12)
    assert time.monotonic() - began < 20, "training waited"
    assert (
        "step 8 is not evaluated: the evaluation before it is still running"
        in capsys.readouterr().out
    )
    kept = load_file(evaluation_of(tmp_path / "run", 4).teacher)
    assert len(kept) > 10
    # it may become the best one; the one of step 8 is not evaluated
    finished_ = RunFolder(tmp_path / "run").checkpoints.finished()
    assert [path.name for path in finished_] == ["step_00000004", "step_00000012"]


@pytest.fixture
def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Python is a shell script from now on, which notes its arguments and its process ID in a file
    and then runs the given commands.
    """
    monkeypatch.setenv("SLURM_JOB_ID", "5")

    def become(end: str) -> Path:
        script, calls = tmp_path / "python", tmp_path / "calls"
        script.write_text(f'#!/bin/sh\necho "$$ $*" >> {calls}\n{end}\n')
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setattr("sys.executable", str(script))
        return calls

    return become


def steps_started(calls: Path) -> list[int]:
    """Steps whose evaluation was started."""
    return [
        int(line.rpartition("--step=")[2].split()[0]) for line in calls.read_text().splitlines()
    ]


def last_process(calls: Path) -> int:
    return int(calls.read_text().splitlines()[-1].split()[0])


def is_alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


SAVED_AT_ONCE = ("checkpoint.asynchronous=false", *QUICK)


@pytest.mark.parametrize(("how", "waits"), [("process", True), ("job", False)])
def test_a_process_in_a_job_of_pbs_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, waits: bool
) -> None:
    """The wait itself is that of a SLURM job, which the next tests show."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    during = During(every=4, how=how)
    assert not background_eval.Evaluations(tmp_path, during, "own").ends_with_job
    monkeypatch.setenv("PBS_JOBID", "12.server")
    assert background_eval.Evaluations(tmp_path, during, "own").ends_with_job is waits


def test_a_job_waits_for_the_last_evaluation(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, python_from_nest: None
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    assert pretrain.train(config_of(tmp_path, store, "eval.during.every=12", *QUICK)) == loop.Stop(
        12
    )
    assert (evaluation_of(tmp_path / "run", 12).results).is_file()


def test_a_run_of_a_sweep_waits_for_the_last_evaluation(
    tmp_path: Path,
    store: Path,
    fake_python: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TAPCT_IN_SWEEP", "1")
    calls = fake_python("exec sleep 1.5")
    words = ("eval.during.every=12", "eval.during.wait_s=0", *SAVED_AT_ONCE)
    assert pretrain.train(config_of(tmp_path, store, *words)) == loop.Stop(12)
    assert steps_started(calls) == [12] and not is_alive(last_process(calls))


def test_a_run_of_a_sweep_that_is_stopped_while_it_waits_leaves_the_evaluation_alone(
    tmp_path: Path,
    store: Path,
    fake_python: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TAPCT_IN_SWEEP", "1")
    calls = fake_python("kill -TERM $PPID; exec sleep 600")
    words = ("eval.during.every=12", *SAVED_AT_ONCE)
    assert pretrain.train(config_of(tmp_path, store, *words)) == loop.Stop(12)
    child = last_process(calls)
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)
    printed = " ".join(capsys.readouterr().out.split())
    assert "the evaluation of step 12 is still running" in printed


def test_in_a_job_the_last_evaluation_is_done_though_the_one_before_takes_long(
    tmp_path: Path, store: Path, fake_python: Callable[[str], Path]
) -> None:
    calls = fake_python("exec sleep 1.5")
    began = time.monotonic()
    assert pretrain.train(
        config_of(tmp_path, store, "eval.during.every=4", *SAVED_AT_ONCE)
    ) == loop.Stop(12)
    assert steps_started(calls)[0] == 4 and steps_started(calls)[-1] == 12
    assert time.monotonic() - began > 3 and not is_alive(last_process(calls))


@pytest.mark.parametrize("how", ["its bound", "a signal", "the end of the job's time"])
def test_a_job_does_not_wait_longer_than(
    tmp_path: Path,
    store: Path,
    fake_python: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    end = "kill -TERM $PPID; " if how == "a signal" else ""
    calls = fake_python(f"{end}exec sleep 600")
    if how == "the end of the job's time":
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))

        def is_near(environment: Mapping[str, str], margin_s: float) -> float:
            assert (
                3500
                < job_deadline(environment, margin_s) - time.time() + background_eval.LEAVE_S
                < 3600
            )
            return time.time() + 2

        monkeypatch.setattr(background_eval, "job_deadline", is_near)
    words = (
        "eval.during.every=12",
        f"eval.during.wait_s={2 if how == 'its bound' else 3600}",
        *SAVED_AT_ONCE,
    )
    assert pretrain.train(config_of(tmp_path, store, *words)) == loop.Stop(12)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"step 12 was ended with the job; run: tapct eval {tmp_path}/run --step=12" in printed
    assert "failed" not in printed, "it was ended"
    assert steps_started(calls) == [12] and not is_alive(last_process(calls))
    assert (evaluation_of(tmp_path / "run", 12).teacher).is_file(), "for by hand"


def test_a_job_that_is_stopped_waits_for_nothing_and_prints_what_is_left(
    tmp_path: Path,
    store: Path,
    fake_python: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_python("exec sleep 600")
    monkeypatch.setenv(
        "SLURM_JOB_END_TIME", str(int(time.time()) + 30)
    )  # less than train.save_before_end_s
    stop = pretrain.train(config_of(tmp_path, store, "eval.during.every=1", *SAVED_AT_ONCE))
    assert stop == loop.Stop(1, "time limit")
    assert f"run: tapct eval {tmp_path}/run --step=1" in " ".join(capsys.readouterr().out.split())
    assert (evaluation_of(tmp_path / "run", 1).teacher).is_file()


def test_the_checkpoint_of_a_stop_is_not_the_last_one(
    tmp_path: Path, store: Path, fake_python: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, resolved = (
        fake_python("exit 0"),
        config_of(tmp_path, store, "eval.during.every=8", *SAVED_AT_ONCE),
    )
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 30))
        assert pretrain.train(resolved) == loop.Stop(1, "time limit")
    assert not calls.exists()
    assert pretrain.train(resolved) == loop.Stop(12)
    assert steps_started(calls) == [8, 12]


@pytest.mark.parametrize(
    ("code", "end"), [(2, "failed"), (4, "has no result of some tasks or models")]
)
def test_an_evaluation_that_fails_is_reported(
    tmp_path: Path,
    store: Path,
    fake_python: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    code: int,
    end: str,
) -> None:
    fake_python(f"exit {code}")
    assert pretrain.train(
        config_of(tmp_path, store, "eval.during.every=12", *SAVED_AT_ONCE)
    ) == loop.Stop(12)
    log = evaluation_of(tmp_path / "run", 12).log
    assert f"the evaluation of step 12 {end}, see {log}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_an_evaluation_can_be_ended_though_other_children_of_training_are_deaf(
    tmp_path: Path, store: Path, fake_python: Callable[[str], Path]
) -> None:
    assert pretrain.train(config_of(tmp_path, store, *QUICK)) == loop.Stop(12)
    fake_python("exec sleep 600")
    evaluations = background_eval.Evaluations(tmp_path / "run", During(every=12), "mine")
    with signals.kept_from_children():
        evaluations.start(tmp_path / "run" / "checkpoints" / "step_00000012")
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert set(signals.STOP) <= set(blocked), "training is deaf again"
    assert evaluations.child is not None
    status = Path(f"/proc/{evaluations.child.pid}/status").read_text()
    mask = int(
        next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16
    )
    assert not any(mask >> (number - 1) & 1 for number in signals.STOP)
    evaluations.child.terminate()
    assert evaluations.child.wait(30) == -signal.SIGTERM


def test_a_job_is_handed_to_sbatch_with_its_options(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    calls = tmp_path / "calls"
    (programs / "sbatch").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {calls}\nenv | grep -c "^SLURM_" >> {calls}\necho 77\n'
    )
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    words = (
        "eval.during.every=12",
        "eval.during.how=job",
        "eval.during.sbatch=[--partition=gpu,--time=60]",
    )
    assert pretrain.train(config_of(tmp_path, store, *words)) == loop.Stop(12)
    lines = calls.read_text().splitlines()
    assert "--partition=gpu" in lines and "--time=60" in lines and lines[-1] == "0", (
        "of this job nothing is handed on"
    )
    wrapped = next(line for line in lines if line.startswith("--wrap="))
    assert f"-m tapct eval {tmp_path}/run --step=12" in wrapped
    assert "evaluation of step 12: job 77" in capsys.readouterr().out


def test_sbatch_that_fails_or_is_not_there_is_a_line_and_no_end(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ("eval.during.every=12", "eval.during.how=job")
    assert pretrain.train(config_of(tmp_path, store, *words)) == loop.Stop(12)
    assert (
        "step 12 is not evaluated: [Errno 2] No such file or directory: 'sbatch'"
        in capsys.readouterr().out
    )


def test_a_step_that_is_not_there_is_one_line(tmp_path: Path, store: Path) -> None:
    pretrain.train(config_of(tmp_path, store))
    with pytest.raises(
        UserError, match=r"has no whole checkpoint of step 5 \(it is not there\); there are: 8, 12"
    ):
        finished.evaluate(tmp_path / "run", [], step=5)
