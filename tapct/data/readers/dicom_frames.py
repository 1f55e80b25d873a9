"""Multi-frame CT (Enhanced CT, and Enhanced CT converted from single slices): the slices of one
file, whose geometry and rescaling are given in functional groups, shared or frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tapct.base.marks import file_name
from tapct.data.readers import dicom_elements as elements
from tapct.data.readers import dicom_groups as functional
from tapct.data.readers import dicom_kind as kind
from tapct.data.readers.dicom_head import HEAD_TAGS, TRAITS, Head, head_of
from tapct.types import Refused

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# sequence and element that have the value of a trait for one frame
_TRAIT_OF_FRAME = {
    "ImageType": ("CTImageFrameTypeSequence", "FrameType"),
    "StackID": ("FrameContentSequence", "StackID"),
    "ConvolutionKernel": ("CTReconstructionSequence", "ConvolutionKernel"),
    "KVP": ("CTXRayDetailsSequence", "KVP"),
    "SliceThickness": ("PixelMeasuresSequence", "SliceThickness"),
    "AcquisitionNumber": ("FrameContentSequence", "FrameAcquisitionNumber"),
    "TemporalPositionIdentifier": ("FrameContentSequence", "TemporalPositionIndex"),
    "NominalPercentageOfCardiacPhase": (
        "CardiacSynchronizationSequence",
        "NominalPercentageOfCardiacPhase",
    ),
    "TriggerTime": ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    "AcquisitionDateTime": ("FrameContentSequence", "FrameAcquisitionDateTime"),
}


@dataclass(frozen=True)
class FrameSlice:
    """One slice of a multi-frame file.

    Args:
        head: head of the file, completed by what the frame gives.
        slope: factor from stored values to HU.
        intercept: offset in HU.
    """

    head: Head
    slope: float
    intercept: float


def read_head(path: Path, use: Callable[[Head, BinaryIO], None] | None = None) -> Head | None:
    """Read the header of a file, opening it once; None where the file is not DICOM.

    Args:
        path: path of the file.
        use: function that is called with the head and the open file.
    Raises:
        Exception: whatever the library raises for a damaged file.
    """
    with path.open("rb") as file:
        dataset = elements.read_from(file, path, (*HEAD_TAGS, *functional.SEQUENCES))
        if dataset is None:
            return None
        head = _with_frames(path, dataset)
        if use is not None:
            use(head, file)
    return head


def _with_frames(path: Path, dataset: Dataset) -> Head:
    """The head of a file, with the heads of its frames where it has several."""
    head = head_of(path, dataset)
    if head.is_multiframe and head.refusal is None:
        try:
            frames = tuple(frame.head for frame in _frames(path, dataset, head))
        except MemoryError:
            raise
        except Exception:  # the file is refused with the reason when it is examined
            frames = ()
        return replace(head, frames=frames)
    return head


def frames_of(
    path: Path, dataset: Dataset, head: Head, wanted: Collection[int] | None = None
) -> list[FrameSlice]:
    """The frames of a file in the order in which they are stored.

    Args:
        path: path of the file.
        dataset: its content.
        head: head of the file.
        wanted: numbers of the frames that must be slices, from 1; None for all.
    Raises:
        Refused: multiframe, localizer, no_rescale, not_hu, no_orientation, bad_affine, sheared,
            bad_spacing.
    """
    frames = _frames(path, dataset, head)
    for frame in frames:
        problem = frame.head.refusal or frame.head.misplaced
        if problem is not None and (wanted is None or frame.head.frame in wanted):
            raise Refused(*problem)
    return frames


def _frames(path: Path, dataset: Dataset, head: Head) -> list[FrameSlice]:
    """All frames; the head of one that is no slice has the reason."""
    with elements.quiet():
        groups = functional.groups_of(file_name(path), dataset)
        head = replace(head, num_frames=len(groups))
        return [_frame(number, head, some) for number, some in enumerate(groups, 1)]


def depth_mm(dataset: Dataset, number: int = 1) -> float:
    """Thickness of a single frame in mm; 0 where its file gives none."""
    with elements.quiet():
        shared, per_frame = (functional.items(dataset, name) for name in functional.SEQUENCES)
        groups = [*per_frame[number - 1 : number], *shared[:1]]
        thickness = functional.numbers(groups, "PixelMeasuresSequence", "SliceThickness")
    return thickness[0] if thickness else 0.0


def kernel_of(dataset: Dataset) -> str:
    """Kernel of the first frame; empty where its file gives none."""
    with elements.quiet():
        shared, per_frame = (functional.items(dataset, name) for name in functional.SEQUENCES)
        groups = [*shared[:1], *per_frame[:1]]
        kernel = functional.text(groups, "CTReconstructionSequence", "ConvolutionKernel")
        return kernel.replace("\\", "/")


def _frame(number: int, head: Head, groups: Sequence[Dataset]) -> FrameSlice:
    """One frame from its own functional groups, then the shared ones, then the data set."""
    frame = replace(head, frame=number, number=number)
    name = frame.name
    frame_type = functional.text(groups, "CTImageFrameTypeSequence", "FrameType")
    rescaling = "PixelValueTransformationSequence"
    slope = (functional.numbers(groups, rescaling, "RescaleSlope") or (None,))[0]
    intercept = (functional.numbers(groups, rescaling, "RescaleIntercept") or (None,))[0]
    unit = functional.text(groups, rescaling, "RescaleType")
    refusal = kind.rescale_refusal(name, slope, intercept, unit)
    if kind.is_localizer(frame_type):
        refusal = "localizer", f"{name} is a projection and not a slice"
    try:
        place = functional.place(name, groups)
    except Refused as error:
        frame = replace(frame, misplaced=(error.reason, error.marked))
    else:
        derived = head.derived or kind.derivation_from(frame_type, "", place.axes)
        frame = replace(
            frame,
            position=place.position,
            axes=place.axes,
            spacing=place.spacing,
            derived=derived if frame_type or head.derived else "",
        )
    frame = replace(frame, refusal=refusal, traits=_traits(head, groups))
    return FrameSlice(frame, slope or 1.0, intercept or 0.0)


def _traits(head: Head, groups: Sequence[Dataset]) -> tuple[str, ...]:
    """The values of `TRAITS` of one frame; those of the file where the frame has none."""
    values = list(head.traits)
    for place, name in enumerate(TRAITS):
        if name in _TRAIT_OF_FRAME:
            values[place] = functional.text(groups, *_TRAIT_OF_FRAME[name]) or values[place]
    return tuple(values)
