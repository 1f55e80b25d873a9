"""Public data sets: their files are well-formed, and each layout becomes a store and a split.

The files and what they mean are in `dataset_layouts.py`.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from dataset_layouts import LAYOUTS, lay_out
from scan_files import noise_ct, save_scan

from tapct.base.exits import UserError
from tapct.data.datasets.dataset import read_dataset, shipped_names
from tapct.data.datasets.work import PackedDataSet, prepare
from tapct.data.manifest import Manifest, read_column
from tapct.data.packed.store import Store


def rows_of(prepared: PackedDataSet) -> dict[str, dict[str, str]]:
    if prepared.scan_labels is None:
        return {}
    with prepared.scan_labels.open(newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def test_every_shipped_data_set_has_a_layout_here() -> None:
    assert set(LAYOUTS) == set(shipped_names())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_scans_labels_by_name_split_and_patients(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    root = lay_out(layout, tmp_path / "files")
    prepared = prepare(read_dataset(name), root, tmp_path / "work")
    store = Store(prepared.store)
    path_of = read_column(tmp_path / "work" / name / "manifest.parquet",
                          store.manifest_digest, "path")  # fmt: skip
    assert {path_of[scan.id] for scan in store.scans} == set(layout.scans)
    assert len({scan.patient for scan in store.scans}) == layout.patients
    for number, scan in enumerate(store.scans):
        if not layout.values:
            assert not scan.label_digest
            continue
        labels = store.read_labels(number)
        names = dict(labels.names)
        found = {int(value): names[value] for value in np.unique(labels.labels_ZYX) if value}
        expected = {
            (int(one), other) if isinstance(one, int) else (int(other), one)
            for one, other in layout.values.items()
        }
        assert set(found.items()) == expected
    rows = rows_of(prepared)
    assert {path: row["split"] for path, row in rows.items() if row.get("split")} == dict(
        layout.sides
    )
    for path, targets in layout.targets.items():
        assert targets.items() <= rows[path].items()


@pytest.fixture
def word(tmp_path: Path) -> Path:
    return lay_out(LAYOUTS["word"], tmp_path / "word")


def test_a_second_call_reads_nothing_again_unless_a_file_has_changed(
    word: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, work = read_dataset("word"), tmp_path / "work"
    prepare(dataset, word, work)
    manifest = work / "word" / "manifest.parquet"
    first = (manifest.read_bytes(), manifest.stat().st_mtime_ns)
    capsys.readouterr()
    prepare(dataset, word, work)
    assert (manifest.read_bytes(), manifest.stat().st_mtime_ns) == first
    assert "no file has changed" in capsys.readouterr().out
    save_scan(word / "imagesTr" / "word_0002.nii.gz", noise_ct(99))
    prepare(dataset, word, work)
    assert manifest.read_bytes() != first[0]
    assert len(Manifest.read(manifest).accepted) == 4


def test_a_store_that_was_removed_is_packed_again_with_the_same_labels(
    word: Path, tmp_path: Path
) -> None:
    dataset, work = read_dataset("word"), tmp_path / "work"
    first = Store(prepare(dataset, word, work).store)
    digest, names = first.digest, first.read_labels(0).names
    shutil.rmtree(work / "word" / "store")
    again = Store(prepare(dataset, word, work).store)
    assert (again.digest, again.read_labels(0).names) == (digest, names)
    assert [scan.label_digest for scan in again.scans] == [s.label_digest for s in first.scans]


@pytest.mark.parametrize(
    "missing, words",
    [
        (
            "imagesTs",
            ["scans of the official test side", "imagesTs/*", "github.com/HiLab-git/WORD"],
        ),
        ("labels*", ["no label maps", "labelsTr/word_*.nii.gz", "research only"]),
        ("images*", ["no scans of word", "imagesTr/word_*.nii.gz"]),
    ],
)
def test_a_one_line_error_names_missing_files_before_anything_is_read(
    word: Path, tmp_path: Path, missing: str, words: list[str]
) -> None:
    for folder in word.glob(missing):
        folder.rename(tmp_path / folder.name)
    with pytest.raises(UserError) as caught:
        prepare(read_dataset("word"), word, tmp_path / "work")
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value) and not (tmp_path / "work").exists()


def test_values_that_are_no_labels_of_the_data_set_are_named(
    word: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.zeros((6, 24, 26), np.uint8)
    labels[2:4, 3:9, 3:9], labels[2:4, 12:15, 3:9] = 1, 17
    save_scan(word / "labelsTr" / "word_0002.nii.gz", labels)
    prepare(read_dataset("word"), word, tmp_path / "work")
    printed = " ".join(capsys.readouterr().out.split())
    assert "label maps with values that are no label of word: 1;" in printed
    assert (
        "labelsTr/word_0002.nii.gz: its labels: values without a name in the data set: 17"
        in printed
    )


def test_without_its_split_a_data_set_needs_no_test_side(word: Path, tmp_path: Path) -> None:
    (word / "imagesTs").rename(tmp_path / "imagesTs")
    prepared = prepare(read_dataset("word"), word, tmp_path / "work", with_split=False)
    assert prepared.scan_labels is None


def test_a_folder_above_the_data_set_is_recognised(word: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean --root \S+/word\?"):
        prepare(read_dataset("word"), word.parent, tmp_path.parent / "elsewhere")


def test_nothing_is_written_into_the_folder_of_the_data(word: Path) -> None:
    with pytest.raises(UserError, match="lies in the folder of the data"):
        prepare(read_dataset("word"), word, word / "work")


def test_tables_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    root = lay_out(LAYOUTS["cvpr26-amos"], tmp_path / "files")
    (root / "labels/gallstone.csv").write_text(
        "case_id,gallstone,split\namos_0001.nii.gz,1,val\namos_0038.nii.gz,0,test\n"
    )
    with pytest.raises(UserError, match=r"eval.scan_labels=\S+gallstone.csv"):
        prepare(read_dataset("cvpr26-amos"), root, tmp_path / "work")


@pytest.mark.parametrize(
    "edit, words",
    [
        ("scans: 3", ["own.yaml:7: scans = 3", "must be a list"]),
        ("scanz: [a]", ["own.yaml:7", "scanz", "scans"]),
        ("labels: {0: liver}", ["own.yaml:7: labels.0", "from 1 to 65534"]),
        ("labels: {1: a, 2: a}", ["own.yaml:7: labels.2", "same name"]),
        ("labels: {1: 'prostate/uterus'}", ["own.yaml:7: labels.1", "letters"]),
        ("labels: [liver]", ["own.yaml:7: labels", "table"]),
        ("masks: [m/*]", ["labels is missing"]),
        ("split: {train: [a]}", ["own.yaml:7: split", "train and test"]),
        ("split: {table: a.csv}", ["own.yaml:7: split", "key and column"]),
    ],
)
def test_a_wrong_key_is_an_error_with_its_line(tmp_path: Path, edit: str, words: list[str]) -> None:
    text = "title: t\nlicence: l\nask: a\npatient: '(p)'\n\n"
    base = "" if edit.startswith("scan") else "scans: [s/*]"
    (tmp_path / "own.yaml").write_text(f"{text}{base}\n{edit}\n")
    with pytest.raises(UserError) as caught:
        read_dataset(tmp_path / "own.yaml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("key", ["title", "licence", "ask", "scans", "patient"])
def test_a_required_key_is_named(tmp_path: Path, key: str) -> None:
    keys = {"title": "t", "licence": "l", "ask": "a", "scans": "[s/*]", "patient": "'(p)'"}
    text = "".join(f"{name}: {value}\n" for name, value in keys.items() if name != key)
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=f"{key} is missing"):
        read_dataset(tmp_path / "own.yaml")


def test_a_wrong_name_gets_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean amos22"):
        read_dataset("amos2")
    (tmp_path / "My_scans.yaml").write_text("title: t\n")
    with pytest.raises(UserError, match=r"My_scans.yaml: .*hyphens"):
        read_dataset(tmp_path / "My_scans.yaml")


def test_the_class_maps_are_those_of_the_sources() -> None:
    v1, v2 = (dict(read_dataset(name).label_names) for name in ("totalsegmentator-v1",
                                                              "totalsegmentator"))  # fmt: skip
    assert (len(v1), len(v2)) == (104, 117)
    assert (v1[18], v1[73], v1[92]) == ("vertebrae_L5", "rib_right_4", "sacrum")
    assert (v2[26], v2[63], v2[104]) == ("vertebrae_S1", "inferior_vena_cava", "rib_right_1")
    assert all(read_dataset(name).facts.sources for name in shipped_names())
