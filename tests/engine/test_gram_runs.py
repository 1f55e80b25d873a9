"""Runs with Gram anchoring: what the snapshot holds at each step, stops across a refresh,
resuming with and without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopped import STEPS, one_line, stopped_run
from tiny_run import assert_equal_runs, config_of, numbers_of, state_of

from tapct.base.exits import UserError
from tapct.engine import loop
from tapct.run import pretrain

GRAM = ("losses.gram.start=2", "losses.gram.refresh_every=4")  # taken before steps 3, 7 and 11


def part_of(checkpoint: Path, scratch: Path, prefix: str) -> dict[str, Any]:
    """What a checkpoint holds under this name, by the rest of the names."""
    state = state_of(checkpoint, scratch / "state.pt")
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def test_a_checkpoint_holds_the_teacher_of_the_last_refresh(tmp_path: Path, store: Path) -> None:
    pretrain.train(
        config_of(
            tmp_path,
            store,
            *GRAM,
            "checkpoint.every=1",
            "checkpoint.keep=99",
            "optim.momentum=[0.5,0.9]",
        )
    )
    folders = {
        step: tmp_path / "run" / "checkpoints" / f"step_{step:08d}" for step in range(1, STEPS + 1)
    }
    teachers = {step: load_file(folder / "teacher.safetensors") for step, folder in folders.items()}
    assert not torch.equal(teachers[2]["norm.weight"], teachers[6]["norm.weight"])
    for step, taken in ((2, -1), (3, 2), (6, 2), (7, 6), (10, 6), (11, 10), (12, 10)):
        (message,) = part_of(folders[step], tmp_path, ".pair.snapshot_taken").values()
        assert int(message) == taken
        held = part_of(folders[step], tmp_path, ".pair.snapshot.backbone.")
        assert held.keys() == teachers[step].keys()
        if taken >= 0:
            assert [
                name for name in held if not torch.equal(held[name], teachers[taken][name])
            ] == []


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (1, ()),
        (2, ()),
        (6, ()),
        (8, ()),
        (6, ("train.precision=bf16", "losses.gram.tokens=masked")),
    ],
)
def test_a_run_stopped_before_at_and_after_a_refresh_equals_one_that_was_not(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    store: Path,
    undisturbed: Callable[..., Path],
    step: int,
    more: tuple[str, ...],
) -> None:
    words = (*GRAM, *more)
    assert stopped_run(monkeypatch, tmp_path, store, step, *words).step == step
    assert pretrain.train(config_of(tmp_path, store, *words)) == loop.Stop(STEPS)
    assert_equal_runs(tmp_path / "run", undisturbed(*words), tmp_path)


def test_until_its_start_a_run_is_the_one_without_it_and_the_snapshot_is_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    calls: list[str] = []
    build_pair = pretrain.Pretraining.build_pair

    def counting(self: pretrain.Pretraining) -> Any:
        pair = build_pair(self)
        assert pair.snapshot is not None
        pair.snapshot.backbone.register_forward_hook(lambda *_: calls.append("snapshot"))
        return pair

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "build_pair", counting)
        pretrain.train(config_of(tmp_path, store, "losses.gram.start=5", "train.accumulation=2"))
    assert len(calls) == 2 * (STEPS - 5)
    rows, plain = numbers_of(tmp_path / "run"), numbers_of(undisturbed("train.accumulation=2"))
    assert [row.pop("loss/gram") > 0 for row in rows] == [False] * 5 + [True] * (STEPS - 5)
    assert rows[:5] == plain[:5] and rows[6]["loss/dino_global"] != plain[6]["loss/dino_global"]
    assert rows[5]["loss/total"] > plain[5]["loss/total"]


def test_a_start_beyond_the_last_step_is_reported_and_changes_nothing(
    tmp_path: Path,
    store: Path,
    undisturbed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretrain.train(config_of(tmp_path, store, "losses.gram={}"))
    error = capsys.readouterr().err
    assert "100000 is not less than train.steps 12: the first snapshot" in error
    folders = [
        path / "checkpoints" / f"step_{STEPS:08d}" for path in (tmp_path / "run", undisturbed())
    ]
    files = [folder / "teacher.safetensors" for folder in folders]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        "losses.gram.weight=1.0",
        "losses.gram.start=3",
        "losses.gram.refresh_every=0",
        "losses.gram.tokens=unmasked",
    ],
)
def test_every_field_changes_the_weights(
    tmp_path: Path, store: Path, undisturbed: Callable[..., Path], change: str
) -> None:
    pretrain.train(config_of(tmp_path, store, *GRAM, change))
    folders = [
        path / "checkpoints" / f"step_{STEPS:08d}"
        for path in (tmp_path / "run", undisturbed(*GRAM))
    ]
    changed, plain = (load_file(folder / "teacher.safetensors") for folder in folders)
    assert not torch.equal(changed["blocks.1.attn.qkv.weight"], plain["blocks.1.attn.qkv.weight"])


def test_a_run_without_a_snapshot_resumes_with_one_taken_at_once(
    copied: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("losses.gram.start=2", "losses.gram.refresh_every=0")
    with pytest.raises(UserError) as raised:
        pretrain.train(config_of(copied, store, *words))
    assert one_line(raised).startswith("losses.gram.")
    teacher = load_file(copied / "run" / "checkpoints" / "step_00000005" / "teacher.safetensors")
    assert pretrain.train(config_of(copied, store, *words), allow_change=True) == loop.Stop(STEPS)
    assert "--allow-change: losses.gram.weight was None and is 2.0" in capsys.readouterr().out
    held = part_of(
        copied / "run" / "checkpoints" / f"step_{STEPS:08d}", tmp_path, ".pair.snapshot.backbone."
    )
    assert [name for name in teacher if not torch.equal(held[name], teacher[name])] == []
    assert all(row["loss/gram"] > 0 for row in numbers_of(copied / "run")[5:])


def test_a_run_with_a_snapshot_resumes_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path
) -> None:
    stopped_run(monkeypatch, tmp_path, store, 5, *GRAM)
    assert pretrain.train(config_of(tmp_path, store), allow_change=True) == loop.Stop(STEPS)
    newest = tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}"
    assert (
        part_of(newest, tmp_path, ".pair.snapshot") == {}
        and "loss/gram" not in numbers_of(tmp_path / "run")[-1]
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("losses.gram.refresh_every=-1", "losses.gram.refresh_every"),
        ("losses.gram.start=-1", "losses.gram.start"),
        ("losses.gram.tokens=some", "unmasked"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, store: Path, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        config_of(tmp_path, store, word)
    one_line(raised)
