"""Curves of any length in a bounded number of points, without hiding a value.

A long curve is cut into groups of consecutive points. Of each group, the lowest value, the highest
value and the mean are kept, so a spike of a single step stays visible.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

MAX_GROUPS = 1500  # curves of more than twice as many points are grouped


@dataclass(frozen=True)
class Groups:
    """Consecutive points of a curve, taken together.

    Args:
        first: float64 (G), x of the first point of each group.
        last: float64 (G), x of its last point.
        mean: float64 (G), mean of its finite values; NaN where there is none.
        low: float64 (G), lowest finite value; NaN where there is none.
        high: float64 (G), highest finite value; NaN where there is none.
        size: points in the largest group; 1 where nothing was grouped.
    """

    first: np.ndarray
    last: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    size: int


def grouped(x: np.ndarray, y: np.ndarray, most: int = MAX_GROUPS) -> Groups:
    """Group the points of a curve where there are more than twice `most`.

    Args:
        x: float64 (n), ascending; n >= 1.
        y: float64 (n); not finite where the value was not.
        most: largest number of groups.
    """
    if len(x) <= 2 * most:
        y = np.where(np.isfinite(y), y, np.nan)
        return Groups(x, x, y, y, y, 1)
    edges = np.linspace(0, len(x), most + 1).astype(int)
    starts, finite = edges[:-1], np.isfinite(y)
    count = np.add.reduceat(finite, starts)
    total = np.add.reduceat(np.where(finite, y, 0.0), starts)
    low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    known = count > 0
    return Groups(
        x[starts],
        x[edges[1:] - 1],
        np.where(known, total / np.maximum(count, 1), np.nan),
        np.where(known, low, np.nan),
        np.where(known, high, np.nan),
        int(np.diff(edges).max()),
    )


def group_medians(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Median of the finite values of each of at most `most` groups (0 without any), at the x of the
    last point of the group: single slow steps drop out.

    Args:
        x: float64 (n), ascending.
        y: float64 (n); not finite where the value was not.
        most: largest number of groups.
    """
    if len(x) <= most:
        return x, np.nan_to_num(y, posinf=0.0, neginf=0.0)
    edges = np.linspace(0, len(x), most + 1).astype(int)
    medians = []
    for low, high in itertools.pairwise(edges):
        part = y[low:high][np.isfinite(y[low:high])]
        medians.append(float(np.median(part)) if len(part) else 0.0)
    return x[edges[1:] - 1], np.array(medians)
