"""Arrays of `tapct submit index | pack | embed | eval`, as far as they need no SLURM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import SBATCH, FakeSlurm
from fake_slurm import cluster as cluster  # a fixture

from tapct.base.exits import UserError
from tapct.cli.app import DIVIDED
from tapct.cluster import arrays
from tapct.cluster.arrays import (
    ArrayResources,
    Element,
    check_words,
    job_folder,
    preview,
    submit_arrays,
)


def test_the_commands_of_the_command_line_are_those_that_can_be_divided() -> None:
    assert set(DIVIDED) == set(arrays.ROUNDS)


def test_the_batch_script_asks_for_what_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    resources = ArrayResources(60, 12, at_once=5, cpus_per_task=4, mem="16G", partition="cpu")
    text = preview(["index", "scans", "--out", "archive"], resources)
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
        submit_arrays(["index", "scans", "--out", "archive"], ArrayResources(60, 2))
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
