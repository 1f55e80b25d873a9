"""Small pictures of scans of an archive, accepted and refused, read in worker processes.

A refused scan is drawn as its file stores it, because what is wrong with it should be seen; one
that cannot be read has no picture.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tapct.data.manifest import ACCEPTED, Manifest, Row
from tapct.data.readers import LIBRARIES
from tapct.data.scans.geometry import to_lps
from tapct.data.scans.ingest import load_library, read_image, refusing
from tapct.data.search.discover import source_of
from tapct.data.workers.process_pool import DEFAULT_LIMITS, Failure, ScanLimits, map_unordered
from tapct.types import Refused

SIZE = 132  # pixels
ACCEPTED_PICTURES, PER_REASON, MOST_REASONS = 12, 3, 16
_WINDOW_HU = (-200.0, 300.0)  # soft tissue, in which organs can be distinguished


@dataclass(frozen=True)
class PictureTask:
    """One scan for a worker process."""

    row: Row
    root: Path


@dataclass(frozen=True)
class ScanPicture:
    """A slice of a scan.

    Args:
        row: row of the scan.
        png: PNG file; empty where the scan cannot be read.
    """

    row: Row
    png: bytes = b""


def chosen_rows(manifest: Manifest) -> list[Row]:
    """Accepted scans spread over the archive, and the first scans of each reason of refusal."""
    accepted = manifest.accepted
    at = np.linspace(0, len(accepted) - 1, min(len(accepted), ACCEPTED_PICTURES)).round()
    rows = [accepted[int(i)] for i in at]
    by_reason: dict[str, list[Row]] = defaultdict(list)
    for row in manifest.rows:
        if row.status != ACCEPTED and len(by_reason[row.reason]) < PER_REASON:
            by_reason[row.reason].append(row)
    for reason in sorted(by_reason)[:MOST_REASONS]:
        rows += by_reason[reason]
    return rows


def draw(
    manifest: Manifest,
    rows: Sequence[Row],
    workers: int = 0,
    limits: ScanLimits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> list[ScanPicture]:
    """Draw the middle slice of scans.

    Args:
        manifest: manifest; its root is the folder of the scans.
        rows: scans.
        workers: number of processes; 0 reads in this one, without protection.
        limits: time and memory of a scan.
        progress: function that is called with (finished scans, scans in all).
    """
    root = manifest.root.resolve()
    tasks = [PictureTask(row, root) for row in rows]
    pictures: list[ScanPicture | None] = [None] * len(tasks)
    results = map_unordered(
        draw_one,
        tasks,
        workers,
        failed_picture,
        num_bytes=lambda task: task.row.bytes,
        limits=limits,
        modules=(__name__, *LIBRARIES),
    )
    with closing(results):
        for done, (i, picture) in enumerate(results, 1):
            pictures[i] = picture
            if progress is not None:
                progress(done, len(tasks))
    return [picture for picture in pictures if picture is not None]


def failed_picture(task: PictureTask, failure: Failure) -> ScanPicture:
    """The picture of a scan whose worker process was lost: none."""
    return ScanPicture(task.row)


def draw_one(task: PictureTask) -> ScanPicture:
    """Read a scan and draw it; this runs in a worker process."""
    row = task.row
    try:
        source = source_of(task.root, row.path, row.kind, row.file_paths)
        load_library(source)
        with refusing():
            image = read_image(source)
            view_ZYX, (_, dy, dx), *_ = to_lps(image.voxels_IJK, image.affine)
            plane_YX = np.asarray(view_ZYX[len(view_ZYX) // 2], np.float64)
            plane_YX = plane_YX * image.slope + image.intercept
            return ScanPicture(row, png_of(plane_YX, (dy, dx), row.status == ACCEPTED))
    except (Refused, OSError):
        return ScanPicture(row)


def png_of(plane_YX: np.ndarray, spacing_mm: tuple[float, float], is_hu: bool) -> bytes:
    """One slice as a PNG file with square pixels, at most `SIZE` on a side.

    Args:
        plane_YX: values.
        spacing_mm: distance of the pixels along (y, x).
        is_hu: whether the values are HU, which have a window; others are stretched to their own
            range.
    """
    finite = plane_YX[np.isfinite(plane_YX)]
    if not finite.size:
        return b""
    low, high = _WINDOW_HU if is_hu else (float(p) for p in np.percentile(finite, (1, 99)))
    grey_YX = np.nan_to_num((plane_YX - low) / max(high - low, 1e-6), nan=0.0).clip(0, 1)
    mm_y, mm_x = (n * mm for n, mm in zip(plane_YX.shape, spacing_mm, strict=True))
    scale = SIZE / max(mm_y, mm_x)
    size = (max(1, round(mm_x * scale)), max(1, round(mm_y * scale)))
    picture = Image.fromarray((255 * grey_YX).astype(np.uint8)).resize(
        size, Image.Resampling.BILINEAR
    )
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    return out.getvalue()
