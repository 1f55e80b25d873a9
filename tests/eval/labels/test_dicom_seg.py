"""Predictions as DICOM SEG lie on the pixels of the original series and refer to its images.

The files are read back by highdicom and by tapct's own reader of labels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from scan_files import CT_STORAGE, make_ct, make_slice, write_nifti, write_series

from tapct.base.exits import UserError
from tapct.data.index.build import build_manifest
from tapct.data.labels.reading import read_labels_of
from tapct.data.packed.pack import pack
from tapct.data.packed.store import Store
from tapct.data.readers import dicom_elements as elements
from tapct.data.readers import dicom_seg
from tapct.data.scans.ingest import read_volume
from tapct.data.scans.read_rules import ReadRules
from tapct.eval.labels.prediction_files import DICOM_SEG, PredictionFiles
from tapct.eval.tasks.segmentation import Config, build
from tapct.types import LabelMap, Volume

SHAPE = (6, 24, 26)
NAMES = ((2, "liver"), (5, "kidney_left"), (782, "tumor"))
ROW_MM, COLUMN_MM, STEP_MM = 0.7, 0.8, 2.0  # of `write_series`
TURN = np.radians(8)
# directions of rows and columns, as ImageOrientationPatient; the body is the same for the reader,
# which only permutes and flips
UPRIGHT, SAGITTAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)
OBLIQUE = (1, 0, 0, 0, float(np.cos(TURN)), float(np.sin(TURN)))


def placed(
    axes: tuple[float, ...], lean: float = 0.0, **tags: object
) -> Callable[[int], dict[str, object]]:
    """Tags of each slice of a stack along the normal of its planes.

    Args:
        axes: ImageOrientationPatient.
        lean: mm by which each slice is shifted along its columns against the one before.
        tags: further tags.
    """
    normal = np.cross(axes[:3], axes[3:])

    def edit(index: int) -> dict[str, object]:
        position = np.array([3.0, -5.0, 100.0]) + index * (
            STEP_MM * normal + lean * np.asarray(axes[3:])
        )
        return {
            "ImagePositionPatient": [float(f"{value:.6f}") for value in position],
            "ImageOrientationPatient": list(axes),
            "FrameOfReferenceUID": "1.2.7",
            "PatientName": "Muster^Erika",
            **tags,
        }

    return edit


def series(name: str) -> dict[str, object]:
    """SOP and series UIDs of one series, different for each name."""
    number = sum(map(ord, name))
    return {"SeriesInstanceUID": f"1.2.3.{number}", "StudyInstanceUID": f"1.2.{number}"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of DICOM series and one NIfTI file, its manifest and its store."""
    folder = tmp_path_factory.mktemp("series")
    root = folder / "archive"
    kinds = {
        "upright": placed(UPRIGHT),
        "oblique": placed(OBLIQUE),
        "sagittal": placed(SAGITTAL),
        "gantry": placed(UPRIGHT, lean=0.5),
        "reversed": placed(UPRIGHT),
        "frameless": placed(UPRIGHT, FrameOfReferenceUID=None),
    }
    for seed, (name, edit) in enumerate(kinds.items()):

        def tags(index: int, name: str = name, edit: object = edit) -> dict[str, object]:
            at = SHAPE[0] - 1 - index if name == "reversed" else index
            uids = series(name)
            uids["SOPInstanceUID"] = f"{uids['SeriesInstanceUID']}.{index + 1}"
            return {**edit(at), **uids}  # type: ignore[operator]

        hu_KJI = make_ct(SHAPE, seed)
        if name == "reversed":
            hu_KJI = hu_KJI[::-1]
        if name == "sagittal":  # slices towards -x, rows downwards, columns towards the back
            hu_KJI = make_ct((SHAPE[1], SHAPE[2], 12), seed)[::-1, :, ::-1].transpose(2, 0, 1)
        write_series(root / name, hu_KJI, edit=tags)
    write_nifti(root / "plain.nii.gz", make_ct(SHAPE, 9))
    manifest = build_manifest(
        root, folder / "manifest.parquet", min_depth=2, accept=ReadRules(resample_tilt=True)
    )
    assert len(manifest.accepted) == len(kinds) + 1, [row.detail for row in manifest.rows]
    pack(manifest, folder / "store")
    return folder


def prediction(store: Store, name: str) -> tuple[str, LabelMap]:
    """Random labels on the grid of a packed scan."""
    place = next(scan for scan in store.scans if scan.path.startswith(name))
    shape = place.shape_ZYX
    rng = np.random.default_rng(7)
    labels = rng.choice([0, 2, 5, 782], shape, p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint16)
    labels[2] = 0  # a slice without an organ has no frame
    return place.id, LabelMap(labels, (1.0, 1.0, 1.0), names=NAMES)


def written(packed: Path, out: Path, name: str) -> tuple[Path, LabelMap, PredictionFiles]:
    store = Store(packed / "store")
    scan_id, labels = prediction(store, name)
    files = PredictionFiles(out, store)
    files.write("segmentation", "pretrained", scan_id, labels, DICOM_SEG)
    return out / "segmentation" / "pretrained" / f"{scan_id}.dcm", labels, files


def by_name(labels_ZYX: np.ndarray, names: tuple[tuple[int, str], ...]) -> dict[str, np.ndarray]:
    return {name: labels_ZYX == value for value, name in names}


@pytest.mark.parametrize("name", ["upright", "oblique", "sagittal", "gantry", "reversed"])
def test_a_seg_has_the_voxels_of_the_prediction(packed: Path, tmp_path: Path, name: str) -> None:
    path, labels, files = written(packed, tmp_path, name)
    folder = packed / "archive" / name
    volume = read_volume(folder, accept=ReadRules(resample_tilt=True))
    expected = by_name(labels.labels_ZYX, NAMES)

    found = read_labels_of(volume, path)
    assert found.notes == ()
    assert found.label_map.names == ((1, "liver"), (2, "kidney_left"), (3, "tumor"))
    own = by_name(found.label_map.labels_ZYX, found.label_map.names)
    for organ in expected:
        np.testing.assert_array_equal(own[organ], expected[organ])

    check_by_highdicom(path, volume, expected)
    seg, images = pydicom.dcmread(path), [pydicom.dcmread(file) for file in folder.iterdir()]
    first = images[0]
    assert seg.FrameOfReferenceUID == first.FrameOfReferenceUID == "1.2.7"
    assert seg.StudyInstanceUID == first.StudyInstanceUID
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == first.SeriesInstanceUID
    referenced = {
        item.ReferencedSOPInstanceUID
        for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert referenced == {image.SOPInstanceUID for image in images}
    assert seg.SeriesInstanceUID != first.SeriesInstanceUID
    assert path.stat().st_mode & 0o077 == 0  # it holds the name of the patient
    if name != "gantry":
        check_images_of_frames(seg, images)


def check_by_highdicom(path: Path, volume: Volume, expected: dict[str, np.ndarray]) -> None:
    """Every voxel of every segment that highdicom reads lies at the mm of the same voxel."""
    seg = highdicom.seg.segread(path)
    for number, (organ, mask_ZYX) in enumerate(expected.items(), 1):
        read = seg.get_volume(segment_numbers=[number], combine_segments=True)
        places_mm = np.argwhere(read.array == number) @ read.affine[:3, :3].T + read.affine[:3, 3]
        at_ZYX = np.argwhere(mask_ZYX)
        directions = np.asarray(volume.directions)
        steps = at_ZYX[:, ::-1] * np.asarray(volume.spacing_mm[::-1])
        truth_mm = steps @ directions + np.asarray(volume.origin_mm)
        assert len(places_mm) == len(truth_mm) > 0, organ
        first, second = (sorted(map(tuple, np.round(mm, 2))) for mm in (places_mm, truth_mm))
        np.testing.assert_allclose(first, second, atol=0.03)


def check_images_of_frames(seg: pydicom.Dataset, images: list[pydicom.Dataset]) -> None:
    """Each frame lies where the image lies that it was derived from."""
    position = {image.SOPInstanceUID: image.ImagePositionPatient for image in images}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        np.testing.assert_allclose(
            [float(mm) for mm in frame.PlanePositionSequence[0].ImagePositionPatient],
            [float(mm) for mm in position[source.ReferencedSOPInstanceUID]],
            atol=1e-6,
        )


def write_two_stacks(path: Path, hu_SKJI: np.ndarray) -> None:
    """One multi-frame file with two stacks, whose frames alternate, the first one downwards."""
    num = len(hu_SKJI[0])
    dataset = make_slice(
        hu_SKJI[0, 0],
        0.0,
        SOPClassUID=f"{CT_STORAGE}.1",
        NumberOfFrames=2 * num,
        FrameOfReferenceUID="1.2.7",
        **dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")),
    )
    dataset.file_meta.MediaStorageSOPClassUID = f"{CT_STORAGE}.1"

    def item(**values: object) -> pydicom.Dataset:
        one = pydicom.Dataset()
        for tag, value in values.items():
            setattr(one, tag, value)
        return one

    frames, pixels = [], []
    for k, stack in np.ndindex(num, 2):
        at = num - 1 - k if stack == 0 else k
        position = [-10.0, -20.0, 100.0 + STEP_MM * at + 100 * stack]
        frames.append(
            item(
                PlanePositionSequence=[item(ImagePositionPatient=position)],
                FrameContentSequence=[
                    item(StackID=str(stack + 1), DimensionIndexValues=[stack + 1, at + 1])
                ],
            )
        )
        pixels.append(hu_SKJI[stack, at] + 1024)
    dataset.SharedFunctionalGroupsSequence = [
        item(
            PlaneOrientationSequence=[item(ImageOrientationPatient=list(UPRIGHT))],
            PixelMeasuresSequence=[item(PixelSpacing=[ROW_MM, COLUMN_MM], SliceThickness=5.0)],
        )
    ]
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.PixelData = np.stack(pixels).astype(np.uint16).tobytes()
    path.parent.mkdir(parents=True)
    dataset.save_as(path, enforce_file_format=True)


def test_a_stack_of_a_multi_frame_file_has_its_own_seg(tmp_path: Path) -> None:
    write_two_stacks(tmp_path / "a" / "e.dcm", make_ct((16, 24, 26), 4).reshape(2, 8, 24, 26))
    manifest = build_manifest(tmp_path / "a", tmp_path / "m.parquet", min_depth=2)
    assert len(manifest.accepted) == 2, [row.detail for row in manifest.rows]
    pack(manifest, tmp_path / "store")
    store = Store(tmp_path / "store")
    for scan in store.scans:
        _, labels = prediction(store, scan.path)
        PredictionFiles(tmp_path, store).write("segmentation", "m", scan.id, labels, DICOM_SEG)
        path = tmp_path / "segmentation" / "m" / f"{scan.id}.dcm"
        volume = read_volume(tmp_path / "a" / scan.path)
        found = read_labels_of(volume, path).label_map
        expected = by_name(labels.labels_ZYX, NAMES)
        own = by_name(found.labels_ZYX, found.names)
        for organ in expected:
            np.testing.assert_array_equal(own[organ], expected[organ])
        check_by_highdicom(path, volume, expected)


def test_a_seg_holds_no_more_about_the_patient_than_its_series(
    packed: Path, tmp_path: Path
) -> None:
    path, _, _ = written(packed, tmp_path, "upright")
    seg = pydicom.dcmread(path)
    image = pydicom.dcmread(packed / "archive" / "upright" / "slice000.dcm")
    assert (seg.PatientName, seg.PatientID) == (image.PatientName, image.PatientID)
    for element in seg:
        if element.tag.group == 0x10 and element.value:
            assert element.value == image[element.tag].value
    (first, second, third) = seg.SegmentSequence
    kinds = [one.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for one in seg.SegmentSequence]
    assert kinds == ["Liver", "Kidney", "Lesion"]
    assert third.SegmentDescription == "label value 782" and first.SegmentLabel == "liver"
    assert second.SegmentAlgorithmType == "AUTOMATIC"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"SpecificCharacterSet": ""}, {"PatientName": "Muster^Erika"}),
        (
            {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Zoë"},
            {"PatientName": "Müller^Zoë"},
        ),
        (
            {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientID": "P 1"},
            {"PatientID": "P 1"},
        ),
        ({"PatientSex": "W", "StudyTime": "noon"}, {"PatientSex": "", "StudyTime": None}),
        ({"StudyDate": "unknown", "PatientBirthDate": "19503"}, {"StudyDate": ""}),
        ({"PatientID": None, "StudyDate": None}, {"PatientID": ""}),
    ],
    ids=lambda value: "-".join(value),
)
def test_headers_that_real_archives_have_are_accepted(
    packed: Path, tmp_path: Path, change: dict[str, object], kept: dict[str, object]
) -> None:
    files = sorted((packed / "archive" / "upright").iterdir())
    for path in files:
        image = pydicom.dcmread(path)
        with elements.quiet():
            for tag, value in change.items():
                setattr(image, tag, value)
                if value is None:
                    delattr(image, tag)
            image.save_as(tmp_path / path.name)
    volume = read_volume(tmp_path)
    source = dicom_seg.read_source(sorted(tmp_path.glob("*.dcm")))
    labels_ZYX = np.random.default_rng(3).choice([0, 2], volume.hu_ZYX.shape).astype(np.uint16)
    path = tmp_path / "seg" / "seg.dcm"
    path.parent.mkdir()
    dicom_seg.write(path, labels_ZYX.transpose(2, 1, 0), source, [(2, "liver")], "test")
    seg = pydicom.dcmread(path)
    for tag, value in kept.items():
        assert (seg.get(tag) or "") == (value or "")
    found = read_labels_of(volume, path).label_map
    np.testing.assert_array_equal(found.labels_ZYX == 1, labels_ZYX == 2)


def test_the_same_prediction_has_the_same_uids_and_another_one_has_not(
    packed: Path, tmp_path: Path
) -> None:
    store = Store(packed / "store")
    scan_id, labels = prediction(store, "upright")
    other = LabelMap(
        np.where(labels.labels_ZYX == 2, 0, labels.labels_ZYX), (1.0,) * 3, names=NAMES
    )
    uids = []
    for model, one in (("a", labels), ("a", labels), ("a", other), ("b", labels)):
        PredictionFiles(tmp_path, store).write("segmentation", model, scan_id, one, DICOM_SEG)
        seg = pydicom.dcmread(tmp_path / "segmentation" / model / f"{scan_id}.dcm")
        uids.append((seg.SOPInstanceUID, seg.SeriesInstanceUID))
    assert uids[0] == uids[1]
    assert len({sop for sop, _ in uids}) == 3
    assert uids[0][1] == uids[2][1] != uids[3][1]  # one series for each model


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("plain", "the original is NIfTI, not DICOM"),
        ("frameless", "has no FrameOfReferenceUID, which a DICOM SEG needs"),
    ],
)
def test_a_scan_without_a_series_to_refer_to_gets_nifti_and_a_line(
    packed: Path, tmp_path: Path, name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, files = written(packed, tmp_path, name)
    assert not path.exists() and path.with_name(f"{path.stem}.nii.gz").exists()
    files.report()
    printed = " ".join("".join(capsys.readouterr()).split())
    assert f"predictions of 1 scan are NIfTI and not DICOM SEG; scan {path.stem}:" in printed
    assert reason in printed


def test_a_prediction_replaces_the_one_in_the_other_format(packed: Path, tmp_path: Path) -> None:
    path, labels, files = written(packed, tmp_path, "upright")
    files.write("segmentation", "pretrained", path.stem, labels)
    assert not path.exists() and path.with_name(f"{path.stem}.nii.gz").exists()
    files.write("segmentation", "pretrained", path.stem, labels, DICOM_SEG)
    assert path.exists() and not path.with_name(f"{path.stem}.nii.gz").exists()


def test_a_prediction_without_any_organ_is_an_empty_seg(packed: Path, tmp_path: Path) -> None:
    store = Store(packed / "store")
    scan_id, labels = prediction(store, "upright")
    empty = LabelMap(np.zeros_like(labels.labels_ZYX), (1.0,) * 3, names=NAMES)
    PredictionFiles(tmp_path, store).write("segmentation", "m", scan_id, empty, DICOM_SEG)
    volume = read_volume(packed / "archive" / "upright")
    path = tmp_path / "segmentation" / "m" / f"{scan_id}.dcm"
    assert not read_labels_of(volume, path).label_map.labels_ZYX.any()


def test_a_format_without_predictions_and_a_missing_package_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match="no predictions are written; set .*predictions=true"):
        build(Config(prediction_format=DICOM_SEG), seed=0).begin(1)
    task = build(Config(prediction_format=DICOM_SEG, predictions=True), seed=0)
    task.begin(1)
    assert task.prediction_format == DICOM_SEG
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(UserError, match=r"pip install .*-e '\.\[dicom\]'"):
        task.begin(1)


def test_codes_of_organs_are_those_of_the_standard_list() -> None:
    names = ("Lungs", "parotid_left", "spinal_cord", "Brainstem", "organ 51", "liver lesion")
    kinds = [dicom_seg.codes_of(name)[1].meaning for name in names]
    assert kinds == [
        *("Lung", "Parotid gland", "Spinal cord", "Brain Stem"),
        *("Anatomical Structure", "Lesion"),
    ]
