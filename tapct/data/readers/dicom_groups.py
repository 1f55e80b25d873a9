"""Functional groups of a multi-frame DICOM object (Enhanced CT, SEG): what holds for one frame.

An element is given by the frame's own groups, else by the shared ones, else by the data set itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tapct.data.readers import dicom_elements as elements
from tapct.data.readers.dicom_head import Place, place_from
from tapct.types import Refused

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SEQUENCES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")


def groups_of(name: str, dataset: Dataset) -> list[list[Dataset]]:
    """For each frame, in the order in which they are stored: its own groups, the shared ones and
    the data set itself.

    Args:
        name: name of the file, for the error line.
        dataset: content of the file.
    Raises:
        Refused: `multiframe`, the frames have no groups of their own.
    """
    shared, per_frame = (items(dataset, sequence) for sequence in SEQUENCES)
    num_frames = max(1, elements.whole(dataset, "NumberOfFrames"))
    if len(per_frame) != num_frames:
        raise Refused(
            "multiframe",
            f"{name} claims {num_frames} frames and gives the places of {len(per_frame)}",
        )
    return [[own, *shared[:1], dataset] for own in per_frame]


def items(dataset: Dataset, name: str) -> list[Dataset]:
    """Items of a sequence; empty where there is none."""
    return list(dataset.get(name) or [])


def text(groups: Sequence[Dataset], sequence: str, name: str) -> str:
    """Text of an element in the first group that has it, or of the data set itself."""
    for group in groups:
        for item in (*items(group, sequence)[:1], group):
            value = elements.text(item, name)
            if value:
                return value
    return ""


def numbers(groups: Sequence[Dataset], sequence: str, name: str) -> tuple[float, ...]:
    """Numbers that are written as text, of an element in the first group that has it."""
    return elements.split_numbers(text(groups, sequence, name))


def unsigned(groups: Sequence[Dataset], sequence: str, name: str) -> int:
    """A binary whole number of an element in the first group that has it; 0 without one."""
    for group in groups:
        for item in (*items(group, sequence)[:1], group):
            value = elements.unsigned(item, name)
            if value:
                return value
    return 0


def place(name: str, groups: Sequence[Dataset]) -> Place:
    """Where a frame lies.

    Args:
        name: name of the frame, for the error line.
        groups: its groups, see `groups_of`.
    Raises:
        Refused: no_orientation, bad_affine, sheared, bad_spacing.
    """
    return place_from(
        name,
        numbers(groups, "PlanePositionSequence", "ImagePositionPatient"),
        numbers(groups, "PlaneOrientationSequence", "ImageOrientationPatient"),
        numbers(groups, "PixelMeasuresSequence", "PixelSpacing"),
    )
