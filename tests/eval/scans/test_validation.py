"""Validation patients: disjoint from the other test patients, fixed by the seed of the split."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tapct.base.exits import UserError
from tapct.data.patients.split import patients_below
from tapct.eval.scans.train_test import Split, split_by_patient
from tapct.eval.scans.validation import divided


@dataclass(frozen=True)
class Row:
    """A scan as the split sees it."""

    id: str
    patient: str
    path: str = ""
    has_labels: bool = True


def rows(num_patients: int, scans_each: int = 2) -> list[Row]:
    return [
        Row(f"{number:03}_{scan}", f"p{number}")
        for number in range(num_patients)
        for scan in range(scans_each)
    ]


def patients(side: tuple[Row, ...]) -> set[str]:
    return {row.patient for row in side}


def split_of(num: int, held_out: frozenset[str] = frozenset()) -> Split:
    return split_by_patient(rows(num), test_share=0.5, max_scans=0, seed=0, held_out=held_out)


def both(split: Split, share: float, seed: int, **more: dict[str, str]) -> tuple[Split, Split]:
    """The split on validation patients and on the other test patients."""
    one = divided(split, share, seed, on_validation=True, **more)
    return one, divided(split, share, seed, on_validation=False, **more)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_each_test_patient_is_on_one_side_with_all_scans(share: float) -> None:
    whole = split_of(60)
    for seed in range(5):
        validation, rest = both(whole, share, seed)
        assert validation.test and rest.test
        assert not patients(validation.test) & patients(rest.test)
        assert sorted(row.id for row in (*validation.test, *rest.test)) == sorted(
            row.id for row in whole.test
        )
        assert validation.train == rest.train == whole.train


def test_the_share_holds_for_patients_that_the_same_seed_has_held_out() -> None:
    # held-out patients have a hash below 0.2; by the same hash all of them would be validation
    names = [f"p{number}" for number in range(2000)]
    for seed in (0, 7):
        held_out = patients_below(names, 0.2, seed)
        validation, rest = both(split_of(2000, held_out), 0.5, seed)
        num = len(patients(validation.test))
        assert num + len(patients(rest.test)) == len(held_out)
        assert 0.42 < num / len(held_out) < 0.58


def test_a_patient_keeps_the_side_when_others_are_added() -> None:
    some, more = split_of(40), split_of(60)
    known = patients(some.test) & patients(more.test)
    before = patients(divided(some, 0.5, 3, on_validation=True).test) & known
    after = patients(divided(more, 0.5, 3, on_validation=True).test) & known
    assert len(known) > 5 and before == after
    other = patients(divided(more, 0.5, 4, on_validation=True).test) & known
    assert other != after


def test_an_official_split_gives_its_validation_scans() -> None:
    scans = rows(6, 1)
    sides = {row.id: side for row, side in zip(scans, ["train", "val", "test"] * 2, strict=True)}
    train = tuple(row for row in scans if sides[row.id] != "test")
    test = tuple(row for row in scans if sides[row.id] == "test")
    split = Split("patients", train, test)
    validation, rest = both(split, 0.5, 0, sides=sides)
    assert {sides[row.id] for row in validation.test} == {"val"}
    assert {sides[row.id] for row in validation.train} == {"train"}
    assert rest == split
    without = {name: "train" if side == "val" else side for name, side in sides.items()}
    with pytest.raises(UserError, match="has 0 validation scans and 4 training scans"):
        divided(split, 0.5, 0, on_validation=True, sides=without)


def test_too_few_patients_are_one_line() -> None:
    one = Split("patients", tuple(rows(3)[:4]), tuple(rows(3)[4:]))
    with pytest.raises(UserError, match="needs at least two test patients, and there is 1"):
        divided(one, 0.5, 0, on_validation=False)
    with pytest.raises(UserError, match="all scans are of one patient"):
        divided(split_of(1), 0.5, 0, on_validation=True)
