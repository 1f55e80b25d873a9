"""W ranks x b are 1 rank x W b: every loss, gradient, moment and weight; a run resumes at another
number of ranks.
"""

from __future__ import annotations

from pathlib import Path

import foreign_weights as foreign
import pytest
import torch
from many_ranks import PLAIN, good, largest_difference, largest_state_difference, train
from tiny_run import numbers_of

pytestmark = pytest.mark.dist

STEPS = 12  # past the end of frozen layers, two snapshots and two checks of the ranks
LONG = (
    f"train.steps={STEPS}",
    "train.global_batch=8",
    f"checkpoint.every={STEPS}",
    "optim.lr=3e-4",
    f"log.every={STEPS}",
)
LAST_LAYERS = ("losses.dino.head.last_layer=plain", "losses.ibot.head.last_layer=plain")
RECIPES = {
    "plain": (*PLAIN, *LAST_LAYERS, "optim.freeze_last_layer_steps=4", *LONG),
    "plain shared": (*PLAIN, *LAST_LAYERS, "losses.ibot.share_dino_head=true", *LONG),
    "centring": (*PLAIN, *LONG),
    "sinkhorn": (
        "model.drop_path=0.0",
        "losses[faults.saboteur]={}",
        "losses.dino.targets.kind=sinkhorn",
        "losses.ibot.targets.kind=sinkhorn",
        "losses.ibot.share_dino_head=true",
        "losses.koleo.cross_rank=true",
        "train.accumulation=2",
        *LONG,
    ),
    "gram": (
        *PLAIN,
        *LONG,
        "losses.gram.start=3",
        "losses.gram.refresh_every=6",
        "losses.gram.tokens=masked",
    ),
}
COMPARED = ("loss/", "ce/", "grad_norm/")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, store: Path) -> dict[str, Path]:
    """Run folders of one process, float64, by recipe."""
    made = {}
    for name, words in RECIPES.items():
        folder = tmp_path_factory.mktemp(name)
        good(train(1, folder, store, "train.precision=fp64", *words))
        made[name] = folder / "run"
    return made


@pytest.mark.parametrize(
    ("recipe", "world", "shard"),
    [
        ("centring", 2, 0),
        ("centring", 4, 2),
        ("sinkhorn", 2, 1),
        ("sinkhorn", 4, 0),
        ("gram", 2, 0),
        ("gram", 4, 2),
        ("plain", 2, 0),
        ("plain shared", 2, 0),
    ],
)
def test_ranks_share_a_batch_and_change_nothing(
    tmp_path: Path, store: Path, references: dict[str, Path], recipe: str, world: int, shard: int
) -> None:
    words = (
        "train.precision=fp64",
        f"parallel.shard={shard}",
        "parallel.desync_every=5",
        *RECIPES[recipe],
    )
    good(train(world, tmp_path, store, *words))
    reference = references[recipe]
    assert len(numbers_of(reference)) == STEPS
    assert largest_difference(tmp_path / "run", reference, COMPARED) < 1e-9
    assert (
        largest_difference(tmp_path / "run", reference, ("health/",), floor=1.0) < 1e-6
    )  # float32 in part
    assert largest_state_difference(tmp_path / "run", reference, tmp_path) < 1e-9


def test_a_run_resumes_at_other_rank_counts(
    tmp_path: Path, store: Path, references: dict[str, Path]
) -> None:
    words = RECIPES["centring"]
    alone = tmp_path / "alone"
    good(train(1, alone, store, *words))
    moved = tmp_path / "moved"
    for world, stop in ((1, 3), (2, 6), (4, 9)):
        printed = good(train(world, moved, store, *words, fault=f"{world - 1} {stop} SIGTERM"))
        assert (
            f"stopped by SIGTERM and saved at step {stop}" in printed
        )  # whichever rank received it
    assert "resuming from" in good(train(1, moved, store, *words))
    assert largest_difference(moved / "run", alone / "run", ("loss/", "ce/")) < 1e-4


def test_a_snapshot_goes_along_to_other_rank_counts(
    tmp_path: Path, store: Path, references: dict[str, Path]
) -> None:
    words = ("train.precision=fp64", *RECIPES["gram"])  # taken before steps 4 and 10
    for world, stop in ((1, 5), (2, 9)):
        good(train(world, tmp_path, store, *words, fault=f"0 {stop} SIGTERM"))
    good(train(1, tmp_path, store, *words))
    assert largest_difference(tmp_path / "run", references["gram"], COMPARED) < 1e-9
    assert largest_state_difference(tmp_path / "run", references["gram"], tmp_path) < 1e-9


def test_two_ranks_in_bf16_learn_as_one_does(tmp_path: Path, store: Path) -> None:
    words = (*RECIPES["centring"], "train.precision=bf16")
    for world in (1, 2):
        good(train(world, tmp_path / str(world), store, *words))
    alone, shared = (numbers_of(tmp_path / name / "run") for name in "12")
    differences = [
        abs(one["loss/total"] - other["loss/total"]) / abs(other["loss/total"])
        for one, other in zip(shared, alone, strict=True)
    ]
    # The same weights give the same loss. Gradients have 8 bits of mantissa, which two ranks round
    # elsewhere, and AdamW makes steps of one size of large and of small gradients: from then on
    # each step enlarges the difference.
    assert max(differences[:2]) < 1e-5
    assert max(differences[:4]) < 1e-3
    assert max(differences) < 5e-3


def test_sharded_ranks_start_from_the_weights_of_another_project_as_one_does(
    tmp_path: Path, store: Path
) -> None:
    tensors = foreign.dinov2((3, 16, 16), 14 * 14, dim=16, registers=1)
    torch.save(tensors, tmp_path / "dino.pth")
    words = (*RECIPES["centring"], "train.precision=fp64", f"train.init={tmp_path / 'dino.pth'}")
    words += ("train.init_allow=[inflated]", "train.steps=2", "optim.freeze_last_layer_steps=0")
    for world in (1, 2):
        good(train(world, tmp_path / str(world), store, *words))
    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    assert largest_difference(two, one, ("loss/", "ce/", "grad_norm/")) < 1e-9


def test_an_unequal_share_is_one_line_from_one_rank(tmp_path: Path, store: Path) -> None:
    ended = train(2, tmp_path, store, "train.global_batch=3")
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert ended.returncode != 0 and len(lines) == 1
    assert (
        "train.global_batch 3 cannot be shared equally by 2 ranks with train.accumulation 1"
        in lines[0]
    )
    ended = train(2, tmp_path, store, "parallel.shard=3")
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "parallel.shard 3 does not divide the 2 ranks" in lines[0]
