"""On a real SLURM: submit, preempt, come back, and end with the numbers of a run that nothing
disturbed.

TAPCT_SLURM=1 pytest -m slurm tests/slurm
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from slurm_jobs import (
    ask,
    events_of,
    log_of,
    state_of,
    steps_of,
    submit,
    tapct,
    wait_for,
    wait_for_end,
)
from tiny_run import assert_equal_runs, numbers_of

pytestmark = pytest.mark.slurm

LAYOUTS = [(2, 2), pytest.param(1, 1, marks=pytest.mark.slow)]  # (nodes, tasks per node)


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


@pytest.mark.slow  # tests/engine/test_many_ranks.py resumes at other rank counts, too
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
import os
from dataclasses import dataclass
from tapct.types import UserError

@dataclass(frozen=True)
class Config:
    pass

def build(config):
    if os.environ.get("SLURM_PROCID") == "1":
        raise UserError('rank 1 gives up')
    return lambda view, key: view
"""


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_for_good(here: Path) -> None:
    """srun then stops the others with SIGTERM, as a preemption would."""
    (here / "mylab").mkdir()
    (here / "mylab" / "breaks.py").write_text(BREAKS)
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
