"""Copies of one scan in an archive: one is kept, or none where they contradict each other."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tapct.data.manifest import ACCEPTED, REFUSED, Row

DUPLICATE, CONTRADICTORY = "duplicate", "contradictory_geometry"
SPACING_TOLERANCE = 0.01  # headers round spacings; a larger difference is another geometry


def refuse_duplicates(
    rows: Sequence[Row], mirror_digests: Mapping[str, str] | None = None
) -> tuple[Row, ...]:
    """Refuse all but one of the accepted scans with the same voxels.

    The first copy with a label map is kept, else the first one. Where copies differ in spacing, or
    are mirrored or turned against each other, at most one of them is right and nobody knows which:
    all of them are refused.

    Args:
        rows: all rows, in the order of their paths.
        mirror_digests: `mirror_digest` of the scans by id; without it, mirrored copies are not
            found.
    """
    mirrors = mirror_digests or {}
    copies: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.status == ACCEPTED:
            copies[mirrors.get(row.id) or row.digest].append(row)
    refused: dict[str, Row] = {}
    for group in copies.values():
        if len(group) > 1:
            refused.update((row.id, row) for row in _refused(group))
    assert len({row.id for row in rows}) == len(rows), "64-bit ids of two paths collide"
    return tuple(refused.get(row.id, row) for row in rows)


def _refused(group: Sequence[Row]) -> Iterable[Row]:
    """The rows of one scan's copies that are refused."""
    problem = _contradiction(group)
    if problem:
        others = " and ".join(row.id for row in group)
        detail = f"{others} have the same voxels, but {problem}; correct or remove the wrong file"
        return [replace(row, status=REFUSED, reason=CONTRADICTORY, detail=detail) for row in group]
    kept = next((row for row in group if row.label_path), group[0])
    labels = ", which has labels" if kept.label_path else ""
    return [
        replace(
            row,
            status=REFUSED,
            reason=DUPLICATE,
            duplicate_of=kept.id,
            detail=f"the same voxels as {kept.id}{labels}",
        )
        for row in group
        if row is not kept
    ]


def _contradiction(group: Sequence[Row]) -> str:
    """How the geometry of copies differs; empty where it does not."""
    first = group[0]
    for row in group[1:]:
        if row.digest != first.digest:
            return "their headers mirror or turn them against each other"
        if not np.allclose(_spacing(row), _spacing(first), rtol=SPACING_TOLERANCE, atol=0):
            one, other = ("x".join(f"{mm:.4g}" for mm in _spacing(each)) for each in (first, row))
            return f"their spacings (z, y, x) are {one} mm and {other} mm"
    return ""


def _spacing(row: Row) -> tuple[float, float, float]:
    return row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm


def mirror_digest(hu_ZYX: np.ndarray) -> str:
    """A hash that a scan shares with its mirror images and quarter turns, and with no other scan.

    It holds the sums of all slices along each axis, read in the direction that comes first, and the
    axes in a fixed order.

    Args:
        hu_ZYX: int16 voxels.
    Returns:
        32 hex digits.
    """
    sums_Z, sums_Y, sums_X = (np.zeros(size, np.int64) for size in hu_ZYX.shape)
    for z, plane_YX in enumerate(hu_ZYX):  # slice by slice: twice as fast as the whole scan
        # int32: a row of 65535 voxels at 32767 HU fits
        rows_Y = plane_YX.sum(axis=1, dtype=np.int32)
        sums_Z[z] = rows_Y.sum(dtype=np.int64)
        sums_Y += rows_Y
        sums_X += plane_YX.sum(axis=0, dtype=np.int32)
    profiles = [min(sums.tolist(), sums[::-1].tolist()) for sums in (sums_Z, sums_Y, sums_X)]
    return hashlib.blake2b(repr(sorted(profiles)).encode(), digest_size=16).hexdigest()
