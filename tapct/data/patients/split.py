"""The split of an archive: which patients are held out from pretraining, or tested in evaluation.

A patient is held out if a keyed hash of the patient, as a number between 0 and 1, is below the
share. The answer for one patient depends on nothing else, so a patient never changes sides when
patients are added to an archive or removed from it. The price is that the share holds only on
average: of a small archive it may hold out nobody or everybody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from tapct.base.hashing import GAMMA, MASK_64, MIX_1, MIX_2, absorb, hash_int

# Version of the rule, kept in the config of a run: a run that began with rule 1 keeps it.
VERSION = 2


def patients_below(
    patients: Iterable[str], share: float, seed: int, start: float = 0.0
) -> frozenset[str]:
    """Choose the patients whose keyed hash is below the share, or between `start` and
    `start + share`.

    Training holds them out from pretraining; an evaluation without such patients tests on them.

    Args:
        patients: keyed hashes, one per scan; repeated for several scans of one patient.
        share: expected share of the patients, in [0, 1).
        seed: seed of the split, `data.split_seed` or `eval.seed`.
        start: `data.held_out_start`; equal shares from 0, share, 2 share ... are the folds of a
            cross-validation.
    Returns:
        The chosen patients; empty for share 0.
    """
    # a fold ends exactly where the next one begins: 0.6 + 0.2 is a little less than 0.8
    end = round(start + share, 12)
    return frozenset(name for name in set(patients) if start <= position(name, seed) < end)


def position(patient: str, seed: int) -> float:
    """Place of a patient between 0 and 1: a hash of the seed and the patient alone."""
    return (hash_int(seed, patient_number_name(patient)) & MASK_64) / 2**64


def patient_number_name(patient: str) -> str:
    """The text whose number (`hashing.purpose_id`) stands for a patient in every split."""
    return f"held_out/{patient}"


def positions(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Places of many patients between 0 and 1, equal to `position` of each.

    Args:
        numbers: uint64, `hashing.purpose_id` of `patient_number_name` of each patient.
        seed: seed of the split.
    Returns:
        float64 of the same length.
    """
    # hashing.absorb on an array: the products wrap at 64 bits, as its masks make them do
    word = numbers.astype(np.uint64) + np.uint64(1)
    word = word * np.uint64(GAMMA) + np.uint64(absorb(0, seed))
    word = (word ^ (word >> np.uint64(30))) * np.uint64(MIX_1)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(MIX_2)
    word = word ^ (word >> np.uint64(31))
    return word.astype(np.float64) / 2.0**64


def are_below(numbers: np.ndarray, share: float, seed: int, start: float = 0.0) -> np.ndarray:
    """Whether each scan is of a patient that `patients_below` chooses.

    Args:
        numbers: as in `positions`, one per scan.
        share, seed, start: as in `patients_below`.
    Returns:
        bool of the same length.
    """
    place = positions(numbers, seed)
    chosen = (start <= place) & (place < round(start + share, 12))
    assert isinstance(chosen, np.ndarray)
    return chosen


def held_out_patients_v1(patients: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """Choose a rounded number of patients: the rule of runs that began before version 2.

    Under this rule a patient can change sides when the archive grows.

    Args:
        patients, share: as in `patients_below`; at least one patient is chosen where share > 0
            and there are two patients.
        seed: random seed of the run.
    """
    names = sorted(set(patients), key=lambda name: (hash_int(seed, f"held_out/{name}"), name))
    if share <= 0 or len(names) < 2:
        return frozenset()
    return frozenset(names[: min(max(round(share * len(names)), 1), len(names) - 1)])


def split_of_version(
    version: int,
    patients: Iterable[str],
    share: float,
    *,
    split_seed: int,
    run_seed: int,
    start: float = 0.0,
) -> frozenset[str]:
    """The held-out patients of a run by the rule with which it began.

    Args:
        version: `data.split_version` of the run's config, 1 or 2.
        patients, share: as in `patients_below`.
        split_seed: seed of the split, which version 2 uses.
        run_seed: random seed of the run, which version 1 used.
        start: as in `patients_below`; version 1 had none.
    """
    if version == 1:
        return held_out_patients_v1(patients, share, run_seed)
    return patients_below(patients, share, split_seed, start)


def two_sides(patients: Collection[str], share: float, seed: int) -> tuple[frozenset[str], bool]:
    """`patients_below`, with at least one patient on either side.

    Where the share draws nobody, the patient nearest to it is chosen; where it draws everybody, the
    patient nearest to it is left out. That one patient can change sides when the archive grows; no
    other does.

    Args:
        patients: at least two patients.
        share: expected share, in (0, 1).
        seed: seed of the split.
    Returns:
        The chosen patients, and whether one patient was moved.
    """
    names = sorted(set(patients), key=lambda name: (position(name, seed), name))
    assert len(names) > 1, "one patient cannot be on two sides"
    chosen = patients_below(names, share, seed)
    if not chosen:
        return frozenset(names[:1]), True
    if len(chosen) == len(names):
        return frozenset(names[:-1]), True
    return chosen, False


def imbalance(patients: Collection[str], share: float, seed: int, start: float = 0.0) -> str:
    """One line about a share above 0 that holds out nobody or everybody; empty where it does not.

    The line names a seed of the split that holds out some of the patients.

    Args:
        patients, share, seed, start: as in `patients_below`.
    """
    names = set(patients)
    if share <= 0 or not names:
        return ""
    num = len(patients_below(names, share, seed, start))
    if 0 < num < len(names):
        return ""
    line = (
        f"data.held_out {share:g} holds out {'none' if num == 0 else 'all'} of the store's "
        f"patients ({len(names)}) with data.split_seed {seed}"
    )
    other = seed_with_both_sides(names, share, start)
    if other is None:
        return f"{line}; set data.held_out=0"
    count = len(patients_below(names, share, other, start))
    return f"{line}; set data.split_seed={other}, which holds out {count}, or data.held_out=0"


def seed_with_both_sides(patients: Collection[str], share: float, start: float = 0.0) -> int | None:
    """The seed among the first hundred that holds out some of the patients, as near to the share as
    one of them does; None where none does, as for one patient.

    Args:
        patients, share, start: as in `patients_below`.
    """
    names = set(patients)
    wanted = min(max(share * len(names), 1), len(names) - 1)
    best, distance = None, float("inf")
    for seed in range(100):
        count = len(patients_below(names, share, seed, start))
        if 0 < count < len(names) and abs(count - wanted) < distance:
            best, distance = seed, abs(count - wanted)
        if distance <= 0.5:  # no other seed is nearer
            break
    return best
