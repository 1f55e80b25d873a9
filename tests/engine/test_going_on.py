"""What may differ when a run is resumed, what is refused by name, and what damage and bad numbers
leave behind.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped import STEPS, files_of, one_line, stopped_run
from tiny_run import (
    assert_equal_runs,
    config_of,
    differences,
    make_store,
    numbers_of,
    own_plugin,
    state_of,
)

from tapct import config
from tapct.base.exits import UserError
from tapct.engine import checkpoint as checkpoint_module
from tapct.engine import loop
from tapct.engine.checkpoint import Checkpoints, training_state
from tapct.run import finished, pretrain, resume
from tapct.run.config import RunConfig

# --- what a resumed run may change
# ---------------------------------------------------------------------------------


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
        pretrain.train(config_of(copied, store, override))
    line = one_line(raised)
    assert line.startswith(key) and "step_00000005" in line and "out=" in line
    assert files_of(copied / "run") == before


def test_what_does_not_affect_training_may_change(
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
    assert pretrain.train(config_of(copied, store, *harmless)) == loop.Stop(STEPS)
    assert_equal_runs(copied / "renamed", undisturbed(), tmp_path)


def test_another_archive_is_refused(tmp_path: Path, copied: Path) -> None:
    other = make_store(tmp_path / "other", seed=1)
    before = files_of(copied / "run")
    with pytest.raises(UserError) as raised:
        pretrain.train(config_of(copied, other))
    assert "another archive" in one_line(raised) and "data.store" in one_line(raised)
    assert files_of(copied / "run") == before


def test_another_archive_is_taken_by_choice(
    tmp_path: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_store(tmp_path / "other", seed=1)
    assert pretrain.train(config_of(copied, other, "data.on_change=rebase")) == loop.Stop(STEPS)
    assert "another archive" in capsys.readouterr().err
    assert pretrain.train(config_of(copied, other)) == loop.Stop(STEPS), (
        "from now on it is the run's own"
    )


def test_a_change_that_bends_the_curve_is_reported_when_it_is_allowed(
    copied: Path, store: Path, undisturbed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = config_of(copied, store, "optim.lr=2e-2", "losses.dino.weight=2.0")
    assert pretrain.train(changed, allow_change=True) == loop.Stop(STEPS)
    printed = capsys.readouterr().out
    assert "--allow-change: optim.lr was 0.01 and is 0.02 from here on" in printed
    assert "--allow-change: losses.dino.weight was 1.0 and is 2.0" in printed
    rows, wanted = numbers_of(copied / "run"), numbers_of(undisturbed())
    assert rows[:5] == wanted[:5] and rows[5]["lr"] == pytest.approx(2 * wanted[5]["lr"], rel=1e-3)


def test_a_run_of_an_earlier_version_with_loader_backend_resumes_and_is_exported(
    tmp_path: Path,
    copied: Path,
    store: Path,
    undisturbed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_meta = checkpoint_module.read_meta

    def meta_of_earlier_version(path: Path) -> checkpoint_module.Meta:
        meta = read_meta(path)
        meta.config["data"]["loader"]["backend"] = "process"
        return meta

    monkeypatch.setattr(checkpoint_module, "read_meta", meta_of_earlier_version)
    assert pretrain.train(config_of(copied, store)) == loop.Stop(STEPS)
    assert_equal_runs(copied / "run", undisturbed(), tmp_path)
    stored = copied / "run" / "config.yaml"
    text = stored.read_text().replace("  loader:\n", "  loader:\n    backend: process\n")
    assert "backend: process" in text
    stored.write_text(text)
    assert finished.export(copied / "run", tmp_path / "export").is_dir()
    with pytest.raises(UserError) as raised:
        config_of(copied, store, "data.loader.backend=thread")
    assert "data.loader.backend is a key of earlier versions" in one_line(raised)


def test_a_checkpoint_from_before_a_key_existed_holds_its_default(
    copied: Path, store: Path
) -> None:
    now = config_of(copied, store).value
    old = config.to_dict(now)
    del old["stages"], old["model"]["qk_norm"], old["optim"]["betas"]
    assert resume.changed_keys(resume.with_new_keys(old, RunConfig), config.to_dict(now)) == []
    changed = config.to_dict(config_of(copied, store, "model.qk_norm=true").value)
    assert resume.changed_keys(resume.with_new_keys(old, RunConfig), changed) == [
        ("model.qk_norm", False, True)
    ]
    gone = {**old, "gone": 1}
    assert ("gone", 1, None) in resume.changed_keys(
        resume.with_new_keys(gone, RunConfig), config.to_dict(now)
    )


def test_resume_takes_the_path_of_a_checkpoint_or_of_a_run(
    tmp_path: Path, copied: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    for number, source in enumerate(
        (copied / "run", copied / "run" / "checkpoints" / "step_00000005")
    ):
        folder = tmp_path / str(number)
        assert pretrain.train(config_of(folder, store, f"train.resume={source}")) == loop.Stop(
            STEPS
        )
        assert numbers_of(folder / "run") == numbers_of(undisturbed())[5:]
        assert files_of(copied / "run"), "the source stays"
    with pytest.raises(UserError, match="neither one of auto, must, never nor a path that exists"):
        pretrain.train(config_of(tmp_path / "2", store, "train.resume=mist"))
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder with a whole one"):
        pretrain.train(config_of(tmp_path / "2", store, f"train.resume={store}"))
    shard = next((copied / "run" / "checkpoints" / "step_00000005").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="it is damaged"):
        pretrain.train(config_of(tmp_path / "2", store, f"train.resume={shard.parent}"))


def test_checkpoints_of_chosen_steps_are_never_removed(tmp_path: Path, store: Path) -> None:
    words = ("checkpoint.every=2", "checkpoint.keep=1", "checkpoint.keep_every=6")
    assert pretrain.train(config_of(tmp_path, store, *words)) == loop.Stop(STEPS)
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
    assert pretrain.train(config_of(tmp_path, store, *words)) == loop.Stop(STEPS)
    assert "continuing without it: checkpoint of step 4" in capsys.readouterr().out
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
    assert pretrain.train(config_of(tmp_path, store, "checkpoint.keep=1")) == loop.Stop(STEPS)
    found, complaints = Checkpoints(tmp_path / "run" / "checkpoints", keep=9).newest_whole()
    assert found is not None and found.name == "step_00000012" and complaints == []


def test_a_checkpoint_without_the_random_state_of_this_device_is_read(
    monkeypatch: pytest.MonkeyPatch, copied: Path, store: Path
) -> None:
    state_of_training = training_state

    def with_a_gpu(*arguments: Any) -> dict[str, Any]:
        state = state_of_training(*arguments)
        state["rng"]["rank_0"]["cuda"] = torch.get_rng_state()
        return state

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_module, "training_state", with_a_gpu
        )  # a checkpoint of a CPU, read on a GPU
        assert pretrain.train(config_of(copied, store)) == loop.Stop(STEPS)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_checkpoint_holds_its_own_step_while_training_continues(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    store: Path,
    undisturbed: Callable[..., Path],
    asynchronous: str,
) -> None:
    write = Checkpoints._write

    def slowly(self: Checkpoints, *arguments: Any) -> Path:
        time.sleep(0.5)  # many steps
        return write(self, *arguments)

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    words = ("checkpoint.keep=9", f"checkpoint.asynchronous={asynchronous}")
    assert pretrain.train(config_of(tmp_path, store, *words)) == loop.Stop(STEPS)
    for step in (4, 8, 12):
        wanted = undisturbed("checkpoint.keep=9") / "checkpoints" / f"step_{step:08d}"
        found = tmp_path / "run" / "checkpoints" / wanted.name
        assert differences(state_of(found, tmp_path / "a"), state_of(wanted, tmp_path / "b")) == []
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    stood_still = [row["seconds/save"] for row in rows if row["seconds/save"] > 0]
    assert len(stood_still) == 2 and (stood_still[0] > 0.5) == (asynchronous == "false")


def test_resume_must_and_never_mean_what_they_say(
    tmp_path: Path, copied: Path, store: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.resume=never"):
        pretrain.train(config_of(copied, store, "train.resume=never"))
    with pytest.raises(UserError, match=r"train\.resume=must"):
        pretrain.train(config_of(tmp_path / "new", store, "train.resume=must"))
    assert not (tmp_path / "new" / "run").exists()
    assert pretrain.train(
        config_of(tmp_path / "new", store, "train.resume=never", "train.steps=1")
    ) == loop.Stop(1)


def test_a_finished_run_reports_that_there_is_nothing_to_train(
    tmp_path: Path,
    store: Path,
    undisturbed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(undisturbed().parent, tmp_path / "copy")
    config = config_of(tmp_path / "copy", store)
    before = files_of(tmp_path)
    capsys.readouterr()
    assert pretrain.train(config) == loop.Stop(STEPS)
    assert "nothing to train" in capsys.readouterr().out
    assert files_of(tmp_path) == before


# --- damage
# ------------------------------------------------------------------------------------------------


def spoil(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newest_checkpoint_is_named_and_the_run_resumes_from_the_one_before(
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
    assert pretrain.train(config_of(copied, store, f"checkpoint.keep={keep}")) == loop.Stop(STEPS)
    printed = capsys.readouterr().out
    assert "step_00000005 is damaged" in printed and "step_00000004 at step 4" in printed
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


def test_a_run_without_a_whole_checkpoint_does_not_start_again_in_silence(
    copied: Path, store: Path
) -> None:
    for checkpoint in (copied / "run" / "checkpoints").glob("step_*"):
        spoil(checkpoint)
    with pytest.raises(UserError, match="every checkpoint of .* is damaged"):
        pretrain.train(config_of(copied, store))


def test_a_folder_that_is_no_checkpoint_is_left_alone(
    tmp_path: Path, copied: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    mine = copied / "run" / "checkpoints" / "step_00000004.keep"
    shutil.copytree(copied / "run" / "checkpoints" / "step_00000004", mine)
    assert pretrain.train(config_of(copied, store)) == loop.Stop(STEPS)
    assert mine.is_dir()
    assert_equal_runs(copied / "run", undisturbed(), tmp_path)


def test_rows_after_the_checkpoint_and_half_rows_are_written_once(
    tmp_path: Path, copied: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    metrics = copied / "run" / "metrics.jsonl"
    rows = metrics.read_text().splitlines()
    metrics.write_text(
        "\n".join([*rows, '{"step": 6, "loss/total": 1.0}', '{"step": 7, "loss/tot'])
    )
    pretrain.train(config_of(copied, store))
    assert_equal_runs(copied / "run", undisturbed(), tmp_path)


# --- numbers that are not finite
# -----------------------------------------------------------------------------------

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
    """Draw from torch's own generator; a file names the step that becomes non-finite."""

    head_of = ""

    def __init__(self, config):
        super().__init__()
        self.config, self.steps = config, 0

    def forward(self, sets, student_head, teacher_head):
        bottle = Path(self.config.bottle)
        at, value = bottle.read_text().split() if bottle.exists() else ("0", "0")
        worth = float(value) if self.steps + 1 == int(at) else 0.0
        value = sets.student_global.cls_BD.sum() * 0.0 + torch.rand(()) + worth
        return LossResult((Term("poison", value),))

    def finish_step(self, apply):
        self.steps += 1

def build(config):
    return Poison(config)
'''


@pytest.mark.parametrize(
    ("step", "value", "log_every", "safe"),
    [(5, "nan", 3, 4), (7, "inf", 12, 4), (8, "nan", 1, 4), (2, "-inf", 1, 0)],
)
def test_a_loss_that_is_not_finite_stops_the_run_with_a_one_line_error_and_spoils_nothing(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    store: Path,
    step: int,
    value: str,
    log_every: int,
    safe: int,
) -> None:
    own_plugin(monkeypatch, tmp_path, "poison", POISON)
    bottle = tmp_path / "bottle"
    words = (f"losses[mylab.poison].bottle={bottle}", f"log.every={log_every}")

    assert pretrain.train(config_of(tmp_path / "healthy", store, *words)) == loop.Stop(STEPS)
    bottle.write_text(f"{step} {value}")
    with pytest.raises(UserError) as raised:
        pretrain.train(config_of(tmp_path / "ill", store, *words))
    line = one_line(raised)
    assert line.startswith(f"step {step}: loss/poison is {float(value)}")
    assert str(list(range(4 * (step - 1), 4 * step))) in line, "the samples of that step"
    rows = numbers_of(tmp_path / "ill" / "run")
    assert rows[step - 1]["loss/poison"] is None and all(
        math.isfinite(row["loss/total"]) for row in rows[: step - 1]
    )
    found, complaints = Checkpoints(tmp_path / "ill" / "run" / "checkpoints", keep=2).newest_whole()
    assert complaints == [] and (found.name if found else "") == (
        f"step_{safe:08d}" if safe else ""
    )

    bottle.unlink()
    assert pretrain.train(config_of(tmp_path / "ill", store, *words)) == loop.Stop(STEPS)
    healthy = numbers_of(tmp_path / "healthy" / "run")
    assert len({row["loss/poison"] for row in healthy}) == STEPS
    assert numbers_of(tmp_path / "ill" / "run") == healthy
