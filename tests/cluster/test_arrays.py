"""Arrays of `tapct submit index | pack | embed | eval`, as far as they need no SLURM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from fake_slurm import SBATCH, FakeSlurm
from fake_slurm import cluster as cluster  # fixtures
from fake_slurm import config as config
from fake_slurm import store as store
from shell import Shell
from shell import shell as shell
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import DelayedSubmission, JobPaths, UncompletedJobError
from submitit.slurm.slurm import SlurmJobEnvironment

from tapct.base.exits import UserError
from tapct.cli.app import DIVIDED, app
from tapct.cluster import arrays
from tapct.cluster.arrays import (
    Element,
    check_words,
    job_folder,
    preview,
    submit_arrays,
    words_of_elements,
)
from tapct.cluster.resources import Resources
from tapct.cluster.script import AGAIN


def test_the_commands_of_the_command_line_are_those_that_can_be_divided() -> None:
    assert set(DIVIDED) == set(arrays.ROUNDS)


def test_the_batch_script_asks_for_what_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    resources = Resources(60, array_limit=5, cpus_per_task=4, mem="16G", partition="cpu")
    text = preview(["index", "scans", "--out", "archive"], resources, 12)
    for line in (
        *("--array=0-11%5", "--cpus-per-task=4", "--mem=16G", "--partition=cpu", "--time=60"),
        *("--requeue", f"--output={tmp_path}/archive.jobs/logs/TIME/%A_%a_0_log.out"),
    ):
        assert f"#SBATCH {line}\n" in text
    assert " --export=ALL " in text  # for sites where sbatch exports nothing
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train", "x"], "divides index, pack, embed, eval"),
        (["index", "scans"], "needs --out"),
        (["pack", "m.parquet", "--out"], "needs --out"),
        (["pack", "m.parquet", "--out", "s", "--part", "1/2"], "leave it out"),
        (["pack", "m.parquet", "--out=s", "--part=1/2"], "leave it out"),
        (["eval"], "needs the model behind eval"),
        (["eval", "--step", "4", "runs/mine"], "needs the model behind eval"),
        (["pack", "m.parquet", "--out", "50%"], "a folder without %"),
        (["pack", "m.parquet", "--out", "s", "--verify"], "cannot be divided"),
        (["index", "m.parquet", "--out", "s", "--select", "depth > 9"], "cannot be divided"),
        (["embed", "m", "scan.nii", "--out", "a.npz"], "the file of a single scan"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_the_queue(words: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        check_words(words)


def test_logs_lie_beside_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert job_folder(["index", "a", "--out=m.parquet"]) == tmp_path / "m.parquet.jobs"
    assert job_folder(["eval", "runs/mine"]) == tmp_path / "runs" / "mine.jobs"


def test_when_a_later_array_is_refused_the_first_one_is_cancelled(
    tmp_path: Path, cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")  # of a job around this process
    refusing = 'env > "{here}/variables"\nif [ -e "{here}/submitted.sh" ]; then exit 1; fi\n'
    cluster.command("sbatch", refusing + SBATCH)
    with pytest.raises(UserError, match="sbatch refused"):
        submit_arrays(["index", "scans", "--out", "archive"], Resources(60), 2)
    assert cluster.calls("scancel") == ["scancel 77"]
    assert "SLURM_" not in (cluster.here / "variables").read_text()
    assert not Path("archive.jobs").exists()


@pytest.mark.parametrize(
    ("codes", "calls", "ends_with"),
    [([0], 1, None), ([-9, 0], 2, None), ([2], 1, 2), ([-9, -9], 2, 137)],
)
def test_an_element_that_is_killed_is_done_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    codes: list[int],
    calls: int,
    ends_with: int | None,
) -> None:
    seen: list[tuple[list[str], str]] = []

    def call(command: list[str], env: dict[str, str], cwd: str) -> int:
        seen.append((command, cwd))
        assert env["PYTHONPATH"].endswith(str(tmp_path))
        return codes[len(seen) - 1]

    monkeypatch.setattr(subprocess, "call", call)
    element, given = Element(), (["index", "a", "--out", "b"], str(tmp_path), "3/4")
    if ends_with is None:
        element(*given)
    else:
        with pytest.raises(SystemExit) as ended:
            element(*given)
        assert ended.value.code == ends_with
    command = [sys.executable, "-m", "tapct", *given[0], "--part", "3/4"]
    assert seen == [(command, str(tmp_path))] * calls
    again = element.checkpoint(*given)
    assert again.args == given and isinstance(again.function, Element)


@pytest.mark.parametrize("container", ["", "docker://lab/tapct"])
def test_an_element_in_a_container_is_requeued_by_its_batch_script(
    tmp_path: Path, cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["index", "scans", "--out", "archive"]
    script = preview(words, Resources(60, container=container), 2)
    logs = tmp_path / "archive.jobs" / "logs" / "TIME"
    logs.mkdir(parents=True)
    again = logs / "77_1.again"

    def requeued(srun: str) -> tuple[int, list[str]]:
        """Exit code of the batch script, and its calls of scontrol."""
        cluster.command("srun", srun)
        again.touch()  # of an earlier start
        known = {**os.environ, "SLURM_JOB_ID": "77"}  # the last element has the id of the array
        known |= {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1"}
        done = subprocess.run(["bash", "-c", script], env=known, timeout=30, check=False)
        calls = cluster.calls("scontrol")
        (cluster.here / "calls").unlink()
        return done.returncode, calls

    assert requeued("exit 3\n") == (3, [])
    if not container:
        assert "AGAIN" not in script and "trap" not in script
        return
    again.unlink(missing_ok=True)
    ends = 'touch "$TAPCT_AGAIN"\nkill -TERM $PPID\nexit 255\n'
    assert requeued(ends) == (0, ["scontrol requeue 77_1"]) and not again.exists()


def test_in_a_container_submitit_leaves_the_requeue_to_the_batch_script(
    tmp_path: Path, cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlurmJobEnvironment, "_requeue", SlurmJobEnvironment._requeue)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv(AGAIN, str(tmp_path / "again"))
    delayed = DelayedSubmission(Element(), ["index", "a", "--out", "b"], str(tmp_path))
    for timeouts, is_requeued in ((0, True), (-1, False)):
        delayed.set_timeout(60, timeouts)
        handler = SignalHandler(SlurmJobEnvironment(), JobPaths(tmp_path, "77", 0), delayed)

        def call(*_: object, signalled: SignalHandler = handler, **__: object) -> int:
            signalled.checkpoint_and_try_requeue(signal.SIGUSR2)
            return 0

        monkeypatch.setattr(subprocess, "call", call)
        with pytest.raises(SystemExit if is_requeued else UncompletedJobError):
            delayed.result()
        assert (tmp_path / "again").exists() == is_requeued
        (tmp_path / "again").unlink(missing_ok=True)
    assert cluster.calls() == []


def test_the_last_job_alone_writes_the_report() -> None:
    words = ["index", "scans", "--report", "a.html", "--out", "b", "--report=c.html"]
    assert words_of_elements(words) == ["index", "scans", "--out", "b"]
    assert words_of_elements(["pack", "--report", "x"]) == ["pack", "--report", "x"]


def test_only_the_first_array_waits_for_the_dependency_of_the_user(
    tmp_path: Path, cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cluster.command("sbatch", 'grep dependency "$1" >> "{here}/dependencies"\n' + SBATCH)
    words = ["index", "scans", "--out", "archive"]
    for resources in (
        Resources(60, dependency="afterok:5"),
        Resources(60, sbatch=("--dependency=afterok:5", "--nice")),
    ):
        submit_arrays(words, resources, 2)
    lines = (cluster.here / "dependencies").read_text().splitlines()
    later = "#SBATCH --dependency=afterany:77"
    assert lines == ["#SBATCH --dependency=afterok:5", later, later] * 2


# --- the options of `tapct submit` -------------------------------------------------------------

INDEX = ("submit", "index", "scans", "--out", "archive", "--dry-run")
OF_TRAINING = {  # options without a meaning for elements that need no other one
    *("nodes", "tasks_per_node", "max_restarts", "max_idle_restarts", "max_failures"),
    *("sweep", "allow_change", "dry_run"),
}
VALUES: dict[str, str] = {  # one of each option; memory is requested in one unit at a time
    "time": "3:00:00",
    "gpus_per_node": "2",
    "cpus_per_task": "3",
    "mem": "7G",
    "mem_per_cpu": "6G",
    "mem_per_gpu": "5G",
    "partition": "p",
    "account": "a",
    "qos": "q",
    "constraint": "c",
    "gres": "lustre:1",
    "exclude": "n1",
    "nodelist": "n2",
    "exclusive": "true",
    "dependency": "afterok:4",
    "reservation": "r",
    "comment": "hello",
    "mail": "me@lab.org",
    "job_name": "j",
    "array_limit": "2",
    "sbatch": "--licenses=a",
    "setup": "module load cuda",
    "srun_args": "--cpu-bind=cores",
    "container": "image.sif",
    "container_with": "singularity",
    "grace": "77",
}
MEMORY = ("mem", "mem_per_cpu", "mem_per_gpu")
ON_COMMAND_LINE_ALONE = ("job_name", "dependency")


def as_words(values: dict[str, str]) -> list[str]:
    """Options on the command line."""
    words: list[str] = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        words += [option] if value == "true" else [option, value]
    return words


def parts_of(script: str) -> tuple[dict[str, str], list[str], set[str]]:
    """Options of sbatch, lines of setup and words of srun that do not depend on the command."""
    lines = script.splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH --")
    )
    for name in ("output", "array", "ntasks-per-node"):
        options.pop(name, "")
    (srun,) = (line for line in lines if line.startswith("srun "))
    of_training = {"--kill-on-bad-exit=1", "--wait=0"}
    paths = re.compile("--output|--chdir|.*/")
    words = {word for word in srun.split() if not paths.match(word)} - of_training
    return options, lines[lines.index("# setup") + 1 :][:1], words


def test_the_table_of_values_has_every_option() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    training = {param.name for param in commands["submit"].params} - {"config", "overrides"}
    elements = {param.name for param in commands["submit-array"].params} - {"words", "parts"}
    assert training - OF_TRAINING == set(VALUES) == elements - {"dry_run"}
    # an option of `tapct submit` would be taken from the command that it divides
    own = {name for param in commands["submit-array"].params for name in param.opts}
    for command in DIVIDED:
        names = {name for param in commands[command].params for name in param.opts}
        assert names & own == set(), command


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("place", ["command line", "site"])
def test_every_option_means_the_same_for_training_and_for_elements(
    config: Path,
    shell: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: str,
    place: str,
) -> None:
    Path("image.sif").touch()
    Path("scans").mkdir()
    left_out = {name for name in MEMORY if name != memory}
    if place == "site":
        left_out |= set(ON_COMMAND_LINE_ALONE)
    values = {name: value for name, value in VALUES.items() if name not in left_out}
    words = as_words(values)
    if place == "site":
        lines = [f"{name.replace('_', '-')}: '{value}'" for name, value in values.items()]
        Path("site.yaml").write_text("\n".join([*lines, "nodes: 1", "max-restarts: 3"]))
        monkeypatch.setenv("TAPCT_SITE", "site.yaml")
        words = []
    training = ("submit", config, "losses.koleo=null", "device=auto", "--dry-run", *words)
    swept = [*training, "--sweep", "seed=1,2,3"]
    found = {"train": shell.good(*swept), "index": shell.good(*INDEX, *words)}
    train, index = parts_of(found["train"]), parts_of(found["index"])
    if place == "site":
        assert (train[0].pop("job-name"), index[0].pop("job-name")) == ("tapct-run", "tapct-index")
    assert train == index
    for script in found.values():
        assert re.search("#SBATCH --array=0-[27]%2\n", script)
        for name, value in values.items():
            shown = {"time": "=180\n", "exclusive": "--exclusive\n", "grace": "USR2@77"}
            if name == "container_with":
                value = "singularity exec --nv --bind "
            assert shown.get(name, value) in script, name


def test_short_elements_have_a_short_grace(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    (tmp_path / "site.yaml").write_text("grace: 90\n")
    for time, words, grace in (
        *(("2", (), 30), ("1:00:00", (), 120), ("2", ("--grace", "100"), 100)),
        *(("2", ("site",), 30), ("1:00:00", ("site",), 90)),
    ):
        if words == ("site",):
            monkeypatch.setenv("TAPCT_SITE", str(tmp_path / "site.yaml"))
            words = ()
        assert f"--signal=USR2@{grace}\n" in shell.good(*INDEX, "--time", time, *words)


def test_a_section_of_the_site_holds_for_one_command(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: gpu\naccount: lab\nnodes: 4\ncpus-per-task: 4\nsbatch: ['--gres=gpu:h100:4']\n"
        "index: {partition: cpu, sbatch: []}\n"
    )
    monkeypatch.setenv("TAPCT_SITE", str(site))
    script = shell.good(*INDEX)
    for line in ("partition=cpu", "account=lab", "nodes=1", "ntasks-per-node=1"):
        assert f"#SBATCH --{line}\n" in script
    assert "gres" not in script
    assert "--workers 4" in " ".join(shown_words(monkeypatch, shell))
    words = ("submit", "pack", "archive", "--out", "store", "--dry-run")
    code, script, err = shell(*words, "--dependency", "afterok:1")  # which makes the archive
    assert code == 0 and "#SBATCH --gres=gpu:h100:4\n" in script
    assert "tapct pack uses no GPU, but each element requests one" in err

    for text, parts in (
        ("index: [a]\n", ["index must map options"]),
        ("index: {partitoin: cpu}\n", ["index.partitoin", "did you mean partition?"]),
        ("pack: {nodes: x}\n", ["pack.nodes", "whole number"]),
        ("mem: 1G\nmem-per-cpu: 1G\n", ["--mem", "exclude"]),
        ("mail: [b]\n", ["mail", "must be a text"]),
        (
            "cpus_per_task: 1\nmem: 1G\ncpus-per-task: 2\n",
            [": cpus-per-task is given twice, in lines 1 and 3; keep one of them"],
        ),
        ("index:\n  qos: a\n  qos: b\n", [": index.qos is given twice, in lines 2 and 3"]),
        ("index: {mem: 1G}\nindex: {}\n", [": index is given twice, in lines 1 and 2"]),
        ("setup: [a, null]\n", ["setup must be a text or a list of texts"]),
        ("account: [lab]\n", ["account is ['lab'], but must be a text"]),
        ("exclusive: yes\n", ["exclusive is 'yes', but must be true or false"]),
        ("nodes: 1.0\n", ["nodes is '1.0', but must be a whole number"]),
        ("nodes: ²\n", ["nodes is '²', but must be a whole number"]),
    ):
        site.write_text(text)
        line = shell.bad(*INDEX)
        assert all(part in line for part in parts), line


def test_options_may_stand_before_the_command(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    options = ("--time", "3:00:00", "--exclusive", "--parts=5", "--job-name", "pack")
    behind = shell.good(*INDEX, *options)
    assert shell.good("submit", *options, *INDEX[1:]) == behind
    assert "--array=0-4" in behind and "--exclusive" in behind


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("account: null", ""),
        ("account: ~", ""),
        ("account:", ""),
        ("account: 'null'", "null"),
        ("account: nullify", "nullify"),
        ("account: lab", "lab"),
        ("account: 007", "007"),
        ("account: true", "true"),
        ("account: lab\nindex: {account: null}", ""),
        ("account: null\nindex: {account: lab}", "lab"),
        ("account: lab\nindex: null", "lab"),
        ("account: lab\nexclusive: null\nnodes: null\nsetup: null\nsbatch: ~", "lab"),
        ("account: lab\nexclusive: true\nindex: {exclusive: null}", "lab"),
        ("account: lab\nsetup: [module load cuda]\nindex: {setup: null}", "lab"),
        ("null", ""),
        ("", ""),
    ],
)
def test_null_in_the_file_of_the_site_is_not_given(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch, written: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    (tmp_path / "site.yaml").write_text(written)
    monkeypatch.setenv("TAPCT_SITE", str(tmp_path / "site.yaml"))
    script = shell.good(*INDEX)
    assert re.findall(r"^#SBATCH --account=(.*)$", script, re.M) == ([expected] if expected else [])
    assert "--exclusive" not in script and "module load" not in script


def shown_words(monkeypatch: pytest.MonkeyPatch, shell: Shell) -> list[str]:
    """The command that elements get."""
    seen: list[str] = []

    def preview_words(words: list[str], *_: object) -> str:
        seen.extend(words)
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(arrays, "preview", preview_words)
        shell.good(*INDEX)
    return seen


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("index scans --out a --wrokers 3", ["index has no option", "did you mean --workers?"]),
        ("index scans --out a --cpus-per-taks 3", ["did you mean --cpus-per-task?"]),
        ("index scans --out a --nodes 2", ["tapct submit index has no option --nodes", "--parts"]),
        ("pack --out a", ["tapct submit pack needs MANIFEST"]),
        ("index scans --out a --min-depth many", ["--min-depth"]),
        ("index scans --out a --sbatch foo", ["--sbatch 'foo'", "long form"]),
        ("index scans --out a --sbatch --array=0-4", ["--parts"]),
        ("index scans --out a --container no.sif", ["--container no.sif", "no such file"]),
        ("index scans --out a --time 1 --grace 60", ["--grace 60 s", "--time", "left to work"]),
        ("index scans --out a --parts 0", ["--parts", "tapct submit index -h"]),
        ("index nowhere --out a", ["nowhere does not exist on this machine", "--dependency"]),
        ("eval runs/none", ["runs/none does not exist", "must find it here too"]),
    ],
)
def test_a_mistake_is_found_before_the_queue(
    tmp_path: Path,
    cluster: FakeSlurm,
    shell: Shell,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    line = shell.bad("submit", *words.split())
    assert all(part in line for part in parts), line
    assert cluster.calls() == [] and not list(tmp_path.glob("*.jobs"))


def test_a_container_gets_what_the_command_names(
    config: Path,
    store: Path,
    shell: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shell.good("train", config, "train.steps=1")
    (tmp_path / "elsewhere").mkdir()
    Path("link").symlink_to(tmp_path / "elsewhere")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("image.sif").touch()
    words = ("--container", "image.sif", "--dry-run", "--parts", "2")
    script = shell.good("submit", "eval", "../run", "--out", "../link/e", *words)
    bound = mounts_of(script)
    assert {str(work), str(tmp_path / "run"), str(tmp_path / "elsewhere")} <= bound
    # the config of the run names the store, and the manifest lies beside that
    assert str(store.parent) in bound
    assert f" {work}/image.sif python3 -u" in script, "the task starts in another folder"
    script = shell.good("submit", "pack", store.parent, "--out", "store", *words)
    assert str(store.parent) in mounts_of(script)


def mounts_of(script: str) -> set[str]:
    (bound,) = re.findall(" --bind (\\S+) ", script)
    return set(bound.split(","))
