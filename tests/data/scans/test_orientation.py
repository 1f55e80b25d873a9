"""Every axis order becomes LPS with axial slices first; what permuting and flipping cannot mend is
refused.
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from scan_files import make_ct, patch_bytes, refusal, write_nifti, write_series

from tapct.data.scans.ingest import read_volume


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_axis_order_and_flip_becomes_lps_as_in_simpleitk(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    hu_ZYX = make_ct()
    tilt = np.radians(7)  # oblique: the nearest axes are taken, nothing is resampled
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    for signs in itertools.product((1, -1), repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = turn @ (np.eye(3)[:, order] * np.array(signs)) * np.array([0.8, 1.1, 2.5])
        affine[:3, 3] = [5, -7, 11]
        path = write_nifti(tmp_path / "a.nii", hu_ZYX, affine)
        volume = read_volume(path)
        truth = SimpleITK.GetImageFromArray(hu_ZYX)
        truth.SetSpacing([0.8, 1.1, 2.5])
        truth.SetOrigin([5.0, -7.0, 11.0])
        truth.SetDirection((affine[:3, :3] / [0.8, 1.1, 2.5]).ravel().tolist())
        truth = SimpleITK.DICOMOrient(truth, "LPS")
        np.testing.assert_array_equal(volume.hu_ZYX, SimpleITK.GetArrayFromImage(truth))
        np.testing.assert_allclose(volume.spacing_mm, truth.GetSpacing()[::-1], rtol=1e-5)
        np.testing.assert_allclose(volume.origin_mm, truth.GetOrigin(), atol=1e-3)
        assert volume.hu_ZYX.flags.c_contiguous
        assert volume.hu_ZYX.dtype == np.int16


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("compressed", [False, True])
def test_nrrd_and_metaimage_agree_with_simpleitk(
    tmp_path: Path, suffix: str, compressed: bool
) -> None:
    image = SimpleITK.GetImageFromArray(make_ct())
    image.SetSpacing([0.8, 1.1, 2.5])
    image.SetOrigin([5.0, -7.0, 11.0])
    image.SetDirection(
        [0, 0, -1, 0.8, 0.6, 0, 0.6, -0.8, 0]
    )  # permuted, flipped, turned by 37 degrees
    SimpleITK.WriteImage(image, tmp_path / f"a{suffix}", compressed)
    volume = read_volume(tmp_path / f"a{suffix}")
    truth = SimpleITK.DICOMOrient(SimpleITK.ReadImage(tmp_path / f"a{suffix}"), "LPS")
    np.testing.assert_array_equal(volume.hu_ZYX, SimpleITK.GetArrayFromImage(truth))
    np.testing.assert_allclose(volume.spacing_mm, truth.GetSpacing()[::-1])
    np.testing.assert_allclose(volume.origin_mm, truth.GetOrigin(), atol=1e-9)


def test_nrrd_in_ras_space_is_turned(tmp_path: Path) -> None:
    hu_ZYX = make_ct()
    head = "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 17 14 9\n"
    head += (
        "space directions: (0.8,0,0) (0,0.7,0) (0,0,2.5)\nendian: big\nencoding: raw\nspace "
        "origin: (1,2,3)\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(head.encode() + hu_ZYX.astype(">i2").tobytes())
    volume = read_volume(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(volume.hu_ZYX, hu_ZYX[:, ::-1, ::-1])
    np.testing.assert_allclose(volume.origin_mm, (-1 - 16 * 0.8, -2 - 13 * 0.7, 3))


def test_sagittal_dicom_becomes_axial_slices_first(tmp_path: Path) -> None:
    sagittal = make_ct((8, 12, 14))  # slices along x, rows run down (-z), columns along y

    def edit(index: int) -> dict[str, object]:
        axes = [0, 1, 0, 0, 0, -1]
        return {
            "ImageOrientationPatient": axes,
            "ImagePositionPatient": [-30.0 + 3 * index, -20.0, 50.0],
        }

    volume = read_volume(write_series(tmp_path / "s", sagittal, edit=edit))
    np.testing.assert_array_equal(volume.hu_ZYX, sagittal.transpose(1, 2, 0)[::-1])
    np.testing.assert_allclose(volume.spacing_mm, (0.7, 0.8, 3.0))
    np.testing.assert_allclose(volume.origin_mm, (-30, -20, 50 - 11 * 0.7))


def test_sheared_affine_is_refused(tmp_path: Path) -> None:
    affine = np.diag([0.8, 0.7, 2.5, 1.0])
    affine[1, 2] = 2.5 * np.tan(np.radians(2))
    affine[:3, 2] *= 2.5 / np.linalg.norm(affine[:3, 2])
    assert refusal(write_nifti(tmp_path / "a.nii", make_ct(), affine)) == "sheared"
    tilted = write_series(
        tmp_path / "s",
        make_ct(),
        edit=lambda i: {"ImagePositionPatient": [0.0, 0.5 * i, 100.0 + 2 * i]},
    )
    assert refusal(tilted) == "sheared"


def test_turn_of_45_degrees_is_refused_and_40_is_not(tmp_path: Path) -> None:
    for degrees, accepted in ((40, True), (45, False)):
        turn = np.eye(4)
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn[1:3, 1:3] = [[cos, -sin], [sin, cos]]
        path = write_nifti(tmp_path / "a.nii", make_ct(), turn)
        assert read_volume(path) if accepted else refusal(path) == "oblique"


def test_nan_affine_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", make_ct())
    patch_bytes(path, 280, struct.pack("<f", float("nan")))  # srow_x[0]
    assert refusal(path) == "bad_affine"


def test_zero_pixdim_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", make_ct())
    patch_bytes(path, 88, struct.pack("<f", 0.0))  # pixdim[3]
    assert refusal(path) == "bad_spacing"


def test_pixdim_that_contradicts_the_affine_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", make_ct())
    patch_bytes(path, 88, struct.pack("<f", 5.0))
    assert refusal(path) == "bad_spacing"


def test_no_orientation_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", make_ct())
    patch_bytes(path, 252, struct.pack("<hh", 0, 0))  # qform_code, sform_code
    assert refusal(path) == "no_orientation"
    image = SimpleITK.GetImageFromArray(make_ct())
    SimpleITK.WriteImage(image, tmp_path / "b.nrrd", False)
    content = (tmp_path / "b.nrrd").read_bytes()
    (tmp_path / "b.nrrd").write_bytes(content.replace(b"space: left-posterior-superior\n", b""))
    assert refusal(tmp_path / "b.nrrd") == "no_orientation"


def test_qform_is_used_where_there_is_no_sform_and_metres_become_millimetres(
    tmp_path: Path,
) -> None:
    path = write_nifti(tmp_path / "a.nii", make_ct(), np.diag([-0.0008, 0.0007, 0.0025, 1.0]))
    truth = read_volume(write_nifti(tmp_path / "b.nii", make_ct(), np.diag([-0.8, 0.7, 2.5, 1.0])))
    image = nibabel.load(path)
    image.set_qform(image.affine.copy(), code=1)
    image.set_sform(None, code=0)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "c.nii")
    volume = read_volume(tmp_path / "c.nii")
    np.testing.assert_array_equal(volume.hu_ZYX, truth.hu_ZYX)
    np.testing.assert_allclose(volume.spacing_mm, truth.spacing_mm, rtol=1e-5)
    np.testing.assert_allclose(volume.origin_mm, truth.origin_mm, rtol=1e-5, atol=1e-5)
