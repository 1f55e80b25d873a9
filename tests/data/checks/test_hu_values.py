"""Stored values become int16 HU, or are refused because they cannot be HU."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from scan_files import (
    LPS,
    SHAPE_ZYX,
    make_ct,
    make_labels,
    patch_bytes,
    refusal,
    write_nifti,
    write_series,
)

from tapct.data.checks.ct_check import subsample
from tapct.data.scans.ingest import read_volume
from tapct.types import AIR_HU


def test_big_endian_and_nifti_2_are_read(tmp_path: Path) -> None:
    hu_ZYX = make_ct()
    image = nibabel.Nifti1Image(
        hu_ZYX.astype(">i2").transpose(2, 1, 0), LPS, nibabel.Nifti1Header(endianness=">")
    )
    nibabel.save(image, tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == struct.pack(">i", 348)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").hu_ZYX, hu_ZYX)
    nibabel.save(nibabel.Nifti2Image(hu_ZYX.transpose(2, 1, 0), LPS), tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii.gz").hu_ZYX, hu_ZYX)


@pytest.mark.parametrize("slope, intercept", [(1.0, -1024.0), (2.0, -1024.0), (0.5, -1024.25)])
def test_scl_slope_and_inter_are_applied(tmp_path: Path, slope: float, intercept: float) -> None:
    stored = np.rint((make_ct() - intercept) / slope).astype(np.uint16)
    path = write_nifti(tmp_path / "a.nii", stored)
    patch_bytes(path, 112, struct.pack("<ff", slope, intercept))
    expected = np.maximum(np.rint(nibabel.load(path).get_fdata()), AIR_HU)
    np.testing.assert_array_equal(read_volume(path).hu_ZYX, expected.transpose(2, 1, 0))


def test_slope_zero_means_no_scaling(tmp_path: Path) -> None:
    path = patch_bytes(
        write_nifti(tmp_path / "a.nii", make_ct()), 112, struct.pack("<ff", 0.0, 7.0)
    )
    np.testing.assert_array_equal(read_volume(path).hu_ZYX, make_ct())


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64, np.int64])
def test_int32_and_float_storage_is_read(tmp_path: Path, dtype: type) -> None:
    image = nibabel.Nifti1Image(make_ct().astype(dtype).transpose(2, 1, 0), LPS, dtype=dtype)
    nibabel.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").hu_ZYX, make_ct())


def test_uint16_without_rescale_is_refused(tmp_path: Path) -> None:
    raw = (make_ct() + 1024).astype(np.uint16)
    assert refusal(write_nifti(tmp_path / "a.nii", raw)) == "no_rescale"
    assert (
        refusal(write_series(tmp_path / "s", make_ct(), edit=lambda i: {"RescaleIntercept": None}))
        == "no_rescale"
    )
    lost = write_series(
        tmp_path / "t", raw.astype(np.int16), edit=lambda i: {"RescaleIntercept": 0}
    )
    assert refusal(lost) == "no_rescale"


@pytest.mark.parametrize("padding", [-1500, -2000, -2048, -3024, -3995])
def test_padding_is_clamped(tmp_path: Path, padding: int) -> None:
    hu_ZYX = make_ct()
    hu_ZYX[:, :4] = padding
    volume = read_volume(write_nifti(tmp_path / "a.nii", hu_ZYX))
    np.testing.assert_array_equal(volume.hu_ZYX, np.maximum(hu_ZYX, AIR_HU))
    assert (volume.hu_ZYX[:, :4] == AIR_HU).all()


def test_dicom_padding_value_of_water_is_not_turned_into_air(tmp_path: Path) -> None:
    hu_ZYX = make_ct()
    hu_ZYX[:, 5:8, 5:8] = 0
    edit = {"RescaleIntercept": 0, "PixelRepresentation": 1}
    folder = write_series(tmp_path / "s", hu_ZYX, edit=lambda i: {**edit, "PixelPaddingValue": 0})
    np.testing.assert_array_equal(read_volume(folder).hu_ZYX, hu_ZYX)


def test_values_out_of_the_int16_range_are_refused(tmp_path: Path) -> None:
    hu_ZYX = make_ct().astype(np.int32)
    hu_ZYX[3, 3, 3] = 32767
    assert read_volume(write_nifti(tmp_path / "a.nii", hu_ZYX)).hu_ZYX[3, 3, 3] == 32767
    hu_ZYX[3, 3, 3] = 32768
    assert refusal(write_nifti(tmp_path / "a.nii", hu_ZYX)) == "out_of_range"
    hu_ZYX[3, 3, 3] = -(2**31)
    assert read_volume(write_nifti(tmp_path / "a.nii", hu_ZYX)).hu_ZYX[3, 3, 3] == AIR_HU


def test_a_value_that_no_int64_holds_is_refused_and_is_not_air(tmp_path: Path) -> None:
    stored_ZYX = (make_ct((40, 200, 200)).astype(np.int64) + 1024).astype(np.uint64)
    stored_ZYX[3, 3, 3] = 2**64 - 1  # not among the sampled voxels
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(stored_ZYX.transpose(2, 1, 0), LPS, dtype=np.uint64), path)
    patch_bytes(path, 112, struct.pack("<2f", 1.0, -1024.0))  # scl_slope, scl_inter
    assert refusal(path) == "out_of_range"


def test_hu_beyond_int32_do_not_wrap_around(tmp_path: Path) -> None:
    # stored value v becomes v * (2^32 + 1) - 1024, whose lowest 32 bits are v - 1024
    path = write_series(tmp_path / "series", make_ct((5, 32, 32)))
    for file in path.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.RescaleSlope = 2**32 + 1
        dataset.save_as(file)
    assert refusal(path) in ("not_hu", "no_rescale", "out_of_range")


def test_nan_voxels_are_refused(tmp_path: Path) -> None:
    hu_ZYX = make_ct().astype(np.float32)
    hu_ZYX[4, 5, 6] = np.nan
    assert refusal(write_nifti(tmp_path / "a.nii", hu_ZYX)) == "not_finite"


def test_nan_between_the_sampled_voxels_is_refused(tmp_path: Path) -> None:
    hu_ZYX = make_ct((40, 200, 200)).astype(np.float32)
    assert subsample(hu_ZYX).shape == (20, 100, 100)
    hu_ZYX[21, 51, 51] = np.inf
    assert refusal(write_nifti(tmp_path / "a.nii", hu_ZYX)) == "not_finite"


@pytest.mark.parametrize("scale", [(0, 1), (-1, 1), (0, 10)])
def test_floats_of_0_to_1_are_refused(tmp_path: Path, scale: tuple[float, float]) -> None:
    share = (make_ct() + 1024) / 2000
    values = (share * (scale[1] - scale[0]) + scale[0]).astype(np.float32)
    assert refusal(write_nifti(tmp_path / "a.nii", values)) == "normalised"


def test_label_maps_are_refused_as_scans(tmp_path: Path) -> None:
    assert refusal(write_nifti(tmp_path / "a.nii.gz", make_labels())) == "label_map"
    assert (
        refusal(write_nifti(tmp_path / "b.nii.gz", make_labels().astype(np.float32))) == "label_map"
    )
    assert (
        refusal(write_nifti(tmp_path / "c.nii.gz", (make_labels() > 0).astype(np.uint8)))
        == "label_map"
    )


def test_mr_is_refused_by_its_values_and_by_its_side_car(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).gamma(2.0, 80.0, SHAPE_ZYX).astype(np.int16)
    assert refusal(write_nifti(tmp_path / "mr.nii", noise)) == "not_ct"
    path = write_nifti(tmp_path / "ct.nii", make_ct())
    (tmp_path / "ct.json").write_text(json.dumps({"Modality": "MR"}))
    assert refusal(path) == "not_ct"
    assert (
        refusal(write_series(tmp_path / "s", make_ct(), edit=lambda i: {"Modality": "MR"}))
        == "not_ct"
    )


def test_ct_cropped_inside_the_body_needs_its_modality_declared(tmp_path: Path) -> None:
    inside = np.clip(np.random.default_rng(2).normal(20, 60, SHAPE_ZYX), -140, 250).astype(np.int16)
    path = write_nifti(tmp_path / "a.nii", inside)
    assert refusal(path) == "not_ct"
    (tmp_path / "a.json").write_text(json.dumps({"Modality": "CT"}))
    np.testing.assert_array_equal(read_volume(path).hu_ZYX, inside)
    np.testing.assert_array_equal(read_volume(write_series(tmp_path / "s", inside)).hu_ZYX, inside)


def test_a_shifted_scale_is_refused(tmp_path: Path) -> None:
    assert refusal(write_nifti(tmp_path / "a.nii", make_ct((30, 40, 40)) - 1024)) == "not_hu"


def test_air_alone_is_refused(tmp_path: Path) -> None:
    air = np.random.default_rng(4).normal(-1000, 10, SHAPE_ZYX).astype(np.int16)
    assert refusal(write_nifti(tmp_path / "a.nii", air)) == "not_ct"


def test_constant_volume_is_refused(tmp_path: Path) -> None:
    assert (
        refusal(write_nifti(tmp_path / "a.nii", np.full(SHAPE_ZYX, -1000, np.int16))) == "constant"
    )


def test_rgb_is_refused(tmp_path: Path) -> None:
    rgb = np.zeros((17, 14, 9), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path / "a.nii.gz")
    assert refusal(tmp_path / "a.nii.gz") == "not_scalar"
    image = SimpleITK.GetImageFromArray(np.zeros((9, 14, 17, 3), np.uint8), isVector=True)
    for suffix in (".nrrd", ".mha"):
        SimpleITK.WriteImage(image, tmp_path / f"b{suffix}")
        assert refusal(tmp_path / f"b{suffix}") == "not_scalar"
    assert (
        refusal(write_series(tmp_path / "s", make_ct(), edit=lambda i: {"SamplesPerPixel": 3}))
        == "not_scalar"
    )


def test_4d_with_one_volume_is_read_and_with_more_refused(tmp_path: Path) -> None:
    one = make_ct().transpose(2, 1, 0)[..., None]
    nibabel.save(nibabel.Nifti1Image(one, LPS), tmp_path / "one.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "one.nii.gz").hu_ZYX, make_ct())
    nibabel.save(nibabel.Nifti1Image(np.repeat(one, 2, axis=3), LPS), tmp_path / "two.nii.gz")
    assert refusal(tmp_path / "two.nii.gz") == "not_3d"
    image = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(make_ct())] * 2)
    for suffix in (".nrrd", ".mha"):
        SimpleITK.WriteImage(image, tmp_path / f"b{suffix}")
        assert refusal(tmp_path / f"b{suffix}") == "not_3d"
