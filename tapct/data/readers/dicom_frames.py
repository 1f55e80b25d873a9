"""Multi-frame CT (Enhanced CT, and Enhanced CT converted from single slices): the slices of one
file, whose geometry and rescaling are given in functional groups, shared or frame by frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tapct.base.marks import file_name
from tapct.data.readers import dicom_elements as elements
from tapct.data.readers import dicom_kind as kind
from tapct.data.readers.dicom_head import Head, place_from
from tapct.types import Refused

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


@dataclass(frozen=True)
class FrameSlice:
    """One slice of a multi-frame file.

    Args:
        head: head of the file, completed by the geometry of the frame.
        slope: factor from stored values to HU.
        intercept: offset in HU.
    """

    head: Head
    slope: float
    intercept: float


def frames_of(path: Path, dataset: Dataset, head: Head) -> list[FrameSlice]:
    """The frames of a file in the order in which they are stored.

    Args:
        path: path of the file.
        dataset: its content.
        head: head of the file.
    Raises:
        Refused: multiframe, localizer, no_rescale, not_hu, no_orientation, bad_affine, sheared,
            bad_spacing.
    """
    with elements.quiet():
        shared = _items(dataset, "SharedFunctionalGroupsSequence")
        per_frame = _items(dataset, "PerFrameFunctionalGroupsSequence")
        num_frames = max(1, elements.whole(dataset, "NumberOfFrames"))
        if len(per_frame) != num_frames:
            raise Refused(
                "multiframe",
                f"{file_name(path)} claims {num_frames} frames and gives the places of "
                f"{len(per_frame)}",
            )
        return [
            _frame(f"frame {number} of {file_name(path)}", head, [item, *shared[:1], dataset])
            for number, item in enumerate(per_frame, 1)
        ]


def depth_mm(dataset: Dataset) -> float:
    """Thickness of a single frame in mm; 0 where its file gives none."""
    with elements.quiet():
        groups = [
            *_items(dataset, "PerFrameFunctionalGroupsSequence")[:1],
            *_items(dataset, "SharedFunctionalGroupsSequence")[:1],
        ]
        thickness = _numbers(groups, "PixelMeasuresSequence", "SliceThickness")
    return thickness[0] if thickness else 0.0


def kernel_of(dataset: Dataset) -> str:
    """Convolution kernel from the functional groups; empty where they give none."""
    with elements.quiet():
        groups = [
            *_items(dataset, "PerFrameFunctionalGroupsSequence")[:1],
            *_items(dataset, "SharedFunctionalGroupsSequence")[:1],
        ]
        return _text(groups, "CTReconstructionSequence", "ConvolutionKernel").replace("\\", "/")


def _frame(name: str, head: Head, groups: Sequence[Dataset]) -> FrameSlice:
    """One frame from its own functional groups, then the shared ones, then the data set."""
    frame_type = _text(groups, "CTImageFrameTypeSequence", "FrameType")
    if kind.is_localizer(frame_type):
        raise Refused("localizer", f"{name} is a projection and not a slice; split the file")
    place = place_from(
        name,
        _numbers(groups, "PlanePositionSequence", "ImagePositionPatient"),
        _numbers(groups, "PlaneOrientationSequence", "ImageOrientationPatient"),
        _numbers(groups, "PixelMeasuresSequence", "PixelSpacing"),
    )
    rescaling = "PixelValueTransformationSequence"
    slope = (_numbers(groups, rescaling, "RescaleSlope") or (None,))[0]
    intercept = (_numbers(groups, rescaling, "RescaleIntercept") or (None,))[0]
    refusal = kind.rescale_refusal(name, slope, intercept, _text(groups, rescaling, "RescaleType"))
    if refusal is not None:
        raise Refused(*refusal)
    assert slope is not None and intercept is not None
    derived = head.derived or kind.derivation_from(frame_type, "", place.axes)
    head = replace(
        head,
        position=place.position,
        axes=place.axes,
        spacing=place.spacing,
        derived=derived if frame_type or head.derived else "",
    )
    return FrameSlice(head, slope, intercept)


def _items(dataset: Dataset, name: str) -> list[Dataset]:
    """Items of a sequence; empty where there is none."""
    return list(dataset.get(name) or [])


def _text(groups: Sequence[Dataset], sequence: str, name: str) -> str:
    """Text of an element in the first group that has it, or of the data set itself."""
    for group in groups:
        for item in (*_items(group, sequence)[:1], group):
            value = elements.text(item, name)
            if value:
                return value
    return ""


def _numbers(groups: Sequence[Dataset], sequence: str, name: str) -> tuple[float, ...]:
    """Numbers of an element in the first group that has it, or of the data set itself."""
    content = _text(groups, sequence, name)
    return elements.split_numbers(content)
