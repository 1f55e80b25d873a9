"""Predicted label maps as NIfTI or DICOM SEG in the geometry of the original scans.

OUT/predictions/TASK/MODEL/ID.nii.gz     ID: scan ID, as in the columns of the manifest
OUT/predictions/TASK/MODEL/ID.dcm        the same as DICOM SEG
OUT/predictions/TASK/MODEL/labels.json   label value -> name
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from tapct.base import console, files
from tapct.base.counted import counted
from tapct.data.manifest import Manifest, Row
from tapct.data.packed import label_files, seg_files
from tapct.data.packed.label_files import FileGrid
from tapct.data.packed.seg_files import SeriesGrid
from tapct.data.packed.store import ScanPlace, Store
from tapct.types import LabelMap, Refused

NIFTI, DICOM_SEG = "nifti", "dicom_seg"
NO_MANIFEST = "the manifest that was packed is gone, has changed or is of an earlier version"


class PredictionFiles:
    """Writes the predictions of an evaluation.

    Args:
        folder: folder of all predictions.
        store: packed scans.
    """

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self._not_original: dict[str, str] = {}  # scan ID -> reason
        self._not_seg: dict[str, str] = {}
        self._grids: dict[str, FileGrid] = {}
        self._series: dict[str, SeriesGrid | None] = {}

    def write(
        self, task: str, model: str, scan_id: str, labels: LabelMap, format: str = NIFTI
    ) -> None:
        """Write the prediction of one model on one test scan.

        Args:
            task: task name.
            model: model name.
            scan_id: scan ID.
            labels: label map on the grid of the packed scan.
            format: `nifti` or `dicom_seg`; a scan for which DICOM SEG cannot be written gets NIfTI.
        """
        place = self.folder / task / model
        place.mkdir(parents=True, exist_ok=True)
        names = {str(value): name for value, name in labels.names}
        files.write_atomically(place / "labels.json", json.dumps(names, indent=1) + "\n")
        nifti, seg = place / f"{scan_id}.nii.gz", place / f"{scan_id}.dcm"
        is_seg = format == DICOM_SEG and self._write_seg(seg, scan_id, labels, f"{task} {model}")
        if not is_seg:
            if scan_id not in self._grids:
                self._grids = {scan_id: self._grid(scan_id, labels)}  # scans come one by one
            label_files.write(nifti, labels.labels_ZYX, self._grids[scan_id])
        # what an earlier evaluation wrote in the other format is not this prediction
        (nifti if is_seg else seg).unlink(missing_ok=True)

    def report(self) -> None:
        """Print which predictions do not have the wanted format, or not the geometry of their
        original file.
        """
        for scans, scan_id, reason in _by_reason(self._not_seg):
            console.say(
                f"predictions of {scans} are NIfTI and not DICOM SEG; scan {scan_id}: {reason}"
            )
        for scans, scan_id, reason in _by_reason(self._not_original):
            console.say(
                f"predictions of {scans} have the axes of the packed scan (LPS) and not those of "
                f"the original file; scan {scan_id}: {reason}"
            )

    def _write_seg(self, path: Path, scan_id: str, labels: LabelMap, description: str) -> bool:
        """Write DICOM SEG; False, with the reason kept, where that is not possible."""
        manifest, rows = self._manifest
        try:
            if manifest is None or scan_id not in rows:
                raise Refused("unreadable", NO_MANIFEST)
            if scan_id not in self._series:
                self._series = {scan_id: None}
                self._series[scan_id] = seg_files.series_grid(manifest, rows[scan_id])
            series = self._series[scan_id]
            if series is not None:
                seg_files.write_seg(path, labels, series, description)
            return series is not None
        except Refused as error:
            self._not_seg[scan_id] = error.detail
            return False

    def _grid(self, scan_id: str, labels: LabelMap) -> FileGrid:
        manifest, rows = self._manifest
        reason = NO_MANIFEST
        if manifest is not None and scan_id in rows:
            try:
                return label_files.original_grid(manifest, rows[scan_id])
            except Refused as error:
                reason = error.detail
        self._not_original[scan_id] = reason
        place = self._places.get(scan_id)
        z, y, x = labels.labels_ZYX.shape
        return label_files.lps_grid(
            (z, y, x),
            labels.spacing_mm,
            () if place is None else place.origin_mm,
            () if place is None else place.directions,
        )

    @functools.cached_property
    def _manifest(self) -> tuple[Manifest | None, Mapping[str, Row]]:
        manifest = self.store.manifest()
        rows = manifest.accepted if manifest is not None else ()
        return manifest, {row.id: row for row in rows}

    @functools.cached_property
    def _places(self) -> Mapping[str, ScanPlace]:
        return self.store.places()


def _by_reason(reason_of: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """For each reason: the number of scans in words, the ID of the first one, the reason."""
    scans_of: dict[str, list[str]] = {}
    for scan_id, reason in reason_of.items():
        scans_of.setdefault(reason, []).append(scan_id)
    for reason, scan_ids in scans_of.items():
        yield counted(len(scan_ids), "scan"), scan_ids[0], reason
