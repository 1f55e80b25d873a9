"""Copies of one scan in an archive: one is kept, or none where they contradict each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow

from tapct.data.manifest import ACCEPTED
from tapct.data.patients.columns import number_of, runs

DUPLICATE, CONTRADICTORY = "duplicate", "contradictory_geometry"
SPACING_TOLERANCE = 0.01  # headers round spacings; a larger difference is another geometry


@dataclass(frozen=True)
class Refusal:
    """Why a copy is refused; as the columns of `Row`."""

    reason: str
    detail: str
    duplicate_of: str = ""


# columns that `Copies` needs
COLUMNS = (
    *("id", "status", "digest", "mirror_digest", "label_path"),
    *("spacing_z_mm", "spacing_y_mm", "spacing_x_mm"),
)


class Copies:
    """The accepted scans of an archive that have the voxels of another one.

    The first copy with a label map is kept, else the first one. If copies differ in spacing,
    or by their headers one is a mirrored or rotated form of another, at most one of them is right
    and nobody knows which: all of them are refused.

    Args:
        read: function that returns COLUMNS of all scans in the order of their paths, some at a
            time; it is called twice.
    """

    def __init__(self, read: Callable[[], Iterable[pyarrow.Table]]) -> None:
        voxels = np.concatenate([_NONE, *map(_voxels, read())])
        order = np.argsort(voxels, kind="stable")
        ascending = voxels[order]
        is_same = (ascending[1:] == ascending[:-1]) & (ascending[1:] != 0)
        is_copy = np.zeros(len(order), bool)
        is_copy[order[1:][is_same]] = is_copy[order[:-1][is_same]] = True
        self._places = np.flatnonzero(is_copy)
        self._copies = _taken(read(), self._places)
        # of each copy, the number of the one that is kept, or of the first one where none is
        self._kept = np.full(len(self._places), -1, np.int64)
        self._problems: dict[int, str] = {}
        voxels = voxels[self._places]
        order = np.argsort(voxels, kind="stable")
        for run in runs(voxels[order]):
            self._compare(order[run])

    def _compare(self, group: np.ndarray) -> None:
        """Decide which copies of one scan are refused; their numbers, in the order of paths."""
        copies = self._copies.take(group).to_pylist()
        problem = _contradiction(copies)
        if problem:
            others = " and ".join(copy["id"] for copy in copies)
            self._kept[group] = group[0]
            self._problems[int(group[0])] = (
                f"{others} have the same voxels, but {problem}; correct or remove the wrong file"
            )
            return
        first = next((i for i, copy in enumerate(copies) if copy["label_path"]), 0)
        self._kept[group[np.arange(len(group)) != first]] = group[first]

    def refusals(self, start: int, stop: int) -> Iterator[tuple[int, Refusal]]:
        """The refused ones of the scans start..stop-1: number and refusal of each."""
        low, high = np.searchsorted(self._places, (start, stop)).tolist()
        for place, kept in zip(self._places[low:high].tolist(), self._kept[low:high].tolist()):
            if kept < 0:
                continue
            if kept in self._problems:
                yield place, Refusal(CONTRADICTORY, self._problems[kept])
                continue
            (copy,) = self._copies.slice(kept, 1).to_pylist()
            labels = ", which has labels" if copy["label_path"] else ""
            detail = f"the same voxels as {copy['id']}{labels}"
            yield place, Refusal(DUPLICATE, detail, copy["id"])


_NONE = np.empty(0, np.uint64)


def _voxels(table: pyarrow.Table) -> np.ndarray:
    """Numbers that are equal for copies; 0 for scans that are not accepted."""
    columns = (table.column(name).to_pylist() for name in ("status", "mirror_digest", "digest"))
    numbers = [
        number_of(mirror or digest) if status == ACCEPTED else 0
        for status, mirror, digest in zip(*columns)
    ]
    return np.array(numbers, np.uint64)


def _taken(tables: Iterable[pyarrow.Table], places: np.ndarray) -> pyarrow.Table:
    """The rows at some places, which ascend."""
    found, start = [], 0
    for table in tables:
        low, high = np.searchsorted(places, (start, start + len(table)))
        found.append(table.take(places[low:high] - start))
        start += len(table)
    return pyarrow.concat_tables(found).combine_chunks()


def _contradiction(group: Sequence[Mapping[str, Any]]) -> str:
    """How the geometry of copies differs; empty where it does not."""
    first = group[0]
    for row in group[1:]:
        if row["digest"] != first["digest"]:
            return "by their headers, one is a mirrored or rotated form of the other"
        if not np.allclose(_spacing(row), _spacing(first), rtol=SPACING_TOLERANCE, atol=0):
            one, other = ("x".join(f"{mm:.4g}" for mm in _spacing(each)) for each in (first, row))
            return f"their spacings (z, y, x) are {one} mm and {other} mm"
    return ""


def _spacing(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return row["spacing_z_mm"], row["spacing_y_mm"], row["spacing_x_mm"]


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
