"""Put the masks of a DICOM SEG and the contours of an RTSTRUCT onto the grid of their scan.

Axes: X Y Z and Z Y X voxels of the scan; P points of a contour.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapct.base.counted import counted
from tapct.base.marks import file_name
from tapct.data.labels.names import clean_names
from tapct.data.labels.overlay import Overlay
from tapct.data.labels.polygons import fill_even_odd
from tapct.data.labels.values import MAX_LABEL
from tapct.data.readers.dicom_labels import Contour, LabelObject, SegFrame, frames, read_object
from tapct.data.scans.geometry import GRID_TOLERANCE, SAME_DIRECTION, voxel_to_mm
from tapct.types import LabelMap, Refused, Volume


@dataclass(frozen=True)
class _Piece:
    """The mask of a SEG on one plane, in the axes of the scan.

    Args:
        values_XYZ: structure numbers; one axis has length 1.
        place: where it lies in the scan, along X, Y, Z.
    """

    values_XYZ: np.ndarray
    place: tuple[slice, ...]


@dataclass(frozen=True)
class DicomLabels:
    """A SEG or RTSTRUCT on the grid of its scan.

    Args:
        path: path of the file.
        label_map: its labels.
        notes: one line for each thing that was left out.
        overlaps: one line about structures that overlap; empty where none do.
        is_contours: whether it is an RTSTRUCT.
        voxels_of: label value -> places of all its voxels in the flat label map, ascending, those
            that a smaller structure has in `label_map` too; empty where nobody asked for them.
    """

    path: Path
    label_map: LabelMap
    notes: tuple[str, ...]
    overlaps: str
    is_contours: bool
    voxels_of: Mapping[int, np.ndarray]


def read_dicom_labels(path: Path, volume: Volume, *, keep_voxels: bool = False) -> DicomLabels:
    """Read a SEG or RTSTRUCT as a label map on the grid of its scan.

    Where structures overlap, the smaller one is kept (see `Overlay`). The label value of a
    structure is its SegmentNumber or ROINumber.

    Args:
        path: path of the file.
        volume: scan that it refers to.
        keep_voxels: True to fill `voxels_of`.
    Raises:
        Refused: `grid_mismatch`, `not_labels`, or the file cannot be read.
    """
    found = read_object(path)
    numbers = [structure.number for structure in found.structures]
    if len(set(numbers)) < len(numbers) or not all(0 < number <= MAX_LABEL for number in numbers):
        raise Refused(
            "not_labels",
            f"{file_name(path)} numbers its structures {numbers[:8]}; rule: different, 1 to "
            f"{MAX_LABEL}",
        )
    overlay = Overlay(volume.hu_ZYX.shape, keep_claims=keep_voxels)
    if found.dataset is not None:
        _paint_frames(found, volume, overlay)
    else:
        _paint_contours(found.contours, volume, overlay)
    named = [(structure.number, structure.name) for structure in found.structures]
    names = clean_names(named, found.identity)
    notes = []
    if found.num_open:
        open_ones = counted(
            found.num_open,
            "contour that is no closed polygon is",
            "contours that are no closed polygons are",
        )
        notes.append(f"{open_ones} not used")
    num_refused = sum(bool(name) for _, name in named) - len(names)
    if num_refused:
        notes.append(f"{counted(num_refused, 'label name is', 'label names are')} not used")
    labels = LabelMap(
        overlay.labels_ZYX, volume.spacing_mm, volume.origin_mm, names, volume.directions
    )
    return DicomLabels(
        path,
        labels,
        tuple(notes),
        overlay.note(),
        is_contours=found.dataset is None,
        voxels_of={
            value: np.unique(np.concatenate(claims)) for value, claims in overlay.claims.items()
        },
    )


def _paint_frames(found: LabelObject, volume: Volume, overlay: Overlay) -> None:
    """Paint the frames of a SEG; they are decoded twice, first to count the voxels of each
    segment.
    """
    assert found.dataset is not None
    known = {structure.number for structure in found.structures}
    num_voxels: dict[int, int] = defaultdict(int)
    for frame in frames(found.dataset):
        values, counts = np.unique(frame.values, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist()):
            num_voxels[value] += count
    unknown = sorted(set(num_voxels) - known - {0})
    if unknown:
        raise Refused("not_labels", f"pixels name segment {unknown[0]}, which the file lacks")
    to_voxels = np.linalg.inv(voxel_to_mm(volume))
    shape_XYZ = volume.hu_ZYX.shape[::-1]
    for frame in frames(found.dataset):
        if not frame.values.any():
            continue
        piece = _placed(frame, to_voxels, shape_XYZ)
        for value in np.unique(piece.values_XYZ[piece.values_XYZ != 0]).tolist():
            mask_ZYX = (piece.values_XYZ == value).transpose()
            overlay.add_part(value, mask_ZYX, piece.place[::-1], num_voxels[value])


def _placed(frame: SegFrame, to_voxels: np.ndarray, shape_XYZ: Sequence[int]) -> _Piece:
    """Turn a frame into the axes of the scan, and cut off its background outside the scan.

    Args:
        frame: frame of a SEG.
        to_voxels: 4x4 matrix, LPS mm -> (x, y, z) voxels of the scan.
        shape_XYZ: voxels of the scan.
    Raises:
        Refused: `grid_mismatch`, the pixels are not voxels of the scan.
    """
    matrix = to_voxels @ frame.to_mm
    rows, columns = frame.values.shape
    steps = matrix[:3, :2]  # voxels of the scan per column and per row of the frame
    whole = np.rint(steps)
    ends = matrix @ np.asarray([[0, columns - 1, 0], [0, 0, rows - 1], [0, 0, 0], [1, 1, 1]])
    first = np.rint(ends[:3, 0])
    off = np.abs(first[:, None] + whole @ [[0, columns - 1, 0], [0, 0, rows - 1]] - ends[:3]).max()
    is_turned = (np.abs(whole).sum(axis=0) != 1).any() or abs(whole[:, 0] @ whole[:, 1]) > 0
    if is_turned or off > GRID_TOLERANCE or np.abs(steps - whole).max() > 10 * SAME_DIRECTION:
        raise Refused(
            "grid_mismatch",
            f"a frame of the segmentation lies up to {off:.2f} voxels off the voxels of the scan; "
            f"rule: {GRID_TOLERANCE}",
        )
    column_axis, row_axis = (int(np.abs(whole[:, side]).argmax()) for side in (0, 1))
    normal_axis = 3 - column_axis - row_axis
    # columns and rows first, then the axis of the plane, then sorted into x, y, z
    values = frame.values.transpose()[:, :, None]
    values_XYZ = np.moveaxis(values, (0, 1, 2), (column_axis, row_axis, normal_axis))
    starts = first.astype(int)
    for axis, side in ((column_axis, 0), (row_axis, 1)):
        if whole[axis, side] < 0:
            values_XYZ = np.flip(values_XYZ, axis)
            starts[axis] -= values_XYZ.shape[axis] - 1
    return _cut(values_XYZ, starts, shape_XYZ)


def _cut(values_XYZ: np.ndarray, starts: np.ndarray, shape_XYZ: Sequence[int]) -> _Piece:
    """The part of a frame inside the scan.

    Raises:
        Refused: `grid_mismatch`, labelled pixels lie outside.
    """
    inside, place = [], []
    for start, num, size in zip(starts.tolist(), values_XYZ.shape, shape_XYZ):
        low, high = max(start, 0), max(min(start + num, size), max(start, 0))
        inside.append(slice(low - start, high - start))
        place.append(slice(low, high))
    kept_XYZ = values_XYZ[tuple(inside)]
    num_cut = np.count_nonzero(values_XYZ) - np.count_nonzero(kept_XYZ)
    if num_cut:
        raise Refused(
            "grid_mismatch", f"{num_cut} labelled pixels of one frame lie outside the scan"
        )
    return _Piece(kept_XYZ, tuple(place))


def _paint_contours(contours: Sequence[Contour], volume: Volume, overlay: Overlay) -> None:
    """Fill the polygons of every region slice by slice by the even-odd rule."""
    polygons: dict[int, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    to_voxels = np.linalg.inv(voxel_to_mm(volume))
    depth, height, width = volume.hu_ZYX.shape
    for contour in contours:
        points_P3 = contour.points_mm @ to_voxels[:3, :3].T + to_voxels[:3, 3]
        z = int(np.rint(points_P3[:, 2].mean()))
        off = float(np.abs(points_P3[:, 2] - z).max())
        if off > GRID_TOLERANCE:
            raise Refused(
                "grid_mismatch",
                f"a contour lies {off:.2f} slices off the slices of the scan; rule: "
                f"{GRID_TOLERANCE}",
            )
        if not 0 <= z < depth:
            raise Refused("grid_mismatch", f"a contour lies on slice {z} of 0 to {depth - 1}")
        polygons[contour.number][z].append(points_P3[:, :2])
    for number, by_slice in polygons.items():
        mask_ZYX = np.zeros(volume.hu_ZYX.shape, dtype=bool)
        for z, on_slice in by_slice.items():
            mask_ZYX[z] = fill_even_odd(on_slice, (height, width))
        overlay.add(number, mask_ZYX)
