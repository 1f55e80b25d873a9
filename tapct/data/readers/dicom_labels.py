"""DICOM objects that hold labels: segmentations (SEG) and radiotherapy structure sets (RTSTRUCT).

They are read by pydicom alone. Their masks lie on the slices of the scan that they refer to, so
they are returned piece by piece with positions in LPS mm, and `labels.dicom_masks` puts them onto
the grid of that scan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tapct.base.marks import file_name, quoted
from tapct.data.readers import dicom_elements as elements
from tapct.data.readers import dicom_groups as functional
from tapct.data.readers.dicom_kind import SEGMENTATIONS, STRUCTURE_SET
from tapct.types import Refused

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_REFERENCE_TAGS = [
    *("SOPClassUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"),
]
_SERIES = "ReferencedSeriesSequence"
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


@dataclass(frozen=True)
class Reference:
    """The UIDs by which a DICOM object and its scan are matched.

    Args:
        series: its own SeriesInstanceUID.
        frame: its FrameOfReferenceUID; empty where it has none.
        is_label_object: whether it is a SEG or RTSTRUCT.
        is_contours: whether it is an RTSTRUCT.
        referenced_series: SeriesInstanceUIDs that a label object was drawn on.
    """

    series: str
    frame: str
    is_label_object: bool = False
    is_contours: bool = False
    referenced_series: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """One segment or region of interest.

    Args:
        number: SegmentNumber or ROINumber.
        name: SegmentLabel or ROIName as the file holds it.
    """

    number: int
    name: str


@dataclass(frozen=True)
class SegFrame:
    """The mask of a segmentation on one plane.

    Args:
        values: (rows, columns): structure number of each pixel, 0 outside.
        to_mm: 4x4 matrix, (column, row, 0, 1) -> LPS mm.
    """

    values: np.ndarray
    to_mm: np.ndarray


@dataclass(frozen=True)
class Contour:
    """One closed polygon of a region of interest.

    Args:
        number: ROINumber.
        points_mm: (P, 3), LPS mm, without a repeated last point.
    """

    number: int
    points_mm: np.ndarray


@dataclass(frozen=True)
class LabelObject:
    """A SEG or RTSTRUCT, read.

    Args:
        structures: its structures, in the order of the file.
        identity: words that identify the patient in this file; no name of a structure may hold one.
        contours: polygons of an RTSTRUCT; empty for a SEG.
        num_open: number of contours of an RTSTRUCT that are no closed polygons and are left out.
        dataset: the whole SEG, from which `frames` decodes; None for an RTSTRUCT.
    """

    structures: tuple[Structure, ...]
    identity: tuple[str, ...]
    contours: tuple[Contour, ...] = ()
    num_open: int = 0
    dataset: Dataset | None = None


def reference_of(path: Path) -> Reference | None:
    """The UIDs of a DICOM file; None where it cannot be read."""
    try:
        with elements.quiet():
            head = elements.read_dataset(path, _REFERENCE_TAGS)
            return None if head is None else _reference(head)
    except Exception:  # the scan is refused with the reason when it is examined
        return None


def _reference(head: Dataset) -> Reference:
    """The UIDs in a header."""
    sop_class = str(head.get("SOPClassUID", ""))
    frame = str(head.get("FrameOfReferenceUID", ""))
    referenced = [
        str(item.get("SeriesInstanceUID", "")) for item in functional.items(head, _SERIES)
    ]
    for place in functional.items(head, "ReferencedFrameOfReferenceSequence"):
        frame = frame or str(place.get("FrameOfReferenceUID", ""))
        for study in functional.items(place, "RTReferencedStudySequence"):
            for series in functional.items(study, "RTReferencedSeriesSequence"):
                referenced.append(str(series.get("SeriesInstanceUID", "")))
    return Reference(
        series=str(head.get("SeriesInstanceUID", "")),
        frame=frame,
        is_label_object=sop_class in (*SEGMENTATIONS, STRUCTURE_SET),
        is_contours=sop_class == STRUCTURE_SET,
        referenced_series=tuple(dict.fromkeys(uid for uid in referenced if uid)),
    )


def read_object(path: Path) -> LabelObject:
    """Read a SEG or RTSTRUCT; the frames of a SEG are decoded later, one by one.

    Raises:
        Refused: unreadable, not_labels (neither SEG nor RTSTRUCT, or fractional), truncated.
    """
    dataset = elements.read_dataset(path, None)
    if dataset is None:
        raise Refused("unreadable", f"{file_name(path)} is not DICOM")
    sop_class = str(dataset.get("SOPClassUID", ""))
    identity = _identity(dataset)
    if sop_class == STRUCTURE_SET:
        contours, num_open = _contours(dataset)
        return LabelObject(_regions(dataset), identity, contours, num_open)
    if sop_class not in SEGMENTATIONS:
        raise Refused(
            "not_labels",
            f"{file_name(path)} has SOP class {quoted(sop_class)}; rule: DICOM SEG or RTSTRUCT",
        )
    kind = str(dataset.get("SegmentationType", ""))
    if kind not in ("BINARY", "LABELMAP"):
        raise Refused(
            "not_labels",
            f"{file_name(path)} has SegmentationType {quoted(kind)}; rule: BINARY or LABELMAP",
        )
    if "PixelData" not in dataset:
        raise Refused("truncated", f"{file_name(path)} ends before its pixels; copy it again")
    structures = tuple(
        Structure(int(item.SegmentNumber), str(item.get("SegmentLabel", "")))
        for item in functional.items(dataset, "SegmentSequence")
    )
    return LabelObject(structures, identity, dataset=dataset)


def frames(dataset: Dataset) -> Iterator[SegFrame]:
    """Decode the frames of a SEG, one at a time: all of them together may not fit in memory.

    Raises:
        Refused: multiframe, no_orientation (a frame without position), bad_affine, sheared,
            bad_spacing, truncated, corrupt.
    """
    frame_groups = functional.groups_of("the segmentation", dataset)
    is_binary = str(dataset.SegmentationType) == "BINARY"
    pixels_of = _pixels(dataset, len(frame_groups))
    for number, (groups, pixels) in enumerate(zip(frame_groups, pixels_of), 1):
        to_mm = _plane(groups, f"frame {number} of the segmentation")
        values = pixels.astype(np.int64)
        if is_binary:
            segment = functional.unsigned(
                groups, "SegmentIdentificationSequence", "ReferencedSegmentNumber"
            )
            if not segment:
                raise Refused("corrupt", f"frame {number} names no segment")
            values = (values != 0) * segment
        yield SegFrame(values, to_mm)


def _pixels(dataset: Dataset, num_frames: int) -> Iterator[np.ndarray]:
    """The stored values of every frame, (rows, columns)."""
    from pydicom.pixels import iter_pixels

    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if int(dataset.BitsAllocated) > 1 or dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        yield from (np.asarray(frame) for frame in iter_pixels(dataset))
        return
    packed = np.frombuffer(dataset.PixelData, np.uint8)
    num_pixels = rows * columns
    if len(packed) * 8 < num_pixels * num_frames:
        raise Refused(
            "truncated",
            f"the segmentation holds {len(packed)} bytes for {num_frames} frames of {num_pixels} "
            "bits; copy it again",
        )
    for frame in range(num_frames):
        # frames follow each other bit by bit, so a frame may begin inside a byte
        first, last = frame * num_pixels, (frame + 1) * num_pixels
        bits = np.unpackbits(packed[first // 8 : -(-last // 8)], bitorder="little")
        yield bits[first % 8 : first % 8 + num_pixels].reshape(rows, columns)


def _plane(groups: list[Dataset], name: str) -> np.ndarray:
    """The matrix from (column, row, 0, 1) of a frame to LPS mm.

    Args:
        groups: functional groups of the frame.
        name: name of the frame, for the error line.
    """
    place = functional.place(name, groups)
    row_mm, column_mm = place.spacing
    column, row = np.asarray(place.axes[:3]), np.asarray(place.axes[3:])
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1] = column * column_mm, row * row_mm
    matrix[:3, 2] = np.cross(column, row)
    matrix[:3, 3] = place.position
    return matrix


def _regions(dataset: Dataset) -> tuple[Structure, ...]:
    """Number and name of the regions of an RTSTRUCT."""
    return tuple(
        Structure(int(item.ROINumber), str(item.get("ROIName", "")))
        for item in functional.items(dataset, "StructureSetROISequence")
    )


def _contours(dataset: Dataset) -> tuple[tuple[Contour, ...], int]:
    """The closed polygons of an RTSTRUCT, and how many other contours it holds."""
    closed, num_open = [], 0
    for region in functional.items(dataset, "ROIContourSequence"):
        for item in functional.items(region, "ContourSequence"):
            data = [float(value) for value in item.get("ContourData") or []]
            kind = str(item.get("ContourGeometricType", ""))
            if kind not in _CLOSED or len(data) < 9 or len(data) % 3:
                num_open += 1
                continue
            points_mm = np.asarray(data).reshape(-1, 3)
            if not np.isfinite(points_mm).all():
                raise Refused("corrupt", "a contour holds NaN or infinity")
            closed.append(Contour(int(region.ReferencedROINumber), points_mm))
    return tuple(closed), num_open


def _identity(dataset: Dataset) -> tuple[str, ...]:
    """Words of three letters or more in PatientName and PatientID, in lower case."""
    words: list[str] = []
    for tag in ("PatientName", "PatientID", "OtherPatientNames", "PatientBirthName"):
        text = str(dataset.get(tag, "") or "").lower()
        for separator in "^=,;_-./\\":
            text = text.replace(separator, " ")
        words += [word for word in text.split() if len(word) >= 3]
    return tuple(dict.fromkeys(words))
