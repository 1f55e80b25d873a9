"""DICOM series: every file is opened once, headers by pydicom, voxels by pydicom or GDCM.

`data/search/series.py` decides which files make one scan. Its geometry comes from the slice
positions alone; SliceThickness, SpacingBetweenSlices and InstanceNumber are often wrong.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from tapct.base.exits import single_line
from tapct.base.marks import file_name
from tapct.data.checks.slice_levels import check_rescaling
from tapct.data.readers import dicom_elements as elements
from tapct.data.readers import dicom_frames, dicom_geometry, dicom_pixels
from tapct.data.readers.dicom_head import Head, head_of
from tapct.data.readers.raw import MAX_TEXT, Header, Image
from tapct.types import Refused

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_PLAIN = (1.0, 0.0)  # slope and intercept of values that are HU already


def read(
    files: Sequence[Path],
    frames: Collection[int] | None = None,
    contents: Mapping[Path, bytes] | None = None,
) -> Image:
    """Read the slices of one scan.

    Rules: CT Image Storage or multi-frame CT, and no localizer. All slices have one size, pixel
    spacing and orientation. They are sorted by position, no two lie at one position, and all steps
    are equal to 2 % or to the 0.1 mm to which some scanners round positions (never beyond a quarter
    of a step). Rescale slope and intercept must be present and are applied slice by slice;
    where they change, the HU must stay at their level.
    PixelPaddingValue is not used, because low padding is clamped anyway and some files give 0 HU
    there. A single slice takes its depth from SpacingBetweenSlices, else from SliceThickness.

    Args:
        files: all files of the scan, in any order.
        frames: numbers of the slices of a multi-frame image that make this scan, counted from 1
            over the frames of all files; None for all.
        contents: bytes of the files that have been read before, which are not opened again.
    Returns:
        Voxels in HU (int16 or int32, or float32 for fractional rescaling), K ascending along the
        slice normal.
    Raises:
        Refused: not_ct, localizer, multiframe, not_scalar, no_rescale, not_hu, no_orientation,
            bad_spacing, bad_affine, mixed_geometry, duplicate_slices, missing_slices,
            uneven_slices, sheared, truncated, header_mismatch, corrupt,
            private_compression, unsupported, unreadable.
    """
    heads: list[Head] = []
    planes: list[np.ndarray] = []
    rescalings: list[tuple[float, float]] = []
    ratios: list[float] = []
    header, depth_mm, stored_type = Header(), 0.0, ""
    num_before = 0  # frames of the files before
    for path in files:
        with _opened(path, (contents or {}).get(path)) as file:
            dataset, file_head = _content(path, file)
            num_frames = max(1, elements.whole(dataset, "NumberOfFrames"))
            wanted = None
            if frames is not None:
                wanted = {number - num_before for number in frames} & {*range(1, num_frames + 1)}
            num_before += num_frames
            for head, plane, rescaling in _slices(path, dataset, file_head, wanted, file):
                heads.append(head)
                planes.append(plane)
                rescalings.append(rescaling)
        if path == files[0]:
            header = _header_of(dataset)
            stored_type = dicom_pixels.stored_type(dataset)
            depth_mm = _single_depth_mm(dataset, min(wanted or {1}))
        ratio = dicom_pixels.lossy_ratio(dataset)
        if ratio is not None:
            ratios.append(ratio)
    dicom_geometry.check_same_grid(heads)
    order = dicom_geometry.in_order(heads)
    heads, planes = [heads[index] for index in order], [planes[index] for index in order]
    check_rescaling(planes, [rescalings[index] for index in order])
    known_ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
    return Image(
        _stack(planes).transpose(2, 1, 0),
        _affine(heads, depth_mm),
        header=header,
        is_lossy=bool(ratios),
        lossy_ratio=max(known_ratios, default=math.nan),
        derived=next((head.derived for head in heads if head.derived), ""),
        stored_type=stored_type,
        rescaling=rescalings[order[0]],
        steps_mm=_steps_mm(heads),
    )


def _steps_mm(heads: Sequence[Head]) -> tuple[float, float] | None:
    """Smallest and largest distance of neighbouring slices; None for a single slice."""
    steps = np.abs(np.diff(dicom_geometry.heights_mm(heads)))
    return (float(steps.min()), float(steps.max())) if len(steps) else None


def _opened(path: Path, content: bytes | None) -> BinaryIO:
    """A file, or its content that has been read before."""
    return path.open("rb") if content is None else io.BytesIO(content)


def _content(path: Path, file: BinaryIO) -> tuple[Dataset, Head]:
    """The content of one file and its head, which must be that of a slice with a place.

    Args:
        path: path of the file.
        file: the file, which is open.
    """
    if not file.read(1):
        raise Refused("empty_file", f"{file_name(path)} has no content")
    file.seek(0)
    dataset = elements.read_from(file, path, None)
    if dataset is None:
        raise Refused("unreadable", f"{file_name(path)} is not DICOM")
    head = head_of(path, dataset)
    problem = head.refusal or head.misplaced
    if problem is None or problem[0] not in ("not_ct", "localizer"):
        # a file that is cut off may lack anything else too
        dicom_pixels.check_has_pixels(path, dataset)
    if problem is not None:
        raise Refused(*problem)
    return dataset, head


def _slices(
    path: Path,
    dataset: Dataset,
    head: Head,
    wanted: Collection[int] | None,
    file: BinaryIO,
) -> Iterator[tuple[Head, np.ndarray, tuple[float, float]]]:
    """Heads, HU (rows, columns), and slope and intercept of the slices of one file.

    Args:
        path: path of the file.
        dataset: its content.
        head: its head.
        wanted: numbers of the frames to return, from 1; None for all.
        file: the file, which is open.
    """
    if head.is_multiframe:
        frames = dicom_frames.frames_of(path, dataset, head, wanted)
        values, is_rescaled = dicom_pixels.stored_values(path, dataset, len(frames), file)
        for frame, plane in zip(frames, values):
            if wanted is not None and frame.head.frame not in wanted:
                continue
            rescaling = (frame.slope, frame.intercept)
            yield frame.head, _rescaled(plane, *_PLAIN if is_rescaled else rescaling), rescaling
        return
    values, is_rescaled = dicom_pixels.stored_values(path, dataset, 1, file)
    slope = elements.number(dataset, "RescaleSlope")
    intercept = elements.number(dataset, "RescaleIntercept")
    assert slope is not None and intercept is not None  # the head has been checked
    rescaling = (slope, intercept)
    yield head, _rescaled(values[0], *_PLAIN if is_rescaled else rescaling), rescaling


def _rescaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """HU of one slice, in the smallest type that holds them."""
    if stored.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        hu = stored.astype(np.int64) * int(slope) + int(intercept)
        for dtype in (np.int16, np.int32):
            if hu.min() >= np.iinfo(dtype).min and hu.max() <= np.iinfo(dtype).max:
                return hu.astype(dtype)
    return (stored.astype(np.float64) * slope + intercept).astype(np.float32)


def _stack(planes: list[np.ndarray]) -> np.ndarray:
    """All slices as (slices, rows, columns); float32 where one slice is."""
    types = {plane.dtype for plane in planes}
    dtype = np.dtype(np.float32) if np.dtype(np.float32) in types else np.result_type(*types)
    stack = np.empty((len(planes), *planes[0].shape), dtype=dtype)
    for index, plane in enumerate(planes):
        stack[index] = plane
    return stack


def _affine(heads: Sequence[Head], depth_mm: float) -> np.ndarray:
    """The matrix from (i, j, k, 1) to LPS mm of slices in order.

    Args:
        heads: heads of all slices, in order.
        depth_mm: depth of a single slice in mm; `geometry` refuses 0 as bad_spacing.
    """
    first = heads[0]
    row_mm, column_mm = first.spacing
    affine = np.eye(4)
    affine[:3, 0] = np.asarray(first.axes[:3]) * column_mm
    affine[:3, 1] = np.asarray(first.axes[3:]) * row_mm
    if len(heads) > 1:
        affine[:3, 2] = dicom_geometry.step_vector(heads)
    else:
        affine[:3, 2] = first.normal * depth_mm
    affine[:3, 3] = first.position
    return affine


def _single_depth_mm(dataset: Dataset, frame: int) -> float:
    """Depth of a single slice, or of the frame with this number, in mm; 0 where its header gives
    none.
    """
    for tag in ("SpacingBetweenSlices", "SliceThickness"):
        value = elements.number(dataset, tag)
        if value is not None and math.isfinite(value) and value != 0:
            return abs(value)
    return dicom_frames.depth_mm(dataset, frame)


def _header_of(dataset: Dataset) -> Header:
    """The facts of a DICOM header that tapct reads."""

    def text(tag: str) -> str:
        return single_line(elements.decoded_text(dataset, tag), MAX_TEXT)

    return Header(
        patient_id=text("PatientID"),
        study_uid=text("StudyInstanceUID"),
        series_uid=text("SeriesInstanceUID"),
        study_date=text("StudyDate"),
        modality=text("Modality") or "CT",  # `head_of` has checked that it is CT
        manufacturer=text("Manufacturer"),
        kernel=text("ConvolutionKernel") or dicom_frames.kernel_of(dataset),
        sex=text("PatientSex"),
        age=text("PatientAge"),
        model=text("ManufacturerModelName"),
        kvp=text("KVP"),
        thickness=text("SliceThickness"),
        contrast=text("ContrastBolusAgent"),
        body_part=text("BodyPartExamined"),
    )
