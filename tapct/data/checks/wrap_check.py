"""Check that values above 2047 HU did not wrap around to -2048 HU, as in signed words of 12 bits.

Metal then becomes lower than air, and the scan would be accepted, since values below -1024 HU are
padding elsewhere. But padding lies outside of the body, and it is one constant.
"""

from __future__ import annotations

import numpy as np

from tapct.types import Refused

_LARGEST_HU = 2047  # of signed words of 12 bits
_BELOW_AIR = -1400  # HU; the noise of air does not reach it
_TISSUE_HU = -200  # HU on both sides of metal
_MIN_RUNS = 8
_MAX_RUN = 64  # voxels; metal is smaller
_PADDING_SHARE = 0.02  # share of the voxels from which one value is padding
_MAX_CLIPPED = 0.5  # voxels with the largest value, per voxel below air; metal that was clipped


def check_wrap(voxels_IJK: np.ndarray, slope: float, intercept: float) -> None:
    """Refuse voxels inside of the body that are lower than air.

    Args:
        voxels_IJK: voxels as stored, the first axis fastest.
        slope: factor to HU.
        intercept: offset in HU.
    Raises:
        Refused: not_hu.
    """
    if slope <= 0:
        return
    below, tissue, largest = (
        (hu - intercept) / slope for hu in (_BELOW_AIR, _TISSUE_HU, _LARGEST_HU)
    )
    highest = voxels_IJK.max()
    if highest > largest or voxels_IJK.min() >= below:
        return
    flat = voxels_IJK.reshape(-1, order="F")
    is_low = flat < below
    values, counts = np.unique(flat[is_low], return_counts=True)
    padding = values[counts > _PADDING_SHARE * flat.size]
    if np.count_nonzero(flat == highest) > _MAX_CLIPPED * counts.sum():
        return
    # runs of low voxels: the first of each, and the one behind its last
    edges = np.flatnonzero(np.diff(is_low))
    if is_low[0]:
        edges = edges[1:]
    num_runs = len(edges) // 2
    before, last = edges[: 2 * num_runs : 2], edges[1 : 2 * num_runs : 2]
    columns = voxels_IJK.shape[0]
    in_one_row = before // columns == (last + 1) // columns
    is_inside = in_one_row & (flat[before] > tissue) & (flat[last + 1] > tissue)
    is_inside &= last - before <= _MAX_RUN
    is_inside &= ~(np.isin(flat[before + 1], padding) | np.isin(flat[last], padding))
    found = int(np.count_nonzero(is_inside))
    if found >= _MIN_RUNS:
        raise Refused(
            "not_hu",
            f"at {found} places inside of the body the values are below {_BELOW_AIR} HU, and none "
            f"is above {_LARGEST_HU} HU: higher values wrapped around in signed words of 12 bits; "
            "export the scan again with 16 bits",
        )
