"""Check that the sizes of the axes are given in the order in which the voxels are stored.

A header with two sizes exchanged describes the same number of voxels, so only the voxels show it:
each row is then cut at a wrong place, and neighbours along another axis are not neighbours. Where
the exchanged sizes make rows or slices that fit much better, the header is wrong.
"""

from __future__ import annotations

import numpy as np

from tapct.data.checks.check_rules import DEFAULT_RULES, CheckRules
from tapct.types import AIR_HU, Refused

_NUM_RUNS, _RUN = 256, 512  # runs of neighbouring voxels that are compared
_METAL_HU = 1500
# an exchanged size below this number of steps of the axis compares neighbours too
_FAR = 4.0
_NAMES = ("first", "second", "third")


def check_axes(
    voxels_IJK: np.ndarray,
    affine: np.ndarray,
    slope: float = 1.0,
    intercept: float = 0.0,
    rules: CheckRules = DEFAULT_RULES,
) -> None:
    """Refuse voxels that fit together better if two sizes of the header are exchanged.

    Args:
        voxels_IJK: voxels as stored, the first axis fastest.
        affine: 4x4 matrix, (i, j, k, 1) -> LPS mm.
        slope: factor to HU.
        intercept: offset in HU.
        rules: thresholds.
    Raises:
        Refused: header_mismatch.
    """
    flat = voxels_IJK.reshape(-1, order="F")
    columns, rows, slices = voxels_IJK.shape
    column_mm, row_mm, slice_mm = np.linalg.norm(affine[:3, :3], axis=0).tolist()

    def difference(stride: int) -> float:
        """Mean difference in HU of voxels that lie `stride` places apart in the file."""
        last = flat.size - stride - _RUN
        if last < 0:
            return np.inf
        starts = np.linspace(0, last, _NUM_RUNS).astype(np.int64)
        places = (starts[:, None] + np.arange(_RUN)).reshape(-1)
        first, second = (
            np.clip(flat[at].astype(np.float64) * slope + intercept, AIR_HU, _METAL_HU)
            for at in (places, places + stride)
        )
        return float(np.abs(first - second).mean())

    # for each pair of axes: the step that the header gives, the step with the sizes exchanged, how
    # long that one is in rows or slices of the header
    for (one, other), step, exchanged, length in (
        ((0, 1), columns, rows, rows * column_mm / row_mm),
        ((0, 2), columns, slices, slices * column_mm / row_mm),
        ((1, 2), columns * rows, columns * slices, slices * row_mm / slice_mm),
    ):
        if step == exchanged or length < _FAR:
            continue
        claimed, better = difference(step), difference(exchanged)
        if better < rules.min_axis_order * claimed:
            sizes = f"{voxels_IJK.shape[one]} and {voxels_IJK.shape[other]}"
            raise Refused(
                "header_mismatch",
                f"with the sizes of its {_NAMES[one]} and {_NAMES[other]} axis ({sizes}) "
                f"exchanged, neighbours differ by {better:.0f} HU instead of {claimed:.0f} HU; "
                f"rule: at least {rules.min_axis_order} of it (min_axis_order); correct the header",
            )
