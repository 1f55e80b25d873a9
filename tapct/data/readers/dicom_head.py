"""What is known of one DICOM file from its header alone: what it is, whose, and where it lies."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tapct.base.marks import file_name
from tapct.data.readers import dicom_elements as elements
from tapct.data.readers import dicom_kind as kind
from tapct.types import Refused

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Elements whose values separate the stacks of one series, in the order in which they are tried;
# the folder of the file comes after them.
TRAITS = (
    *(
        "StudyInstanceUID",
        "ImageType",
        "StackID",
        "ConvolutionKernel",
        "KVP",
        "SliceThickness",
        "ContrastBolusAgent",
    ),
    *("AcquisitionNumber", "TemporalPositionIdentifier", "NominalPercentageOfCardiacPhase"),
    *("TriggerTime", "AcquisitionDateTime", "AcquisitionTime", "FrameOfReferenceUID"),
)
HEAD_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "PatientID"),
    *("Modality", "SeriesDescription", "InstanceNumber", "NumberOfFrames", "ConcatenationUID"),
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient"),
    *("RescaleIntercept", "RescaleSlope", "RescaleType", "ModalityLUTSequence"),
    *TRAITS,
)
_RIGHT_ANGLE = 0.01  # |cosine| of rows and columns, and how far a direction's length may be from 1


@dataclass(frozen=True, slots=True)
class Head:
    """One slice of a series, or one DICOM object of another kind.

    Args:
        path: path of the file.
        sop_class: SOPClassUID; empty where the file has none.
        modality: Modality.
        patient_id, study_uid, series_uid, sop_uid: identifiers, in clear.
        number: InstanceNumber; 0 where the file has none.
        concatenation: ConcatenationUID of one of several files of a multi-frame image.
        traits: values of `TRAITS`.
        size: rows and columns.
        spacing: PixelSpacing in mm: between rows, between columns.
        position: LPS mm (x, y, z) of the first pixel.
        axes: unit vectors in LPS: direction of growing column index, of growing row index.
        refusal: reason and detail for which the file cannot be a slice of a CT; None for a slice.
        misplaced: reason and detail for which it is a slice of unknown geometry.
        derived: in a few words how the image was computed from others, such as a projection.
        frame: number of a frame in a file of several, from 1; 0 for a whole file.
        num_frames: number of frames in the file of a frame; 0 for a whole file.
        frames: heads of all frames of a multi-frame file; empty where they cannot be known.
    """

    path: Path
    sop_class: str = ""
    modality: str = ""
    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    sop_uid: str = ""
    number: int = 0
    concatenation: str = ""
    traits: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    spacing: tuple[float, float] = (0.0, 0.0)
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axes: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    refusal: tuple[str, str] | None = None
    misplaced: tuple[str, str] | None = None
    derived: str = ""
    frame: int = 0
    num_frames: int = 0
    frames: tuple[Head, ...] = ()

    @property
    def is_multiframe(self) -> bool:
        """Whether this is a file that holds its slices as frames."""
        return self.sop_class in kind.MULTIFRAME and not self.frame

    @property
    def name(self) -> str:
        """What an error line calls this slice."""
        file = file_name(self.path)
        return f"frame {self.frame} of {file}" if self.frame else file

    @property
    def normal(self) -> np.ndarray:
        """Direction in which the slices of the stack follow each other, LPS unit vector."""
        return np.cross(self.axes[:3], self.axes[3:])


def head_of(path: Path, dataset: Dataset) -> Head:
    """The head of a file whose header has been read."""
    sop_class = elements.text(dataset, "SOPClassUID") or elements.text(
        dataset.file_meta, "MediaStorageSOPClassUID"
    )
    refusal = kind.refusal_of(file_name(path), sop_class, dataset)
    is_slice = refusal is None and sop_class not in kind.MULTIFRAME
    place, misplaced = Place(), None
    if is_slice:
        try:
            place = _place_of(file_name(path), dataset)
        except Refused as error:
            misplaced = (error.reason, error.marked)
    return Head(
        path=path,
        sop_class=sys.intern(sop_class),
        modality=sys.intern(elements.text(dataset, "Modality")),
        patient_id=sys.intern(elements.decoded_text(dataset, "PatientID")),
        study_uid=sys.intern(elements.text(dataset, "StudyInstanceUID")),
        series_uid=sys.intern(elements.text(dataset, "SeriesInstanceUID")),
        sop_uid=elements.text(dataset, "SOPInstanceUID"),
        number=elements.whole(dataset, "InstanceNumber"),
        concatenation=elements.text(dataset, "ConcatenationUID"),
        traits=tuple(sys.intern(elements.text(dataset, name)) for name in TRAITS),
        size=(elements.unsigned(dataset, "Rows"), elements.unsigned(dataset, "Columns")),
        spacing=place.spacing,
        position=place.position,
        axes=place.axes,
        refusal=refusal,
        misplaced=misplaced,
        derived=sys.intern(kind.derivation_of(dataset, place.axes)),
    )


@dataclass(frozen=True)
class Place:
    """Position, directions and pixel spacing of one slice, as in `Head`."""

    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axes: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    spacing: tuple[float, float] = (0.0, 0.0)


def _place_of(name: str, dataset: Dataset) -> Place:
    """Where a slice lies.

    Raises:
        Refused: no_orientation, bad_affine, sheared, bad_spacing.
    """
    return place_from(
        name,
        elements.numbers(dataset, "ImagePositionPatient"),
        elements.numbers(dataset, "ImageOrientationPatient"),
        elements.numbers(dataset, "PixelSpacing"),
    )


def place_from(
    name: str,
    position: tuple[float, ...],
    orientation: tuple[float, ...],
    spacing: tuple[float, ...],
) -> Place:
    """Check the geometry of one slice.

    Args:
        name: name of the file, for the error line.
        position: ImagePositionPatient, or no numbers.
        orientation: ImageOrientationPatient, or no numbers.
        spacing: PixelSpacing, or no numbers.
    Raises:
        Refused: no_orientation, bad_affine, sheared, bad_spacing.
    """
    if len(position) != 3 or len(orientation) != 6:
        raise Refused(
            "no_orientation", f"{name} lacks ImagePositionPatient or ImageOrientationPatient"
        )
    column, row = orientation[:3], orientation[3:]
    lengths = math.hypot(*column), math.hypot(*row)
    is_finite = all(math.isfinite(value) for value in (*position, *orientation))
    if not is_finite or any(abs(length - 1) > _RIGHT_ANGLE for length in lengths):
        raise Refused(
            "bad_affine",
            f"{name} has position {list(position)} and directions {list(orientation)}; rule: "
            "finite numbers and unit vectors",
        )
    if abs(sum(a * b for a, b in zip(column, row))) > _RIGHT_ANGLE:
        raise Refused("sheared", f"rows and columns of {name} are not at a right angle")
    if len(spacing) != 2 or not all(math.isfinite(mm) and mm > 0 for mm in spacing):
        raise Refused(
            "bad_spacing", f"PixelSpacing of {name} is {list(spacing)}; rule: two numbers > 0"
        )
    x, y, z = position
    row_mm, column_mm = spacing
    axes = (*(a / lengths[0] for a in column), *(b / lengths[1] for b in row))
    return Place((x, y, z), axes, (row_mm, column_mm))
