"""Which scans are for training and which for testing: the split by patient, the official split, and
the slabs of the scans of a single patient.

Z is the depth in patches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tapct.base import console, hashing
from tapct.base.exits import UserError
from tapct.data.patients.split import patients_below, two_sides
from tapct.eval.scans.usable import ScanRow

TRAIN, VAL, TEST = "train", "val", "test"
PATIENTS = "patients"  # split mode: no patient on both sides
BLOCKS = "blocks"  # split mode: slabs of the same scans


@dataclass(frozen=True)
class Split:
    """Scans of either side.

    Args:
        mode: `patients`, or `blocks` where there is one patient only: then both sides hold the
            same scans and `block_slices` separates them.
        train: scans that tasks learn from.
        test: scans that models are evaluated on.
        tests_held_out: True if the test patients are those that `data.held_out` names.
    """

    mode: str
    train: tuple[ScanRow, ...]
    test: tuple[ScanRow, ...]
    tests_held_out: bool = False


def split_for_tasks(
    groups: Sequence[Sequence[ScanRow]],
    *,
    test_share: float,
    max_scans: int,
    seed: int,
    held_out: Collection[str] = (),
    sides: Mapping[str, str] | None = None,
) -> Split:
    """Divide the scans of several tasks by patient, so that each scan is read for all of them.

    The scans of the first task are divided as if it were alone: its numbers do not change when
    other tasks are added. Scans that only later tasks can use follow; no patient is on both sides.

    Args:
        groups: scans that each task can use, none of them empty.
        test_share: share of the patients to test on.
        max_scans: most scans of all tasks together; 0 means all.
        seed: random seed of the split.
        held_out: patients that pretraining did not see.
        sides: official split, by scan ID, see `by_official_split`; empty or None where there is
            none.
    """
    if sides:
        everything = {row.id: row for group in groups for row in group}
        return by_official_split(list(everything.values()), sides, max_scans=max_scans, seed=seed)
    first = split_by_patient(
        groups[0], test_share=test_share, max_scans=max_scans, seed=seed, held_out=held_out
    )
    known = {row.id for row in groups[0]}
    others = {row.id: row for group in groups[1:] for row in group if row.id not in known}
    used = len({row.id for row in (*first.train, *first.test)})
    rest = sorted(others.values(), key=lambda row: row.id)
    if max_scans:
        rest = _some(rest, max(0, max_scans - used), seed)
    if not rest:
        return first
    if first.mode == BLOCKS:
        scans = (*first.train, *rest)
        return Split(BLOCKS, scans, scans)
    tested, trained = ({_patient(row) for row in side} for side in (first.test, first.train))
    new = {_patient(row) for row in rest} - tested - trained
    if first.tests_held_out:
        tested |= new.intersection(held_out)
    else:
        tested |= patients_below(new, test_share, seed)
    train = [row for row in rest if _patient(row) not in tested]
    test = [row for row in rest if _patient(row) in tested]
    return Split(PATIENTS, (*first.train, *train), (*first.test, *test), first.tests_held_out)


def split_by_patient(
    rows: Sequence[ScanRow],
    *,
    test_share: float,
    max_scans: int,
    seed: int,
    held_out: Collection[str] = (),
) -> Split:
    """Divide scans by patient; the result depends on the seed, not on the order of the rows.

    Args:
        rows: at least one scan.
        test_share: expected share of the patients to test on, at least one on either side; see
            `data.patients.split`.
        max_scans: most scans on both sides together, at least one on either; 0 means all. The sides
            shrink alike.
        seed: random seed of the split.
        held_out: patients that pretraining did not see: they are the test side where some scans
            are theirs and some are not, else the split is by `test_share`.
    """
    ordered = sorted(rows, key=lambda row: row.id)
    people = {_patient(row) for row in ordered}
    if len(people) == 1:
        scans = tuple(ordered[: max_scans or None])
        return Split(BLOCKS, scans, scans)
    tested = people.intersection(held_out)
    as_pretrained = 0 < len(tested) < len(people)
    if not as_pretrained:
        drawn, was_moved = two_sides(people, test_share, seed)
        tested = set(drawn)
        if was_moved:
            console.say(
                f"eval.test_share {test_share:g} with eval.seed {seed} puts all {len(people)} "
                "patients on one side, so the patient nearest to the share is moved to the other; "
                "another eval.seed divides them in another way"
            )
    test = [row for row in ordered if _patient(row) in tested]
    train = [row for row in ordered if _patient(row) not in tested]
    if max_scans and max_scans < len(ordered):
        num_test = min(max(1, round(max_scans * len(test) / len(ordered))), max(1, max_scans - 1))
        test, train = _some(test, num_test, seed), _some(train, max(1, max_scans - num_test), seed)
    return Split(PATIENTS, tuple(train), tuple(test), as_pretrained)


def patients_together(split: Split) -> Split:
    """Order the test scans so that those of one patient follow one another, first the patients with
    several scans: tasks that compare two scans of a patient then keep little, and the first test
    scans, of which pictures are drawn, are a pair.
    """
    if split.mode == BLOCKS:
        return split
    num_scans = Counter(_patient(row) for row in split.test)
    place: dict[str, int] = {}
    for row in split.test:
        place.setdefault(_patient(row), len(place))
    test = sorted(split.test, key=lambda row: (num_scans[_patient(row)] == 1, place[_patient(row)]))
    return replace(split, test=tuple(test))


def by_official_split(
    rows: Sequence[ScanRow], sides: Mapping[str, str], *, max_scans: int, seed: int
) -> Split:
    """Divide scans by an official split. Its validation scans are among the training scans:
    tasks find them by `LabelledScan.official_side`. Scans without a side are left out.

    Args:
        rows: scans that the tasks can use.
        sides: `train`, `val` or `test` by scan ID.
        max_scans, seed: as in `split_by_patient`.
    Raises:
        UserError: a side has no scan, or a patient has test scans and others.
    """
    ordered = sorted((row for row in rows if row.id in sides), key=lambda row: row.id)
    test = [row for row in ordered if sides[row.id] == TEST]
    train = [row for row in ordered if sides[row.id] != TEST]
    if not test or not train:
        raise UserError(
            f"the official split of eval.scan_labels has {len(train)} training and validation "
            f"scans and {len(test)} test scans among the {len(rows)} scans that the tasks can use; "
            "it needs one of each. Set eval.split_column=none to divide the scans by patient"
        )
    mixed = {_patient(row) for row in test} & {_patient(row) for row in train}
    if mixed:
        raise UserError(
            f"the official split of eval.scan_labels has {len(mixed)} patients with test scans and "
            "other scans, so the results would not hold for new patients. Correct the column, or "
            "set eval.split_column=none to divide the scans by patient"
        )
    if len(ordered) < len(rows):
        num = len(rows) - len(ordered)
        console.say(f"{num} of {len(rows)} scans have no side in the official split and are unused")
    if max_scans and max_scans < len(ordered):
        num_test = min(max(1, round(max_scans * len(test) / len(ordered))), max(1, max_scans - 1))
        test, train = _some(test, num_test, seed), _some(train, max(1, max_scans - num_test), seed)
    return Split(PATIENTS, tuple(train), tuple(test))


def _patient(row: ScanRow) -> str:
    return row.patient or row.id


def _some(rows: list[ScanRow], num: int, seed: int) -> list[ScanRow]:
    """`num` scans in a keyed order, so that a smaller choice is part of a larger one."""
    return sorted(
        rows,
        key=lambda row: (hashing.hash_int(seed, "eval scans", hashing.purpose_id(row.id)), row.id),
    )[:num]


def block_slices(
    num_patches: int, *, test: bool, num_blocks: int, gap: int, scan_id: str
) -> np.ndarray:
    """Patch slices along z of one side, where train and test share a scan.

    The depth is cut into `num_blocks` slabs; even ones train, odd ones test. Between two slabs
    `gap` slices of patches belong to neither side, since neighbours look alike.

    Returns:
        bool (num_patches,).
    Raises:
        UserError: the scan is too short for two slabs and a gap.
    """
    num_blocks = min(num_blocks, (num_patches + gap) // (1 + gap))
    if num_blocks < 2:
        raise UserError(
            f"scan {scan_id} has {num_patches} patches along z; fitting within one patient needs "
            f"{2 + gap}. "
            "Index scans of a second patient, or give each patient its own group with "
            "--patient-regex."
        )
    edges = np.linspace(0, num_patches + gap, num_blocks + 1).round().astype(int)
    chosen = np.zeros(num_patches, dtype=bool)
    for block in range(int(test), num_blocks, 2):
        chosen[edges[block] : edges[block + 1] - gap] = True
    return chosen
