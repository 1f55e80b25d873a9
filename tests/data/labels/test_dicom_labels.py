"""DICOM SEG and RTSTRUCT: matched by the series that they refer to, right to the voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from scan_files import make_ct, write_series

from tapct.data.index.build import build_manifest
from tapct.data.labels.polygons import fill_even_odd
from tapct.data.labels.reading import ReadLabels, read_labels_of
from tapct.data.manifest import Manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.store import Store
from tapct.data.scans.ingest import read_volume
from tapct.types import Refused, Volume

SEG, RTSTRUCT = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.481.3"
SHAPE = (9, 14, 17)  # the frames of a SEG then begin inside a byte
FIRST_MM, ROW_MM, COLUMN_MM, SLICE_MM = (-10.0, -20.0, 100.0), 0.7, 0.8, 2.0  # as `write_series`


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    return read_volume(write_series(tmp_path_factory.mktemp("ct") / "ct", make_ct()))


def item(**values: object) -> Dataset:
    dataset = Dataset()
    for tag, value in values.items():
        setattr(dataset, tag, value)
    return dataset


def new_object(sop_class: str, modality: str, **tags: object) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, "1.9.9"
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = sop_class, "1.9.9", modality
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = "1.9", "1.2"
    dataset.PatientName, dataset.PatientID = "Muster^Erika", "P-007"
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    return dataset


def write_seg(
    path: Path, masks: dict[str, np.ndarray], series: str = "1.2.3", **tags: object
) -> Path:
    """A binary SEG that leaves out empty frames and lists the slices of a segment downwards.

    Args:
        path: path of the file.
        masks: bool (Z, Y, X) by name, on the grid of `write_series`.
        series: SeriesInstanceUID that it refers to.
        tags: further tags.
    """
    frames, places = [], []
    for number, mask_ZYX in enumerate(masks.values(), 1):
        for z in np.flatnonzero(mask_ZYX.any((1, 2)))[::-1]:
            frames.append(mask_ZYX[z])
            places.append((number, int(z)))
    bits = np.packbits(np.stack(frames).reshape(-1), bitorder="little").tobytes()
    dataset = new_object(
        SEG,
        "SEG",
        SegmentationType="BINARY",
        ReferencedSeriesSequence=[item(SeriesInstanceUID=series)],
        SegmentSequence=[
            item(SegmentNumber=number, SegmentLabel=name) for number, name in enumerate(masks, 1)
        ],
        NumberOfFrames=len(frames),
        Rows=frames[0].shape[0],
        Columns=frames[0].shape[1],
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=1,
        BitsStored=1,
        HighBit=0,
        PixelRepresentation=0,
        PixelData=bits + b"\0" * (len(bits) % 2),
        SharedFunctionalGroupsSequence=[
            item(
                PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
                # SliceThickness is not the distance of slices, and must not be used as such
                PixelMeasuresSequence=[item(PixelSpacing=[ROW_MM, COLUMN_MM], SliceThickness=5)],
            )
        ],
        PerFrameFunctionalGroupsSequence=[
            item(
                PlanePositionSequence=[
                    item(ImagePositionPatient=[*FIRST_MM[:2], FIRST_MM[2] + SLICE_MM * z])
                ],
                SegmentIdentificationSequence=[item(ReferencedSegmentNumber=number)],
            )
            for number, z in places
        ],
    )
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_rtstruct(
    path: Path,
    regions: dict[str, list[tuple[float, np.ndarray]]],
    series: str = "1.2.3",
    kind: str = "CLOSED_PLANAR",
) -> Path:
    """An RTSTRUCT.

    Args:
        path: path of the file.
        regions: by name, pairs of slice (in voxels) and points (P, 2) as (x, y) in voxels.
        series: SeriesInstanceUID that it refers to.
        kind: geometric type of all contours.
    """
    contours = []
    for number, polygons in enumerate(regions.values(), 11):
        sequence = []
        for z, points_P2 in polygons:
            x = FIRST_MM[0] + COLUMN_MM * points_P2[:, 0]
            y = FIRST_MM[1] + ROW_MM * points_P2[:, 1]
            z_mm = np.full(len(points_P2), FIRST_MM[2] + SLICE_MM * z)
            data = [f"{value:.6f}" for value in np.stack([x, y, z_mm], axis=1).reshape(-1)]
            sequence.append(item(ContourGeometricType=kind, ContourData=data))
        contours.append(item(ReferencedROINumber=number, ContourSequence=sequence))
    referenced = item(RTReferencedSeriesSequence=[item(SeriesInstanceUID=series)])
    dataset = new_object(
        RTSTRUCT,
        "RTSTRUCT",
        StructureSetROISequence=[
            item(ROINumber=number, ROIName=name) for number, name in enumerate(regions, 11)
        ],
        ROIContourSequence=contours,
        ReferencedFrameOfReferenceSequence=[
            item(FrameOfReferenceUID="1.5", RTReferencedStudySequence=[referenced])
        ],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def two_masks() -> dict[str, np.ndarray]:
    """An organ with a gap between its slices and a small one inside it."""
    liver, lesion = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    liver[[2, 3, 6], 3:11, 2:13] = True
    lesion[3, 5:8, 5:7] = True
    return {"Liver": liver, "Lesion 1": lesion}


def test_a_seg_lies_on_the_voxels_of_its_scan(volume: Volume, tmp_path: Path) -> None:
    masks = two_masks()
    found = read_labels_of(volume, write_seg(tmp_path / "seg.dcm", masks))
    expected = np.where(masks["Lesion 1"], 2, masks["Liver"].astype(int))
    np.testing.assert_array_equal(found.label_map.labels_ZYX, expected)
    assert found.label_map.names == ((1, "Liver"), (2, "Lesion 1"))
    assert found.notes == ("structures overlap in 6 voxels; the smaller one is kept",)


def test_a_seg_with_turned_planes_lies_on_the_same_voxels(volume: Volume, tmp_path: Path) -> None:
    """The same mask with columns towards the right and rows towards the front."""
    masks = two_masks()
    path = write_seg(tmp_path / "seg.dcm", {k: v[:, ::-1, ::-1] for k, v in masks.items()})
    dataset = pydicom.dcmread(path)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
    for group in dataset.PerFrameFunctionalGroupsSequence:
        x, y, z = (float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient)
        last = [x + COLUMN_MM * (SHAPE[2] - 1), y + ROW_MM * (SHAPE[1] - 1), z]
        group.PlanePositionSequence[0].ImagePositionPatient = last
    dataset.save_as(path)
    found = read_labels_of(volume, path).label_map
    np.testing.assert_array_equal(found.labels_ZYX > 0, masks["Liver"])


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"SegmentationType": "FRACTIONAL"}, "not_labels: .*FRACTIONAL"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "not_labels: .*SOP class"),
        ({"NumberOfFrames": 9}, "multiframe: .*claims 9 frames and gives the places of 4"),
        ({"PixelData": b"\1\2"}, "truncated"),
        ({"SegmentSequence": [item(SegmentNumber=1)]}, "not_labels: pixels name segment 2"),
        ({"shift": (0.5, 0.0, 0.0)}, "grid_mismatch"),
        ({"shift": (0.0, 0.0, 1.0)}, "grid_mismatch"),
        ({"shift": (8.0, 0.0, 0.0)}, "grid_mismatch: .* outside the scan"),
        ({"shift": (0.0, 0.0, 200.0)}, "grid_mismatch: .* outside the scan"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_seg_that_does_not_fit_is_refused(
    volume: Volume, tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    path = write_seg(tmp_path / "seg.dcm", two_masks())
    dataset = pydicom.dcmread(path)
    for tag, value in change.items():
        if tag != "shift":
            setattr(dataset, tag, value)
            continue
        for group in dataset.PerFrameFunctionalGroupsSequence:
            place = group.PlanePositionSequence[0]
            place.ImagePositionPatient = np.add(place.ImagePositionPatient, value).tolist()
    dataset.save_as(path)
    with pytest.raises(Refused, match=problem):
        read_labels_of(volume, path)


def ring_by_keyhole(centre: tuple[float, float], outer: float, inner: float) -> np.ndarray:
    """A ring as one polygon: the outer circle, a cut to the inner circle, and back."""
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray(centre) + np.concatenate([outer * circle, inner * circle[::-1]])


def test_contours_fill_an_ellipse_and_a_keyhole_ring_to_the_voxel() -> None:
    y, x = np.mgrid[:60, :80]
    angle = np.linspace(0, 2 * np.pi, 4000, endpoint=False)
    ellipse = np.stack([40.3 + 25.2 * np.cos(angle), 30.7 + 17.4 * np.sin(angle)], axis=1)
    inside = ((x - 40.3) / 25.2) ** 2 + ((y - 30.7) / 17.4) ** 2 < 1
    np.testing.assert_array_equal(fill_even_odd([ellipse], (60, 80)), inside)
    assert fill_even_odd([ellipse], (60, 80)).sum() == pytest.approx(np.pi * 25.2 * 17.4, rel=0.01)

    distance = np.hypot(x - 40.3, y - 30.7)
    expected = (distance < 20.1) & (distance > 9.7)
    ring = fill_even_odd([ring_by_keyhole((40.3, 30.7), 20.1, 9.7)], (60, 80))
    assert (ring != expected).sum() <= 2  # 200 corners are not a circle
    two = [ring_by_keyhole((40.3, 30.7), r, r)[:200] for r in (20.1, 9.7)]
    np.testing.assert_array_equal(fill_even_odd(two, (60, 80)), ring)  # the hole as a contour


def test_filling_equals_a_count_of_crossings() -> None:
    """Polygons with crossing edges and corners on pixel centres, against one ray per pixel."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = rng.integers(-2, 12, (7, 2)).astype(float)
        filled = fill_even_odd([points], (10, 10))
        for y, x in np.ndindex(10, 10):
            crossings = 0
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
                if (y0 <= y) != (y1 <= y):
                    crossings += x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x
            assert filled[y, x] == crossings % 2


def test_an_rtstruct_is_filled_on_the_slices_of_its_scan(volume: Volume, tmp_path: Path) -> None:
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    ring = ring_by_keyhole((8.2, 6.6), 5.1, 2.4)
    square = np.asarray([[-3, -3], [30, -3], [30, 30], [-3, 30]])  # reaches beyond the scan
    regions = {
        "Bowel": [(z, ring) for z in (2, 3, 4.1)],
        "Outline": [(z, square) for z in range(1, 8)],
    }
    found = read_labels_of(volume, write_rtstruct(tmp_path / "rs.dcm", regions)).label_map
    distance = np.hypot(x - 8.2, y - 6.6)
    expected = np.zeros(SHAPE, int)
    expected[1:8] = 12
    expected[2:5][:, (distance < 5.1) & (distance > 2.4)] = 11
    np.testing.assert_array_equal(found.labels_ZYX, expected)
    assert found.names == ((11, "Bowel"), (12, "Outline"))


@pytest.mark.parametrize(
    "z, problem", [(3.4, "slices off the slices"), (9.0, "slice 9 of 0 to 8"), (-1, "slice -1")]
)
def test_contours_between_or_outside_the_slices_are_refused(
    volume: Volume, tmp_path: Path, z: float, problem: str
) -> None:
    square = np.asarray([[2, 2], [9, 2], [9, 9], [2, 9]])
    path = write_rtstruct(tmp_path / "rs.dcm", {"a": [(3, square), (z, square)]})
    with pytest.raises(Refused, match=f"grid_mismatch: .*{problem}"):
        read_labels_of(volume, path)


def test_open_contours_are_left_out_and_counted(volume: Volume, tmp_path: Path) -> None:
    points = np.asarray([[2, 2], [9, 2], [9, 9]])
    path = write_rtstruct(tmp_path / "rs.dcm", {"a": [(3, points)]}, kind="OPEN_PLANAR")
    found = read_labels_of(volume, path)
    assert not found.label_map.labels_ZYX.any()
    assert found.notes == ("1 contour that is no closed polygon is not used",)


def test_names_that_may_be_those_of_a_patient_are_left_out(volume: Volume, tmp_path: Path) -> None:
    masks = two_masks()
    names = ("Nodule of MUSTER", "Vogel^Hans")
    path = write_seg(tmp_path / "seg.dcm", dict(zip(names, masks.values())))
    found = read_labels_of(volume, path)
    assert found.label_map.names == ()
    assert "2 label names are not used" in found.notes


def test_objects_are_matched_by_the_series_that_they_refer_to(tmp_path: Path) -> None:
    root = tmp_path / "a"
    for number in range(3):
        uids = {"SeriesInstanceUID": f"1.2.{number}", "FrameOfReferenceUID": f"1.5.{number}"}
        write_series(
            root / f"p{number}" / "ct", make_ct(seed=number), edit=lambda _, uids=uids: uids
        )
    write_seg(root / "objects" / "x" / "1.dcm", two_masks(), series="1.2.1")
    square = np.asarray([[2, 2], [9, 2], [9, 9], [2, 9]])
    write_rtstruct(root / "objects" / "y" / "2.dcm", {"Cord": [(3, square)]}, series="1.2.2")
    write_rtstruct(root / "objects" / "z" / "3.dcm", {"Cord": [(3, square)]}, series="1.2.9")
    built = build_manifest(root, tmp_path / "m.parquet")
    assert {row.path: row.label_path for row in built.accepted} == {
        "p0/ct": "",
        "p1/ct": "objects/x/1.dcm",
        "p2/ct": "objects/y/2.dcm",
    }
    assert built.label_report is not None
    (line,) = built.label_report.lines()
    assert line == "labels: 2 of 3 scans; unmatched label files: 1, e.g. objects/z/3.dcm"


def box(*bounds: int) -> np.ndarray:
    """A mask of one box: first and end along z, y and x."""
    mask_ZYX = np.zeros(SHAPE, bool)
    z0, z1, y0, y1, x0, x1 = bounds
    mask_ZYX[z0:z1, y0:y1, x0:x1] = True
    return mask_ZYX


LIVER, SPLEEN = box(1, 6, 2, 8, 2, 7), box(3, 7, 3, 9, 9, 14)
TUMOUR, HALF_IN_THE_LIVER = box(2, 4, 3, 6, 3, 6), box(1, 6, 2, 8, 5, 10)


def read_both(
    volume: Volume, folder: Path, one: dict[str, np.ndarray], other: dict[str, np.ndarray]
) -> ReadLabels:
    paths = [write_seg(folder / name, masks) for name, masks in (("a.dcm", one), ("b.dcm", other))]
    return read_labels_of(volume, paths[0], more=paths[1:])


def test_objects_with_different_structures_are_merged(volume: Volume, tmp_path: Path) -> None:
    found = read_both(
        volume, tmp_path, {"Liver": LIVER}, {"Spleen": SPLEEN, "Tumour": TUMOUR, "liver": LIVER}
    )
    # the first object keeps 1; 1 is then taken, and so 2 is free for the spleen's next one
    names = dict(found.label_map.names)
    assert sorted(names.values()) == ["Liver", "Spleen", "Tumour"]
    assert names[1] == "Liver"
    by_name = {name: found.label_map.labels_ZYX == value for value, name in names.items()}
    np.testing.assert_array_equal(by_name["Liver"], LIVER & ~TUMOUR)
    np.testing.assert_array_equal(by_name["Spleen"], SPLEEN)
    np.testing.assert_array_equal(by_name["Tumour"], TUMOUR)
    assert found.notes == (
        "2 DICOM objects are merged",
        "1 structure is in several objects and used once",
        f"structures overlap in {TUMOUR.sum()} voxels; the smaller one is kept",
    )


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        ({"Liver": LIVER}, {"liver ": SPLEEN}, "'liver' has 120 and 150 voxels, 0 of them common"),
        ({"Liver": LIVER}, {"Spleen": HALF_IN_THE_LIVER}, "overlap in 60 voxels, and neither"),
        ({"Liver": LIVER}, {"Spleen": LIVER}, "have the same voxels"),
        ({"": LIVER}, {"": SPLEEN}, "'number 1' has 120 and 150 voxels"),
        ({"Liver": LIVER}, {"Tumour": TUMOUR, "Liver": SPLEEN}, "'liver' has 120 and 150"),
    ],
)
def test_objects_that_contradict_each_other_are_refused(
    volume: Volume,
    tmp_path: Path,
    one: dict[str, np.ndarray],
    other: dict[str, np.ndarray],
    why: str,
) -> None:
    with pytest.raises(Refused, match=r"a\.dcm and b\.dcm contradict each other: ") as caught:
        read_both(volume, tmp_path, one, other)
    assert caught.value.reason == "contradictory_labels"
    assert why in caught.value.detail


def test_a_mask_and_the_contour_that_it_was_made_of_are_one_structure(
    volume: Volume, tmp_path: Path
) -> None:
    square = np.asarray([[2, 2], [6.4, 2], [6.4, 7], [2, 7]])  # its upper row is not in the mask
    seg = write_seg(tmp_path / "a.dcm", {"Liver": LIVER, "Spleen": SPLEEN})
    drawn = {"GTV-1": [(z, square) for z in range(1, 6)]}
    contours = write_rtstruct(tmp_path / "b.dcm", drawn)
    found = read_labels_of(volume, seg, more=[contours])
    np.testing.assert_array_equal(found.label_map.labels_ZYX, 1 * LIVER + 2 * SPLEEN)
    assert found.label_map.names == ((1, "Liver"), (2, "Spleen"))
    far = {"Liver": [(z, square + [8, 6]) for z in range(1, 6)]}
    with pytest.raises(Refused, match="contradict"):
        read_labels_of(volume, seg, more=[write_rtstruct(tmp_path / "b.dcm", far)])


def test_several_objects_of_one_scan_are_indexed_and_packed_as_one_label_map(
    tmp_path: Path,
) -> None:
    root = tmp_path / "a"
    for number in range(2):
        uids = {"SeriesInstanceUID": f"1.2.{number}"}
        write_series(
            root / f"p{number}" / "ct", make_ct(seed=number), edit=lambda _, uids=uids: uids
        )
        write_seg(root / "objects" / f"{number}a.dcm", {"Liver": LIVER}, series=f"1.2.{number}")
        other = {"Liver": SPLEEN} if number else {"Spleen": SPLEEN}
        write_seg(root / "objects" / f"{number}b.dcm", other, series=f"1.2.{number}")
    built = build_manifest(root, tmp_path / "m.parquet")
    merged, contradictory = built.accepted
    assert merged.label_path == "objects/0a.dcm"
    assert merged.merged_labels == ("objects/0b.dcm",)
    assert "its labels: 2 DICOM objects are merged" in merged.detail
    assert (contradictory.label_path, contradictory.merged_labels) == ("", ())
    assert "its labels are not used: contradictory_labels: <file> and <file>" in (
        contradictory.detail
    )
    assert built.label_report is not None
    assert built.label_report.lines() == [
        "labels: 1 of 2 scans; 1 found but not used (1 contradictory_labels)",
        "labels that are not used, e.g. 1a.dcm and 1b.dcm contradict each other: 'liver' has 120 "
        "and 150 voxels, 0 of them common; move one of them out of the archive",
    ]
    read_again = Manifest.read(tmp_path / "m.parquet")
    assert [row.merged_labels for row in read_again.rows] == [merged.merged_labels, ()]
    pack(read_again, tmp_path / "store")
    labels = Store(tmp_path / "store").read_labels(0)
    np.testing.assert_array_equal(labels.labels_ZYX, 1 * LIVER + 2 * SPLEEN)
