"""A header must describe its file, must not contradict itself, and must give a grid of a body."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scan_files import LPS, make_ct, patch_bytes, refusal, write_nifti

from tapct.data.scans.ingest import read_volume

SHAPE_ZYX = (20, 24, 26)


@pytest.mark.parametrize(
    "axis, size", [(0, 25), (1, 23), (2, 19), (2, 1)], ids=["columns", "rows", "slice", "most"]
)
def test_a_header_that_claims_fewer_voxels_is_refused(tmp_path: Path, axis: int, size: int) -> None:
    path = write_nifti(tmp_path / "a.nii", make_ct(SHAPE_ZYX))
    assert refusal(patch_bytes(path, 42 + 2 * axis, struct.pack("<h", size))) == "header_mismatch"


def test_a_few_bytes_may_follow_the_voxels(tmp_path: Path) -> None:
    hu_ZYX = make_ct(SHAPE_ZYX)
    smallest_face = 2 * 20 * 24
    for count, accepted in ((0, True), (1, True), (512, True), (smallest_face, False)):
        path = write_nifti(tmp_path / "a.nii", hu_ZYX)
        path.write_bytes(path.read_bytes() + b"\0" * count)
        if accepted:
            np.testing.assert_array_equal(read_volume(path).hu_ZYX, hu_ZYX)
        else:
            assert refusal(path) == "header_mismatch"


@pytest.mark.parametrize("move_mm, accepted", [(1.0, True), (60.0, False)])
def test_sform_and_qform_must_agree(tmp_path: Path, move_mm: float, accepted: bool) -> None:
    hu_ZYX = make_ct(SHAPE_ZYX)
    affine = LPS @ np.diag([0.8, 0.7, 2.5, 1.0])
    image = nibabel.Nifti1Image(hu_ZYX.transpose(2, 1, 0), affine)
    image.set_sform(affine, 1)
    other = affine.copy()
    other[2, 3] += move_mm
    image.set_qform(other, 1)
    nibabel.save(image, tmp_path / "a.nii.gz")
    if accepted:
        assert read_volume(tmp_path / "a.nii.gz").origin_mm[2] == pytest.approx(0.0)
    else:
        assert refusal(tmp_path / "a.nii.gz") == "header_mismatch"


def test_a_qform_without_a_code_is_not_compared(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", make_ct(SHAPE_ZYX))
    patch_bytes(path, 252, struct.pack("<h", 0))  # qform_code
    patch_bytes(path, 268, struct.pack("<f", 500.0))  # qoffset_x
    assert read_volume(path).origin_mm == pytest.approx((0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    "spacing, origin, reason",
    [
        ((0.8, 0.7, 2.5), (0, 0, 9_000), ""),
        ((0.8, 0.7, 2.5), (0, 0, -11_000), "absurd_geometry"),
        ((0.25, 0.25, 24), (0, 0, 0), ""),
        ((0.25, 0.25, 26), (0, 0, 0), "absurd_geometry"),
        ((0.21, 0.21, 2.5), (0, 0, 0), ""),
        ((0.19, 0.19, 2.5), (0, 0, 0), "absurd_geometry"),
    ],
)
def test_a_grid_that_no_body_has_is_refused(
    tmp_path: Path,
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
    reason: str,
) -> None:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    path = write_nifti(tmp_path / "a.nii", make_ct(SHAPE_ZYX), affine)
    if reason:
        assert refusal(path) == reason
    else:
        assert read_volume(path).spacing_mm == pytest.approx(spacing[::-1])


def test_a_whole_body_is_accepted_and_five_metres_are_not(tmp_path: Path) -> None:
    affine = np.diag([9.0, 9.0, 50.0, 1.0])
    whole_body = write_nifti(tmp_path / "a.nii", make_ct((48, 24, 26)), affine)
    assert read_volume(whole_body).spacing_mm[0] == pytest.approx(50.0)
    too_long = write_nifti(tmp_path / "b.nii", make_ct((100, 24, 26)), affine)
    assert refusal(too_long) == "absurd_geometry"
