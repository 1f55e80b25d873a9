"""Public data sets: their files are well-formed, and each layout goes from files to store and split.

What a scan, a label value, a side and a patient are is written down here a second time, by hand.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from scan_files import noise_ct, save_scan

from tapct.base.exits import UserError
from tapct.data.dataset_work import Prepared, prepare
from tapct.data.datasets import read_dataset, shipped_names
from tapct.data.manifest import Manifest, read_column
from tapct.data.store import Store

SHAPE = (6, 24, 26)


@dataclass(frozen=True)
class Layout:
    """Files of a data set, and what they mean.

    Args:
        scans: scan -> its label map, or folder of masks, or "".
        values: label values in every label map, or names of masks -> name in the store.
        sides: scan -> side of the official split.
        patients: number of patients of the scans.
        tables: file -> text.
        others: further scan files, which do not belong to the data set.
        targets: scan -> target -> value, of some targets.
    """

    scans: Mapping[str, str]
    values: Mapping[int | str, str]
    sides: Mapping[str, str] = field(default_factory=dict)
    patients: int = 4
    tables: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    targets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def numbered(scan: str, mask: str, numbers: tuple[int, ...]) -> dict[str, str]:
    return {scan.format(number): mask.format(number) for number in numbers}


def msd(stem: str, values: Mapping[int | str, str]) -> Layout:
    pair = (f"imagesTr/{stem}_{{}}.nii.gz", f"labelsTr/{stem}_{{}}.nii.gz")
    return Layout(numbered(*pair, (1, 12, 103, 7)), values, others=(f"imagesTs/{stem}_2.nii.gz",))


TOTAL = numbered("s{:04d}/ct.nii.gz", "s{:04d}/segmentations", (0, 3, 11, 250))
TOTAL_TABLE = "image_id;age;split\ns0000;50;train\ns0003;;val\ns0011;70;test\ns0250;9;train\n"
TOTAL_SIDES = dict(zip(TOTAL, ("train", "val", "test", "train")))
SERIES = [f"1.3.6.1.4.1.14519.5.2.1.6279.6001.10{number}" for number in range(4)]
RATE = [
    "train_fixed/train_1/train_1_a/train_1_a_1.nii.gz",
    "train_fixed/train_1/train_1_a/train_1_a_2.nii.gz",
    "train_fixed/train_20/train_20_b/train_20_b_1.nii.gz",
    "valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz",
]
LAYOUTS = {
    "amos22": Layout(
        {
            **numbered("imagesTr/amos_{:04d}.nii.gz", "labelsTr/amos_{:04d}.nii.gz", (1, 4, 38)),
            **numbered("imagesVa/amos_{:04d}.nii.gz", "labelsVa/amos_{:04d}.nii.gz", (8,)),
        },
        {1: "spleen", 6: "liver", 15: "prostate or uterus"},
        {
            "imagesTr/amos_0001.nii.gz": "train",
            "imagesTr/amos_0004.nii.gz": "train",
            "imagesTr/amos_0038.nii.gz": "train",
            "imagesVa/amos_0008.nii.gz": "test",
        },
        others=("imagesTr/amos_0507.nii.gz", "imagesTs/amos_0002.nii.gz"),
    ),
    "btcv": Layout(
        numbered(
            "Training/img/img{:04d}.nii.gz", "Training/label/label{:04d}.nii.gz", (1, 2, 10, 40)
        ),
        {1: "spleen", 10: "portal vein and splenic vein", 13: "left adrenal gland"},
        others=("Testing/img/img0061.nii.gz",),
    ),
    "msd-liver": msd("liver", {1: "liver", 2: "tumour"}),
    "msd-lung": msd("lung", {1: "cancer"}),
    "msd-pancreas": msd("pancreas", {1: "pancreas", 2: "cancer"}),
    "msd-hepatic-vessel": msd("hepaticvessel", {1: "vessel", 2: "tumour"}),
    "msd-spleen": msd("spleen", {1: "spleen"}),
    "msd-colon": msd("colon", {1: "colon cancer primaries"}),
    # the values are those of the class map, and not the order of the files
    "totalsegmentator": Layout(
        TOTAL,
        {"spleen": "1", "aorta": "52", "rib_left_1": "92", "costal_cartilages": "117"},
        TOTAL_SIDES,
        tables={"meta.csv": TOTAL_TABLE},
    ),
    "totalsegmentator-v1": Layout(
        TOTAL,
        {"spleen": "1", "aorta": "7", "face": "93", "urinary_bladder": "104"},
        TOTAL_SIDES,
        tables={"meta.csv": TOTAL_TABLE},
    ),
    "lits17": Layout(
        {
            **numbered(
                "Training Batch 1/volume-{}.nii", "Training Batch 1/segmentation-{}.nii", (0, 27)
            ),
            **numbered(
                "Training Batch 2/volume-{}.nii", "Training Batch 2/segmentation-{}.nii", (28, 130)
            ),
        },
        {1: "liver", 2: "tumour"},
        others=("test-volume-0.nii",),
    ),
    "kits23": Layout(
        numbered(
            "case_{:05d}/imaging.nii.gz", "case_{:05d}/segmentation.nii.gz", (0, 21, 299, 588)
        ),
        {1: "kidney", 2: "tumor", 3: "cyst"},
    ),
    "flare22": Layout(
        numbered(
            "images/FLARE22_Tr_{:04d}_0000.nii.gz", "labels/FLARE22_Tr_{:04d}.nii.gz", (1, 2, 9, 50)
        ),
        {1: "liver", 5: "aorta", 13: "left kidney"},
    ),
    "word": Layout(
        {
            **numbered("imagesTr/word_{:04d}.nii.gz", "labelsTr/word_{:04d}.nii.gz", (2, 5)),
            **numbered("imagesVal/word_{:04d}.nii.gz", "labelsVal/word_{:04d}.nii.gz", (1,)),
            **numbered("imagesTs/word_{:04d}.nii.gz", "labelsTs/word_{:04d}.nii.gz", (14,)),
        },
        {1: "liver", 11: "intestine", 16: "right head of femur"},
        {
            "imagesTr/word_0002.nii.gz": "train",
            "imagesTr/word_0005.nii.gz": "train",
            "imagesVal/word_0001.nii.gz": "val",
            "imagesTs/word_0014.nii.gz": "test",
        },
    ),
    "ct-rate": Layout(
        dict.fromkeys(RATE, ""),
        {},
        dict(zip(RATE, ("train", "train", "train", "test"))),
        patients=3,
        tables={
            "multi_abnormality_labels/train_predicted_labels.csv": (
                "VolumeName,Emphysema,Lung nodule\ntrain_1_a_1.nii.gz,1,0\n"
                "train_1_a_2.nii.gz,1,0\ntrain_20_b_1.nii.gz,0,1\ntrain_9_a_1.nii.gz,0,1\n"
            ),
            "multi_abnormality_labels/valid_predicted_labels.csv": (
                "VolumeName,Emphysema,Lung nodule\nvalid_1_a_1.nii.gz,0,0\n"
            ),
        },
        others=("train/train_1/train_1_a/train_1_a_1.nii.gz",),
        targets={RATE[1]: {"Emphysema": "1", "Lung nodule": "0"}, RATE[3]: {"Emphysema": "0"}},
    ),
    "luna16": Layout(
        {
            f"subset{number}/{series}.mhd": f"seg-lungs-LUNA16/{series}.mhd"
            for number, series in enumerate(SERIES)
        },
        {3: "lung (3)", 5: "trachea"},
        tables={
            "annotations.csv": "seriesuid,coordX,coordY,coordZ,diameter_mm\n"
            f"{SERIES[1]},1.5,2.5,-3,5.1\n{SERIES[1]},8,2,-3,4.1\n"
        },
        targets={f"subset{n}/{SERIES[n]}.mhd": {"nodule": str(int(n == 1))} for n in range(4)},
    ),
    "cvpr26-amos": Layout(
        numbered("images/amos_{:04d}.nii.gz", "totalseg/amos_{:04d}.nii.gz", (1, 4, 38, 8)),
        {1: "spleen", 5: "liver", 117: "costal_cartilages"},
        {
            "images/amos_0001.nii.gz": "train",
            "images/amos_0004.nii.gz": "val",
            "images/amos_0038.nii.gz": "test",
        },
        tables={
            "labels/ascites.csv": "case_id,ascites,split\namos_0001.nii.gz,0,train\n"
            "amos_0004.nii.gz,1,val\n",
            "labels/gallstone.csv": "case_id,gallstone,split\namos_0001.nii.gz,1,train\n"
            "amos_0038.nii.gz,0,test\n",
        },
        targets={"images/amos_0001.nii.gz": {"ascites": "0", "gallstone": "1"}},
    ),
}


def write_scan(path: Path, values_ZYX: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mhd":
        image = SimpleITK.GetImageFromArray(values_ZYX)
        image.SetSpacing((0.8, 0.7, 2.0))
        SimpleITK.WriteImage(image, str(path))
    else:
        save_scan(path, values_ZYX)


def lay_out(layout: Layout, root: Path) -> Path:
    """Write the files of a data set; every scan has other voxels."""
    for seed, path in enumerate([*layout.scans, *layout.others]):
        write_scan(root / path, noise_ct(seed))
    for mask in filter(None, layout.scans.values()):
        if isinstance(next(iter(layout.values)), str):
            for number, name in enumerate(layout.values):
                one = np.zeros(SHAPE, np.uint8)
                one[1:4, 3 * number : 3 * number + 2, 4:9] = 1
                write_scan(root / mask / f"{name}.nii.gz", one)
            continue
        labels = np.zeros(SHAPE, np.uint8)
        for number, value in enumerate(layout.values):
            labels[1:4, 3 * number : 3 * number + 2, 4:9] = value
        write_scan(root / mask, labels)
    for file, text in layout.tables.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return root


def rows_of(prepared: Prepared) -> dict[str, dict[str, str]]:
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
def test_missing_files_are_named_in_one_line_before_anything_is_read(
    word: Path, tmp_path: Path, missing: str, words: list[str]
) -> None:
    for folder in word.glob(missing):
        folder.rename(tmp_path / folder.name)
    with pytest.raises(UserError) as caught:
        prepare(read_dataset("word"), word, tmp_path / "work")
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value) and not (tmp_path / "work").exists()


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
