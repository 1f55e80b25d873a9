"""The numbers of a training trajectory stay where they were: what no other test would see move,
this one does.

Stored numbers are no truth. When a change is meant to move them, look at what moved and how far,
write them again with

    python tests/engine/test_golden.py --update

and write in the commit why they moved, beside the curve of a real run before and after.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # for --update; pytest has it anyway
from tiny_run import config_of, make_store, numbers_of, state_of

from tapct.run import pretrain
from tapct.ssl.student_teacher import StudentTeacher

FOLDER = Path(__file__).resolve().parent / "golden"
STEPS = 30
TOLERANCE = 1e-4  # float64 leaves room for another CPU, whose float32 views differ in the last bit
COMMON = (
    "train.precision=fp64",
    f"train.steps={STEPS}",
    "checkpoint.every=30",
    "optim.lr=1e-3",
    "model.layer_scale=1",
    "seed=7",
    "optim.momentum=[0.9,1]",
)
CASES = {
    "centring": (),
    "sinkhorn": ("losses.dino.targets.kind=sinkhorn", "losses.ibot.targets.kind=sinkhorn"),
}
WATCHED = ("patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "norm.weight")

Numbers = dict[str, list[float]]


def trajectory(case: str, folder: Path, store: Path) -> Numbers:
    """Losses and gradient norms of every step, and how far some weights came in all."""
    resolved = config_of(folder, store, *COMMON, *CASES[case])
    pretrain.train(resolved)
    rows = numbers_of(folder / "run")
    names = [name for name in rows[0] if name.startswith(("loss/", "grad_norm/"))]
    found = {name: [row[name] for row in rows] for name in sorted(names)}
    config = resolved.value
    (checkpoint,) = (folder / "run" / "checkpoints").glob("step_*")
    after = state_of(checkpoint, folder / "state.pt")
    before = StudentTeacher(
        config.model, config.losses, config.seed, dtype=torch.float64
    ).state_dict()
    for name in (
        f"{network}.backbone.{part}" for network in ("student", "teacher") for part in WATCHED
    ):
        (weight,) = (
            value for key, value in after.items() if key.endswith(name) and "optimizer" not in key
        )
        found[f"way of {name}"] = [(weight - before[name]).abs().sum().item()]
    return found


def moved(found: Numbers, stored: Numbers, tolerance: float = TOLERANCE) -> list[str]:
    """One line for every series that left the stored one, with the first place at which it did."""
    lines = [f"{name} is new" for name in found.keys() - stored] + [
        f"{name} is gone" for name in stored.keys() - found
    ]
    for name in found.keys() & stored:
        pairs = list(zip(found[name], stored[name], strict=True))
        away = [
            (place, now, then)
            for place, (now, then) in enumerate(pairs)
            if not math.isclose(now, then, rel_tol=tolerance)
        ]
        if away:
            place, now, then = away[0]
            lines.append(
                f"{name}[{place}] was {then:.9g}, is {now:.9g}, and {len(away)} of {len(pairs)} "
                "moved"
            )
    return sorted(lines)


@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_give_the_stored_numbers(case: str, store: Path, tmp_path: Path) -> None:
    stored = json.loads((FOLDER / f"{case}.json").read_text())
    lines = moved(trajectory(case, tmp_path, store), stored)
    assert not lines, (
        f"the golden trajectory `{case}` moved:\n  "
        + "\n  ".join(lines)
        + "\nIf the change should not move numbers, "
        "it has a fault. If it should: python tests/engine/test_golden.py --update, and write in "
        "the commit why"
    )


def test_a_series_that_moves_is_named_with_the_place_where_it_began_to() -> None:
    stored = {"loss/total": [1.0, 2.0, 3.0], "gone": [1.0]}
    assert moved({"loss/total": [1.0, 2.0 + 1e-5, 3.0], "gone": [1.0]}, stored) == []
    assert moved({"loss/total": [1.0, 2.1, 3.0], "new": [1.0]}, stored) == [
        "gone is gone",
        "loss/total[1] was 2, is 2.1, and 1 of 3 moved",
        "new is new",
    ]
    assert moved({"loss/total": [math.nan, 2.0, 3.0], "gone": [1.0]}, stored) != []


def update() -> None:
    """Write the stored numbers again, and print what moved."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        store = make_store(Path(scratch) / "archive")
        for case in CASES:
            path = FOLDER / f"{case}.json"
            found = trajectory(case, Path(scratch) / case, store)
            lines = (
                moved(found, json.loads(path.read_text()))
                if path.exists()
                else ["written for the first time"]
            )
            print(f"{case}:", *(lines or ["nothing moved"]), sep="\n  ")
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        raise SystemExit("usage: python tests/engine/test_golden.py --update")
    torch.set_num_threads(1)
    update()
