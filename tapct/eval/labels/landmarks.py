"""Named points in scans, from the CSV file of `eval.landmarks`: one row per point.

One column names the scan (`path`, `case_id` or `id`), the column `name` the point. Its position is
in `z_mm`, `y_mm`, `x_mm`, which are LPS coordinates of the patient's frame as in DICOM, or in
`z_voxel`, `y_voxel`, `x_voxel`, which count voxels of the packed scan from the centre of its first
one (LPS, axial slices first). Points of one name in two scans of a patient are the same point.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.base.files import expand_path
from tapct.data.packed.store import ScanPlace, StoredScan
from tapct.data.tables import Table, read_table
from tapct.eval.labels.table_rows import match_rows
from tapct.eval.scans.labelled_scan import Landmarks, Point

OPTION = "eval.landmarks"
NAME_COLUMN = "name"
IN_MM = ("z_mm", "y_mm", "x_mm")
IN_VOXELS = ("z_voxel", "y_voxel", "x_voxel")


@dataclass(frozen=True)
class LandmarkTable:
    """The named points of an archive's scans.

    Args:
        points: position by scan ID and name, as in `LabelledScan.landmarks_mm`.
        digest: hash of the points.
        summary: one line on what was read.
    """

    points: Landmarks
    digest: str
    summary: str


def read_landmarks(
    file: Path | str, scans: Sequence[StoredScan], places: Mapping[str, ScanPlace]
) -> LandmarkTable:
    """Read named points.

    Args:
        file: CSV file, see above.
        scans: accepted scans of the store.
        places: where the scans lie in their patients' frames, from `Store.places`; only needed for
            points in mm.
    Raises:
        UserError: the table cannot be used, or no point lies in its scan.
    """
    table = read_table(expand_path(file), OPTION)
    name_column, axes, in_mm = _columns(table)
    if in_mm and not places:
        raise UserError(
            f"{OPTION}: {table.file} gives points in mm of the patient's frame, and the origins of "
            "the scans are in the manifest that was packed, which is gone, has changed or is of an "
            "earlier version; index and pack again, or give z_voxel, y_voxel, x_voxel"
        )
    matched = match_rows(table, scans, OPTION)
    scan_of = {scan.id: scan for scan in scans}
    points: dict[str, dict[str, Point]] = {}
    num_outside = 0
    for scan_id, row in matched.found:
        name, scan = row[name_column], scan_of[scan_id]
        if not name:
            raise UserError(f"{OPTION}: {table.file} has a point without a {NAME_COLUMN}; name it")
        given = _position(row, axes, table)
        point = _in_scan(given, scan, places[scan_id] if in_mm else None)
        if not _is_inside(point, scan):
            num_outside += 1
            continue
        if points.setdefault(scan_id, {}).setdefault(name, point) != point:
            raise UserError(
                f"{OPTION}: {table.file} gives scan {row[matched.key]} two positions of {name}; "
                "keep one row per point"
            )
    num = sum(map(len, points.values()))
    where = f"{len(points)} of {counted(len(scans), 'scan')}"
    parts = [f"landmarks: {counted(num, 'point')} in {where}", *matched.lines()]
    if num_outside:
        parts.append(f"points outside their scan: {num_outside}")
    if not num:
        raise UserError(
            f"{OPTION}: no point of {table.file} lies in its scan; rule: {', '.join(axes)} are "
            f"{'LPS coordinates of the patient, as in DICOM' if in_mm else 'voxels from 0'}"
        )
    content = json.dumps(points, sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return LandmarkTable(points, digest, "; ".join(parts))


def _columns(table: Table) -> tuple[str, tuple[str, ...], bool]:
    """The column of names, those of the position (z, y, x), and whether they are in mm.

    Raises:
        UserError: a column is missing.
    """
    by_lower = {name.lower(): name for name in table.columns}
    for names, in_mm in ((IN_MM, True), (IN_VOXELS, False)):
        if NAME_COLUMN in by_lower and all(name in by_lower for name in names):
            return by_lower[NAME_COLUMN], tuple(by_lower[name] for name in names), in_mm
    raise UserError(
        f"{OPTION}: {table.file} has the columns {', '.join(table.columns) or 'none'}; rule: "
        f"{NAME_COLUMN}, and {', '.join(IN_MM)} or {', '.join(IN_VOXELS)}"
    )


def _position(row: Mapping[str, str], axes: Sequence[str], table: Table) -> Point:
    """The position in a row, as it is given.

    Raises:
        UserError: a coordinate is no finite number.
    """
    values = []
    for axis in axes:
        text = row[axis].replace(",", ".") if table.delimiter != "," else row[axis]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{OPTION}: {table.file} has {axis} {row[axis]!r}; rule: a number")
        values.append(value)
    z, y, x = values
    return z, y, x


def _in_scan(given: Point, scan: StoredScan, place: ScanPlace | None) -> Point:
    """A point in mm along the axes of its scan; `place` is None for one in voxels."""
    if place is not None:
        return place.in_scan(given[::-1])
    z, y, x = (at * mm for at, mm in zip(given, scan.spacing_mm))
    return z, y, x


def _is_inside(point: Point, scan: StoredScan) -> bool:
    """Whether a point lies in a voxel of its scan."""
    return all(
        -0.5 <= at / mm <= size - 0.5
        for at, mm, size in zip(point, scan.spacing_mm, scan.shape_ZYX)
    )
