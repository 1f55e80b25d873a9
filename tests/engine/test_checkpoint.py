"""Checkpoints come back bit for bit, are never half-written, and a damaged one is found and
named.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_disk import small_disk

from tapct.base.exits import UserError
from tapct.config.plugins import Plugin
from tapct.engine import checkpoint, optim
from tapct.engine.checkpoint import Checkpoints, Meta
from tapct.losses import dino
from tapct.models import vit
from tapct.nn import heads
from tapct.ssl.schedules import StepValues
from tapct.ssl.student_teacher import StudentTeacher

HEAD = heads.Config(num_prototypes=12, hidden=16, bottleneck=8)
MODEL = Plugin(
    "vit", vit.Config(window=(4, 16, 16), patch=(2, 8, 8), dim=16, depth=2, heads=2, registers=2)
)
VALUES = StepValues(lr=0.01, wd=0.2, momentum=0.9, teacher_temp=0.04, last_layer_frozen=False)


def save(
    checkpoints: Checkpoints,
    meta: Meta,
    pair: StudentTeacher,
    optimizer: torch.optim.Optimizer,
) -> Path:
    """Write a checkpoint and wait for it."""
    checkpoints.begin(meta, pair, optimizer)
    folder = checkpoints.finish()
    assert folder is not None
    return folder


def trained(seed: int, steps: int) -> tuple[StudentTeacher, optim.Updater]:
    pair = StudentTeacher(MODEL, (Plugin("dino", dino.Config(head=HEAD)),), seed=seed)
    updater = optim.Updater(pair, optim.Config())
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in pair.student.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        pair.losses["dino"].targets.scores(
            torch.randn(1, 4, 12, generator=draw), torch.eye(12), 0.04
        )
        updater.step(VALUES, torch.tensor(1.0))
    return pair, updater


def equal_states(a: dict, b: dict) -> list[str]:
    return [
        name
        for name in {**a, **b}
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    pair, updater = trained(1, 3)
    folder = save(
        Checkpoints(tmp_path, keep=2), Meta(3, 24, {"seed": 1}, "abc"), pair, updater.optimizer
    )
    torch.manual_seed(5)
    random_before = torch.get_rng_state()
    save(Checkpoints(tmp_path, keep=2), Meta(4, 32), pair, updater.optimizer)
    torch.manual_seed(6)

    other, other_updater = trained(2, 0)
    checkpoint.load(tmp_path / "step_00000004", other, other_updater.optimizer)
    assert equal_states(pair.state_dict(), other.state_dict()) == []
    old, new = (
        updater.optimizer.state_dict()["state"],
        other_updater.optimizer.state_dict()["state"],
    )
    assert old.keys() == new.keys() and len(old) > 0
    for index in old:
        assert equal_states(old[index], new[index]) == [], index
    assert float(old[0]["step"]) == 3
    assert torch.equal(torch.get_rng_state(), random_before)
    assert checkpoint.read_meta(folder) == Meta(3, 24, {"seed": 1}, "abc")
    teacher = load_file(folder / "teacher.safetensors")
    assert equal_states(teacher, pair.teacher.backbone.state_dict()) == []


def test_only_the_newest_are_kept_and_latest_points_to_the_last(tmp_path: Path) -> None:
    pair, updater = trained(1, 1)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 100):  # a string sort would put 9 last
        save(checkpoints, Meta(step, step), pair, updater.optimizer)
    assert [path.name for path in checkpoints.finished()] == ["step_00000010", "step_00000100"]
    assert (tmp_path / "latest").read_text() == "step_00000100\n"
    assert checkpoints.newest_whole() == (tmp_path / "step_00000100", [])


def test_steps_that_are_asked_for_are_kept_beside_the_newest(tmp_path: Path) -> None:
    pair, updater = trained(1, 1)
    wanted = {2, 9}
    checkpoints = Checkpoints(tmp_path, keep=1, also_kept=lambda: wanted)
    for step in (1, 2, 3, 4):
        save(checkpoints, Meta(step, step), pair, updater.optimizer)
    assert [path.name for path in checkpoints.finished()] == ["step_00000002", "step_00000004"]
    wanted = {4}  # another step has become the best one
    save(checkpoints, Meta(5, 5), pair, updater.optimizer)
    assert [path.name for path in checkpoints.finished()] == ["step_00000004", "step_00000005"]
    wanted = {5}  # the run resumed from an older step: this one is damaged or of another course
    save(checkpoints, Meta(3, 3), pair, updater.optimizer)
    assert [path.name for path in checkpoints.finished()] == ["step_00000003"]


@pytest.mark.parametrize("harm", ["truncated", "flipped bit", "deleted", "no fingerprints"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, harm: str
) -> None:
    pair, updater = trained(1, 1)
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        save(checkpoints, Meta(step, step), pair, updater.optimizer)
    shard = next((tmp_path / "step_00000002").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    if harm == "truncated":
        shard.write_bytes(data[:-7])
    elif harm == "flipped bit":
        data[len(data) // 2] ^= 4
        shard.write_bytes(data)
    elif harm == "deleted":
        shard.unlink()
    else:
        (tmp_path / "step_00000002" / "files.json").unlink()
    found, complaints = checkpoints.newest_whole()
    assert found == tmp_path / "step_00000001"
    assert len(complaints) == 1 and "step_00000002" in complaints[0] and "skipped" in complaints[0]


def test_a_save_that_was_cut_off_is_never_taken_and_cleaned_up_by_the_next(tmp_path: Path) -> None:
    pair, updater = trained(1, 1)
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, Meta(1, 1), pair, updater.optimizer)
    torn = tmp_path / ".writing_step_00000002"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    assert checkpoints.newest_whole() == (tmp_path / "step_00000001", [])
    save(checkpoints, Meta(3, 3), pair, updater.optimizer)
    assert not torn.exists()


def test_a_full_disk_gives_a_one_line_error_and_leaves_the_older_checkpoint_whole(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "small", "1500k") as small:
        pair, updater = trained(1, 1)
        checkpoints = Checkpoints(small / "checkpoints", keep=5)
        step, message = 0, ""
        try:
            for step in range(1, 50):
                save(checkpoints, Meta(step, step), pair, updater.optimizer)
        except UserError as error:
            message = str(error)
        assert step > 1, "the disk must hold at least one"
        assert "no space left" in message and "\n" not in message and f"step {step}" in message
        assert checkpoints.newest_whole() == (small / "checkpoints" / f"step_{step - 1:08d}", [])
        assert not [
            name for name in os.listdir(small / "checkpoints") if name.startswith(".writing")
        ]


def test_the_teacher_can_be_read_by_whom_the_folder_can_be_read(tmp_path: Path) -> None:
    pair, updater = trained(1, 1)
    folder = save(Checkpoints(tmp_path, keep=1), Meta(1, 1), pair, updater.optimizer)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(set(modes.values())) == 1, modes
