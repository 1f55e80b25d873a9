"""Names of labels: both schemas, values to ignore, and text that is no name."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from scan_files import save_labels

from tapct.data.labels.names import clean_names, names_in, table_of_dataset
from tapct.data.labels.reading import read_labels
from tapct.types import IGNORE_LABEL, Refused


@pytest.mark.parametrize(
    "text, kept",
    [
        ("lung_upper_lobe_left", True),
        ("Vertebra L1 (T12+)", True),
        ("Müller", False),
        ("Muster^Max", False),
        ("Muster, Max", False),
        ("a" * 64, True),
        ("a" * 65, False),
        ("", False),
        ("see\nnotes", False),
        ("=cmd", False),
        ("Muster Max", False),  # a word of the patient's name in the same file
    ],
)
def test_only_names_of_labels_are_kept(text: str, kept: bool) -> None:
    assert bool(clean_names([(1, text)], identity=("muster",))) == kept


def test_a_table_with_something_else_than_a_value_and_a_name_is_refused() -> None:
    for table in ({"liver": "one"}, {"liver": True}, {"liver": None}, {"liver": 1.5}):
        with pytest.raises(Refused, match="bad_sidecar"):
            names_in(table, "x.json")


def test_the_label_that_nnunet_calls_ignore_is_ignored(tmp_path: Path) -> None:
    path = save_labels(tmp_path / "labelsTr" / "c1.nii.gz")
    table = {"background": 0, "liver": 1, "ignore": 300}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": table}))
    labels = read_labels(path)
    assert set(labels.labels_ZYX.ravel().tolist()) == {0, 1, IGNORE_LABEL}
    assert labels.names == ((0, "background"), (1, "liver"))


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[1]", '{"labels": 3}', '{"labels": {"liver": "x"}}'),
        '{"labels": {"1": "liver", "2": "lung", "1": "spleen"}}',
        '{"labels": {"1": "liver"}, "labels": {"1": "spleen"}}',
    ],
)
def test_a_dataset_json_that_cannot_be_used_costs_no_labels(tmp_path: Path, text: str) -> None:
    path = save_labels(tmp_path / "labelsTr" / "c1.nii.gz")
    (tmp_path / "dataset.json").write_text(text)
    assert read_labels(path).names == ()
    (note,) = table_of_dataset(path).notes
    assert note.startswith("dataset.json") and "\n" not in note


def test_a_key_that_is_given_twice_beside_the_label_names_does_not_matter(tmp_path: Path) -> None:
    path = save_labels(tmp_path / "labelsTr" / "c1.nii.gz")
    (tmp_path / "dataset.json").write_text('{"name": "a", "labels": {"1": "liver"}, "name": "b"}')
    assert read_labels(path).names == ((1, "liver"),)


def test_a_dataset_json_that_could_not_be_read_once_is_read_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_labels(tmp_path / "labelsTr" / "c1.nii.gz")
    (tmp_path / "dataset.json").write_text('{"labels": {"liver": 1}}')

    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_text", fail)
        (note,) = table_of_dataset(path).notes
    assert "Input/output error" in note
    assert table_of_dataset(path).notes == () and read_labels(path).names == ((1, "liver"),)


def test_the_side_car_wins_over_dataset_json(tmp_path: Path) -> None:
    path = save_labels(tmp_path / "labelsTr" / "c1.nii.gz")
    (tmp_path / "dataset.json").write_text('{"labels": {"liver": 1}}')
    assert read_labels(path).names == ((1, "liver"),)
    (tmp_path / "labelsTr" / "c1.json").write_text('{"labels": {"Leber": 1}}')
    assert read_labels(path).names == ((1, "Leber"),)
