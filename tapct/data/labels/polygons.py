"""Fill closed polygons on a grid of pixels by the even-odd rule.

Axes: Y X pixels of a slice; P points of a polygon.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def fill_even_odd(polygons: Iterable[np.ndarray], shape_YX: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies inside an odd number of polygons.

    A polygon inside another one is a hole, as are the two borders of a keyhole contour, whose
    connecting lines cancel out.

    Args:
        polygons: arrays (P, 2) of points (x, y) in pixels; pixel centres have whole coordinates.
            The last point is connected with the first.
        shape_YX: number of pixels.
    Returns:
        bool (Y, X).
    """
    height, width = shape_YX
    # The rows of a polygon are crossed from left to right: each crossing toggles all pixels to its
    # right. One toggle is kept per crossing, in the column of the first pixel behind it.
    toggles_YX = np.zeros((height, width + 1), dtype=np.int64)
    for points_P2 in polygons:
        for (x0, y0), (x1, y1) in zip(points_P2, np.roll(points_P2, -1, axis=0)):
            if y0 > y1:  # one order of the ends, so that an edge walked both ways cancels exactly
                x0, y0, x1, y1 = x1, y1, x0, y0
            # half open, so that a row through a corner is crossed once
            first, last = max(0, int(np.ceil(y0))), min(height, int(np.ceil(y1)))
            if first >= last:
                continue
            rows = np.arange(first, last)
            crossings = x0 + (rows - y0) * ((x1 - x0) / (y1 - y0))
            columns = np.clip(np.ceil(crossings), 0, width).astype(np.int64)
            toggles_YX[rows, columns] += 1
    inside_YX: np.ndarray = np.cumsum(toggles_YX[:, :width], axis=1) % 2 == 1
    return inside_YX
