"""Labels of scans as a whole from a CSV file."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import pytest

from tapct.base.exits import UserError
from tapct.eval.contract import Task
from tapct.eval.labels.scan_values import Kind, kind_of, read_scan_labels
from tapct.eval.passes.task_runs import usable_rows
from tapct.eval.scans.labelled_scan import TableLabels
from tapct.eval.scans.train_test import PATIENTS, split_for_tasks
from tapct.eval.scans.usable import Labels


@dataclass(frozen=True)
class Row:
    id: str
    path: str
    patient: str = ""
    has_labels: bool = True


ROWS = (
    Row("1" * 16, "a/one.nii.gz", "p1"),
    Row("2" * 16, "a/two.nii.gz", "p2"),
    Row("3" * 16, "b/two.nii.gz", "p3"),
    Row("4" * 16, "imagesTr/case_007_0000.nii.gz", "p4"),
    Row("5" * 16, "dicom/P0009/IM0001", "p5"),
)
NUMBERS = "1", "2", "3", "4", "5"


def read(folder: Path, content: str | bytes, split_column: str = "auto"):
    file = folder / "labels.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_scan_labels(file, ROWS, split_column)


def by_number(values) -> dict[str, object]:
    """Scan IDs of one repeated digit as that digit."""
    return {scan_id[0]: value for scan_id, value in values.items()}


def test_scans_are_named_by_path_stem_case_folder_or_id(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        f"path,age\na/one.nii.gz,1\na/two,2\nb\\two.nii.gz,3\ncase_007,4\n{'5' * 16},5\n",
    )
    assert by_number(table.values) == {n: {"age": float(n)} for n in NUMBERS}
    assert by_number(read(tmp_path, "case_id,age\nP0009,9\none,1\n").values) == {
        "5": {"age": 9.0},
        "1": {"age": 1.0},
    }


def test_rows_without_a_scan_and_with_several_are_counted_and_named(tmp_path: Path) -> None:
    names = [f"gone{n}" for n in range(7)]
    lines = "".join(f"{name},0\n" for name in (*names, "two", "one"))
    table = read(tmp_path, "id,cancer\n" + lines)
    assert table.summary == (
        "scan labels: 1 of 5 scans; unmatched rows: 7 (gone0, gone1, gone2, gone3, gone4 and 2 "
        "more); rows that several scans match: 1 (two); targets: cancer (binary)"
    )


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["0", "1", "1"], Kind.BINARY),
        (["1", "1"], Kind.BINARY),
        (["0.0", "1"], Kind.BINARY),
        (["No", "yes"], Kind.BINARY),
        (["TRUE", "false"], Kind.BINARY),
        (["present", "absent"], Kind.BINARY),
        (["yes", "1"], Kind.CATEGORY),
        (["0", "1", "2"], Kind.NUMBER),
        (["1", "2"], Kind.NUMBER),
        (["-1.5e2", "7"], Kind.NUMBER),
        (["1", "inf"], Kind.CATEGORY),
        (["F", "M"], Kind.CATEGORY),
        (["F"], Kind.CATEGORY),
        (["native", "venous", "arterial"], Kind.CATEGORY),
    ],
)
def test_the_type_of_a_target_follows_from_all_of_its_values(texts, kind) -> None:
    assert kind_of(texts) is kind


def test_columns_that_identify_people_are_no_targets(tmp_path: Path) -> None:
    names = "PatientID,Patient Name,subject-id,MRN,AccessionNumber,Study_Date,VolumeName"
    rows = "".join(f"{n * 16},{n},7{n},Doe,{n}9,{n}8,{n}7,2020010{n},v{n}\n" for n in NUMBERS)
    table = read(tmp_path, f"id,patients_in_room,{names}\n{rows}")
    assert list(table.kinds) == ["patients_in_room"]
    assert by_number(table.values) == {n: {"patients_in_room": float(n)} for n in NUMBERS}
    assert f"columns that identify and are not read: {', '.join(names.split(','))}" in table.summary


def test_values_have_the_type_of_their_target_and_empty_cells_are_unknown(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        "path,patient,lesion,size_mm,side,notes\n"
        "a/one,P1,yes,12.5,left,\n"
        "a/two,P2,no,nan,NA,\n"
        "b/two,P3,,7,right,\n",
    )
    assert table.kinds == {
        "lesion": Kind.BINARY,
        "size_mm": Kind.NUMBER,
        "side": Kind.CATEGORY,
    }
    assert by_number(table.values) == {
        "1": {"lesion": True, "size_mm": 12.5, "side": "left"},
        "2": {"lesion": False},
        "3": {"size_mm": 7.0, "side": "right"},
    }
    assert type(table.values["1" * 16]["lesion"]) is bool


@pytest.mark.parametrize("word", ["", "NaN", "-nan", "N/A", "#N/A", "<NA>", "NULL", "null"])
def test_what_programs_write_for_an_unknown_value_does_not_make_a_number_a_category(
    tmp_path: Path, word: str
) -> None:
    table = read(tmp_path, f"path,age\na/one,61\na/two,{word}\nb/two,48\n")
    assert table.kinds == {"age": Kind.NUMBER}
    assert by_number(table.values) == {"1": {"age": 61.0}, "2": {}, "3": {"age": 48.0}}


def test_a_category_of_numbers_is_explained(tmp_path: Path) -> None:
    table = read(tmp_path, "path,age,phase\na/one,61,1\na/two,unknown,native\nb/two,48,venous\n")
    assert table.kinds["age"] is Kind.CATEGORY
    assert table.summary.endswith(
        "; age is a category, because 1 of 3 values is no number, e.g. 'unknown'; leave the cell "
        "of an unknown value empty"
    )


def test_the_files_that_spreadsheets_write_are_read_alike(tmp_path: Path) -> None:
    plain = "path,grade,size\na/one,low,1.5\na/two,high,2.25\n"
    german = "path;grade;size\r\na/one;low;1,5\r\na/two;high;2,25\r\n;;\r\n"
    expected = read(tmp_path, plain)
    for content in (
        german,
        b"\xef\xbb\xbf" + german.encode(),
        "sep=;\r\n" + german,
        plain.replace(",", "\t"),
        "Path , grade,size,,\na/one, low,1.5,,\n\n,,,,\na/two,high ,2.25,,\n",
        "\ufeff" + plain.replace("low", '"low"'),
    ):
        found = read(tmp_path, content)
        assert (found.values, found.digest) == (expected.values, expected.digest), content


def test_the_digest_follows_values_and_not_the_order_of_rows(tmp_path: Path) -> None:
    one = read(tmp_path, "path,age\na/one,1\na/two,2\n")
    assert read(tmp_path, "path,age\na/two,2\na/one,1.0\n").digest == one.digest
    assert read(tmp_path, "path,age\na/one,1\na/two,3\n").digest != one.digest


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("name,age\none,1\n", "has no column that names the scans; rule: one of path, case_id, id"),
        ("", "has no column that names the scans"),
        ("path\na/one\n", "no column with a target that has values"),
        ("path,age\na/one,\n", "no column with a target that has values"),
        ("path,patient\na/one,P1\n", "no column with a target"),
        ("path,age\nx,1\n", "none of the 1 rows"),
        ("path,age\na/one,1\n,2\n", "line 3 of"),
        ("path,age\na/one,1\none,2\n", "two values of age: '1' and '2'"),
        ("path,age,age\na/one,1,2\n", "2 columns with the name 'age'"),
        ("path,age\na/one,1,5\n", "line 2 of"),
        (b"path,age\na/\xe4,1\n", "not a table in UTF-8"),
        ("path,age,split\na/one,1,maybe\n", "holds 'maybe'; rule: train, val or test"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path: Path, content, part: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("eval.scan_labels: ")


def test_the_path_of_the_table_is_expanded(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "t.csv").write_text("path,age\na/one,1\n")
    monkeypatch.setenv("TABLES", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in ("$TABLES/t.csv", "~/t.csv"):
        assert by_number(read_scan_labels(file, ROWS).values) == {"1": {"age": 1.0}}
    with pytest.raises(UserError, match="cannot read .*gone.csv"):
        read_scan_labels(tmp_path / "gone.csv", ROWS)


def test_without_the_manifest_the_next_step_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,age\na/one,1\n")
    with pytest.raises(UserError, match="only the manifest holds"):
        read_scan_labels(tmp_path / "t.csv", [Row("1" * 16, "")])
    (tmp_path / "t.csv").write_text(f"id,age\n{'1' * 16},1\n")  # the scan ID needs no path
    assert read_scan_labels(tmp_path / "t.csv", [Row("1" * 16, "")]).values


SPLIT = """case_id,finding,split,fold0,fold1
one,1,train,test,train
a/two,0,validation,train,test
b/two,1,Test,train,train
case_007,0,test,val,val
P0009,0,,,
"""


def test_an_official_split_is_found_and_followed(tmp_path: Path, capsys) -> None:
    table = read(tmp_path, SPLIT)
    assert table.kinds == {"finding": Kind.BINARY}
    assert table.split_column == "split"
    assert by_number(table.sides) == {"1": "train", "2": "val", "3": "test", "4": "test"}
    choose = {"test_share": 0.5, "max_scans": 0, "seed": 0, "sides": table.sides}
    split = split_for_tasks([ROWS[2:], ROWS], held_out={"p1"}, **choose)
    assert split.mode == PATIENTS and not split.tests_held_out
    assert [row.id[0] for row in split.train] == ["1", "2"]
    assert [row.id[0] for row in split.test] == ["3", "4"]
    assert "1 of 5 scans have no side in the official split" in capsys.readouterr().out

    by_fold = read(tmp_path, SPLIT.replace("split,", "round,"))
    assert by_fold.split_column == "fold0"
    assert set(by_fold.kinds) == {"finding", "round"}
    assert by_number(by_fold.sides) == {"1": "test", "2": "train", "3": "train", "4": "val"}
    assert by_number(read(tmp_path, SPLIT, "fold1").sides)["2"] == "test"
    assert read(tmp_path, SPLIT, "none").sides == {}
    with pytest.raises(UserError, match="eval.split_column is 'fold7', which is no column"):
        read(tmp_path, SPLIT, "fold7")


def test_an_official_split_that_cannot_hold_is_one_line() -> None:
    choose = {"test_share": 0.5, "max_scans": 0, "seed": 0}
    with pytest.raises(UserError, match="1 training and validation scans and 0 test scans"):
        split_for_tasks([ROWS], sides={"1" * 16: "train"}, **choose)
    same = (Row("1" * 16, "x", "p"), Row("2" * 16, "y", "p"))
    with pytest.raises(UserError, match="1 patients with test scans and other scans"):
        split_for_tasks([same], sides={"1" * 16: "train", "2" * 16: "test"}, **choose)


def test_max_scans_shrinks_both_sides_of_an_official_split() -> None:
    rows = [Row(f"s{n:02}", f"{n}.nii", f"p{n}") for n in range(20)]
    sides = {row.id: "test" if n % 4 == 0 else "train" for n, row in enumerate(rows)}
    split = split_for_tasks([rows], test_share=0.5, max_scans=8, seed=3, sides=sides)
    assert (len(split.train), len(split.test)) == (6, 2)
    assert {sides[row.id] for row in split.test} == {"test"}


class Named:
    """A task that names targets."""

    labels = Labels.SCAN

    def __init__(self, *names: str) -> None:
        self.names = names

    def named_labels(self):
        return {"targets": self.names}


def test_a_task_gets_the_scans_with_a_target_that_its_settings_name(capsys) -> None:
    values = {"1" * 16: {"age": 1.0}, "2" * 16: {"sex": "F"}, "3" * 16: {"age": 3.0, "sex": "M"}}
    tables = TableLabels(values)

    def usable(*names: str) -> list[str]:
        tasks: dict[str, Task] = {"probe": Named(*names)}  # type: ignore[dict-item]
        return [row.id[0] for row in usable_rows(tasks, ROWS, tables)["probe"]]

    assert usable() == ["1", "2", "3"]
    assert usable("age") == ["1", "3"]
    assert "probe: 3 of 5 scans have no scan-level label and are skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"probe.targets names 'size', .*they have age, sex"):
        usable("age", "size")


def test_a_table_written_by_the_csv_module_is_read_back(tmp_path: Path) -> None:
    names = ['odd, "quoted"', "two\nlines", "ümlaut"]
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "text"])
        writer.writerows(zip(("a/one", "a/two", "b/two"), names))
    found = by_number(read_scan_labels(tmp_path / "t.csv", ROWS).values)
    assert [found[n]["text"] for n in ("1", "2", "3")] == names
