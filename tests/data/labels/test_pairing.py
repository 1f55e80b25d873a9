"""Labels find their scan by name, and are used only when they lie on its grid."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from scan_files import noise_ct, save_labels, save_scan

from tapct.data.index.build import build_manifest
from tapct.data.labels import layouts, pairing
from tapct.data.labels.archive import LabelArchive, Layout
from tapct.data.search.discover import find_sources


@pytest.mark.parametrize(
    "scan, labels",
    [
        ("images/c1.nii.gz", "labels/c1.nii.gz"),
        ("imagesTr/c1_0000.nii.gz", "labelsTr/c1.nii.gz"),
        ("c1.nii.gz", "c1_seg.nii.gz"),
        ("c1.nii.gz", "c1-seg.nii"),
        ("c1.nii.gz", "c1_label.nii.gz"),
        ("c1.nii.gz", "c1_labels.nii.gz"),
        ("c1.nii.gz", "c1_seg62.nii.gz"),
        ("c1.nii.gz", "c1.seg.nii.gz"),
    ],
)
def test_labels_are_found_by_rule(tmp_path: Path, scan: str, labels: str) -> None:
    save_scan(tmp_path / "a" / scan, noise_ct(1))
    save_labels(tmp_path / "a" / labels)
    (row,) = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    assert (row.path, row.label_path, row.status) == (scan, labels, "accepted")


def test_labels_of_a_dicom_folder_carry_its_name(tmp_path: Path) -> None:
    _write_dicom(tmp_path / "a" / "liver3", noise_ct(1))
    save_labels(tmp_path / "a" / "liver3_seg.nii.gz")
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet")
    # the labels lie at another place than the slices: found, compared, not used
    assert [(row.path, row.label_path) for row in built.rows] == [("liver3", "")]
    assert "grid_mismatch" in built.rows[0].detail


def _write_dicom(folder: Path, hu_ZYX: np.ndarray) -> None:
    folder.mkdir(parents=True)
    writer = SimpleITK.ImageFileWriter()
    for z, plane in enumerate(hu_ZYX):
        writer.SetFileName(str(folder / f"{z}.dcm"))
        writer.Execute(SimpleITK.GetImageFromArray(plane[None]))
        dataset = pydicom.dcmread(folder / f"{z}.dcm")
        dataset.Modality, dataset.SOPClassUID = "CT", "1.2.840.10008.5.1.4.1.1.2"
        dataset.SeriesInstanceUID, dataset.RescaleSlope, dataset.RescaleIntercept = "1.2.3", 1, 0
        dataset.PatientID, dataset.ImagePositionPatient = "P1", [7.0, 8.0, 2.0 * z]
        dataset.ImageOrientationPatient, dataset.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.7, 0.8]
        dataset.save_as(folder / f"{z}.dcm")


def test_labels_folder_given_by_the_user(tmp_path: Path) -> None:
    for stem in ("c1", "c2"):
        save_scan(tmp_path / "a" / "sub" / f"{stem}.nii.gz", noise_ct(int(stem[1])))
    save_labels(tmp_path / "given" / "c1.nii.gz")
    save_labels(tmp_path / "given" / "sub" / "c2.nii.gz")
    (tmp_path / "given" / "c3.nii.bz2").write_bytes(b"some bytes")
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet", labels=tmp_path / "given")
    assert built.passed_over == {".nii.bz2": 1}
    assert [row.label_path for row in built.rows] == [
        "../given/c1.nii.gz",  # relative, so that no path of this machine is stored
        "../given/sub/c2.nii.gz",
    ]
    assert all((built.root / row.label_path).is_file() for row in built.rows)


def test_labels_folder_inside_the_archive_holds_no_scans(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "c1.nii.gz", noise_ct(1))
    save_labels(tmp_path / "a" / "masks" / "c1.nii.gz")
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet", labels=tmp_path / "a" / "masks")
    assert [(row.path, row.label_path) for row in built.rows] == [("c1.nii.gz", "masks/c1.nii.gz")]


def test_one_label_file_is_not_given_to_two_scans_of_one_name(tmp_path: Path) -> None:
    for seed, folder in enumerate(("s1", "s2")):
        save_scan(tmp_path / "a" / folder / "ct.nii.gz", noise_ct(seed))
    save_labels(tmp_path / "given" / "ct.nii.gz")
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet", labels=tmp_path / "given")
    assert [row.label_path for row in built.rows] == ["", ""]


@pytest.mark.parametrize("wrong", ["depth", "spacing", "values"])
def test_labels_that_do_not_fit_are_not_used_and_the_row_gives_the_reason(
    tmp_path: Path, wrong: str
) -> None:
    save_scan(tmp_path / "a" / "c1.nii.gz", noise_ct(1))
    if wrong == "values":
        save_scan(tmp_path / "a" / "c1_seg.nii.gz", noise_ct(2))
    else:
        spacing = (0.8, 0.7, 3.0) if wrong == "spacing" else (0.8, 0.7, 2.0)
        save_labels(tmp_path / "a" / "c1_seg.nii.gz", 5 if wrong == "depth" else 6, spacing)
    (row,) = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    assert (row.status, row.label_path) == ("accepted", "")
    assert "its labels are not used" in row.detail


def test_every_layout_file_is_listed() -> None:
    files = {path.stem for path in Path(layouts.__file__).parent.glob("*.py")}
    listed = {build.__module__.rpartition(".")[2] for build in pairing.LAYOUTS}
    assert listed == files - {"__init__"}


def test_the_first_layout_that_finds_a_file_wins(tmp_path: Path) -> None:
    """One scan with labels in all three places; each place is removed in turn."""
    root = tmp_path / "a"
    save_scan(root / "images" / "c1.nii.gz", noise_ct(1))
    places = [
        save_labels(tmp_path / "given" / "images" / "c1.nii.gz"),
        save_labels(root / "labels" / "c1.nii.gz"),
        save_labels(root / "images" / "c1_seg.nii.gz"),
    ]
    scan = root / "images" / "c1.nii.gz"
    for path in places:
        pairs = pairing.pair_labels(find_sources(root), root, tmp_path / "given")
        assert pairs.label_of == {scan: path}
        path.unlink()
    pairs = pairing.pair_labels(find_sources(root), root, tmp_path / "given")
    assert not pairs.label_of and not pairs.label_files


def test_a_layout_that_is_added_to_the_list_finds_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the docstring of `tapct.data.labels` describes: a layout c1/ct and c1/organs."""
    root = tmp_path / "a"
    save_scan(root / "c1" / "ct.nii.gz", noise_ct(1))
    save_labels(root / "c1" / "organs.nii.gz")

    def build(archive: LabelArchive) -> Layout:
        return Layout(lambda scan: archive.files.get((archive.folder_of(scan), "organs")))

    monkeypatch.setattr(pairing, "LAYOUTS", (*pairing.LAYOUTS, build))
    (row,) = build_manifest(root, tmp_path / "m.parquet").rows
    assert (row.path, row.label_path) == ("c1/ct.nii.gz", "c1/organs.nii.gz")


NAMES = ("c1", "liver_1_0000", "volume-1", "sub-1_ct", "c1_seg", "segmentation-1", "sub-1_dseg")
FOLDERS = ("", "p1/", "images/", "Labels/", "c1/", "c1_seg/", "masksTr/", "imagesTr/", "segs/x/")


def test_an_archive_without_a_sign_of_labels_has_no_pairs(tmp_path: Path) -> None:
    draw, num_without, num_pairs = random.Random(0), 0, 0
    for number in range(300):
        root = tmp_path / str(number)
        for _ in range(draw.randrange(1, 6)):
            folder, name = draw.choice(FOLDERS), draw.choice(NAMES + NAMES[:4] * 2)
            file = root / f"{folder}{name}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        sources = find_sources(root)
        pairs = pairing.pair_labels(sources, root, None)
        if not any(pairing.may_hold_labels(source, root) for source in sources):
            assert pairs == pairing.LabelPairs({}, frozenset())
            num_without += 1
        num_pairs += bool(pairs.label_of)
    assert num_without > 20 and num_pairs > 50


@pytest.mark.parametrize(
    ("scan", "used", "others"),
    [
        ("c1.nii.gz", "c1_mask.nii.gz", ("c1_seg.nii.gz",)),
        ("c1.nii.gz", "c1_seg1.nii.gz", ("c1_seg2.nii.gz", "c1_seg3.nii.gz")),
        ("images/c1.nii.gz", "labels/c1.nii.gz", ("labels/c1_seg.nii.gz",)),
        ("c1.nii.gz", "c1_seg.nii.gz", ("masks/c1.nii.gz",)),
        ("s1/ct.nii.gz", "s1/segmentations", ("s1/mask.nii.gz",)),
        # one stem and two suffixes
        ("c1.nii.gz", "c1_seg.nii", ("c1_seg.nii.gz",)),
        ("c1.nii.gz", "masks/c1.nii", ("masks/c1.nii.gz",)),
        ("images/c1.nii.gz", "labels/c1.nii", ("labels/c1.nii.gz", "labels/c1_seg.nii.gz")),
        ("c1.nii.gz", "c1_mask.nii", ("c1_mask.nii.gz", "c1_seg.nii", "c1_seg.nii.gz")),
        ("volume-3.nii.gz", "segmentation-3.nii", ("segmentation-3.nii.gz",)),
    ],
)
def test_a_choice_among_several_label_maps_is_reported(
    tmp_path: Path, scan: str, used: str, others: tuple[str, ...]
) -> None:
    save_scan(tmp_path / "a" / scan, noise_ct(1))
    first = f"{used}/liver.nii.gz" if used.endswith("segmentations") else used
    for path in (first, *others):
        save_labels(tmp_path / "a" / path)
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet")
    (row,) = (row for row in built.rows if row.path == scan)
    assert row.label_path == used or "not used" in row.detail
    assert f"the first of {len(others) + 1} label maps is used" in row.detail
    assert built.label_report is not None
    assert built.label_report.num_several == 1
    assert f"e.g. {used} and not {others[0]}" in "\n".join(built.label_report.lines())
    assert [row.path for row in built.accepted] == [scan]


def test_one_name_with_two_suffixes_in_the_folder_of_the_user(tmp_path: Path) -> None:
    root = tmp_path / "a"
    save_scan(root / "c1.nii.gz", noise_ct(1))
    for suffix in (".nii.gz", ".nii"):
        save_labels(root / "given" / f"c1{suffix}")
    built = build_manifest(root, tmp_path / "m.parquet", labels=root / "given")
    (row,) = built.rows  # none of the two is taken for a scan
    assert row.label_path == "given/c1.nii"
    assert row.detail == "its labels: the first of 2 label maps is used"
    assert built.label_report is not None
    assert built.label_report.num_given == 2
    assert built.label_report.example == ("given/c1.nii", "given/c1.nii.gz")


def test_two_masks_of_one_name_are_not_used(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "s1" / "ct.nii.gz", noise_ct(1))
    for suffix in (".nii.gz", ".nii"):
        save_labels(tmp_path / "a" / "s1" / "segmentations" / f"liver{suffix}")
    row = build_manifest(tmp_path / "a", tmp_path / "m.parquet").accepted[0]
    assert row.label_path == ""
    assert "contradictory_labels: <file> and <file> are two masks of one name" in row.detail


def test_a_file_is_found_beside_a_folder_of_its_name(tmp_path: Path) -> None:
    root = tmp_path / "a"
    save_scan(root / "imagesTr" / "c1.nii.gz", noise_ct(1))
    _write_dicom(root / "labelsTr" / "c1", noise_ct(3))
    save_labels(root / "labelsTr" / "c1.nii.gz")
    row = build_manifest(root, tmp_path / "m.parquet").rows[0]
    assert (row.path, row.label_path) == ("imagesTr/c1.nii.gz", "labelsTr/c1.nii.gz")


def test_one_label_map_is_no_choice(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "c1.nii.gz", noise_ct(1))
    save_labels(tmp_path / "a" / "labels" / "c1.nii.gz")
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet")
    assert [row.detail for row in built.rows] == [""]
    assert built.label_report is not None and built.label_report.num_several == 0
