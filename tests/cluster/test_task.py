"""What a task of a job does: train, save on a signal, leave a mark, refuse the wrong code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from fake_slurm import cluster as cluster  # fixtures
from fake_slurm import config as config
from fake_slurm import store as store
from forked import Forked
from shell import Shell
from shell import shell as shell
from tiny_run import numbers_of

from tapct.base import ending
from tapct.cluster import task


@pytest.fixture
def job(config: Path, cluster: FakeSlurm, shell: Shell) -> list[str]:
    """A command that does what a task of a submitted job does."""
    shell.good("submit", config, "--time", "10", "train.steps=400", "log.every=1")
    return job_command()


def job_command(*options: bool) -> list[str]:
    """The command of a task of the job that was submitted for `run`."""
    (place,) = Path("run/jobs").iterdir()
    (code,) = Path("run/code").iterdir()
    arguments = (str(place.absolute() / "config.yaml"), str(Path.cwd()), str(code.absolute()))
    call = f"run_task{(*arguments, *options)!r}"
    return ["-c", f"from tapct.cluster.task import run_task; {call}"]


def environment(restarts: int) -> dict[str, str]:
    """Variables of a task."""
    (code,) = Path("run/code").iterdir()
    return {
        **os.environ,
        ending.MARK: str(Path("run/mark").absolute()),
        "PYTHONPATH": str(code.absolute()),
        "SLURM_RESTART_COUNT": str(restarts),
        "OMP_NUM_THREADS": "1",
    }


def start(job: Sequence[str], restarts: int = 0) -> Forked:
    """Start a task; `-c` makes Python import plug-ins from the working directory."""
    return Forked(job, env=environment(restarts), merged=True)


def start_fresh(job: Sequence[str]) -> subprocess.Popen[str]:
    """Start a task in a Python of its own, which has to load torch."""
    return subprocess.Popen(
        [sys.executable, *job],
        env=environment(0),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def events() -> list[dict[str, object]]:
    (path,) = Path().glob("run/jobs/*/events.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_until(path: Path, lines: int, process: Forked | subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"{path} did not grow")


def test_a_task_saves_on_a_signal_marks_it_and_resumes_from_there(job: list[str]) -> None:
    process = start(job)
    wait_until(Path("run/metrics.jsonl"), 2, process)
    process.send_signal(signal.SIGUSR2)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "saved at step" in printed, printed
    assert Path("run/mark").read_text() == "stopped"
    assert [event["event"] for event in events()] == ["start", "stopped"]
    step = len(numbers_of(Path("run")))
    assert 2 <= step < 400
    Path("run/mark").unlink()

    process = start(job, restarts=1)
    wait_until(Path("run/metrics.jsonl"), step + 1, process)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert f"at step {step} of 400" in printed and Path("run/mark").read_text() == "stopped"
    assert [event.get("restarts") for event in events()] == [0, None, 1, None]


def test_a_job_resumes_with_a_change_that_was_allowed(
    config: Path, cluster: FakeSlurm, shell: Shell
) -> None:
    shell.good("train", config, "train.steps=2", "losses.koleo=null")
    shell.good("submit", config, "--allow-change", "train.steps=3", "losses.koleo=null")
    for allowed, exit_code, line in (
        (False, 2, "train.steps was 2"),
        (True, 0, "--allow-change: train.steps was 2"),
    ):
        process = start(job_command(allowed))
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == exit_code and line in printed, printed
    assert [row["step"] for row in numbers_of(Path("run"))] == [1, 2, 3]
    # how a person would do the same by hand
    (place,) = Path("run/jobs").iterdir()
    command = json.loads(Path("run/run.json").read_text())["command"]
    assert command == f"tapct train {place.absolute()}/config.yaml"


LEAVING_PLUGIN = """
import sys
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    pass

def build(config):
    sys.exit({code})
"""


@pytest.mark.parametrize("code", [0, 143])  # success, and what a task that was stopped exits with
def test_a_plugin_that_exits_does_not_look_like_success(
    config: Path, cluster: FakeSlurm, shell: Shell, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    Path("mylab").mkdir()
    Path("mylab/leaves.py").write_text(LEAVING_PLUGIN.format(code=code))
    monkeypatch.syspath_prepend(Path.cwd())
    shell.good("submit", config, "--time", "10", "views.ops[mylab.leaves]={}")
    process = start(job_command())
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1, printed
    assert (
        f"SystemExit({code}) was raised before training ended" in printed and "Traceback" in printed
    )
    assert Path("run/mark").read_text() == "failed"
    assert [event["event"] for event in events()] == ["start", "failed"]


def test_a_job_whose_config_is_wrong_prints_one_line(job: list[str]) -> None:
    (place,) = Path("run/jobs").iterdir()
    text = (place / "config.yaml").read_text()
    (place / "config.yaml").write_text(text.replace("steps: 400", "steps: 0"))
    process = start(job)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2, printed
    assert printed.startswith("error: ") and printed.count("\n") == 1 and "train.steps" in printed
    assert Path("run/mark").read_text() == "failed"
    assert [(event["event"], event.get("code")) for event in events()][1:] == [("failed", 2)]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_before_training_begins_is_not_lost(
    job: list[str], number: signal.Signals
) -> None:
    process = start_fresh(job)
    (place,) = Path("run/jobs").iterdir()
    wait_until(place / "events.jsonl", 1, process)  # torch is being imported now
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f"{number.name} before training began" in printed
    assert Path("run/mark").read_text() == "stopped" and not Path("run/metrics.jsonl").exists()


def test_a_task_that_fails_prints_one_line_and_marks_it(job: list[str], store: Path) -> None:
    (place,) = Path("run/jobs").iterdir()
    config = place / "config.yaml"
    config.write_text(config.read_text().replace(str(store), "gone"))
    process = start(job)
    printed, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and printed.count("\n") == 1
        and printed.startswith("error: ")
        and "gone" in printed
    )
    assert Path("run/mark").read_text() == "failed"
    assert events()[-1]["event"] == "failed"


def test_a_task_refuses_another_tapct_than_its_snapshot(job: list[str]) -> None:
    (code,) = Path("run/code").iterdir()
    job[1] = job[1].replace(str(code.absolute()), "/elsewhere")
    process = start(job)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "error: this job must run the tapct in /elsewhere" in printed
    assert "Traceback" not in printed
    assert Path("run/mark").read_text() == "failed"


def test_the_first_mark_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ending.MARK, str(tmp_path / "mark"))
    ending.leave("failed")
    ending.leave("stopped")
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
