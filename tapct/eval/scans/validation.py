"""Validation patients: a part of the test patients on whom a checkpoint may be chosen.

An evaluation tests either on them or on the other test patients, never on both. They depend on
`data.split_seed` and on the patient alone, so a patient does not change sides when others are added
or removed, unless there would be none on one of the sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tapct.base.exits import UserError
from tapct.base.hashing import MASK_64, hash_int
from tapct.data.patients.split import two_sides
from tapct.eval.scans.train_test import BLOCKS, VAL, Split
from tapct.eval.scans.usable import ScanRow


def divided(
    split: Split,
    share: float,
    split_seed: int,
    *,
    on_validation: bool,
    sides: Mapping[str, str] | None = None,
) -> Split:
    """The split of an evaluation on the validation patients, or on the other test patients.

    Args:
        split: training and test scans.
        share: `eval.validation_share`, above 0.
        split_seed: `data.split_seed`.
        on_validation: whether to test on the validation patients.
        sides: official split, `train`, `val` or `test` by scan ID; its validation scans are used,
            and its test scans are not divided. Empty or None where there is none.
    Raises:
        UserError: there are no validation patients.
    """
    if sides:
        return _official(split, sides, on_validation=on_validation)
    if split.mode == BLOCKS:
        raise UserError(
            f"eval.validation_share {share:g} needs patients to divide, and all scans are of one "
            "patient; set eval.validation_share=0"
        )
    patients = sorted({_patient(row) for row in split.test})
    if len(patients) < 2:
        raise UserError(
            f"eval.validation_share {share:g} needs at least two test patients, and there is "
            f"{len(patients)}; raise data.held_out or eval.test_share, or set "
            "eval.validation_share=0"
        )
    # Held-out patients are chosen by `data.split_seed` too. Another seed is derived from it: by the
    # same one, all held-out patients would lie on one side.
    seed = hash_int(split_seed, "validation patients") & (MASK_64 >> 1)
    chosen, _ = two_sides(patients, share, seed)
    test = tuple(row for row in split.test if (_patient(row) in chosen) == on_validation)
    return replace(split, test=test)


def _official(split: Split, sides: Mapping[str, str], *, on_validation: bool) -> Split:
    """The validation scans of an official split are among its training scans."""
    if not on_validation:
        return split
    validation = tuple(row for row in split.train if sides.get(row.id) == VAL)
    train = tuple(row for row in split.train if sides.get(row.id) != VAL)
    if not validation or not train:
        raise UserError(
            f"the official split of eval.scan_labels has {len(validation)} validation scans and "
            f"{len(train)} training scans, and eval.validation_share needs both; set "
            "eval.validation_share=0, or eval.split_column=none to divide the scans by patient"
        )
    return replace(split, train=train, test=validation)


def _patient(row: ScanRow) -> str:
    return row.patient or row.id
