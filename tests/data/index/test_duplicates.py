"""Of copies of one scan the labelled one is kept; copies with another geometry are all refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scan_files import LPS, noise_ct, save_labels, save_scan, write_nifti

from tapct.data.index.build import build_manifest
from tapct.data.index.duplicates import mirror_digest
from tapct.data.manifest import Row


def indexed(tmp_path: Path) -> dict[str, Row]:
    rows = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    return {row.path: row for row in rows}


def test_the_labelled_copy_is_kept(tmp_path: Path) -> None:
    for name in ("a_copy", "case1", "z_copy"):
        save_scan(tmp_path / "a" / f"{name}.nii.gz", noise_ct(1))
    save_labels(tmp_path / "a" / "case1_seg.nii.gz")
    rows = indexed(tmp_path)
    kept = rows.pop("case1.nii.gz")
    assert kept.status == "accepted" and kept.label_path and not kept.duplicate_of
    for row in rows.values():
        assert (row.reason, row.duplicate_of) == ("duplicate", kept.id)
        assert row.patient == kept.patient


def test_without_labels_the_first_copy_is_kept(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save_scan(tmp_path / "a" / f"{name}.nii.gz", noise_ct(1))
    rows = indexed(tmp_path)
    assert rows["a.nii.gz"].status == "accepted"
    assert rows["b.nii.gz"].duplicate_of == rows["a.nii.gz"].id


def test_a_rounded_spacing_is_no_contradiction(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "x.nii.gz", noise_ct(1), (0.703125, 0.703125, 2.5))
    save_scan(tmp_path / "a" / "y.nii.gz", noise_ct(1), (0.7, 0.7, 2.5))
    assert indexed(tmp_path)["y.nii.gz"].reason == "duplicate"


@pytest.mark.parametrize("wrong", ["spacing", "mirrored", "upside down", "turned"])
def test_copies_with_another_geometry_are_all_refused(tmp_path: Path, wrong: str) -> None:
    hu_ZYX = noise_ct(1)
    affine = np.diag([0.8, 0.8, 2.0, 1.0])
    other = affine.copy()
    if wrong == "spacing":
        other[2, 2] = 5.0
    elif wrong == "mirrored":
        other[0, 0] *= -1
    elif wrong == "upside down":
        other[2, 2] *= -1
    else:
        other = other[[1, 0, 2, 3]]
    (tmp_path / "a").mkdir()
    write_nifti(tmp_path / "a" / "right.nii.gz", hu_ZYX, affine)
    write_nifti(tmp_path / "a" / "wrong.nii.gz", hu_ZYX, other)
    write_nifti(tmp_path / "a" / "another.nii.gz", noise_ct(2), LPS @ affine)
    rows = indexed(tmp_path)
    assert rows.pop("another.nii.gz").status == "accepted"
    assert {row.reason for row in rows.values()} == {"contradictory_geometry"}
    for row in rows.values():
        assert all(other.id in row.detail for other in rows.values()) and not row.duplicate_of
    assert len({row.patient for row in rows.values()}) == 1


def test_a_mirror_digest_is_that_of_flips_and_turns_and_of_no_other_scan() -> None:
    hu_ZYX = noise_ct(3)
    same = [hu_ZYX[::-1], hu_ZYX[:, ::-1], hu_ZYX[:, :, ::-1], hu_ZYX.transpose(0, 2, 1)]
    assert {mirror_digest(np.ascontiguousarray(each)) for each in (hu_ZYX, *same)} == {
        mirror_digest(hu_ZYX)
    }
    others = [noise_ct(4), np.roll(hu_ZYX, 1, 0), np.roll(hu_ZYX, 1, 2), hu_ZYX + 1]
    changed = hu_ZYX.copy()
    changed[0, 0, 0] += 1
    digests = {mirror_digest(each) for each in (hu_ZYX, changed, *others)}
    assert len(digests) == 6
