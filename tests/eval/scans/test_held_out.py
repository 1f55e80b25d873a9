"""The claim that test scans were held out: against a loop over all pairs, and in words."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tapct.data.packed import trained_on
from tapct.data.packed.trained_on import SeenScan, TrainedOn
from tapct.eval.results.json_file import SplitRecord, UnreadScan
from tapct.eval.scans.held_out import HeldOut, check
from tapct.eval.scans.train_test import BLOCKS, PATIENTS


@dataclass(frozen=True)
class Row:
    id: str
    patient: str
    path: str = ""
    label_path: str = ""


@pytest.mark.parametrize("seed", range(30))
def test_the_counts_equal_a_loop_over_all_pairs(seed: int) -> None:
    draw = random.Random(seed)
    seen = [
        SeenScan(f"d{draw.randrange(12)}", f"p{draw.randrange(9)}", draw.choice(["k", "k", "k2"]))
        for _ in range(draw.randrange(1, 6))
    ]
    test = [Row(f"s{n}", f"p{draw.randrange(9)}") for n in range(draw.randrange(1, 8))]
    digests = {row.id: f"d{draw.randrange(12)}" for row in test}
    same_voxels, same_patient = set(), set()
    for row, scan in itertools.product(test, seen):
        if digests[row.id] == scan.digest:
            same_voxels.add(row.id)
        if (row.patient, "k") == (scan.patient, scan.patient_key):
            same_patient.add(row.id)
    for row, other in itertools.product(test, test):
        if row.patient == other.patient and other.id in same_voxels:
            same_patient.add(row.id)
    found = check(
        test,
        rows=test,
        digests=digests,
        patient_key="k",
        trained_on=TrainedOn(dict.fromkeys(seen, 0)),
    )
    assert found.num_scans == len(same_voxels)
    assert found.num_patients == len(same_patient - same_voxels)
    can_compare = {scan.patient_key for scan in seen} == {"k"}
    if same_voxels | same_patient:
        assert found.value is False
    else:
        assert found.value == (True if can_compare else "unknown")
    assert (found.caveat() == "") == (found.value is True)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (HeldOut(6), ""),
        (HeldOut(6, 4), "4 of 6 test scans were pretrained on"),
        (HeldOut(1, 1), "1 of 1 test scan was pretrained on"),
        (HeldOut(6, 4, unknown="x"), "at least 4 of 6 test scans were pretrained on"),
        (
            HeldOut(6, 0, 2),
            "2 of 6 test scans are of patients whose other scans were pretrained on",
        ),
        (
            HeldOut(6, 3, 1),
            "3 of 6 test scans were pretrained on, and 1 is of patients whose other scans were "
            "pretrained on",
        ),
        (HeldOut(6, unknown="y"), "whether the test scans were pretrained on is unknown: y"),
    ],
)
def test_the_caveat_is_one_line(found: HeldOut, line: str) -> None:
    assert found.caveat() == line


def test_a_split_names_everything_that_a_reader_must_know() -> None:
    assert SplitRecord(PATIENTS, HeldOut(2), ("a",), ("b", "c")).caveat == ""
    unread = (UnreadScan("d", "test", "damaged"), UnreadScan("e", "train", "damaged"))
    split = SplitRecord(BLOCKS, HeldOut(2, 2), ("a",), ("b", "c"), unread)
    assert split.caveat == (
        "trained and tested on scans of one patient: a fit, not generalisation; "
        "2 of 2 test scans were pretrained on; 1 of 2 training scans could not be read and were "
        "skipped; 1 of 3 test scans could not be read and were skipped"
    )


def test_a_scan_without_a_patient_leaves_the_claim_open() -> None:
    seen = TrainedOn({SeenScan("d", "p", "k"): 0})
    for row, trained in (
        (Row("s", ""), seen),
        (Row("s", "q"), TrainedOn({SeenScan("d", "", "k"): 0})),
    ):
        found = check([row], rows=[row], digests={"s": "e"}, patient_key="k", trained_on=trained)
        assert found.value == "unknown" and "not known" in found.caveat()


def test_a_patient_with_another_hash_is_found_by_a_scan_that_was_trained_on() -> None:
    """The first index guessed the patient `p`; a later one has the follow-up too, and a table."""
    trained = TrainedOn({SeenScan("d1", "p", "k"): 0})
    rows = [Row("first", "q"), Row("follow-up", "q"), Row("other", "r")]
    digests = {"first": "d1", "follow-up": "d2", "other": "d3"}
    for key in ("k", "another key"):
        found = check(rows[1:], rows=rows, digests=digests, patient_key=key, trained_on=trained)
        assert (found.num_scans, found.num_patients, found.value) == (0, 1, False)
    found = check(rows[2:], rows=rows, digests=digests, patient_key="k", trained_on=trained)
    assert found.value is True


@pytest.mark.parametrize(
    ("seen_rule", "test_rule", "is_in_store", "value"),
    [
        ("header", "header", False, True),
        ("side_car", "header", False, True),
        ("guess", "guess", False, True),
        ("guess", "header", False, "unknown"),
        ("header", "study", False, "unknown"),
        ("kept", "kept", False, "unknown"),
        ("header", "kept", False, "unknown"),
        ("", "header", False, "unknown"),
        ("header", "", False, "unknown"),
        ("guess", "header", True, True),
        ("", "kept", True, True),
    ],
)
def test_patients_by_different_rules_are_compared_within_one_store_alone(
    seen_rule: str, test_rule: str, is_in_store: bool, value: bool | str
) -> None:
    seen = TrainedOn({SeenScan("d1", "p", "k", seen_rule): 0})
    rows = [Row("test", "q"), Row("other", "r")]
    digests = {"test": "d2", "other": "d1" if is_in_store else "d3"}
    rules = {"test": test_rule, "other": test_rule}
    found = check(
        rows[:1],
        rows=rows,
        digests=digests,
        patient_key="k",
        trained_on=seen,
        patient_rules=rules,
    )
    assert found.value == value
    assert ("patients were identified by other rules" in found.caveat()) == (value == "unknown")


def test_an_overlap_outranks_rules_that_differ() -> None:
    seen = TrainedOn({SeenScan("d1", "p", "k", "guess"): 0, SeenScan("d5", "p5", "k", "guess"): 0})
    rows = [Row("test", "q"), Row("follow-up", "q"), Row("else", "r")]
    digests = {"test": "d1", "follow-up": "d2", "else": "d3"}
    rules = dict.fromkeys(digests, "header")

    def checked(test: list[Row]) -> HeldOut:
        return check(
            test, rows=rows, digests=digests, patient_key="k", trained_on=seen, patient_rules=rules
        )

    found = checked(rows[:2])
    assert (found.num_scans, found.num_patients, found.unknown) == (1, 1, "")
    found = checked(rows)
    assert found.value is False and found.caveat().startswith("at least 1 of 3 test scans was")


def test_a_list_of_an_earlier_version_does_not_know_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    TrainedOn({SeenScan("a", "p", "k", "header"): 3}).write(path)
    assert trained_on.read(path) == TrainedOn({SeenScan("a", "p", "k", "header"): 3})
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["patient_from"]), path)
    assert trained_on.read(path) == TrainedOn({SeenScan("a", "p", "k", ""): 3})


def test_the_list_comes_back_and_a_damaged_one_is_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    one = TrainedOn({SeenScan("a", "p", "k"): 0, SeenScan("b", "q", "k"): 40}, ("weights of X",))
    one.write(path)
    assert trained_on.read(path) == one
    assert one.before(40).from_step == {SeenScan("a", "p", "k"): 0}
    assert one.before(41) == one
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read" in trained_on.read(path).unknown[0]
    assert trained_on.read(tmp_path / "nowhere").unknown
