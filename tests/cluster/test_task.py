"""What a task of a job does: train, save on a signal, leave a mark, refuse the wrong code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from fake_slurm import cluster as cluster  # fixtures
from fake_slurm import config as config
from fake_slurm import store as store
from shell import Shell
from shell import shell as shell
from tiny_run import numbers_of

from tapct.cluster import task


@pytest.fixture
def job(config: Path, cluster: FakeSlurm, shell: Shell) -> list[str]:
    """A command that does what a task of a submitted job does."""
    shell.good("submit", config, "--time", "10", "train.steps=400", "log.every=1")
    (place,) = Path("run/jobs").iterdir()
    (code,) = Path("run/code").iterdir()
    words = (str(place.absolute() / "config.yaml"), str(Path.cwd()), str(code.absolute()))
    return [sys.executable, "-c", f"from tapct.cluster.task import work; work{words!r}"]


def start(job: list[str], restarts: int = 0) -> subprocess.Popen[str]:
    (code,) = Path("run/code").iterdir()
    known = {
        **os.environ,
        task.MARK: str(Path("run/mark").absolute()),
        "PYTHONPATH": str(code.absolute()),
        "SLURM_RESTART_COUNT": str(restarts),
        "OMP_NUM_THREADS": "1",
    }
    # -c looks into the working directory first, which holds no tapct
    return subprocess.Popen(
        job, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def events() -> list[dict[str, object]]:
    (path,) = Path().glob("run/jobs/*/events.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_until(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"{path} did not grow")


def test_a_task_saves_on_a_signal_marks_it_and_goes_on_from_there(job: list[str]) -> None:
    process = start(job)
    wait_until(Path("run/metrics.jsonl"), 2, process)
    process.send_signal(signal.SIGUSR2)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "saved at step" in said, said
    assert Path("run/mark").read_text() == "stopped"
    assert [event["event"] for event in events()] == ["start", "stopped"]
    step = len(numbers_of(Path("run")))
    assert 2 <= step < 400
    Path("run/mark").unlink()

    process = start(job, restarts=1)
    wait_until(Path("run/metrics.jsonl"), step + 1, process)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert f"at step {step} of 400" in said and Path("run/mark").read_text() == "stopped"
    assert [event.get("restarts") for event in events()] == [0, None, 1, None]


def test_a_job_goes_on_with_a_change_that_was_allowed(
    config: Path, cluster: FakeSlurm, shell: Shell
) -> None:
    shell.good("train", config, "train.steps=2", "losses.koleo=null")
    shell.good("submit", config, "--allow-change", "train.steps=3", "losses.koleo=null")
    (place,), (code,) = Path("run/jobs").iterdir(), Path("run/code").iterdir()
    words = (str(place.absolute() / "config.yaml"), str(Path.cwd()), str(code.absolute()))
    for allowed, exit_code, told in (
        (False, 2, "train.steps was 2"),
        (True, 0, "--allow-change: train.steps was 2"),
    ):
        process = start(
            [
                sys.executable,
                "-c",
                f"from tapct.cluster.task import work; work{(*words, allowed)!r}",
            ]
        )
        said, _ = process.communicate(timeout=60)
        assert process.returncode == exit_code and told in said, said
    assert [row["step"] for row in numbers_of(Path("run"))] == [1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_before_training_begins_is_not_lost(
    job: list[str], number: signal.Signals
) -> None:
    process = start(job)
    (place,) = Path("run/jobs").iterdir()
    wait_until(place / "events.jsonl", 1, process)  # torch is being imported now
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f"{number.name} before training began" in said
    assert Path("run/mark").read_text() == "stopped" and not Path("run/metrics.jsonl").exists()


def test_a_task_that_fails_says_one_line_and_marks_it(job: list[str], store: Path) -> None:
    (place,) = Path("run/jobs").iterdir()
    config = place / "config.yaml"
    config.write_text(config.read_text().replace(str(store), "gone"))
    process = start(job)
    said, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and said.count("\n") == 1
        and said.startswith("error: ")
        and "gone" in said
    )
    assert Path("run/mark").read_text() == "failed"
    assert events()[-1]["event"] == "failed"


def test_a_task_refuses_another_tapct_than_its_snapshot(job: list[str]) -> None:
    (code,) = Path("run/code").iterdir()
    job[2] = job[2].replace(str(code.absolute()), "/elsewhere")
    process = start(job)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "error: this job must run the tapct in /elsewhere" in said
    assert "Traceback" not in said
    assert Path("run/mark").read_text() == "failed"


def test_the_first_mark_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(task.MARK, str(tmp_path / "mark"))
    task.leave_mark("failed")
    task.leave_mark("stopped")
    assert (tmp_path / "mark").read_text() == "failed"


def test_a_worker_takes_the_signals_over_before_torch_is_there() -> None:
    check = (
        "import sys, tapct.cluster.task; print([name for name in ('torch', 'numpy') if name "
        "in sys.modules])"
    )
    package = Path(task.__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", check],
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
