"""Rules for the places of slices: they make one stack if they follow each other in equal steps.

Positions alone count; SliceThickness, SpacingBetweenSlices and InstanceNumber are often wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tapct.data.readers.dicom_head import Head
from tapct.data.readers.raw import check_shape
from tapct.types import Refused

SAME_POSITION_MM = 0.01  # slices that are nearer to each other lie at one position
# largest difference of direction cosines of two slices of one stack; narrower than SAME_DIRECTION
# of labels, whose corners are compared too
_SLICE_DIRECTION = 1e-3


def same_grid_problem(head: Head, first: Head) -> str:
    """In which property of the pixel grid two slices differ; empty where they do not."""
    if np.abs(np.subtract(head.axes, first.axes)).max() > _SLICE_DIRECTION:
        return "have different orientations"
    for index, name in enumerate(("Rows", "Columns")):
        if head.size[index] != first.size[index]:
            return f"differ in {name}"
    if not np.allclose(head.spacing, first.spacing, rtol=1e-3, atol=0):
        return "differ in PixelSpacing"
    return ""


def check_same_grid(heads: Sequence[Head]) -> None:
    """Refuse slices that differ in orientation, size or pixel spacing.

    Raises:
        Refused: mixed_geometry, bad_shape.
    """
    first = heads[0]
    for head in heads[1:]:
        if head.axes is first.axes and head.size == first.size and head.spacing == first.spacing:
            continue
        problem = same_grid_problem(head, first)
        if problem:
            raise Refused("mixed_geometry", f"{head.name} and {first.name} {problem}")
    rows, columns = first.size
    check_shape((columns, rows, len(heads)))


def heights_mm(heads: Sequence[Head]) -> np.ndarray:
    """Places of the slices along the normal of the first, in mm."""
    return np.asarray([head.position for head in heads]) @ heads[0].normal


def in_order(heads: Sequence[Head]) -> list[int]:
    """Indices of the slices in the order of their places, equal places by file name."""
    heights = heights_mm(heads)
    return sorted(range(len(heads)), key=lambda i: (float(heights[i]), heads[i].path.name))


def step_vector(heads: Sequence[Head]) -> np.ndarray:
    """The step from slice to slice in LPS mm, (x, y, z), of two or more slices in order.

    Raises:
        Refused: duplicate_slices, missing_slices, uneven_slices.
    """
    step_mm = check_steps(heads)
    first, last = np.asarray(heads[0].position), np.asarray(heads[-1].position)
    step = (last - first) / (len(heads) - 1)
    check_straight(heads, step, step_mm)
    return step


def check_steps(heads: Sequence[Head]) -> float:
    """Refuse slices that are not evenly spaced.

    Args:
        heads: two or more slices in order.
    Returns:
        The median distance of neighbouring slices in mm.
    Raises:
        Refused: duplicate_slices, missing_slices, uneven_slices.
    """
    steps = np.diff(heights_mm(heads))
    same = np.flatnonzero(steps < SAME_POSITION_MM)
    if same.size:
        pair = f"{heads[same[0]].name} and {heads[same[0] + 1].name}"
        raise Refused(
            "duplicate_slices",
            f"{same.size} of {len(heads)} slices repeat a position, e.g. {pair}; keep one of each",
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


def check_straight(heads: Sequence[Head], step: np.ndarray, step_mm: float) -> None:
    """Refuse slices that do not lie on the line from the first to the last.

    Args:
        heads: slices in order.
        step: step from slice to slice, LPS mm.
        step_mm: median distance of neighbouring slices in mm.
    """
    positions = np.asarray([head.position for head in heads])
    expected = positions[0] + np.arange(len(heads))[:, None] * step
    off_mm = float(np.abs(positions - expected).max())
    if off_mm > max(0.5, 0.5 * step_mm):
        raise Refused(
            "uneven_slices",
            f"slices lie up to {off_mm:.2f} mm off the line through the first and the last",
        )
