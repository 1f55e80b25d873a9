"""Submitting without a cluster: the batch script, what is kept, what is refused, and when a job is
requeued.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import SBATCH, FakeSlurm
from fake_slurm import cluster as cluster  # fixtures
from fake_slurm import config as config
from fake_slurm import store as store
from shell import Shell, files_of
from shell import shell as shell

from tapct.base import ending
from tapct.base.exits import UserError
from tapct.base.lease import Lease
from tapct.cluster import jobs, submit, task
from tapct.cluster.resources import Resources
from tapct.config import load_config
from tapct.run.config import RunConfig


def test_each_run_of_a_sweep_gets_its_values_and_its_folder(config: Path) -> None:
    made = submit.plan_runs(
        config, ["train.steps=7"], ["optim.lr=1e-4,2e-4", "views.global_area=[0.1,0.2],[0.3,0.4]"]
    )
    configs = [run.value for run in made.runs]
    assert [(one.optim.lr, one.views.global_area) for one in configs] == [
        (lr, area) for lr in (1e-4, 2e-4) for area in ((0.1, 0.2), (0.3, 0.4))
    ]
    assert made.root == Path("run") and {one.train.steps for one in configs} == {7}
    assert configs[1].out == Path("run/lr=1e-4,global_area=0.3-0.4")


# --- the batch script ---------------------------------------------------------------------------


def options_of(script: str) -> dict[str, str]:
    lines = [
        line.removeprefix("#SBATCH --")
        for line in script.splitlines()
        if line.startswith("#SBATCH --")
    ]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_a_dry_run_prints_the_script_and_writes_nothing(
    config: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_: None)  # a machine without SLURM
    before = files_of(tmp_path)
    words = (
        "--nodes 2 --gpus-per-node 2 --partition p --time 2-00:00 --account a --cpus-per-task "
        "3 --mem 64G --qos q"
    )
    words += " --constraint h100 --grace 90 --dry-run"
    script = shell.good("submit", config, "losses.koleo=null", "device=auto", *words.split())
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
    for part in (
        "--kill-on-bad-exit=1",
        "%j_%t_log.out",
        "--cpus-per-task=3",
        sys.executable,
        f"{tmp_path}/run/code/",
    ):
        assert part in srun
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def other_warnings(err: str) -> list[str]:
    """Lines on standard error, without the warning that no patient of the store is held out."""
    return [line for line in err.splitlines() if "data.held_out is 0" not in line]


def test_a_doubtful_setting_gives_a_warning_beside_the_script(config: Path, shell: Shell) -> None:
    def warned(*words: str) -> list[str]:
        code, _, err = shell("submit", config, "losses.koleo=null", "--dry-run", *words)
        assert code == 0
        return other_warnings(err)

    assert warned("--cpus-per-task", "2") == []
    assert warned("--exclusive") == [] and warned("data.loader.workers=0") == []
    (line,) = warned("data.loader.workers=3")
    assert "without --cpus-per-task" in line and "add --cpus-per-task 4" in line
    (line,) = warned("--cpus-per-task", "2", "device=auto")
    assert line.startswith("warning: the job requests no GPU") and "--gpus-per-node" in line
    gpus = ("--cpus-per-task", "2", "device=auto", "--sbatch", "--gpus=4")
    (line,) = warned(*gpus)
    assert "each node gets one process" in line and "--tasks-per-node" in line
    assert warned(*gpus, "--tasks-per-node", "4") == []
    (line,) = warned("--cpus-per-task", "2", "--gpus-per-node", "2")
    assert line.startswith("warning: device=cpu leaves the GPUs")
    (line,) = warned("--cpus-per-task", "2", "data.loader.workers=2")
    assert "no core for training beside data.loader.workers 2; request 3" in line
    assert warned("--cpus-per-task", "3", "data.loader.workers=2") == []


def test_sbatch_gets_every_option_that_it_knows(config: Path, shell: Shell) -> None:
    words = "--gres gpu:h100:4 --exclude n1 --nodelist n2,n3 --exclusive --mem-per-gpu 32G "
    words += "--dependency afterok:7 --reservation r --mail me@lab.org --job-name j "
    words += "--sbatch --licenses=a --sbatch --nice --comment c"
    found = options_of(
        shell.good(
            "submit", config, "losses.koleo=null", "device=auto", "--dry-run", *words.split()
        )
    )
    assert found["gres"] == "gpu:h100:4" and found["ntasks-per-node"] == "4"
    assert (found["exclude"], found["nodelist"], found["exclusive"]) == ("n1", "n2,n3", "")
    assert (found["mem-per-gpu"], found["dependency"]) == ("32G", "afterok:7")
    assert (found["mail-user"], found["mail-type"]) == ("me@lab.org", "END,FAIL")
    assert (found["reservation"], found["job-name"], found["comment"]) == ("r", "j", "c")
    assert (found["licenses"], found["nice"]) == ("a", "")


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        ("--gres=gpu:h100:4", "4"),
        ("--gres=gpu:2,lustre", "2"),
        ("--gpus-per-node=a100:3", "3"),
        ("--gres=lustre", "1"),
        ("--gpus-per-task=1", "1"),
    ],
)
def test_gpus_of_sbatch_make_one_task_each(
    config: Path, shell: Shell, given: str, tasks: str
) -> None:
    words = ("losses.koleo=null", "device=auto", "train.global_batch=12", "--dry-run")
    code, out, err = shell("submit", config, "--exclusive", "--sbatch", given, *words)
    assert code == 0 and options_of(out)["ntasks-per-node"] == tasks
    name, _, value = given.removeprefix("--").partition("=")
    assert options_of(out)[name] == value
    assert ("requests no GPU" in err) == (given == "--gres=lustre")


def test_lines_of_setup_come_first_and_words_of_srun_before_python(
    config: Path, shell: Shell
) -> None:
    words = ("--setup", "module load cuda", "--setup", "ulimit -n 9999")
    script = shell.good(
        "submit", config, "--dry-run", *words, "--srun-args", "--cpu-bind=cores --mpi=none"
    )
    lines = script.splitlines()
    assert lines[lines.index("# setup") + 1 :][:2] == ["module load cuda", "ulimit -n 9999"]
    (srun,) = (line for line in lines if line.startswith("srun "))
    assert f"--cpu-bind=cores --mpi=none {sys.executable}" in srun and "--export=ALL" in srun


@pytest.mark.parametrize(
    ("program", "parts"),
    [
        ((), ["apptainer exec --bind ", ",{here} {here}/a.sif python3 -u -m submitit"]),
        (
            ("pyxis",),
            ["--container-image={here}/a.sif", "--container-mounts=", "{here}:{here}", " python3"],
        ),
        (("enter {image} -- python",), [" enter {here}/a.sif -- python -u -m submitit"]),
    ],
)
def test_python_runs_in_a_container(
    config: Path, shell: Shell, tmp_path: Path, program: tuple[str, ...], parts: list[str]
) -> None:
    Path("a.sif").touch()
    words = [word for each in program for word in ("--container-with", each)]
    script = shell.good("submit", config, "--dry-run", "--container", "a.sif", *words)
    (srun,) = (line for line in script.splitlines() if line.startswith("srun "))
    for part in parts:
        assert part.format(here=tmp_path) in srun, srun
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_container_gets_all_that_a_run_names(
    config: Path,
    store: Path,
    shell: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores = "data.stores=[{path: one}, {path: /data/two}]"
    planned = submit.plan_runs(config, [stores], [])
    named = ["/data/two", str(Path("one").absolute()), str(store), str(store.parent)]
    assert planned.data == tuple(sorted(named))  # the parent holds the manifest of the store
    (tmp_path / "cache").mkdir()
    cached = submit.plan_runs(config, [stores, f"data.cache.dir={tmp_path}/cache"], [])
    assert (cached.data, cached.local) == (planned.data, (str(tmp_path / "cache"),))

    other = tmp_path / "other"  # outside of the working directory
    weights = other / "run" / "checkpoints" / "step_00000004" / "teacher.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    work = tmp_path / "work"
    (other / "runs").mkdir()
    work.mkdir()
    (work / "out").symlink_to(other / "runs")
    (work / "a.sif").touch()
    monkeypatch.chdir(work)
    words = ("out=out/mine", f"train.init={weights}", "data.cache.dir=/local/cache")
    with_image = ("submit", config, "--dry-run", *words, "--container", "a.sif")
    script = shell.good(*with_image)
    (bound,) = re.findall(r" --bind (\S+) ", script)
    assert bound.split(",") == sorted(
        # the symlink `out` lies in the working directory, and leads to the second one
        ["/local/cache", str(other / "run"), str(other / "runs/mine"), str(store.parent), str(work)]
    )
    (line,) = (line for line in script.splitlines() if "mkdir -p" in line)
    assert line.startswith("command srun ") and line.endswith("mkdir -p /local/cache")
    pyxis = shell.good(*with_image, "--container-with", "pyxis")
    assert "-mounts=/local/cache:/local/cache," in pyxis
    assert f",{other}/run:{other}/run," in pyxis
    assert "mkdir -p" not in shell.good("submit", config, "--dry-run", *words)
    line = shell.bad(*with_image, f"data.store={odd_store(store, tmp_path)}")
    assert "a:b: a container cannot mount a folder with a comma or colon" in line


def odd_store(store: Path, folder: Path) -> Path:
    """A store with a colon in its path."""
    return Path(shutil.copytree(store, folder / "a:b"))


def test_the_script_continues_after_a_rank_failed_whatever_setup_has_set(
    config: Path, shell: Shell
) -> None:
    words = ("--setup", "set -euo pipefail", "--setup", "if true; then :", "--setup", "fi")
    lines = shell.good("submit", config, "--dry-run", *words).splitlines()
    end = lines.index("fi") + 2
    assert any(line.startswith("srun ") for line in lines[end:])
    text = "\n".join([*lines[:end], 'false | true "${NOT_SET}"', "echo reached"])
    found = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert found.stdout == "reached\n" and not found.stderr


def test_a_file_of_the_site_has_the_defaults_of_a_cluster(
    config: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: gpu\naccount: lab\ncpus_per_task: 8\ntime: 12:00:00\nexclusive: true\n"
        "setup: module load cuda\nsbatch: [--licenses=a]\n"
    )
    monkeypatch.setenv("TAPCT_SITE", str(site))
    words = ("--partition", "big", "--setup", "module load nccl", "--dry-run")
    script = shell.good("submit", config, *words)
    found = options_of(script)
    assert (found["partition"], found["account"], found["cpus-per-task"]) == ("big", "lab", "8")
    assert (found["time"], found["exclusive"], found["licenses"]) == ("720", "", "a")
    assert script.index("module load cuda") < script.index("module load nccl")

    for text, parts in (
        ("partitoin: gpu\n", ["partitoin", "partition"]),
        ("nodes: many\n", ["nodes", "'many'", "whole number"]),
        ("sweep: a=1\n", ["sweep", "no option that a site can set"]),
        ("[a, b]\n", ["must map options"]),
        ("a: [\n", ["no YAML file"]),
    ):
        site.write_text(text)
        line = shell.bad("submit", config, "--dry-run")
        assert str(site) in line and all(part in line for part in parts), line
    site.write_text("nodes: 0\n")
    assert "--nodes 0: must be 1 or more" in shell.bad("submit", config, "--dry-run")
    monkeypatch.setenv("TAPCT_SITE", "nowhere.yaml")
    assert "TAPCT_SITE=nowhere.yaml is no file" in shell.bad("submit", config)


@pytest.mark.parametrize(
    ("of_site", "words", "expected"),
    [
        ("sbatch: ['--gres=gpu:h100:4']", ["--gres", "gpu:2"], {"gres": "gpu:2"}),
        ("sbatch: ['--gres=gpu:h100:4']", ["--sbatch", "--gres=gpu:2"], {"gres": "gpu:2"}),
        ("gres: gpu:h100:4", ["--sbatch", "--gres=gpu:2"], {"gres": "gpu:2"}),
        ("gres: gpu:h100:4", ["--gpus-per-node", "2"], {"gpus-per-node": "2"}),
        ("gres: gpu:h100:4", ["--gpus-per-node", "0"], {}),
        ("gpus-per-node: 4", ["--sbatch", "--gpus=2"], {"gpus": "2"}),
        ("gres: nvme:1", ["--gpus-per-node", "2"], {"gres": "nvme:1", "gpus-per-node": "2"}),
        ("mem: 64G", ["--mem-per-cpu", "4G"], {"mem-per-cpu": "4G"}),
        ("sbatch: ['--mem=64G', '--licenses=a']", ["--mem-per-gpu", "4G"], {"licenses": "a"}),
        ("sbatch: [--exclusive]", ["--exclusive"], {"exclusive": ""}),
    ],
)
def test_the_command_line_takes_precedence_over_the_site_in_every_form_of_an_option(
    config: Path,
    shell: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_site: str,
    words: list[str],
    expected: dict[str, str],
) -> None:
    (tmp_path / "site.yaml").write_text(f"{of_site}\n")
    monkeypatch.setenv("TAPCT_SITE", str(tmp_path / "site.yaml"))
    found = options_of(shell.good("submit", config, "--dry-run", *words))
    of_interest = {"gres", "gpus", "gpus-per-node", "mem", "mem-per-cpu", "exclusive", "licenses"}
    assert {name: found[name] for name in of_interest & found.keys()} == expected


def test_a_job_that_is_submitted_from_a_job_inherits_nothing_of_it(
    config: Path, shell: Shell, cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.command("sbatch", 'env > "{here}/variables"\n' + SBATCH)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    shell.good("submit", config)
    lines = (cluster.here / "variables").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines}
    assert {name for name in names if name.startswith("SLURM_")} == {"SLURM_CONF"}
    assert "SBATCH_ACCOUNT" in names and os.environ["SLURM_JOB_ID"] == "5"


def test_the_dry_run_of_a_sweep_is_an_array(config: Path, shell: Shell) -> None:
    script = shell.good(
        "submit", config, "--sweep", "optim.lr=1,2", "--sweep", "seed=1,2,3", "--dry-run"
    )
    assert options_of(script)["array"] == "0-5%6"
    assert (
        "gpus-per-node" not in options_of(script) and options_of(script)["ntasks-per-node"] == "1"
    )


def run_script(
    cluster: FakeSlurm, script: str, srun: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a batch script whose srun does what is given."""
    cluster.command("srun", srun)
    path = cluster.here / "job.sh"
    path.write_text(script)
    known = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[0-1]", **environment}
    return subprocess.run(
        ["bash", path], env=known, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.fixture
def script(config: Path, cluster: FakeSlurm) -> str:
    """A batch script with at most 9 restarts, and 2 without progress; its folder exists."""
    resources = Resources(minutes=10, max_restarts=9, max_idle_restarts=2, max_failures=3)
    made = submit.preview_batch_script(submit.plan_runs(config, [], []), resources)
    place = config.parent / "run" / "jobs" / "TIME"
    place.mkdir(parents=True)
    (config.parent / "run" / "checkpoints").mkdir()
    (place / "places").write_text(f"{place}\n")
    hosts = 'if [ "$1 $2" = "show hostnames" ]; then printf "n0\\nn1\\n"; fi\n'
    state = (
        'if [ "$1 $2" = "show job" ]; then echo "JobId=77 JobState=$(cat {here}/state) '
        'Reason=None"; fi\n'
    )
    cluster.command("scontrol", hosts + state)
    (cluster.here / "state").write_text("RUNNING")
    return made


def requeues(cluster: FakeSlurm) -> list[str]:
    return cluster.calls("scontrol requeue")


def test_the_script_sets_where_the_ranks_meet_and_which_code_they_run(
    script: str, cluster: FakeSlurm
) -> None:
    write_environment = 'env > "{here}/variables"\n'
    run_script(
        cluster,
        script,
        write_environment,
        SLURM_JOB_ID="123456",
        RANK="3",
        WORLD_SIZE="8",
        PYTHONPATH="/other",
    )
    variables = dict(
        line.split("=", 1)
        for line in (cluster.here / "variables").read_text().splitlines()
        if "=" in line
    )
    assert variables["MASTER_ADDR"] == "n0" and variables["MASTER_PORT"] == "23456"
    assert "RANK" not in variables and "WORLD_SIZE" not in variables
    first, *rest = variables["PYTHONPATH"].split(":")
    assert Path(first).parent.name == "code" and rest == ["/other"]


STOPPED, FAILED = f'printf stopped > "${ending.MARK}"; ', f'printf failed > "${ending.MARK}"; '
LOST = f"printf 'lost\\nn1\\nstep 5, collective: lost rank 1' > \"${ending.MARK}\"; "
KILLED = "echo 'srun: error: n1: task 1: Killed' >&2; "
EXITED = "echo 'srun: error: n0: task 0: Exited with exit code 2' >&2; "
LAUNCH = "echo 'srun: error: Task launch for StepId=7.0 failed on node n1: Job credential' >&2; "


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
        (FAILED + "exit 1", False, "a bug"),
        (STOPPED + "exit 139", True, "a rank crashed, and srun ended the others early"),
        ("exit 137", True, "out of memory"),
        ("exit 3", True, "a rank that hangs"),
        (LOST + "exit 3", True, "another rank is gone"),
        (FAILED + KILLED + "exit 137", True, "killed, which was an error for the others"),
        ("exit 1", False, "Python does not start"),
        (LAUNCH + "exit 1", True, "a node does not start its ranks"),
        (FAILED + EXITED + KILLED + "exit 137", False, "srun killed the others after the first"),
    ],
)
def test_a_job_is_requeued_after_a_signal_or_a_fault_of_a_machine_and_only_then(
    script: str, cluster: FakeSlurm, srun: str, again: bool, why: str
) -> None:
    done = run_script(cluster, script, srun + "\n")
    assert requeues(cluster) == ["scontrol requeue 77"] * again, why
    assert done.returncode == (0 if again else int(srun.rpartition(" ")[2]))


def saves(step: int) -> str:
    return f"echo step_{step:08d} > run/checkpoints/latest; "


def last_event() -> dict[str, object]:
    found: dict[str, object] = json.loads(
        Path("run/jobs/TIME/events.jsonl").read_text().splitlines()[-1]
    )
    return found


def test_a_job_is_not_requeued_without_end(script: str, cluster: FakeSlurm) -> None:
    for count, calls in (("8", 1), ("9", 1), ("10", 1)):
        done = run_script(
            cluster, script, saves(int(count)) + STOPPED + "exit 0\n", SLURM_RESTART_COUNT=count
        )
        assert len(requeues(cluster)) == calls
        assert done.returncode == (count != "8") and ("--max-restarts" in done.stdout) == (
            count != "8"
        )
    assert last_event()["event"] == "gave up" and "restarted 9 times (--max-restarts)" in str(
        last_event()["why"]
    )
    assert len(cluster.calls("srun")) == 2, (
        "SLURM's own requeue beyond the bound does not train either"
    )


# what each start saved: a step, or 0 for nothing; and the starts that are allowed when 2 in a row
# may make no progress
@pytest.mark.parametrize(
    ("saved", "starts"),
    [
        ([0, 0, 0, 0], 3),  # the first, and two more
        ([5, 0, 0, 0, 0], 4),  # what was saved counts once
        ([0, 0, 3, 0, 0, 7, 0, 0, 0, 0], 9),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 9),
        ([0, 0, 5, 5, 5, 5, 5], 6),  # the same step again is nothing new
    ],
)
@pytest.mark.parametrize("how", ["signalled", "requeued by SLURM"])
def test_a_job_that_saves_nothing_new_gives_up_and_one_that_does_continues(
    script: str, cluster: FakeSlurm, saved: list[int], starts: int, how: str
) -> None:
    end = STOPPED + "exit 0\n" if how == "signalled" else "kill -KILL $PPID\n"
    done = None
    for step in saved:
        done = run_script(cluster, script, (saves(step) if step else "") + end)
        if done.returncode == 1:
            break
    assert done is not None and len(cluster.calls("srun")) == starts
    if starts == len(saved):
        assert done.returncode != 1
    else:
        assert "tapct: 3 starts in a row saved nothing new (--max-idle-restarts 2)" in done.stdout
        assert (
            done.stdout.splitlines()[-1] == f"tapct: {last_event()['why']}"
            and last_event()["event"] == "gave up"
        )


@pytest.mark.parametrize(
    ("srun", "nodes", "why"),
    [
        (KILLED + "exit 137", "n1", "n1: task 1: Killed"),
        (LOST + "exit 3", "n1", "step 5, collective: lost rank 1"),
        (LOST + KILLED + "exit 137", "n1", "n1: task 1: Killed; step 5, collective: lost rank 1"),
        (LAUNCH + "exit 1", "n1", "Task launch for StepId=7.0 failed on node n1: Job credential"),
        (KILLED.replace("n1", "n[0-1]") + "exit 137", "-", "n[0-1]: task 1: Killed"),
        ("exit 137", "-", "a rank was ended by signal 9"),
    ],
)
def test_the_cause_of_a_lost_start_is_kept(
    script: str, cluster: FakeSlurm, srun: str, nodes: str, why: str
) -> None:
    done = run_script(cluster, script, srun + "\n")
    assert (last_event()["event"], last_event()["nodes"]) == ("lost", nodes)
    assert last_event()["why"] == why and f"tapct: lost: {why}" in done.stdout


def test_a_start_that_slurm_has_cut_off_is_recorded(script: str, cluster: FakeSlurm) -> None:
    run_script(cluster, script, saves(1) + "kill -KILL $PPID\n", SLURMD_NODENAME="n0")
    assert run_script(cluster, script, "exit 0\n", SLURMD_NODENAME="n1").returncode == 0
    assert (last_event()["event"], last_event()["nodes"]) == ("cut off", "n0")
    run_script(cluster, script, saves(2) + "exit 0\n")
    assert last_event()["nodes"] == "n0", "a start that ended by itself is not cut off"


def set_nodes(cluster: FakeSlurm, **facts: str) -> None:
    """Let scontrol answer for some nodes; the job has the nodes n0 and n1."""
    lines = "".join(f"echo 'NodeName={name} {fact} Reason=x'\n" for name, fact in facts.items())
    cluster.command(
        "scontrol",
        f'if [ "$1 $2" = "show node" ]; then\n{lines}:\nfi\n'
        'if [ "$1 $2 $3" = "show hostnames n[0-1]" ]; then printf "n0\\nn1\\n"; fi\n'
        'if [ "$1 $2" = "show job" ]; then echo "JobId=77 JobState=RUNNING '
        'ExcNodeList=(null) Reason=None"; fi\n',
    )


UP = "State=ALLOCATED BootTime=2001-01-01T00:00:00 SlurmdStartTime=2001-01-01T00:00:00"
BOOTED = UP.replace("BootTime=2001", "BootTime=2901")
RESTARTED = UP.replace("SlurmdStartTime=2001", "SlurmdStartTime=2901")
DOWN = "State=DOWN*+DRAIN BootTime=None SlurmdStartTime=None"


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ({"n0": DOWN, "n1": UP}, "n0"),
        ({"n0": BOOTED, "n1": UP}, "n0"),
        ({"n0": UP, "n1": RESTARTED}, "n1"),
        ({"n0": UP, "n1": UP.replace("ALLOCATED", "IDLE+NOT_RESPONDING")}, "n1"),
        ({"n0": DOWN, "n1": DOWN}, "n0,n1"),
        ({"n0": UP, "n1": UP}, ""),
        ({"n0": UP.replace("ALLOCATED", "IDLE+DRAIN+POWERED_DOWN"), "n1": UP}, ""),
        ({}, ""),  # SLURM does not respond
    ],
)
def test_a_node_that_fell_with_the_batch_script_is_found(
    script: str, cluster: FakeSlurm, facts: dict[str, str], found: str
) -> None:
    set_nodes(cluster, **facts)
    run_script(cluster, script, saves(1) + "kill -KILL $PPID\n", SLURMD_NODENAME="n0")
    assert run_script(cluster, script, "exit 0\n", SLURMD_NODENAME="n1").returncode == 0
    event = last_event()
    if found:
        assert (event["event"], event["nodes"]) == ("lost", found)
        assert event["why"] == f"SLURM has ended the start: {found} failed"
    else:
        assert (event["event"], event["nodes"]) == ("cut off", "n0")
    asked = [line for line in cluster.calls("scontrol show node") if "show node -o" in line]
    assert asked == ["scontrol show node -o n0,n1"]


def test_a_first_node_that_fell_twice_is_left_and_excluded(script: str, cluster: FakeSlurm) -> None:
    cluster.command("sinfo", "printf '%s\\n' n0 n1 n2\n")
    set_nodes(cluster, n0=BOOTED, n1=UP)
    known = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_PARTITION": "gpu", "SLURMD_NODENAME": "n0"}
    cut_off = "kill -KILL $PPID\n"
    for step in (1, 2):
        run_script(cluster, script, saves(step) + cut_off, **known)
    assert requeues(cluster) == [] and cluster.calls("scontrol update") == []
    done = run_script(cluster, script, saves(3) + "exit 0\n", **known)
    assert done.returncode == 0 and len(cluster.calls("srun")) == 2, "it has not trained"
    assert requeues(cluster) == ["scontrol requeue 77"]
    assert cluster.calls("scontrol update") == ["scontrol update JobId=77 ExcNodeList=n0"]
    assert "tapct: n0 lost 2 starts, so the job leaves it" in done.stdout
    # if SLURM starts it there again although it is excluded, it trains
    assert run_script(cluster, script, saves(3) + "exit 0\n", **known).returncode == 0
    assert len(cluster.calls("srun")) == 3 and len(requeues(cluster)) == 1


def test_a_node_that_fell_twice_stays_where_no_other_is_left(
    script: str, cluster: FakeSlurm
) -> None:
    cluster.command("sinfo", "printf '%s\\n' n0 n1\n")
    set_nodes(cluster, n0=BOOTED, n1=UP)
    known = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_PARTITION": "gpu", "SLURMD_NODENAME": "n0"}
    for step in (1, 2):
        run_script(cluster, script, saves(step) + "kill -KILL $PPID\n", **known)
    done = run_script(cluster, script, saves(3) + "exit 0\n", **known)
    assert done.returncode == 0 and len(cluster.calls("srun")) == 3 and requeues(cluster) == []
    assert "n0 lost 2 starts, but too few other nodes are left" in done.stderr


def test_a_failed_node_counts_also_where_slurm_itself_requeues_the_job(
    script: str, cluster: FakeSlurm
) -> None:
    (cluster.here / "state").write_text("COMPLETING")
    failure = "echo 'srun: error: Node failure on n1' >&2; "
    for step in (1, 2, 3):
        done = run_script(cluster, script, saves(step) + failure + "exit 1\n")
        assert done.returncode == 0 and requeues(cluster) == []
    lost = Path("run/jobs/TIME/77.lost").read_text().splitlines()
    assert [line.split()[1] for line in lost] == ["n1"] * 3


def test_starts_that_are_lost_without_progress_end(script: str, cluster: FakeSlurm) -> None:
    ends = [saves(1) + LOST, LOST, LOST, saves(2) + LOST, LOST, LOST, LOST, LOST]
    codes = [run_script(cluster, script, end + "exit 3\n").returncode for end in ends]
    assert codes == [0, 0, 0, 0, 0, 0, 0, 1], "three after each checkpoint, and not the fourth"
    assert str(last_event()["why"]) == (
        "4 starts in a row were lost without a new checkpoint (--max-failures 3), the last one by: "
        "step 5, collective: lost rank 1"
    )


@pytest.mark.parametrize(
    ("excluded_before", "nodes", "excluded"),
    [
        ("(null)", "n0 n1 n2 n3", "ExcNodeList=n1"),
        ("n3", "n0 n1 n2 n3", "ExcNodeList=n1,n3"),
        ("(null)", "n0 n1", ""),  # the job needs two
    ],
)
def test_a_node_that_lost_two_starts_is_excluded(
    script: str, cluster: FakeSlurm, excluded_before: str, nodes: str, excluded: str
) -> None:
    cluster.command("sinfo", f"printf '%s\\n' {nodes} {nodes}\n")
    cluster.command(
        "scontrol",
        'if [ "$1 $2" = "show hostnames" ]; then echo "$3" | tr , "\\n"; fi\n'
        'if [ "$1 $2" = "show job" ]; then echo "JobId=77 JobState=RUNNING '
        f'ExcNodeList={excluded_before} Reason=None"; fi\n',
    )
    known = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_PARTITION": "gpu"}
    for step in (1, 2):
        assert cluster.calls("scontrol update") == []
        run_script(cluster, script, saves(step) + KILLED + "exit 137\n", **known)
    wanted = [f"scontrol update JobId=77 {excluded}"] if excluded else []
    assert cluster.calls("scontrol update") == wanted


def test_a_taken_port_is_avoided(script: str, cluster: FakeSlurm) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = 10000 + port % 10000  # the port of this job is 20000 + job % 10000
        with contextlib.ExitStack() as stack:
            if port != 20000 + job % 10000:
                port, other = 20000 + job % 10000, stack.enter_context(socket.socket())
                other.bind(("127.0.0.1", port))
                other.listen()
            run_script(
                cluster, script, 'echo "$MASTER_PORT" > "{here}/port"\n', SLURM_JOB_ID=str(job)
            )
    assert int((cluster.here / "port").read_text()) == port + 1


def test_a_job_that_cannot_be_requeued_reports_it(script: str, cluster: FakeSlurm) -> None:
    cluster.command("scontrol", 'if [ "$1" = requeue ]; then exit 1; fi\n')
    cluster.command("sleep", "")
    assert run_script(cluster, script, STOPPED + "exit 0\n").returncode == 1
    assert last_event()["why"] == "could not requeue; submit again to resume"


def test_a_cancelled_job_is_not_requeued(script: str, cluster: FakeSlurm) -> None:
    for step, state in enumerate(("COMPLETING", "CANCELLED", "PENDING", "PREEMPTED")):
        (cluster.here / "state").write_text(state)
        assert run_script(cluster, script, saves(step) + STOPPED + "exit 0\n").returncode == 0
    assert requeues(cluster) == []


def test_an_element_of_an_array_requeues_itself_and_not_the_array(
    script: str, cluster: FakeSlurm
) -> None:
    # one element has the number of the whole array as its job id
    Path("run/jobs/TIME", "places").write_text(
        "".join(f"{Path.cwd()}/run/{n}/jobs/TIME\n" for n in range(5))
    )
    run_script(
        cluster, script, STOPPED + "exit 0\n", SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID="4"
    )
    assert requeues(cluster) == ["scontrol requeue 77_4"]


def test_an_element_of_an_array_looks_at_its_own_run(script: str, cluster: FakeSlurm) -> None:
    for n in range(2):
        Path(f"run/{n}/jobs/TIME").mkdir(parents=True)
        Path(f"run/{n}/checkpoints").mkdir()
    Path("run/jobs/TIME", "places").write_text(
        "".join(f"{Path.cwd()}/run/{n}/jobs/TIME\n" for n in range(2))
    )
    for step in range(1, 5):
        srun = f"echo step_{step} > run/0/checkpoints/latest; {STOPPED} exit 0\n"
        codes = [
            run_script(
                cluster, script, srun, SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=str(n)
            ).returncode
            for n in range(2)
        ]
        assert codes == [0, int(step >= 3)]
    assert [Path(f"run/{n}/jobs/TIME/events.jsonl").exists() for n in range(2)] == [False, True]


def test_news_of_an_earlier_start_is_forgotten(script: str, cluster: FakeSlurm) -> None:
    run_script(cluster, script, STOPPED + "exit 0\n")
    assert run_script(cluster, script, "exit 0\n").returncode == 0
    assert len(requeues(cluster)) == 1


def test_a_signal_to_the_batch_shell_does_not_end_it(script: str, cluster: FakeSlurm) -> None:
    done = run_script(
        cluster, script, "kill -USR2 $PPID; kill -TERM $PPID; sleep 0.3; " + STOPPED + "exit 0\n"
    )
    assert done.returncode == 0 and len(requeues(cluster)) == 1


# --- submitting ---------------------------------------------------------------------------------


def test_submit_keeps_code_config_and_id_in_the_run_folder(
    config: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    printed = shell.good("submit", config, "--time", "10", "train.steps=5")
    (place,) = Path("run/jobs").iterdir()
    assert "job 77: run" in printed and str(place) in printed
    known = json.loads((place / "submission.json").read_text())
    assert known["job"] == "77" and known["steps"] == 5
    stored = load_config(RunConfig, place / "config.yaml", [])
    assert stored.to_dict() == load_config(RunConfig, config, ["train.steps=5"]).to_dict()
    (code,) = Path("run/code").iterdir()
    package = Path(task.__file__).parent.parent
    copies = {
        str(path.relative_to(code / "tapct")): path.read_bytes()
        for path in code.rglob("*")
        if path.is_file()
    }
    copies.pop("REVISION")
    assert copies == {
        name: data for name, data in files_of(package).items() if "__pycache__" not in name
    }
    assert str(code) in (cluster.here / "submitted.sh").read_text()

    shell.good("submit", config, "--time", "10")
    assert len(list(Path("run/code").iterdir())) == 1, "the same code is not copied again"
    assert len(list(Path("run/jobs").iterdir())) == 2


def test_a_sweep_is_submitted_as_one_array_with_a_folder_per_run(
    config: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    printed = shell.good("submit", config, "--time", "10", "--sweep", "optim.lr=1e-3,2e-3")
    assert len(cluster.calls("sbatch")) == 1
    for number, name in enumerate(("lr=1e-3", "lr=2e-3")):
        assert f"job 77_{number}: run/{name}" in printed
        (path,) = Path("run", name).glob("jobs/*/submission.json")
        (places,) = Path("run").glob("jobs/*/places")
        assert places.read_text().splitlines()[number] == str(path.parent.absolute())
        assert json.loads(path.read_text())["job"] == f"77_{number}"
        assert load_config(RunConfig, path.with_name("config.yaml"), []).value.out == Path(
            "run", name
        )
    assert "tapct compare run/*=*" in printed
    dry = shell.good(
        *("submit", config, "--time", "10", "--sweep", "optim.lr=1e-3,2e-3", "--dry-run"),
        *("out=other", "--array-limit", "1"),
    )
    assert options_of(dry)["array"] == "0-1%1"
    assert dry.splitlines()[-2:] == ["# run 0: other/lr=1e-3", "# run 1: other/lr=2e-3"]
    assert sorted(Path().glob("run/*=*")) == [Path("run/lr=1e-3"), Path("run/lr=2e-3")]
    assert list(jobs.find_submissions([Path("run")])) == [Path("run/lr=1e-3"), Path("run/lr=2e-3")]


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
        ("--sbatch -pgpu", ["long form"]),
        ("--sbatch --array=0-3", ["--sweep"]),
        ("--sbatch --time=5", ["use --time"]),
        ("--mem 2G --mem-per-cpu 1G", ["--mem", "--mem-per-cpu", "exclude"]),
        ("--partition a --sbatch --partition=b", ["--partition", "twice"]),
        ("--sbatch --nice=1 --sbatch --nice=2", ["--nice", "twice"]),
        ("--container docker://a --container-with docker", ["docker", "apptainer"]),
        ("--container a.sif", ["--container a.sif", "no such file", "docker://"]),
        ("--container /a --container-with pyxis", ["--container /a", "no such file"]),
        ("--container $NOWHERE/a.sif", ["NOWHERE", "not set"]),
        ("--sbatch foo", ["--sbatch 'foo'", "long form"]),
        ("--srun-args foo", ["--srun-args 'foo'", "not an option of srun"]),
        ("--srun-args --a='b", ["--srun-args", "no closing quotation"]),
        ("--container-with 'a{image}", ["--container-with", "no closing quotation"]),
        ("--setup if --setup true", ["--setup if / true", "syntax error"]),
        ("--setup echo'", ["--setup echo'", "correct the line"]),
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


def test_an_option_with_several_lines_would_end_the_batch_script_early() -> None:
    with pytest.raises(UserError, match="--comment .* has several lines"):
        Resources(minutes=10, comment="a\nb")


def test_when_sbatch_refuses_nothing_is_left_behind(
    config: Path, shell: Shell, cluster: FakeSlurm, tmp_path: Path
) -> None:
    cluster.command("sbatch", 'echo "sbatch: error: invalid partition specified: p" >&2\nexit 1\n')
    before = files_of(tmp_path)
    for words in ([], ["--sweep", "seed=1,2"]):
        line = shell.bad("submit", config, "--partition", "p", *words)
        assert "invalid partition" in line and "sinfo -s lists partitions" in line
        (tmp_path / "slurm" / "calls").unlink()
        assert files_of(tmp_path) == before and not Path("run").exists()


def test_without_slurm_submit_names_the_alternative(
    config: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    line = shell.bad("submit", config)
    assert "login node" in line and "--dry-run" in line and not Path("run").exists()


def test_a_run_with_a_living_job_is_not_submitted_again(
    config: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    shell.good("submit", config)
    cluster.queue(("77", "PENDING", 0, "Resources"))
    assert "tapct cancel run" in shell.bad("submit", config)
    cluster.queue(("77", "COMPLETED", 0, "None"))
    shell.good("submit", config)


def test_the_living_job_of_another_user_is_seen(
    config: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    shell.good("submit", config)
    cluster.queue(("77", "RUNNING", 0, "None"))
    cluster.command("squeue", 'case "$*" in *--user=*) ;; *) cat "{here}/queue" ;; esac\n')
    assert "run has the job 77, running" in shell.bad("submit", config)
    assert "running" in shell.good("jobs", "run")
    assert "cancelled job 77" in shell.good("cancel", "run")
    # and on a cluster that hides the jobs of other users
    cluster.command("squeue", "")
    lease = Lease(Path("run/lease.json"), "the run folder run", {"SLURM_JOB_ID": "77"})
    lease.acquire()
    line = shell.bad("submit", config)
    assert "run is being written by another process" in line and "job 77" in line
    assert "running" in shell.good("jobs", "run")
    lease.release()
    assert "never ran" in shell.good("jobs", "run")
    shell.good("submit", config)


def test_of_two_submissions_at_once_one_is_refused(
    config: Path, shell: Shell, cluster: FakeSlurm, tmp_path: Path
) -> None:
    other = Lease(Path("run/jobs/.submitting"), "the list of jobs of run", {})
    other.acquire()
    before = files_of(tmp_path)
    assert "the list of jobs of run is being written by another process" in shell.bad(
        "submit", config
    )
    assert files_of(tmp_path) == before and cluster.calls("sbatch") == []
    other.release()
    shell.good("submit", config)
    assert not Path("run/jobs/.submitting").exists()


def test_when_slurm_does_not_respond_one_warning_names_the_run_that_was_not_checked(
    config: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    cluster.command("squeue", "exit 1\n")
    words = ("submit", config, "--cpus-per-task", "2")
    code, _, err = shell(*words)
    assert code == 0 and other_warnings(err) == []  # no earlier submission: nothing to check
    code, _, err = shell(*words)
    (line,) = other_warnings(err)
    assert code == 0 and line.startswith("warning: SLURM does not respond (squeue)")
    assert "on run;" in line and "squeue --me" in line


def test_a_config_that_no_longer_fits_the_run_is_not_submitted(
    config: Path, shell: Shell, cluster: FakeSlurm
) -> None:
    shell.good("train", config, "train.steps=2")
    line = shell.bad("submit", config, "train.steps=2", "optim.lr=0.5", "seed=3")
    assert "seed was 0" in line and "(also changed: optim.lr)" in line and "--allow-change" in line
    code, _, err = shell(
        "submit", config, "train.steps=2", "optim.lr=0.5", "--allow-change", "--dry-run"
    )
    assert code == 0 and "run has finished all 2 steps; the job will find nothing to train" in err
    assert "train.resume=never" in shell.bad(
        "submit", config, "train.steps=2", "train.resume=never"
    )
    assert shell("submit", config, "train.steps=2")[0] == 0
