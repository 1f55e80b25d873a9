"""Mistakes with a launcher are one clear line."""

from __future__ import annotations

import sys

import pytest
from shell import Shell
from shell import shell as shell

from tapct.base.exits import UserError
from tapct.base.launcher import Torchrun, check_launcher

JOB = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
STEP = {**JOB, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
LEFT = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        (JOB, ["this job has 4 tasks", "outside of srun", "srun tapct train"]),
        (
            STEP | LEFT,
            ["RANK=0", "WORLD_SIZE=8", "rank 1 of 4", "unset RANK WORLD_SIZE LOCAL_RANK"],
        ),
    ],
)
def test_a_mistake_is_refused(environment: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_launcher(environment)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        LEFT,  # any launcher that sets them
        STEP,
        JOB | {"SLURM_NTASKS": "1"},
        JOB | LEFT | {"TORCHELASTIC_RUN_ID": "none"},  # torchrun in a batch script
        STEP | LEFT | {"TORCHELASTIC_RUN_ID": "x"},  # a torchrun per task of srun
        STEP | {"RANK": "1", "WORLD_SIZE": "4"},  # a script that exports them for each task
    ],
)
def test_what_a_launcher_sets_is_accepted(environment: dict[str, str]) -> None:
    check_launcher(environment)


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "process number 1 of 2"),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, "process number 3 of 4"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x, WORLD_SIZE=2"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5, WORLD_SIZE=2"),
    ],
)
def test_a_command_without_ranks_refuses_to_be_silent(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], part: str
) -> None:
    monkeypatch.setattr("os._exit", sys.exit)  # by which one of several ranks ends
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for words in (["jobs", "runs"], ["cancel", "7"], ["submit", "smoke"], ["submit", "index", "a"]):
        line = shell.bad(*words)
        assert part in line and "unset" in line, line


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"RANK": "x"}, "RANK=x"),
        ({}, "no MASTER_ADDR"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "b"}, "MASTER_PORT=b is no number"),
    ],
)
def test_left_variables_end_a_training_with_one_line(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], part: str
) -> None:
    monkeypatch.setattr("os._exit", sys.exit)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    line = shell.bad("train", "smoke", "out=nowhere", "device=cpu")
    assert part in line and "unset" in line, line


def test_the_end_of_torchrun_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_torchrun = Torchrun({"TORCHELASTIC_RUN_ID": "none"})
    without = Torchrun({})
    assert not with_torchrun.has_ended() and not without.has_ended()
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert with_torchrun.has_ended() and not without.has_ended()
