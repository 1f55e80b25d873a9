"""Every trap of DICOM series has a rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless
from scan_files import CT_STORAGE, compress_by_gdcm, make_ct, refusal, write_nifti, write_series

from tapct.data.scans.ingest import read_volume
from tapct.data.search.discover import find_sources
from tapct.types import AIR_HU


def test_dicom_spacing_comes_from_positions_not_from_slice_thickness(tmp_path: Path) -> None:
    volume = read_volume(
        write_series(tmp_path / "s", make_ct(), edit=lambda i: {"SpacingBetweenSlices": 9.0})
    )
    np.testing.assert_allclose(volume.spacing_mm, (2.0, 0.7, 0.8))
    np.testing.assert_allclose(volume.origin_mm, (-10, -20, 100))
    np.testing.assert_array_equal(volume.hu_ZYX, make_ct())


def test_non_monotone_instance_numbers_and_file_names_do_not_matter(tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(9)
    positions = [100.0 + 2.0 * int(place) for place in order]
    shuffled = write_series(
        tmp_path / "s", make_ct()[order], positions, lambda i: {"InstanceNumber": (i * 5) % 7}
    )
    np.testing.assert_array_equal(read_volume(shuffled).hu_ZYX, make_ct())


def test_missing_slices_are_refused(tmp_path: Path) -> None:
    for missing in ({4}, {4, 5}, {2, 6}):
        keep = [index for index in range(9) if index not in missing]
        folder = tmp_path / f"s{len(list(tmp_path.iterdir()))}"
        write_series(folder, make_ct()[keep], [100.0 + 2.0 * index for index in keep])
        assert refusal(folder) == "missing_slices"


def test_duplicate_slices_are_refused(tmp_path: Path) -> None:
    positions = [100.0, 102, 104, 104, 106, 108, 110, 112, 114]
    assert refusal(write_series(tmp_path / "s", make_ct(), positions)) == "duplicate_slices"


def test_unevenly_spaced_slices_are_refused_and_rounded_positions_are_not(tmp_path: Path) -> None:
    positions = [100.0, 102, 104, 106.7, 108, 110, 112, 114, 116]
    assert refusal(write_series(tmp_path / "s", make_ct(), positions)) == "uneven_slices"
    rounded = [round(100 + 0.625 * index, 1) for index in range(9)]
    volume = read_volume(write_series(tmp_path / "t", make_ct(), rounded))
    assert volume.spacing_mm[0] == pytest.approx(0.625)


def test_localizer_is_refused(tmp_path: Path) -> None:
    edit = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    assert refusal(write_series(tmp_path / "s", make_ct()[:1], edit=lambda i: edit)) == "localizer"


def test_single_slice_is_read_with_depth_1(tmp_path: Path) -> None:
    plane_ZYX = make_ct((9, 36, 34))[4:5]
    volume = read_volume(write_series(tmp_path / "s", plane_ZYX))
    assert volume.hu_ZYX.shape == (1, 36, 34)
    assert volume.spacing_mm[0] == 5.0
    unknown = write_series(tmp_path / "t", plane_ZYX, edit=lambda i: {"SliceThickness": None})
    assert refusal(unknown) == "bad_spacing"
    write_nifti(tmp_path / "a.nii", plane_ZYX)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").hu_ZYX, plane_ZYX)


def test_slices_of_different_geometry_are_refused(tmp_path: Path) -> None:
    for number, edit in enumerate(
        (
            {"PixelSpacing": [0.5, 0.5]},
            {"ImageOrientationPatient": [1, 0, 0, 0, 0.98, 0.198997]},
        )
    ):
        folder = write_series(
            tmp_path / str(number), make_ct(), edit=lambda i, e=edit: e if i == 3 else {}
        )
        assert refusal(folder) == "mixed_geometry"


def test_missing_position_or_pixel_spacing_is_refused(tmp_path: Path) -> None:
    for tag, reason in (
        ("ImagePositionPatient", "no_orientation"),
        ("PixelSpacing", "bad_spacing"),
    ):
        folder = write_series(
            tmp_path / tag, make_ct(), edit=lambda i, t=tag: {t: None} if i == 3 else {}
        )
        assert refusal(folder) == reason


def test_rescale_is_applied_slice_by_slice(tmp_path: Path) -> None:
    folder = write_series(
        tmp_path / "s",
        make_ct(),
        edit=lambda i: {"RescaleIntercept": -1024 - i, "RescaleSlope": 0.5 + i % 2},
    )
    expected = np.stack(
        [
            np.maximum(
                np.rint(np.rint((plane + 1024.0 + i) / (0.5 + i % 2)) * (0.5 + i % 2) - 1024 - i),
                AIR_HU,
            )
            for i, plane in enumerate(make_ct())
        ]
    )
    np.testing.assert_array_equal(read_volume(folder).hu_ZYX, expected)


@pytest.mark.parametrize("syntax", ["implicit", "big endian", "RLE", "JPEG", "JPEG2000"])
def test_transfer_syntaxes_give_the_same_hu(tmp_path: Path, syntax: str) -> None:
    folder = write_series(tmp_path / "s", make_ct((5, 16, 16)))
    for path in sorted(folder.iterdir()):
        dataset = pydicom.dcmread(path)
        if syntax == "implicit":
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
            dataset.save_as(path, implicit_vr=True, little_endian=True)
        elif syntax == "big endian":
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
            dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
            pydicom.dcmwrite(path, dataset, implicit_vr=False, little_endian=False)
        elif syntax == "RLE":
            dataset.compress(RLELossless)
            dataset.save_as(path)
        else:
            compress_by_gdcm(path, syntax)
    np.testing.assert_array_equal(read_volume(folder).hu_ZYX, make_ct((5, 16, 16)))


def test_mixed_series_in_a_folder_are_sources_of_their_own(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", make_ct())
    write_series(tmp_path / "other", make_ct(seed=1), edit=lambda i: {"SeriesInstanceUID": "1.2.4"})
    for path in (tmp_path / "other").iterdir():
        path.rename(folder / f"b{path.name}")
    assert refusal(folder) == "mixed_series"
    sources = find_sources(tmp_path)
    assert [(source.path.name, len(source.files)) for source in sources] == [
        ("bslice000.dcm", 9),
        ("slice000.dcm", 9),
    ]
    np.testing.assert_array_equal(read_volume(sources[0].path).hu_ZYX, make_ct(seed=1))
    np.testing.assert_array_equal(read_volume(sources[1].path).hu_ZYX, make_ct())


def test_multiframe_and_secondary_capture_are_refused(tmp_path: Path) -> None:
    enhanced = {"SOPClassUID": CT_STORAGE + ".1", "NumberOfFrames": 9}
    assert (
        refusal(write_series(tmp_path / "s", make_ct()[:1], edit=lambda i: enhanced))
        == "multiframe"
    )
    capture = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}
    assert refusal(write_series(tmp_path / "t", make_ct(), edit=lambda i: capture)) == "not_ct"


def test_values_that_are_declared_to_be_no_hu_are_refused(tmp_path: Path) -> None:
    assert (
        refusal(write_series(tmp_path / "s", make_ct(), edit=lambda i: {"RescaleType": "Z_EFF"}))
        == "not_hu"
    )


def test_a_slice_beside_the_line_of_the_others_is_refused(tmp_path: Path) -> None:
    folder = write_series(
        tmp_path / "s",
        make_ct(),
        edit=lambda i: {"ImagePositionPatient": [3.0 * (i == 4), 0.0, 100.0 + 2 * i]},
    )
    assert refusal(folder) == "uneven_slices"
