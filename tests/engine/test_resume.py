"""A run that was stopped or killed resumes as if nothing had happened: the same bits, metrics and
weights.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from stopped import STEPS, stopped_run
from tiny_run import assert_equal_runs, config_of, numbers_of, write_config

from tapct.engine import loop, stop
from tapct.run import pretrain

REPOSITORY = Path(__file__).resolve().parents[2]
SINKHORN = ("losses.dino.targets.kind=sinkhorn", "losses.ibot.targets.kind=sinkhorn")
# twice the work between two checkpoints, an odd rhythm of logging
UNEVEN = ("checkpoint.every=5", "log.every=4")


# --- stopped by a signal
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "number", "overrides"),
    [
        (1, signal.SIGINT, ()),
        (5, signal.SIGUSR1, UNEVEN),
        (8, signal.SIGUSR2, ()),
        (11, signal.SIGTERM, ()),
        (3, signal.SIGTERM, ("train.accumulation=2",)),
        (6, signal.SIGINT, ("model.drop_path=0.4",)),
        (7, signal.SIGTERM, (*SINKHORN, "train.accumulation=2")),
        (2, signal.SIGINT, ("train.precision=bf16",)),
        (
            9,
            signal.SIGUSR1,
            ("losses.ibot.share_dino_head=true", "optim.freeze_last_layer_steps=10"),
        ),
    ],
)
def test_a_run_stopped_by_a_signal_and_resumed_equals_one_that_was_not(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    store: Path,
    undisturbed: Callable[..., Path],
    step: int,
    number: int,
    overrides: tuple[str, ...],
) -> None:
    stop = stopped_run(monkeypatch, tmp_path, store, step, *overrides, number=number)
    assert stop == loop.Stop(step, signal.Signals(number).name)
    assert [row["step"] for row in numbers_of(tmp_path / "run")] == list(range(1, step + 1))
    assert pretrain.train(config_of(tmp_path, store, *overrides)) == loop.Stop(STEPS)
    same = tuple(
        word for word in overrides if word not in UNEVEN
    )  # when it saves must not change what it learns
    if same == overrides:
        assert_equal_runs(tmp_path / "run", undisturbed(*overrides), tmp_path)
    else:
        assert_equal_but_for_rankme(tmp_path / "run", undisturbed(*same))


def assert_equal_but_for_rankme(folder: Path, reference: Path) -> None:
    """RankMe is computed where metrics are fetched, so its steps follow `log.every`."""
    rows, wanted = numbers_of(folder), numbers_of(reference)
    for row in (*rows, *wanted):
        row.pop("health/rankme", None)
    assert rows == wanted
    files = [
        path / "checkpoints" / f"step_{STEPS:08d}" / "teacher.safetensors"
        for path in (folder, reference)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [(), ("train.accumulation=2", "model.drop_path=0.4", *SINKHORN)]
)
def test_a_run_stopped_after_every_single_step_equals_one_that_was_not(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    store: Path,
    undisturbed: Callable[..., Path],
    overrides: tuple[str, ...],
) -> None:
    for step in range(1, STEPS):
        stop = stopped_run(monkeypatch, tmp_path, store, step, *overrides, "log.every=1")
        assert stop == loop.Stop(step, "SIGTERM")
    assert pretrain.train(config_of(tmp_path, store, *overrides, "log.every=1")) == loop.Stop(STEPS)
    assert_equal_runs(tmp_path / "run", undisturbed(*overrides, "log.every=1"), tmp_path)


def test_threads_and_no_threads_give_the_same_run_and_a_resumed_one_may_change_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    stop = stopped_run(monkeypatch, tmp_path, store, 3, "data.loader.workers=3")
    assert stop.step == 3
    pretrain.train(config_of(tmp_path, store, "data.loader.workers=0"))
    assert_equal_runs(tmp_path / "run", undisturbed(), tmp_path)


def test_a_signal_in_the_last_step_is_a_finished_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    assert stopped_run(monkeypatch, tmp_path, store, STEPS) == loop.Stop(STEPS)
    assert_equal_runs(tmp_path / "run", undisturbed(), tmp_path)


def test_handlers_are_given_back_and_the_second_interrupt_goes_through() -> None:
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    with stop.StopFlag(torch.device("cpu")) as flag:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.signal == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before


# --- killed
# ------------------------------------------------------------------------------------------------


def killed(tmp_path: Path, store: Path, **request: Any) -> list[dict[str, Any]]:
    """Answers of killed_runs.py."""
    words = {"config": str(write_config(tmp_path, store)), "out": str(tmp_path / "run"), **request}
    program = [Path(__file__).with_name("killed_runs.py"), json.dumps(words)]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = forked.run(program, {**os.environ, "PYTHONPATH": path}, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_nothing_announced_was_lost(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["announced_is_whole"] and answer["damaged"] == [], answer
        assert answer["newest_whole"] >= answer["announced"] >= answer.get("before", 0), answer


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_equals_one_that_was_not(
    tmp_path: Path, store: Path, undisturbed: Callable[..., Path], kills: int
) -> None:
    overrides = ["checkpoint.every=1", "checkpoint.keep=1"]
    *answers, last = killed(tmp_path, store, overrides=overrides, kills=kills, seed=kills)
    assert [answer["code"] for answer in answers[:-1]] == [-signal.SIGKILL] * (len(answers) - 1)
    assert last == {"finished": 0}
    assert_nothing_announced_was_lost(answers)
    assert_equal_runs(tmp_path / "run", undisturbed(), tmp_path)


@pytest.mark.slow
def test_a_run_killed_before_any_change_of_a_file_resumes(tmp_path: Path, store: Path) -> None:
    few = ["train.steps=3", "checkpoint.every=1", "checkpoint.keep=1", "log.every=1"]
    count = tmp_path / "count"
    (first,) = killed(tmp_path, store, overrides=few, events=[0], count_to=str(count))
    assert first["code"] == 0 and first["finished"] == 0
    changes = int(count.read_text())
    assert changes > 30
    answers = killed(
        tmp_path, store, overrides=few, events=list(range(1, changes + 1)), count_to=str(count)
    )
    assert [answer["code"] for answer in answers] == [-signal.SIGKILL] * changes
    assert [answer["finished"] for answer in answers] == [0] * changes
    assert_nothing_announced_was_lost(answers)
    assert any(answer["torn"] for answer in answers), "some deaths must fall into a save"
    for event in range(1, changes + 1):
        assert_equal_runs(
            tmp_path / "run" / f"event_{event}", tmp_path / "run" / "event_0", tmp_path
        )
