"""On a real SLURM: submit, preempt, come back, and end with the numbers of a run that nothing
disturbed.

TAPCT_SLURM=1 pytest -m slurm tests/slurm
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import assert_equal_runs, make_store, numbers_of, write_config

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LAYOUTS = [(2, 2), pytest.param(1, 1, marks=pytest.mark.slow)]  # (nodes, tasks per node)
PATIENCE_SECONDS = 300


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("archive"))


@pytest.fixture
def here(slurm: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, store)
    return tmp_path


def tapct(*words: str | Path) -> str:
    """What a tapct command prints; it must succeed."""
    known = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"}
    command = [sys.executable, "-m", "tapct", *map(str, words)]
    done = subprocess.run(
        command, env=known, capture_output=True, text=True, timeout=120, check=False
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 0 and errors == [], done.stdout + done.stderr
    return done.stdout


def submit(here: Path, run: str, *words: str, nodes: int = 1, tasks: int = 1) -> str:
    """Submit the tiny config; returns the id of the job."""
    layout = ["--nodes", str(nodes), "--tasks-per-node", str(tasks)]
    printed = tapct(
        "submit", here / "tiny.yaml", f"out={run}", "--time", "10", "--grace", "20", *layout, *words
    )
    found = re.search(r"job (\S+):", printed)
    assert found is not None, printed
    return found[1]


def ask(*words: str) -> str:
    return subprocess.run(
        words, capture_output=True, text=True, check=True, timeout=30
    ).stdout.strip()


def state_of(job: str) -> str:
    found = re.search(r"JobState=(\w+)", ask("scontrol", "show", "job", "-o", job))
    return found[1] if found else ""


def log_of(run: Path | str, job: str) -> str:
    """All logs of a job, one after the other."""
    paths = sorted(
        [
            *Path(run).glob(f"jobs/*/{job}_*_log.out"),
            *Path(run).parent.glob(f"jobs/*/{job}_*_log.out"),
        ]
    )
    return "".join(path.read_text() for path in paths)


def wait_for(what: Callable[[], object], run: Path | str, job: str) -> None:
    """Wait until something holds; a job that fails meanwhile ends the wait with its log."""
    began = time.monotonic()
    while not what():
        known = log_of(run, job)
        assert time.monotonic() - began < PATIENCE_SECONDS, f"{job} is {state_of(job)}:\n{known}"
        assert state_of(job) not in ("FAILED", "TIMEOUT", "NODE_FAIL") or what(), known
        time.sleep(0.3)


def wait_for_end(run: Path | str, job: str, state: str = "COMPLETED") -> None:
    wait_for(lambda: state_of(job) == state, run, job)


def steps_of(run: Path | str) -> int:
    path = Path(run) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def events_of(run: Path | str) -> list[str]:
    paths = sorted(Path(run).glob("jobs/*/events.jsonl"))
    return [json.loads(line)["event"] for path in paths for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("nodes", "tasks"), LAYOUTS)
def test_a_preempted_run_ends_with_the_numbers_of_an_undisturbed_one(
    here: Path, nodes: int, tasks: int
) -> None:
    words = (
        "train.steps=200",
        "log.every=1",
        "checkpoint.every=10000",
        "losses.koleo.cross_rank=true",
    )
    calm = submit(here, "calm", *words, nodes=nodes, tasks=tasks)
    wait_for_end("calm", calm)
    assert events_of("calm") == ["start", "done"]

    job = submit(here, "run", *words, nodes=nodes, tasks=tasks)
    wait_for(lambda: steps_of("run") >= 30, "run", job)
    ask("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait_for_end("run", job)

    assert events_of("run") == ["start", "stopped", "start", "done"]
    printed = log_of("run", job)
    stopped = re.search(r"stopped by SIGUSR2 and saved at step (\d+)", printed)
    assert stopped is not None and 30 <= int(stopped[1]) < 200
    assert f"at step {stopped[1]} of 200" in printed and printed.count("tapct: requeued") == 1
    assert_equal_runs(Path("run"), Path("calm"), here)
    row = next(line.split() for line in tapct("jobs", "run").splitlines() if job in line.split())
    assert "200/200" in row and row[-1] == "1"

    ask("scontrol", "requeue", job)  # as SLURM may do to a run that is done already
    wait_for(lambda: events_of("run")[4:] == ["start", "done"], "run", job)
    wait_for_end("run", job)
    assert "nothing to train" in log_of("run", job)


def test_a_run_resumes_at_another_number_of_nodes(here: Path) -> None:
    # KoLeo of untrained class tokens, which are all but equal, is a matter of rounding
    words = ("train.steps=60", "log.every=1", "losses.koleo=null", "model.drop_path=0.0")
    first = submit(here, "run", *words, nodes=2, tasks=2)
    wait_for(lambda: steps_of("run") >= 20, "run", first)
    tapct("cancel", "run")
    wait_for_end("run", first, "CANCELLED")
    saved = steps_of("run")
    second = submit(here, "run", *words, nodes=1, tasks=2)
    wait_for_end("run", second)
    assert f"at step {saved} of 60" in log_of("run", second) and 20 <= saved < 60
    tapct("train", here / "tiny.yaml", "out=alone", *words)
    for row, wanted in zip(numbers_of(Path("run")), numbers_of(Path("alone")), strict=True):
        assert row["loss/total"] == pytest.approx(wanted["loss/total"], rel=1e-4), row["step"]


def test_a_signal_before_training_begins_does_not_lose_the_job(here: Path) -> None:
    job = submit(here, "run", "train.steps=6")
    wait_for(lambda: events_of("run") == ["start"], "run", job)
    ask("scancel", "--signal=USR2", job)
    wait_for_end("run", job)
    assert "before training began" in log_of("run", job)
    assert events_of("run") == ["start", "start", "done"] and steps_of("run") == 6


@pytest.mark.slow
def test_a_run_that_reads_ahead_does_not_die_of_the_signal(here: Path) -> None:
    job = submit(here, "run", "train.steps=100000", "log.every=1", "data.loader.workers=2")
    wait_for(lambda: steps_of("run") >= 2, "run", job)
    ask("scancel", "--signal=USR2", job)  # SLURM signals every process of the job
    wait_for(lambda: events_of("run")[:3] == ["start", "stopped", "start"], "run", job)
    saved = steps_of("run")
    wait_for(lambda: steps_of("run") > saved, "run", job)
    tapct("cancel", job)
    wait_for_end("run", job, "CANCELLED")
    printed = log_of("run", job)
    assert "stopped by SIGUSR2 and saved at step" in printed and "Traceback" not in printed


@pytest.mark.slow
def test_a_job_whose_time_is_over_comes_back(here: Path) -> None:
    job = submit(
        here,
        "run",
        "train.steps=100000",
        "log.every=1",
        "train.save_before_end_s=20",
        "--time",
        "1",
    )
    wait_for(lambda: events_of("run")[:3] == ["start", "stopped", "start"], "run", job)
    saved = steps_of("run")
    wait_for(lambda: steps_of("run") > saved, "run", job)
    tapct("cancel", job)
    wait_for_end("run", job, "CANCELLED")
    assert [row["step"] for row in numbers_of(Path("run"))] == list(range(1, steps_of("run") + 1))


@pytest.mark.slow
def test_a_job_gives_up_after_its_restarts(here: Path) -> None:
    job = submit(here, "run", "train.steps=100000", "log.every=1", "--max-restarts", "1")
    for number in (1, 2):
        wait_for(lambda: events_of("run").count("start") == number, "run", job)  # noqa: B023
        saved = steps_of("run")
        wait_for(lambda: steps_of("run") > saved + 3, "run", job)  # noqa: B023
        ask("scancel", "--signal=USR2", job)
    wait_for(lambda: state_of(job) == "FAILED", "run", job)
    assert "restarted 1 times (--max-restarts)" in log_of("run", job)


@pytest.mark.slow
def test_a_job_that_never_comes_to_train_gives_up(here: Path) -> None:
    job = submit(here, "run", "--max-idle-restarts", "1")
    for number in (1, 2):
        wait_for(lambda: events_of("run").count("start") == number, "run", job)  # noqa: B023
        ask("scancel", "--signal=USR2", job)
    wait_for(lambda: state_of(job) == "FAILED", "run", job)
    assert events_of("run") == ["start", "start", "gave up"] and steps_of("run") == 0
    printed = " ".join(tapct("jobs", "run").split())
    assert (
        f"{job} gave up" in printed
        and f"run, job {job}: 2 starts in a row saved nothing new" in printed
    )


@pytest.mark.slow
def test_the_last_evaluation_of_a_job_is_waited_for(here: Path) -> None:
    during = (
        "eval.during.every=12",
        "eval.tasks.segmentation.steps=5",
        "eval.max_scans=2",
        "eval.num_pictures=0",
    )
    job = submit(here, "run", "train.global_batch=4", *during, nodes=2, tasks=1)
    wait_for_end("run", job)
    assert events_of("run") == [
        "start",
        "done",
    ] and "waiting for the evaluation of step 12" in log_of("run", job)
    assert len(list(Path("run/eval").glob("*/step_00000012/results.json"))) == 1


@pytest.mark.slow
def test_a_run_that_fails_is_not_started_again(here: Path, store: Path) -> None:
    blocker = ask(
        "sbatch",
        "--parsable",
        "-p",
        "urgent",
        "-N2",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 99",
    )
    Path("mine").symlink_to(store)
    job = submit(here, "run", "data.store=mine")
    Path("mine").unlink()  # while the job waits
    ask("scancel", blocker)
    wait_for(lambda: state_of(job) == "FAILED", "run", job)
    (line,) = (line for line in log_of("run", job).splitlines() if line.startswith("error: "))
    assert "mine" in line and "Traceback" not in log_of("run", job)
    assert events_of("run") == ["start", "failed"]
    assert "failed" in tapct("jobs", "run")


BREAKS = """
import os, signal
from dataclasses import dataclass
from tapct.types import UserError

@dataclass(frozen=True)
class Config:
    pass

def build(config):
    if os.environ.get("SLURM_PROCID") == "1":
        {how}
    return lambda view, key: view
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["raise UserError('rank 1 gives up')", "os.kill(os.getpid(), signal.SIGSEGV)"]
)
def test_a_rank_that_fails_ends_the_job_for_good(here: Path, how: str) -> None:
    """srun then stops the others with SIGTERM, as a preemption would."""
    (here / "mylab").mkdir()
    (here / "mylab" / "breaks.py").write_text(BREAKS.format(how=how))
    job = submit(here, "run", "views.ops[mylab.breaks]={}", "train.steps=100000", tasks=2)
    wait_for(lambda: state_of(job) == "FAILED", "run", job)
    time.sleep(8)  # longer than a requeued job waits
    assert state_of(job) == "FAILED" and events_of("run").count("start") == 1
    assert "requeued" not in log_of("run", job)


@pytest.mark.slow
def test_a_sweep_is_an_array_whose_runs_go_their_own_ways(here: Path) -> None:
    first = submit(here, "sweep", "--sweep", "optim.lr=1e-3,2e-3")
    assert re.fullmatch(r"\d+_0", first)
    for number, lr in enumerate(("1e-3", "2e-3")):
        run = Path("sweep", f"lr={lr}")
        wait_for_end(run, first.replace("_0", f"_{number}"))
        rows = numbers_of(run)
        assert len(rows) == 12 and max(row["lr"] for row in rows) == pytest.approx(float(lr))
    printed = tapct("jobs", "sweep")
    assert printed.count("12/12") == 2 and first in printed


@pytest.mark.slow
def test_an_element_of_an_array_comes_back_alone(here: Path) -> None:
    first = submit(here, "sweep", "--sweep", "seed=1,2", "train.steps=150", "log.every=1")
    jobs = [first, first.replace("_0", "_1")]
    for number, job in enumerate(jobs):
        wait_for(lambda: steps_of(f"sweep/seed={number + 1}") > 3, f"sweep/seed={number + 1}", job)  # noqa: B023
    ask("scancel", "--signal=USR2", jobs[1])
    for number, job in enumerate(jobs):
        wait_for_end(f"sweep/seed={number + 1}", job)
    assert events_of("sweep/seed=1") == ["start", "done"]
    assert events_of("sweep/seed=2") == ["start", "stopped", "start", "done"]


def test_a_cancelled_run_saves_stays_away_and_can_be_submitted_again(here: Path) -> None:
    job = submit(here, "run", "train.steps=100000", "log.every=1", "checkpoint.every=100000")
    wait_for(lambda: steps_of("run") > 3, "run", job)
    assert f"cancelled job {job}, was running: run" in tapct("cancel", "run")
    wait_for_end("run", job, "CANCELLED")
    time.sleep(8)  # longer than a requeued job waits
    assert state_of(job) == "CANCELLED" and events_of("run") == ["start", "stopped"]
    saved = steps_of("run")
    assert (Path("run") / "checkpoints" / "latest").read_text() == f"step_{saved:08d}\n"

    job = submit(here, "run", "train.steps=100000", "log.every=1")
    wait_for(lambda: steps_of("run") > saved, "run", job)
    tapct("cancel", job)
    assert f"at step {saved} of" in log_of("run", job)
