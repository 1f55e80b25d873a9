"""Real scans of several origins: values lie where anatomy expects them.

The label values of ts_body are those of the table inside the label file itself; the organs' median
HU agree with it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from tapct.data.index.build import build_manifest
from tapct.data.labels.reading import read_labels
from tapct.data.scans.geometry import check_same_grid
from tapct.data.scans.ingest import read_volume
from tapct.data.search.discover import find_sources
from tapct.types import AIR_HU, LabelMap, Refused, Volume

ROOT = Path(
    os.environ.get("TAPCT_TEST_CT", Path(__file__).parents[2] / ".." / "shared" / "data" / "ct")
)
pytestmark = pytest.mark.skipif(
    not ROOT.is_dir(), reason=f"no real scans at {ROOT} (set TAPCT_TEST_CT)"
)


def median_hu(volume: Volume, labels: LabelMap, *names_or_values: str | int) -> float:
    """Median HU of the voxels in some labels."""
    check_same_grid(volume, labels)
    values = {name: value for value, name in labels.names}
    wanted = [item if isinstance(item, int) else values[item] for item in names_or_values]
    return float(np.median(volume.hu_ZYX[np.isin(labels.labels_ZYX, wanted)]))


def centre(labels: LabelMap, name: str) -> np.ndarray:
    """Centre of one organ in voxels (z, y, x)."""
    value = {organ: number for number, organ in labels.names}[name]
    return np.argwhere(labels.labels_ZYX == value).mean(axis=0)


def test_ts_body_organs_have_their_hu() -> None:
    volume = read_volume(ROOT / "ts_body" / "example_ct.nii.gz")
    labels = read_labels(ROOT / "ts_body" / "example_ct_seg62.nii.gz")
    assert volume.hu_ZYX.shape == (112, 101, 122)
    assert volume.spacing_mm == (3.0, 3.0, 3.0)
    assert len(np.unique(labels.labels_ZYX)) - 1 == 61
    lobes = [name for _, name in labels.names if name.startswith("lung_")]
    expected = {"liver": 46, "spleen": 35, "aorta": 41, "vertebrae_L1": 161}
    for organ, hu in expected.items():
        assert median_hu(volume, labels, organ) == pytest.approx(hu, abs=3)
    assert -850 < median_hu(volume, labels, *lobes) < -700


def test_ts_body_lies_in_lps() -> None:
    labels = read_labels(ROOT / "ts_body" / "example_ct_seg62.nii.gz")
    assert centre(labels, "liver")[2] < centre(labels, "spleen")[2]  # x grows to the patient's left
    assert centre(labels, "kidney_right")[2] < centre(labels, "kidney_left")[2]
    assert centre(labels, "aorta")[1] < centre(labels, "vertebrae_L1")[1]  # y grows to the back
    assert centre(labels, "urinary_bladder")[0] < centre(labels, "liver")[0]  # z grows to the head


def test_the_cut_of_ts_body_equals_slices_82_to_111_but_its_affine_does_not_say_so() -> None:
    whole = read_volume(ROOT / "ts_body" / "example_ct.nii.gz")
    cut = read_volume(ROOT / "ts_body" / "example_ct_sm.nii.gz")
    np.testing.assert_array_equal(cut.hu_ZYX, whole.hu_ZYX[82:112])
    assert cut.origin_mm == whole.origin_mm  # wrong in the file; nothing in the file contradicts it
    labels = read_labels(ROOT / "ts_body" / "example_seg.nii.gz")
    assert len(np.unique(labels.labels_ZYX)) - 1 == 41
    expected = {
        "liver": 46,
        "spleen": 35,
        "aorta": 43,
        "vertebrae_L1": 156,
        "lung_lower_lobe_left": -766,
    }
    for organ, hu in expected.items():
        assert median_hu(cut, labels, organ) == hu
    with pytest.raises(Refused, match="grid_mismatch"):
        check_same_grid(whole, labels)


def test_elastix_lung_is_one_cropped_hemithorax() -> None:
    volume = read_volume(ROOT / "elastix_lung" / "3DCT_lung.nrrd")
    labels = read_labels(ROOT / "elastix_lung" / "3DCT_lung_baseline_mask.nrrd")
    assert volume.hu_ZYX.shape == (129, 157, 115)
    assert median_hu(volume, labels, 1) == pytest.approx(-944, abs=1)


def test_cip_chest_is_the_same_from_nrrd_and_dicom() -> None:
    nrrd, dicom = (
        read_volume(ROOT / "cip_chest" / "ct-64.nrrd"),
        read_volume(ROOT / "cip_chest" / "ct-64Dicom"),
    )
    np.testing.assert_array_equal(nrrd.hu_ZYX, dicom.hu_ZYX)
    np.testing.assert_allclose(nrrd.spacing_mm, dicom.spacing_mm, rtol=1e-5)
    np.testing.assert_allclose(nrrd.origin_mm, dicom.origin_mm, atol=1e-3)
    image = SimpleITK.ReadImage(ROOT / "cip_chest" / "ct-64.nrrd")
    np.testing.assert_array_equal(
        nrrd.hu_ZYX, np.maximum(SimpleITK.GetArrayFromImage(image), AIR_HU)
    )


def test_cip_chest_labels_reach_782() -> None:
    labels = read_labels(ROOT / "cip_chest" / "lm-64.nrrd")
    assert labels.labels_ZYX.max() == 782
    for scan in ("ct-64.nrrd", "ct-64Dicom"):
        check_same_grid(read_volume(ROOT / "cip_chest" / scan), labels)


def test_dcm_liver3_has_1_mm_slices_and_clamped_padding() -> None:
    volume = read_volume(ROOT / "dcm_liver3")
    assert volume.hu_ZYX.shape == (3, 512, 512)
    assert volume.spacing_mm[0] == pytest.approx(1.0, abs=1e-6)
    assert volume.hu_ZYX.min() == AIR_HU
    assert median_hu(volume, read_labels(ROOT / "dcm_liver3_seg.nrrd"), 1) == pytest.approx(
        45, abs=1
    )
    whole = SimpleITK.ReadImage(
        [str(ROOT / "dcm_liver3" / f"0{number}.dcm") for number in (3, 2, 1)]
    )
    np.testing.assert_array_equal(
        volume.hu_ZYX, np.maximum(SimpleITK.GetArrayFromImage(whole), AIR_HU)
    )


def test_phantom_and_single_slice_are_read() -> None:
    phantom = read_volume(ROOT / "dcm_phantom" / "phantom_brain5mm_28x512x512.nii.gz")
    assert phantom.hu_ZYX.shape == (28, 512, 512)
    np.testing.assert_allclose(phantom.spacing_mm, (5.0, 0.451172, 0.451172), rtol=1e-5)
    single = read_volume(ROOT / "dcm_single" / "CT_small.dcm")
    assert single.hu_ZYX.shape == (1, 128, 128)
    assert single.spacing_mm == (5.0, 0.661468, 0.661468)


@pytest.mark.parametrize(
    "path, reason",
    [
        ("not_ct/example_mr_sm.nii.gz", "not_ct"),
        ("not_ct/MR_small.dcm", "not_ct"),
        ("dcm_phantom/localizer_I10", "localizer"),
        ("ts_body/example_seg.nii.gz", "label_map"),
        ("ts_body/example_ct_seg62.nii.gz", "label_map"),
        ("elastix_lung/3DCT_lung_baseline_mask.nrrd", "label_map"),
        ("cip_chest/lm-64.nrrd", "label_map"),
        ("dcm_liver3_seg.nrrd", "label_map"),
    ],
)
def test_what_is_not_ct_is_refused(path: str, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        read_volume(ROOT / path)
    assert caught.value.reason == reason


def test_the_archive_has_seven_scans(tmp_path: Path) -> None:
    assert len(find_sources(ROOT)) == 16
    built = build_manifest(ROOT, tmp_path / "m.parquet", min_depth=1)
    assert {row.path: row.label_path for row in built.accepted} == {
        "cip_chest/ct-64.nrrd": "",
        "dcm_liver3": "dcm_liver3_seg.nrrd",
        "dcm_phantom/phantom_brain5mm_28x512x512.nii.gz": "",
        "dcm_single": "",
        "elastix_lung/3DCT_lung.nrrd": "",
        "ts_body/example_ct.nii.gz": "ts_body/example_ct_seg62.nii.gz",
        "ts_body/example_ct_sm.nii.gz": "",
    }
    assert built.summary() == {
        "accepted": 7,
        "label_map": 3,
        "not_ct": 2,
        "duplicate": 1,
        "localizer": 1,
    }
