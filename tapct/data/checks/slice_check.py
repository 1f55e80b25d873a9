"""Check the slices of a scan against each other: empty, repeated or in a wrong order."""

from __future__ import annotations

import numpy as np

from tapct.data.checks.check_rules import CheckRules
from tapct.data.checks.slice_levels import check_levels
from tapct.types import AIR_HU, Refused

_SIDE = 64  # pixels of a slice along each axis that are compared
_BLOCK = 8  # pixels; means of blocks compare anatomy and not noise
_TOP_HU = 300  # values above it count as equal, so that metal does not outweigh the anatomy
_BODY_ABOVE = -500  # HU
_MIN_BODY = 0.02  # share of a slice
_MARK_EMPTY = 0.2  # share of the slices
_MIN_SLICES = 5
_MIN_SLICES_ORDER = 16
_ODD_RATIO = 2.0
_ODD_HU = 25.0


def check_slices(hu_ZYX: np.ndarray, rules: CheckRules) -> tuple[str, ...]:
    """Refuse a scan whose slices cannot lie beside each other in a body.

    Args:
        hu_ZYX: int16 HU.
        rules: thresholds.
    Returns:
        Marks: `empty_slices` for constant slices at the ends, `repeated_slices` for few slices
        that equal another one.
    Raises:
        Refused: empty_slices, repeated_slices, slice_order, not_hu (a step between slices).
    """
    pixels_ZYX = hu_ZYX[
        :,
        :: max(1, hu_ZYX.shape[1] // _SIDE),
        :: max(1, hu_ZYX.shape[2] // _SIDE),
    ]
    pixels_ZYX = np.ascontiguousarray(pixels_ZYX)
    flat = pixels_ZYX.reshape(len(pixels_ZYX), -1)
    filled = np.flatnonzero(flat.max(axis=1) != flat.min(axis=1))
    if filled.size == 0:
        return ()
    has_body = (flat > _BODY_ABOVE).mean(axis=1) >= _MIN_BODY
    marks = [*_check_empty(flat, filled, has_body, rules)]
    marks += _check_repeated(hu_ZYX, flat, filled, has_body, rules)
    _check_order(pixels_ZYX[filled[0] : filled[-1] + 1], rules)
    check_levels(hu_ZYX)
    return tuple(marks)


def _check_empty(
    flat: np.ndarray, filled: np.ndarray, has_body: np.ndarray, rules: CheckRules
) -> list[str]:
    """Constant slices: refused between two slices of the body, or where most slices are."""
    num_slices = len(flat)
    for before, after in zip(filled[:-1], filled[1:], strict=True):
        if after - before > 1 and has_body[before] and has_body[after]:
            raise Refused(
                "empty_slices",
                f"slice {before + 1} of {num_slices} is {flat[before + 1, 0]} HU throughout, "
                "between slices of the body; export the series again",
            )
    num_empty = num_slices - filled.size
    if num_empty > rules.max_empty_slices * num_slices:
        raise Refused(
            "empty_slices",
            f"{num_empty} of {num_slices} slices hold one value each; rule: at most "
            f"{rules.max_empty_slices:.0%} (max_empty_slices)",
        )
    ends = np.setdiff1d(np.arange(num_slices), filled)
    wrong = [z for z in ends if flat[z, 0] > -900]
    if wrong:
        raise Refused(
            "empty_slices",
            f"slice {wrong[0]} of {num_slices} is {flat[wrong[0], 0]} HU throughout, which is not "
            f"air; remove it or write {AIR_HU} there",
        )
    return ["empty_slices"] if num_empty > _MARK_EMPTY * num_slices else []


def _check_repeated(
    hu_ZYX: np.ndarray,
    flat: np.ndarray,
    filled: np.ndarray,
    has_body: np.ndarray,
    rules: CheckRules,
) -> list[str]:
    """Slices of the body that equal another one, anywhere in the scan."""
    first_with: dict[bytes, int] = {}
    repeats = []
    for z in filled[has_body[filled]]:
        first = first_with.setdefault(flat[z].tobytes(), int(z))
        if first != z and np.array_equal(hu_ZYX[first], hu_ZYX[z]):
            repeats.append((first, int(z)))
    if len(repeats) > rules.max_repeated_slices * len(flat):
        first, z = repeats[0]
        raise Refused(
            "repeated_slices",
            f"{len(repeats)} of {len(flat)} slices equal another one, e.g. {first} and {z}; rule: "
            f"at most {rules.max_repeated_slices:.0%} (max_repeated_slices)",
        )
    return ["repeated_slices"] if repeats else []


def _check_order(pixels_ZYX: np.ndarray, rules: CheckRules) -> None:
    """Neighbouring slices of a body resemble each other more than slices far apart."""
    depth, height, width = pixels_ZYX.shape
    if depth < _MIN_SLICES:
        return
    block_y, block_x = min(_BLOCK, height), min(_BLOCK, width)
    rows, columns = height // block_y, width // block_x
    values = np.clip(pixels_ZYX[:, : rows * block_y, : columns * block_x], AIR_HU, _TOP_HU)
    blocks = values.reshape(depth, rows, block_y, columns, block_x).mean(
        axis=(2, 4), dtype=np.float32
    )

    def distance(apart: int) -> np.ndarray:
        return np.abs(blocks[apart:] - blocks[:-apart]).mean(axis=(1, 2))

    near = distance(1)
    both = np.minimum(near[:-1], near[1:])  # of each inner slice to the nearer of its neighbours
    odd = np.flatnonzero((both > _ODD_RATIO * distance(2)) & (both > _ODD_HU))
    if odd.size:
        raise Refused(
            "slice_order",
            f"{odd.size} of {depth} slices differ from both neighbours, which resemble each other "
            f"(first: slice {odd[0] + 1}); sort or export the series again",
        )
    if depth < _MIN_SLICES_ORDER:
        return
    far = float(np.median(distance(depth // 3)))
    ratio = float(np.median(near)) / max(far, 1e-9)
    if far > _ODD_HU and ratio > rules.max_slice_order:
        raise Refused(
            "slice_order",
            f"neighbouring slices differ {ratio:.2f} times as much as slices far apart; rule: at "
            f"most {rules.max_slice_order} (max_slice_order); sort the slices by position",
        )
