"""Label maps of packed scans as DICOM SEG on the series that the scans were read from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tapct.data.formats import TITLES
from tapct.data.manifest import Manifest, Row
from tapct.data.packed.label_files import FileGrid, along_file, original_grid
from tapct.data.readers import DICOM, dicom_seg
from tapct.data.readers.dicom_seg import SegSource
from tapct.data.scans import tilt
from tapct.data.scans.ingest import refusing
from tapct.data.search.discover import source_of
from tapct.types import LabelMap, Refused


@dataclass(frozen=True)
class SeriesGrid:
    """A DICOM series and its grid.

    Args:
        grid: its voxels, columns first.
        source: its images.
        is_upright: whether `grid` is the one onto which slices with gantry tilt were shifted.
    """

    grid: FileGrid
    source: SegSource
    is_upright: bool


def series_grid(manifest: Manifest, row: Row) -> SeriesGrid:
    """The DICOM series that a scan was read from.

    Args:
        manifest: manifest that was packed.
        row: row of the scan.
    Raises:
        Refused: the scan is not DICOM, or see `original_grid` and `dicom_seg.read_source`.
    """
    if row.kind != DICOM.name:
        raise Refused("unsupported", f"the original is {TITLES.get(row.kind, row.kind)}, not DICOM")
    is_upright = tilt.MARK in row.marks.split(",")
    grid = original_grid(manifest, row, upright=is_upright)
    source = source_of(manifest.root, row.path, row.kind, row.file_paths)
    with refusing():
        images = dicom_seg.read_source(source.files, source.frames)
    return SeriesGrid(grid, images, is_upright)


def write_seg(path: Path, labels: LabelMap, series: SeriesGrid, description: str) -> None:
    """Write the label map of a packed scan as DICOM SEG.

    Args:
        path: file to write, .dcm, in a folder that exists.
        labels: labels on the grid of the packed scan; each label with a name is a segment.
        series: series of the scan.
        description: SeriesDescription of the SEG.
    Raises:
        Refused: the label map has no names, or highdicom does not accept the images.
    """
    labels_IJK = along_file(labels.labels_ZYX, series.grid)
    affine = series.grid.affine if series.is_upright else None
    try:
        dicom_seg.write(path, labels_IJK, series.source, labels.names, description, affine)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        # the text of the library may quote the header
        raise Refused(
            "unsupported", f"highdicom does not accept its headers ({type(error).__name__})"
        ) from error
