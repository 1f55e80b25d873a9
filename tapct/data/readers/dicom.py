"""DICOM series: headers by pydicom, voxels by pydicom where it can decode them, else by SimpleITK.

A series is all files of one folder with one SeriesInstanceUID. Its geometry comes from the slice
positions alone; SliceThickness, SpacingBetweenSlices and InstanceNumber are often wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tapct.base.exits import single_line
from tapct.data.readers.raw import MAX_TEXT, Header, Image, check_shape
from tapct.types import Refused

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_CT = "1.2.840.10008.5.1.4.1.1.2"
_MULTIFRAME = (_CT + ".1", _CT + ".2")
_DICOMDIR = "1.2.840.10008.1.3.10"
_HEADER_TAGS = [
    *("SOPClassUID", "ImageType", "Modality", "Manufacturer", "ConvolutionKernel", "StudyDate"),
    *("PatientID", "PatientSex", "PatientAge", "StudyInstanceUID"),
    *("Rows", "Columns", "PixelSpacing", "SamplesPerPixel", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices"),
    *("RescaleIntercept", "RescaleSlope", "RescaleType"),
]
_SAME_POSITION_MM = 0.01  # slices that are nearer to each other lie at one position
_SAME_DIRECTION = 1e-3  # direction cosines of two slices of one series


@dataclass(frozen=True)
class _Slice:
    """One file of a series.

    Args:
        path: path of the file.
        header: its header, without pixels.
        position: LPS mm (x, y, z) of its first pixel.
        axes: (3, 2) unit vectors in LPS: direction of growing column index, of growing row index.
    """

    path: Path
    header: Dataset
    position: np.ndarray
    axes: np.ndarray


def is_dicom(path: Path) -> bool:
    """Whether a file has the DICOM preamble, whatever its name."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def series_uid(path: Path) -> str | None:
    """The file's SeriesInstanceUID, empty where it has none; None for a DICOMDIR, which holds no
    image.
    """
    head = _dcmread(path, ["SeriesInstanceUID"])
    if str(head.file_meta.get("MediaStorageSOPClassUID", "")) == _DICOMDIR:
        return None
    return str(head.get("SeriesInstanceUID", ""))


def read(files: Sequence[Path]) -> Image:
    """Read one series.

    Rules: Modality CT and CT Image Storage, and no localizer. All slices have one size, pixel
    spacing and orientation. They are sorted by position, no two lie at one position, and all steps
    are equal to 2 % or to the 0.1 mm to which some scanners round positions (never beyond a quarter
    of a step). Rescale slope and intercept must be present and are applied slice by slice.
    PixelPaddingValue is not used, because low padding is clamped anyway and some files give 0 HU
    there. A single slice takes its depth from SpacingBetweenSlices, else from SliceThickness.

    Args:
        files: all files of the series, in any order.
    Returns:
        Voxels in HU (int32, or float32 for fractional rescaling), K ascending along the slice
        normal.
    Raises:
        Refused: not_ct, localizer, multiframe, not_scalar, no_rescale, no_orientation, bad_spacing,
            mixed_geometry, duplicate_slices, missing_slices, uneven_slices, sheared, truncated,
            unreadable.
    """
    headers = [(path, _read_header(path)) for path in files]
    for path, header in headers:
        _check_is_ct_slice(path, header)
    slices = [_slice(path, header) for path, header in headers]
    _check_same_geometry(slices)
    normal = np.cross(slices[0].axes[:, 0], slices[0].axes[:, 1])
    slices.sort(key=lambda item: (float(item.position @ normal), item.path.name))
    step_mm = _check_steps(slices, normal)
    affine = np.eye(4)
    row_mm, column_mm = (float(value) for value in slices[0].header.PixelSpacing)
    affine[:3, 0], affine[:3, 1] = slices[0].axes[:, 0] * column_mm, slices[0].axes[:, 1] * row_mm
    affine[:3, 2] = normal * _single_depth_mm(slices[0].header)
    if len(slices) > 1:
        affine[:3, 2] = (slices[-1].position - slices[0].position) / (len(slices) - 1)
        _check_straight(slices, affine[:3, 2], step_mm)
    affine[:3, 3] = slices[0].position
    return Image(_voxels(slices), affine, header=_header_of(slices[0].header))


def _dcmread(path: Path, tags: list[str] | None) -> Dataset:
    """Read a file with pydicom; where tags are given, these alone and no pixels."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about odd values, which no user can follow
        if tags is None:
            return pydicom.dcmread(path)
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))


def _read_header(path: Path) -> Dataset:
    """The tags of one file that a series needs."""
    if path.stat().st_size == 0:
        raise Refused("empty_file", f"{path.name} has no content")
    if not is_dicom(path):
        raise Refused("unreadable", f"{path.name} has no DICOM preamble")
    return _dcmread(path, _HEADER_TAGS)


def _check_is_ct_slice(path: Path, header: Dataset) -> None:
    """Refuse what is not one plain CT slice, or lacks what the values need to become HU."""
    modality, sop_class = str(header.get("Modality", "")), str(header.get("SOPClassUID", ""))
    if not modality and not sop_class:
        raise Refused(
            "corrupt", f"{path.name} has neither Modality nor SOP class; copy the file again"
        )
    if modality != "CT":
        raise Refused("not_ct", f"Modality is '{modality}'; rule: CT")
    if sop_class in _MULTIFRAME or int(header.get("NumberOfFrames") or 1) > 1:
        raise Refused(
            "multiframe",
            f"{path.name} holds many slices in one file; convert it to NIfTI (dcm2niix)",
        )
    if sop_class and sop_class != _CT:
        raise Refused("not_ct", f"SOP class '{sop_class}' is not CT Image Storage")
    image_type = [str(value).upper() for value in (header.get("ImageType") or [])]
    if "LOCALIZER" in image_type or "SCOUT" in image_type:
        raise Refused(
            "localizer",
            f"ImageType is '{'/'.join(image_type)}', which is a projection and not a slice",
        )
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise Refused(
            "not_scalar",
            f"{path.name} has {header.SamplesPerPixel} values per pixel; rule: one",
        )
    if header.get("RescaleSlope") is None or header.get("RescaleIntercept") is None:
        raise Refused(
            "no_rescale",
            f"{path.name} has no rescale slope and intercept, so its values are not HU",
        )
    slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise Refused("no_rescale", f"{path.name} has rescale slope {slope}, intercept {intercept}")
    if str(header.get("RescaleType") or "HU") not in ("HU", "US"):
        raise Refused("not_hu", f"RescaleType is '{header.RescaleType}'; rule: HU")


def _slice(path: Path, header: Dataset) -> _Slice:
    """Position and directions of one slice, checked."""
    position = header.get("ImagePositionPatient")
    orientation = header.get("ImageOrientationPatient")
    if position is None or orientation is None or len(position) != 3 or len(orientation) != 6:
        raise Refused(
            "no_orientation", f"{path.name} lacks ImagePositionPatient or ImageOrientationPatient"
        )
    first_pixel = np.asarray([float(value) for value in position])
    axes = np.asarray([float(value) for value in orientation]).reshape(2, 3).T
    lengths = np.linalg.norm(axes, axis=0)
    is_finite = np.isfinite(first_pixel).all() and np.isfinite(axes).all()
    if not is_finite or (np.abs(lengths - 1) > 0.01).any():
        raise Refused(
            "bad_affine",
            f"{path.name} has position {first_pixel.tolist()} and directions {axes.T.tolist()}; "
            "rule: finite numbers and unit vectors",
        )
    if abs(float(axes[:, 0] @ axes[:, 1])) > 0.01:
        raise Refused("sheared", f"rows and columns of {path.name} are not at a right angle")
    spacing = header.get("PixelSpacing")
    sizes = [] if spacing is None else [float(mm) for mm in spacing]
    if len(sizes) != 2 or not all(np.isfinite(mm) and mm > 0 for mm in sizes):
        raise Refused(
            "bad_spacing", f"PixelSpacing of {path.name} is {spacing}; rule: two numbers > 0"
        )
    return _Slice(path, header, first_pixel, axes / lengths)


def _check_same_geometry(slices: list[_Slice]) -> None:
    """Refuse a series whose slices differ in orientation, size or pixel spacing."""
    first = slices[0]
    for item in slices[1:]:
        if np.abs(item.axes - first.axes).max() > _SAME_DIRECTION:
            raise Refused(
                "mixed_geometry",
                f"{item.path.name} and {first.path.name} have different orientations",
            )
        for tag in ("Rows", "Columns"):
            if item.header.get(tag) != first.header.get(tag):
                raise Refused(
                    "mixed_geometry", f"{item.path.name} and {first.path.name} differ in {tag}"
                )
        mm = [float(value) for value in item.header.PixelSpacing]
        first_mm = [float(value) for value in first.header.PixelSpacing]
        if not np.allclose(mm, first_mm, rtol=1e-3, atol=0):
            raise Refused(
                "mixed_geometry", f"{item.path.name} and {first.path.name} differ in PixelSpacing"
            )
    columns, rows = (int(first.header.get(tag) or 0) for tag in ("Columns", "Rows"))
    check_shape((columns, rows, len(slices)))


def _check_steps(slices: list[_Slice], normal: np.ndarray) -> float:
    """Refuse a series whose slices are not evenly spaced.

    Returns:
        The median distance of neighbouring slices in mm; 0 for one slice.
    """
    if len(slices) < 2:
        return 0.0
    steps = np.diff([float(item.position @ normal) for item in slices])
    same = np.flatnonzero(steps < _SAME_POSITION_MM)
    if same.size:
        pair = f"{slices[same[0]].path.name} and {slices[same[0] + 1].path.name}"
        raise Refused(
            "duplicate_slices",
            f"{same.size} of {len(slices)} slices repeat a position, e.g. {pair}; keep one of each",
        )
    median = float(np.median(steps))
    # 0.105: some scanners round positions to 0.1 mm
    tolerance = min(max(0.105, 0.02 * median), 0.25 * median)
    odd = np.abs(steps - median) > tolerance
    if not odd.any():
        return median
    multiples = np.rint(steps / median)
    gaps = odd & (multiples >= 2) & (np.abs(steps - multiples * median) <= tolerance * multiples)
    if (gaps == odd).all():
        num_missing = int((multiples[gaps] - 1).sum())
        raise Refused(
            "missing_slices",
            f"{num_missing} slices are missing: steps are {median:.3f} and {steps.max():.3f} mm; "
            "export the series again",
        )
    raise Refused(
        "uneven_slices",
        f"slice distances run from {steps.min():.3f} to {steps.max():.3f} mm; rule: equal to 2 %",
    )


def _check_straight(slices: list[_Slice], step: np.ndarray, step_mm: float) -> None:
    """Refuse a series whose slices do not lie on the line from the first to the last."""
    expected = slices[0].position + np.arange(len(slices))[:, None] * step
    positions = np.stack([item.position for item in slices])
    off_mm = float(np.abs(positions - expected).max())
    if off_mm > max(0.5, 0.5 * step_mm):
        raise Refused(
            "uneven_slices",
            f"slices lie up to {off_mm:.2f} mm off the line through the first and the last",
        )


def _single_depth_mm(header: Dataset) -> float:
    """Depth of a single slice in mm; 0 where its header gives none."""
    for tag in ("SpacingBetweenSlices", "SliceThickness"):
        value = header.get(tag)
        if value is not None and np.isfinite(float(value)) and float(value) != 0:
            return abs(float(value))
    return 0.0  # `geometry` refuses a single slice of unknown depth as bad_spacing


def _voxels(slices: list[_Slice]) -> np.ndarray:
    """HU of all slices as (columns, rows, slices)."""
    is_whole = True
    for item in slices:
        for tag in ("RescaleSlope", "RescaleIntercept"):
            is_whole &= float(item.header[tag].value).is_integer()
    shape_KJI = (len(slices), int(slices[0].header.Rows), int(slices[0].header.Columns))
    hu_KJI = np.empty(shape_KJI, dtype=np.int32 if is_whole else np.float32)
    for index, item in enumerate(slices):
        hu_KJI[index] = _decode(item.path, shape_KJI[1:])
    return hu_KJI.transpose(2, 1, 0)


def _decode(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """HU of one file, (rows, columns)."""
    import SimpleITK
    from pydicom.pixels import get_decoder

    dataset = _dcmread(path, None)
    if "PixelData" not in dataset:
        raise Refused("truncated", f"{path.name} ends before its pixels; copy it again")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and not get_decoder(syntax).is_available:
        pixels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        slope, intercept = 1.0, 0.0  # SimpleITK has applied them
    else:
        num_bytes = shape[0] * shape[1] * int(dataset.BitsAllocated) // 8
        if not syntax.is_encapsulated and len(dataset.PixelData) < num_bytes:
            raise Refused(
                "truncated",
                f"{path.name} holds {len(dataset.PixelData)} of {num_bytes} bytes of pixels",
            )
        pixels = dataset.pixel_array
        slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    if pixels.size != shape[0] * shape[1]:
        raise Refused(
            "corrupt", f"{path.name} decodes to {pixels.shape} pixels; its header gives {shape}"
        )
    return pixels.reshape(shape).astype(np.float64) * slope + intercept


def _header_of(header: Dataset) -> Header:
    """The facts of a DICOM header that tapct reads."""
    from pydicom.multival import MultiValue

    def text(tag: str) -> str:
        value = header.get(tag)
        if isinstance(value, MultiValue):
            value = "/".join(map(str, value))
        return "" if value is None else single_line(value, MAX_TEXT)

    return Header(
        patient_id=text("PatientID"),
        study_uid=text("StudyInstanceUID"),
        study_date=text("StudyDate"),
        modality=text("Modality"),
        manufacturer=text("Manufacturer"),
        kernel=text("ConvolutionKernel"),
        sex=text("PatientSex"),
        age=text("PatientAge"),
    )
