"""Nobody changes sides when an archive grows, and a run keeps the rule with which it began."""

from __future__ import annotations

import hashlib
import random

import pytest

from tapct.data.patients.split import (
    held_out_patients_v1,
    imbalance,
    patients_below,
    position,
    split_of_version,
    two_sides,
)


def people(num: int, archive: int = 0) -> list[str]:
    """Patients as a manifest holds them: 16 hex digits."""
    return [hashlib.md5(f"{archive}/{i}".encode()).hexdigest()[:16] for i in range(num)]


def test_nobody_changes_sides_in_a_thousand_growing_archives() -> None:
    draw = random.Random(0)
    changed = 0
    for archive in range(1000):
        names = people(draw.randrange(1, 60), archive)
        num, share, seed = draw.randrange(len(names) + 1), draw.random(), draw.randrange(5)
        before = patients_below(names[:num], share, seed)
        after = patients_below(draw.sample(names, len(names)), share, seed)
        changed += len(before ^ (after & set(names[:num])))
    assert changed == 0


def test_the_earlier_rule_moved_patients_when_an_archive_grew() -> None:
    names = people(14)
    before, after = held_out_patients_v1(names[:10], 0.3, 0), held_out_patients_v1(names, 0.3, 0)
    assert len(before) == 3 and len(after) == 4
    moved = 0
    for archive in range(50):
        names = people(20, archive)
        grown = held_out_patients_v1(names, 0.3, 0) & set(names[:14])
        moved += bool(held_out_patients_v1(names[:14], 0.3, 0) ^ grown)
    assert moved > 10


def test_the_share_holds_on_average_and_a_larger_one_holds_out_more() -> None:
    names = people(4000)
    for share in (0.0, 0.05, 0.4, 0.9):
        assert abs(len(patients_below(names, share, 3)) - share * 4000) < 4 * 32
    assert patients_below(names, 0.05, 3) < patients_below(names, 0.4, 3)
    assert patients_below(names, 0.4, 3) != patients_below(names, 0.4, 4)
    assert patients_below(names[:10] * 3, 0.4, 3) == patients_below(names[:10], 0.4, 3)


def test_a_version_chooses_rule_and_seed() -> None:
    names = people(30)
    for version, expected in (
        (1, held_out_patients_v1(names, 0.3, 7)),
        (2, patients_below(names, 0.3, 5)),
    ):
        assert split_of_version(version, names, 0.3, split_seed=5, run_seed=7) == expected


@pytest.mark.parametrize("num", [2, 3, 9])
def test_an_evaluation_always_has_two_sides_and_moves_the_nearest_patient_only(num: int) -> None:
    names = people(num)
    for seed in range(20):
        places = sorted(position(name, seed) for name in names)
        for share in (0.01, 0.5, 0.99):
            tested, was_moved = two_sides(names, share, seed)
            assert 0 < len(tested) < num
            drawn = patients_below(names, share, seed)
            assert was_moved == (len(drawn) in (0, num))
            assert len(tested ^ drawn) == was_moved
            if was_moved:
                (moved,) = tested ^ drawn
                assert position(moved, seed) == (places[0] if not drawn else places[-1])


def test_a_share_that_holds_out_nobody_or_everybody_names_a_seed_that_does_not() -> None:
    names = people(5)
    lines = {seed: imbalance(names, 0.2, seed) for seed in range(30)}
    for seed, line in lines.items():
        num = len(patients_below(names, 0.2, seed))
        assert bool(line) == (num in (0, 5))
        if line:
            assert "patients (5)" in line and "\n" not in line
            other = int(line.split("data.split_seed=")[1].split(",")[0])
            assert len(patients_below(names, 0.2, other)) == 1
    assert any(lines.values())
    assert "data.held_out=0" in imbalance(["p"], 0.4, 0)
    assert imbalance(names, 0.0, 0) == imbalance([], 0.4, 0) == ""


def test_folds_hold_out_every_patient_once():
    names = [f"p{n}" for n in range(500)]
    folds = [patients_below(names, 0.2, 4, start) for start in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert sum(map(len, folds)) == 500
    assert frozenset().union(*folds) == set(names)
    assert folds[0] == patients_below(names, 0.2, 4)
    assert all(60 < len(fold) < 140 for fold in folds)
    grown = patients_below([*names, *(f"q{n}" for n in range(500))], 0.2, 4, 0.6)
    assert folds[3] == {name for name in grown if name.startswith("p")}
