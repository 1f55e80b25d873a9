"""Label maps of packed scans as files in the geometry of the original scans.

A scan is packed in LPS with axial slices first; its file may have other axes and directions. A
label map for the original must have the shape, the affine and the order of axes of that file, so
that every viewer shows both on top of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapct.base.geometry import times
from tapct.data.manifest import Manifest, Row
from tapct.data.readers import nifti_labels
from tapct.data.scans import tilt
from tapct.data.scans.geometry import SAME_DIRECTION, to_lps
from tapct.data.scans.ingest import load_library, read_image, refusing
from tapct.data.search.discover import source_of
from tapct.types import UPRIGHT, Refused

NIFTI = "nifti"
SAME_PLACE_MM = 0.01


@dataclass(frozen=True)
class FileGrid:
    """The voxels of a file.

    Args:
        shape_IJK: number of voxels along the axes of the file.
        affine: float64 4x4 matrix, (i, j, k, 1) -> LPS mm.
        nifti: the file, if it is NIfTI.
    """

    shape_IJK: tuple[int, int, int]
    affine: np.ndarray
    nifti: Path | None = None


def original_grid(manifest: Manifest, row: Row, *, upright: bool = False) -> FileGrid:
    """The grid of the file that a scan was read from.

    Args:
        manifest: manifest that was packed.
        row: row of the scan.
        upright: whether the grid of a scan with gantry tilt is the one with right angles onto which
            its slices were shifted, with the axes of the file.
    Raises:
        Refused: the file is gone, cannot be read, or lies on another grid than the packed scan.
    """
    source = source_of(manifest.root, row.path, row.kind, row.file_paths)
    load_library(source)
    with refusing():
        if not source.files[0].exists():
            raise Refused("unreadable", "the original file is not there")
        if row.kind == NIFTI:
            shape_IJK, affine = nifti_labels.read_grid(source.files[0])
            grid = FileGrid(shape_IJK, affine, source.files[0])
        else:
            image = read_image(source)
            if upright and tilt.is_tilted(image.affine):
                image = tilt.upright(image)
            i, j, k = image.voxels_IJK.shape
            grid = FileGrid((i, j, k), image.affine)
        _check_same(grid, row)
    return grid


def lps_grid(
    shape_ZYX: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    origin_mm: tuple[float, ...] = (),
    directions: tuple[float, ...] = (),
) -> FileGrid:
    """The grid of a packed scan as that of a file with the axes x, y, z.

    Args:
        shape_ZYX: number of voxels.
        spacing_mm: spacing (z, y, x).
        origin_mm: LPS position (x, y, z) of the first voxel; empty where unknown.
        directions: unit vectors of the axes x, y, z, one after the other; empty where unknown.
    """
    axes_33 = np.asarray(directions or UPRIGHT, dtype=np.float64).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = axes_33.T * np.asarray(spacing_mm[::-1])
    affine[:3, 3] = origin_mm or (0.0, 0.0, 0.0)
    z, y, x = shape_ZYX
    return FileGrid((x, y, z), affine)


def write(path: Path, labels_ZYX: np.ndarray, grid: FileGrid) -> None:
    """Write the label map of a packed scan as NIfTI on the grid of a file.

    Args:
        path: file to write, .nii.gz, in a folder that exists.
        labels_ZYX: labels on the grid of the packed scan.
        grid: grid of the file.
    """
    nifti_labels.write(path, along_file(labels_ZYX, grid), grid.affine, grid.nifti)


def along_file(labels_ZYX: np.ndarray, grid: FileGrid) -> np.ndarray:
    """Labels of a packed scan along the axes of the file."""
    labels_IJK = np.empty(grid.shape_IJK, dtype=labels_ZYX.dtype)
    # the packed scan is a view of the file's axes, so writing into that view is the way back
    view_ZYX, *_ = to_lps(labels_IJK, grid.affine)
    view_ZYX[...] = labels_ZYX
    return labels_IJK


def _check_same(grid: FileGrid, row: Row) -> None:
    """Refuse a file whose grid is not that of the packed scan."""
    stand_in_IJK = np.broadcast_to(np.uint8(0), grid.shape_IJK)
    view_ZYX, spacing_mm, origin_mm, directions = to_lps(stand_in_IJK, grid.affine)
    packed = (row.depth, row.height, row.width)
    if view_ZYX.shape != packed:
        raise Refused(
            "grid_mismatch", f"the original is {times(view_ZYX.shape)}, packed is {times(packed)}"
        )
    row_mm = (row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm)
    same = np.allclose(spacing_mm, row_mm, rtol=1e-3)
    if row.origin_mm and row.directions:
        same &= np.allclose(origin_mm, row.origin_mm, rtol=0, atol=SAME_PLACE_MM)
        axes_9 = np.asarray(directions).reshape(9)
        same &= np.allclose(axes_9, row.directions, rtol=0, atol=SAME_DIRECTION)
    if not same:
        raise Refused("grid_mismatch", "the original lies at another place than the packed scan")
