"""A run that was stopped, killed or broken goes on as if nothing had happened: the same bits, metrics and weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import assert_equal_runs, config_of, differences, make_store, numbers_of, state_of, write_config

from tapct import run
from tapct.engine import checkpoint as checkpoint_module
from tapct.engine import loop, stop
from tapct.engine.checkpoint import Checkpoints
from tapct.types import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 12
SINKHORN = ("losses.dino.targets.kind=sinkhorn", "losses.ibot.targets.kind=sinkhorn")
# twice the work between two checkpoints, an odd rhythm of logging
UNEVEN = ("checkpoint.every=5", "log.every=4")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Callable[..., Path]:
    """Run folder of an undisturbed run of a config; made once."""
    made: dict[tuple[str, ...], Path] = {}

    def of(*overrides: str) -> Path:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            stop = run.train(config_of(folder, store, *overrides))
            assert stop == loop.Stop(STEPS)
            made[overrides] = folder / "run"
        return made[overrides]

    return of


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a real signal while it works on a step."""
    original = loop.Trainer.optimizer_step

    def with_signal(self: loop.Trainer, index: int, batches: Any) -> None:
        if index + 1 == step:
            os.kill(os.getpid(), number)
        original(self, index, batches)

    monkeypatch.setattr(loop.Trainer, "optimizer_step", with_signal)


def stopped_run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, store: Path, step: int, *overrides: str, number: int = signal.SIGTERM
) -> loop.Stop:
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        return run.train(config_of(folder, store, *overrides))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


# --- stopped by a signal -------------------------------------------------------------------------------------------


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
        (9, signal.SIGUSR1, ("losses.ibot.share_dino_head=true", "optim.freeze_last_layer_steps=10")),
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
    assert run.train(config_of(tmp_path, store, *overrides)) == loop.Stop(STEPS)
    same = tuple(word for word in overrides if word not in UNEVEN)  # when it saves must not change what it learns
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
    files = [path / "checkpoints" / f"step_{STEPS:08d}" / "teacher.safetensors" for path in (folder, reference)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("train.accumulation=2", "model.drop_path=0.4", *SINKHORN)])
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
    assert run.train(config_of(tmp_path, store, *overrides, "log.every=1")) == loop.Stop(STEPS)
    assert_equal_runs(tmp_path / "run", undisturbed(*overrides, "log.every=1"), tmp_path)


def test_worker_processes_give_the_same_run_and_a_resumed_one_may_change_to_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    stop = stopped_run(monkeypatch, tmp_path, store, 3, "data.loader.backend=process")
    assert stop.step == 3
    run.train(config_of(tmp_path, store, "data.loader.workers=0"))
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


# --- killed --------------------------------------------------------------------------------------------------------


def killed(tmp_path: Path, store: Path, **request: Any) -> list[dict[str, Any]]:
    """Answers of killed_runs.py."""
    words = {"config": str(write_config(tmp_path, store)), "out": str(tmp_path / "run"), **request}
    program = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), json.dumps(words)]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(program, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
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
def test_a_run_killed_before_any_change_of_a_file_goes_on(tmp_path: Path, store: Path) -> None:
    few = ["train.steps=3", "checkpoint.every=1", "checkpoint.keep=1", "log.every=1"]
    count = tmp_path / "count"
    (first,) = killed(tmp_path, store, overrides=few, events=[0], count_to=str(count))
    assert first["code"] == 0 and first["finished"] == 0
    changes = int(count.read_text())
    assert changes > 30
    answers = killed(tmp_path, store, overrides=few, events=list(range(1, changes + 1)), count_to=str(count))
    assert [answer["code"] for answer in answers] == [-signal.SIGKILL] * changes
    assert [answer["finished"] for answer in answers] == [0] * changes
    assert_nothing_announced_was_lost(answers)
    assert any(answer["torn"] for answer in answers), "some deaths must fall into a save"
    for event in range(1, changes + 1):
        assert_equal_runs(tmp_path / "run" / f"event_{event}", tmp_path / "run" / "event_0", tmp_path)


# --- what a resumed run may change ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A folder with a run that was stopped at step 5; copied, never changed."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        stopped_run(patch, folder, store, 5)
    return folder


@pytest.fixture
def copied(half_done: Path, tmp_path: Path) -> Path:
    shutil.copytree(half_done, tmp_path / "copy")
    return tmp_path / "copy"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.lr=2e-2", "optim.lr"),
        ("seed=1", "seed"),
        ("train.steps=20", "train.steps"),
        ("train.global_batch=8", "train.global_batch"),
        ("train.accumulation=2", "train.accumulation"),
        ("train.precision=bf16", "train.precision"),
        ("model.dim=32", "model.dim"),
        ("losses.koleo=null", "losses.koleo"),
        ("losses.dino.weight=2.0", "losses.dino.weight"),
        ("views.ops.gamma={}", "views.ops.gamma"),
        ("masks.probability=1.0", "masks.probability"),
        ("contract.mean=0.0", "contract.mean"),
        ("data.held_out=0.4", "data.held_out"),
        ("data.loader.slab_depth=8", "data.loader.slab_depth"),
    ],
)
def test_a_change_that_would_bend_the_curve_is_refused_by_name(
    copied: Path, store: Path, override: str, key: str
) -> None:
    before = files_of(copied / "run")
    with pytest.raises(UserError) as raised:
        run.train(config_of(copied, store, override))
    line = one_line(raised)
    assert line.startswith(key) and "step_00000005" in line and "out=" in line
    assert files_of(copied / "run") == before


def test_what_does_not_shape_the_curve_may_change(
    tmp_path: Path, copied: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    shutil.copytree(store, tmp_path / "moved")
    (copied / "run").rename(copied / "renamed")
    harmless = (
        f"out={copied}/renamed",
        f"data.store={tmp_path}/moved",
        "data.loader.workers=0",
        "data.loader.prefetch=4",
        "device=auto",
        "checkpoint.every=7",
        "checkpoint.keep=5",
        "log.tensorboard=true",
        "eval.batch=2",
        "train.resume=must",
    )
    assert run.train(config_of(copied, store, *harmless)) == loop.Stop(STEPS)
    assert_equal_runs(copied / "renamed", undisturbed(), tmp_path)


def test_another_archive_is_refused(tmp_path: Path, copied: Path) -> None:
    other = make_store(tmp_path / "other", seed=1)
    before = files_of(copied / "run")
    with pytest.raises(UserError) as raised:
        run.train(config_of(copied, other))
    assert "another archive" in one_line(raised) and "data.store" in one_line(raised)
    assert files_of(copied / "run") == before


def test_another_archive_is_taken_by_choice(tmp_path: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_store(tmp_path / "other", seed=1)
    assert run.train(config_of(copied, other, "data.on_change=rebase")) == loop.Stop(STEPS)
    assert "another archive" in capsys.readouterr().out
    assert run.train(config_of(copied, other)) == loop.Stop(STEPS), "from now on it is the run's own"


def test_a_change_that_bends_the_curve_is_told_when_it_is_allowed(
    copied: Path, store: Path, undisturbed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = config_of(copied, store, "optim.lr=2e-2", "losses.dino.weight=2.0")
    assert run.train(changed, allow_change=True) == loop.Stop(STEPS)
    told = capsys.readouterr().out
    assert "--allow-change: optim.lr was 0.01 and is 0.02 from here on" in told
    assert "--allow-change: losses.dino.weight was 1.0 and is 2.0" in told
    rows, wanted = numbers_of(copied / "run"), numbers_of(undisturbed())
    assert rows[:5] == wanted[:5] and rows[5]["lr"] == pytest.approx(2 * wanted[5]["lr"], rel=1e-3)


def test_resume_takes_the_path_of_a_checkpoint_or_of_a_run(
    tmp_path: Path, copied: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    for number, source in enumerate((copied / "run", copied / "run" / "checkpoints" / "step_00000005")):
        folder = tmp_path / str(number)
        assert run.train(config_of(folder, store, f"train.resume={source}")) == loop.Stop(STEPS)
        assert numbers_of(folder / "run") == numbers_of(undisturbed())[5:]
        assert files_of(copied / "run"), "the source stays"
    with pytest.raises(UserError, match="neither one of auto, must, never nor a path that exists"):
        run.train(config_of(tmp_path / "2", store, "train.resume=mist"))
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder with a whole one"):
        run.train(config_of(tmp_path / "2", store, f"train.resume={store}"))
    shard = next((copied / "run" / "checkpoints" / "step_00000005").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="it is damaged"):
        run.train(config_of(tmp_path / "2", store, f"train.resume={shard.parent}"))


def test_checkpoints_of_chosen_steps_stay_for_ever(tmp_path: Path, store: Path) -> None:
    words = ("checkpoint.every=2", "checkpoint.keep=1", "checkpoint.keep_every=6")
    assert run.train(config_of(tmp_path, store, *words)) == loop.Stop(STEPS)
    found = Checkpoints(tmp_path / "run" / "checkpoints", keep=1).finished()
    assert [path.name for path in found] == ["step_00000006", "step_00000012"]


def test_a_save_that_failed_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = Checkpoints._complete

    def full(self: Checkpoints, meta: Any, *arguments: Any) -> None:
        if meta.step == 4:
            raise OSError(28, "No space left on device")
        complete(self, meta, *arguments)

    monkeypatch.setattr(Checkpoints, "_complete", full)
    words = ("checkpoint.keep=9", "checkpoint.on_error=continue")
    assert run.train(config_of(tmp_path, store, *words)) == loop.Stop(STEPS)
    assert "going on without it: checkpoint of step 4" in capsys.readouterr().out
    found = Checkpoints(tmp_path / "run" / "checkpoints", keep=9).finished()
    assert [path.name for path in found] == ["step_00000008", "step_00000012"]


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path
) -> None:
    replace = os.replace

    def stubborn(source: Any, target: Any) -> None:
        if Path(target).name == ".old_step_00000004":
            raise OSError(16, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr("tapct.engine.checkpoint.os.replace", stubborn)
    assert run.train(config_of(tmp_path, store, "checkpoint.keep=1")) == loop.Stop(STEPS)
    found, complaints = Checkpoints(tmp_path / "run" / "checkpoints", keep=9).newest_whole()
    assert found is not None and found.name == "step_00000012" and complaints == []


def test_a_checkpoint_without_the_random_state_of_this_device_is_read(
    monkeypatch: pytest.MonkeyPatch, copied: Path, store: Path
) -> None:
    state_of_training = checkpoint_module.training_state

    def with_a_gpu(*arguments: Any) -> dict[str, Any]:
        state = state_of_training(*arguments)
        state["rng"]["rank_0"]["cuda"] = torch.get_rng_state()
        return state

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "training_state", with_a_gpu)  # a checkpoint of a CPU, read on a GPU
        assert run.train(config_of(copied, store)) == loop.Stop(STEPS)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_checkpoint_holds_its_own_step_though_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path, undisturbed: Callable[..., Path], asynchronous: str
) -> None:
    write = Checkpoints._write

    def slowly(self: Checkpoints, *arguments: Any) -> Path:
        time.sleep(0.5)  # many steps
        return write(self, *arguments)

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    words = ("checkpoint.keep=9", f"checkpoint.asynchronous={asynchronous}")
    assert run.train(config_of(tmp_path, store, *words)) == loop.Stop(STEPS)
    for step in (4, 8, 12):
        wanted = undisturbed("checkpoint.keep=9") / "checkpoints" / f"step_{step:08d}"
        found = tmp_path / "run" / "checkpoints" / wanted.name
        assert differences(state_of(found, tmp_path / "a"), state_of(wanted, tmp_path / "b")) == []
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stood_still = [row["seconds/save"] for row in rows if row["seconds/save"] > 0]
    assert len(stood_still) == 2 and (stood_still[0] > 0.5) == (asynchronous == "false")


def test_resume_must_and_never_mean_what_they_say(tmp_path: Path, copied: Path, store: Path) -> None:
    with pytest.raises(UserError, match=r"train\.resume=never"):
        run.train(config_of(copied, store, "train.resume=never"))
    with pytest.raises(UserError, match=r"train\.resume=must"):
        run.train(config_of(tmp_path / "new", store, "train.resume=must"))
    assert not (tmp_path / "new" / "run").exists()
    assert run.train(config_of(tmp_path / "new", store, "train.resume=never", "train.steps=1")) == loop.Stop(1)


def test_a_finished_run_says_that_there_is_nothing_to_train(
    tmp_path: Path, store: Path, undisturbed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed().parent, tmp_path / "copy")
    config = config_of(tmp_path / "copy", store)
    before = files_of(tmp_path)
    capsys.readouterr()
    assert run.train(config) == loop.Stop(STEPS)
    assert "nothing to train" in capsys.readouterr().out
    assert files_of(tmp_path) == before


# --- damage --------------------------------------------------------------------------------------------------------


def spoil(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path,
    copied: Path,
    store: Path,
    undisturbed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    keep: int,
) -> None:
    checkpoints = Checkpoints(copied / "run" / "checkpoints", keep=2)
    assert [path.name for path in checkpoints.finished()] == ["step_00000004", "step_00000005"]
    spoil(copied / "run" / "checkpoints" / "step_00000005")
    assert run.train(config_of(copied, store, f"checkpoint.keep={keep}")) == loop.Stop(STEPS)
    said = capsys.readouterr().out
    assert "step_00000005 is damaged" in said and "step_00000004 at step 4" in said
    assert_equal_runs(copied / "run", undisturbed(), tmp_path)


def test_a_damaged_later_checkpoint_never_costs_a_whole_earlier_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path
) -> None:
    stopped_run(monkeypatch, tmp_path, store, 9, "checkpoint.every=3", "checkpoint.keep=9")
    folder = tmp_path / "run" / "checkpoints"
    for step in (6, 9):
        spoil(folder / f"step_{step:08d}")
    stopped_run(monkeypatch, tmp_path, store, 4, "checkpoint.keep=1")
    found, complaints = Checkpoints(folder, keep=1).newest_whole()
    assert found == folder / "step_00000004" and complaints == []


def test_a_run_without_a_whole_checkpoint_does_not_start_anew_in_silence(copied: Path, store: Path) -> None:
    for checkpoint in (copied / "run" / "checkpoints").glob("step_*"):
        spoil(checkpoint)
    with pytest.raises(UserError, match="every checkpoint of .* is damaged"):
        run.train(config_of(copied, store))


def test_a_folder_that_is_no_checkpoint_is_left_alone(
    tmp_path: Path, copied: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    mine = copied / "run" / "checkpoints" / "step_00000004.keep"
    shutil.copytree(copied / "run" / "checkpoints" / "step_00000004", mine)
    assert run.train(config_of(copied, store)) == loop.Stop(STEPS)
    assert mine.is_dir()
    assert_equal_runs(copied / "run", undisturbed(), tmp_path)


def test_rows_after_the_checkpoint_and_half_rows_are_written_once(
    tmp_path: Path, copied: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    metrics = copied / "run" / "metrics.jsonl"
    rows = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*rows, '{"step": 6, "loss/total": 1.0}', '{"step": 7, "loss/tot']))
    run.train(config_of(copied, store))
    assert_equal_runs(copied / "run", undisturbed(), tmp_path)


# --- numbers that are not finite -----------------------------------------------------------------------------------

POISON = '''
from dataclasses import dataclass
from pathlib import Path
import torch
from tapct.nn.contracts import Loss
from tapct.types import LossResult, Term

@dataclass(frozen=True)
class Config:
    bottle: str = ""

class Poison(Loss):
    """A draw from torch's own generator; a file says at which step something that is not finite is added."""

    head_of = ""

    def __init__(self, config):
        super().__init__()
        self.config, self.steps = config, 0

    def forward(self, sets, student_head, teacher_head):
        bottle = Path(self.config.bottle)
        at, value = bottle.read_text().split() if bottle.exists() else ("0", "0")
        worth = float(value) if self.steps + 1 == int(at) else 0.0
        return LossResult((Term("poison", sets.student_global.cls_BD.sum() * 0.0 + torch.rand(()) + worth),))

    def finish_step(self, apply):
        self.steps += 1

def build(config):
    return Poison(config)
'''


@pytest.mark.parametrize(
    ("step", "value", "log_every", "safe"), [(5, "nan", 3, 4), (7, "inf", 12, 4), (8, "nan", 1, 4), (2, "-inf", 1, 0)]
)
def test_a_loss_that_is_not_finite_stops_the_run_in_one_line_and_spoils_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path, step: int, value: str, log_every: int, safe: int
) -> None:
    package = tmp_path / "code" / "mylab"
    package.mkdir(parents=True)
    (package / "poison.py").write_text(POISON)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "mylab", raising=False)
    monkeypatch.delitem(sys.modules, "mylab.poison", raising=False)
    bottle = tmp_path / "bottle"
    words = (f"losses[mylab.poison].bottle={bottle}", f"log.every={log_every}")

    assert run.train(config_of(tmp_path / "healthy", store, *words)) == loop.Stop(STEPS)
    bottle.write_text(f"{step} {value}")
    with pytest.raises(UserError) as raised:
        run.train(config_of(tmp_path / "ill", store, *words))
    line = one_line(raised)
    assert line.startswith(f"step {step}: loss/poison is {float(value)}")
    assert str(list(range(4 * (step - 1), 4 * step))) in line, "the samples of that step"
    rows = numbers_of(tmp_path / "ill" / "run")
    assert rows[step - 1]["loss/poison"] is None and all(math.isfinite(row["loss/total"]) for row in rows[: step - 1])
    found, complaints = Checkpoints(tmp_path / "ill" / "run" / "checkpoints", keep=2).newest_whole()
    assert complaints == [] and (found.name if found else "") == (f"step_{safe:08d}" if safe else "")

    bottle.unlink()
    assert run.train(config_of(tmp_path / "ill", store, *words)) == loop.Stop(STEPS)
    healthy = numbers_of(tmp_path / "healthy" / "run")
    assert len({row["loss/poison"] for row in healthy}) == STEPS
    assert numbers_of(tmp_path / "ill" / "run") == healthy
