"""One label map from several DICOM objects of one scan, such as one SEG per organ.

Structures of different names may lie inside each other (a tumour in its liver) and may touch, since
two programs draw one border differently. Objects that contradict each other are refused: nobody
knows which of them is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tapct.base.counted import counted
from tapct.base.marks import file_name, quoted
from tapct.data.labels.dicom_masks import DicomLabels
from tapct.data.labels.values import MAX_LABEL
from tapct.types import LabelMap, Refused

CONTRADICTORY = "contradictory_labels"
INSIDE = 0.9  # share of the smaller structure from which it lies inside the other one
TOUCHING = 0.1  # share of the smaller structure up to which the two only touch
# overlap of a contour with the mask that was made of it: twice the common voxels over the sum of
# both; a small structure is mostly border
SAME_FORM = 0.7


@dataclass(frozen=True)
class _Part:
    """One structure of one object.

    Args:
        drawn: the object.
        value: value in that object.
        name: its name; empty where the object gives none that may be kept.
        voxels: places of its voxels in the flat label map, ascending.
    """

    drawn: DicomLabels
    value: int
    name: str
    voxels: np.ndarray

    @property
    def title(self) -> str:
        """Its name for comparison with those of other objects, else its number."""
        return " ".join(self.name.lower().split()) or f"number {self.value}"


def merge(objects: Sequence[DicomLabels]) -> tuple[LabelMap, tuple[str, ...]]:
    """Merge the objects of one scan.

    A structure that is in two objects with the same voxels counts once; so does one that is drawn
    as a mask and as a contour. The first object keeps its values; a value of a later one that is
    taken becomes the next free one.

    Args:
        objects: two or more objects on the grid of one scan, in the order of their paths.
    Returns:
        The label map, and one line for each thing that was decided.
    Raises:
        Refused: `contradictory_labels`, see `_is_repeated`.
    """
    kept: list[_Part] = []
    num_repeated = 0
    for drawn in objects:
        earlier = tuple(kept)
        for part in _parts_of(drawn):
            # all of them are compared, since a part may repeat one and contradict another
            repeats = [_is_repeated(part, other) for other in earlier]
            if any(repeats):
                num_repeated += 1
            else:
                kept.append(part)
    labels, num_overlapping = _painted(kept, objects[0].label_map)
    notes = [f"{len(objects)} DICOM objects are merged"]
    if num_repeated:
        repeated = counted(num_repeated, "structure is", "structures are")
        notes.append(f"{repeated} in several objects and used once")
    for drawn in objects:
        notes += [note for note in drawn.notes if note not in notes]
    if num_overlapping:
        notes.append(f"structures overlap in {num_overlapping} voxels; the smaller one is kept")
    return labels, tuple(notes)


def _parts_of(drawn: DicomLabels) -> list[_Part]:
    """The structures of one object that have voxels, in the order of their values."""
    names = dict(drawn.label_map.names)
    return [
        _Part(drawn, value, names.get(value, ""), voxels)
        for value, voxels in sorted(drawn.voxels_of.items())
        if len(voxels)
    ]


def _is_repeated(part: _Part, other: _Part) -> bool:
    """Whether two structures of different objects are one structure.

    Raises:
        Refused: `contradictory_labels`: they have one name and other voxels, two names and the
            same voxels, or overlap although neither lies inside the other.
    """
    common = len(np.intersect1d(part.voxels, other.voxels, assume_unique=True))
    smaller, larger = sorted((len(part.voxels), len(other.voxels)))
    is_same_name = part.title == other.title
    if is_same_name and common == larger:
        return True
    is_same_form = 2 * common >= SAME_FORM * (smaller + larger)
    if part.drawn.is_contours != other.drawn.is_contours and is_same_form:
        return True
    if is_same_name:
        problem = f"has {len(part.voxels)} and {len(other.voxels)} voxels, {common} of them common"
        raise _contradiction(part, other, f"{quoted(part.title)} {problem}")
    if common >= INSIDE * larger:
        problem = f"{quoted(other.title)} and {quoted(part.title)} have the same voxels"
        raise _contradiction(part, other, problem)
    if TOUCHING * smaller < common < INSIDE * smaller:
        problem = f"{quoted(other.title)} and {quoted(part.title)} overlap in {common} voxels"
        raise _contradiction(part, other, f"{problem}, and neither lies inside the other")
    return False


def _contradiction(part: _Part, other: _Part, problem: str) -> Refused:
    """The refusal of two objects."""
    names = f"{file_name(other.drawn.path)} and {file_name(part.drawn.path)}"
    return Refused(
        CONTRADICTORY,
        f"{names} contradict each other: {problem}; move one of them out of the archive",
    )


def _painted(parts: Sequence[_Part], like: LabelMap) -> tuple[LabelMap, int]:
    """All structures in one map, the smaller ones over the larger ones.

    Args:
        parts: structures, those of the first object first.
        like: a label map on the grid of the scan.
    Returns:
        The map, and the number of voxels that two structures claimed, counted once per claim.
    """
    labels_ZYX = np.zeros_like(like.labels_ZYX)
    flat = labels_ZYX.reshape(-1)
    value_of: dict[int, int] = {}  # number of a part -> its value
    for number, part in enumerate(parts):
        taken = value_of.values()
        value_of[number] = part.value if part.value not in taken else max(taken) + 1
        if value_of[number] > MAX_LABEL:
            raise Refused(
                "not_labels",
                f"the merged objects need the value {value_of[number]}; rule: at most {MAX_LABEL}",
            )
    # of two structures of one size the first is kept, so that it is painted last
    for number in sorted(value_of, key=lambda k: (len(parts[k].voxels), -k), reverse=True):
        flat[parts[number].voxels] = value_of[number]
    names = tuple(sorted((value_of[k], part.name) for k, part in enumerate(parts) if part.name))
    claims = sum(len(part.voxels) for part in parts)
    merged = replace(like, labels_ZYX=labels_ZYX, names=names)
    return merged, claims - int(np.count_nonzero(flat))
