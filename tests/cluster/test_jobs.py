"""The table of jobs and cancelling, from fabricated run folders and a pretended queue."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from evaluated_steps import make_run as make_evaluated_run
from evaluated_steps import write_step
from fake_slurm import FakeSlurm
from fake_slurm import cluster as cluster  # a fixture
from shell import Shell
from shell import shell as shell

from tapct.base import jsonl
from tapct.cluster import jobs
from tapct.cluster.jobs import Submission
from tapct.eval.results import best_record


def make_run(run: Path, job: str, steps: int = 100, done: int = 0, *events: str) -> None:
    """A run folder as a job leaves it."""
    place = run / "jobs" / "20260101-120000"
    place.mkdir(parents=True)
    Submission(job, 1e9 + float(job.replace("_", ".")), steps, 20, str(place)).write(place)
    rows = [{"step": n + 1, "loss/total": 5.0 - n / 100, "seconds/step": 2.0} for n in range(done)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = [
        json.dumps({"event": event, "restarts": number // 2}) for number, event in enumerate(events)
    ]
    (place / "events.jsonl").write_text("\n".join(written))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    make_run(Path("runs/waits"), "10")
    make_run(Path("runs/trains"), "11", 125_000, 40, "start", "stopped", "start")
    make_run(Path("runs/group/lr=1e-4,num_locals=8"), "12_0", 100, 100, "start", "done")
    make_run(Path("runs/group/lr=2e-4,num_locals=8"), "12_1", 100, 50, "start", "failed")
    (tmp_path / "runs" / "by_hand").mkdir()
    return tmp_path / "runs"


def rows_of(printed: str) -> dict[str, list[str]]:
    """Words of each row by job id; a folded row counts as its first line."""
    rows = [line.split() for line in printed.splitlines()[1:]]
    return {word: row for row in rows for word in row[:2] if word[:2] in ("10", "11", "12")}


def test_jobs_prints_state_progress_and_time_left(
    runs: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    cluster.queue(
        ("10", "PENDING", 0, "Priority"),
        ("11", "RUNNING", 3, "None"),
        ("12_1", "FAILED", 0, "NonZeroExitCode"),
    )
    printed = shell.good("jobs")
    assert max(map(len, printed.splitlines())) <= 80
    rows = rows_of(printed)
    assert rows["10"][1:] == ["10", "pending", "0/100", "0"]
    assert rows["11"][1:] == ["11", "running", "40/125000", "4.705", "2", "2d", "21:25", "3"]
    assert "done" in rows["12_0"] and "100/100" in rows["12_0"]
    assert "failed" in rows["12_1"] and "50/100" in rows["12_1"] and "1:40" in rows["12_1"]
    assert set(rows_of(shell.good("jobs", "runs/group"))) == {"12_0", "12_1"}
    assert set(rows_of(shell.good("jobs", "runs/trains", "runs/waits"))) == {"10", "11"}


def test_jobs_works_without_slurm(runs: Path, shell: Shell, cluster: FakeSlurm) -> None:
    for broken in ("exit 1\n", None):
        if broken:
            cluster.command("squeue", broken)
        else:
            (cluster.here / "squeue").unlink()
            os.environ["PATH"] = str(cluster.here)  # undone by the fixture's monkeypatch
        printed = shell.good("jobs")
        rows = rows_of(printed)
        assert [rows[job][2] for job in ("10", "11")] == ["waiting?", "running?"]
        assert rows["11"][-1] == "1", "restarts, from the files"
        assert "done" in rows["12_0"] and "failed" in rows["12_1"]
        assert "SLURM does not respond" in printed


def test_jobs_that_slurm_forgot_are_distinguished(
    runs: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    rows = rows_of(shell.good("jobs"))
    assert rows["10"][2:4] == ["never", "ran"] and rows["11"][2] == "gone"


def test_jobs_prints_why_a_job_gave_up(runs: Path, shell: Shell, cluster: FakeSlurm) -> None:
    (events,) = (runs / "trains").glob("jobs/*/events.jsonl")
    why = (
        "6 starts in a row saved nothing new (--max-idle-restarts 5); see the logs, then submit "
        "again"
    )
    events.write_text(
        events.read_text() + "\n" + json.dumps({"event": "gave up", "time": 1, "why": why})
    )
    for queue in ([("11", "FAILED", 5, "NonZeroExitCode")], []):
        cluster.queue(*queue)
        printed = shell.good("jobs")
        assert rows_of(printed)["11"][2:4] == ["gave", "up"]
        assert (
            f"runs/trains, job 11: {why}" in " ".join(printed.split())
            and printed.count("job 11:") == 1
        )
    cluster.queue(("11", "PENDING", 6, "BeginTime"))  # somebody has requeued it by hand
    printed = shell.good("jobs")
    assert rows_of(printed)["11"][2] == "pending" and why[:20] not in printed


def test_jobs_prints_that_slurm_holds_a_job(runs: Path, shell: Shell, cluster: FakeSlurm) -> None:
    cluster.queue(("11", "REQUEUE_HOLD", 30, "JobHoldMaxRequeue"))
    printed = shell.good("jobs")
    assert rows_of(printed)["11"][2] == "requeue_hold"
    joined = " ".join(printed.split())
    assert "runs/trains, job 11: SLURM holds the job" in joined
    assert "scontrol release 11" in joined and joined.count("job 11:") == 1
    cluster.queue(("11", "PENDING", 30, "Priority"))
    assert "holds" not in shell.good("jobs")


def test_jobs_shows_the_newest_headline_and_the_best_one(
    runs: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    cluster.queue(("11", "RUNNING", 3, "None"))
    before = shell.good("jobs")
    assert "eval" not in before.splitlines()[0].split()
    run = make_evaluated_run(runs / "scored")
    make_run(run, "13", 125_000, 40, "start")
    for step, value in ((10, 0.2), (20, 0.4), (30, 0.3)):
        write_step(run, step, value)
        best_record.update(run)
    printed = shell.good("jobs")
    table = [line for line in printed.splitlines() if ":" not in line or "2d" in line]
    assert max(map(len, table)) <= 80
    assert printed.splitlines()[0].split()[-1] == "eval"
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("runs/scored "))
    assert row[-1] == "0.300" and row[1] == "13"
    assert rows_of(printed)["11"][-1] == "3", "a run without evaluations has none"
    line = "runs/scored: segmentation: mean Dice 0.300 at step 30, best 0.400 at step 20, on the "
    assert f"{line}test patients" in " ".join(printed.split())
    write_step(run, 20, math.nan)
    write_step(run, 10, math.nan)
    write_step(run, 30, math.nan)
    best_record.update(run)
    assert "no best step" in " ".join(shell.good("jobs").split())


def test_jobs_without_any_job_print_a_message(
    shell: Shell, cluster: FakeSlurm, tmp_path: Path
) -> None:
    assert "tapct submit" in shell.good("jobs", tmp_path)
    assert "none" in shell.bad("jobs", tmp_path / "none")


def test_the_end_of_a_huge_metrics_file_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = json.dumps({"step": 1, "filler": "x" * 1000}) + "\n"
    path.write_text(row * 1000 + json.dumps({"step": 9}) + "\n" + '{"step": 10, "loss')
    found = jsonl.read_tail(path, "step")
    assert 20 < len(found) < 280 and found[-1] == {"step": 9}
    assert jsonl.read_tail(tmp_path / "none", "step") == []


def test_the_newest_submission_of_a_run_counts(tmp_path: Path) -> None:
    for number, job in enumerate(("8", "9", "7")):
        place = tmp_path / "jobs" / str(number)
        place.mkdir(parents=True)
        Submission(job, {"8": 1.0, "9": 3.0, "7": 2.0}[job], 10, 1, "").write(place)
    (tmp_path / "jobs" / "half").mkdir()
    (tmp_path / "jobs" / "half" / "submission.json").write_text('{"job": ')
    assert [one.job for one in jobs.find_submissions([tmp_path]).values()] == ["9"]
    row = jobs.read_progress(tmp_path, jobs.find_submissions([tmp_path])[tmp_path], {})
    assert (row.state, row.step) == ("never ran", 0) and math.isnan(row.loss)


def test_cancel_takes_runs_folders_of_runs_and_ids(
    runs: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    cluster.queue(*((job, "RUNNING", 0, "None") for job in ("10", "11", "12_0", "12_1", "99")))
    assert "cancelled job 11, was running: runs/trains" in shell.good("cancel", "runs/trains")
    shell.good("cancel", "runs/group")
    shell.good("cancel", "12", "99")
    assert cluster.calls("scancel") == ["scancel 11", "scancel 12_0 12_1", "scancel 12_0 12_1 99"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("runs/none", ["runs/none"]),
        ("1234", ["1234", "nothing was cancelled"]),
        ("runs/by_hand", ["runs/by_hand", "submitted"]),
        ("runs/group", ["runs/group", "nothing was cancelled"]),
        ("10 runs/none", ["runs/none"]),
    ],
)
def test_cancel_prints_what_it_cannot_do(
    runs: Path, shell: Shell, cluster: FakeSlurm, words: str, named: list[str]
) -> None:
    cluster.queue(("10", "RUNNING", 0, "None"), ("12_0", "COMPLETED", 0, "None"))
    line = shell.bad("cancel", *words.split())
    assert all(part in line for part in named), line
    assert cluster.calls("scancel") == []


def test_a_cancel_that_slurm_refuses_or_cannot_receive_is_reported(
    runs: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    cluster.queue(("10", "RUNNING", 0, "None"))
    cluster.command("scancel", 'echo "scancel: error: Access denied" >&2\nexit 1\n')
    assert "Access denied" in shell.bad("cancel", "10")
    cluster.command("squeue", "exit 1\n")
    assert "SLURM does not respond" in shell.bad("cancel", "10")
