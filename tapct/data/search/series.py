"""Put DICOM slices together to scans: by SeriesInstanceUID over the whole archive, and within a
series by what distinguishes one stack of slices from another.

A stack is whole if its slices have one orientation, size and pixel spacing, and follow each other
in equal steps. Whole stacks are scans. What does not belong to one (scouts, bolus tracking,
projections over slices) is refused with a reason. A scan is never cut to pieces: slices of one
series that together make a whole stack stay together, unless two stacks of them lie in each other.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tapct.base.counted import counted
from tapct.data.patients.stand_ins import canonical_id
from tapct.data.readers import dicom_geometry as geometry
from tapct.data.readers.dicom_head import TRAITS, Head
from tapct.types import Refused

_FOLDER = len(TRAITS)  # number of the trait after the last element
MIN_STACK = 3  # fewest slices for which a split can be seen from their places
MIN_BLOCK = 8  # fewest slices of each of two stacks that lie behind each other
_PARALLEL = 0.75  # |cosine| between the normals of a scout and of a stack of slices


@dataclass(frozen=True)
class Stack:
    """The slices of one scan, or slices that make none.

    Args:
        heads: its slices in order, or the files that are refused together.
        reason: code of the rule by which they are refused; empty for a whole stack.
        detail: one line with the reason.
        mark: code of what is unusual about a whole stack; empty for most.
    """

    heads: tuple[Head, ...]
    reason: str = ""
    detail: str = ""
    mark: str = ""

    @property
    def is_long(self) -> bool:
        """Whether this is a whole stack of several slices."""
        return not self.reason and len(self.heads) > 1


def stacks_of(heads: Iterable[Head], *, derived: bool = False) -> list[Stack]:
    """Put the slices of an archive together.

    Args:
        heads: one per file, in a fixed order.
        derived: True to treat images that were computed from others as plain slices.
    Returns:
        Stacks, and what is refused, in the order of the first file of their series.
    """
    by_series: dict[tuple[str, ...], list[Head]] = {}
    for head in heads:
        by_series.setdefault(series_key(head), []).append(head)
    stacks = []
    for key, members in by_series.items():
        if key[2]:
            for part in _by_patient(members):
                stacks += _stacks_of_series(part, derived)
        else:
            stacks += _without_uid(_stacks_of_series(members, derived))
    return stacks


def series_key(head: Head) -> tuple[str, ...]:
    """What all slices of one series have in common.

    Without SeriesInstanceUID it is the patient and the study, and without that the folder.
    """
    if head.series_uid:
        return "", "", head.series_uid, ""
    folder = "" if head.study_uid else str(head.path.parent)
    return canonical_id(head.patient_id), head.study_uid, "", folder


def _by_patient(heads: list[Head]) -> list[list[Head]]:
    """Slices of one SeriesInstanceUID by patient.

    Some anonymisation software gives every series the same UID: slices of several patients are
    several series if their studies differ or their stacks lie in each other. Other slices of
    several PatientIDs stay together, since a scan is never cut to pieces.
    """
    by_patient: dict[str, list[Head]] = {}
    for head in heads:
        by_patient.setdefault(canonical_id(head.patient_id), []).append(head)
    series: list[list[Head]] = []
    for members in by_patient.values():
        same = next((part for part in series if _is_one_series(part, members)), None)
        if same is None:
            series.append(members)
        else:
            same += members
    return series


def _is_one_series(one: list[Head], other: list[Head]) -> bool:
    """Whether slices of two PatientIDs and one SeriesInstanceUID are of one series."""
    studies = [{head.study_uid for head in part} - {""} for part in (one, other)]
    if all(studies) and not studies[0] & studies[1]:
        return False
    ids = {id(head) for head in one}
    for members in _by_grid(_plain_slices(one + other)):
        parts = (
            [head for head in members if id(head) in ids],
            [head for head in members if id(head) not in ids],
        )
        if all(parts) and not _are_two_stacks(*parts):
            return True
    return False


def _are_two_stacks(one: list[Head], other: list[Head]) -> bool:
    """Whether slices of one pixel grid and two PatientIDs are two stacks that lie in each other."""
    reason = _examine(one + other).reason
    if not reason or not _lie_in_each_other([one, other]):
        return False
    if reason == "duplicate_slices":
        return True
    return all(stack.is_long for part in (one, other) for stack in split(part))


def _plain_slices(heads: list[Head]) -> list[Head]:
    """Slices of known place."""
    return [
        head
        for head in heads
        if head.refusal is None and not head.misplaced and not head.is_multiframe
    ]


def _without_uid(stacks: list[Stack]) -> list[Stack]:
    """Refuse the slices without SeriesInstanceUID that do not show by themselves that they are one
    stack.
    """
    kept, rest = [], []
    for stack in stacks:
        if stack.is_long or (len(stack.heads) == 1 and stack.heads[0].is_multiframe):
            kept.append(replace(stack, mark="no_series_uid"))
        elif not stack.reason or stack.reason in _GEOMETRY_REASONS:
            rest.append(stack)
        else:
            kept.append(stack)
    if rest:
        members = tuple(head for stack in rest for head in stack.heads)
        why = rest[0].detail or "a single slice is no stack"
        detail = (
            f"{counted(len(members), 'slice')} without SeriesInstanceUID make no whole stack: {why}"
        )
        kept.append(Stack(members, "no_series_uid", detail))
    return kept


_GEOMETRY_REASONS = frozenset(
    ("duplicate_slices", "missing_slices", "uneven_slices", "mixed_geometry", "bolus_tracking")
)


def _stacks_of_series(heads: list[Head], derived: bool) -> list[Stack]:
    """The stacks of one series: first what cannot be a slice, then the slices by their places."""
    stacks: list[Stack] = []
    refused: dict[tuple[str, str], list[Head]] = {}
    frames: dict[str, list[Head]] = {}
    slices: dict[str, list[Head]] = {}
    for head in heads:
        if head.refusal is not None:
            sort_of = head.sop_class if head.refusal[0] == "not_ct" else ""
            refused.setdefault((head.refusal[0], sort_of), []).append(head)
        elif head.derived and not derived:
            refused.setdefault(("derived_image", head.derived), []).append(head)
        elif head.is_multiframe:
            frames.setdefault(head.concatenation or str(head.path), []).append(head)
        else:
            slices.setdefault(head.derived, []).append(head)
    for (reason, what), members in refused.items():
        if reason == "derived_image":
            detail = f"{counted(len(members), 'image')}: {what}; accept with --derived"
        else:
            assert members[0].refusal is not None
            detail = members[0].refusal[1]
        stacks.append(Stack(tuple(members), reason, detail))
    for members in frames.values():
        stacks += _stacks_of_frames(members, derived)
    for members in slices.values():
        stacks += [_of_one_patient(stack) for stack in _stacks_of_slices(members)]
    return stacks


def _stacks_of_frames(heads: list[Head], derived: bool) -> list[Stack]:
    """The stacks of one multi-frame image, whose frames may be those of several.

    Args:
        heads: its files, of which a concatenation has several.
        derived: as in `stacks_of`.
    """
    if not all(head.frames for head in heads):
        return [Stack(tuple(heads))]  # its reader gives the reason
    stacks = _stacks_of_series([frame for head in heads for frame in head.frames], derived)
    if len(stacks) == 1:
        return [replace(stacks[0], heads=tuple(heads))]
    return stacks


def _of_one_patient(stack: Stack) -> Stack:
    """Refuse a whole stack whose slices have several PatientIDs: nobody knows whose it is."""
    ids = {canonical_id(head.patient_id) for head in stack.heads} - {""}
    if stack.reason or len(ids) < 2:
        return stack
    slices = counted(len(stack.heads), "slice")
    detail = f"{slices} of one series have {len(ids)} PatientIDs; rule: one"
    return replace(stack, reason="mixed_patients", detail=detail)


def _stacks_of_slices(heads: list[Head]) -> list[Stack]:
    """The stacks among the slices of one series."""
    stacks, heads = _misplaced(heads)
    grids = [stack for members in _by_grid(heads) for stack in split(members)]
    longest = max((stack for stack in grids if stack.is_long), key=_length, default=None)
    if longest is None:
        return stacks + _no_stack(grids)
    for stack in grids:
        if not stack.reason and not stack.is_long:
            stack = _odd_image(stack, longest)
        stacks.append(stack)
    return stacks


def _misplaced(heads: list[Head]) -> tuple[list[Stack], list[Head]]:
    """Refuse slices of unknown place, and all slices of the same size with them: each of them may
    be the one that is missing in the stack.

    Returns:
        What is refused, and the other slices.
    """
    stacks = []
    for size in dict.fromkeys(head.size for head in heads if head.misplaced):
        members = tuple(head for head in heads if head.size == size)
        first = next(head.misplaced for head in members if head.misplaced)
        stacks.append(Stack(members, *first))
    sizes = {stack.heads[0].size for stack in stacks}
    return stacks, [head for head in heads if head.size not in sizes]


def _by_grid(heads: list[Head]) -> list[list[Head]]:
    """Slices by orientation, size and pixel spacing."""
    grids: list[list[Head]] = []
    same: dict[tuple[object, ...], list[Head]] = {}  # most slices have equal numbers
    for head in heads:
        numbers = (head.axes, head.size, head.spacing)
        if numbers not in same:
            for grid in grids:
                if not geometry.same_grid_problem(head, grid[0]):
                    break
            else:
                grid = []
                grids.append(grid)
            same[numbers] = grid
        same[numbers].append(head)
    return grids


def _no_stack(stacks: list[Stack]) -> list[Stack]:
    """The stacks of a series without a whole one: those of similar orientation are one row."""
    if len(stacks) < 2:
        return stacks
    largest = max(stacks, key=_length)
    beside = [stack for stack in stacks if _is_parallel(stack, largest)]
    others = [stack for stack in stacks if not _is_parallel(stack, largest)]
    if len(beside) > 1:
        members = tuple(head for stack in beside for head in stack.heads)
        problem = "lie at places that make no stack"
        for head in members[1:]:
            problem = geometry.same_grid_problem(head, members[0]) or problem
        why = f"{len(members)} slices of one series {problem}"
        beside = [Stack(members, "mixed_geometry", why)]
    return beside + [
        stack if stack.reason or stack.is_long else _odd_image(stack, largest) for stack in others
    ]


def _odd_image(stack: Stack, beside: Stack) -> Stack:
    """Refuse a single slice beside the stack of its series."""
    head = stack.heads[0]
    rest = f"beside {len(beside.heads)} slices of its series"
    if not _is_parallel(stack, beside):
        detail = f"{head.name} is a single image of another orientation {rest}"
        return replace(stack, reason="localizer", detail=detail)
    detail = f"{head.name} is a single image {rest}"
    return replace(stack, reason="bolus_tracking", detail=detail)


def _is_parallel(one: Stack, other: Stack) -> bool:
    """Whether the slices of two stacks have similar directions."""
    return abs(float(one.heads[0].normal @ other.heads[0].normal)) > _PARALLEL


def _length(stack: Stack) -> int:
    """Number of slices."""
    return len(stack.heads)


def split(heads: Sequence[Head], tried: int = 0) -> list[Stack]:
    """Split slices of one pixel grid into stacks.

    Slices that follow each other in equal steps stay together, even where a trait such as
    AcquisitionNumber changes on the way. They are split where the stacks lie in each other (phases,
    kernels, energies), or where all of them do not make one stack and parts of them do.

    Args:
        heads: slices of one orientation, size and pixel spacing.
        tried: number of traits that have been tried on these slices.
    """
    merged = _examine(heads)
    for trait in range(tried, _FOLDER + 1):
        if trait == _FOLDER and merged.reason == "duplicate_slices":
            without_copies = _without_copies(heads)
            if without_copies:
                return without_copies
        groups = list(_by_trait(heads, trait).values())
        if len(groups) < 2 or len(groups) > len(heads) / 2 + 1:
            continue
        if not merged.reason and not _lie_in_each_other(groups):
            continue
        parts = [stack for members in groups for stack in split(members, trait + 1)]
        if _is_better(merged, groups, parts, by_folder=trait == _FOLDER):
            return [_as_leftover(part, parts) for part in parts]
    if merged.reason in ("duplicate_slices", "uneven_slices", "missing_slices"):
        return _by_number(heads) or [merged]
    return [merged]


def _examine(heads: Sequence[Head]) -> Stack:
    """All these slices as one stack, with the reason for which they are none."""
    members = tuple(heads[index] for index in geometry.in_order(heads))
    if len(members) == 1:
        return Stack(members)
    span = np.ptp(geometry.heights_mm(members))
    if span < geometry.SAME_POSITION_MM and len(members) > 2:
        detail = f"{len(members)} slices lie at one position: bolus tracking or a film"
        return Stack(members, "bolus_tracking", detail)
    try:
        geometry.check_same_grid(members)
        geometry.step_vector(members)
    except Refused as error:
        return Stack(members, error.reason, error.marked)
    return Stack(members)


def _by_trait(heads: Sequence[Head], trait: int) -> dict[str, list[Head]]:
    """Slices by the value of one trait."""
    groups: dict[str, list[Head]] = {}
    for head in heads:
        value = str(head.path.parent) if trait == _FOLDER else head.traits[trait]
        groups.setdefault(value, []).append(head)
    return groups


def _is_better(
    merged: Stack, groups: list[list[Head]], parts: list[Stack], *, by_folder: bool
) -> bool:
    """Whether slices are to be split into these parts.

    Args:
        merged: all slices as one stack; where it is whole, the groups lie in each other.
        groups: the slices by a trait.
        parts: the stacks that these groups make.
        by_folder: whether the trait is the folder, which the scanner does not choose.
    """
    whole = [part for part in parts if not part.reason and len(part.heads) >= MIN_STACK]
    if not whole:
        return False
    if not merged.reason:  # equal steps, but of two stacks, one in the other
        return not by_folder and len(whole) == len(parts)
    if by_folder:
        return len(whole) == len(parts)
    if _lie_in_each_other(groups):
        return True
    return all(len(group) >= MIN_BLOCK for group in groups if np.ptp(_heights(group)) > 0)


def _lie_in_each_other(groups: list[list[Head]]) -> bool:
    """Whether the ranges of places of two groups overlap."""
    ranges = []
    for group in groups:
        heights = _heights(group)
        ranges.append((float(heights.min()), float(heights.max())))
    ranges.sort()
    end = ranges[0][1]
    for first, last in ranges[1:]:
        if first < end - geometry.SAME_POSITION_MM:
            return True
        end = max(end, last)
    return False


def _heights(heads: Sequence[Head]) -> np.ndarray:
    """Places along the normal in mm."""
    return geometry.heights_mm(heads)


def _as_leftover(part: Stack, parts: list[Stack]) -> Stack:
    """Refuse a single slice that is left beside a whole stack."""
    longest = max((stack for stack in parts if stack.is_long), key=_length, default=None)
    if longest is None or part.reason or part.is_long:
        return part
    return _odd_image(part, longest)


def _by_number(heads: Sequence[Head]) -> list[Stack]:
    """Split slices that repeat their places by InstanceNumber: a new stack begins where the places
    turn back, or each place is repeated before the next one.

    Returns:
        The stacks; empty where the numbers do not separate them.
    """
    numbers = [head.number for head in heads]
    if len(set(numbers)) < len(heads):
        return []
    in_turn = sorted(heads, key=lambda head: head.number)
    for groups in (_runs(in_turn), _repeats(in_turn)):
        parts = [_examine(group) for group in groups]
        if len(parts) < 2 or any(len(part.heads) < MIN_STACK or part.reason for part in parts):
            continue
        if _lie_in_each_other(groups):
            return parts
    return []


def _runs(heads: list[Head]) -> list[list[Head]]:
    """Cut slices where the direction in which their places move changes."""
    heights = _heights(heads)
    runs: list[list[Head]] = [[heads[0]]]
    direction = 0.0
    for head, step in zip(heads[1:], np.sign(np.diff(heights))):
        if direction and step != direction:
            runs.append([head])
            direction = 0.0
        else:
            runs[-1].append(head)
            direction = float(step)
    return runs


def _repeats(heads: list[Head]) -> list[list[Head]]:
    """The first slice at each place, the second one, and so on, where each place is repeated
    equally often before the next one; empty otherwise.
    """
    heights = _heights(heads)
    same = np.abs(np.diff(heights)) < geometry.SAME_POSITION_MM
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    counts = np.diff([*starts, len(heads)])
    if counts.min() != counts.max() or counts[0] < 2:
        return []
    return [heads[index :: int(counts[0])] for index in range(int(counts[0]))]


def _without_copies(heads: Sequence[Head]) -> list[Stack]:
    """The stack without files that are byte by byte another file of it; empty where that does not
    make it whole.
    """
    if any(head.frame for head in heads):
        return []  # frames of one file are no copies of each other
    first_of: dict[tuple[str, tuple[float, ...]], Head] = {}
    copies = []
    for head in heads:
        first = first_of.setdefault((head.sop_uid, head.position), head)
        if first is head:
            continue
        if not _equal_files(first.path, head.path):
            return []
        copies.append(head)
    merged = _examine(list(first_of.values()))
    if not copies or merged.reason:
        return []
    detail = f"{counted(len(copies), 'file')} of the series repeated byte by byte"
    return [merged, Stack(tuple(copies), "duplicate", detail)]


def _equal_files(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes; False where one cannot be read."""
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False
