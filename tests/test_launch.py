"""The cluster side without a cluster: times, sweeps, the batch script, the table of jobs, cancelling, requeueing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from test_cli import Shell, files_of
from test_cli import shell as shell  # a fixture
from tiny_run import make_store, numbers_of, write_config

from tapct import jobs, launch, slurm, sweep, worker
from tapct.config import load_config
from tapct.jobs import Submission
from tapct.run import RunConfig
from tapct.types import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("archive"), num=2)


@pytest.fixture
def config(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny.yaml in the working directory, whose run folder is `run` beside it."""
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, store)
    path.write_text(path.read_text().replace(f"out: {tmp_path}/run", "out: run"))
    return path


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


# --- forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90 minutes", 90),
        ("90min", 90),
        ("2 hours", 120),
        ("1 day", 1440),
        ("12:00:00", 720),
        ("100:30:00", 6030),
        ("30:00", 30),
        ("0:30", 1),
        ("2-00", 2880),
        ("2-00:00", 2880),
        ("1-06:30", 1830),
        ("1-06:30:01", 1831),
        (" 7-0 ", 10080),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, minutes: int) -> None:
    assert slurm.minutes(text) == minutes


@pytest.mark.parametrize(
    "text", ["", "soon", "2d12h", "1.5", "-5", "1-25:00", "1-00:60", "12:60:00", "5:99", "1:2:3:4", "2 weeks"]
)
def test_what_is_no_time_limit_is_told_with_the_forms(text: str) -> None:
    with pytest.raises(UserError, match=r"--time .*2-00:00.*12:00:00.*90"):
        slurm.minutes(text)


@pytest.mark.parametrize("text", ["0", "0:00", "0-00:00"])
def test_no_time_at_all_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no time at all"):
        slurm.minutes(text)


def test_memory_has_a_unit_that_slurm_knows() -> None:
    assert [slurm.checked_memory(text) for text in ("64G", "500m", "4000", "1TB")] == ["64G", "500M", "4000", "1TB"]
    for text in ("64 gigs", "-1G", "1.5G", "lots"):
        with pytest.raises(UserError, match="64G"):
            slurm.checked_memory(text)


# --- sweeps --------------------------------------------------------------------------------------------------------


def test_a_sweep_is_the_product_of_its_values() -> None:
    points = sweep.product(["optim.lr=1e-4,2e-4", "views.num_locals=4,8"])
    assert [point.values for point in points] == [
        (("optim.lr", lr), ("views.num_locals", num)) for lr in ("1e-4", "2e-4") for num in ("4", "8")
    ]
    assert points[0].name == "lr=1e-4,num_locals=4" and len({point.name for point in points}) == 4
    assert sweep.product(["optim.lr=1e-4,2e-4 views.num_locals=4,8"]) == points


def test_commas_within_brackets_and_quotes_belong_to_a_value() -> None:
    points = sweep.product(["views.global_area=[0.1, 0.2],[0.3,0.4] a.b={x: 1, y: 2},'p,q'"])
    found = [[value for _, value in point.values] for point in points]
    assert found == [[area, other] for area in ("[0.1, 0.2]", "[0.3,0.4]") for other in ("{x: 1, y: 2}", "'p,q'")]
    assert points[0].name == "global_area=0.1-0.2,b=x-1-y-2"
    assert all("/" not in point.name for point in sweep.product(["a=x/y,../z"]))


def test_equal_short_names_grow_until_they_differ() -> None:
    (point,) = sweep.product(["losses.dino.weight=1", "losses.ibot.weight=2", "optim.lr=3"])
    assert point.name == "dino.weight=1,ibot.weight=2,lr=3"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optim.lr"], "key=value,value"),
        (["=1,2"], "key=value,value"),
        (["optim.lr=1,,2"], "key=value,value"),
        (["optim.lr="], "key=value,value"),
        (["optim.lr=1", "optim.lr=2"], "twice"),
        (["optim.lr=1,1"], "twice"),
        (["out=a,b"], "folder of its own"),
        (["a=[1,2"], "not closed"),
    ],
)
def test_a_wrong_sweep_is_told(words: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        sweep.product(words)


def test_each_run_of_a_sweep_gets_its_values_and_its_folder(config: Path) -> None:
    made = launch.plan(config, ["train.steps=7"], ["optim.lr=1e-4,2e-4", "views.global_area=[0.1,0.2],[0.3,0.4]"])
    configs = [run.value for run in made.runs]
    assert [(one.optim.lr, one.views.global_area) for one in configs] == [
        (lr, area) for lr in (1e-4, 2e-4) for area in ((0.1, 0.2), (0.3, 0.4))
    ]
    assert made.home == Path("run") and {one.train.steps for one in configs} == {7}
    assert configs[1].out == Path("run/lr=1e-4,global_area=0.3-0.4")


# --- the batch script ----------------------------------------------------------------------------------------------


def options_of(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_a_dry_run_prints_the_script_and_writes_nothing(
    config: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_: None)  # a machine without SLURM
    before = files_of(tmp_path)
    words = "--nodes 2 --gpus-per-node 2 --partition p --time 2-00:00 --account a --cpus-per-task 3 --mem 64G --qos q"
    script = shell.good("submit", config, *words.split(), "--constraint", "h100", "--grace", "90", "--dry-run")
    assert files_of(tmp_path) == before
    found = options_of(script)
    assert found.pop("output").startswith(f"{tmp_path}/run/jobs/")
    assert found == {
        "job-name": "tapct-run",
        "nodes": "2",
        "ntasks-per-node": "2",
        "gpus-per-node": "2",
        "cpus-per-task": "3",
        "mem": "64G",
        "partition": "p",
        "account": "a",
        "qos": "q",
        "constraint": "h100",
        "time": "2880",
        "signal": "USR2@90",
        "requeue": "",
        "open-mode": "append",
    }
    (srun,) = (line for line in script.splitlines() if line.startswith("srun "))
    for part in ("--kill-on-bad-exit=1", "%j_%t_log.out", "--cpus-per-task=3", sys.executable, f"{tmp_path}/run/code/"):
        assert part in srun
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_the_dry_run_of_a_sweep_is_an_array(config: Path, shell: Shell) -> None:
    script = shell.good("submit", config, "--sweep", "optim.lr=1,2", "--sweep", "seed=1,2,3", "--dry-run")
    assert options_of(script)["array"] == "0-5%6"
    assert "gpus-per-node" not in options_of(script) and options_of(script)["ntasks-per-node"] == "1"


def run_script(cluster: FakeSlurm, script: str, srun: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a batch script whose srun does what is given."""
    cluster.command("srun", srun)
    path = cluster.here / "job.sh"
    path.write_text(script)
    known = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[0-1]", **environment}
    return subprocess.run(["bash", path], env=known, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def script(config: Path, cluster: FakeSlurm) -> str:
    """A batch script with at most 3 restarts; its folder for marks exists."""
    made = launch.script(Path("run"), launch.Resources(minutes=10, max_restarts=3), 1)
    (config.parent / "run" / "jobs" / "TIME").mkdir(parents=True)
    hosts = 'if [ "$1 $2" = "show hostnames" ]; then printf "n0\\nn1\\n"; fi\n'
    state = 'if [ "$1 $2" = "show job" ]; then echo "JobId=77 JobState=$(cat {here}/state) Reason=None"; fi\n'
    cluster.command("scontrol", hosts + state)
    (cluster.here / "state").write_text("RUNNING")
    return made


def requeues(cluster: FakeSlurm) -> list[str]:
    return cluster.calls("scontrol requeue")


def test_the_script_tells_where_the_ranks_meet_and_which_code_they_run(script: str, cluster: FakeSlurm) -> None:
    tell = 'env > "{here}/told"\n'
    run_script(cluster, script, tell, SLURM_JOB_ID="123456", RANK="3", WORLD_SIZE="8", PYTHONPATH="/other")
    told = dict(line.split("=", 1) for line in (cluster.here / "told").read_text().splitlines() if "=" in line)
    assert told["MASTER_ADDR"] == "n0" and told["MASTER_PORT"] == "23456"
    assert "RANK" not in told and "WORLD_SIZE" not in told
    first, *rest = told["PYTHONPATH"].split(":")
    assert Path(first).parent.name == "code" and rest == ["/other"]


STOPPED, FAILED = f'printf stopped > "${worker.MARK}"; ', f'printf failed > "${worker.MARK}"; '


@pytest.mark.parametrize(
    ("srun", "again", "why"),
    [
        ("exit 0", False, "all steps are done"),
        ("exit 2", False, "an error that a person must mend"),
        (STOPPED + "exit 0", True, "a signal, and saved"),
        ("exit 140", True, "SIGUSR2 while Python was starting"),
        ("exit 143", True, "SIGTERM while Python was starting"),
        (STOPPED + "exit 1", True, "a rank left early, the others failed for want of it"),
        (FAILED + "exit 143", False, "a rank failed, and srun ended the others"),
        (STOPPED + "exit 139", False, "a rank crashed, and srun ended the others early"),
        ("exit 137", False, "out of memory"),
    ],
)
def test_a_job_is_requeued_after_a_signal_and_only_then(
    script: str, cluster: FakeSlurm, srun: str, again: bool, why: str
) -> None:
    done = run_script(cluster, script, srun + "\n")
    assert requeues(cluster) == ["scontrol requeue 77"] * again, why
    assert done.returncode == (0 if again else int(srun.rpartition(" ")[2]))


def test_a_job_is_not_requeued_for_ever(script: str, cluster: FakeSlurm) -> None:
    for count, calls in (("2", 1), ("3", 1), ("4", 1)):
        done = run_script(cluster, script, STOPPED + "exit 0\n", SLURM_RESTART_COUNT=count)
        assert len(requeues(cluster)) == calls
    assert done.returncode == 1 and "--max-restarts" in done.stdout


def test_a_cancelled_job_is_not_requeued(script: str, cluster: FakeSlurm) -> None:
    for state in ("COMPLETING", "CANCELLED", "PENDING", "PREEMPTED"):
        (cluster.here / "state").write_text(state)
        assert run_script(cluster, script, STOPPED + "exit 0\n").returncode == 0
    assert requeues(cluster) == []


def test_an_element_of_an_array_requeues_itself_and_not_the_array(script: str, cluster: FakeSlurm) -> None:
    # one element has the number of the whole array as its job id
    run_script(cluster, script, STOPPED + "exit 0\n", SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID="4")
    assert requeues(cluster) == ["scontrol requeue 77_4"]


def test_news_of_an_earlier_start_is_forgotten(script: str, cluster: FakeSlurm) -> None:
    run_script(cluster, script, STOPPED + "exit 0\n")
    assert run_script(cluster, script, "exit 0\n").returncode == 0
    assert len(requeues(cluster)) == 1


def test_a_signal_to_the_batch_shell_does_not_end_it(script: str, cluster: FakeSlurm) -> None:
    done = run_script(cluster, script, "kill -USR2 $PPID; kill -TERM $PPID; sleep 0.3; " + STOPPED + "exit 0\n")
    assert done.returncode == 0 and len(requeues(cluster)) == 1


# --- submitting ----------------------------------------------------------------------------------------------------


def test_submit_keeps_code_config_and_id_in_the_run_folder(config: Path, shell: Shell, cluster: FakeSlurm) -> None:
    said = shell.good("submit", config, "--time", "10", "train.steps=5")
    (place,) = Path("run/jobs").iterdir()
    assert "job 77: run" in said and str(place) in said
    known = json.loads((place / "submission.json").read_text())
    assert known["job"] == "77" and known["steps"] == 5
    stored = load_config(RunConfig, place / "config.yaml", [])
    assert stored.to_dict() == load_config(RunConfig, config, ["train.steps=5"]).to_dict()
    (code,) = Path("run/code").iterdir()
    package = Path(worker.__file__).parent
    copies = {str(path.relative_to(code / "tapct")): path.read_bytes() for path in code.rglob("*") if path.is_file()}
    copies.pop("REVISION")
    assert copies == {name: data for name, data in files_of(package).items() if "__pycache__" not in name}
    assert str(code) in (cluster.here / "submitted.sh").read_text()

    shell.good("submit", config, "--time", "10")
    assert len(list(Path("run/code").iterdir())) == 1, "the same code is not copied again"
    assert len(list(Path("run/jobs").iterdir())) == 2


def test_a_sweep_is_submitted_as_one_array_with_a_folder_per_run(
    config: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    said = shell.good("submit", config, "--time", "10", "--sweep", "optim.lr=1e-3,2e-3")
    assert len(cluster.calls("sbatch")) == 1
    for number, name in enumerate(("lr=1e-3", "lr=2e-3")):
        assert f"job 77_{number}: run/{name}" in said
        (path,) = Path("run", name).glob("jobs/*/submission.json")
        assert json.loads(path.read_text())["job"] == f"77_{number}"
        assert load_config(RunConfig, path.with_name("config.yaml"), []).value.out == Path("run", name)
    assert "tapct compare run/*=*" in said
    assert sorted(Path().glob("run/*=*")) == [Path("run/lr=1e-3"), Path("run/lr=2e-3")]
    assert list(jobs.find([Path("run")])) == [Path("run/lr=1e-3"), Path("run/lr=2e-3")]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("trian.steps=3", ["trian.steps", "train.steps"]),
        ("--sweep optim.lr=1e-3,fast", ["optim.lr", "fast"]),
        ("--sweep optim.rl=1,2", ["optim.rl", "optim.lr"]),
        ("--time never", ["--time", "2-00:00"]),
        ("--time 1 --grace 60", ["--grace", "--time"]),
        ("--mem lots", ["--mem", "64G"]),
        ("--gpus-per-node 2 --tasks-per-node 4", ["--tasks-per-node", "GPU"]),
        ("--nodes 3", ["train.global_batch", "4", "multiple of 3"]),
        ("train.accumulation=2 --tasks-per-node 4", ["train.global_batch", "multiple of 8"]),
        ("device=cuda", ["device=cuda", "--gpus-per-node"]),
        ("data.store=nowhere", ["nowhere"]),
        ("out=a%jb", ["%"]),
    ],
)
def test_what_cannot_run_is_not_submitted(
    config: Path, shell: Shell, cluster: FakeSlurm, tmp_path: Path, words: str, named: list[str]
) -> None:
    before = files_of(tmp_path)
    line = shell.bad("submit", config, *words.split())
    for part in named:
        assert part in line, line
    assert files_of(tmp_path) == before and cluster.calls() == []


def test_when_sbatch_refuses_nothing_is_left_behind(
    config: Path, shell: Shell, cluster: FakeSlurm, tmp_path: Path
) -> None:
    cluster.command("sbatch", 'echo "sbatch: error: invalid partition specified: p" >&2\nexit 1\n')
    before = files_of(tmp_path)
    for words in ([], ["--sweep", "seed=1,2"]):
        assert "invalid partition" in shell.bad("submit", config, "--partition", "p", *words)
        (tmp_path / "slurm" / "calls").unlink()
        assert files_of(tmp_path) == before and not Path("run").exists()


def test_without_slurm_submit_says_where_to_go(config: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    line = shell.bad("submit", config)
    assert "login node" in line and "--dry-run" in line and not Path("run").exists()


def test_a_run_with_a_living_job_is_not_submitted_again(config: Path, shell: Shell, cluster: FakeSlurm) -> None:
    shell.good("submit", config)
    cluster.queue(("77", "PENDING", 0, "Resources"))
    assert "tapct cancel run" in shell.bad("submit", config)
    cluster.queue(("77", "COMPLETED", 0, "None"))
    shell.good("submit", config)


def test_a_config_that_no_longer_fits_the_run_is_not_submitted(config: Path, shell: Shell, cluster: FakeSlurm) -> None:
    shell.good("train", config, "train.steps=2")
    assert "optim.lr was 0.01" in shell.bad("submit", config, "train.steps=2", "optim.lr=0.5")
    assert "train.resume=never" in shell.bad("submit", config, "train.steps=2", "train.resume=never")
    shell.good("submit", config, "train.steps=2")


# --- the worker ----------------------------------------------------------------------------------------------------


@pytest.fixture
def job(config: Path, cluster: FakeSlurm, shell: Shell) -> list[str]:
    """A command that does what a task of a submitted job does."""
    shell.good("submit", config, "--time", "10", "train.steps=400", "log.every=1")
    (place,) = Path("run/jobs").iterdir()
    (code,) = Path("run/code").iterdir()
    words = (str(place.absolute() / "config.yaml"), str(Path.cwd()), str(code.absolute()))
    return [sys.executable, "-c", f"from tapct.worker import work; work{words!r}"]


def start(job: list[str], restarts: int = 0) -> subprocess.Popen[str]:
    (code,) = Path("run/code").iterdir()
    known = {
        **os.environ,
        worker.MARK: str(Path("run/mark").absolute()),
        "PYTHONPATH": str(code.absolute()),
        "SLURM_RESTART_COUNT": str(restarts),
        "OMP_NUM_THREADS": "1",
    }
    # -c looks into the working directory first, which holds no tapct
    return subprocess.Popen(job, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_before_training_begins_is_not_lost(job: list[str], number: signal.Signals) -> None:
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
    assert process.returncode == 2 and said.count("\n") == 1 and said.startswith("error: ") and "gone" in said
    assert Path("run/mark").read_text() == "failed"
    assert events()[-1]["event"] == "failed"


def test_a_task_refuses_another_tapct_than_its_snapshot(job: list[str]) -> None:
    (code,) = Path("run/code").iterdir()
    job[2] = job[2].replace(str(code.absolute()), "/elsewhere")
    process = start(job)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "must run the tapct in /elsewhere" in said
    assert Path("run/mark").read_text() == "failed"


def test_the_first_mark_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.MARK, str(tmp_path / "mark"))
    worker.leave_mark("failed")
    worker.leave_mark("stopped")
    assert (tmp_path / "mark").read_text() == "failed"


def test_a_worker_takes_the_signals_over_before_torch_is_there() -> None:
    check = "import sys, tapct.worker; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    package = Path(worker.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", check],
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# --- jobs and cancel -----------------------------------------------------------------------------------------------


def make_run(run: Path, job: str, steps: int = 100, done: int = 0, *events: str) -> None:
    """A run folder as a job leaves it."""
    place = run / "jobs" / "20260101-120000"
    place.mkdir(parents=True)
    Submission(job, 1e9 + float(job.replace("_", ".")), steps, 20, str(place)).write(place)
    rows = [{"step": n + 1, "loss/total": 5.0 - n / 100, "seconds/step": 2.0} for n in range(done)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [json.dumps({"event": event, "restarts": number // 2}) for number, event in enumerate(events)]
    (place / "events.jsonl").write_text("\n".join(told))


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


def told_of(said: str) -> dict[str, list[str]]:
    """Words of each row by job id; a folded row counts as its first line."""
    rows = [line.split() for line in said.splitlines()[1:]]
    return {word: row for row in rows for word in row[:2] if word[:2] in ("10", "11", "12")}


def test_jobs_tells_state_progress_and_time_left(runs: Path, shell: Shell, cluster: FakeSlurm) -> None:
    cluster.queue(
        ("10", "PENDING", 0, "Priority"), ("11", "RUNNING", 3, "None"), ("12_1", "FAILED", 0, "NonZeroExitCode")
    )
    said = shell.good("jobs")
    assert max(map(len, said.splitlines())) <= 80
    rows = told_of(said)
    assert rows["10"][1:] == ["10", "pending", "0/100", "0"]
    assert rows["11"][1:] == ["11", "running", "40/125000", "4.610", "2", "2d", "21:25", "3"]
    assert "done" in rows["12_0"] and "100/100" in rows["12_0"]
    assert "failed" in rows["12_1"] and "50/100" in rows["12_1"] and "1:40" in rows["12_1"]
    assert set(told_of(shell.good("jobs", "runs/group"))) == {"12_0", "12_1"}
    assert set(told_of(shell.good("jobs", "runs/trains", "runs/waits"))) == {"10", "11"}


def test_jobs_works_without_slurm(runs: Path, shell: Shell, cluster: FakeSlurm) -> None:
    for broken in ("exit 1\n", None):
        if broken:
            cluster.command("squeue", broken)
        else:
            (cluster.here / "squeue").unlink()
            os.environ["PATH"] = str(cluster.here)  # undone by the fixture's monkeypatch
        said = shell.good("jobs")
        rows = told_of(said)
        assert [rows[job][2] for job in ("10", "11")] == ["waiting?", "running?"]
        assert rows["11"][-1] == "1", "restarts, from the files"
        assert "done" in rows["12_0"] and "failed" in rows["12_1"]
        assert "SLURM does not answer" in said


def test_jobs_that_slurm_forgot_are_told_apart(runs: Path, shell: Shell, cluster: FakeSlurm) -> None:
    rows = told_of(shell.good("jobs"))
    assert rows["10"][2:4] == ["never", "ran"] and rows["11"][2] == "gone"


def test_jobs_of_nothing_is_told(shell: Shell, cluster: FakeSlurm, tmp_path: Path) -> None:
    assert "tapct submit" in shell.good("jobs", tmp_path)
    assert "none" in shell.bad("jobs", tmp_path / "none")


def test_the_end_of_a_huge_metrics_file_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = json.dumps({"step": 1, "filler": "x" * 1000}) + "\n"
    path.write_text(row * 200 + json.dumps({"step": 9}) + "\n" + '{"step": 10, "loss')
    found = jobs.last_rows(path)
    assert 20 < len(found) < 70 and found[-1] == {"step": 9}
    assert jobs.last_rows(tmp_path / "none") == []


def test_the_newest_submission_of_a_run_counts(tmp_path: Path) -> None:
    for number, job in enumerate(("8", "9", "7")):
        place = tmp_path / "jobs" / str(number)
        place.mkdir(parents=True)
        Submission(job, {"8": 1.0, "9": 3.0, "7": 2.0}[job], 10, 1, "").write(place)
    (tmp_path / "jobs" / "half").mkdir()
    (tmp_path / "jobs" / "half" / "submission.json").write_text('{"job": ')
    assert [one.job for one in jobs.find([tmp_path]).values()] == ["9"]
    row = jobs.progress(tmp_path, jobs.find([tmp_path])[tmp_path], {})
    assert (row.state, row.step) == ("never ran", 0) and math.isnan(row.loss)


def test_cancel_takes_runs_folders_of_runs_and_ids(runs: Path, shell: Shell, cluster: FakeSlurm) -> None:
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
def test_cancel_tells_what_it_cannot_do(
    runs: Path, shell: Shell, cluster: FakeSlurm, words: str, named: list[str]
) -> None:
    cluster.queue(("10", "RUNNING", 0, "None"), ("12_0", "COMPLETED", 0, "None"))
    line = shell.bad("cancel", *words.split())
    assert all(part in line for part in named), line
    assert cluster.calls("scancel") == []


def test_cancel_without_slurm_or_against_its_will_is_told(runs: Path, shell: Shell, cluster: FakeSlurm) -> None:
    cluster.queue(("10", "RUNNING", 0, "None"))
    cluster.command("scancel", 'echo "scancel: error: Access denied" >&2\nexit 1\n')
    assert "Access denied" in shell.bad("cancel", "10")
    cluster.command("squeue", "exit 1\n")
    assert "SLURM does not answer" in shell.bad("cancel", "10")
