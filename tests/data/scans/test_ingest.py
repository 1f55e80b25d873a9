"""Facts, labels and the list of what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from scan_files import LPS, make_ct, make_labels, make_slice, refusal, write_nifti, write_series

from tapct.base.exits import UserError
from tapct.data.labels.reading import read_labels
from tapct.data.readers import stem_of
from tapct.data.scans.geometry import check_same_grid
from tapct.data.scans.ingest import read_volume
from tapct.data.search.discover import find_sources
from tapct.types import LabelMap, Refused, Volume


def test_facts_hold_no_identifier_in_clear(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", make_ct())
    facts = read_volume(folder, key=b"k" * 16).facts
    assert (facts.sex, facts.age_years, facts.study_date) == ("F", 63.0, "20200131")
    assert (facts.manufacturer, facts.kernel) == ("ACME", "B30f/3")
    assert len(facts.patient) == 16
    assert "007" not in repr(facts)
    assert "1.2.3" not in repr(facts)
    assert facts.patient != read_volume(folder, key=b"j" * 16).facts.patient
    assert read_volume(folder).facts.patient == ""


def test_side_car_and_dicom_give_the_same_facts(tmp_path: Path) -> None:
    sidecar = {
        "PatientID": "P-007",
        "PatientSex": "F",
        "PatientAge": "063Y",
        "StudyDate": "2020-01-31",
    }
    sidecar |= {"Manufacturer": "ACME", "ConvolutionKernel": "B30f/3", "Modality": "CT"}
    sidecar |= {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.3"}
    path = write_nifti(tmp_path / "a.nii.gz", make_ct())
    (tmp_path / "a.json").write_text(json.dumps(sidecar))
    folder = write_series(tmp_path / "s", make_ct())
    assert read_volume(path, key=b"k").facts == read_volume(folder, key=b"k").facts


@pytest.mark.parametrize(
    "age, years", [("018M", 1.5), ("052W", 0.9966), ("003D", 0.00821), (63, 63.0), (41.5, 41.5)]
)
def test_ages_in_every_unit(tmp_path: Path, age: object, years: float) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", make_ct())
    (tmp_path / "a.json").write_text(json.dumps({"PatientAge": age}))
    assert read_volume(path).facts.age_years == pytest.approx(years, rel=1e-2)


def test_broken_side_car_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", make_ct())
    for text in ("{not json", "[1]"):
        (tmp_path / "a.json").write_text(text)
        assert refusal(path) == "bad_sidecar"


def test_labels_keep_values_above_255_and_follow_the_scan(tmp_path: Path) -> None:
    affine = np.diag([-0.8, 0.7, -2.5, 1.0])
    labels = read_labels(write_nifti(tmp_path / "l.nii.gz", make_labels(), affine))
    np.testing.assert_array_equal(labels.labels_ZYX, make_labels()[::-1, :, ::-1])
    assert labels.labels_ZYX.dtype == np.uint16
    check_same_grid(read_volume(write_nifti(tmp_path / "s.nii.gz", make_ct(), affine)), labels)


@pytest.mark.parametrize("bad", [-1, 65536, 0.5, np.nan])
def test_values_that_are_no_labels_are_refused(tmp_path: Path, bad: float) -> None:
    values = make_labels().astype(np.float32)
    values[3, 3, 3] = bad
    with pytest.raises(Refused, match="not_labels"):
        read_labels(write_nifti(tmp_path / "l.nii.gz", values))


def test_label_names_from_side_car_slicer_header_and_nifti_extension(tmp_path: Path) -> None:
    expected = ((1, "liver"), (782, "left lung"))
    path = write_nifti(tmp_path / "l.nii.gz", make_labels())
    assert read_labels(path).names == ()
    for table in ({"1": "liver", "782": "left lung"}, {"left lung": 782, "liver": 1}):
        (tmp_path / "l.json").write_text(json.dumps({"labels": table}))
        assert read_labels(path).names == expected
    image = SimpleITK.GetImageFromArray(make_labels())
    for number, (value, name) in enumerate(expected):
        image.SetMetaData(f"Segment{number}_LabelValue", str(value))
        image.SetMetaData(f"Segment{number}_Name", name)
    SimpleITK.WriteImage(image, tmp_path / "m.seg.nrrd", True)
    assert read_labels(tmp_path / "m.seg.nrrd").names == expected
    nifti = nibabel.Nifti1Image(make_labels().transpose(2, 1, 0), LPS)
    text = "".join(
        f'<Label Key="{value}" Red="1"><![CDATA[{name}]]></Label>' for value, name in expected
    )
    nifti.header.extensions.append(
        nibabel.nifti1.Nifti1Extension(0, f"<LabelTable>{text}</LabelTable>".encode())
    )
    nibabel.save(nifti, tmp_path / "n.nii.gz")
    assert read_labels(tmp_path / "n.nii.gz").names == expected
    np.testing.assert_array_equal(read_labels(tmp_path / "n.nii.gz").labels_ZYX, make_labels())


def test_labels_must_lie_on_the_grid_of_the_scan() -> None:
    volume = Volume(make_ct(), (2.5, 0.7, 0.8), (1.0, 2.0, 3.0))
    labels = make_labels()
    check_same_grid(volume, LabelMap(labels, (2.5001, 0.7, 0.8), (1.0, 2.1, 3.0)))
    for wrong in (
        LabelMap(labels[1:], (2.5, 0.7, 0.8), (1.0, 2.0, 3.0)),
        LabelMap(labels, (2.5, 0.7, 0.8), (1.0, 2.0, 5.5)),
        LabelMap(labels, (2.7, 0.7, 0.8), (1.0, 2.0, 3.0)),
    ):
        with pytest.raises(Refused, match="grid_mismatch"):
            check_same_grid(volume, wrong)


def test_sources_are_sorted_and_hidden_ones_skipped(tmp_path: Path) -> None:
    write_series(tmp_path / "b", make_ct())
    for name in ("c.nii.gz", "a.nii", ".hidden.nii.gz", "notes.txt", "c.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.nii").write_bytes(b"")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "z.mha").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    names = [source.path.relative_to(tmp_path).as_posix() for source in find_sources(tmp_path)]
    assert names == ["a.nii", "b", "c.nii.gz", "d/z.mha"]


def test_dicom_without_extension_is_found_and_dicomdir_is_not(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", make_ct())
    for path in list(folder.iterdir()):
        path.rename(folder / f"1.2.840.{path.stem[-3:]}")
    index = make_slice(make_ct()[0], 0.0)
    index.SOPClassUID = index.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    index.save_as(folder / "DICOMDIR", enforce_file_format=True)
    (source,) = find_sources(tmp_path)
    assert (source.path, source.kind, len(source.files)) == (folder, "dicom", 9)
    np.testing.assert_array_equal(read_volume(folder).hu_ZYX, make_ct())


def test_one_corrupt_dicom_does_not_hide_its_neighbours(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", make_ct())
    (folder / "bad.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 900)
    (folder / "empty.dcm").write_bytes(b"")
    assert [source.path.name for source in find_sources(tmp_path)] == ["s", "bad.dcm", "empty.dcm"]
    np.testing.assert_array_equal(read_volume(folder).hu_ZYX, make_ct())


def test_missing_folder_and_file_instead_of_folder_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for path in (tmp_path / "a.txt", tmp_path / "missing"):
        with pytest.raises(UserError) as caught:
            find_sources(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_stems_of_every_format() -> None:
    names = ("a.b.nii.gz", "a.b.nii", "a.b.nrrd", "a.b.mha", "a.b.dcm", "a.b")
    assert {stem_of(Path(name)) for name in names} == {"a.b"}
