"""Which file is whose labels, in the layouts of public data sets, and what the index prints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scan_files import noise_ct, save_labels, save_scan
from typer.testing import CliRunner

from tapct.cli import app
from tapct.data.index.build import build_manifest
from tapct.data.labels.pairing import LabelPairs, pair_labels
from tapct.data.manifest import Manifest
from tapct.data.search.discover import find_sources

HN = Path(
    os.environ.get(
        "TAPCT_TEST_HN", Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "hn"
    )
)


def pairs_of(root: Path, *names: str, given: Path | None = None) -> LabelPairs:
    """Pairs in an archive of empty files: names alone decide."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return pair_labels(find_sources(root), root, given)


def below(root: Path, pairs: LabelPairs) -> dict[str, str]:
    return {
        scan.relative_to(root).as_posix(): path.relative_to(root).as_posix()
        for scan, path in pairs.label_of.items()
    }


@pytest.mark.parametrize(
    "scan, labels",
    [
        ("imagesTr/liver_1.nii.gz", "labelsTr/liver_1.nii.gz"),  # MSD
        ("imagesTs/c1_0000.nii.gz", "labelsTs/c1.nii.gz"),  # nnU-Net
        ("Images/c1.nii.gz", "Masks/c1.nii.gz"),
        ("img/img0001.nii.gz", "label/label0001.nii.gz"),  # BTCV
        ("images/a/c1.nii.gz", "labels/a/c1.nii.gz"),
        ("images/c1_image.nii.gz", "labels/c1_mask.nii.gz"),
        ("kits/case_00000/imaging.nii.gz", "kits/case_00000/segmentation.nii.gz"),
        ("c1/ct.nrrd", "c1/Segmentation.seg.nrrd"),  # Slicer
        ("c1/ct.nii.gz", "c1/mask.nii.gz"),
        ("volume-3.nii", "segmentation-3.nii"),  # LiTS
        ("part1/volume-3.nii", "truth/segmentation-3.nii"),
        ("c1.nii.gz", "c1_mask.nii.gz"),
        ("patient1_frame01.nii.gz", "patient1_frame01_gt.nii.gz"),
        ("c1.nrrd", "c1-label.nrrd"),
        ("c1_ct.nii.gz", "c1_seg.nii.gz"),
        ("c1_0000.nii.gz", "c1_segmentation.nii.gz"),
        ("c1.nii.gz", "labels/c1.nii.gz"),
        ("s0001/ct.nii.gz", "s0001/segmentations"),  # TotalSegmentator
        ("c1.nii.gz", "c1_seg"),
        ("sub-01/ct/sub-01_ct.nii.gz", "derivatives/manual/sub-01/ct/sub-01_dseg.nii.gz"),
        (
            "sub-01/ses-2/ct/sub-01_ses-2_acq-thin_ct.nii.gz",
            "derivatives/a/sub-01/ses-2/ct/sub-01_ses-2_acq-thin_space-orig_desc-organs_dseg.nii.gz",
        ),
        ("rawdata/sub-v1/sub-v1_ct.nii.gz", "derivatives/sub-v1/sub-v1_seg-vert_msk.nii.gz"),
    ],
)
def test_the_labels_of_a_public_layout_are_found(tmp_path: Path, scan: str, labels: str) -> None:
    is_folder = not labels.endswith((".nii.gz", ".nii", ".nrrd"))
    files = [f"{labels}/liver.nii.gz", f"{labels}/spleen.nii.gz"] if is_folder else [labels]
    pairs = pairs_of(tmp_path, scan, *files)
    assert below(tmp_path, pairs) == {scan: labels}
    assert pairs.label_files == {tmp_path / file for file in files}
    assert not pairs.unmatched and not pairs.likely


@pytest.mark.parametrize(
    "files",
    [
        # two scans could own one label file, or one scan two of them
        ("c1_ct.nii.gz", "c1_0000.nii.gz", "c1_seg.nii.gz"),
        ("c1/ct.nii.gz", "c1/ct2.nii.gz", "c1/mask.nii.gz"),
        ("c1/ct.nii.gz", "c1/mask.nii.gz", "c1/segmentation.nii.gz"),
        ("a/volume-3.nii", "b/volume-3.nii", "c/segmentation-3.nii"),
        ("sub-1/sub-1_ct.nii", "x/sub-1_desc-a_dseg.nii", "x/sub-1_desc-b_dseg.nii"),
        ("a/ct.nii.gz", "a/pet.nii.gz", "a/segmentations/liver.nii.gz"),
        # names that only look alike
        ("volume-3.nii", "segmentation-30.nii"),
        ("c1.nii.gz", "c11_seg.nii.gz"),
        ("sub-1/sub-1_ses-1_ct.nii", "x/sub-1_ses-2_dseg.nii"),
        ("c1.nii.gz", "c1_segment.nii.gz"),
    ],
)
def test_what_could_be_another_scans_labels_is_nobodys(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    assert below(tmp_path, pairs_of(tmp_path, *files)) == {}


def test_labels_for_an_exact_name_are_not_taken_by_a_similar_one(tmp_path: Path) -> None:
    pairs = pairs_of(
        tmp_path, "e_ct.nii.gz", "e_ct_seg62.nii.gz", "e_seg.nii.gz", "e.nii.gz", "f_0000.nii.gz"
    )
    assert below(tmp_path, pairs) == {
        "e_ct.nii.gz": "e_ct_seg62.nii.gz",
        "e.nii.gz": "e_seg.nii.gz",
    }


def test_unmatched_label_files_are_counted_and_named(tmp_path: Path) -> None:
    root = tmp_path / "a"
    for number in (1, 2, 3):
        save_scan(root / "imagesTr" / f"c{number}_0000.nii.gz", noise_ct(number))
    save_labels(root / "labelsTr" / "c1.nii.gz")
    save_labels(root / "labelsTr" / "c2.nii.gz", 6, (0.8, 0.7, 3.0))  # another spacing
    save_labels(root / "labelsTr" / "x.nii.gz")
    save_labels(root / "old" / "c9_seg.nii.gz")
    built = build_manifest(root, tmp_path / "m.parquet")
    assert built.label_report is not None
    (line,) = built.label_report.lines()
    assert line == (
        "labels: 1 of 3 scans; 1 found but not used (1 grid_mismatch); unmatched label files: 2, "
        "e.g. labelsTr/x.nii.gz"
    )
    rows = {row.path: row for row in built.rows}
    assert set(rows) == {
        *(f"imagesTr/c{number}_0000.nii.gz" for number in (1, 2, 3)),
        "old/c9_seg.nii.gz",  # examined as a scan, because its folder does not mean labels
    }
    assert rows["old/c9_seg.nii.gz"].reason == "label_map"


def test_a_folder_of_labels_that_match_nothing_is_counted(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "c1.nii.gz", noise_ct(1))
    save_labels(tmp_path / "given" / "other.nii.gz")
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet", labels=tmp_path / "given")
    report = built.label_report
    assert report is not None
    assert (report.num_given, report.num_given_used) == (1, 0)
    assert "unmatched label files: 1" in report.lines()[0]


def test_an_archive_without_labels_prints_nothing_about_them(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "c1.nii.gz", noise_ct(1))
    report = build_manifest(tmp_path / "a", tmp_path / "m.parquet").label_report
    assert report is not None and report.lines() == []


def test_the_index_prints_the_counts_and_keeps_the_values_to_ignore(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "c1.nii.gz", noise_ct(1))
    labels = np.zeros((6, 24, 26), np.int16)
    labels[2:4], labels[5] = 1, -1
    save_scan(tmp_path / "a" / "c1_seg.nii.gz", labels)
    arguments = ["index", str(tmp_path / "a"), "--out", str(tmp_path / "m.parquet"), "--workers=0"]
    shown = CliRunner().invoke(app.app, arguments)
    assert "labels: 0 of 1 scans; 1 found but not used (1 not_labels)" in shown.output
    shown = CliRunner().invoke(app.app, [*arguments, "--ignore-label", "-1"])
    assert "labels: 1 of 1 scans" in shown.output
    manifest = Manifest.read(tmp_path / "m.parquet")
    assert manifest.ignore_labels == (-1,) and manifest.rows[0].label_digest


@pytest.mark.parametrize(
    "table",
    [
        {"background": 0, "liver": 1, "left lung": 300, "both": [1, 300]},
        {"0": "background", "1": "liver", "300": "left lung"},
    ],
)
def test_names_come_from_dataset_json(tmp_path: Path, table: dict[str, object]) -> None:
    root = tmp_path / "a"
    save_scan(root / "imagesTr" / "c1_0000.nii.gz", noise_ct(1))
    save_labels(root / "labelsTr" / "c1.nii.gz")
    (root / "dataset.json").write_text(json.dumps({"labels": table}))
    built = build_manifest(root, tmp_path / "m.parquet")
    unnamed = build_manifest(root / "imagesTr", tmp_path / "m2.parquet").rows[0]
    assert built.rows[0].label_digest and not unnamed.label_digest
    assert built.label_report is not None
    regions = ["dataset.json: 1 regions of several labels are not used"]
    assert built.label_report.lines()[1:] == (regions if "both" in table else [])


@pytest.mark.skipif(not HN.is_dir(), reason=f"no real scans at {HN} (set TAPCT_TEST_HN)")
def test_72_people_have_their_five_organs_by_name(tmp_path: Path) -> None:
    from tapct.data.labels.reading import read_labels_of
    from tapct.data.scans.ingest import read_volume

    built = build_manifest(HN, tmp_path / "m.parquet")
    assert len(built.rows) == len(built.accepted) == 72
    assert built.label_report is not None
    assert built.label_report.lines() == ["labels: 72 of 72 scans"]
    organs = ["background", "brainstem", "spinal_cord", "parotid_left", "parotid_right", "mandible"]
    for row in built.accepted[::24]:
        found = read_labels_of(read_volume(HN / row.path), HN / row.label_path).label_map
        assert [name for _, name in found.names] == organs
        assert np.unique(found.labels_ZYX).tolist() == list(range(6))
