"""`eval.only` chooses scans by the pattern of their path."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tapct.base.exits import UserError
from tapct.eval.scans.usable import of_paths


@dataclass(frozen=True)
class Row:
    path: str
    id: str = "x"
    patient: str = ""
    has_labels: bool = False


ROWS = [Row("ts_body/a.nii.gz"), Row("ts_body/b.nii.gz"), Row("lung/a.nrrd")]


def test_patterns_choose_by_whole_path_and_none_takes_all() -> None:
    assert of_paths(ROWS, ()) == ROWS
    assert of_paths(ROWS, ("ts_body/*",)) == ROWS[:2]
    assert of_paths(ROWS, ("*/a.*",)) == [ROWS[0], ROWS[2]]


def test_a_pattern_that_matches_nothing_is_an_error_with_an_example() -> None:
    with pytest.raises(UserError, match="matches none of the 3 scans, e.g. ts_body/a.nii.gz"):
        of_paths(ROWS, ("a.nii.gz",))
