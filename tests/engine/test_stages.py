"""A run of stages is the runs that one would chain by hand, to the bit, however often it is
stopped.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import PLAIN, good, largest_difference, largest_state_difference, train
from stopped import STEPS, one_line, stop_at, stopped_run
from tiny_run import assert_equal_runs, config_of, numbers_of, own_plugin, state_of

from tapct.base.exits import UserError
from tapct.data.packed.store import Store
from tapct.engine import loop
from tapct.run import finished, model_source, pretrain
from tapct.ssl import step as ssl_step

LARGE = (
    "views.global_window=[8,32,24]",
    "views.num_locals=1",
    "views.local_window=[2,8,16]",
    "data.loader.slab_depth=8",
    "train.accumulation=2",
    "masks.ratio=[0.3,0.6]",
    "optim.lr=5e-3",
    "optim.betas=[0.8,0.99]",
    "optim.clip_norm=0.1",
    "losses.dino.weight=0.5",
    "losses.ibot.targets.centre_momentum=0.5",
)
NO_LOCALS = ("views.num_locals=0", "losses.koleo.weight=0.0", "losses.dino.targets.kind=sinkhorn")


def stages(*changes: tuple[int, tuple[str, ...]]) -> str:
    """The word that gives a config its stages: (start, what it sets)."""
    return "stages=" + json.dumps([{"start": start, "set": words} for start, words in changes])


STAGED = stages((5, LARGE), (9, NO_LOCALS))


def test_a_run_of_stages_equals_runs_chained_by_hand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    assert stopped_run(monkeypatch, tmp_path, store, 5) == loop.Stop(5, "SIGTERM")
    with monkeypatch.context() as patch:
        stop_at(patch, 9, signal.SIGTERM)
        assert pretrain.train(config_of(tmp_path, store, *LARGE), allow_change=True) == loop.Stop(
            9, "SIGTERM"
        )
    assert pretrain.train(config_of(tmp_path, store, *NO_LOCALS), allow_change=True) == loop.Stop(
        STEPS
    )
    assert_equal_runs(undisturbed(STAGED), tmp_path / "run", tmp_path)


def test_stages_that_change_nothing_leave_every_bit_as_it_was(
    tmp_path: Path, store: Path, undisturbed: Callable[..., Path]
) -> None:
    pretrain.train(
        config_of(tmp_path, store, stages((4, ("seed=0", "views.num_locals=2")), (5, ()), (11, ())))
    )
    assert_equal_runs(tmp_path / "run", undisturbed(), tmp_path)


@pytest.mark.parametrize("step", [4, 5, 6, 9, 10])
def test_a_run_stopped_near_or_at_a_boundary_equals_one_that_was_not(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    store: Path,
    undisturbed: Callable[..., Path],
    step: int,
) -> None:
    stop = stopped_run(monkeypatch, tmp_path, store, step, STAGED, number=signal.SIGUSR1)
    assert stop == loop.Stop(step, "SIGUSR1")
    assert [row["step"] for row in numbers_of(tmp_path / "run")] == list(range(1, step + 1))
    assert pretrain.train(config_of(tmp_path, store, STAGED)) == loop.Stop(STEPS)
    assert_equal_runs(tmp_path / "run", undisturbed(STAGED), tmp_path)


def test_each_step_sees_the_crops_of_its_stage_and_the_next_samples(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Any, ...]] = []
    original = ssl_step.forward

    def forward(pair: Any, views: Any, masks: Any, *rest: Any) -> Any:
        local = views.local_VBZYX.shape
        seen.append(
            (
                tuple(views.global_VBZYX.shape),
                tuple(local) if local[0] else (),
                masks.masked_VBN.shape[2],
            )
        )
        return original(pair, views, masks, *rest)

    samples: list[list[int]] = []
    make_inputs = loop.Trainer.make_inputs

    def inputs(self: loop.Trainer, step: int, micro: int, batch: Any, counts: list[int]) -> Any:
        samples.append(batch.sample_B.tolist())
        return make_inputs(self, step, micro, batch, counts)

    monkeypatch.setattr(ssl_step, "forward", forward)
    monkeypatch.setattr(loop.Trainer, "make_inputs", inputs)
    pretrain.train(config_of(tmp_path, store, STAGED))
    small, large = (
        ((2, 4, 4, 16, 16), (2, 4, 4, 8, 8), 8),
        ((2, 2, 8, 32, 24), (1, 2, 2, 8, 16), 48),
    )
    assert seen == [small] * 5 + [large] * 8 + [((2, 4, 4, 16, 16), (), 8)] * 3
    assert [number for part in samples for number in part] == list(range(4 * STEPS))
    printed = capsys.readouterr().out
    assert (
        f"stages[0]: {' '.join(LARGE)} from step 5 on" in printed
        and "stages[1]: views.num_locals=0" in printed
    )
    rows = numbers_of(tmp_path / "run")
    assert [row["samples"] for row in rows] == [4 * step for step in range(1, STEPS + 1)]
    assert ["loss/dino_local" in row for row in rows] == [True] * 9 + [False] * 3
    assert not [
        thread.name for thread in threading.enumerate() if thread.name.startswith("tapct-loader")
    ]


def test_a_larger_window_on_the_same_area_has_finer_voxels_and_on_a_larger_area_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path
) -> None:
    pixel_mm: dict[int, float] = {}
    original = loop.Trainer.make_inputs

    def inputs(self: loop.Trainer, step: int, *rest: Any) -> Any:
        views, masks = original(self, step, *rest)
        area_mm2 = (
            views.global_mm_VB3[..., 1]
            * views.global_mm_VB3[..., 2]
            / rest[1].spacing_mm_B3[:, 1:].prod(1)
        )
        size = torch.tensor([(z.shape_ZYX[1] * z.shape_ZYX[2]) for z in scans])[rest[1].scan_B]
        pixel_mm[step] = float(
            (area_mm2 / size).sqrt().mean()
        )  # pixel's side as a share of the scan's
        return views, masks

    scans = Store(store).scans
    monkeypatch.setattr(loop.Trainer, "make_inputs", inputs)
    narrow, same, wide = (f"views.global_area=[{area},{area}]" for area in (0.2, 0.2, 0.8))
    large = "views.global_window=[4,32,32]"
    words = (narrow, "train.steps=3", stages((1, (large, same)), (2, (large, wide))))
    pretrain.train(config_of(tmp_path, store, *words))
    assert pixel_mm[0] == pytest.approx(0.2**0.5 / 16, rel=1e-5)
    assert pixel_mm[1] == pytest.approx(pixel_mm[0] / 2, rel=1e-5)
    assert pixel_mm[2] == pytest.approx(pixel_mm[0], rel=1e-5)


def test_the_moments_of_adamw_follow_their_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path
) -> None:
    forgetful = stages((5, ("optim.betas=[0.0,0.999]",)))
    moments = []
    for number, (step, words) in enumerate(((5, ()), (6, ()), (6, (forgetful,)))):
        stopped_run(monkeypatch, tmp_path / str(number), store, step, *words)
        checkpoint = tmp_path / str(number) / "run" / "checkpoints" / f"step_{step:08d}"
        state = state_of(checkpoint, tmp_path / "scratch.pt")
        moments.append({name: x for name, x in state.items() if name.endswith(".exp_avg")})
    before, mixed, gradient = moments  # at beta 0 the first moment is the gradient itself
    assert len(gradient) > 30
    for name in gradient:
        torch.testing.assert_close(
            mixed[name], 0.9 * before[name] + 0.1 * gradient[name], rtol=1e-5, atol=1e-8
        )
    assert not torch.equal(gradient[name], mixed[name])


@pytest.mark.dist
def test_two_ranks_follow_the_stages_of_one(tmp_path: Path, store: Path) -> None:
    large = tuple(
        word for word in LARGE if not word.startswith("optim.lr")
    )  # AdamW makes 3e-9 of rounding at 5e-3
    words = (
        *PLAIN,
        "train.precision=fp64",
        "optim.lr=3e-4",
        "train.steps=7",
        stages((3, large), (5, ("views.num_locals=0",))),
    )
    for world in (1, 2):
        good(train(world, tmp_path / str(world), store, *words))
    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    assert largest_difference(two, one, ("loss/", "ce/", "grad_norm/")) < 1e-9
    assert largest_state_difference(two, one, tmp_path) < 1e-9
    good(
        train(2, tmp_path / "stopped", store, *words, fault="1 3 SIGTERM")
    )  # at the boundary, sent to one rank
    good(train(2, tmp_path / "stopped", store, *words))
    assert_equal_runs(tmp_path / "stopped" / "run", two, tmp_path)


def test_a_finished_run_of_stages_is_exported_and_its_stages_cannot_change(
    undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = undisturbed(STAGED)
    assert (finished.export(folder, tmp_path / "export") / "model.safetensors").is_file()
    with pytest.raises(UserError, match=r"stages=\[\]: the run was trained with"):
        model_source.open_run(folder, ["stages=[]"])


GROWING = '''
from dataclasses import dataclass
import torch
from tapct.nn.contracts import Loss
from tapct.types import LossResult, Term

@dataclass(frozen=True)
class Config:
    size: int = 1

class Growing(Loss):
    """What it holds has the size that its config gives."""

    head_of = ""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("held", torch.zeros(config.size))

    def forward(self, sets, student_head, teacher_head):
        return LossResult((Term("growing", sets.student_global.cls_BD.sum() * 0.0),))

    def finish_step(self, apply):
        pass

def build(config):
    return Growing(config)
'''


LOSSES = ("losses[mylab.growing]={}", "losses.gram.start=4")


@pytest.mark.parametrize(
    ("start", "word", "complaint"),
    [
        (
            11,
            "losses[mylab.growing].size=2",
            "stages[0]: losses.mylab.growing: these settings need another head or",
        ),
        (11, "losses.gram.start=7", "stages[0]: losses.gram: the teacher's copy has one timetable"),
        (11, "optim.lr=1e-9", "stages[0]: peak learning rate 1e-09"),
        (
            11,
            "train.accumulation=4",
            "stages[0]: config: losses.koleo needs at least 2 samples in a micro-batch of a rank",
        ),
    ],
)
def test_a_stage_that_cannot_be_followed_ends_the_run_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    store: Path,
    start: int,
    word: str,
    complaint: str,
) -> None:
    own_plugin(monkeypatch, tmp_path, "growing", GROWING)
    with pytest.raises(UserError) as raised:
        pretrain.train(config_of(tmp_path, store, *LOSSES, stages((start, (word,)))))
    assert one_line(raised).startswith(complaint)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or metrics.read_text() == ""
