"""Writes label maps as DICOM SEG that refers to the images of a series.

The library highdicom writes the file (extra `dicom`). The object belongs to the study of the
images, so it holds their patient and study elements, as the standard demands, and nothing else
about the patient.

Axes: I columns, J rows, K slices of the series; N images, or frames of one multi-frame image.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import tapct
from tapct.base.exits import UserError
from tapct.base.extras import installing
from tapct.base.files import PRIVATE, write_atomically
from tapct.base.marks import file_name
from tapct.data.readers import dicom_elements as elements
from tapct.data.readers import dicom_groups as functional
from tapct.types import Refused

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom.dataset import Dataset
    from pydicom.sr.coding import Code

MAX_NAME = 64  # characters of a SegmentLabel
# elements that every image must have, with or without a value; some archives remove them
_PATIENT_AND_STUDY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_SIDES = frozenset({"left", "right", "l", "r", "lt", "rt"})
_ABNORMAL = re.compile(r"tumou?r|lesion|nodule|mass|cancer|carcinoma|metasta|cyst", re.IGNORECASE)


@dataclass(frozen=True)
class SegSource:
    """The images that a SEG refers to.

    Args:
        images: their headers: single slices in any order, or one multi-frame image.
        slice_N: slice K of the grid that each image or frame shows; -1 for a frame that belongs to
            another scan.
    """

    images: tuple[Dataset, ...]
    slice_N: tuple[int, ...]


def check_installed() -> None:
    """Raise UserError where highdicom is missing."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise UserError(
            "DICOM SEG needs the package highdicom, which cannot be imported; set "
            f"prediction_format=nifti, or install it: {installing('dicom', 'highdicom')}"
        ) from error


def read_source(files: Sequence[Path], frames: Collection[int] = ()) -> SegSource:
    """Read the headers of a series.

    Args:
        files: all files of the scan, in any order.
        frames: numbers, from 1, of the frames that make this scan; empty for all.
    Raises:
        Refused: the images cannot be referred to.
    """
    images = tuple(_header(path) for path in files)
    name = file_name(files[0])
    groups = [[image] for image in images]
    if any("NumberOfFrames" in image for image in images):
        if len(images) > 1:
            raise Refused("unsupported", "a DICOM SEG cannot refer to several multi-frame images")
        groups = functional.groups_of(name, images[0])
    places = [functional.place(name, each) for each in groups]
    wanted = [n for n in range(len(places)) if not frames or n + 1 in frames]
    axes = np.asarray(places[wanted[0]].axes)
    normal = np.cross(axes[:3], axes[3:])
    wanted.sort(key=lambda n: float(np.asarray(places[n].position) @ normal))
    slice_of = {n: k for k, n in enumerate(wanted)}
    return SegSource(images, tuple(slice_of.get(n, -1) for n in range(len(places))))


def write(
    path: Path,
    labels_IJK: np.ndarray,
    source: SegSource,
    segments: Sequence[tuple[int, str]],
    series: str,
    upright_affine: np.ndarray | None = None,
) -> None:
    """Write a label map as binary SEG, whole or not at all; its owner alone can read it.

    Segments are numbered from 1 in the order given, as the standard demands.

    Args:
        path: file to write, .dcm.
        labels_IJK: labels along the axes of the series.
        source: images of the series.
        segments: label value and name of each segment; other values are background.
        series: SeriesDescription. Label maps with one description on one series make one series.
        upright_affine: 4x4 matrix, (i, j, k, 1) -> LPS mm, of a label map that does not lie on the
            pixels of the images, only in their frame of reference; None where it does.
    Raises:
        Refused: there is no segment.
    """
    import highdicom
    from pydicom.uid import generate_uid

    if not segments:
        raise Refused("not_labels", "a DICOM SEG needs at least one organ")
    numbers_KJI = _segment_numbers(labels_IJK, [value for value, _ in segments])
    first = source.images[0]
    pixels: np.ndarray | highdicom.Volume
    if upright_affine is not None:
        axes = upright_affine[:, [2, 1, 0, 3]]
        pixels = highdicom.Volume(
            numbers_KJI,
            axes,
            coordinate_system="PATIENT",
            frame_of_reference_uid=first.FrameOfReferenceUID,
        )
    else:
        pixels = np.zeros((len(source.slice_N), *numbers_KJI.shape[1:]), numbers_KJI.dtype)
        for n, k in enumerate(source.slice_N):
            if k >= 0:
                pixels[n] = numbers_KJI[k]
    entropy = [series, str(first.SeriesInstanceUID), str(first.SOPInstanceUID)]
    content = hashlib.sha256(np.ascontiguousarray(numbers_KJI).tobytes()).hexdigest()
    with elements.quiet():
        seg = highdicom.seg.Segmentation(
            source_images=source.images,
            pixel_array=pixels,
            segmentation_type="BINARY",
            segment_descriptions=[
                _description(number, value, name)
                for number, (value, name) in enumerate(segments, 1)
            ],
            # the same prediction has the same UIDs whenever it is written
            series_instance_uid=generate_uid(entropy_srcs=["series", *entropy]),
            sop_instance_uid=generate_uid(
                entropy_srcs=["instance", *entropy, content, repr(list(segments))]
            ),
            series_number=900,
            instance_number=1,
            manufacturer="tapct",
            manufacturer_model_name="tapct",
            software_versions=tapct.__version__,
            device_serial_number="none",
            content_label="PREDICTION",
            specific_character_set="ISO_IR 192",
            series_description=series[:MAX_NAME],
        )
        file = io.BytesIO()
        seg.save_as(file, enforce_file_format=True)
    write_atomically(path, file.getvalue(), mode=PRIVATE)


def _header(path: Path) -> Dataset:
    """The elements of an image without its pixels, complete enough to be referred to."""
    dataset = elements.read_dataset(path, None)
    if dataset is None:
        raise Refused("unreadable", f"{file_name(path)} is not DICOM")
    if "PixelData" in dataset:
        del dataset.PixelData
    for name in _NEEDED:
        if not dataset.get(name):
            raise Refused("unsupported", f"{file_name(path)} has no {name}")
    if not dataset.get("FrameOfReferenceUID"):
        raise Refused(
            "unsupported", f"{file_name(path)} has no FrameOfReferenceUID, which a DICOM SEG needs"
        )
    with elements.quiet():
        dataset.decode()  # texts become Unicode: the SEG is written as UTF-8
        for name in _PATIENT_AND_STUDY:
            if name not in dataset or not _is_valid(name, dataset.get(name)):
                setattr(dataset, name, "")
    return dataset


def _is_valid(name: str, value: object) -> bool:
    """Whether a SEG may hold the value of an element of the patient or the study; some archives
    hold a date or a sex that the standard does not have.
    """
    from pydicom.valuerep import DA, TM

    try:
        if name.endswith("Date"):
            DA(str(value or ""))
        elif name.endswith("Time"):
            TM(str(value or ""))
    except ValueError:
        return False
    return name != "PatientSex" or str(value or "") in ("", "F", "M", "O")


def _segment_numbers(labels_IJK: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Segment number of each pixel, (K, J, I); 0 where its label is no segment."""
    highest = max(int(labels_IJK.max(initial=0)), *values)
    dtype = np.uint8 if len(values) < 256 else np.uint16
    number_of = np.zeros(highest + 1, dtype=dtype)
    number_of[list(values)] = np.arange(1, len(values) + 1)
    numbers_KJI: np.ndarray = np.ascontiguousarray(number_of[labels_IJK].transpose(2, 1, 0))
    return numbers_KJI


def _description(number: int, value: int, name: str) -> SegmentDescription:
    import highdicom
    from pydicom.sr.codedict import codes

    category, kind = codes_of(name)
    description = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:MAX_NAME],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="tapct", version=tapct.__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )
    description.SegmentDescription = f"label value {value}"
    return description


def codes_of(name: str) -> tuple[Code, Code]:
    """Category and type of a segment.

    The type is the anatomical structure of DICOM's list (CID 7192) with the name of the organ; the
    side, a plural s and a missing `gland` are ignored. For any other name it is `Anatomical
    structure` or, for lesions, `Lesion`; the name itself is in the SegmentLabel.
    """
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    if _ABNORMAL.search(name):
        category = Code("49755003", "SCT", "Morphologically Altered Structure")
        return category, Code("52988006", "SCT", "Lesion")
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word and word not in _SIDES]
    known, organ = _structures(), "".join(words)
    names = (organ, organ.removesuffix("s"), f"{organ}gland")
    kind = next((known[each] for each in names if each in known), codes.SCT.AnatomicalStructure)
    return Code("123037004", "SCT", "Anatomical Structure"), kind


def _structures() -> Mapping[str, Code]:
    """Anatomical structures by their keyword in lower case, such as `spinalcord`."""
    from pydicom.sr.codedict import codes

    group = codes.CID7192
    found: dict[str, Code] = {}
    for keyword in dir(group):
        code: Code | None = getattr(group, keyword, None)
        if code is not None and getattr(code, "scheme_designator", "") == "SCT":
            found[keyword.lower()] = code
    return found
